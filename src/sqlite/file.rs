//! The SQLite file itself: created, checked, configured, quarantined.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension};

use super::error::{cannot_open, corrupt, file_error, not_a_database, of_another_program, unusable};
use super::lock::Lock;
use super::rows::append;
use crate::error::Result;

/// The time that a process waits for another process to end.
pub(crate) const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// "thkp": marks the file as threadkeep's.
const APPLICATION_ID: i64 = 0x7468_6b70;
const FORMAT: i64 = 3;
/// The format without appends. Only an outage file differs from the present one.
const FORMAT_WITHOUT_APPENDS: i64 = 2;
/// The format before that. The first building used it too, with other names.
const FIRST_FORMAT: i64 = 1;
const SQLITE_HEADER_BYTES: u64 = 100;
const META: &str = "create table meta (name text not null primary key, value text not null) strict;";
/// The suffixes of the file and of the files that belong to it.
pub(crate) const SUFFIXES: [&str; 4] = ["", ".lock", "-wal", "-shm"];

/// The purpose of a file. A file of one kind is never opened as another kind.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileKind {
    /// The name in the file's table `meta`.
    pub(crate) name: &'static str,
    pub(crate) schema: &'static str,
    /// The problem and the remedy, if a file of the other kind is found.
    pub(crate) mismatch: (&'static str, &'static str),
    /// The SQL that converts a file of format 1.
    pub(crate) conversion: &'static str,
    /// The SQL that converts a file of format 2.
    pub(crate) addition: &'static str,
    /// The SQL that gives a file of the first building the names of format 1. Without it, such a file is rejected.
    pub(crate) first_building: Option<&'static str>,
}

/// Creates the file if it does not exist, and returns its canonical path. Two processes that come by different links must
/// meet at one lock.
pub(crate) fn create(path: &Path) -> Result<PathBuf> {
    create_private(path).and_then(|_| path.canonicalize()).map_err(|e| cannot_open(path).with_source(e))
}

/// Rejects a file of another program, before SQLite touches and perhaps changes it.
pub(crate) fn reject_foreign(path: &Path) -> Result<()> {
    // Opening a pipe would wait for its writer.
    if std::fs::metadata(path).is_ok_and(|data| !data.is_file() && !data.is_dir()) {
        return Err(unusable(path, "is no regular file").with_remedy("set another path"));
    }
    // A file that threadkeep has locked before may be corrupt. SQLite reports that.
    if Lock::exists(path) {
        return Ok(());
    }
    let Ok(file) = File::open(path) else { return Ok(()) };
    let mut header = Vec::new();
    let read = file.take(SQLITE_HEADER_BYTES).read_to_end(&mut header);
    read.map_err(|e| cannot_open(path).with_source(e))?;
    let id = header.get(68..72).and_then(|id| Some(i64::from(u32::from_be_bytes(id.try_into().ok()?))));
    match id.filter(|_| header.starts_with(b"SQLite format 3\0")) {
        None if header.is_empty() => Ok(()),
        None => Err(not_a_database(path)),
        Some(APPLICATION_ID | 0) => Ok(()),
        Some(_) => Err(of_another_program(path)),
    }
}

/// Whether a file that existed has no bytes, or is gone while its log is left. SQLite would delete that log.
pub(crate) fn is_truncated(path: &Path, existed: bool) -> bool {
    let len = |path: &Path| std::fs::metadata(path).map_or(0, |data| data.len());
    len(path) == 0 && (existed || len(&with_suffix(path, "-wal")) > 0)
}

/// Appends a suffix to a path, which need not be UTF-8.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

pub(crate) fn open_to_write(path: &Path, kind: FileKind) -> Result<Connection> {
    let connection =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(file_error(path))?;
    // A corrupt or foreign file stays as it is.
    checkpoint_on_close(&connection, false).map_err(file_error(path))?;
    let format = format(&connection, path)?;
    if format.is_some() {
        check_kind(&connection, path, kind)?;
    }
    configure(&connection, format.is_none()).map_err(file_error(path))?;
    match format {
        None => create_schema(&connection, kind).map_err(file_error(path))?,
        Some(FORMAT) => {}
        Some(FORMAT_WITHOUT_APPENDS) => convert(&connection, path, kind.addition)?,
        Some(_) => convert(&connection, path, &conversion(&connection, path, kind)?)?,
    }
    Ok(connection)
}

