//! The health of an open file: its names, its last write, and its last read.
//!
//! A process can write into a file that was deleted, moved or replaced. Such writes are lost when the process ends. So this
//! module compares device and inode of each name with those of the opened file.

use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::sqlite::error::{self, unusable};
use crate::sqlite::file::{SUFFIXES, with_suffix};

#[derive(Debug)]
pub(crate) struct FileHealth {
    pub(crate) path: PathBuf,
    names: Vec<WatchedName>,
    faults: Mutex<FileFaults>,
}

/// A name in the file system, and the identity of its file when it was opened.
#[derive(Debug)]
struct WatchedName {
    path: PathBuf,
    file: Identity,
}

#[derive(Debug, Default)]
struct FileFaults {
    name: Option<Error>,
    write: Option<Error>,
    read: Option<Error>,
}

impl FileHealth {
    /// Watches the names of a file that was just opened.
    ///
    /// `given` is the path in the configuration, perhaps a link. The next start opens that path.
    pub(crate) fn of(path: &Path, given: &Path) -> Self {
        // Absolute, so that a later change of the working directory does not look like a loss.
        let given = std::path::absolute(given).unwrap_or_else(|_| given.to_owned());
        let paths = SUFFIXES.into_iter().map(|suffix| with_suffix(path, suffix)).chain([given]);
        let names = paths.filter_map(|path| Some(WatchedName { file: identity(&path)?, path })).collect();
        Self { path: path.to_owned(), names, faults: Mutex::default() }
    }

    /// Checks that each name still leads to the open file. The writer checks before each acknowledged commit, and the
    /// checkpoint thread several times a second.
    ///
    /// # Errors
    /// [`LocalStorage`](crate::ErrorKind::LocalStorage) if a name does not. Later writes may be lost with the process.
    pub(crate) fn check_names(&self) -> Result<()> {
        let is_lost = |name: &&WatchedName| !name.is_there();
        let is_emptied = |name: &&WatchedName| name.is_emptied();
        // Only the main file counts as emptied, because SQLite itself truncates the log.
        let lost = self.names.iter().find(is_lost).or_else(|| self.names.first().filter(is_emptied));
        let mut faults = self.faults.lock();
        match (lost, &faults.name) {
            (None, None) => Ok(()),
            (None, Some(_)) => {
                faults.name = None;
                tracing::info!(file = %self.path.display(), "the local file has its name again");
                Ok(())
            }
            // The checks run all the time, but a loss is logged once.
            (Some(_), Some(error)) => Err(error.clone()),
            (Some(lost), None) => {
                let error = name_lost(&self.path, lost);
                tracing::error!(%error, "THE LOCAL FILE HAS LOST ITS NAME: no write is acknowledged into it");
                faults.name = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Whether the file itself and its lock still have their names. Then the next start finds data copied into the file.
    pub(crate) fn has_main_names(&self) -> bool {
        self.names.iter().take(2).all(WatchedName::is_there)
    }

    pub(crate) fn note_write(&self, error: Option<&Error>) {
        note(&mut self.faults.lock().write, error);
    }

    pub(crate) fn note_read(&self, error: Option<&Error>) {
        note(&mut self.faults.lock().read, error);
    }

    /// Returns the current fault, if any. A lost name comes first, because it loses the most.
    pub(crate) fn fault(&self) -> Option<Error> {
        let faults = self.faults.lock();
        faults.name.as_ref().or(faults.write.as_ref()).or(faults.read.as_ref()).cloned()
    }
}

impl WatchedName {
    fn is_there(&self) -> bool {
        identity(&self.path) == Some(self.file)
    }

    /// Whether another program emptied the file. SQLite never does.
    fn is_emptied(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|data| data.is_file() && data.len() == 0)
    }
}

/// Replaces the fault by the last result. An error of the statement says nothing about the file, and changes nothing.
fn note(fault: &mut Option<Error>, error: Option<&Error>) {
    if error.is_none_or(error::is_file_fault) {
        *fault = error.cloned();
    }
}

fn name_lost(path: &Path, lost: &WatchedName) -> Error {
    let event = match () {
        () if !lost.path.exists() => "is gone",
        () if lost.is_there() => "was emptied",
        () => "is another file now",
    };
    let (lost, process) = (lost.path.display(), std::process::id());
    let problem = format!(
        "was deleted, moved or replaced while it was open ({lost} {event}); it takes no further writes"
    );
    let remedy = format!(
        "put it back, or move away its remains and restart the daemon; until then, its contents are in /proc/{process}/fd \
         (OPERATIONS.md)"
    );
    unusable(path, &problem).with_remedy(remedy)
}

#[cfg(unix)]
pub(crate) type Identity = (u64, u64);

/// Returns device and inode of the file that a name leads to.
#[cfg(unix)]
pub(crate) fn identity(path: &Path) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt as _;
    // `metadata` follows a link, so the target counts. The configured path may be a link.
    std::fs::metadata(path).ok().map(|data| (data.dev(), data.ino()))
}

#[cfg(not(unix))]
pub(crate) type Identity = ();

/// On other systems an open file cannot be deleted or moved.
#[cfg(not(unix))]
pub(crate) fn identity(path: &Path) -> Option<Identity> {
    path.exists().then_some(())
}
