//! The OS thread that writes, with group commit.
//!
//! Why group commit? Each commit costs one fsync, so jobs that wait together share one transaction. Two more threads keep
//! that path short: one answers a group while the writer commits the next one, and one copies the log ([`wal`](super::wal)).

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{SendError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, ErrorKind, Result};
use crate::sqlite::error::file_error;
use crate::sqlite::health::FileHealth;
use crate::sqlite::wal::WalCheckpointer;

#[cfg(test)]
mod tests;

/// Limits the jobs that wait for the writer. Further callers wait for a free place.
const QUEUE_CAPACITY: usize = 1_024;
/// Limits the jobs of one commit.
const MAX_GROUP: usize = 512;

/// The failure that a written record must survive before the writer acknowledges it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum CommitLevel {
    /// The end of the process. The operating system has the record.
    ProcessCrash,
    /// A power cut. The record is synced to the disk.
    PowerCut,
    /// A power cut and a restart, because a caller gets the promise that the record is kept (I4). The writer refuses the job
    /// if the file has lost its name.
    Acknowledged,
}

/// Work inside a group's transaction. The writer answers it when the result of the commit is known.
trait Job: Send {
    fn level(&self) -> CommitLevel;
    /// Runs the work, and returns whether it succeeded. The writer may run it again after a rollback.
    fn run(&mut self, connection: &Connection, path: &Path) -> bool;
    /// Returns the error of the last run.
    fn error(&self) -> Option<&Error>;
    fn answer(self: Box<Self>, committed: Result<()>);
}

/// Jobs that share one transaction.
type Group = Vec<Box<dyn Job>>;

struct QueuedJob<F, T, A> {
    level: CommitLevel,
    work: F,
    /// The result of the last run.
    result: Option<Result<T>>,
    on_commit: A,
    answer: oneshot::Sender<Result<T>>,
}

impl<F, T: Send, A> Job for QueuedJob<F, T, A>
where
    F: FnMut(&Connection) -> rusqlite::Result<T> + Send,
    A: FnOnce(&Result<T>) + Send,
{
    fn level(&self) -> CommitLevel {
        self.level
    }

    fn run(&mut self, connection: &Connection, path: &Path) -> bool {
        self.result.insert((self.work)(connection).map_err(file_error(path))).is_ok()
    }

    fn error(&self) -> Option<&Error> {
        self.result.as_ref().and_then(|result| result.as_ref().err())
    }

    fn answer(self: Box<Self>, committed: Result<()>) {
        let never_ran = || Error::new(ErrorKind::LocalStorage, "the writer of the local file skipped a job");
        let Self { result, on_commit, answer, .. } = *self;
        let result = match result {
            Some(Err(error)) => Err(error),
            Some(Ok(value)) => committed.map(|()| value),
            None => Err(committed.err().unwrap_or_else(never_ran)),
        };
        on_commit(&result);
        // A cancelled caller does not undo the work.
        answer.send(result).ok();
    }
}

/// A handle on the writer's thread. Dropping it ends the thread after the waiting jobs.
pub(crate) struct Writer {
    /// Whether the writer truncates the log after the next group.
    truncate_requested: Arc<AtomicBool>,
    jobs: Mutex<Option<mpsc::Sender<Box<dyn Job>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    /// Starts the thread. It calls `on_rollback` after each failed transaction, before the jobs get their answers.
    pub(crate) fn start(
        connection: Connection,
        health: Arc<FileHealth>,
        on_rollback: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        let (jobs, waiting) = mpsc::channel(QUEUE_CAPACITY);
        let truncate_requested = Arc::new(AtomicBool::new(false));
        let requested = Arc::clone(&truncate_requested);
        let thread = std::thread::Builder::new()
            .name("threadkeep-local".into())
            .spawn(move || serve(connection, waiting, &health, &requested, &on_rollback))
            .map_err(|e| {
                Error::new(ErrorKind::LocalStorage, "cannot start the writer thread of the local file")
                    .with_source(e)
            })?;
        Ok(Self { truncate_requested, jobs: Mutex::new(Some(jobs)), thread: Mutex::new(Some(thread)) })
    }