/// Returns the SQL that converts a file of format 1.
fn conversion(connection: &Connection, path: &Path, kind: FileKind) -> Result<String> {
    let names = match (is_of_first_building(connection).map_err(file_error(path))?, kind.first_building) {
        (false, _) => "",
        (true, Some(names)) => names,
        (true, None) => {
            let error =
                unusable(path, "was written by the first threadkeep, whose format this one does not know");
            let remedy = "run `threadkeep queue export` of the old binary, move the file away, and run `threadkeep queue import`";
            return Err(error.with_remedy(remedy));
        }
    };
    Ok([names, kind.conversion].concat())
}

/// Converts a file of an earlier format, in one transaction. After a failure the file is as it was.
fn convert(connection: &Connection, path: &Path, conversion: &str) -> Result<()> {
    tracing::info!(file = %path.display(), "the local file has an earlier format and is converted");
    let all = format!("begin immediate; {conversion} pragma user_version = {FORMAT}; commit;");
    connection.execute_batch(&all).map_err(file_error(path))
}

/// Rejects a file of an earlier format, for a reader that cannot convert it.
pub(crate) fn check_format(connection: &Connection, path: &Path) -> Result<()> {
    if format(connection, path)?.is_some_and(|format| format < FORMAT) {
        let error = unusable(path, "has the format of an earlier threadkeep");
        return Err(error.with_remedy("start the daemon, which converts the file"));
    }
    Ok(())
}

/// Returns the format of the file, or `None` if the file has no contents. Rejects a file of another program or of a later
/// threadkeep.
fn format(connection: &Connection, path: &Path) -> Result<Option<i64>> {
    let pragma = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let tables = connection.query_row("select count(*) from sqlite_schema", [], |row| row.get::<_, i64>(0));
    let tables = tables.map_err(file_error(path))?;
    let id = pragma("application_id").map_err(file_error(path))?;
    match (tables, id, pragma("user_version").map_err(file_error(path))?) {
        (0, 0, 0) => Ok(None),
        (_, APPLICATION_ID, known @ FIRST_FORMAT..=FORMAT) => Ok(Some(known)),
        (_, APPLICATION_ID, newer) => {
            let problem = format!("has format {newer}; this threadkeep knows only {FORMAT}");
            Err(unusable(path, &problem).with_remedy("use the threadkeep that wrote it"))
        }
        _ => Err(of_another_program(path)),
    }
}

pub(crate) fn check_kind(connection: &Connection, path: &Path, kind: FileKind) -> Result<()> {
    let found = role(connection).map_err(file_error(path))?;
    if found.as_deref() == Some(kind.name) {
        return Ok(());
    }
    let (problem, remedy) = kind.mismatch;
    Err(unusable(path, problem).with_remedy(remedy))
}

pub(crate) fn role(connection: &Connection) -> rusqlite::Result<Option<String>> {
    if !is_of_first_building(connection)? {
        return meta(connection, "role");
    }
    let find = "select iif(value = 'queue', value, 'local') from about where name = 'role'";
    connection.query_row(find, [], |row| row.get(0)).optional()
}

/// Whether the first building wrote the file, which called the table `meta` `about`.
fn is_of_first_building(connection: &Connection) -> rusqlite::Result<bool> {
    let find = "select exists (select 1 from sqlite_schema where name = 'about')";
    connection.query_row(find, [], |row| row.get(0))
}

pub(crate) fn is_marked(connection: &Connection) -> rusqlite::Result<bool> {
    let mark = connection.pragma_query_value(None, "application_id", |row| row.get::<_, i64>(0));
    Ok(mark? == APPLICATION_ID)
}

pub(crate) fn meta(connection: &Connection, name: &str) -> rusqlite::Result<Option<String>> {
    let find = "select value from meta where name = ?1";
    connection.query_row(find, [name], |row| row.get(0)).optional()
}

pub(crate) fn set_meta(connection: &Connection, name: &str, value: &str) -> rusqlite::Result<()> {
    let upsert = "insert into meta values (?1, ?2) on conflict (name) do update set value = ?2";
    connection.prepare_cached(upsert)?.execute([name, value]).map(drop)
}

/// Whether the connection moves the log into the file when it ends.
pub(crate) fn checkpoint_on_close(connection: &Connection, checkpoint: bool) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, !checkpoint).map(drop)
}

/// Reads the whole outage file once. An error now is better than an error in the middle of an outage.
pub(crate) fn check(connection: &Connection, path: &Path) -> Result<()> {
    check_pages(connection, path).and_then(|()| check_queued(connection, path))
}

