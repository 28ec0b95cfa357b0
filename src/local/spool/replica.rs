//! The replica: last known copies, for when the source of truth cannot be asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

use rusqlite::{Connection, OptionalExtension, params};
use tokio::sync::oneshot;

use super::{BLINDNESS, COLUMNS, PERHAPS, Place, Spool, State, Survives, bytes, put_down, queue, record};
use crate::error::{Error, ErrorKind, Result};
use crate::local::database::Holder;
use crate::record::{Key, Record};
use crate::spool::{Copy, Fate, Rank, Settled, Tally};
use crate::version::{Clock, Timestamp, Version};

/// While copies that the file may not have yet take up to so much, none of them is waited for.
const UNAWAITED: usize = 8 << 20;

impl Spool {
    /// Keeps copies of what was read from the source of truth; a record without a value says that there is no such thread, so
    /// that an older copy is not taken for it.
    ///
    /// Whatever asks the file from now on finds them there; but the file may have them only some milliseconds after this
    /// returns. Where it cannot be written, no copy is handed out until all have been dropped: some may be older than what
    /// was acknowledged.
    ///
    /// A queued write that turns out to be stored by this, or replaced by another write of this daemon, is settled.
    /// `announce` is called with such writes before anybody hears of later work.
    pub(crate) async fn keep(&self, copies: Vec<Copy>, announce: impl FnOnce(Settled) + Send + 'static) {
        if copies.is_empty() {
            return;
        }
        // Who hears of what was read must not hear later that an older write was queued meanwhile.
        if let Ok(Some(kept)) = self.hand_copies_over(copies, announce).await
            && (self.under_way.bytes() > UNAWAITED || self.queueing.is_any())
        {
            kept.await.ok();
        }
    }

    /// As [`keep`](Self::keep), of a write of this handle: the file has it when this returns, so that whoever starts again
    /// after a crash goes on from there.
    ///
    /// # Errors
    /// [`Closed`](ErrorKind::Closed): who starts after this process may not find it.
    pub(crate) async fn keep_own(
        &self,
        copy: Copy,
        announce: impl FnOnce(Settled) + Send + 'static,
    ) -> Result<()> {
        if let Some(kept) = self.hand_copies_over(vec![copy], announce).await? {
            kept.await.ok();
        }
        Ok(())
    }

    /// # Errors
    /// [`Closed`](ErrorKind::Closed) alone; what else fails puts all copies in doubt.
    async fn hand_copies_over(
        &self,
        copies: Vec<Copy>,
        announce_settled: impl FnOnce(Settled) + Send + 'static,
    ) -> Result<Option<oneshot::Receiver<Result<Kept>>>> {
        let (bound, clock) = (self.bounds.replica, Arc::clone(&self.clock));
        let passage = self.under_way.begin(copies.iter().map(|copy| copy.record.bytes()).sum());
        let doubt = Arc::clone(&self.doubt);
        let work = move |connection: &Connection, state: &mut State| {
            let failures = doubt.failures();
            // Once for a failure: that it was done is announced only when later work may have begun.
            if doubt.is_there() && state.dropped_after < failures {
                drop_copies(connection, state)?;
                state.dropped_after = failures;
            }
            let mut settled = Vec::new();
            for copy in &copies {
                let version = keep_ranked(connection, state, copy, &clock)?;
                settled.extend(version.map(|version| (copy.record.key.clone(), version)));
            }
            evict(connection, state, bound)?;
            Ok((settled, failures))
        };
        let doubt = Arc::clone(&self.doubt);
        let announce = move |kept: &Result<Kept>| {
            match kept {
                Ok((settled, failures)) => {
                    doubt.settle(*failures);
                    announce_settled(settled.clone());
                }
                Err(error) => doubt.raise_for(error),
            }
            drop(passage);
        };
        match self.hand_over(Survives::Crash, work, announce).await {
            Ok(kept) => return Ok(Some(kept)),
            Err(error) if error.kind() == ErrorKind::Closed => return Err(error),
            Err(error) => self.doubt.raise_for(&error),
        }
        Ok(None)
    }

    /// Waits until the file has what it was given to keep.
    async fn settle_copies(&self) -> Result<()> {
        if self.under_way.is_any() { self.write(Survives::Crash, |_, _| Ok(())).await } else { Ok(()) }
    }