    /// Submits `work` for a transaction that other jobs share. Returns as soon as the writer has the job.
    ///
    /// The receiver gets the result after the commit. The writer calls `on_commit` before any caller gets the result of this
    /// job or of a later job.
    pub(crate) async fn submit<T: Send + 'static>(
        &self,
        level: CommitLevel,
        work: impl FnMut(&Connection) -> rusqlite::Result<T> + Send + 'static,
        on_commit: impl FnOnce(&Result<T>) + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T>>> {
        let (answer, answered) = oneshot::channel();
        // The clone lets a caller wait for a place without the lock. It also keeps the thread alive until the job is queued.
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(closed)?;
        let job = QueuedJob { level, work, result: None, on_commit, answer };
        jobs.send(Box::new(job)).await.map_err(|_| closed())?;
        Ok(answered)
    }

    /// Requests that the writer truncates the log after the next group. A reader can prevent it; then the next request tries
    /// again.
    pub(crate) fn request_truncate(&self) {
        self.truncate_requested.store(true, SeqCst);
    }

    /// Ends the thread after the waiting jobs. Blocks.
    pub(crate) fn close(&self) {
        drop(self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            thread.join().ok();
        }
    }
}

/// Returns the error for a call after the file was closed.
pub(crate) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the local file is closed")
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

/// Serves groups until the last handle is gone.
fn serve(
    mut connection: Connection,
    mut waiting: mpsc::Receiver<Box<dyn Job>>,
    health: &Arc<FileHealth>,
    truncate_requested: &AtomicBool,
    on_rollback: &dyn Fn(),
) {
    let wal = WalCheckpointer::watch(&mut connection, health);
    let completion = CompletionThread::start();
    while let Some(first) = waiting.blocking_recv() {
        let more = std::iter::from_fn(|| waiting.try_recv().ok());
        let group: Group = std::iter::once(first).chain(more).take(MAX_GROUP).collect();
        for (group, committed) in serve_if_named(&connection, group, &wal, health, on_rollback) {
            let error = committed.as_ref().err().or_else(|| group.iter().find_map(|job| job.error()));
            // Before the answers, so that a caller who got an error also finds the fault.
            wal.note_result(error, health);
            completion.answer(group, committed, !waiting.is_empty());
        }
        // After the answers, so that no caller waits for a checkpoint.
        if truncate_requested.swap(false, SeqCst) {
            wal.truncate(&connection);
        } else {
            wal.checkpoint_if_due(&connection);
        }
    }
}

/// Whether a caller gets the promise that the job's record is kept.
fn is_acknowledged(job: &dyn Job) -> bool {
    job.level() == CommitLevel::Acknowledged
}

/// Commits the jobs. Refuses the acknowledged ones if the file has lost its name.
fn serve_if_named(
    connection: &Connection,
    group: Group,
    wal: &WalCheckpointer,
    health: &FileHealth,
    on_rollback: &dyn Fn(),
) -> Vec<(Group, Result<()>)> {
    let serve = |group| serve_group(connection, group, wal, health.path(), on_rollback);
    let needs_name = group.iter().any(|job| is_acknowledged(&**job));
    let checked = if needs_name { health.check_main_name() } else { Ok(()) };
    let Err(name_lost) = checked else { return serve(group) };
    let (refused, group): (Group, Group) = group.into_iter().partition(|job| is_acknowledged(&**job));
    let served = if group.is_empty() { Vec::new() } else { serve(group) };
    std::iter::once((refused, Err(name_lost))).chain(served).collect()
}