pub(crate) fn check_pages(connection: &Connection, path: &Path) -> Result<()> {
    let found = connection.query_row("pragma quick_check(1)", [], |row| row.get::<_, String>(0));
    match found.map_err(file_error(path))?.as_str() {
        "ok" => Ok(()),
        damage => Err(corrupt(path, damage.into())),
    }
}

/// Checks the texts of the queue: one invalid text would block the replay of all other writes.
pub(crate) fn check_queued(connection: &Connection, path: &Path) -> Result<()> {
    let mut queued = connection
        .prepare("select key, value, user, metadata, append from records where is_queued = 1")
        .map_err(file_error(path))?;
    let mut rows = queued.query([]).map_err(file_error(path))?;
    while let Some(row) = rows.next().map_err(file_error(path))? {
        let texts = (0..4).try_for_each(|column| row.get::<_, Option<String>>(column).map(drop));
        let texts = texts.and_then(|()| append(row, 4).map(drop));
        texts.map_err(|error| corrupt(path, format!("a queued write: {error}")))?;
    }
    Ok(())
}

pub(crate) fn restrict_permissions(path: &Path) {
    #[cfg(unix)]
    for suffix in SUFFIXES {
        use std::os::unix::fs::PermissionsExt as _;
        let path = with_suffix(path, suffix);
        if std::fs::metadata(&path).is_ok_and(|data| data.permissions().mode() & 0o077 != 0) {
            tracing::warn!(file = %path.display(), "other users could read the local file; its permissions are restricted now");
            let restricted = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600));
            restricted.unwrap_or_else(|error| {
                tracing::error!(%error, file = %path.display(), "cannot restrict permissions of the local file; other users can read it");
            });
        }
    }
}

/// Returns the name that a corrupt file gets next.
///
/// ```
/// let path = threadkeep::tools::quarantine_path("/no/such/queue.db".as_ref());
/// assert_eq!(path.to_str(), Some("/no/such/queue.db.corrupt-1"));
/// ```
pub fn quarantine_path(path: &Path) -> PathBuf {
    let numbered = |attempt: usize| with_suffix(path, &format!(".corrupt-{attempt}"));
    (1..).map(numbered).find(|name| !name.exists()).unwrap_or_else(|| numbered(0))
}

pub(crate) fn quarantine(path: &Path) -> Result<PathBuf> {
    let quarantined = quarantine_path(path);
    let failed = |e| {
        let error = unusable(path, "is corrupt and cannot be quarantined");
        error.with_remedy("move it away by hand").with_source(e)
    };
    rename(path, &quarantined).map_err(failed)?;
    Ok(quarantined)
}

/// Renames a file and its companions. The file itself comes last. If the process dies in between, the file keeps its name.
/// SQLite would delete a log whose file is gone.
pub(crate) fn rename(from: &Path, to: &Path) -> std::io::Result<()> {
    for suffix in ["-wal", "-shm", ""] {
        match std::fs::rename(with_suffix(from, suffix), with_suffix(to, suffix)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

pub(crate) fn open_to_read(path: &Path) -> Result<Connection> {
    let connection =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(file_error(path))?;
    let limited = connection.busy_timeout(LOCK_TIMEOUT).and_then(|()| limit_page_cache(&connection));
    limited.map_err(file_error(path))?;
    Ok(connection)
}

pub(crate) fn open_to_checkpoint(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    connection.pragma_update(None, "synchronous", "full")?;
    limit_page_cache(&connection)?;
    Ok(connection)
}

/// Limits the connections that do not write, five of six, to 400 KiB of pages. The system caches the file anyway. The writer
/// has SQLite's default of 2,000 KiB. With 400 KiB, a profile showed that it wrote pages of a group to the log early.
fn limit_page_cache(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "cache_size", -400)
}

/// Creates a file that only its owner can read. SQLite gives its companion files the same permissions.
pub(crate) fn create_private(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

fn configure(connection: &Connection, is_new: bool) -> rusqlite::Result<()> {
    connection.busy_timeout(LOCK_TIMEOUT)?;
    connection.pragma_update(None, "secure_delete", "on")?;
    if is_new {
        // Has no effect after the first table exists, but would write each time.
        connection.pragma_update(None, "auto_vacuum", "incremental")?;
    }
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")
}

fn create_schema(connection: &Connection, kind: FileKind) -> rusqlite::Result<()> {
    let pragmas = format!("pragma application_id = {APPLICATION_ID}; pragma user_version = {FORMAT};");
    let role = format!("insert into meta values ('role', '{}');", kind.name);
    connection.execute_batch(&format!("begin immediate; {} {META} {role} {pragmas} commit;", kind.schema))
}
