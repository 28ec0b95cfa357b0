//! Conversion of SQLite's errors into errors that name the file and the remedy.

use std::path::Path;

use rusqlite::{ErrorCode, ffi};

use crate::error::{Error, ErrorKind};

pub(crate) fn file_error(path: &Path) -> impl Fn(rusqlite::Error) -> Error {
    move |error| {
        let is_shm_size = |e: &ffi::Error| e.extended_code == ffi::SQLITE_IOERR_SHMSIZE;
        let described = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => {
                unusable(path, "cannot grow: the disk is full").with_remedy("free space on it")
            }
            // The index of the log is a file of fixed size.
            _ if error.sqlite_error().is_some_and(is_shm_size) => {
                let message = "cannot be opened: the disk is full, and the file -shm beside it needs space";
                unusable(path, message).with_remedy("free space on the disk")
            }
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                cannot_open(path)
            }
            Some(ErrorCode::NotADatabase) => unusable(path, "is not a SQLite file").with_remedy(RECOVER),
            Some(ErrorCode::DatabaseCorrupt) => unusable(path, "is corrupt").with_remedy(RECOVER),
            _ => unusable(path, &format!("failed: {error}")),
        };
        described.with_source(error)
    }
}

const RECOVER: &str = "move it away, or restore it from a backup; `sqlite3 FILE .recover` reads the remains of a corrupt \
                       file (OPERATIONS.md)";

/// Returns the error for a file that lost its contents. SQLite never makes a file empty.
pub(crate) fn truncated(path: &Path) -> Error {
    corrupt(path, "it is empty".into())
}

pub(crate) fn corrupt(path: &Path, details: String) -> Error {
    file_error(path)(sqlite_error(ffi::SQLITE_CORRUPT, Some(details)))
}

pub(crate) fn not_a_database(path: &Path) -> Error {
    file_error(path)(sqlite_error(ffi::SQLITE_NOTADB, None))
}

pub(crate) fn of_another_program(path: &Path) -> Error {
    unusable(path, "is a database of another program").with_remedy("set another path")
}

pub(crate) fn cannot_open(path: &Path) -> Error {
    let remedy = "create its directory, make it and the file writable for the daemon's user, or set CONVERSATION_LOCAL_PATH (for an \
                  outage file: CONVERSATION_QUEUE_PATH) to a writable place";
    unusable(path, "cannot be opened for writing").with_remedy(remedy)
}

pub(crate) fn unusable(path: &Path, problem: &str) -> Error {
    Error::new(ErrorKind::LocalStorage, describe(path, problem))
}

pub(crate) fn describe(path: &Path, problem: &str) -> String {
    format!("the local file {} {problem}", path.display())
}

fn sqlite_error(code: i32, details: Option<String>) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(ffi::Error::new(code), details)
}

fn sqlite_code(error: &Error) -> Option<ErrorCode> {
    let source = std::error::Error::source(error)?.downcast_ref::<rusqlite::Error>()?;
    source.sqlite_error_code()
}

/// Whether the file, or a file that SQLite keeps beside it, cannot be written.
pub(crate) fn is_unwritable(error: &Error) -> bool {
    let io_error = std::error::Error::source(error).and_then(|source| source.downcast_ref());
    let io_kind = io_error.map(std::io::Error::kind);
    let code = sqlite_code(error);
    matches!(code, Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied))
        || matches!(
            io_kind,
            Some(std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem)
        )
}

pub(crate) fn is_corrupt(error: &Error) -> bool {
    matches!(sqlite_code(error), Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt))
}

/// Whether the file or its disk is at fault, and not the statement.
pub(crate) fn is_file_fault(error: &Error) -> bool {
    sqlite_code(error).is_some_and(|code| code != ErrorCode::ConstraintViolation)
}
