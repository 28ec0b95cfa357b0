//! The OS threads that read. Each has its own connection, which sees committed data only.
//!
//! The threads belong to the file, so a read never waits for the blocking work of the application.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, ErrorKind, Result};
use crate::sqlite::error::file_error;
use crate::sqlite::file;
use crate::sqlite::health::FileHealth;
use crate::sqlite::worker::{Worker, closed};

/// Limits the concurrent reads. Reads are short, and each needs a thread and a connection.
const MAX_READERS: usize = 4;

type ReadJob = Box<dyn FnOnce(&mut Option<Connection>) + Send>;

/// A handle on the threads. Dropping it ends the threads after the current reads.
pub(crate) struct Readers {
    health: Arc<FileHealth>,
    /// Holds one job. Further callers wait for its place, so cancelled callers leave one job behind at most.
    worker: Worker<mpsc::Sender<ReadJob>>,
}

impl Readers {
    pub(crate) fn start(health: &Arc<FileHealth>) -> Result<Self> {
        let (jobs, waiting) = mpsc::channel(1);
        let waiting = Arc::new(Mutex::new(waiting));
        let serve_one = |_| {
            let (waiting, health) = (Arc::clone(&waiting), Arc::clone(health));
            move || serve(&waiting, &health)
        };
        Ok(Self {
            health: Arc::clone(health),
            worker: Worker::start("threadkeep-read", jobs, (0..MAX_READERS).map(serve_one))?,
        })
    }

    pub(crate) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let health = Arc::clone(&self.health);
        let job = move |slot: &mut Option<Connection>| {
            answer.send(run(slot, &health, query)).ok();
        };
        self.worker.sender()?.send(Box::new(job)).await.map_err(|_| closed())?;
        let panicked =
            |e| Error::new(ErrorKind::LocalStorage, "a read of the local file panicked").with_source(e);
        answered.await.map_err(panicked)?
    }

    /// Ends the threads after the waiting reads. Blocks.
    pub(crate) fn close(&self) {
        self.worker.close();
    }
}

fn serve(waiting: &Mutex<mpsc::Receiver<ReadJob>>, health: &FileHealth) {
    // Opened while the name is right, so that a file that is deleted later stays readable.
    let mut slot = file::open_to_read(&health.path).ok();
    let next = || waiting.lock().blocking_recv();
    while let Some(job) = next() {
        // A query that panics costs its connection, not the thread.
        if catch_unwind(AssertUnwindSafe(|| job(&mut slot))).is_err() {
            slot = None;
        }
    }
}

fn run<T>(
    slot: &mut Option<Connection>,
    health: &FileHealth,
    query: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> Result<T> {
    let path = &health.path;
    let connection = match slot.take() {
        Some(connection) => connection,
        None => open(path, health)?,
    };
    let result = query(slot.insert(connection)).map_err(file_error(path));
    health.note_read(result.as_ref().err());
    result
}

/// Opens a connection again. Checks the names first, because the path may lead to another file by now.
fn open(path: &Path, health: &FileHealth) -> Result<Connection> {
    health.check_names()?;
    file::open_to_read(path).inspect_err(|error| health.note_read(Some(error)))
}
