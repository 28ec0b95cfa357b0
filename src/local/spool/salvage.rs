//! Salvage: what can still be read of a damaged queue's file.
//!
//! Work is done on a copy; the file itself is only read. Where the first page is destroyed, the one of a new, empty file
//! takes its place: every file of this format was made by the same statements, so that its tables begin at the same pages.
//! The rest is read through SQLite: the tables from both ends towards the damage, and then each page with rows by itself, as
//! if it were all of the table, so that damage costs what is on its page and nothing else. An index names what there was.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, Row};

use super::offline::{queued_write, select};
use super::{COLUMNS, dead};
use crate::blocking::unblock;
use crate::error::{Error, ErrorKind, Result};
use crate::local::file::{self, Lock, Role};
use crate::record::{Json, Key, Record, user};
use crate::spool::{DeadLetter, QueuedWrite, Salvage, Tally, is_time};
use crate::version::Version;

/// SQLite's, and that of every file here.
const PAGE: usize = 4096;
/// The kind of a page that holds rows of a table.
const LEAF: u8 = 0x0d;

/// Reads what can be read of a queue's file, damaged or not. Where a process has it open as its queue, that is an error.
pub(crate) async fn salvage(path: &Path) -> Result<Salvage> {
    let path = path.to_owned();
    unblock(move || {
        let cannot = |e| file::unusable(&path, "cannot be read").with_source(e);
        let path = path.canonicalize().map_err(cannot)?;
        // A file that was set aside has no lock.
        let _lock = Lock::is_beside(&path).then(|| Lock::acquire(&path)).transpose()?;
        let copy = WorkingCopy::of(&path)?;
        let had_no_header = match copy.tables() {
            Ok((true, _)) => false,
            Ok((false, true)) => return Err(file::unusable(&path, TRUTH)),
            Ok((false, false)) => return Err(file::unusable(&path, NO_QUEUE)),
            Err(_) => {
                copy.replace_header()?;
                true
            }
        };
        let connection = copy.open()?;
        let mut found = read(&connection, &copy.path()).map_err(|e| nothing(&path, e))?;
        found.had_no_header = had_no_header;
        Ok(found)
    })
    .await?
}

const TRUTH: &str = "holds the conversations of the backend `local`, not a queue; bring them over with `threadkeep queue move`";
const NO_QUEUE: &str = "is no queue's file";

fn nothing(path: &Path, error: rusqlite::Error) -> Error {
    let why = "has nothing that can be salvaged: it is no queue's file, or too much of it is destroyed";
    file::unusable(path, why).with_source(error)
}

/// A copy of the file and its write-ahead log, in a directory of its own beside it, which ends with the value.
struct WorkingCopy {
    directory: PathBuf,
    original: PathBuf,
}

impl Drop for WorkingCopy {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            tracing::warn!(%error, copy = %self.directory.display(), "a working copy could not be removed");
        }
    }
}

impl WorkingCopy {
    fn of(path: &Path) -> Result<Self> {
        let directory = file::with_suffix(path, &format!(".salvage-{}", std::process::id()));
        let mut builder = std::fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        let cannot = |e| file::unusable(path, "cannot be copied beside itself to be read").with_source(e);
        builder.create(&directory).map_err(cannot)?;
        let copy = Self { directory, original: path.to_owned() };
        std::fs::copy(path, copy.path()).map_err(cannot)?;
        let log = file::with_suffix(path, "-wal");
        if log.exists() {
            std::fs::copy(log, file::with_suffix(&copy.path(), "-wal")).map_err(cannot)?;
        }
        Ok(copy)
    }

    fn path(&self) -> PathBuf {
        self.directory.join("copy.db")
    }

    fn open(&self) -> Result<Connection> {
        let connection = Connection::open_with_flags(self.path(), OpenFlags::SQLITE_OPEN_READ_WRITE);
        connection.map_err(file::failure(&self.original))
    }

    /// Whether it has the table of a queue, and that of a file which is the source of truth itself.
    fn tables(&self) -> Result<(bool, bool)> {
        let connection = self.open()?;
        let has = |name| has_table(&connection, name).map_err(file::failure(&self.original));
        Ok((has("records")?, has("threads")?))
    }

    /// Puts the first page of a new file in the place of this one's.
    fn replace_header(&self) -> Result<()> {
        let fresh = self.directory.join("fresh.db");
        file::create(&fresh)?;
        let made = file::open_to_write(&fresh, Role::Queue)?;
        let failed = file::failure(&self.original);
        made.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(())).map_err(failed)?;
        drop(made);
        transplant(&fresh, &self.path())
            .map_err(|e| file::unusable(&self.original, "cannot get a new first page").with_source(e))
    }
}

