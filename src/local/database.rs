//! An open file: one writer, a few readers, a lock.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::Connection;
use tokio::sync::{Semaphore, oneshot};

use super::file::{self, Lock, Role};
use super::writer::{Survives, Writer, closed};
use crate::error::{Error, ErrorKind, Result};

/// Reads at once: they are short, and each takes a thread and a connection.
const READERS: usize = 4;

pub(super) struct Database {
    path: PathBuf,
    /// Connections that are not in use, at most [`READERS`].
    readers: Mutex<Vec<Connection>>,
    reading: Semaphore,
    writer: Writer,
    // Declared last, so dropped last: nobody else may open the file before its writer is done.
    lock: Holder,
}

/// Holds the lock until the file is closed.
#[derive(Debug, Clone, Default)]
pub(super) struct Holder(Arc<Mutex<Option<Lock>>>);

impl Holder {
    fn lock(&self) -> MutexGuard<'_, Option<Lock>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Lock::note`]; asked under the lock, so that the last note says how things are.
    pub(super) fn note(&self, is_doubtful: impl FnOnce() -> bool) {
        if let Some(lock) = self.lock().as_mut() {
            lock.note(is_doubtful());
        }
    }
}

/// A file that is locked and open for its one writer, which does not run yet.
pub(super) struct Opened {
    pub(super) path: PathBuf,
    pub(super) connection: Connection,
    lock: Lock,
}

impl Opened {
    /// Opens the file, creating it where it does not exist; waits some seconds for another process that has it open.
    pub(super) fn new(path: &Path, role: Role) -> Result<Self> {
        let (path, lock, was_emptied) = Self::lock(path)?;
        if was_emptied {
            return Err(file::emptied(&path));
        }
        let connection = file::open_to_write(&path, role)?;
        Self { path, connection, lock }.settled()
    }

    /// As [`new`](Self::new); a file that is damaged is set aside, and a new one takes its place.
    pub(super) fn or_set_aside(path: &Path, role: Role) -> Result<(Self, Option<PathBuf>)> {
        let (path, lock, was_emptied) = Self::lock(path)?;
        let whole = || {
            let connection = file::open_to_write(&path, role)?;
            file::check(&connection, &path).map(|()| connection)
        };
        let (connection, aside) = match if was_emptied { Err(file::emptied(&path)) } else { whole() } {
            Ok(connection) => (connection, None),
            Err(error) if lock.has_opened() && file::is_damage(&error) => {
                let aside = file::set_aside(&path)?;
                file::create(&path)?;
                (file::open_to_write(&path, role)?, Some(aside))
            }
            Err(error) => return Err(error),
        };
        Ok((Self { path, connection, lock }.settled()?, aside))
    }

    /// Locks the file, creating it where it does not exist; says whether it has lost all that it held.
    fn lock(path: &Path) -> Result<(PathBuf, Lock, bool)> {
        let real = path.canonicalize();
        real.as_deref().map_or(Ok(()), file::refuse_foreign)?;
        let was_there = real.is_ok();
        let path = file::create(path)?;
        let lock = Lock::acquire(&path)?;
        let was_emptied = lock.has_opened() && file::is_emptied(&path, was_there);
        Ok((path, lock, was_emptied))
    }

    /// It is one of threadkeep's, and whole.
    fn settled(mut self) -> Result<Self> {
        file::leave_log(&self.connection, false).map_err(file::failure(&self.path))?;
        file::make_private(&self.path);
        self.lock.opened();
        Ok(self)
    }
}

impl Database {
    /// Starts the writer; `undone` is called whenever a transaction of it failed.
    pub(super) fn start(opened: Opened, undone: impl Fn() + Send + 'static) -> Result<Self> {
        let Opened { path, connection, lock } = opened;
        let writer = Writer::start(connection, path.clone(), undone)?;
        Ok(Self {
            path,
            readers: Mutex::default(),
            reading: Semaphore::new(READERS),
            writer,
            lock: Holder(Arc::new(Mutex::new(Some(lock)))),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a query on a connection of its own, which sees what is committed.
    pub(super) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let this = Arc::clone(self);
        let _turn = self.reading.acquire().await.map_err(|_| closed())?;
        unblock(move || {
            let idle = || this.readers.lock().unwrap_or_else(PoisonError::into_inner);
            let reader = idle().pop();
            let reader = reader.map_or_else(|| file::open_to_read(&this.path), Ok)?;
            let result = query(&reader);
            idle().push(reader);
            result.map_err(file::failure(&this.path))
        })
        .await?
    }

    /// Runs `work` in a transaction shared with others; answers when it is committed.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        survives: Survives,
        work: impl FnMut(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.hand_over(survives, work, |_| {}).await?.await.map_err(|_| closed())?
    }

    /// As [`write`](Self::write), but that it returns when the writer has the work, and answers to whoever waits. `announce`
    /// is called before anybody hears of this or of any later work.
    pub(super) async fn hand_over<T: Send + 'static>(
        &self,
        survives: Survives,
        work: impl FnMut(&Connection) -> rusqlite::Result<T> + Send + 'static,
        announce: impl FnOnce(&Result<T>) + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T>>> {
        self.writer.hand_over(survives, work, announce).await
    }

    /// Finishes the jobs that wait, and lets others open the file. What comes later is told that it is closed.
    pub(super) async fn close(self: &Arc<Self>) -> Result<()> {
        let this = Arc::clone(self);
        self.reading.close();
        unblock(move || {
            // The writer last: it leaves one file behind, without a log.
            this.readers.lock().unwrap_or_else(PoisonError::into_inner).clear();
            this.writer.close();
            drop(this.lock.lock().take());
        })
        .await
    }

    /// Who holds the file's lock.
    pub(super) fn holder(&self) -> Holder {
        self.lock.clone()
    }

    /// See [`Lock::was_doubtful`].
    pub(super) fn was_doubtful(&self) -> bool {
        self.lock.lock().as_ref().is_some_and(Lock::was_doubtful)
    }
}

/// Runs what blocks on a thread that may.
pub(super) async fn unblock<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let failed = |e| Error::new(ErrorKind::Local, "work on the local file was given up").with_source(e);
    tokio::task::spawn_blocking(work).await.map_err(failed)
}
