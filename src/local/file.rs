//! The file itself: opened with care, locked by one process, described when it fails.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::error::{Error, ErrorKind, Result};

/// How long a second process waits for the first to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// "thkp": marks the file as one of threadkeep's.
const APPLICATION_ID: i64 = 0x7468_6b70;
const FORMAT: i64 = 1;

const SCHEMA: &str = "
    create table threads (
        key         text    not null primary key,
        version     integer not null,
        value       text,              -- null: deleted, or expired and emptied
        expires_at  integer not null,  -- milliseconds since the epoch, as all times here
        user        text,
        metadata    text    not null,
        accepted    text    not null,  -- the last 16 accepted versions, newest first
        created_at  integer not null,
        accessed_at integer not null
    ) strict;
    create index threads_by_version on threads (version, key);
    create index threads_by_user on threads (user, version, key) where user is not null;
    create index threads_by_expiry on threads (expires_at) where value is not null;
    -- What the file is: the source of truth itself, not a queue in front of another.
    create table about (name text not null primary key, value text not null) strict;
    insert into about values ('role', 'truth');
";

/// Creates the file where there is none, and says where it really lies: by whatever links two processes come, they
/// must meet at one lock.
pub(super) fn create(path: &Path) -> Result<PathBuf> {
    create_private(path).and_then(|_| path.canonicalize()).map_err(|e| cannot_open(path).with_source(e))
}

/// Opens the one connection that writes.
pub(super) fn open_to_write(path: &Path) -> Result<Connection> {
    let connection =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(failure(path))?;
    let about = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let tables = connection.query_row("select count(*) from sqlite_schema", [], |row| row.get::<_, i64>(0));
    let is_new = match (
        tables.map_err(failure(path))?,
        about("application_id").map_err(failure(path))?,
        about("user_version").map_err(failure(path))?,
    ) {
        (0, 0, 0) => true,
        (_, APPLICATION_ID, FORMAT) => false,
        (_, APPLICATION_ID, newer) => {
            return Err(unusable(path, &format!("has format {newer}; this threadkeep knows only {FORMAT}")));
        }
        _ => return Err(unusable(path, "is a database of another program; set another path")),
    };
    // Only now, so that a file of somebody else's is left as it is.
    configure(&connection).map_err(failure(path))?;
    if is_new {
        create_schema(&connection).map_err(failure(path))?;
    }
    let role = connection
        .query_row("select value from about where name = 'role'", [], |row| row.get::<_, String>(0));
    match role.map_err(failure(path))?.as_str() {
        "truth" => Ok(connection),
        other => Err(unusable(path, &format!("holds a {other}, not conversations of the backend `local`"))),
    }
}

/// Opens a connection that reads.
pub(super) fn open_to_read(path: &Path) -> Result<Connection> {
    let connection =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(failure(path))?;
    connection.busy_timeout(PATIENCE).map_err(failure(path))?;
    Ok(connection)
}

/// SQLite gives its companion files the permissions of the main one.
fn create_private(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(PATIENCE)?;
    connection.pragma_update(None, "secure_delete", "on")?;
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")
}

fn create_schema(connection: &Connection) -> rusqlite::Result<()> {
    let pragmas = format!("pragma application_id = {APPLICATION_ID}; pragma user_version = {FORMAT};");
    connection.execute_batch(&format!("begin immediate; {SCHEMA} {pragmas} commit;"))
}

/// Turns an error of SQLite into one that names the file and the remedy.
pub(super) fn failure(path: &Path) -> impl Fn(rusqlite::Error) -> Error {
    move |error| {
        let what = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => {
                return unusable(path, "cannot grow: the disk is full").with_source(error);
            }
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                return cannot_open(path).with_source(error);
            }
            Some(ErrorCode::NotADatabase) => "is not a SQLite file; move it away or set another path",
            Some(ErrorCode::DatabaseCorrupt) => "is damaged; move it away or restore it from a backup",
            _ => return unusable(path, &format!("failed: {error}")).with_source(error),
        };
        unusable(path, what).with_source(error)
    }
}

fn cannot_open(path: &Path) -> Error {
    let why = "cannot be opened for writing; make its directory and the file writable for the daemon's user, \
               or set CONVERSATION_LOCAL_PATH to a place that is";
    unusable(path, why)
}

fn unusable(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Local, format!("the local file {} {why}", path.display()))
}

/// Held as long as the file is open; the operating system frees it when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    pub(super) fn acquire(path: &Path) -> Result<Self> {
        let beside = PathBuf::from(format!("{}.lock", path.display()));
        let mut file = create_private(&beside).map_err(|e| cannot_open(path).with_source(e))?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    file.read_to_string(&mut holder).ok();
                    return Err(unusable(
                        path,
                        &format!("is in use by {}; stop that one first", holder.trim()),
                    ));
                }
                Err(TryLockError::Error(e)) => return Err(cannot_open(path).with_source(e)),
            }
        }
        // Only for the message above; the lock does not depend on it.
        file.set_len(0).and_then(|()| writeln!(file, "process {}", std::process::id())).ok();
        Ok(Self { _file: file })
    }
}
