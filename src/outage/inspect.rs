//! The inspection of a file. The inspection creates no file, waits for no lock and quarantines nothing. It does not write
//! even the files that SQLite keeps beside the inspected file.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::error::Error;
use crate::model::clock::Clock;
use crate::model::version::Timestamp;
use crate::outage::Usage;
use crate::outage::file::KIND as OUTAGE;
use crate::sqlite::error;
use crate::sqlite::file::{self, FileKind};
use crate::sqlite::lock::Lock;
use crate::store::local::KIND as LOCAL;

/// The state of a file.
#[derive(Debug)]
#[non_exhaustive]
pub enum Inspection {
    /// There is no such file.
    Missing,
    /// The file is intact.
    Ok(FileSummary),
    /// A process has the file open, and may change the contents at any time.
    Locked {
        /// The process, as its lock file names it.
        holder: String,
        /// The contents, if they could be read.
        summary: Option<FileSummary>,
    },
    /// The file was threadkeep's, and is no longer a database.
    Corrupt(Error),
    /// threadkeep cannot use the file.
    Unusable(Error),
}

/// The contents of a file.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct FileSummary {
    /// Of an outage file: the project that its queued writes belong to.
    pub project: Option<String>,
    /// Of an outage file: the queued writes.
    pub queued: Usage,
    /// The age of the oldest queued write.
    pub oldest: Option<Duration>,
    /// Of an outage file: the dead letters.
    pub dead_letters: Usage,
    /// Conversations of the backend `local`, whose bytes are not counted, or copies in an outage file.
    pub conversations: Usage,
    /// Bytes of a write-ahead log without its index. The other fields are unknown then.
    pub unread_log: u64,
}

// How SQLite opens the file so that it writes nothing.
/// There is no log.
const IMMUTABLE: &str = "?immutable=1";
/// A killed process left its log and an index of the log. SQLite rebuilds the index in memory.
const STALE_INDEX: &str = "?readonly_shm=1";
/// A process has the file open and maintains the index.
const SHARED: &str = "";

/// Inspects the file of the backend `local`.
///
/// ```
/// use threadkeep::tools::{Inspection, inspect_local};
///
/// assert!(matches!(inspect_local("/no/such/file".as_ref()), Inspection::Missing));
/// ```
pub fn inspect_local(path: &Path) -> Inspection {
    inspect(path, LOCAL)
}

/// Inspects an outage file.
///
/// ```
/// use threadkeep::tools::{Inspection, inspect_outage_file};
///
/// assert!(matches!(inspect_outage_file("/no/such/file".as_ref()), Inspection::Missing));
/// ```
pub fn inspect_outage_file(path: &Path) -> Inspection {
    inspect(path, OUTAGE)
}

fn inspect(path: &Path, kind: FileKind) -> Inspection {
    let path = &match path.canonicalize() {
        Ok(path) => path,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Inspection::Missing,
        Err(error) => {
            let unusable = error::unusable(path, "cannot be opened").with_remedy("set another path");
            return Inspection::Unusable(unusable.with_source(error));
        }
    };
    if let Some(holder) = Lock::holder(path) {
        let summary = open(path, SHARED).and_then(|connection| read(&connection, kind));
        return Inspection::Locked { holder, summary: summary.ok() };
    }
    let inspected = inspect_unlocked(path, kind);
    // A process that started meanwhile may have changed the file during the inspection.
    match (&inspected, Lock::holder(path)) {
        (Err(_), Some(holder)) => Inspection::Locked { holder, summary: None },
        _ => inspected.map_or_else(|error| failed(path, error), Inspection::Ok),
    }
}

fn failed(path: &Path, error: Error) -> Inspection {
    // A file without a used lock file may be another program's, so it is not called corrupt.
    if error::is_corrupt(&error) && Lock::has_been_opened(path) {
        Inspection::Corrupt(error)
    } else {
        Inspection::Unusable(error)
    }
}

fn inspect_unlocked(path: &Path, kind: FileKind) -> Result<FileSummary, Error> {
    file::reject_foreign(path)?;
    if Lock::has_been_opened(path) && file::is_truncated(path, true) {
        return Err(error::truncated(path));
    }
    let len = |suffix| std::fs::metadata(file::with_suffix(path, suffix)).map_or(0, |data| data.len());
    let (log, has_index) = (len("-wal"), file::with_suffix(path, "-shm").exists());
    if len("") == 0 {
        return Ok(FileSummary::default()); // an empty file holds nothing
    }
    let mode = match (log, has_index) {
        (0, _) => IMMUTABLE,
        (_, true) => STALE_INDEX,
        // Without its log the file is incomplete, and reading both would create an index.
        (unread_log, false) => return Ok(FileSummary { unread_log, ..FileSummary::default() }),
    };
    let connection = open(path, mode).map_err(error::file_error(path))?;
    file::check_format(&connection, path)?;
    file::check_kind(&connection, path, kind)?;
    file::check_pages(&connection, path)?;
    if kind.name == OUTAGE.name {
        file::check_queued(&connection, path)?;
    }
    read(&connection, kind).map_err(error::file_error(path))
}

fn open(path: &Path, mode: &str) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(format!("file:{}{mode}", uri_path(path)), flags)?;
    file::checkpoint_on_close(&connection, false)?;
    Ok(connection)
}

fn uri_path(path: &Path) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte);
    let escape =
        |byte: &u8| if is_plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
    path.as_os_str().as_encoded_bytes().iter().map(escape).collect()
}

fn read(connection: &Connection, kind: FileKind) -> rusqlite::Result<FileSummary> {
    if kind.name != LOCAL.name {
        return summarize(connection);
    }
    let conversations = Usage::of(connection, "conversations where value is not null", "0")?;
    Ok(FileSummary { conversations, ..FileSummary::default() })
}

pub(super) fn summarize(connection: &Connection) -> rusqlite::Result<FileSummary> {
    let oldest = "select min(at) from records where is_queued = 1";
    let oldest = connection.query_row(oldest, [], |row| row.get::<_, Option<i64>>(0))?;
    // The indexes have `bytes`, so that the sums need no scan of the values.
    Ok(FileSummary {
        project: file::meta(connection, "project")?,
        queued: Usage::of(connection, "records indexed by queue where is_queued = 1", "bytes")?,
        oldest: oldest.map(|at| Clock::new().now().since(Timestamp(at))),
        dead_letters: Usage::of(connection, "dead_letters", "bytes")?,
        conversations: Usage::of(connection, "records indexed by replica where is_queued = 0", "bytes")?,
        unread_log: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_path_odd_names_find_the_file() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["plain.db", "a b.db", "what?.db", "100%.db", "a#b.db", "ü.db"] {
            let path = dir.path().join(name);
            let created = file::create(&path).and_then(|path| file::open_to_write(&path, OUTAGE));
            drop(created.unwrap());
            let before = std::fs::read_dir(dir.path()).unwrap().count();
            let inspection = inspect_outage_file(&path);
            assert!(matches!(inspection, Inspection::Ok(_)), "{name}: {inspection:?}");
            let after = std::fs::read_dir(dir.path()).unwrap().count();
            assert_eq!(after, before, "{name}: the inspection creates no file");
        }
    }
}
