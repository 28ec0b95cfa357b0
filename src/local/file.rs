//! The file itself: opened with care, locked by one process, described when it fails.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, ffi};

use crate::error::{Error, ErrorKind, Result};

/// How long a second process waits for the first to end.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// "thkp": marks the file as one of threadkeep's.
const APPLICATION_ID: i64 = 0x7468_6b70;
const FORMAT: i64 = 1;
/// The bytes of a SQLite file's header.
const HEADER: u64 = 100;

/// What a file is for. One of one role is never taken for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The source of truth itself.
    Truth,
    /// Queue, replica and dead letters beside another source of truth.
    Queue,
}

impl Role {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Truth => "truth",
            Self::Queue => "queue",
        }
    }

    fn schema(self) -> &'static str {
        match self {
            Self::Truth => TRUTH,
            Self::Queue => QUEUE,
        }
    }
}

const TRUTH: &str = "
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
";

const QUEUE: &str = "
    create table records (
        key        text    not null primary key,
        version    integer not null,
        value      text,              -- null: a deletion
        expires_at integer not null,  -- milliseconds since the epoch, as all times here
        user       text,
        metadata   text    not null,
        bytes      integer not null,  -- what the record counts against the bounds
        seq        integer not null,  -- the order in which they were written
        at         integer not null,  -- when it was queued; of a copy: when the source of truth last confirmed it
        pending    integer not null,  -- 1: not yet in the source of truth; 0: a copy of what is there
        base       integer,           -- of an update: the version it goes on from; null: whatever is there
        chain      text    not null,  -- versions of its own that may be in the source of truth already
        sent       integer not null,  -- whether it was sent when it was queued, so that it may be there already
        skew       integer,           -- how far the clock that stamped it was ahead of the system's; null: it was right
        overtaken  integer not null default 0, -- 1: the source of truth was seen to hold something newer; 2: perhaps it does
        blindness  integer not null default 0 -- the number, in this process, of the blindness in which that clock stamped it
    ) strict;
    create index queue on records (seq, bytes) where pending = 1;
    create index replica on records (seq, bytes) where pending = 0;
    -- Writes that were sent past the queue and have not been heard of: what waits in it may find them stored.
    create table attempts (
        key        text    not null,
        version    integer not null,
        is_put     integer not null,  -- 1: a put or a remove; 0: an update
        primary key (key, version)
    ) strict, without rowid;
    create table dead_letters (
        id         integer primary key,
        key        text    not null,
        version    integer not null,
        value      text,
        expires_at integer not null,
        user       text,
        metadata   text    not null,
        bytes      integer not null,
        queued_at  integer not null,
        died_at    integer not null,
        reason     text    not null,
        newer      integer             -- the version that it lost against
    ) strict;
";

/// What the file is, in words.
const ABOUT: &str = "create table about (name text not null primary key, value text not null) strict;";

/// Creates the file where there is none, and says where it really lies: by whatever links two processes come, they
/// must meet at one lock.
pub(super) fn create(path: &Path) -> Result<PathBuf> {
    create_private(path).and_then(|_| path.canonicalize()).map_err(|e| cannot_open(path).with_source(e))
}

/// Refuses a file of another program, before SQLite touches it and may change it by that.
pub(super) fn refuse_foreign(path: &Path) -> Result<()> {
    // To open a pipe would wait for whoever writes into it.
    if std::fs::metadata(path).is_ok_and(|data| !data.is_file() && !data.is_dir()) {
        return Err(unusable(path, "is no regular file; set another path"));
    }
    // Where threadkeep has come across it before, it may be damaged: that is for SQLite to say.
    if Lock::is_beside(path) {
        return Ok(());
    }
    let Ok(file) = File::open(path) else { return Ok(()) };
    let mut header = Vec::new();
    let read = file.take(HEADER).read_to_end(&mut header);
    read.map_err(|e| cannot_open(path).with_source(e))?;
    let id = header.get(68..72).and_then(|id| Some(i64::from(u32::from_be_bytes(id.try_into().ok()?))));
    match id.filter(|_| header.starts_with(b"SQLite format 3\0")) {
        None if header.is_empty() => Ok(()),
        None => Err(failure(path)(sqlite_error(ffi::SQLITE_NOTADB, None))),
        Some(APPLICATION_ID | 0) => Ok(()),
        Some(_) => Err(of_another_program(path)),
    }
}

/// Whether a file that was there has no bytes, or is gone while its log is left, which SQLite would delete.
pub(super) fn is_emptied(path: &Path, was_there: bool) -> bool {
    let len = |path: &Path| std::fs::metadata(path).map_or(0, |data| data.len());
    len(path) == 0 && (was_there || len(&with_suffix(path, "-wal")) > 0)
}