/// Commits the jobs in one transaction, and returns their answers.
///
/// If one job fails, the writer rolls back and runs each job alone. A savepoint for each job would make every commit slower,
/// and failures are rare.
fn serve_group(
    connection: &Connection,
    mut group: Group,
    wal: &WalCheckpointer,
    path: &Path,
    on_rollback: &dyn Fn(),
) -> Vec<(Group, Result<()>)> {
    let committed = wal
        // Before the transaction, so that no commit builds on pages that the disk lost (I15).
        .recover_after_fsync_failure(connection)
        .map_err(CommitError::before_disk)
        .and_then(|()| commit(connection, &mut group, path))
        .map_err(|failed| {
            // SQLite may have rolled back already. Then this call fails, and says nothing new.
            connection.execute_batch("rollback").ok();
            on_rollback();
            let CommitError::Transaction { error, reached_disk } = failed else { return None };
            wal.observe_error(&error);
            let error = file_error(path)(error);
            tracing::error!(%error, jobs = group.len(), "a commit into the local file failed; its callers get errors");
            Some(if reached_disk { error.with_outcome_unknown() } else { error })
        });
    match committed {
        // Each job runs again, so the work must be repeatable. One job is not split again (I12).
        Err(None) if group.len() > 1 => group
            .into_iter()
            .flat_map(|job| serve_group(connection, vec![job], wal, path, on_rollback))
            .collect(),
        // A job that failed alone answers with its own error.
        Ok(()) | Err(None) => vec![(group, Ok(()))],
        Err(Some(error)) => vec![(group, Err(error))],
    }
}

/// The reason for a rollback.
enum CommitError {
    /// A job failed.
    Job,
    /// SQLite failed.
    Transaction {
        error: rusqlite::Error,
        /// Whether the transaction may be stored despite the error.
        reached_disk: bool,
    },
}

impl CommitError {
    fn before_disk(error: rusqlite::Error) -> Self {
        Self::Transaction { error, reached_disk: false }
    }
}

/// Runs the jobs in one transaction. The strictest job decides whether the commit is synced.
fn commit(connection: &Connection, group: &mut [Box<dyn Job>], path: &Path) -> Result<(), CommitError> {
    let level = group.iter().map(|job| job.level()).max().unwrap_or(CommitLevel::PowerCut);
    // SQLite refuses to change this pragma inside a transaction.
    let synchronous = if level == CommitLevel::ProcessCrash { "normal" } else { "full" };
    connection.pragma_update(None, "synchronous", synchronous).map_err(CommitError::before_disk)?;
    connection.execute_batch("begin immediate").map_err(CommitError::before_disk)?;
    if !group.iter_mut().all(|job| job.run(connection, path)) {
        return Err(CommitError::Job);
    }
    // A failed commit may be in the log all the same (I6).
    let failed = |error| CommitError::Transaction { error, reached_disk: true };
    connection.execute_batch("commit").map_err(failed)
}

/// Answers groups in the order of their commits, while the writer commits the next group.
struct CompletionThread {
    groups: Option<SyncSender<(Group, Result<()>)>>,
    /// The number of groups that the completion thread has not answered yet.
    in_flight: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl CompletionThread {
    fn start() -> Self {
        // One group may wait. Then the writer slows down to the speed of the answers (I12).
        let (groups, submitted) = sync_channel::<(Group, Result<()>)>(1);
        let in_flight = Arc::new(AtomicUsize::new(0));
        let unanswered = Arc::clone(&in_flight);
        let run = move || {
            for (group, committed) in submitted {
                answer(group, &committed);
                // After the answers: until then, a later group must queue behind this one.
                unanswered.fetch_sub(1, SeqCst);
            }
        };
        let thread = std::thread::Builder::new().name("threadkeep-answer".into()).spawn(run);
        Self { groups: Some(groups), in_flight, thread: thread.ok() }
    }

    /// Answers the group here, or on the completion thread if the writer has more work.
    ///
    /// A wake-up of the completion thread takes longer than an answer here. But a group must not overtake earlier groups.
    fn answer(&self, group: Group, committed: Result<()>, more_waits: bool) {
        let is_offloaded = more_waits || self.in_flight.load(SeqCst) > 0;
        let Some(groups) = self.groups.as_ref().filter(|_| is_offloaded) else {
            return answer(group, &committed);
        };
        // Before the send, or the other OS thread could count the group down first.
        self.in_flight.fetch_add(1, SeqCst);
        // The channel is closed if the thread could not start.
        if let Err(SendError((group, committed))) = groups.send((group, committed)) {
            answer(group, &committed);
        }
    }
}

impl Drop for CompletionThread {
    fn drop(&mut self) {
        drop(self.groups.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn answer(group: Group, committed: &Result<()>) {
    group.into_iter().for_each(|job| job.answer(committed.clone()));
}
