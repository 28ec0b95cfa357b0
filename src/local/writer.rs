//! The one thread that writes, with group commit.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::file::failure;
use crate::error::{Error, ErrorKind, Result};

/// How many jobs may wait for the thread; further callers wait for a place.
const WAITING: usize = 1_024;
/// How many jobs share one commit at most.
const GROUP: usize = 512;
/// Pages in the write-ahead log from which on it is copied into the file when there is nothing else to do …
const IDLE_PAGES: i32 = 1_000;
/// … and from which on in any case.
const MOST_PAGES: i32 = 16_000;

/// What a written record must survive before it is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Survives {
    /// The end of the process: the operating system has it.
    Crash,
    /// A power cut: it is synced to disk.
    PowerCut,
}

/// Work inside a group's transaction, answered once it is known whether the group is committed.
trait Job: Send {
    fn survives(&self) -> Survives;
    /// Whether it succeeded; if not, what it did is undone.
    fn run(&mut self, connection: &Connection) -> bool;
    fn answer(self: Box<Self>, committed: Result<()>, path: &Path);
}

struct Work<F, T, A> {
    survives: Survives,
    work: Option<F>,
    done: Option<rusqlite::Result<T>>,
    announce: A,
    answer: oneshot::Sender<Result<T>>,
}

impl<F, T: Send, A> Job for Work<F, T, A>
where
    F: FnOnce(&Connection) -> rusqlite::Result<T> + Send,
    A: FnOnce(&T) + Send,
{
    fn survives(&self) -> Survives {
        self.survives
    }

    fn run(&mut self, connection: &Connection) -> bool {
        self.done = self.work.take().map(|work| work(connection));
        matches!(self.done, Some(Ok(_)))
    }

    fn answer(self: Box<Self>, committed: Result<()>, path: &Path) {
        let lost = || Error::new(ErrorKind::Local, "the local file was not written");
        let Self { done, announce, answer, .. } = *self;
        let result = match done {
            Some(Err(error)) => Err(failure(path)(error)),
            Some(Ok(done)) => committed.map(|()| done),
            None => Err(committed.err().unwrap_or_else(lost)),
        };
        if let Ok(done) = &result {
            announce(done);
        }
        // The caller may have gone; the work is done all the same.
        answer.send(result).ok();
    }
}

/// A handle on the thread. Dropping it ends the thread after the jobs that are already waiting.
pub(super) struct Writer {
    jobs: Mutex<Option<mpsc::Sender<Box<dyn Job>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    /// `undone` is called whenever a group's transaction failed, before its jobs hear of it.
    pub(super) fn start(
        connection: Connection,
        path: PathBuf,
        undone: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        let (jobs, waiting) = mpsc::channel(WAITING);
        let thread = std::thread::Builder::new()
            .name("threadkeep-local".into())
            .spawn(move || serve(connection, waiting, &path, &undone))
            .map_err(|e| Error::new(ErrorKind::Local, "cannot start the writing thread").with_source(e))?;
        Ok(Self { jobs: Mutex::new(Some(jobs)), thread: Mutex::new(Some(thread)) })
    }

    /// Runs `work` in a transaction shared with others; answers when it is committed. `announce` is called before any later
    /// work is begun.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        survives: Survives,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
        announce: impl FnOnce(&T) + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let closed = || Error::new(ErrorKind::Closed, "the local file is closed");
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(closed)?;
        let job = Work { survives, work: Some(work), done: None, announce, answer };
        jobs.send(Box::new(job)).await.map_err(|_| closed())?;
        answered.await.map_err(|_| closed())?
    }

    /// Ends the thread after the jobs that are already waiting. Blocks.
    pub(super) fn close(&self) {
        drop(self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            thread.join().ok();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

fn serve(
    mut connection: Connection,
    mut waiting: mpsc::Receiver<Box<dyn Job>>,
    path: &Path,
    undone: &dyn Fn(),
) {
    let pages = Arc::new(AtomicI32::new(0));
    let counted = Arc::clone(&pages);
    let count = move |_: &mut rusqlite::hooks::Wal, pages: i32| {
        counted.store(pages, Relaxed);
        Ok(())
    };
    if let Err(error) = connection.wal_hook(Some(count)) {
        tracing::error!(%error, "the write-ahead log cannot be watched");
    }
    while let Some(first) = waiting.blocking_recv() {
        let more = std::iter::from_fn(|| waiting.try_recv().ok());
        let mut group: Vec<_> = std::iter::once(first).chain(more).take(GROUP).collect();
        let committed = commit(&connection, &mut group).map_err(|(error, reached_disk)| {
            let error = failure(path)(error);
            if reached_disk { error.with_outcome_unknown() } else { error }
        });
        if let Err(error) = &committed {
            tracing::error!(%error, jobs = group.len(), "a local commit failed");
            connection.execute_batch("rollback").ok();
            undone();
        }
        group.into_iter().for_each(|job| job.answer(committed.clone(), path));
        // After the answers, so that no commit waits for it.
        let pages = pages.load(Relaxed);
        if pages > MOST_PAGES || (pages > IDLE_PAGES && waiting.is_empty()) {
            connection.query_row("pragma wal_checkpoint(passive)", [], |_| Ok(())).ok();
        }
    }
}

/// Runs the jobs in one transaction; an error says whether it may have reached the disk all the same.
fn commit(connection: &Connection, group: &mut [Box<dyn Job>]) -> Result<(), (rusqlite::Error, bool)> {
    let survives = group.iter().map(|job| job.survives()).max().unwrap_or(Survives::PowerCut);
    let synchronous = if survives == Survives::PowerCut { "full" } else { "normal" };
    let undone = |error| (error, false);
    connection.pragma_update(None, "synchronous", synchronous).map_err(undone)?;
    connection.execute_batch("begin immediate").map_err(undone)?;
    group.iter_mut().try_for_each(|job| alone(connection, &mut **job)).map_err(undone)?;
    connection.execute_batch("commit").map_err(|error| (error, true))
}

/// Runs one job so that its failure undoes nothing but itself.
fn alone(connection: &Connection, job: &mut dyn Job) -> rusqlite::Result<()> {
    connection.prepare_cached("savepoint job")?.execute([])?;
    if !job.run(connection) && !connection.is_autocommit() {
        connection.prepare_cached("rollback to job")?.execute([])?;
    }
    // Where SQLite gave up the whole transaction (the disk is full), this fails, and all jobs hear of it.
    connection.prepare_cached("release job")?.execute([])?;
    Ok(())
}