pub(super) fn emptied(path: &Path) -> Error {
    failure(path)(sqlite_error(ffi::SQLITE_CORRUPT, Some("it is empty".into())))
}

fn of_another_program(path: &Path) -> Error {
    unusable(path, "is a database of another program; set another path")
}

fn sqlite_error(code: i32, text: Option<String>) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(ffi::Error::new(code), text)
}

/// The path with more at its end. A path need not be UTF-8, so it does not become a `String` on the way.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// Opens the one connection that writes.
pub(super) fn open_to_write(path: &Path, role: Role) -> Result<Connection> {
    let connection =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(failure(path))?;
    // Where it turns out damaged, or somebody else's, it is left as it is.
    leave_log(&connection, true).map_err(failure(path))?;
    let is_new = !check_is_ours(&connection, path)?;
    // Only now, so that a file of somebody else's is left as it is.
    configure(&connection, is_new).map_err(failure(path))?;
    if is_new {
        create_schema(&connection, role).map_err(failure(path))?;
    }
    check_role(&connection, path, role)?;
    Ok(connection)
}

/// Refuses what another program, or a later threadkeep, has made. False where nobody has made anything of it yet.
pub(super) fn check_is_ours(connection: &Connection, path: &Path) -> Result<bool> {
    let pragma = |pragma| connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
    let tables = connection.query_row("select count(*) from sqlite_schema", [], |row| row.get::<_, i64>(0));
    match (
        tables.map_err(failure(path))?,
        pragma("application_id").map_err(failure(path))?,
        pragma("user_version").map_err(failure(path))?,
    ) {
        (0, 0, 0) => Ok(false),
        (_, APPLICATION_ID, FORMAT) => Ok(true),
        (_, APPLICATION_ID, newer) => {
            Err(unusable(path, &format!("has format {newer}; this threadkeep knows only {FORMAT}")))
        }
        _ => Err(of_another_program(path)),
    }
}

/// Refuses a file of the other role.
pub(super) fn check_role(connection: &Connection, path: &Path, role: Role) -> Result<()> {
    let found = about(connection, "role").map_err(failure(path))?;
    if found.as_deref() == Some(role.name()) {
        return Ok(());
    }
    Err(unusable(
        path,
        match role {
            Role::Truth => {
                "is the queue of the backend `supabase`, not the conversations of the backend `local`; set \
                        CONVERSATION_LOCAL_PATH to another path"
            }
            Role::Queue => {
                "holds the conversations of the backend `local`, not a queue; set CONVERSATION_QUEUE_PATH to \
                        another path, and bring them over with `threadkeep queue move`"
            }
        },
    ))
}

/// Whether the file is marked as one of threadkeep's.
pub(super) fn is_ours(connection: &Connection) -> rusqlite::Result<bool> {
    let mark = connection.pragma_query_value(None, "application_id", |row| row.get::<_, i64>(0));
    Ok(mark? == APPLICATION_ID)
}

/// What the file says about itself.
pub(super) fn about(connection: &Connection, name: &str) -> rusqlite::Result<Option<String>> {
    let found = "select value from about where name = ?1";
    connection.query_row(found, [name], |row| row.get(0)).optional()
}

/// Whether what is in the log stays there when the connection ends.
pub(super) fn leave_log(connection: &Connection, leave: bool) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, leave).map(drop)
}

/// Reads all of the queue's file once: better now than in the middle of an outage.
pub(super) fn check(connection: &Connection, path: &Path) -> Result<()> {
    check_pages(connection, path).and_then(|()| check_queued(connection, path))
}

pub(super) fn check_pages(connection: &Connection, path: &Path) -> Result<()> {
    let found = connection.query_row("pragma quick_check(1)", [], |row| row.get::<_, String>(0));
    match found.map_err(failure(path))?.as_str() {
        "ok" => Ok(()),
        damage => Err(damaged(path, damage.into())),
    }
}

/// A text that is none would hold up the replay of all others.
pub(super) fn check_queued(connection: &Connection, path: &Path) -> Result<()> {
    let mut queued = connection
        .prepare("select key, value, user, metadata from records where pending = 1")
        .map_err(failure(path))?;
    let mut rows = queued.query([]).map_err(failure(path))?;
    while let Some(row) = rows.next().map_err(failure(path))? {
        for column in 0..4 {
            row.get::<_, Option<String>>(column)
                .map_err(|error| damaged(path, format!("a queued write: {error}")))?;
        }
    }
    Ok(())
}

fn damaged(path: &Path, damage: String) -> Error {
    failure(path)(sqlite_error(ffi::SQLITE_CORRUPT, Some(damage)))
}

