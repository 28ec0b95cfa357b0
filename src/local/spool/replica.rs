//! The replica: last known copies, for when the source of truth cannot be asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use rusqlite::{Connection, OptionalExtension, params};

use super::{COLUMNS, PERHAPS, Spool, State, Survives, bytes, number, record, text};
use crate::error::{ErrorKind, Result};
use crate::record::{Key, Record};
use crate::spool::{Copy, Tally};
use crate::version::{Timestamp, Version};

impl Spool {
    /// Keeps copies of what the source of truth holds, in the file when this returns; a record without a value says that
    /// there is no such thread, so that an older copy is not taken for it. Says which queued write each took the place of.
    ///
    /// Where it cannot be written, no copy is handed out until all have been dropped: some may be older than what was
    /// acknowledged.
    pub(crate) async fn keep(&self, copies: Vec<Copy>) -> Vec<Option<Version>> {
        let (bound, moved) = (self.bounds.replica, self.clock.moved());
        let has_own = copies.iter().any(|copy| copy.is_own || copy.record.value.is_none());
        let doubt = Arc::clone(&self.doubt);
        let work = move |connection: &Connection, state: &mut State| {
            let failures = doubt.failures();
            if doubt.is_there() {
                drop_copies(connection, state)?;
            }
            let replaced = copies.iter().map(|copy| keep(connection, state, copy, moved));
            let replaced = replaced.collect::<rusqlite::Result<_>>()?;
            evict(connection, state, bound)?;
            Ok((replaced, failures))
        };
        match self.write(Survives::Crash, work).await {
            Ok((replaced, failures)) => {
                self.trust(failures);
                replaced
            }
            // After a shutdown: what was only read goes with the process.
            Err(error) if error.kind() == ErrorKind::Closed && !has_own => Vec::new(),
            Err(error) => {
                if self.doubt.raise() {
                    tracing::error!(%error, "a last known copy could not be written: none is handed out until one can be");
                }
                self.database.note(|| self.doubt.is_there());
                Vec::new()
            }
        }
    }

    /// Notes that the source of truth still holds this version.
    pub(crate) async fn confirm(&self, key: &Key, version: Version, at: Timestamp) {
        let key = key.clone();
        let work = move |connection: &Connection, _: &mut State| {
            let sql = "update records set at = ?3 where key = ?1 and version = ?2 and pending = 0";
            connection.prepare_cached(sql)?.execute(params![key.as_str(), version.raw(), at.0])
        };
        if let Err(error) = self.write(Survives::Crash, work).await {
            tracing::debug!(%error, "the age of a copy could not be noted");
        }
    }

    /// The last known copy of a thread, and when the source of truth confirmed it.
    pub(crate) async fn last_known(&self, key: &Key) -> Result<Option<(Arc<Record>, Timestamp)>> {
        if self.doubt.is_there() {
            return Ok(None);
        }
        let key = key.clone();
        let read = move |connection: &Connection| {
            let sql = format!(
                "select {COLUMNS}, at from records where key = ?1 and pending = 0 and value is not null"
            );
            let mut find = connection.prepare_cached(&sql)?;
            let found = |row: &rusqlite::Row<'_>| Ok((Arc::new(record(row)?), Timestamp(row.get(6)?)));
            find.query_row([key.as_str()], found).optional()
        };
        let found = self.database.read(read).await?;
        Ok(found.filter(|_| !self.doubt.is_there()))
    }

    /// Copies, the last written first, from the one before the number `before` on: number, record, and when the source of
    /// truth confirmed it.
    pub(crate) async fn copies(
        &self,
        before: i64,
        most: usize,
    ) -> Result<Vec<(i64, Arc<Record>, Timestamp)>> {
        if self.doubt.is_there() {
            return Ok(Vec::new());
        }
        let read = move |connection: &Connection| {
            let sql = format!(
                "select {COLUMNS}, seq, at from records where pending = 0 and value is not null and seq < ?1
                 order by seq desc limit ?2"
            );
            let found =
                |row: &rusqlite::Row<'_>| Ok((row.get(6)?, Arc::new(record(row)?), Timestamp(row.get(7)?)));
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            connection.prepare_cached(&sql)?.query_map(params![before, most], found)?.collect()
        };
        let found = self.database.read(read).await?;
        Ok(if self.doubt.is_there() { Vec::new() } else { found })
    }

    /// Drops all copies.
    pub(crate) async fn drop_copies(&self) -> Result<()> {
        let failures = self.doubt.failures();
        self.write(Survives::PowerCut, drop_copies).await?;
        self.trust(failures);
        Ok(())
    }

