//! The spool: the file beside a source of truth that can be away. It holds the queue (writes that are not yet there),
//! the replica (last known copies), and dead letters (writes that turned out superseded or refused).
//!
//! A thread has at most one row: either its newest queued write or a copy of what is stored. Rows of the queue are never
//! dropped; copies are: those that came by listings first, then the oldest written.

mod anchor;
mod dead;
mod offline;
mod queue;
mod replica;
mod salvage;

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, Row};
use tokio::sync::oneshot;

use super::database::{Database, Opened};
use super::file::{self, Role};
use super::writer::{Survives, closed};
use crate::blocking::unblock;
use crate::error::{Error, ErrorKind, Result};
use crate::record::{Json, Key, Record};
use crate::spool::{Bounds, Holdings, Tally, Waiting};
use crate::version::{Blindness, Clock, REMEMBERED, Timestamp, Version};

use anchor::Anchor;
pub(crate) use offline::{is_truth, retire};
use replica::{Doubt, UnderWay};
pub(crate) use salvage::salvage;

/// What a record costs beside its bytes: its row and the indexes.
const OVERHEAD: usize = 200;

/// The numbers of copies that nobody has used begin here, and stay negative.
const FIRST_LISTED: i64 = i64::MIN / 2;

/// A queued write of which nobody knows whether it was overtaken.
const PERHAPS: i64 = 2;

/// What the writing thread knows of the file. Read anew after a transaction that failed.
#[derive(Debug, Default)]
struct State {
    is_known: bool,
    holdings: Holdings,
    seq: i64,
    /// The last number that was given to a copy which nobody has used.
    listed: i64,
    /// The last queued write.
    queued: i64,
    /// Queued writes up to this one may have been sent.
    sent: i64,
    anchor: Anchor,
    /// The failures after which all copies have been dropped.
    dropped_after: u64,
}

impl State {
    fn read(connection: &Connection) -> rusqlite::Result<Self> {
        let tally = |sql: &str| {
            connection.query_row(sql, [], |row| {
                let (records, bytes): (i64, i64) = (row.get(0)?, row.get(1)?);
                Ok((
                    Tally { records: records.unsigned_abs(), bytes: bytes.unsigned_abs() },
                    row.get::<_, i64>(2)?,
                ))
            })
        };
        let of = |index: &str, pending: u8| {
            tally(&format!(
                "select count(*), coalesce(sum(bytes), 0), coalesce(max(seq), 0) from records indexed by {index}
                 where pending = {pending}"
            ))
        };
        let (queue, queued) = of("queue", 1)?;
        let (replica, kept) = of("replica", 0)?;
        let (dead_letters, _) = tally("select count(*), coalesce(sum(bytes), 0), 0 from dead_letters")?;
        let sent = file::about(connection, "sent")?.and_then(|sent| sent.parse().ok()).unwrap_or(0);
        let holdings = Holdings { queue, replica, dead_letters };
        let seq = queued.max(kept).max(sent);
        let listed = "select max(seq) from records indexed by replica where pending = 0 and seq < 0";
        let listed = connection.query_row(listed, [], |row| row.get::<_, Option<i64>>(0))?;
        let listed = listed.unwrap_or(FIRST_LISTED);
        Ok(Self { is_known: true, holdings, seq, listed, queued, sent, ..Self::default() })
    }

    fn next_seq(&mut self) -> i64 {
        self.seq += 1;
        self.seq
    }

    fn next_listed(&mut self) -> i64 {
        self.listed += 1;
        self.listed
    }
}

/// The open file.
pub(crate) struct Spool {
    database: Arc<Database>,
    state: Arc<Mutex<State>>,
    clock: Arc<Clock>,
    bounds: Bounds,
    doubt: Arc<Doubt>,
    /// Copies that the writing thread has, and the file may not have yet.
    under_way: UnderWay,
    /// Writes that are on their way into the queue.
    queueing: UnderWay,
}

impl fmt::Debug for Spool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Spool").field(&self.path()).finish()
    }
}