    /// Notes that the source of truth still holds this version.
    pub(crate) async fn confirm(&self, key: &Key, version: Version, at: Timestamp) {
        let key = key.clone();
        let work = move |connection: &Connection, state: &mut State| {
            let sql = "update records set at = ?3, seq = case when seq < 0 then ?4 else seq end
                       where key = ?1 and version = ?2 and pending = 0";
            let seq = state.next_seq();
            connection.prepare_cached(sql)?.execute(params![key.as_str(), version.raw(), at.0, seq])
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
        self.settle_copies().await?;
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
        self.settle_copies().await?;
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
        self.doubt.settle(failures);
        Ok(())
    }
}

/// The queued writes that the copies settled, and the failures after which all older copies were dropped.
type Kept = (Settled, u64);

/// How many bytes the writing thread was given, and has not announced yet.
#[derive(Debug, Default)]
pub(super) struct UnderWay(Arc<AtomicUsize>);

/// Some of them, until this is dropped.
pub(super) struct Passage {
    under_way: Arc<AtomicUsize>,
    bytes: usize,
}

impl UnderWay {
    pub(super) fn begin(&self, bytes: usize) -> Passage {
        self.0.fetch_add(bytes, SeqCst);
        Passage { under_way: Arc::clone(&self.0), bytes }
    }

    fn is_any(&self) -> bool {
        self.bytes() > 0
    }

    fn bytes(&self) -> usize {
        self.0.load(SeqCst)
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        self.under_way.fetch_sub(self.bytes, SeqCst);
    }
}

/// Whether copies may be older than what was acknowledged, because one could not be written.
#[derive(Debug)]
pub(super) struct Doubt {
    failures: AtomicU64,
    /// The failures after which all copies have been dropped.
    settled: AtomicU64,
    /// Tells the next process.
    holder: Holder,
}

impl Doubt {
    pub(super) fn new(holder: Holder) -> Self {
        Self { failures: AtomicU64::new(0), settled: AtomicU64::new(0), holder }
    }

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

    fn raise_for(&self, error: &Error) {
        if self.raise() {
            tracing::error!(%error, "a last known copy could not be written: none is handed out until one can be");
        }
        self.holder.note(|| self.is_there());
    }

