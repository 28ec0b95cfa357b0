//! An outage file without a daemon: opened, listed, renamed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::FileLimits;
use super::file::{KIND, OutageFile, check_project};
use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::model::version::Version;
use crate::resilience::tasks::unblock;
use crate::sqlite::database::LockedDatabase;
use crate::sqlite::error::{describe, file_error, is_unwritable, unusable};
use crate::sqlite::file;
use crate::sqlite::lock::Lock;
use crate::store::local::KIND as LOCAL;

/// No limits: the imported writes are on a disk already, and a refusal would help nobody.
const UNLIMITED: FileLimits = FileLimits { queue: u64::MAX, replica: u64::MAX };

impl OutageFile {
    /// Opens the file without a store. With a project, the file is created if it does not exist, and must be of that project.
    /// Without a project, the file must exist.
    ///
    /// # Errors
    /// [`ErrorKind::LocalStorage`], also for a corrupt file, which stays as it is. [`ErrorKind::Locked`].
    pub(super) async fn open_offline(path: &Path, project: Option<String>) -> Result<Self> {
        let (given, path, must_exist) = (path, path.to_owned(), project.is_none());
        let opened = unblock(move || {
            if must_exist {
                // Checked before the lock: a foreign file gets no lock file beside it, and stays unchanged.
                read_kind(&path)?;
            }
            let opened = LockedDatabase::new(&path, KIND)?;
            let newest = "select max(coalesce((select max(version) from records), 0),
                                     coalesce((select max(version) from dead_letters), 0))";
            let newest = opened.connection.query_row(newest, [], |row| row.get(0));
            let clock = Arc::new(Clock::new());
            // The versions of requeued writes must be above every version in the file.
            clock.observe(Version::from_raw(newest.map_err(file_error(&opened.path))?));
            if let Some(project) = &project {
                check_project(&opened, project)?;
            }
            Self::start(opened, UNLIMITED, clock)
        })
        .await?;
        opened.map_err(
            |error| {
                if must_exist && is_unwritable(&error) { unreadable(given, error) } else { error }
            },
        )
    }
}

fn unreadable(path: &Path, error: Error) -> Error {
    let message = format!(
        "the outage file {} cannot be opened for writing; reading it takes the lock and the files that SQLite keeps beside it",
        path.display()
    );
    let remedy = "make the file and its directory writable for this user; or copy the file, and its -wal if there is one, to \
                  a writable place, and name the copy (CONVERSATION_QUEUE_PATH; at the command line also --file)";
    error.with_message(message).with_remedy(remedy)
}

/// Whether a file is a file of the backend `local`, and no outage file.
pub(super) async fn is_local_store(path: &Path) -> Result<bool> {
    let path = path.to_owned();
    unblock(move || Ok(read_kind(&path)?.as_deref() == Some(LOCAL.name))).await?
}

pub(super) fn read_kind(path: &Path) -> Result<Option<String>> {
    if let Err(error) = std::fs::metadata(path) {
        let remedy = "name the path of the file, or set CONVERSATION_QUEUE_PATH to it; a daemon creates the file when it starts";
        return Err(unusable(path, "does not exist").with_remedy(remedy).with_source(error));
    }
    let connection = file::open_to_read(path)?;
    if !file::is_marked(&connection).map_err(file_error(path))? {
        return Err(unusable(path, "is no file of threadkeep").with_remedy("name another file"));
    }
    file::role(&connection).map_err(file_error(path))
}

/// Renames a file and its companions to `FILE.moved`. No process may have the file open.
pub(super) async fn retire(path: &Path) -> Result<PathBuf> {
    let path = path.to_owned();
    unblock(move || {
        let cannot_rename = |e| unusable(&path, "cannot be renamed").with_source(e);
        let path = path.canonicalize().map_err(cannot_rename)?;
        let moved = file::with_suffix(&path, ".moved");
        if moved.exists() {
            let problem = format!("cannot be renamed: {} exists", moved.display());
            let error = Error::new(ErrorKind::LocalStorage, describe(&path, &problem));
            return Err(error.with_remedy("move that file away"));
        }
        let lock = Lock::acquire(&path)?;
        file::rename(&path, &moved).map_err(cannot_rename)?;
        lock.delete(&path);
        Ok(moved)
    })
    .await?
}