/// Copies the first page, and says in it how large the file is and that no page of it is free.
fn transplant(from: &Path, to: &Path) -> std::io::Result<()> {
    let mut page = vec![0; PAGE];
    File::open(from)?.read_exact(&mut page)?;
    let mut file = File::options().write(true).open(to)?;
    let pages = u32::try_from(file.metadata()?.len() / PAGE as u64).unwrap_or(u32::MAX);
    page[28..32].copy_from_slice(&pages.to_be_bytes());
    page[32..40].fill(0);
    let counter: [u8; 4] = [page[24], page[25], page[26], page[27]];
    page[92..96].copy_from_slice(&counter);
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&page)
}

fn has_table(connection: &Connection, name: &str) -> rusqlite::Result<bool> {
    let sql = "select count(*) from sqlite_schema where type = 'table' and name = ?1";
    connection.query_row(sql, [name], |row| row.get::<_, i64>(0)).map(|count| count == 1)
}

fn read(connection: &Connection, path: &Path) -> rusqlite::Result<Salvage> {
    let origin = file::about(connection, "origin").unwrap_or_default();
    // Where it cannot be known, they may have been sent.
    let sent = match file::about(connection, "sent") {
        Ok(sent) => sent.and_then(|sent| sent.parse().ok()).unwrap_or(0_i64),
        Err(_) => i64::MAX,
    };
    let (queue, letters) = (queue(sent), letters());
    let named = named(connection);
    let (mut writes, mut dead) = (queue.read_all(connection)?, letters.read_all(connection)?);
    if !writes.is_complete || !dead.is_complete || named.rows.keys().any(|number| !writes.knows(*number)) {
        each_leaf(connection, path, || {
            queue.walk_foreign(connection, &mut writes);
            letters.walk_foreign(connection, &mut dead);
        })?;
    }
    let mut lost = Tally::default();
    let unread = named.rows.iter().filter(|(number, _)| !writes.knows(**number));
    unread.for_each(|(_, bytes)| lost.add(*bytes));
    let unnamed = writes.broken.iter().filter(|number| !named.rows.contains_key(number));
    unnamed.chain(&dead.broken).for_each(|_| lost.add(0));
    Ok(Salvage {
        queued: newest(writes.rows.into_values()),
        dead_letters: dead.rows.into_values().collect(),
        origin,
        had_no_header: false,
        lost,
        may_lack_more: !(writes.is_complete || named.is_complete) || !dead.is_complete,
    })
}

fn queue(sent: i64) -> Table<QueuedWrite> {
    let columns =
        select().replace("?1", &sent.to_string()).replace(" from records", ", pending, rowid from records");
    Table {
        sql: format!("{columns} not indexed"),
        number: ("rowid", 14),
        read: |row| row.get::<_, bool>(13)?.then(|| queued_write(row).and_then(checked_write)).transpose(),
    }
}

fn letters() -> Table<DeadLetter> {
    Table {
        sql: format!("select {COLUMNS}, id, queued_at, died_at, reason, newer from dead_letters"),
        number: ("id", 6),
        read: |row| dead::letter(row).and_then(checked_letter).map(Some),
    }
}

/// In their order; of each thread the newest: a page that is in use no more may hold an older one.
fn newest(all: impl Iterator<Item = QueuedWrite>) -> Vec<QueuedWrite> {
    let mut by_key: BTreeMap<Key, QueuedWrite> = BTreeMap::new();
    for write in all {
        match by_key.get(&write.record.key) {
            Some(held) if held.seq >= write.seq => {}
            _ => drop(by_key.insert(write.record.key.clone(), write)),
        }
    }
    let mut all: Vec<_> = by_key.into_values().collect();
    all.sort_by_key(|write| write.seq);
    all
}

/// Makes each page with rows the root of both tables in turn, so that these have the rows of that page, whosever they are.
fn each_leaf(connection: &Connection, path: &Path, mut read: impl FnMut()) -> rusqlite::Result<()> {
    // Out of the log, as far as that can be done, and without one from here on.
    connection.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(())).ok();
    connection.pragma_update(None, "writable_schema", "on")?;
    connection.pragma_update(None, "synchronous", "off")?;
    for page in leaves(path).unwrap_or_default() {
        let root = "update sqlite_schema set rootpage = ?1 where type = 'table' and name in ('records', 'dead_letters')";
        connection.execute(root, [page])?;
        // Reads the schema anew.
        connection.pragma_update(None, "writable_schema", "reset")?;
        read();
        connection.pragma_update(None, "writable_schema", "on")?;
    }
    Ok(())
}

