//! An open file: one writer, a few readers, a lock.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::Connection;
use tokio::sync::oneshot;

use super::condition::Condition;
use super::file::{self, Lock, Role};
use super::readers::Readers;
use super::writer::{Survives, Writer, closed};
use crate::blocking::unblock;
use crate::error::{Error, Result};

pub(super) struct Database {
    condition: Arc<Condition>,
    readers: Readers,
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
    /// As the caller named it.
    given: PathBuf,
    pub(super) connection: Connection,
    lock: Lock,
}

impl Opened {
    /// Opens the file, creating it where it does not exist; waits some seconds for another process that has it open.
    pub(super) fn new(path: &Path, role: Role) -> Result<Self> {
        let given = path.to_owned();
        let (path, lock, was_emptied) = Self::lock(path)?;
        if was_emptied {
            return Err(file::emptied(&path));
        }
        let connection = file::open_to_write(&path, role)?;
        Self { path, given, connection, lock }.settled()
    }

    /// As [`new`](Self::new); a file that is damaged is set aside, and a new one takes its place.
    pub(super) fn or_set_aside(path: &Path, role: Role) -> Result<(Self, Option<PathBuf>)> {
        let given = path.to_owned();
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
        Ok((Self { path, given, connection, lock }.settled()?, aside))
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
    /// Starts the threads; `undone` is called whenever a transaction of the writer failed.
    pub(super) fn start(opened: Opened, undone: impl Fn() + Send + 'static) -> Result<Self> {
        let Opened { path, given, connection, lock } = opened;
        let condition = Arc::new(Condition::of(&path, &given));
        let readers = Readers::start(&condition)?;
        let writer = Writer::start(connection, Arc::clone(&condition), undone)?;
        Ok(Self { condition, readers, writer, lock: Holder(Arc::new(Mutex::new(Some(lock)))) })
    }

    pub(super) fn path(&self) -> &Path {
        self.condition.path()
    }

    /// What keeps the file from working, as far as is known; asks nobody.
    pub(super) fn fault(&self) -> Option<Error> {
        self.condition.fault()
    }

    /// Runs a query on a connection of its own, which sees what is committed.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.readers.read(query).await
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

    /// Gives a few of the pages that are free back to the file system. After that commit the writer empties the log: the text
    /// of what was deleted is gone from the file, but its log still has it.
    pub(super) async fn tidy(&self) -> Result<()> {
        self.writer.empty_log();
        let vacuum = |connection: &Connection| {
            let mut free = connection.prepare_cached("pragma incremental_vacuum(1000)")?;
            let mut rows = free.query([])?;
            while rows.next()?.is_some() {}
            Ok(())
        };
        self.write(Survives::Crash, vacuum).await
    }

    /// Writes something and reads it.
    pub(super) async fn prove(&self) -> Result<()> {
        let note =
            "insert into about values ('proved', 1) on conflict (name) do update set value = value + 1";
        self.write(Survives::Restart, |connection| connection.execute(note, []).map(drop)).await?;
        self.read(|connection| file::about(connection, "proved").map(drop)).await
    }

    /// Finishes the jobs that wait, and lets others open the file. What comes later is told that it is closed.
    pub(super) async fn close(self: &Arc<Self>) -> Result<()> {
        let this = Arc::clone(self);
        unblock(move || {
            // The writer last: it leaves one file behind, without a log.
            this.readers.close();
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
