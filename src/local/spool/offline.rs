//! The file without a source of truth: looked at, exported from, taken into. For the command line.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::dead::bury;
use super::{
    COLUMNS, PERHAPS, Place, Spool, State, Survives, bytes, check_origin, number, put_down, record, text,
};
use crate::blocking::unblock;
use crate::error::{Error, ErrorKind, Result};
use crate::local::database::Opened;
use crate::local::file::{self, Lock, Role};
use crate::local::versions;
use crate::record::Record;
use crate::spool::{Bounds, DeadLetter, Imported, Incoming, QueuedWrite, Reason};
use crate::version::{Blindness, Clock, OLDEST, Timestamp, Version};

/// What is taken in is not held to the bounds: it is on a disk already, and refusing it would help nobody.
const UNBOUNDED: Bounds = Bounds { queue: u64::MAX, replica: u64::MAX };
/// A conversation that was last written longer ago than this is stamped anew: the database refuses what is older than
/// [`OLDEST`], and the queue may wait for a while.
const MARGIN: std::time::Duration = std::time::Duration::from_secs(86_400);

/// What `threadkeep` takes a write for that comes from another file.
enum Verdict {
    Take,
    Already,
    Older,
}

impl Spool {
    /// Opens the file for work without a source of truth. With `origin` it is created where it does not exist, and one of
    /// another origin is refused; without, it must exist. A damaged file is an error, and left as it is.
    pub(crate) async fn open_offline(path: &Path, origin: Option<String>) -> Result<Self> {
        let (path, of, must_exist) = (path.to_owned(), path, origin.is_none());
        let opened = unblock(move || {
            if must_exist {
                // Looked at before it is locked: nothing is to be left beside a file of somebody else's, or written into it.
                role(&path)?;
            }
            let opened = Opened::new(&path, Role::Queue)?;
            let newest = "select max(coalesce((select max(version) from records), 0),
                                     coalesce((select max(version) from dead_letters), 0))";
            let newest = opened.connection.query_row(newest, [], |row| row.get(0));
            let clock = Arc::new(Clock::new());
            clock.observe(Version::from_raw(newest.map_err(file::failure(&opened.path))?));
            if let Some(origin) = &origin {
                check_origin(&opened, origin)?;
            }
            Self::begin(opened, UNBOUNDED, clock)
        })
        .await?;
        let is_kept_from = |error: &Error| must_exist && file::is_unwritable(error);
        opened.map_err(|error| if is_kept_from(&error) { unwritable(of, error) } else { error })
    }

    /// The source of truth whose writes these are.
    pub(crate) async fn origin(&self) -> Result<Option<String>> {
        self.database.read(|connection| file::about(connection, "origin")).await
    }

    /// How long the oldest write has been waiting, by the system's clock.
    pub(crate) async fn oldest(&self) -> Result<Option<std::time::Duration>> {
        let now = self.clock.now();
        let sql = "select min(at) from records where pending = 1";
        let oldest =
            |connection: &Connection| connection.query_row(sql, [], |row| row.get::<_, Option<i64>>(0));
        Ok(self.database.read(oldest).await?.map(|at| now.since(Timestamp(at))))
    }

    /// Queued writes after the one numbered `after`, in their order: at most so many, and, but for the first, so many
    /// bytes.
    pub(crate) async fn page(&self, after: i64, most: usize, most_bytes: usize) -> Result<Vec<QueuedWrite>> {
        let (sent, is_doubtful) = (super::lock(&self.state).sent, self.database.was_doubtful());
        let read = move |connection: &Connection| {
            let sql = format!("{} where pending = 1 and seq > ?2 order by seq limit ?3", select());
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            let mut find = connection.prepare_cached(&sql)?;
            let (mut all, mut bytes) = (Vec::new(), 0);
            for found in find.query_map(params![sent, after, most], queued_write)? {
                let mut found = found?;
                found.is_doubtful |= is_doubtful && !found.is_overtaken;
                bytes += found.record.bytes();
                if bytes > most_bytes && !all.is_empty() {
                    break;
                }
                all.push(found);
            }
            Ok(all)
        };
        self.database.read(read).await
    }

    /// Takes in what comes from another file; it is synced to disk when this returns. What is newer here stays, so that
    /// the same can be taken in again.
    pub(crate) async fn take_in(&self, all: Vec<Incoming>) -> Result<Imported> {
        let clock = Arc::clone(&self.clock);
        let work = move |connection: &Connection, state: &mut State| {
            let one = |sum: Imported, one: &Incoming| Ok(sum.and(take_in(connection, state, one, &clock)?));
            all.iter().try_fold(Imported::default(), one)
        };
        self.write(Survives::Restart, work).await
    }

    /// Queues a dead letter again, as a put of this moment: says false, and changes nothing, where a newer write of the
    /// thread waits. Its life is as long as it was to be.
    pub(crate) async fn requeue(&self, letter: &DeadLetter) -> Result<bool> {
        let (letter, clock) = (letter.clone(), Arc::clone(&self.clock));
        let work = move |connection: &Connection, state: &mut State| {
            let waits = "select pending from records where key = ?1";
            let key = letter.record.key.as_str();
            let waits = connection.query_row(waits, [key], |row| row.get::<_, bool>(0)).optional()?;
            let deleted = "delete from dead_letters where id = ?1 and key = ?2 and version = ?3";
            let mine = params![letter.id, key, letter.record.version.raw()];
            if waits == Some(true) || connection.execute(deleted, mine)? == 0 {
                return Ok(false);
            }
            let now = clock.now();
            let life = letter.record.expires_at.since(letter.record.version.at());
            let version = clock.stamp().version;
            let record = Record { version, expires_at: now.plus(life), ..letter.record.clone() };
            insert(connection, state, &QueuedWrite::blind(record, now))?;
            *state = State::read(connection)?;
            Ok(true)
        };
        self.write(Survives::Restart, work).await
    }
}

