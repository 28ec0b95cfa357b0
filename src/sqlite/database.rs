//! An open file with its writer, its readers and its lock.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rusqlite::Connection;

use crate::error::{Error, Result};
use crate::resilience::tasks::unblock;
use crate::sqlite::error;
use crate::sqlite::file::{self, FileKind};
use crate::sqlite::health::FileHealth;
use crate::sqlite::lock::Lock;
use crate::sqlite::readers::Readers;
use crate::sqlite::worker::closed;
use crate::sqlite::writer::{CommitLevel, Writer};

pub(crate) struct Database {
    health: Arc<FileHealth>,
    readers: Readers,
    pub(crate) writer: Writer,
    // Declared last, so dropped last: no other process may open the file before the writer ends.
    pub(crate) lock: SharedLock,
}

/// Holds the lock until the file is closed.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedLock(Arc<Mutex<Option<Lock>>>);

impl SharedLock {
    /// Records in the lock file whether copies may be invalid.
    ///
    /// The closure runs under the mutex, so that the last call writes the newest state.
    pub(crate) fn note(&self, copies_are_invalid: impl FnOnce() -> bool) {
        if let Some(lock) = self.0.lock().as_mut() {
            lock.state.copies_are_invalid = copies_are_invalid();
            lock.save();
        }
    }
}

/// A file that is locked and open for writing. Its threads do not run yet.
pub(crate) struct LockedDatabase {
    pub(crate) path: PathBuf,
    /// The path that the caller named, perhaps a link.
    given: PathBuf,
    pub(crate) connection: Connection,
    pub(crate) lock: Lock,
}

impl LockedDatabase {
    /// Opens the file, and creates it if it does not exist. Waits some seconds for another process that has it open.
    pub(crate) fn new(path: &Path, kind: FileKind) -> Result<Self> {
        let (file, lock, lost_contents) = lock(path)?;
        lost_contents?;
        Self::of(path, file::open_to_write(&file, kind)?, file, lock)
    }

    /// As [`new`](Self::new), but quarantines a corrupt file and creates a new one. Returns the path of the quarantined file.
    pub(crate) fn or_quarantine(path: &Path, kind: FileKind) -> Result<(Self, Option<PathBuf>)> {
        let (file, lock, lost_contents) = lock(path)?;
        let opened = lost_contents.and_then(|()| {
            let connection = file::open_to_write(&file, kind)?;
            file::check(&connection, &file).map(|()| connection)
        });
        match opened {
            Ok(connection) => Ok((Self::of(path, connection, file, lock)?, None)),
            // Only a file that threadkeep has opened before: a foreign file stays in its place.
            Err(error) if lock.state.has_opened && error::is_corrupt(&error) => {
                let quarantined = file::quarantine(&file)?;
                file::create(&file)?;
                Ok((Self::of(path, file::open_to_write(&file, kind)?, file, lock)?, Some(quarantined)))
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the sessions that the lock file names: none, the last one, or two after a kill during an opening.
    pub(crate) fn sessions(&self) -> impl Iterator<Item = &str> {
        self.lock.state.sessions.split_whitespace()
    }

    pub(crate) fn set_sessions(&mut self, sessions: String) {
        self.lock.state.sessions = sessions;
        self.lock.save();
    }

    /// Finishes the opening of a file that belongs to threadkeep and is not corrupt.
    fn of(given: &Path, connection: Connection, path: PathBuf, mut lock: Lock) -> Result<Self> {
        file::checkpoint_on_close(&connection, true).map_err(error::file_error(&path))?;
        file::restrict_permissions(&path);
        lock.mark_opened();
        Ok(Self { path, given: given.to_owned(), connection, lock })
    }
}

/// Locks the file, and creates it if it does not exist. The last result is an error if the file has lost its contents.
fn lock(path: &Path) -> Result<(PathBuf, Lock, Result<()>)> {
    let canonical = path.canonicalize();
    canonical.as_deref().map_or(Ok(()), file::reject_foreign)?;
    let existed = canonical.is_ok();
    let path = file::create(path)?;
    let lock = Lock::acquire(&path)?;
    let is_truncated = lock.state.has_opened && file::is_truncated(&path, existed);
    let lost_contents = if is_truncated { Err(error::truncated(&path)) } else { Ok(()) };
    Ok((path, lock, lost_contents))
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
        &self.health.path
    }

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
        self.writer.submit(level, work, |result| result).await?.await.map_err(|_| closed())?
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
            drop(this.lock.0.lock().take());
        })
        .await
    }

    pub(crate) fn had_invalid_copies(&self) -> bool {
        self.lock.0.lock().as_ref().is_some_and(|lock| lock.state.copies_are_invalid)
    }
}