impl Spool {
    /// Opens the file, creating it where it does not exist; a damaged one is set aside. `origin` names the source of
    /// truth whose writes it keeps: one of another is refused.
    pub(crate) async fn open(
        path: &Path,
        origin: &str,
        bounds: Bounds,
        clock: Arc<Clock>,
    ) -> Result<(Self, Vec<Waiting>)> {
        let (path, origin) = (path.to_owned(), origin.to_owned());
        let spool = unblock(move || Self::open_blocking(&path, &origin, bounds, clock)).await??;
        if spool.database.was_doubtful() {
            spool.doubt.raise();
            tracing::warn!(path = %spool.path().display(), "the last copies could not be written: they are dropped");
            // Where the disk is still full, none is handed out; the source of truth may be well.
            let dropped = spool.drop_copies().await;
            dropped.unwrap_or_else(|error| tracing::error!(%error, "they could not be dropped yet"));
        }
        let waiting = spool.waiting().await?;
        Ok((spool, waiting))
    }

    fn open_blocking(path: &Path, origin: &str, bounds: Bounds, clock: Arc<Clock>) -> Result<Self> {
        let (opened, aside) = Opened::or_set_aside(path, Role::Queue)?;
        if let Some(aside) = aside {
            tracing::error!(
                file = %path.display(), aside = %aside.display(),
                "THE QUEUE FILE IS DAMAGED and was set aside; a new one was begun. Salvage what was queued with \
                 `threadkeep queue import`"
            );
        }
        check_origin(&opened, origin)?;
        Self::begin(opened, bounds, clock)
    }

    /// Starts to work with a file that has been looked at.
    fn begin(opened: Opened, bounds: Bounds, clock: Arc<Clock>) -> Result<Self> {
        upgrade(&opened.connection).map_err(file::failure(&opened.path))?;
        let forgotten = Version::lowest(clock.now().minus(REMEMBERED));
        let tidy = "delete from attempts where version < ?1";
        let tidied = opened.connection.execute(tidy, [forgotten.raw()]);
        let newest = opened.connection.query_row("select max(version) from attempts", [], |row| row.get(0));
        // What this process writes is newer than what the one before it sent.
        newest.ok().flatten().into_iter().for_each(|newest| clock.observe(Version::from_raw(newest)));
        let state = tidied
            .and_then(|_| anchor::resume(&opened.connection, &clock))
            .and_then(|()| rebase(&opened.connection, &clock))
            .and_then(|()| State::read(&opened.connection));
        let state = Arc::new(Mutex::new(state.map_err(file::failure(&opened.path))?));
        let forget = {
            let state = Arc::clone(&state);
            move || lock(&state).is_known = false
        };
        let database = Arc::new(Database::start(opened, forget)?);
        let doubt = Arc::new(Doubt::new(database.holder()));
        Ok(Self {
            database,
            state,
            clock,
            bounds,
            doubt,
            under_way: UnderWay::default(),
            queueing: UnderWay::default(),
        })
    }

    /// How many writes wait in a file that is not open, if there is one.
    pub(crate) fn left_behind(path: &Path) -> Option<u64> {
        let connection = path.exists().then(|| file::open_to_read(path).ok())??;
        let count = "select count(*) from records where pending = 1";
        connection.query_row(count, [], |row| row.get::<_, i64>(0)).ok().map(i64::unsigned_abs)
    }

    /// Where the file lies.
    pub(crate) fn path(&self) -> &Path {
        self.database.path()
    }

    /// What it holds.
    pub(crate) fn holdings(&self) -> Holdings {
        lock(&self.state).holdings
    }

    /// What it may hold.
    pub(crate) fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Finishes what waits to be written, and lets others open the file.
    pub(crate) async fn close(&self) -> Result<()> {
        self.database.close().await
    }