impl QueuedWrite {
    /// A put that goes on from nothing, stamped by the system's clock.
    fn blind(record: Record, queued_at: Timestamp) -> Self {
        Self {
            record,
            base: None,
            chain: Vec::new(),
            is_sent: false,
            is_unsure: true,
            is_overtaken: false,
            is_doubtful: false,
            queued_at,
            seq: 0,
        }
    }
}

fn unwritable(path: &Path, error: Error) -> Error {
    error.saying(format!(
        "the queue's file {} cannot be opened for writing, which reading it takes, too: for the lock, and for the files that \
         SQLite keeps beside it; make it and its directory writable for this user, or copy it, and its -wal where there is \
         one, to a place that is, and name the copy (CONVERSATION_QUEUE_PATH; at the command line also --file)",
        path.display()
    ))
}

fn check_exists(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(e) => {
            let why = "is not there: nothing was ever queued in it, or the path is another (CONVERSATION_QUEUE_PATH)";
            Err(file::unusable(path, why).with_source(e))
        }
    }
}

pub(super) fn select() -> String {
    format!("select {COLUMNS}, base, chain, sent or seq <= ?1, seq, skew, at, overtaken from records")
}

/// A row of [`select`].
pub(super) fn queued_write(row: &Row<'_>) -> rusqlite::Result<QueuedWrite> {
    let overtaken: i64 = row.get(12)?;
    Ok(QueuedWrite {
        record: record(row)?,
        base: row.get::<_, Option<i64>>(6)?.map(Version::from_raw),
        chain: versions(&row.get::<_, String>(7)?).collect(),
        is_sent: row.get(8)?,
        seq: row.get(9)?,
        is_unsure: row.get::<_, Option<i64>>(10)?.is_some(),
        queued_at: Timestamp(row.get(11)?),
        is_overtaken: overtaken == 1,
        is_doubtful: overtaken == PERHAPS,
    })
}

fn take_in(
    connection: &Connection,
    state: &mut State,
    one: &Incoming,
    clock: &Clock,
) -> rusqlite::Result<Imported> {
    let is = |verdict: &Verdict| Imported {
        queued: usize::from(matches!(verdict, Verdict::Take)),
        already: usize::from(matches!(verdict, Verdict::Already)),
        older: usize::from(matches!(verdict, Verdict::Older)),
        dead_letters: 0,
    };
    match one {
        Incoming::Queued(write) => {
            let verdict = compare(connection, state, write, write.record.version, clock)?;
            if matches!(verdict, Verdict::Take) {
                insert(connection, state, write)?;
            }
            Ok(is(&verdict))
        }
        Incoming::Adopted(record) => {
            let write = adopted(record, clock);
            let verdict = compare(connection, state, &write, record.version, clock)?;
            if matches!(verdict, Verdict::Take) {
                insert(connection, state, &write)?;
            }
            Ok(is(&verdict))
        }
        Incoming::Dead(letter) => match insert_letter(connection, state, letter)? {
            true => Ok(Imported { dead_letters: 1, ..Imported::default() }),
            false => Ok(is(&Verdict::Already)),
        },
    }
}

/// The write that brings a conversation of a local file to another source of truth. Its version was given by the system's
/// clock. Where the database would refuse it as too old, it is stamped anew, as an update that goes on from what it was:
/// so it still replaces whatever is older, as a put does, and nothing else.
fn adopted(record: &Record, clock: &Clock) -> QueuedWrite {
    let now = clock.now();
    let write = QueuedWrite::blind(record.clone(), now);
    if record.version >= Version::lowest(now.minus(OLDEST - MARGIN)) {
        return write;
    }
    let record = Record { version: clock.stamp().version, ..record.clone() };
    QueuedWrite { record, base: Some(write.record.version), chain: vec![Version::NONE], ..write }
}

