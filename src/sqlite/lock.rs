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
    had_invalid_copies: bool,
    has_opened: bool,
}

impl Lock {
    /// Locks the file. Waits up to [`LOCK_TIMEOUT`] for another process to end (I12).
    pub(crate) fn acquire(path: &Path) -> Result<Self> {
        let mut file = create_private(&lock_path(path)).map_err(|e| cannot_open(path).with_source(e))?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if start.elapsed() < LOCK_TIMEOUT => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => {
                    let holder = read_lock_file(&mut file).holder;
                    let error =
                        Error::new(ErrorKind::Locked, describe(path, &format!("is in use by {holder}")));
                    return Err(error.with_remedy("stop that process first"));
                }
                Err(TryLockError::Error(e)) => return Err(cannot_open(path).with_source(e)),
            }
        }
        let LockFile { copies_are_invalid, has_opened, .. } = read_lock_file(&mut file);
        let mut lock = Self { file, had_invalid_copies: copies_are_invalid, has_opened };
        // Keeps the previous holder's flag, so that a crash before the next check does not lose it.
        lock.write(copies_are_invalid);
        Ok(lock)
    }

    /// Returns the process that holds the lock. Does not wait, and does not keep another process from locking.
    pub(crate) fn holder(path: &Path) -> Option<String> {
        let mut file = File::open(lock_path(path)).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Some(read_lock_file(&mut file).holder),
            _ => None,
        }
    }

    /// As [`has_opened`](Self::has_opened), for a file whose lock is not held.
    pub(crate) fn has_been_opened(path: &Path) -> bool {
        File::open(lock_path(path)).is_ok_and(|mut file| read_lock_file(&mut file).has_opened)
    }

    /// Whether threadkeep has locked the file before.
    pub(crate) fn exists(path: &Path) -> bool {
        lock_path(path).exists()
    }

    /// Whether threadkeep has opened the file before.
    pub(crate) fn has_opened(&self) -> bool {
        self.has_opened
    }

    /// Records permanently that the file belongs to threadkeep.
    pub(crate) fn mark_opened(&mut self) {
        if !self.has_opened {
            self.has_opened = true;
            self.write(self.had_invalid_copies);
            self.file.sync_all().unwrap_or_else(
                |error| tracing::warn!(%error, "cannot sync the lock file; a power cut may undo it"),
            );
        }
    }

    /// Writes the holder, for the error above, and whether copies in the file may be older than acknowledged writes.
    pub(crate) fn write(&mut self, copies_are_invalid: bool) {
        let holder = format!("process {}", std::process::id());
        let copies = if copies_are_invalid { COPIES_INVALID } else { "" };
        let opened = if self.has_opened { OPENED } else { "" };
        // In place and at a fixed length, so that it also works on a full disk.
        let text = format!("{holder:<30}\n{copies:<30}\n{opened:<30}\n");
        let written = self.file.rewind().and_then(|()| self.file.write_all(text.as_bytes()));
        if let Err(error) = written.and_then(|()| self.file.set_len(text.len() as u64)) {
            tracing::error!(%error, "cannot write the lock file; the next start may not know the state of the file");
        }
    }

    /// Whether the previous holder left copies that may be older than acknowledged writes.
    pub(crate) fn had_invalid_copies(&self) -> bool {
        self.had_invalid_copies
    }
}

/// The contents of a lock file.
struct LockFile {
    holder: String,
    copies_are_invalid: bool,
    has_opened: bool,
}

fn read_lock_file(file: &mut File) -> LockFile {
    let mut text = String::new();
    std::io::Read::by_ref(file).take(1 << 10).read_to_string(&mut text).ok();
    let line = |at: usize| text.lines().nth(at).unwrap_or_default().trim();
    LockFile {
        holder: line(0).to_owned(),
        copies_are_invalid: line(1) == COPIES_INVALID,
        has_opened: line(2) == OPENED,
    }
}

fn lock_path(path: &Path) -> PathBuf {
    with_suffix(path, ".lock")
}