    /// Runs `work` in a transaction of the writing thread, with what that knows of the file.
    async fn write<T: Send + 'static>(
        &self,
        survives: Survives,
        work: impl FnMut(&Connection, &mut State) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let written = self.hand_over(survives, work, |_| {}).await?.await.map_err(|_| closed())?;
        if written.is_err() {
            self.read_anew().await.ok();
        }
        written
    }

    /// As [`write`](Self::write), but that it returns when the writing thread has the work, and answers to whoever waits.
    /// `announce` is called before anybody hears of this or of any later work.
    async fn hand_over<T: Send + 'static>(
        &self,
        survives: Survives,
        mut work: impl FnMut(&Connection, &mut State) -> rusqlite::Result<T> + Send + 'static,
        announce: impl FnOnce(&Result<T>) + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T>>> {
        let (state, clock) = (Arc::clone(&self.state), Arc::clone(&self.clock));
        let work = move |connection: &Connection| {
            let mut state = lock(&state);
            if !state.is_known {
                *state = State::read(connection)?;
            }
            state.anchor.note(connection, &clock)?;
            let result = work(connection, &mut state);
            state.is_known = result.is_ok();
            result
        };
        self.database.hand_over(survives, work, announce).await
    }

    /// Gives free pages back to the file system, and empties the log, which may still have deleted text.
    pub(crate) async fn tidy(&self) -> Result<()> {
        self.database.tidy().await
    }

    /// What keeps the file from working, as far as is known; asks nobody.
    pub(crate) fn fault(&self) -> Option<Error> {
        self.database.fault()
    }

    /// Finds out whether the file can be written and read. There may be no traffic that would tell.
    pub(crate) async fn prove(&self) -> Result<()> {
        self.database.prove().await?;
        self.read_anew().await
    }

    /// Has the figures read from the file, after a commit that failed: they had counted it.
    async fn read_anew(&self) -> Result<()> {
        self.hand_over(Survives::Crash, |_, _| Ok(()), |_| {}).await?.await.map_err(|_| closed())?
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check_origin(opened: &Opened, origin: &str) -> Result<()> {
    let fail = file::failure(&opened.path);
    let Some(other) = file::about(&opened.connection, "origin").map_err(&fail)? else {
        let note = "insert into about values ('origin', ?1)";
        return opened.connection.execute(note, [origin]).map(drop).map_err(fail);
    };
    if other == origin {
        return Ok(());
    }
    let why = format!(
        "holds writes for {other}, not for {origin}; set CONVERSATION_QUEUE_PATH to another path, and bring them over \
         with `threadkeep queue move`"
    );
    Err(file::unusable(&opened.path, &why))
}

/// Adds what files of earlier builds lack.
fn upgrade(connection: &Connection) -> rusqlite::Result<()> {
    // An earlier build noted attempts of updates alone.
    for (table, column) in [("records", "blindness"), ("attempts", "is_put")] {
        let find = "select 1 from pragma_table_info(?1) where name = ?2";
        if !connection.prepare(find)?.exists([table, column])? {
            let add = format!("alter table {table} add column {column} integer not null default 0");
            connection.execute_batch(&add)?;
        }
    }
    Ok(())
}

/// What was stamped by a clock that nobody had put right, and that was not as far ahead of the system's clock as the one
/// that this process starts from, is brought in line with this one.
fn rebase(connection: &Connection, clock: &Clock) -> rusqlite::Result<()> {
    let sql = "update records set version = version + ((?1 - skew) << 21), expires_at = expires_at + ?1 - skew, skew = ?1,
                   base = case when ' ' || chain || ' ' like '% 0 %' then base + ((?1 - skew) << 21) else base end,
                   blindness = ?2
               where pending = 1 and skew is not null and (skew <> ?1 or blindness <> ?2)";
    connection.execute(sql, [clock.ahead_of_system(), clock.last_blindness().0.into()]).map(drop)
}

/// The source of truth holds this version, and nothing of the thread waits in the queue: no older attempt can reach it any
/// more, and nothing that waits can meet one.
fn heard_of(connection: &Connection, key: &Key, version: Version) -> rusqlite::Result<()> {
    let sql = "delete from attempts where key = ?1 and version <= ?2";
    connection.prepare_cached(sql)?.execute(rusqlite::params![key.as_str(), version.raw()]).map(drop)
}

const COLUMNS: &str = "key, version, value, expires_at, user, metadata";

/// What stands in the file for a thread.
struct Place<'a> {
    record: &'a Record,
    seq: i64,
    at: Timestamp,
    is_pending: bool,
    base: Option<Version>,
    chain: &'a str,
    is_sent: bool,
    /// Of a write that a blind clock stamped: how far that was ahead of the system's, and its blindness.
    unsure: Option<(i64, Blindness)>,
    /// As in the schema: 1, or [`PERHAPS`], or 0.
    overtaken: i64,
}