/// Nobody but the owner may read it, whoever put it there.
pub(super) fn make_private(path: &Path) {
    #[cfg(unix)]
    for suffix in ["", "-wal", "-shm", ".lock"] {
        use std::os::unix::fs::PermissionsExt as _;
        let path = with_suffix(path, suffix);
        if is_open_to_others(&path) {
            tracing::warn!(file = %path.display(), "others could read this file: now only its owner can");
            let made = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600));
            made.unwrap_or_else(|error| tracing::error!(%error, file = %path.display(), "it stays readable"));
        }
    }
}

#[cfg(unix)]
pub(super) fn is_open_to_others(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).is_ok_and(|data| data.permissions().mode() & 0o077 != 0)
}

#[cfg(all(not(unix), feature = "cli"))]
pub(super) fn is_open_to_others(_: &Path) -> bool {
    false
}

/// Whether an error says that the file, or what has to be beside it, cannot be written.
pub(super) fn is_unwritable(error: &Error) -> bool {
    let Some(source) = std::error::Error::source(error) else { return false };
    let code = source.downcast_ref().and_then(rusqlite::Error::sqlite_error_code);
    let kind = source.downcast_ref().map(std::io::Error::kind);
    matches!(code, Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied))
        || matches!(kind, Some(std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem))
}

/// Whether an error says that the file is no database any more.
pub(super) fn is_damage(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<rusqlite::Error>());
    let code = source.and_then(rusqlite::Error::sqlite_error_code);
    matches!(code, Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt))
}

/// Whether an error is the fault of the file or its disk, and not of what was to be done with it.
pub(super) fn is_fault(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<rusqlite::Error>());
    let code = source.and_then(rusqlite::Error::sqlite_error_code);
    code.is_some_and(|code| code != ErrorCode::ConstraintViolation)
}

/// The name that a damaged file gets next.
pub(super) fn name_aside(path: &Path) -> PathBuf {
    let named = |attempt: usize| with_suffix(path, &format!(".damaged-{attempt}"));
    (1..).map(named).find(|aside| !aside.exists()).unwrap_or_else(|| named(0))
}

/// Gives a damaged file, and what belongs to it, another name.
pub(super) fn set_aside(path: &Path) -> Result<PathBuf> {
    let aside = name_aside(path);
    for suffix in ["-wal", "-shm", ""] {
        match std::fs::rename(with_suffix(path, suffix), with_suffix(&aside, suffix)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                let why = "is damaged, and cannot be set aside; move it away by hand";
                return Err(unusable(path, why).with_source(e));
            }
            _ => {}
        }
    }
    Ok(aside)
}

/// Opens a connection that reads.
pub(super) fn open_to_read(path: &Path) -> Result<Connection> {
    let connection =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(failure(path))?;
    connection.busy_timeout(PATIENCE).and_then(|()| bound_memory(&connection)).map_err(failure(path))?;
    Ok(connection)
}

/// Opens a connection that copies the write-ahead log into the file.
pub(super) fn open_to_copy(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    connection.pragma_update(None, "synchronous", "full")?;
    bound_memory(&connection)?;
    Ok(connection)
}

/// Each of the six connections may keep so many KiB of pages; by default it would be 2,000, and the system keeps them anyway.
fn bound_memory(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "cache_size", -400)
}

/// SQLite gives its companion files the permissions of the main one.
fn create_private(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

fn configure(connection: &Connection, is_new: bool) -> rusqlite::Result<()> {
    connection.busy_timeout(PATIENCE)?;
    bound_memory(connection)?;
    connection.pragma_update(None, "secure_delete", "on")?;
    if is_new {
        // Before the first table, or else without effect; but it would write each time.
        connection.pragma_update(None, "auto_vacuum", "incremental")?;
    }
    connection.pragma_update(None, "journal_mode", "wal")?;
    connection.pragma_update(None, "synchronous", "full")
}

fn create_schema(connection: &Connection, role: Role) -> rusqlite::Result<()> {
    let pragmas = format!("pragma application_id = {APPLICATION_ID}; pragma user_version = {FORMAT};");
    let is = format!("insert into about values ('role', '{}');", role.name());
    connection.execute_batch(&format!("begin immediate; {} {ABOUT} {is} {pragmas} commit;", role.schema()))
}

/// Turns an error of SQLite into one that names the file and the remedy.
pub(super) fn failure(path: &Path) -> impl Fn(rusqlite::Error) -> Error {
    move |error| {
        let what = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => {
                return unusable(path, "cannot grow: the disk is full").with_source(error);
            }
            // The index of the log is a file of fixed size.
            _ if error.sqlite_error().is_some_and(|e| e.extended_code == ffi::SQLITE_IOERR_SHMSIZE) => {
                let why = "cannot be opened: there is no room for the file -shm beside it, the disk is full";
                return unusable(path, why).with_source(error);
            }
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                return cannot_open(path).with_source(error);
            }
            Some(ErrorCode::NotADatabase) => {
                "is not a SQLite file; move it away or set another path (if it was a queue's, `threadkeep queue import` then \
                 takes what can still be read of it)"
            }
            Some(ErrorCode::DatabaseCorrupt) => {
                "is damaged; move it away or restore it from a backup (of a queue's, `threadkeep queue import` then takes what \
                 can still be read)"
            }
            _ => return unusable(path, &format!("failed: {error}")).with_source(error),
        };
        unusable(path, what).with_source(error)
    }
}

