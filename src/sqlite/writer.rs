//! The OS thread that writes, with group commit.
//!
//! Why group commit? Each commit costs one fsync, so jobs that wait together share one transaction. Two more threads keep
//! that path short: one answers a group while the writer commits the next one, and one copies the log ([`wal`](super::wal)).

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{SendError, SyncSender, sync_channel};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, ErrorKind, Result};
use crate::sqlite::error::file_error;
use crate::sqlite::health::FileHealth;
use crate::sqlite::wal::WalCheckpointer;
use crate::sqlite::worker::Worker;

pub(crate) use crate::sqlite::worker::closed;

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

struct Job {
    level: CommitLevel,
    task: Box<dyn Task>,
}

type Group = Vec<Job>;

/// The work of a job, and its answer. One trait object has both, so that a job is one allocation.
trait Task: Send {
    /// Runs inside the group's transaction. The writer may call this again after a rollback.
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()>;
    /// Called when the result of the commit is known.
    fn answer(self: Box<Self>, committed: Result<()>);
}

struct Submitted<V, T, W, C> {
    work: W,
    /// The value that the last run returned.
    returned: Option<V>,
    on_commit: C,
    sender: oneshot::Sender<Result<T>>,
}

impl<V, T, W, C> Task for Submitted<V, T, W, C>
where
    V: Send,
    T: Send,
    W: FnMut(&Connection) -> rusqlite::Result<V> + Send,
    C: FnOnce(Result<V>) -> Result<T> + Send,
{
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        self.returned = Some((self.work)(connection)?);
        Ok(())
    }

    fn answer(self: Box<Self>, committed: Result<()>) {
        let Self { returned, on_commit, sender, .. } = *self;
        let never_ran = || Error::new(ErrorKind::LocalStorage, "the writer of the local file skipped a job");
        let result = committed.and_then(|()| returned.ok_or_else(never_ran));
        // A cancelled caller does not undo the work.
        sender.send(on_commit(result)).ok();
    }
}

/// A handle on the writer's thread. Dropping it ends the thread after the waiting jobs.
pub(crate) struct Writer {
    /// Whether the writer truncates the log after the next group.
    truncate_requested: Arc<AtomicBool>,
    worker: Worker<mpsc::Sender<Job>>,
}

impl Writer {
    /// Starts the thread. It calls `on_rollback` after each failed transaction, before the jobs get their answers.
    pub(crate) fn start(
        mut connection: Connection,
        health: Arc<FileHealth>,
        on_rollback: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        let (jobs, waiting) = mpsc::channel(QUEUE_CAPACITY);
        let truncate_requested = Arc::new(AtomicBool::new(false));
        let wal = WalCheckpointer::watch(&mut connection, &health)?;
        let completion = CompletionThread::start()?;
        let group_writer =
            GroupWriter { completion, wal, connection, health, is_synced: Cell::new(None), on_rollback };
        let requested = Arc::clone(&truncate_requested);
        let serve = move || group_writer.serve(waiting, &requested);
        Ok(Self { truncate_requested, worker: Worker::start("threadkeep-local", jobs, [serve])? })
    }

    /// Submits `work` for a transaction that other jobs share. Returns as soon as the writer has the job.
    ///
    /// The receiver gets the result of `on_commit` after the commit. The writer calls `on_commit` before any caller gets the
    /// result of this job or of a later job.
    pub(crate) async fn submit<V: Send + 'static, T: Send + 'static>(
        &self,
        level: CommitLevel,
        work: impl FnMut(&Connection) -> rusqlite::Result<V> + Send + 'static,
        on_commit: impl FnOnce(Result<V>) -> Result<T> + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T>>> {
        let (sender, answered) = oneshot::channel();
        let task = Box::new(Submitted { work, returned: None, on_commit, sender });
        self.worker.sender()?.send(Job { level, task }).await.map_err(|_| closed())?;
        Ok(answered)
    }

    /// Requests that the writer truncates the log after the next group. A reader can prevent it; then the next request tries
    /// again.
    pub(crate) fn request_truncate(&self) {
        self.truncate_requested.store(true, SeqCst);
    }

    pub(crate) fn close(&self) {
        self.worker.close();
    }
}

/// The step at which a transaction failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CommitStep {
    Begin,
    /// The work of one job.
    Work,
    /// The transaction may be stored despite the error (I6).
    Commit,
}

/// Runs on the writer's thread. The fields end in their order: as the last connection, this one leaves a file without a log.
struct GroupWriter<R> {
    completion: CompletionThread,
    wal: WalCheckpointer,
    connection: Connection,
    health: Arc<FileHealth>,
    /// Whether SQLite syncs the commits of this connection now.
    is_synced: Cell<Option<bool>>,
    on_rollback: R,
}

