//! The threads that read, each with a connection of its own, which sees what is committed.
//!
//! They are the file's own threads, so a read never waits for the application's blocking work.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rusqlite::Connection;
use tokio::sync::{Semaphore, oneshot};

use super::condition::Condition;
use super::file::{self, failure};
use super::writer::closed;
use crate::error::{Error, ErrorKind, Result};

/// Reads at once: they are short, and each takes a thread and a connection.
const READERS: usize = 4;

type Job = Box<dyn FnOnce(&mut Option<Connection>) + Send>;

/// The threads. Dropping this ends them after the reads under way.
pub(super) struct Readers {
    condition: Arc<Condition>,
    jobs: Mutex<Option<Sender<Job>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Callers wait here, not in the channel: a caller that goes leaves nothing behind.
    turns: Arc<Semaphore>,
}

impl Readers {
    pub(super) fn start(condition: &Arc<Condition>) -> Result<Self> {
        let (jobs, waiting) = channel();
        let waiting = Arc::new(Mutex::new(waiting));
        let start = |_| {
            let (waiting, condition) = (Arc::clone(&waiting), Arc::clone(condition));
            let serve = move || serve(&waiting, &condition);
            std::thread::Builder::new().name("threadkeep-read".into()).spawn(serve)
        };
        let threads = (0..READERS).map(start).collect::<std::io::Result<_>>();
        let no_thread = |e| Error::new(ErrorKind::Local, "cannot start the reading threads").with_source(e);
        Ok(Self {
            condition: Arc::clone(condition),
            jobs: Mutex::new(Some(jobs)),
            threads: Mutex::new(threads.map_err(no_thread)?),
            turns: Arc::new(Semaphore::new(READERS)),
        })
    }

    /// Runs a query on one of the threads.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let turn = Arc::clone(&self.turns).acquire_owned().await.map_err(|_| closed())?;
        let (answer, answered) = oneshot::channel();
        let condition = Arc::clone(&self.condition);
        let job = move |own: &mut Option<Connection>| {
            let result = run(own, &condition, query);
            drop(turn);
            answer.send(result).ok();
        };
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(closed)?;
        jobs.send(Box::new(job)).map_err(|_| closed())?;
        let panicked =
            |e| Error::new(ErrorKind::Local, "a read of the local file was given up").with_source(e);
        answered.await.map_err(panicked)?
    }

    /// Ends the threads after the reads under way. Blocks.
    pub(super) fn close(&self) {
        self.turns.close();
        drop(self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            thread.join().ok();
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.close();
    }
}

fn serve(waiting: &Mutex<Receiver<Job>>, condition: &Condition) {
    // Opened while the name is right, so that a file that is deleted later can still be read.
    let mut own = file::open_to_read(condition.path()).ok();
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
    while let Ok(job) = next() {
        // A query that panics costs its connection, not the thread.
        if catch_unwind(AssertUnwindSafe(|| job(&mut own))).is_err() {
            own = None;
        }
    }
}

fn run<T>(
    own: &mut Option<Connection>,
    condition: &Condition,
    query: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> Result<T> {
    let path = condition.path();
    let connection = match own.take() {
        Some(connection) => connection,
        None => open(path, condition)?,
    };
    let result = query(own.insert(connection)).map_err(failure(path));
    condition.note_read(result.as_ref().err());
    result
}

/// By now the path may lead to another file.
fn open(path: &Path, condition: &Condition) -> Result<Connection> {
    condition.look()?;
    file::open_to_read(path).inspect_err(|error| condition.note_read(Some(error)))
}
