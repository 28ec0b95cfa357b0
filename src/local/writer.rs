//! The one thread that writes, with group commit.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::file::failure;
use crate::error::{Error, ErrorKind, Result};

/// How many jobs may wait for the thread; further callers wait for a place.
const WAITING: usize = 1_024;
/// How many jobs share one commit at most.
const GROUP: usize = 512;

/// Work inside a group's transaction, answered once it is known whether the group is on disk.
trait Job: Send {
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()>;
    fn answer(self: Box<Self>, committed: Result<()>);
}

struct Work<F, T> {
    work: Option<F>,
    done: Option<T>,
    answer: oneshot::Sender<Result<T>>,
}

impl<F, T: Send> Job for Work<F, T>
where
    F: FnOnce(&Connection) -> rusqlite::Result<T> + Send,
{
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        self.done = self.work.take().map(|work| work(connection)).transpose()?;
        Ok(())
    }

    fn answer(self: Box<Self>, committed: Result<()>) {
        let lost = || Error::new(ErrorKind::Local, "the local file was not written");
        let Self { done, answer, .. } = *self;
        // The caller may have gone; the work is done all the same.
        answer.send(committed.and_then(|()| done.ok_or_else(lost))).ok();
    }
}

/// A handle on the thread. Dropping it ends the thread after the jobs that are already waiting.
pub(super) struct Writer {
    jobs: Option<mpsc::Sender<Box<dyn Job>>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(connection: Connection, path: PathBuf) -> Result<Self> {
        let (jobs, waiting) = mpsc::channel(WAITING);
        let thread = std::thread::Builder::new()
            .name("threadkeep-local".into())
            .spawn(move || serve(&connection, waiting, &path))
            .map_err(|e| Error::new(ErrorKind::Local, "cannot start the writing thread").with_source(e))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Runs `work` in a transaction shared with others; answers when it is on disk.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let closed = || Error::new(ErrorKind::Closed, "the local file is closed");
        let jobs = self.jobs.as_ref().ok_or_else(closed)?;
        let job = Work { work: Some(work), done: None, answer };
        jobs.send(Box::new(job)).await.map_err(|_| closed())?;
        answered.await.map_err(|_| closed())?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn serve(connection: &Connection, mut waiting: mpsc::Receiver<Box<dyn Job>>, path: &Path) {
    while let Some(first) = waiting.blocking_recv() {
        let more = std::iter::from_fn(|| waiting.try_recv().ok());
        let mut group: Vec<_> = std::iter::once(first).chain(more).take(GROUP).collect();
        let committed = carry_out(connection, &mut group).map_err(failure(path)).and_then(|()| {
            // A commit that fails may have reached the disk.
            let unknown = |error| failure(path)(error).with_outcome_unknown();
            connection.execute_batch("commit").map_err(unknown)
        });
        if let Err(error) = &committed {
            tracing::error!(%error, jobs = group.len(), "a local commit failed");
            connection.execute_batch("rollback").ok();
        }
        group.into_iter().for_each(|job| job.answer(committed.clone()));
    }
}

fn carry_out(connection: &Connection, group: &mut [Box<dyn Job>]) -> rusqlite::Result<()> {
    connection.execute_batch("begin immediate")?;
    group.iter_mut().try_for_each(|job| job.run(connection))
}
