//! The queue: one pending write for each thread, the newest.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{
    BLINDNESS, COLUMNS, PERHAPS, Place, Spool, State, Survives, blindness, bytes, closed, full, put_down,
    record, straight,
};
use crate::error::Result;
use crate::local::versions;
use crate::record::Key;
use crate::spool::{Enqueued, Entry, Fate, Queued, Reason, Waiting};
use crate::version::{Blindness, Clock, TOLERANCE, Timestamp, Version};

/// What the file holds of a thread.
struct Held {
    version: Version,
    /// As it was stamped, which is how it was sent if the clock was not known then.
    stamped: Version,
    is_pending: bool,
    bytes: u64,
    base: Option<Version>,
    chain: String,
    is_sent: bool,
    is_unsure: bool,
}

impl Held {
    fn find(
        connection: &Connection,
        state: &State,
        key: &Key,
        clock: &Clock,
    ) -> rusqlite::Result<Option<Self>> {
        let sql = format!(
            "select version, pending, bytes, base, chain, sent or seq <= ?2, {BLINDNESS}, at from records
             where key = ?1"
        );
        let read = |row: &Row<'_>| {
            let (chain, blindness): (String, _) = (row.get(4)?, blindness(row, 6)?);
            let stamped = Version::from_raw(row.get(0)?);
            Ok(Self {
                version: straight(stamped, blindness, Timestamp(row.get(7)?), clock),
                stamped,
                is_pending: row.get(1)?,
                bytes: row.get::<_, i64>(2)?.unsigned_abs(),
                base: straight_base(row.get(3)?, &chain, blindness, clock),
                chain,
                is_sent: row.get(5)?,
                is_unsure: lasts(blindness, clock),
            })
        };
        connection.prepare_cached(&sql)?.query_row(params![key.as_str(), state.sent], read).optional()
    }

    /// What an update that goes on from this one may find in the source of truth: base and chain.
    fn passed_on(&self) -> (Option<Version>, String) {
        match self.base {
            // A put takes the place of whatever is there, and with it what goes on from it, up to here.
            // The version of what never was, in the chain, says so.
            None => (Some(self.version), format!("{}{}", Version::NONE, self.sent())),
            Some(base) => (Some(base), format!("{}{}", self.chain, self.sent())),
        }
    }

    /// The versions under which it may be in the source of truth, as a chain has them.
    fn sent(&self) -> String {
        match self.is_sent {
            true if self.stamped == self.version => format!(" {}", self.version),
            true => format!(" {} {}", self.version, self.stamped),
            false => String::new(),
        }
    }
}

impl Spool {
    /// Takes a write into the queue: it is synced to disk when this returns. `announce` is called before anybody hears of
    /// what was done with it later, so that whoever settles it finds it announced.
    ///
    /// # Errors
    /// [`QueueFull`](crate::ErrorKind::QueueFull), and [`Local`](crate::ErrorKind::Local).
    pub(crate) async fn enqueue(
        &self,
        entry: Entry,
        announce: impl FnOnce(Enqueued) + Send + 'static,
    ) -> Result<Enqueued> {
        let (bound, clock) = (self.bounds.queue, Arc::clone(&self.clock));
        let passage = self.queueing.begin(entry.record.bytes());
        let work = move |connection: &Connection, state: &mut State| {
            enqueue(connection, state, &entry, &clock, bound)
        };
        let announce = |enqueued: &Result<Option<Enqueued>>| {
            if let Ok(Some(enqueued)) = enqueued {
                announce(*enqueued);
            }
            drop(passage);
        };
        let answer = self.hand_over(Survives::Restart, work, announce).await?;
        let enqueued = answer.await.map_err(|_| closed())?;
        if enqueued.is_err() {
            self.read_anew().await.ok();
        }
        enqueued?.ok_or_else(|| full(self.path(), self.bounds, self.holdings()))
    }