/// Whether a write that was last made at version `was` is to be taken, and makes room for it.
fn compare(
    connection: &Connection,
    state: &mut State,
    write: &QueuedWrite,
    was: Version,
    clock: &Clock,
) -> rusqlite::Result<Verdict> {
    let sql = "select version, pending, bytes, base from records where key = ?1";
    let key = &write.record.key;
    let held = connection.prepare_cached(sql)?.query_row([key.as_str()], |row| {
        let version = |raw: i64| Version::from_raw(raw);
        let base = row.get::<_, Option<i64>>(3)?.map(version);
        Ok((version(row.get(0)?), row.get::<_, bool>(1)?, row.get::<_, i64>(2)?.unsigned_abs(), base))
    });
    let Some((version, is_pending, bytes, base)) = held.optional()? else { return Ok(Verdict::Take) };
    // It was adopted before, and stamped anew then.
    let is_itself = version == was || (write.record.version != was && is_pending && base == Some(was));
    if is_itself {
        return Ok(Verdict::Already);
    }
    if version > was {
        return Ok(Verdict::Older);
    }
    let follows_a_put = write.chain.contains(&Version::NONE);
    let goes_on = |base: Version| {
        base == version || write.chain.contains(&version) || (follows_a_put && version < base)
    };
    if is_pending && write.base.is_some_and(|base| !goes_on(base)) {
        let text = "superseded: an update that was imported does not go on from it".into();
        let reason = Reason { text, newer: Some(write.record.version) };
        let letter = bury(connection, key, version, &reason, clock.now())?;
        state.holdings.dead_letters.add(letter);
    }
    match is_pending {
        true => state.holdings.queue.sub(bytes),
        false => state.holdings.replica.sub(bytes),
    }
    Ok(Verdict::Take)
}

/// Puts a write into the queue, in the place of what is there of its thread.
fn insert(connection: &Connection, state: &mut State, write: &QueuedWrite) -> rusqlite::Result<()> {
    let record = &write.record;
    let seq = state.next_seq();
    state.queued = seq;
    let chain: Vec<String> = write.chain.iter().map(Version::to_string).collect();
    let place = Place {
        record,
        seq,
        at: write.queued_at,
        is_pending: true,
        base: write.base,
        chain: &chain.join(" "),
        is_sent: write.is_sent,
        unsure: write.is_unsure.then_some((0, Blindness(0))),
        overtaken: overtaken(write),
    };
    put_down(connection, &place)?;
    state.holdings.queue.add(bytes(record));
    Ok(())
}

/// The column of that name.
fn overtaken(write: &QueuedWrite) -> i64 {
    match (write.is_overtaken, write.is_doubtful) {
        (true, _) => 1,
        (false, true) => PERHAPS,
        (false, false) => 0,
    }
}

/// Adds a dead letter, unless there is one of the same write.
fn insert_letter(connection: &Connection, state: &mut State, letter: &DeadLetter) -> rusqlite::Result<bool> {
    let record = &letter.record;
    let sql = format!(
        "insert into dead_letters ({COLUMNS}, bytes, queued_at, died_at, reason, newer)
         select ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11
         where not exists (select 1 from dead_letters where key = ?1 and version = ?2)"
    );
    let added = connection.prepare_cached(&sql)?.execute(params![
        record.key.as_str(),
        record.version.raw(),
        text(record),
        record.expires_at.0,
        record.user,
        record.metadata.as_str(),
        number(bytes(record)),
        letter.queued_at.0,
        letter.died_at.0,
        letter.reason,
        letter.newer.map(Version::raw),
    ])?;
    if added == 1 {
        state.holdings.dead_letters.add(bytes(record));
    }
    Ok(added == 1)
}

/// Whether a file of threadkeep's holds the conversations themselves, and no queue.
pub(crate) async fn is_truth(path: &Path) -> Result<bool> {
    let path = path.to_owned();
    unblock(move || Ok(role(&path)?.as_deref() == Some(Role::Truth.name()))).await?
}

/// What a file of threadkeep's is for; it is only read.
fn role(path: &Path) -> Result<Option<String>> {
    check_exists(path)?;
    let connection = file::open_to_read(path)?;
    match file::is_ours(&connection).map_err(file::failure(path))? {
        true => file::about(&connection, "role").map_err(file::failure(path)),
        false => Err(file::unusable(path, "is not one of threadkeep's; name another")),
    }
}

/// Gives a file that is not needed any more, and what belongs to it, the name `FILE.moved`. Nobody may have it open.
pub(crate) async fn retire(path: &Path) -> Result<PathBuf> {
    let path = path.to_owned();
    unblock(move || {
        let cannot = |e| file::unusable(&path, "cannot be given another name").with_source(e);
        let path = path.canonicalize().map_err(cannot)?;
        let moved = |suffix: &str| file::with_suffix(&path, &format!(".moved{suffix}"));
        if moved("").exists() {
            let why = format!("cannot be renamed: there is a {} already", moved("").display());
            return Err(Error::new(ErrorKind::Local, format!("the local file {} {why}", path.display())));
        }
        let _lock = Lock::acquire(&path)?;
        for suffix in ["-wal", "-shm", ""] {
            match std::fs::rename(file::with_suffix(&path, suffix), moved(suffix)) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(cannot(e)),
                _ => {}
            }
        }
        Ok(moved(""))
    })
    .await?
}