fn cannot_open(path: &Path) -> Error {
    let why = "cannot be opened for writing; make its directory and the file writable for the daemon's user, \
               or set CONVERSATION_LOCAL_PATH (for a queue: CONVERSATION_QUEUE_PATH) to a place that is";
    unusable(path, why)
}

pub(super) fn unusable(path: &Path, why: &str) -> Error {
    Error::new(ErrorKind::Local, describe(path, why))
}

fn describe(path: &Path, why: &str) -> String {
    format!("the local file {} {why}", path.display())
}

/// Held as long as the file is open; the operating system frees it when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    was_doubtful: bool,
    has_opened: bool,
}

/// See [`Lock::note`].
const DOUBTFUL: &str = "doubtful";
/// See [`Lock::opened`].
const OPENED: &str = "opened";

impl Lock {
    pub(super) fn acquire(path: &Path) -> Result<Self> {
        let mut file = create_private(&beside(path)).map_err(|e| cannot_open(path).with_source(e))?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => {
                    let why = format!("is in use by {}; stop that one first", said(&mut file).holder);
                    return Err(Error::new(ErrorKind::InUse, describe(path, &why)));
                }
                Err(TryLockError::Error(e)) => return Err(cannot_open(path).with_source(e)),
            }
        }
        let Said { was_doubtful, has_opened, .. } = said(&mut file);
        let mut lock = Self { file, was_doubtful, has_opened };
        lock.note(was_doubtful);
        Ok(lock)
    }

    /// Who holds the lock, if somebody does. It is neither waited for nor kept from anybody.
    #[cfg(feature = "cli")]
    pub(super) fn holder(path: &Path) -> Option<String> {
        let mut file = File::open(beside(path)).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Some(said(&mut file).holder),
            _ => None,
        }
    }

    /// As [`has_opened`](Self::has_opened), of a file whose lock is not held.
    #[cfg(feature = "cli")]
    pub(super) fn has_been_opened(path: &Path) -> bool {
        File::open(beside(path)).is_ok_and(|mut file| said(&mut file).has_opened)
    }

    /// Whether a threadkeep has come across the file before.
    pub(super) fn is_beside(path: &Path) -> bool {
        beside(path).exists()
    }

    /// Whether the file was one of threadkeep's once.
    pub(super) fn has_opened(&self) -> bool {
        self.has_opened
    }

    /// Notes that the file is one of threadkeep's, for good.
    pub(super) fn opened(&mut self) {
        if !self.has_opened {
            self.has_opened = true;
            self.note(self.was_doubtful);
            self.file
                .sync_all()
                .unwrap_or_else(|error| tracing::warn!(%error, "the lock file was not synced"));
        }
    }

    /// Writes who holds the lock, for the message above, and whether copies in the file may be older than what was
    /// acknowledged: in place and at a fixed length, so that it works on a disk that is full.
    pub(super) fn note(&mut self, doubtful: bool) {
        let holder = format!("process {}", std::process::id());
        let (doubtful, opened) =
            (if doubtful { DOUBTFUL } else { "" }, if self.has_opened { OPENED } else { "" });
        let text = format!("{holder:<30}\n{doubtful:<30}\n{opened:<30}\n");
        let written = self.file.rewind().and_then(|()| self.file.write_all(text.as_bytes()));
        if let Err(error) = written.and_then(|()| self.file.set_len(text.len() as u64)) {
            tracing::error!(%error, "the lock file cannot be written");
        }
    }

    /// Whether the process that held the lock before noted so.
    pub(super) fn was_doubtful(&self) -> bool {
        self.was_doubtful
    }
}

/// What a lock file says.
struct Said {
    holder: String,
    was_doubtful: bool,
    has_opened: bool,
}

fn said(file: &mut File) -> Said {
    let mut text = String::new();
    std::io::Read::by_ref(file).take(1 << 10).read_to_string(&mut text).ok();
    let line = |at: usize| text.lines().nth(at).unwrap_or_default().trim();
    Said { holder: line(0).to_owned(), was_doubtful: line(1) == DOUBTFUL, has_opened: line(2) == OPENED }
}

fn beside(path: &Path) -> PathBuf {
    with_suffix(path, ".lock")
}