    fn trust(&self, failures: u64) {
        if self.doubt.settle(failures) {
            self.database.note(|| self.doubt.is_there());
        }
    }
}

/// Whether copies may be older than what was acknowledged, because one could not be written.
#[derive(Debug, Default)]
pub(super) struct Doubt {
    failures: AtomicU64,
    /// The failures after which all copies have been dropped.
    settled: AtomicU64,
}

impl Doubt {
    fn failures(&self) -> u64 {
        self.failures.load(SeqCst)
    }

    pub(super) fn is_there(&self) -> bool {
        self.settled.load(SeqCst) < self.failures()
    }

    /// Says whether there was none before.
    pub(super) fn raise(&self) -> bool {
        let before = self.failures.fetch_add(1, SeqCst);
        self.settled.load(SeqCst) == before
    }

    /// Copies were dropped after so many failures; says whether that changes anything.
    fn settle(&self, failures: u64) -> bool {
        self.settled.fetch_max(failures, SeqCst) < failures
    }
}

/// What waits in the queue may be older than what was acknowledged, too: that it was overtaken could not be noted.
fn drop_copies(connection: &Connection, state: &mut State) -> rusqlite::Result<()> {
    connection.execute("delete from records where pending = 0", [])?;
    connection.execute("update records set overtaken = ?1 where overtaken = 0", [PERHAPS])?;
    state.holdings.replica = Tally::default();
    Ok(())
}

fn keep(
    connection: &Connection,
    state: &mut State,
    copy: &Copy,
    moved: Option<i64>,
) -> rusqlite::Result<Option<Version>> {
    let Copy { record, confirmed_at, is_own } = copy;
    super::heard_of(connection, &record.key, record.version)?;
    let sql = "select version, pending, bytes, skew, at from records where key = ?1";
    let held = connection.prepare_cached(sql)?.query_row([record.key.as_str()], |row| {
        let version =
            super::straight(Version::from_raw(row.get(0)?), row.get(3)?, moved, Timestamp(row.get(4)?));
        Ok((version, row.get::<_, bool>(1)?, row.get::<_, i64>(2)?.unsigned_abs()))
    });
    let replaced = match held.optional()? {
        // That there never was such a thread needs no row.
        None if record.version == Version::NONE => return Ok(None),
        None => None,
        Some((version, true, bytes)) if *is_own && version <= record.version => {
            state.holdings.queue.sub(bytes);
            Some(version)
        }
        // What waits there was overtaken, and is read no more, also not after a restart.
        Some((version, true, _)) if version < record.version => {
            let sql = "update records set overtaken = 1 where key = ?1";
            connection.prepare_cached(sql)?.execute([record.key.as_str()])?;
            return Ok(None);
        }
        Some((_, true, _)) => return Ok(None),
        // The copy is that very version, which only the time can make absent.
        Some((version, false, _)) if version == record.version && record.value.is_none() => return Ok(None),
        Some((version, false, bytes)) if version <= record.version => {
            state.holdings.replica.sub(bytes);
            None
        }
        // Somebody deleted the row: what is here is the last version that was.
        Some((_, false, _)) if record.value.is_none() && record.version == Version::NONE => {
            let sql = "update records set value = null where key = ?1";
            connection.prepare_cached(sql)?.execute([record.key.as_str()])?;
            return Ok(None);
        }
        Some(_) => return Ok(None),
    };
    let sql = format!(
        "insert or replace into records ({COLUMNS}, bytes, seq, at, pending, base, chain, sent, skew)
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 0, null, '', 0, null)"
    );
    connection.prepare_cached(&sql)?.execute(params![
        record.key.as_str(),
        record.version.raw(),
        text(record),
        record.expires_at.0,
        record.user,
        record.metadata.as_str(),
        number(bytes(record)),
        state.next_seq(),
        confirmed_at.0,
    ])?;
    state.holdings.replica.add(bytes(record));
    Ok(replaced)
}

/// Makes room: the copies that were written first go first, a queued write never.
pub(super) fn evict(connection: &Connection, state: &mut State, bound: u64) -> rusqlite::Result<()> {
    let sql = "delete from records where rowid in (select rowid from records where pending = 0 order by seq limit 16)
               returning bytes";
    while state.holdings.replica.bytes > bound {
        let mut drop = connection.prepare_cached(sql)?;
        let dropped: Vec<i64> = drop.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        if dropped.is_empty() {
            state.holdings.replica = Tally::default();
        }
        dropped.iter().for_each(|bytes| state.holdings.replica.sub(bytes.unsigned_abs()));
    }
    Ok(())
}