    /// Copies were dropped after so many failures.
    fn settle(&self, failures: u64) {
        if self.settled.fetch_max(failures, SeqCst) < failures {
            self.holder.note(|| self.is_there());
        }
    }
}

/// What waits in the queue may be older than what was acknowledged, too: that it was overtaken could not be noted.
fn drop_copies(connection: &Connection, state: &mut State) -> rusqlite::Result<()> {
    connection.execute("delete from records where pending = 0", [])?;
    connection.execute("update records set overtaken = ?1 where overtaken = 0", [PERHAPS])?;
    state.holdings.replica = Tally::default();
    Ok(())
}

/// Keeps a copy in its rank. One that nobody has used has a negative number, and so goes before all that are used.
fn keep_ranked(
    connection: &Connection,
    state: &mut State,
    copy: &Copy,
    clock: &Clock,
) -> rusqlite::Result<Option<Version>> {
    if copy.rank == Rank::Used {
        return keep(connection, state, copy, clock);
    }
    let Copy { record, confirmed_at, .. } = copy;
    let key = record.key.as_str();
    let sql = "select version, seq from records where key = ?1 and pending = 0 and value is not null";
    let held = connection.prepare_cached(sql)?.query_row([key], |row| Ok((row.get(0)?, row.get(1)?)));
    let held: Option<(i64, i64)> = held.optional()?;
    let is_there = held.is_some_and(|(version, _)| version == record.version.raw());
    let replaced = if is_there { None } else { keep(connection, state, copy, clock)? };
    if replaced.is_some() {
        // It is a write of this daemon, and so in use.
        return Ok(replaced);
    }
    let seq = match (copy.rank, held) {
        (Rank::Listed, Some((_, seq))) => seq,
        (Rank::Listed, None) => state.next_listed(),
        (_, Some((_, seq))) if is_there && seq > 0 => return Ok(replaced),
        _ => state.next_seq(),
    };
    let sql = "update records set seq = ?2, at = max(at, ?3) where key = ?1 and pending = 0";
    connection.prepare_cached(sql)?.execute(params![key, seq, confirmed_at.0])?;
    Ok(replaced)
}

/// Keeps a copy; says which queued write is settled by that.
fn keep(
    connection: &Connection,
    state: &mut State,
    copy: &Copy,
    clock: &Clock,
) -> rusqlite::Result<Option<Version>> {
    let Copy { record, confirmed_at, is_own, .. } = copy;
    let sql = format!("select version, pending, bytes, {BLINDNESS}, at from records where key = ?1");
    let held = connection.prepare_cached(&sql)?.query_row([record.key.as_str()], |row| {
        let (stamped, blindness) = (Version::from_raw(row.get(0)?), super::blindness(row, 3)?);
        let version = super::straight(stamped, blindness, Timestamp(row.get(4)?), clock);
        Ok((version, row.get::<_, bool>(1)?, row.get::<_, i64>(2)?.unsigned_abs()))
    });
    let held = held.optional()?;
    if held.is_none_or(|(_, is_pending, _)| !is_pending) {
        super::heard_of(connection, &record.key, record.version)?;
    }
    let replaced = match held {
        // That there never was such a thread needs no row.
        None if record.version == Version::NONE => return Ok(None),
        None => None,
        // It is stored as it waits here, whoever found that out.
        Some((version, true, _)) if version == record.version && record.value.is_none() => {
            let is_settled = queue::settle(connection, state, &record.key, version, &Fate::Stored, clock)?;
            return Ok(is_settled.then_some(version));
        }
        Some((version, true, bytes))
            if version == record.version
                || version < record.version && (*is_own || is_put(connection, record)?) =>
        {
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
    let place = Place {
        record,
        seq: state.next_seq(),
        at: *confirmed_at,
        is_pending: false,
        base: None,
        chain: "",
        is_sent: false,
        unsure: None,
        overtaken: 0,
    };
    put_down(connection, &place)?;
    state.holdings.replica.add(bytes(record));
    if replaced.is_some() {
        super::heard_of(connection, &record.key, record.version)?;
    }
    Ok(replaced)
}

/// Whether this was put by this daemon, past the queue: what waits there from before it is replaced.
fn is_put(connection: &Connection, record: &Record) -> rusqlite::Result<bool> {
    let sql = "select 1 from attempts where key = ?1 and version = ?2 and is_put";
    connection.prepare_cached(sql)?.exists(params![record.key.as_str(), record.version.raw()])
}

/// Makes room: the copies that nobody has used go first, then those that were written first; a queued write never.
pub(super) fn evict(connection: &Connection, state: &mut State, bound: u64) -> rusqlite::Result<()> {
    let sql =
        "delete from records where rowid = (select rowid from records where pending = 0 order by seq limit 1)
               returning bytes";
    while state.holdings.replica.bytes > bound {
        let dropped = connection.prepare_cached(sql)?.query_row([], |row| row.get::<_, i64>(0)).optional()?;
        match dropped {
            Some(bytes) => state.holdings.replica.sub(bytes.unsigned_abs()),
            None => state.holdings.replica = Tally::default(),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::record::Json;
    use crate::spool::{Bounds, Entry};

    fn written(clock: &Clock) -> Arc<Record> {
        let (key, value) = (Key::new("k").unwrap(), Some(Json::trusted("1")));
        let expires_at = clock.now().plus(Duration::from_secs(60));
        Arc::new(Record { value, expires_at, ..Record::deletion(key, clock.stamp().version) })
    }

    #[tokio::test]
    async fn what_was_read_is_told_only_after_the_writes_that_were_queued_before() {
        let (dir, clock) = (tempfile::tempdir().unwrap(), Arc::new(Clock::new()));
        let bounds = Bounds { queue: 1 << 20, replica: 1 << 20 };
        let path = dir.path().join("q.db");
        let (spool, _) = Spool::open(&path, "here", bounds, Arc::clone(&clock)).await.unwrap();
        let (stored, queued) = (written(&clock), written(&clock));
        let (tell, told) = oneshot::channel();
        let (go_on, held_up) = std::sync::mpsc::channel::<()>();
        let announce = move |_| {
            tell.send(()).unwrap();
            held_up.recv().ok();
        };
        let entry =
            Entry { record: queued, over: None, is_sent: false, stamped_at: clock.now(), blindness: None };
        let enqueued = spool.enqueue(entry, announce);
        let keep = async {
            told.await.unwrap();
            let copy = Copy { record: stored, confirmed_at: clock.now(), is_own: false, rank: Rank::Used };
            let mut keep = std::pin::pin!(spool.keep(vec![copy], |_| {}));
            tokio::select! {
                () = &mut keep => panic!("told before the queued write was announced"),
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
            go_on.send(()).unwrap();
            keep.await;
        };
        tokio::join!(async { enqueued.await.unwrap() }, keep);
    }
}
