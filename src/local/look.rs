//! A look at a file that changes nothing: no file is created, no lock is waited for, and nothing is set aside. Not even
//! SQLite's own files beside it are written.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use super::file::{self, Lock, Role};
use crate::error::Error;
use crate::spool::Tally;
use crate::version::{Clock, Timestamp};

/// What there is.
#[derive(Debug)]
pub(crate) enum Look {
    Absent,
    Whole(Contents),
    /// A process has it open, and looked at it when it began; what can be read beside it.
    Held(String, Option<Contents>),
    /// It was threadkeep's, and is no database any more.
    Damaged(Error),
    /// It is no file that threadkeep could take.
    Wrong(Error),
}

/// What a file holds.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Of a queue: whose writes these are.
    pub(crate) origin: Option<String>,
    /// Of a queue: writes that wait, and for how long the first of them has.
    pub(crate) queued: Tally,
    pub(crate) oldest: Option<Duration>,
    pub(crate) dead_letters: Tally,
    /// Conversations, or copies of some.
    pub(crate) threads: u64,
    /// Bytes of a log that was left without its index, so that nothing of all this is known.
    pub(crate) unread_log: u64,
}

/// How a file can be read.
enum Way {
    /// There is no log: the file is all there is.
    Alone,
    /// A process that was killed left its log, and an index of it.
    Orphaned,
    /// A process has it open, and keeps the index.
    Beside,
}

/// Looks at the conversations of the backend `local`.
pub(crate) fn at_truth(path: &Path) -> Look {
    look(path, Role::Truth)
}

/// Looks at a queue.
pub(crate) fn at_queue(path: &Path) -> Look {
    look(path, Role::Queue)
}

fn look(path: &Path, role: Role) -> Look {
    let path = &match path.canonicalize() {
        Ok(path) => path,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Look::Absent,
        Err(error) => {
            return Look::Wrong(
                file::unusable(path, "cannot be opened; set another path").with_source(error),
            );
        }
    };
    if let Some(holder) = Lock::holder(path) {
        let contents = open(path, &Way::Beside).and_then(|connection| read(&connection, role));
        return Look::Held(holder, contents.ok());
    }
    let seen = looked(path, role);
    // A process that began meanwhile may have changed it under this one's eyes.
    match (&seen, Lock::holder(path)) {
        (Err(_), Some(holder)) => Look::Held(holder, None),
        _ => seen.map_or_else(|error| verdict(path, error), Look::Whole),
    }
}

fn verdict(path: &Path, error: Error) -> Look {
    match file::is_damage(&error) && Lock::has_been_opened(path) {
        true => Look::Damaged(error),
        false => Look::Wrong(error),
    }
}

fn looked(path: &Path, role: Role) -> Result<Contents, Error> {
    file::refuse_foreign(path)?;
    if Lock::has_been_opened(path) && file::is_emptied(path, true) {
        return Err(file::emptied(path));
    }
    let len = |suffix| std::fs::metadata(file::with_suffix(path, suffix)).map_or(0, |data| data.len());
    let (log, has_index) = (len("-wal"), file::with_suffix(path, "-shm").exists());
    if len("") == 0 {
        return Ok(Contents::default()); // an empty file is as good as none
    }
    let way = match (log, has_index) {
        (0, _) => Way::Alone,
        (_, true) => Way::Orphaned,
        // Without its log the file is not what it says, and to read both would make an index.
        (unread_log, false) => return Ok(Contents { unread_log, ..Contents::default() }),
    };
    let connection = open(path, &way).map_err(file::failure(path))?;
    file::check_is_ours(&connection, path)?;
    file::check_role(&connection, path, role)?;
    file::check_pages(&connection, path)?;
    if role == Role::Queue {
        file::check_queued(&connection, path)?;
    }
    read(&connection, role).map_err(file::failure(path))
}

fn open(path: &Path, way: &Way) -> rusqlite::Result<Connection> {
    let how = match way {
        Way::Alone => "?immutable=1",
        // Then the index is made anew, in memory.
        Way::Orphaned => "?readonly_shm=1",
        Way::Beside => "",
    };
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(format!("file:{}{how}", escaped(path)), flags)?;
    file::leave_log(&connection, true)?;
    Ok(connection)
}

/// The path as a part of a URI.
fn escaped(path: &Path) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte);
    let of = |byte: &u8| if plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
    path.as_os_str().as_encoded_bytes().iter().map(of).collect()
}

fn read(connection: &Connection, role: Role) -> rusqlite::Result<Contents> {
    let tally = |what: &str| {
        connection.query_row(&format!("select count(*), coalesce(sum(bytes), 0) from {what}"), [], |row| {
            let (records, bytes): (i64, i64) = (row.get(0)?, row.get(1)?);
            Ok(Tally { records: records.unsigned_abs(), bytes: bytes.unsigned_abs() })
        })
    };
    if role == Role::Truth {
        let live = "select count(*) from threads where value is not null";
        let threads = connection.query_row(live, [], |row| row.get::<_, i64>(0))?.unsigned_abs();
        return Ok(Contents { threads, ..Contents::default() });
    }
    let oldest = "select min(at) from records where pending = 1";
    let oldest = connection.query_row(oldest, [], |row| row.get::<_, Option<i64>>(0))?;
    Ok(Contents {
        origin: file::about(connection, "origin")?,
        queued: tally("records where pending = 1")?,
        oldest: oldest.map(|at| Clock::new().now().since(Timestamp(at))),
        dead_letters: tally("dead_letters")?,
        threads: tally("records where pending = 0")?.records,
        unread_log: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_a_uri_is_the_path() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["plain.db", "a b.db", "what?.db", "100%.db", "a#b.db", "ü.db"] {
            let path = dir.path().join(name);
            let made = file::create(&path).and_then(|path| file::open_to_write(&path, Role::Queue));
            drop(made.unwrap());
            let before = std::fs::read_dir(dir.path()).unwrap().count();
            assert!(matches!(at_queue(&path), Look::Whole(_)), "{name}: {:?}", at_queue(&path));
            assert_eq!(
                std::fs::read_dir(dir.path()).unwrap().count(),
                before,
                "{name}: nothing came beside it"
            );
        }
    }
}