    /// What waits, as it is marked at the start.
    pub(super) async fn waiting(&self) -> Result<Vec<Waiting>> {
        let is_doubtful = self.doubt.is_there();
        let sql = format!("select key, version, {BLINDNESS}, at, overtaken from records where pending = 1");
        let read = move |row: &Row<'_>| {
            let overtaken: i64 = row.get(4)?;
            Ok(Waiting {
                key: crate::local::key(row)?,
                version: Version::from_raw(row.get(1)?),
                blindness: blindness(row, 2)?,
                queued_at: Timestamp(row.get(3)?),
                is_overtaken: overtaken == 1,
                is_doubtful: is_doubtful || overtaken == PERHAPS,
            })
        };
        self.database.read(move |connection| connection.prepare(&sql)?.query_map([], read)?.collect()).await
    }

    /// Notes that a write is being sent past the queue. If this process ends before it hears of the write, what waits in the
    /// queue for the thread may find it stored. A disk that cannot take the note does not hold up the write.
    pub(crate) async fn attempting(&self, key: &Key, version: Version, is_put: bool) {
        let key = key.clone();
        let work = move |connection: &Connection, _: &mut State| {
            let sql = "insert or ignore into attempts values (?1, ?2, ?3)";
            connection.prepare_cached(sql)?.execute(params![key.as_str(), version.raw(), is_put])
        };
        if let Err(error) = self.write(Survives::Crash, work).await {
            tracing::debug!(%error, "an attempt could not be noted");
        }
    }

    /// An attempt failed for certain: it will never be found stored. If the disk cannot take this, the note stays, which
    /// does no harm.
    pub(crate) async fn attempt_failed(&self, key: &Key, version: Version) {
        let key = key.clone();
        let work = move |connection: &Connection, _: &mut State| {
            let sql = "delete from attempts where key = ?1 and version = ?2";
            connection.prepare_cached(sql)?.execute(params![key.as_str(), version.raw()])
        };
        self.hand_over(Survives::Crash, work, |_| {}).await.ok();
    }

    /// The newest write of a thread, queued or, where it found its end just now, stored.
    pub(crate) async fn queued(&self, key: &Key) -> Result<Option<Queued>> {
        let (key, clock) = (key.clone(), Arc::clone(&self.clock));
        let sent = super::lock(&self.state).sent;
        let read = move |connection: &Connection| {
            let sql = format!("{} where key = ?2", select());
            let mut found = connection.prepare_cached(&sql)?;
            found.query_row(params![sent, key.as_str()], |row| queued(row, &clock)).optional()
        };
        self.database.read(read).await
    }

    /// The next writes [marked as sent](Self::mark_sent) in the order in which they were queued, after the one numbered
    /// `after`: at most so many, and, but for the first, so many bytes. What a blind clock stamped is not among them before
    /// it is [put right](Self::straighten).
    pub(crate) async fn next(&self, after: i64, most: usize, most_bytes: usize) -> Result<Vec<Queued>> {
        let clock = Arc::clone(&self.clock);
        let sent = super::lock(&self.state).sent;
        let read = move |connection: &Connection| {
            let sql = format!(
                "{} where pending = 1 and skew is null and seq > ?2 and seq <= ?1 order by seq limit ?3",
                select()
            );
            let mut find = connection.prepare_cached(&sql)?;
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            let (mut all, mut bytes) = (Vec::new(), 0);
            for found in find.query_map(params![sent, after, most], |row| queued(row, &clock))? {
                let found = found?;
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

    /// Settles writes by key and version, and says of each whether it was the one in the queue.
    pub(crate) async fn settle(&self, settled: Vec<(Key, Version, Fate)>) -> Result<Vec<bool>> {
        let (clock, bound) = (Arc::clone(&self.clock), self.bounds.replica);
        let work = move |connection: &Connection, state: &mut State| {
            let settled = settled
                .iter()
                .map(|(key, version, fate)| settle(connection, state, key, *version, fate, &clock))
                .collect();
            super::replica::evict(connection, state, bound)?;
            settled
        };
        self.write(Survives::Crash, work).await
    }

    /// Notes that whatever is queued by now may be sent from now on. It must be noted before it is read: else what takes
    /// its place meanwhile would not know.
    pub(crate) async fn mark_sent(&self) -> Result<()> {
        let is_marked = |state: &State| state.is_known && state.sent >= state.queued;
        if is_marked(&super::lock(&self.state)) {
            return Ok(());
        }
        let work = move |connection: &Connection, state: &mut State| {
            if state.sent < state.queued {
                state.sent = state.queued;
                let sql = "insert into about values ('sent', ?1) on conflict (name) do update set value = ?1";
                connection.execute(sql, [state.sent.to_string()])?;
            }
            Ok(())
        };
        self.write(Survives::PowerCut, work).await
    }

    /// Puts right what a blind clock stamped, if it sees by now.
    pub(crate) async fn straighten(&self) -> Result<()> {
        let clock = Arc::clone(&self.clock);
        let work = move |connection: &Connection, state: &mut State| straighten(connection, state, &clock);
        self.write(Survives::PowerCut, work).await
    }

    /// Gives a queued write another version: the one it has lies ahead of the source of truth's clock.
    pub(crate) async fn restamp(&self, key: &Key, from: Version, to: Version) -> Result<bool> {
        let (key, by) = (key.clone(), to.at().0 - from.at().0);
        let work = move |connection: &Connection, state: &mut State| {
            // Where it was sent, it may be stored under the old version once real time has caught up.
            let sql = "update records set version = ?3, expires_at = expires_at + ?4,
                           chain = case when sent or seq <= ?5 then chain || ' ' || version else chain end
                       where key = ?1 and version = ?2 and pending = 1";
            Ok(connection.execute(sql, params![key.as_str(), from.raw(), to.raw(), by, state.sent])? == 1)
        };
        self.write(Survives::PowerCut, work).await
    }
}

fn select() -> String {
    // With the attempts of now: some may be younger than the row.
    let attempts = |of: &str| {
        format!(
            "coalesce((select group_concat(version, ' ') from attempts where key = records.key {of}), '')"
        )
    };
    let (all, puts) = (attempts(""), attempts("and is_put"));
    format!(
        "select {COLUMNS}, base, chain, sent or seq <= ?1, seq, {BLINDNESS}, pending, at, {all}, {puts} from records"
    )
}

fn queued(row: &Row<'_>, clock: &Clock) -> rusqlite::Result<Queued> {
    let mut record = record(row)?;
    let (chain, blindness): (String, _) = (row.get(7)?, blindness(row, 10)?);
    if let Some(moved) = blindness.and_then(|blindness| clock.moved_exactly(blindness)) {
        record.version = straight(record.version, blindness, Timestamp(row.get(12)?), clock);
        record.expires_at = Timestamp(record.expires_at.0.saturating_add(moved));
    }
    let (attempts, puts): (String, String) = (row.get(13)?, row.get(14)?);
    let is_newer = |version: &Version| *version > record.version;
    let replaced_by = versions(&chain).chain(versions(&puts)).filter(is_newer).collect();
    Ok(Queued {
        base: straight_base(row.get(6)?, &chain, blindness, clock),
        blindness: blindness.filter(|blindness| clock.moved(*blindness).is_none()),
        chain: versions(&chain).chain(versions(&attempts)).collect(),
        replaced_by,
        record: record.into(),
        is_sent: row.get(8)?,
        seq: row.get(9)?,
        is_waiting: row.get(11)?,
    })
}

/// The base of an update. That of one that goes on from a queued put was stamped as it was itself.
fn straight_base(
    base: Option<i64>,
    chain: &str,
    blindness: Option<Blindness>,
    clock: &Clock,
) -> Option<Version> {
    let is_stamped_alike = versions(chain).any(|one| one == Version::NONE);
    let moved = blindness.filter(|_| is_stamped_alike).and_then(|blindness| clock.moved(blindness));
    base.map(|base| Version::from_raw(base).shifted(moved.unwrap_or(0)))
}

/// Whether nobody knows yet by how much a version is off that was stamped so.
fn lasts(blindness: Option<Blindness>, clock: &Clock) -> bool {
    blindness.is_some_and(|blindness| clock.moved(blindness).is_none())
}

/// Shifts versions, expiries and ages by what the answer moved the clock that ended their blindness.
fn straighten(connection: &Connection, state: &State, clock: &Clock) -> rusqlite::Result<()> {
    let sql = "select distinct blindness from records where pending = 1 and skew is not null";
    let found = connection.prepare_cached(sql)?.query_map([], |row| row.get(0))?.collect::<Vec<_>>();
    for number in found {
        let number: u32 = number?;
        let (Some(moved), Some(exactly)) =
            (clock.moved(Blindness(number)), clock.moved_exactly(Blindness(number)))
        else {
            continue;
        };
        let sql = "update records set
                       base = case when ' ' || chain || ' ' like '% 0 %' then base + (?1 << 21) else base end,
                       chain = case when ?1 <> 0 and (sent or seq <= ?2) then chain || ' ' || version else chain end,
                       version = version
                           + ((case when ?1 = 0 then 0 else ?1 - max((version >> 21) - at, 0) end) << 21),
                       expires_at = expires_at + ?3, at = at + ?3, skew = null
                   where pending = 1 and skew is not null and blindness = ?4";
        connection.execute(sql, params![moved, state.sent, exactly, number])?;
    }
    Ok(())
}

/// `None` where the queue is full.
fn enqueue(
    connection: &Connection,
    state: &mut State,
    entry: &Entry,
    clock: &Clock,
    bound: u64,
) -> rusqlite::Result<Option<Enqueued>> {
    let Entry { record, stamped_at, blindness, .. } = entry;
    let held = Held::find(connection, state, &record.key, clock)?;
    let version = straight(record.version, *blindness, *stamped_at, clock);
    let (mut base, mut chain) = (entry.over, String::new());
    // Where nobody has put the clock right yet, what it stamps cannot be compared with what was stored. But it is newer:
    // since the clock is blind, nothing was seen to be stored.
    let is_unsure = lasts(*blindness, clock);
    // Where the clock is behind by so little that it is not put right later, either, the new write goes on from the old.
    let is_ahead = |held: &Held| {
        let lead = held.version.at().since(*stamped_at);
        !held.is_unsure && held.version > version && lead <= TOLERANCE
    };
    if let Some(held) = held.as_ref().filter(|held| is_unsure && is_ahead(held)) {
        return Ok(Some(Enqueued::Crossed(held.version)));
    }
    match (&held, entry.over) {
        (Some(held), Some(over)) if is_unsure && held.is_pending && held.version != over => {
            return Ok(Some(Enqueued::Conflict));
        }
        (Some(held), Some(over)) if held.is_pending && held.version > over => {
            return Ok(Some(Enqueued::Conflict));
        }
        // The source of truth was seen to hold something newer, which this one goes on from.
        (Some(held), Some(over)) if held.is_pending && held.version < over => {
            // It stays in the file, as a letter.
            let holdings = &state.holdings;
            if holdings.queue.bytes + holdings.dead_letters.bytes + bytes(record) > bound {
                return Ok(None);
            }
            let reason = Reason { text: "superseded".into(), newer: Some(over) };
            let letter = super::dead::bury(connection, &record.key, held.version, &reason, clock.now())?;
            state.holdings.dead_letters.add(letter);
        }
        (Some(held), Some(_)) if held.is_pending => (base, chain) = held.passed_on(),
        // The source of truth was seen to hold this very write, while its own answer did not come.
        (Some(held), _) if !held.is_pending && held.version == record.version => {
            return Ok(Some(Enqueued::Stored));
        }
        // It was seen to have moved on from what this one goes on from.
        (Some(held), Some(over)) if held.version > over => return Ok(Some(Enqueued::Behind(held.version))),
        (Some(held), None)
            if held.is_pending
                && held.base.is_some()
                && held.is_unsure == is_unsure
                && held.version > version =>
        {
            return Ok(Some(Enqueued::Crossed(held.version)));
        }
        (Some(held), _) if held.version > version && (held.is_unsure || !is_unsure) => {
            return Ok(Some(match held.is_pending {
                true => Enqueued::Overtaken,
                false => Enqueued::Behind(held.version),
            }));
        }
        _ => {}
    }
    if base.is_some() {
        let sql = "select version from attempts where key = ?1";
        let mut attempts = connection.prepare_cached(sql)?;
        for attempt in attempts.query_map([record.key.as_str()], |row| row.get::<_, i64>(0))? {
            let attempt = Version::from_raw(attempt?);
            if !versions(&chain).any(|one| one == attempt) {
                chain = format!("{chain} {attempt}");
            }
        }
    }
    let freed = held.as_ref().filter(|held| held.is_pending).map_or(0, |held| held.bytes);
    let holdings = &state.holdings;
    let taken = holdings.queue.bytes.saturating_sub(freed) + holdings.dead_letters.bytes;
    if taken + bytes(record) > bound {
        return Ok(None);
    }
    let seq = state.next_seq();
    state.queued = seq;
    let place = Place {
        record,
        seq,
        at: *stamped_at,
        is_pending: true,
        base,
        chain: &chain,
        is_sent: entry.is_sent,
        unsure: blindness.map(|blindness| (clock.ahead_of_system(), blindness)),
        overtaken: 0,
    };
    put_down(connection, &place)?;
    match held {
        Some(held) if held.is_pending => state.holdings.queue.sub(held.bytes),
        Some(held) => state.holdings.replica.sub(held.bytes),
        None => {}
    }
    state.holdings.queue.add(bytes(record));
    if blindness.is_some() && !is_unsure {
        // An answer came between the stamp and this.
        straighten(connection, state, clock)?;
    }
    Ok(Some(Enqueued::Kept { blindness: *blindness, queued_at: *stamped_at }))
}

pub(super) fn settle(
    connection: &Connection,
    state: &mut State,
    key: &Key,
    version: Version,
    fate: &Fate,
    clock: &Clock,
) -> rusqlite::Result<bool> {
    let now = clock.now();
    let held = Held::find(connection, state, key, clock)?.filter(|held| held.is_pending);
    let Some(held) = held else { return Ok(false) };
    if held.version != version {
        // What goes on from it has, where it is an update, this one as its base; one from before a put that it goes on from
        // has nothing to do with it.
        let goes_on = held.version > version && held.base.is_some_and(|base| base <= version);
        if matches!(fate, Fate::Stored) && goes_on {
            let later = versions(&held.chain).filter(|one| *one > version).map(|one| format!(" {one}"));
            let sql = "update records set base = ?2, chain = ?3 where key = ?1";
            let chain = later.collect::<String>();
            connection.prepare_cached(sql)?.execute(params![key.as_str(), version.raw(), chain])?;
        }
        return Ok(false);
    }
    state.holdings.queue.sub(held.bytes);
    match fate {
        Fate::Stored => {
            super::heard_of(connection, key, version)?;
            let sql =
                "update records set pending = 0, at = ?2, base = null, chain = '', sent = 0, skew = null,
                              version = ?3
                       where key = ?1";
            connection.prepare_cached(sql)?.execute(params![key.as_str(), now.0, version.raw()])?;
            state.holdings.replica.add(held.bytes);
            // What was seen since is newer than this copy.
            let sql = "delete from records where key = ?1 and overtaken <> 0";
            if connection.prepare_cached(sql)?.execute([key.as_str()])? > 0 {
                state.holdings.replica.sub(held.bytes);
            }
        }
        Fate::Replaced(_) => {
            connection.prepare_cached("delete from records where key = ?1")?.execute([key.as_str()])?;
        }
        Fate::Dead(reason) => {
            let letter = super::dead::bury(connection, key, version, reason, now)?;
            connection.prepare_cached("delete from records where key = ?1")?.execute([key.as_str()])?;
            state.holdings.dead_letters.add(letter);
        }
    }
    Ok(true)
}
