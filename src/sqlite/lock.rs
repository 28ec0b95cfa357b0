//! The lock file: one process at a time has the file open.

use std::fs::{File, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::error::{cannot_open, describe};
use super::file::{LOCK_TIMEOUT, create_private, with_suffix};
use crate::error::{Error, ErrorKind, Result};

/// The second line of the lock file: the copies in the file may be older than acknowledged writes.
const COPIES_INVALID: &str = "doubtful";
/// The third line of the lock file: threadkeep has opened the file before.
const OPENED: &str = "opened";

/// Held while the file is open. The operating system releases the lock when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
    pub(crate) state: LockState,
}

/// The lines of a lock file.
#[derive(Debug)]
pub(crate) struct LockState {
    holder: String,
    /// Whether copies in the file may be older than acknowledged writes.
    pub(crate) copies_are_invalid: bool,
    /// Whether threadkeep has opened the file before.
    pub(crate) has_opened: bool,
    /// The last opening of the file, and the next one while that begins. Empty if none was noted.
    pub(crate) sessions: String,
}

impl Lock {
    /// Locks the file. Waits up to [`LOCK_TIMEOUT`] for another process to end (I12).
    pub(crate) fn acquire(path: &Path) -> Result<Self> {
        let open = || create_private(&lock_path(path)).map_err(|e| cannot_open(path).with_source(e));
        let (mut file, start) = (open()?, Instant::now());
        loop {
            match file.try_lock() {
                // A migration deleted it meanwhile. The next process would lock another file.
                Ok(()) if is_deleted(&file) => file = open()?,
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_TIMEOUT => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => {
                    let problem = format!("is in use by {}", LockState::read(&mut file).holder);
                    let error = Error::new(ErrorKind::Locked, describe(path, &problem));
                    // A request in flight keeps the file open after the last handle is dropped.
                    return Err(error.with_remedy(
                        "stop that process first; if it is this one, call `shutdown` on its other cache",
                    ));
                }
                Err(TryLockError::Error(e)) => return Err(cannot_open(path).with_source(e)),
            }
        }
        let state = LockState::read(&mut file);
        let mut lock = Self { file, state };
        // Keeps the previous holder's flag, so that a crash before the next check does not lose it.
        lock.save();
        Ok(lock)
    }

    /// Deletes the lock file of a file that has lost its name. Processes that wait for the lock open a new one.
    pub(crate) fn delete(self, path: &Path) {
        // A lock file that stays does no harm.
        std::fs::remove_file(lock_path(path)).ok();
    }

    /// Returns the process that holds the lock. Does not wait, and does not keep another process from locking.
    pub(crate) fn holder(path: &Path) -> Option<String> {
        let mut file = File::open(lock_path(path)).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Some(LockState::read(&mut file).holder),
            _ => None,
        }
    }

    /// Whether threadkeep has opened the file before, for a file whose lock is not held.
    pub(crate) fn has_been_opened(path: &Path) -> bool {
        File::open(lock_path(path)).is_ok_and(|mut file| LockState::read(&mut file).has_opened)
    }

    pub(crate) fn exists(path: &Path) -> bool {
        lock_path(path).exists()
    }

    /// Records permanently that the file belongs to threadkeep.
    pub(crate) fn mark_opened(&mut self) {
        if std::mem::replace(&mut self.state.has_opened, true) {
            return;
        }
        self.save();
        self.file.sync_all().unwrap_or_else(
            |error| tracing::warn!(%error, "cannot sync the lock file; a power cut may undo it"),
        );
    }

    /// Writes the state, with this process as the holder. The fixed length can replace an older text on a full disk.
    pub(crate) fn save(&mut self) {
        let holder = format!("process {}", std::process::id());
        let copies = if self.state.copies_are_invalid { COPIES_INVALID } else { "" };
        let opened = if self.state.has_opened { OPENED } else { "" };
        let text = format!("{holder:<30}\n{copies:<30}\n{opened:<30}\n{:<30}\n", self.state.sessions);
        let written = self.file.rewind().and_then(|()| self.file.write_all(text.as_bytes()));
        if let Err(error) = written.and_then(|()| self.file.set_len(text.len() as u64)) {
            tracing::error!(%error, "cannot write the lock file; the next start may not know the state of the file");
        }
    }
}

impl LockState {
    fn read(file: &mut File) -> Self {
        let mut text = String::new();
        file.take(1 << 10).read_to_string(&mut text).ok();
        let mut lines = text.lines().map(str::trim);
        let mut line = || lines.next().unwrap_or_default();
        Self {
            holder: line().to_owned(),
            copies_are_invalid: line() == COPIES_INVALID,
            has_opened: line() == OPENED,
            sessions: line().to_owned(),
        }
    }
}

#[cfg(unix)]
fn is_deleted(file: &File) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    file.metadata().is_ok_and(|data| data.nlink() == 0)
}

/// On other systems an open file cannot be deleted.
#[cfg(not(unix))]
fn is_deleted(_: &File) -> bool {
    false
}

fn lock_path(path: &Path) -> PathBuf {
    with_suffix(path, ".lock")
}
