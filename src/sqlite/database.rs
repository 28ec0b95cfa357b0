//! An open file with its writer, its readers and its lock.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::resilience::blocking::unblock;
use crate::sqlite::error;
use crate::sqlite::file::{self, FileKind};
use crate::sqlite::health::FileHealth;
use crate::sqlite::lock::Lock;
use crate::sqlite::readers::Readers;
use crate::sqlite::writer::{CommitLevel, Writer, closed};

pub(crate) struct Database {
    health: Arc<FileHealth>,
    readers: Readers,
    writer: Writer,
    // Declared last, so dropped last: no other process may open the file before the writer ends.
    lock: SharedLock,
}

/// Holds the lock until the file is closed.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedLock(Arc<Mutex<Option<Lock>>>);

impl SharedLock {
    fn lock(&self) -> MutexGuard<'_, Option<Lock>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records in the lock file whether copies may be invalid. See [`Lock::write`].
    ///
    /// The closure runs under the mutex, so that the last call writes the newest state.
    pub(crate) fn note(&self, copies_are_invalid: impl FnOnce() -> bool) {
        if let Some(lock) = self.lock().as_mut() {
            lock.write(copies_are_invalid());
        }
    }
}

/// A file that is locked and open for writing. Its threads do not run yet.
pub(crate) struct LockedDatabase {
    pub(crate) path: PathBuf,
    /// The path that the caller named, perhaps a link.
    given: PathBuf,
    pub(crate) connection: Connection,
    lock: Lock,
}

impl LockedDatabase {
    /// Opens the file, and creates it if it does not exist. Waits some seconds for another process that has it open.
    pub(crate) fn new(path: &Path, kind: FileKind) -> Result<Self> {
        let given = path.to_owned();
        let (path, lock, is_truncated) = Self::lock(path)?;
        if is_truncated {
            return Err(error::truncated(&path));
        }
        let connection = file::open_to_write(&path, kind)?;
        Self { path, given, connection, lock }.finish()
    }

    /// As [`new`](Self::new), but quarantines a corrupt file and creates a new one. Returns the path of the quarantined file.
    pub(crate) fn or_quarantine(path: &Path, kind: FileKind) -> Result<(Self, Option<PathBuf>)> {
        let given = path.to_owned();
        let (path, lock, is_truncated) = Self::lock(path)?;
        let open_checked = || {
            let connection = file::open_to_write(&path, kind)?;
            file::check(&connection, &path).map(|()| connection)
        };
        let opened = if is_truncated { Err(error::truncated(&path)) } else { open_checked() };
        let (connection, quarantined) = match opened {
            Ok(connection) => (connection, None),
            // Only a file that threadkeep has opened before: a foreign file stays in its place.
            Err(error) if lock.has_opened() && error::is_corrupt(&error) => {
                let quarantined = file::quarantine(&path)?;
                file::create(&path)?;
                (file::open_to_write(&path, kind)?, Some(quarantined))
            }
            Err(error) => return Err(error),
        };
        Ok((Self { path, given, connection, lock }.finish()?, quarantined))
    }

    /// Locks the file, and creates it if it does not exist. The flag says whether the file has lost its contents.
    fn lock(path: &Path) -> Result<(PathBuf, Lock, bool)> {
        let canonical = path.canonicalize();
        canonical.as_deref().map_or(Ok(()), file::reject_foreign)?;
        let existed = canonical.is_ok();
        let path = file::create(path)?;
        let lock = Lock::acquire(&path)?;
        let is_truncated = lock.has_opened() && file::is_truncated(&path, existed);
        Ok((path, lock, is_truncated))
    }

    /// Finishes the opening of a file that belongs to threadkeep and is not corrupt.
    fn finish(mut self) -> Result<Self> {
        file::checkpoint_on_close(&self.connection, true).map_err(error::file_error(&self.path))?;
        file::restrict_permissions(&self.path);
        self.lock.mark_opened();
        Ok(self)
    }
}

impl Database {
    /// Starts the threads. The writer calls `on_rollback` after each failed transaction.
    pub(crate) fn start(opened: LockedDatabase, on_rollback: impl Fn() + Send + 'static) -> Result<Self> {
        let LockedDatabase { path, given, connection, lock } = opened;
        let health = Arc::new(FileHealth::of(&path, &given));
        let readers = Readers::start(&health)?;
        let writer = Writer::start(connection, Arc::clone(&health), on_rollback)?;
        Ok(Self { health, readers, writer, lock: SharedLock(Arc::new(Mutex::new(Some(lock)))) })
    }

    pub(crate) fn path(&self) -> &Path {
        self.health.path()
    }

    /// Returns the known fault of the file, without a look at the file.
    pub(crate) fn fault(&self) -> Option<Error> {
        self.health.fault()
    }

    /// Runs a query on a connection of a reader. It sees committed data only.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.readers.read(query).await
    }

    /// Runs `work` in a transaction that other jobs share. Returns after the commit.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        level: CommitLevel,
        work: impl FnMut(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.submit(level, work, |_| {}).await?.await.map_err(|_| closed())?
    }

    /// As [`write`](Self::write), but returns as soon as the writer has the job. The receiver gets the result.
    ///
    /// The writer calls `on_commit` before any caller gets the result of this job or of a later job.
    pub(crate) async fn submit<T: Send + 'static>(
        &self,
        level: CommitLevel,
        work: impl FnMut(&Connection) -> rusqlite::Result<T> + Send + 'static,
        on_commit: impl FnOnce(&Result<T>) + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T>>> {
        self.writer.submit(level, work, on_commit).await
    }

    /// Returns some free pages to the file system, and requests that the writer truncates the write-ahead log.
    ///
    /// Deleted data is overwritten in the file, but the log still holds it.
    pub(crate) async fn vacuum(&self) -> Result<()> {
        self.writer.request_truncate();
        let vacuum = |connection: &Connection| {
            let mut statement = connection.prepare_cached("pragma incremental_vacuum(1000)")?;
            let mut rows = statement.query([])?;
            // Each step frees one page.
            while rows.next()?.is_some() {}
            Ok(())
        };
        self.write(CommitLevel::ProcessCrash, vacuum).await
    }

    /// Checks that the file works: commits a row, and reads it.
    pub(crate) async fn check_working(&self) -> Result<()> {
        let upsert =
            "insert into meta values ('proved', 1) on conflict (name) do update set value = value + 1";
        self.write(CommitLevel::Acknowledged, |connection| connection.execute(upsert, []).map(drop)).await?;
        self.read(|connection| file::meta(connection, "proved").map(drop)).await
    }

    /// Finishes the waiting jobs, and releases the lock. Later calls fail with [`Closed`](crate::ErrorKind::Closed).
    pub(crate) async fn close(self: &Arc<Self>) -> Result<()> {
        let this = Arc::clone(self);
        unblock(move || {
            // The writer ends last: as the last connection it checkpoints the log, and leaves one file.
            this.readers.close();
            this.writer.close();
            drop(this.lock.lock().take());
        })
        .await
    }

    /// Returns a handle on the file's lock.
    pub(crate) fn shared_lock(&self) -> SharedLock {
        self.lock.clone()
    }

    /// See [`Lock::had_invalid_copies`].
    pub(crate) fn had_invalid_copies(&self) -> bool {
        self.lock.lock().as_ref().is_some_and(Lock::had_invalid_copies)
    }
}
