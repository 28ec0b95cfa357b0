//! Whether an open file works: whether it still has its name, and how the last write and the last read of it went.
//!
//! A process can go on writing into a file that was deleted, moved away or replaced. All that it writes then is lost with the
//! process. So device and inode of each name are compared with those of the file that was opened.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::file::{self, unusable, with_suffix};
use crate::error::{Error, Result};

/// What belongs to an open file, the file itself first.
const SUFFIXES: [&str; 4] = ["", ".lock", "-wal", "-shm"];

/// The condition of one open file.
#[derive(Debug)]
pub(super) struct Condition {
    path: PathBuf,
    names: Vec<Name>,
    faults: Mutex<Faults>,
}

/// A name in the file system, and the file that it led to when that was opened.
#[derive(Debug)]
struct Name {
    path: PathBuf,
    file: Identity,
}

/// What does not work at present.
#[derive(Debug, Default)]
struct Faults {
    /// A name is gone.
    name: Option<Error>,
    /// The last write failed.
    write: Option<Error>,
    /// The last read failed.
    read: Option<Error>,
}

impl Condition {
    /// Of a file that was just opened. `given` is the path that the next start will be given, perhaps a link.
    pub(super) fn of(path: &Path, given: &Path) -> Self {
        let given = std::path::absolute(given).unwrap_or_else(|_| given.to_owned());
        let paths = SUFFIXES.into_iter().map(|suffix| with_suffix(path, suffix)).chain([given]);
        let names = paths.filter_map(|path| Some(Name { file: identity(&path)?, path })).collect();
        Self { path: path.to_owned(), names, faults: Mutex::default() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a caller may be told that a write is kept: looks at the name of the file itself alone, which costs a commit
    /// nothing measurable.
    ///
    /// # Errors
    /// As for [`look`](Self::look), of which it knows the last result.
    pub(super) fn check_name(&self) -> Result<()> {
        let known = self.faults().name.clone();
        match known {
            Some(nameless) => Err(nameless),
            None if self.names.first().is_none_or(|name| name.is_there() && !name.is_emptied()) => Ok(()),
            None => self.look(),
        }
    }

    /// Looks whether each name still leads to the open file.
    ///
    /// # Errors
    /// [`Local`](crate::ErrorKind::Local) if one does not. What is written from now on may be lost with the process.
    pub(super) fn look(&self) -> Result<()> {
        let is_lost = |name: &&Name| !name.is_there();
        let is_emptied = |name: &&Name| name.is_emptied();
        let lost = self.names.iter().find(is_lost).or_else(|| self.names.first().filter(is_emptied));
        let mut faults = self.faults();
        match (lost, &faults.name) {
            (None, None) => Ok(()),
            (None, Some(_)) => {
                faults.name = None;
                tracing::info!(file = %self.path.display(), "the local file has its name again");
                Ok(())
            }
            (Some(_), Some(error)) => Err(error.clone()),
            (Some(lost), None) => {
                let error = nameless(&self.path, lost);
                tracing::error!(%error, "THE LOCAL FILE HAS LOST ITS NAME: no write is acknowledged into it");
                faults.name = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Whether the file itself and its lock still have their names, so that the next start finds what is copied into the file.
    pub(super) fn is_found_by_name(&self) -> bool {
        self.names.iter().take(2).all(Name::is_there)
    }

    /// Takes note of how a write ended that reached the file.
    pub(super) fn note_write(&self, error: Option<&Error>) {
        note(&mut self.faults().write, error);
    }

    /// Takes note of how a read ended.
    pub(super) fn note_read(&self, error: Option<&Error>) {
        note(&mut self.faults().read, error);
    }

    /// What keeps the file from working, if something does.
    pub(super) fn fault(&self) -> Option<Error> {
        let faults = self.faults();
        faults.name.as_ref().or(faults.write.as_ref()).or(faults.read.as_ref()).cloned()
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Name {
    fn is_there(&self) -> bool {
        identity(&self.path) == Some(self.file)
    }

    /// SQLite never makes the file itself empty.
    fn is_emptied(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|data| data.is_file() && data.len() == 0)
    }
}

/// An error that is not the file's fault changes nothing.
fn note(fault: &mut Option<Error>, error: Option<&Error>) {
    if error.is_none_or(file::is_fault) {
        *fault = error.cloned();
    }
}

fn nameless(path: &Path, lost: &Name) -> Error {
    let what = match () {
        () if !lost.path.exists() => "is gone",
        () if lost.is_there() => "was emptied",
        () => "is another file now",
    };
    let (lost, process) = (lost.path.display(), std::process::id());
    let why = format!(
        "was deleted, moved or replaced while it was open ({lost} {what}): no write is taken into it; put it back, or move away \
         what is left and restart the daemon; until then /proc/{process}/fd has all that it held (OPERATIONS.md)"
    );
    unusable(path, &why)
}

#[cfg(unix)]
type Identity = (u64, u64);

/// Device and inode of the file that a name leads to.
#[cfg(unix)]
fn identity(path: &Path) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).ok().map(|data| (data.dev(), data.ino()))
}

#[cfg(not(unix))]
type Identity = ();

/// Elsewhere an open file cannot be deleted or moved.
#[cfg(not(unix))]
fn identity(path: &Path) -> Option<Identity> {
    path.exists().then_some(())
}