/// The numbers of the pages that hold rows of a table, but for the first, which holds the schema.
fn leaves(path: &Path) -> std::io::Result<Vec<i64>> {
    let mut file = std::io::BufReader::new(File::open(path)?);
    let (mut page, mut leaves) = ([0; PAGE], Vec::new());
    for number in 1.. {
        match file.read_exact(&mut page) {
            Ok(()) if page[0] == LEAF && number > 1 => leaves.push(number),
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => break,
            Err(e) => return Err(e),
        }
    }
    Ok(leaves)
}

fn checked_write(write: QueuedWrite) -> rusqlite::Result<QueuedWrite> {
    check(&write.record).map(|()| write)
}

fn checked_letter(letter: DeadLetter) -> rusqlite::Result<DeadLetter> {
    check(&letter.record).map(|()| letter)
}

/// Whether a record is one: damage inside a page goes unnoticed by SQLite.
fn check(record: &Record) -> rusqlite::Result<()> {
    let value = record.value.as_ref().map_or(Ok(()), |value| Json::new(value.as_str()).map(drop));
    let checked = value
        .and_then(|()| Json::new(record.metadata.as_str()).map(drop))
        .and_then(|()| record.user.as_deref().map_or(Ok(()), |id| user(id).map(drop)))
        .and_then(|()| match record.version > Version::NONE && is_time(record.expires_at) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Invalid, "its version or its expiry cannot be one")),
        });
    checked
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, Box::new(e)))
}

/// Rows of the queue as an index names them: their numbers and bytes.
struct Named {
    rows: BTreeMap<i64, u64>,
    /// Whether the index could be read from one end to the other.
    is_complete: bool,
}

fn named(connection: &Connection) -> Named {
    let mut named = Named { rows: BTreeMap::new(), is_complete: true };
    for order in ["asc", "desc"] {
        let sql = format!(
            "select rowid, bytes from records indexed by queue where pending = 1 order by seq {order}"
        );
        named.is_complete &= until_damage(connection, &sql, |row| {
            named.rows.insert(row.get(0)?, row.get::<_, i64>(1)?.unsigned_abs());
            Ok(())
        });
    }
    named
}

/// Hands out rows until there are no more or the file cannot be read on; says which it was.
fn until_damage(
    connection: &Connection,
    sql: &str,
    mut take: impl FnMut(&Row<'_>) -> rusqlite::Result<()>,
) -> bool {
    let mut walk = || -> rusqlite::Result<()> {
        let mut statement = connection.prepare(sql)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            // A row that is nonsense is no reason to stop.
            take(row).ok();
        }
        Ok(())
    };
    walk().is_ok()
}

/// A table, and how one of its rows is read: `None` where it is not wanted.
struct Table<T> {
    sql: String,
    /// The column with the row's number, and where it stands.
    number: (&'static str, usize),
    read: fn(&Row<'_>) -> rusqlite::Result<Option<T>>,
}

/// What was read of a table.
struct Read<T> {
    rows: BTreeMap<i64, T>,
    /// Rows that are not wanted.
    others: BTreeSet<i64>,
    /// Rows that are there and make no sense.
    broken: BTreeSet<i64>,
    /// Whether the table could be read from one end to the other.
    is_complete: bool,
}

impl<T> Table<T> {
    /// Reads from both ends towards the damage.
    fn read_all(&self, connection: &Connection) -> rusqlite::Result<Read<T>> {
        // A table that is not there at all is another matter than one that is damaged.
        connection.prepare(&self.sql)?;
        let (rows, others, broken) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        let mut read = Read { rows, others, broken, is_complete: false };
        read.is_complete =
            self.walk(connection, "asc", &mut read) || self.walk(connection, "desc", &mut read);
        Ok(read)
    }

    /// Reads until the end, or what cannot be read; says whether it came to the end.
    fn walk(&self, connection: &Connection, order: &str, read: &mut Read<T>) -> bool {
        let (column, at) = self.number;
        let sql = format!("{} order by {column} {order}", self.sql);
        until_damage(connection, &sql, |row| {
            read.take(row.get(at)?, (self.read)(row));
            Ok(())
        })
    }

    /// Reads rows that may be those of another table, which make no sense in this one.
    fn walk_foreign(&self, connection: &Connection, read: &mut Read<T>) {
        let broken = std::mem::take(&mut read.broken);
        self.walk(connection, "asc", read);
        read.broken = broken.into_iter().filter(|number| !read.knows(*number)).collect();
    }
}

impl<T> Read<T> {
    fn take(&mut self, number: i64, row: rusqlite::Result<Option<T>>) {
        match row {
            _ if self.knows(number) => {}
            Ok(Some(row)) => drop(self.rows.insert(number, row)),
            Ok(None) => drop(self.others.insert(number)),
            Err(_) => drop(self.broken.insert(number)),
        }
    }

    fn knows(&self, number: i64) -> bool {
        self.rows.contains_key(&number) || self.others.contains(&number)
    }
}
