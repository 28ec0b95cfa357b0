//! The OS threads that read. Each has its own connection, which sees committed data only.
//!
//! The threads belong to the file, so a read never waits for the blocking work of the application.

use std::panic::{AssertUnwindSafe, catch_unwind};
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

type ReadJob = Box<dyn FnOnce(&Connection) + Send>;

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
        // Opened while the name is right, so that a file that is deleted later stays readable.
        let open_one = |_| file::open_to_read(&health.path);
        let connections = (0..MAX_READERS).map(open_one).collect::<Result<Vec<_>>>()?;
        let serve_one = |connection| {
            let waiting = Arc::clone(&waiting);
            move || serve(&waiting, &connection)
        };
        Ok(Self {
            health: Arc::clone(health),
            worker: Worker::start("threadkeep-read", jobs, connections.into_iter().map(serve_one))?,
        })
    }

    pub(crate) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let health = Arc::clone(&self.health);
        let job = move |connection: &Connection| {
            let result = query(connection).map_err(file_error(&health.path));
            health.note_read(result.as_ref().err());
            answer.send(result).ok();
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

fn serve(waiting: &Mutex<mpsc::Receiver<ReadJob>>, connection: &Connection) {
    let next = || waiting.lock().blocking_recv();
    while let Some(job) = next() {
        // A query that panics ends neither the thread nor the connection. Its caller gets an error.
        catch_unwind(AssertUnwindSafe(|| job(connection))).ok();
    }
}