/// Writes it over what stood there. The row stays where it lies: to delete it and insert another touches twice the pages.
fn put_down(connection: &Connection, place: &Place<'_>) -> rusqlite::Result<()> {
    let sql = "insert into records (key, version, value, expires_at, user, metadata, bytes, seq, at, pending, base, chain,
                                    sent, skew, overtaken, blindness)
               values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)
               on conflict (key) do update set
                   version = ?2, value = ?3, expires_at = ?4, user = ?5, metadata = ?6, bytes = ?7, seq = ?8, at = ?9,
                   pending = ?10, base = ?11, chain = ?12, sent = ?13, skew = ?14, overtaken = ?15, blindness = ?16";
    let Place { record, seq, at, is_pending, base, chain, is_sent, unsure, overtaken } = place;
    let values = rusqlite::params![
        record.key.as_str(),
        record.version.raw(),
        text(record),
        record.expires_at.0,
        record.user,
        record.metadata.as_str(),
        number(bytes(record)),
        seq,
        at.0,
        is_pending,
        base.map(Version::raw),
        chain,
        is_sent,
        unsure.map(|(skew, _)| skew),
        overtaken,
        unsure.map_or(0, |(_, Blindness(number))| number),
    ];
    connection.prepare_cached(sql)?.execute(values).map(drop)
}

/// The record of a row that begins with [`COLUMNS`].
fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    super::record(row)
}

/// What a record counts against the bounds.
fn bytes(record: &Record) -> u64 {
    (record.bytes() + OVERHEAD) as u64
}

fn number(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// The blindness in which a queued write was stamped, as a column of a query; null if the clock was known.
const BLINDNESS: &str = "iif(skew is null, null, blindness)";

/// Reads [`BLINDNESS`].
fn blindness(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<Blindness>> {
    row.get::<_, Option<u32>>(column).map(|number| number.map(Blindness))
}

/// The version that a clock would have given that was right, as far as is known.
fn straight(version: Version, blindness: Option<Blindness>, at: Timestamp, clock: &Clock) -> Version {
    let moved = blindness.and_then(|blindness| clock.moved(blindness));
    version.straightened(moved.unwrap_or(0), at)
}

fn text(record: &Record) -> Option<&str> {
    record.value.as_ref().map(Json::as_str)
}

fn full(path: &Path, bounds: Bounds, holdings: Holdings) -> Error {
    let Holdings { queue, dead_letters, .. } = holdings;
    let letters = match dead_letters.records {
        0 => String::new(),
        count => format!(", and {count} dead letters with {} (export and clear them)", dead_letters.bytes),
    };
    let message = format!(
        "the source of truth cannot be written, and the queue {} is full: {} writes with {} of {} bytes{letters}; this \
         write was not queued (CONVERSATION_QUEUE_BYTES)",
        path.display(),
        queue.records,
        queue.bytes,
        bounds.queue,
    );
    Error::new(ErrorKind::QueueFull, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_an_earlier_build_gets_the_columns_that_it_lacks() {
        let connection = Connection::open_in_memory().unwrap();
        let earlier = "create table records (key text not null primary key) strict;
             create table attempts (key text not null, version integer not null, primary key (key, version))
             strict, without rowid; insert into attempts values ('k', 7);";
        connection.execute_batch(earlier).unwrap();
        upgrade(&connection).unwrap();
        upgrade(&connection).unwrap();
        let is_put = connection.query_row("select is_put from attempts", [], |row| row.get::<_, bool>(0));
        assert!(!is_put.unwrap());
    }
}