impl<R: Fn()> GroupWriter<R> {
    /// Serves groups until the last handle is gone.
    fn serve(self, mut waiting: mpsc::Receiver<Job>, truncate_requested: &AtomicBool) {
        while let Some(first) = waiting.blocking_recv() {
            let more = std::iter::from_fn(|| waiting.try_recv().ok());
            let group = std::iter::once(first).chain(more).take(MAX_GROUP).collect();
            for (group, committed) in self.commit_or_split(group) {
                // Before the answers, so that a caller who got an error also finds the fault.
                self.wal.note_result(committed.as_ref().err(), &self.health);
                self.completion.answer(group, committed, !waiting.is_empty());
            }
            // After the answers, so that no caller waits for a checkpoint.
            if truncate_requested.swap(false, SeqCst) {
                self.wal.truncate(&self.connection);
            } else {
                self.wal.checkpoint_if_due(&self.connection);
            }
        }
    }

    /// Commits the jobs in one transaction, and returns their answers. Refuses the acknowledged jobs if the file has lost its name.
    ///
    /// If one job fails, the writer rolls back and runs each job alone. A savepoint for each job would make every commit
    /// slower, and failures are rare.
    fn commit_or_split(&self, mut group: Group) -> Vec<(Group, Result<()>)> {
        let needs_name = |job: &Job| job.level == CommitLevel::Acknowledged;
        if group.iter().any(needs_name)
            && let Err(name_lost) = self.health.check_names()
        {
            let (refused, others): (Group, Group) = group.into_iter().partition(needs_name);
            let committed = if others.is_empty() { Vec::new() } else { self.commit_or_split(others) };
            return std::iter::once((refused, Err(name_lost))).chain(committed).collect();
        }
        let Err((step, error)) = self.commit(&mut group) else { return vec![(group, Ok(()))] };
        // SQLite may have rolled back already. Then this call fails, and says nothing new.
        self.connection.execute_batch("rollback").ok();
        (self.on_rollback)();
        // Each job runs again, so the work must be repeatable. One job is not split again (I12).
        if step == CommitStep::Work && group.len() > 1 {
            return group.into_iter().flat_map(|job| self.commit_or_split(vec![job])).collect();
        }
        self.wal.observe_error(&error);
        let mut error = file_error(&self.health.path)(error);
        if step != CommitStep::Work {
            tracing::error!(%error, jobs = group.len(), "a commit into the local file failed; its callers get errors");
        }
        if step == CommitStep::Commit {
            error = error.with_outcome_unknown();
        }
        vec![(group, Err(error))]
    }

    /// Runs the jobs in one transaction. The strictest job decides whether the commit is synced.
    fn commit(&self, group: &mut [Job]) -> Result<(), (CommitStep, rusqlite::Error)> {
        let connection = &self.connection;
        let failed_at = |step| move |error| (step, error);
        let level = group.iter().map(|job| job.level).max().unwrap_or(CommitLevel::PowerCut);
        let is_synced = level > CommitLevel::ProcessCrash;
        let execute = |sql| connection.prepare_cached(sql)?.execute([]).map(drop);
        // Before the transaction, so that no commit builds on pages that the disk lost (I15).
        self.wal
            .recover_after_fsync_failure(connection)
            // Before the transaction, because SQLite refuses to change this pragma inside one.
            .and_then(|()| self.sync_commits(is_synced))
            .and_then(|()| execute("begin immediate"))
            .map_err(failed_at(CommitStep::Begin))?;
        group.iter_mut().try_for_each(|job| job.task.run(connection)).map_err(failed_at(CommitStep::Work))?;
        execute("commit").map_err(failed_at(CommitStep::Commit))
    }

    /// Sets whether the next commits are synced, unless it is set so already.
    fn sync_commits(&self, is_synced: bool) -> rusqlite::Result<()> {
        if self.is_synced.get() != Some(is_synced) {
            self.connection.pragma_update(None, "synchronous", if is_synced { "full" } else { "normal" })?;
            self.is_synced.set(Some(is_synced));
        }
        Ok(())
    }
}

/// Answers groups in the order of their commits, while the writer commits the next group.
struct CompletionThread {
    /// The number of groups that the completion thread has not answered yet.
    in_flight: Arc<AtomicUsize>,
    worker: Worker<SyncSender<(Group, Result<()>)>>,
}

impl CompletionThread {
    fn start() -> Result<Self> {
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
        Ok(Self { in_flight, worker: Worker::start("threadkeep-answer", groups, [run])? })
    }

    /// Answers the group here, or on the completion thread if the writer has more work.
    ///
    /// A wake-up of the completion thread takes longer than an answer here. But a group must not overtake earlier groups.
    fn answer(&self, group: Group, committed: Result<()>, more_waits: bool) {
        let is_offloaded = more_waits || self.in_flight.load(SeqCst) > 0;
        let Some(groups) = self.worker.sender().ok().filter(|_| is_offloaded) else {
            return answer(group, &committed);
        };
        // Before the send, or the other OS thread could count the group down first.
        self.in_flight.fetch_add(1, SeqCst);
        // The channel is closed if the thread panicked.
        if let Err(SendError((group, committed))) = groups.send((group, committed)) {
            answer(group, &committed);
        }
    }
}

fn answer(group: Group, committed: &Result<()>) {
    group.into_iter().for_each(|job| job.task.answer(committed.clone()));
}
