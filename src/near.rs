//! The near cache: threads in memory, bounded by bytes, and what is known to be absent, for seconds.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foldhash::fast::RandomState;
use metrics::Counter;
use moka::notification::RemovalCause;
use moka::ops::compute::Op;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;

use crate::fence::{Fences, Ticket};
use crate::pending::Pending;
use crate::record::{Freshness, Key, Record};
use crate::spool::{Copy, Rank, Settled};
use crate::version::{Blindness, Clock, Moment, Timestamp, Version};

/// Absence has a cache of its own, so that a scan of unknown ids evicts no thread. It is remembered for seconds at most,
/// and no longer than presence.
const ABSENCES: u64 = 10_000;
const ABSENT_FOR: Duration = Duration::from_secs(2);
/// What an entry costs beyond its record's bytes: the record, moka's nodes, reference counts (`tests/allocations` measures it).
const OVERHEAD: usize = 420;

/// A thread in memory.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) record: Arc<Record>,
    /// When the call began by which the source of truth last confirmed it.
    pub(crate) confirmed: Moment,
    /// Whether it is a write that waits in the queue, and nobody has confirmed it yet.
    pub(crate) is_queued: bool,
    /// Of a queued write: the blindness of the clock by which it expires. Once that has ended, the file knows better.
    blindness: Option<Blindness>,
    /// Whether it was read from disk, or replayed: it is never fresh, since how old it is, only a clock says that nobody
    /// may have put right, or nobody knows.
    is_recalled: bool,
    /// Whether it was read since accesses were last reported to the store.
    accessed: AtomicBool,
    /// Of what came by a listing or the warm-up: where its first read is noted.
    first_reads: Option<Arc<FirstReads>>,
}

/// The keys of entries that came by a listing or the warm-up and were read since.
#[derive(Debug, Default)]
struct FirstReads(Mutex<Vec<Key>>);

impl FirstReads {
    fn lock(&self) -> MutexGuard<'_, Vec<Key>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a call to the source of truth brought to light about one thread.
#[derive(Debug)]
pub(crate) enum News {
    Found(Arc<Record>),
    Absent(Version),
}

/// What became of the news.
#[derive(Debug, Clone)]
pub(crate) enum Learnt {
    /// The thread is in memory, unless a listing found no room: this very entry, so that marking it as read is seen there.
    Present(Arc<Entry>),
    Absent(Version),
    /// Something newer was learnt meanwhile: look again.
    Overtaken,
    /// Something newer waits in the queue.
    Behind,
}

impl News {
    fn version(&self) -> Version {
        match self {
            Self::Found(record) => record.version,
            Self::Absent(version) => *version,
        }
    }
}

/// A record without a value is news of an absence.
impl From<Arc<Record>> for News {
    fn from(record: Arc<Record>) -> Self {
        if record.value.is_some() { Self::Found(record) } else { Self::Absent(record.version) }
    }
}

/// What a thread takes in memory.
pub(crate) fn weight(record: &Record) -> u64 {
    (record.bytes() + OVERHEAD) as u64
}

#[derive(Debug)]
pub(crate) struct Near {
    threads: Cache<Key, Arc<Entry>, RandomState>,
    /// Since when, too: what was slow to come is no news any more.
    absences: Option<Cache<Key, (Version, Moment), RandomState>>,
    fences: Fences,
    pending: Arc<Pending>,
    clock: Arc<Clock>,
    /// How long a confirmation counts; `None` where nobody else can write.
    fresh_for: Option<Duration>,
    first_reads: Arc<FirstReads>,
    /// Up to how many bytes of memory listings and the warm-up take. The lock lets one of them in at a time.
    listed_bytes: Mutex<u64>,
}

impl Near {
    pub(crate) fn new(
        bytes: u64,
        fresh_for: Option<Duration>,
        fences: Fences,
        pending: Arc<Pending>,
        clock: Arc<Clock>,
        evictions: Counter,
    ) -> Self {
        let weigh = |_: &Key, entry: &Arc<Entry>| u32::try_from(weight(&entry.record)).unwrap_or(u32::MAX);
        let threads = Cache::builder()
            .max_capacity(bytes)
            .weigher(weigh)
            // The default policy refuses new entries while the old ones are hot; a new conversation is the hottest.
            .eviction_policy(EvictionPolicy::lru())
            .eviction_listener(move |_, _, cause| {
                if cause == RemovalCause::Size {
                    evictions.increment(1);
                }
            })
            .build_with_hasher(RandomState::default());
        let absent_for = fresh_for.map_or(ABSENT_FOR, |span| span.min(ABSENT_FOR));
        let absences = (!absent_for.is_zero()).then(|| {
            Cache::builder()
                .max_capacity(ABSENCES)
                .time_to_live(absent_for)
                .build_with_hasher(RandomState::default())
        });
        let (first_reads, listed_bytes) = (Arc::default(), Mutex::new(bytes / 2));
        Self { threads, absences, fences, pending, clock, fresh_for, first_reads, listed_bytes }
    }

    /// The entry that can be handed out without asking anybody: confirmed lately and not expired.
    pub(crate) fn fresh(&self, key: &str) -> Option<Arc<Entry>> {
        let entry = self.threads.get(key)?;
        let now = self.clock.moment();
        (self.is_fresh(&entry, now) && self.clock.at(now) < entry.record.expires_at).then(|| entry.marked())
    }

    /// The entry that can be handed out without asking anybody, and what it is worth: confirmed lately; or the newest
    /// write in the queue; or, while the source of truth cannot be asked, confirmed once. One look, whatever it is.
    pub(crate) fn hit(
        &self,
        key: &str,
        is_cut_off: impl FnOnce() -> bool,
    ) -> Option<(Arc<Entry>, Freshness)> {
        let entry = self.threads.get(key)?;
        let now = self.clock.moment();
        if self.clock.at(now) >= entry.record.expires_at {
            return None;
        }
        let freshness = match &entry {
            entry if self.is_fresh(entry, now) => Freshness::Fresh,
            entry if entry.is_queued => {
                self.tells_its_expiry(entry).then_some(())?;
                self.pending.covers(key, entry.record.version).then_some(Freshness::Queued)?
            }
            entry => is_cut_off().then(|| Freshness::stale(entry.confirmed, now))?,
        };
        Some((entry.marked(), freshness))
    }

    /// The entry that can be handed out while the source of truth cannot be asked: confirmed once, and not expired.
    pub(crate) fn live(&self, key: &Key) -> Option<Arc<Entry>> {
        let entry = self.threads.get(key)?;
        (!entry.is_queued && self.clock.now() < entry.record.expires_at).then(|| entry.marked())
    }

    /// The write in memory that waits in the queue, if it is the newest of its thread.
    pub(crate) fn queued(&self, key: &Key) -> Option<Arc<Entry>> {
        let entry = self.threads.get(key)?;
        let is_it = entry.is_queued && self.tells_its_expiry(&entry);
        (is_it && self.pending.covers(key.as_str(), entry.record.version)).then(|| entry.marked())
    }

    /// Whether the expiry of an entry is still the best that is known.
    fn tells_its_expiry(&self, entry: &Entry) -> bool {
        entry.blindness.is_none() || self.clock.blindness() == entry.blindness
    }

    /// The entry, whatever its state.
    pub(crate) fn peek(&self, key: &Key) -> Option<Arc<Entry>> {
        self.threads.get(key)
    }

    /// Confirmed lately, and not before the clocks last jumped: how long ago that was, nobody knows.
    pub(crate) fn is_fresh(&self, entry: &Entry, now: Moment) -> bool {
        !entry.is_queued
            && !entry.is_recalled
            && self.fresh_for.is_none_or(|span| now.is_within(span, entry.confirmed))
    }

    /// Whether what a call brought that began at `confirmed` is fresh to somebody who asked at `asked`.
    pub(crate) fn is_recent(&self, confirmed: Moment, asked: Moment) -> bool {
        confirmed >= asked || self.fresh_for.is_none_or(|span| asked.is_within(span, confirmed))
    }

    /// As [`is_recent`](Self::is_recent), for an absence.
    pub(crate) fn is_recent_absence(&self, confirmed: Moment, asked: Moment) -> bool {
        self.is_recent(confirmed, asked) && (confirmed >= asked || asked.is_within(ABSENT_FOR, confirmed))
    }

    /// The version of a thread that is known to be absent.
    pub(crate) fn absent(&self, key: &Key) -> Option<Version> {
        let (version, confirmed) = self.absences.as_ref()?.get(key)?;
        if !self.is_recent_absence(confirmed, self.clock.moment()) {
            return None;
        }
        // The absence shows a moment before the thread goes; until then others still get the thread.
        (!self.threads.contains_key(key)).then_some(version)
    }

    /// Takes in what a call brought to light that began at `began` with `ticket`.
    ///
    /// What is in memory when the call begins is never newer than what the call finds, and whatever comes in later
    /// raises the floor. So news that are not below the floor replace what is held, also where their version is lower
    /// (somebody deleted the row, or restored the database).
    pub(crate) fn learn(&self, key: &Key, ticket: &Ticket, began: Moment, news: News) -> Learnt {
        self.learn_within(key, ticket, began, news, None)
    }

    /// As [`learn`](Self::learn), of what nobody has asked for. It comes into memory only while half of that is free, so that it
    /// displaces nothing in use; what is there already is replaced.
    pub(crate) fn learn_listed(
        &self,
        records: &[Arc<Record>],
        ticket: &Ticket,
        began: Moment,
    ) -> Vec<Learnt> {
        let most = self.listed_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut room = most.saturating_sub(self.size().1);
        let learn = |record: &Arc<Record>| {
            let news = News::Found(Arc::clone(record));
            self.learn_within(&record.key, ticket, began, news, Some(&mut room))
        };
        records.iter().map(learn).collect()
    }

    /// `room` is given for what nobody has asked for.
    fn learn_within(
        &self,
        key: &Key,
        ticket: &Ticket,
        began: Moment,
        news: News,
        room: Option<&mut u64>,
    ) -> Learnt {
        let version = news.version();
        self.clock.observe(version);
        let mut learnt = Learnt::Overtaken;
        // Under the lock of the key, so that floor, thread and absence change together.
        self.threads.entry_by_ref(key).and_compute_with(|held| {
            let held = held.map(moka::Entry::into_value);
            if self.pending.meet(key, version).is_some() {
                learnt = Learnt::Behind;
                return Op::Nop;
            }
            if ticket.is_overtaken(key, version) {
                // The floor may come from a write of a clock that was ahead, which never was stored: what is held can be
                // older than these news all the same, and they may be an acknowledged write.
                let knows_older = |absent: (Version, Moment)| absent.0 < version;
                let stale =
                    self.absences.iter().filter(|absences| absences.get(key).is_some_and(knows_older));
                stale.for_each(|absences| absences.invalidate(key));
                let is_older = |held: &Arc<Entry>| !held.is_queued && held.record.version < version;
                return if held.as_ref().is_some_and(is_older) {
                    Op::Remove
                } else {
                    self.without_leftover(key, held.as_ref())
                };
            }
            self.fences.raise_seen(key, version);
            match news {
                News::Found(record) => {
                    self.absences.iter().for_each(|absences| absences.invalidate(key));
                    let is_listed = room.is_some();
                    let is_admitted = held.is_some() || room.is_none_or(|room| take(room, weight(&record)));
                    let first_reads = match &held {
                        _ if !is_listed => None,
                        Some(held) => held.first_reads.clone(),
                        None => Some(Arc::clone(&self.first_reads)),
                    };
                    let accessed = held.is_some_and(|held| held.accessed.load(Relaxed)).into();
                    let entry = Arc::new(Entry {
                        record,
                        confirmed: began,
                        is_queued: false,
                        blindness: None,
                        is_recalled: false,
                        accessed,
                        first_reads,
                    });
                    learnt = Learnt::Present(Arc::clone(&entry));
                    if is_admitted { Op::Put(entry) } else { Op::Nop }
                }
                News::Absent(version) => {
                    learnt = Learnt::Absent(version);
                    self.absences.iter().for_each(|absences| absences.insert(key.clone(), (version, began)));
                    Op::Remove
                }
            }
        });
        learnt
    }

    /// There may be, or is, a version that is not at hand: drops what is older.
    pub(crate) fn doubt(&self, key: &Key, version: Version) {
        self.clock.observe(version);
        self.threads.entry_by_ref(key).and_compute_with(|held| {
            self.fences.raise(key, version);
            self.absences.iter().for_each(|absences| absences.invalidate(key));
            match held {
                Some(held) if held.value().record.version < version => Op::Remove,
                _ => Op::Nop,
            }
        });
    }

    /// The source of truth was seen to hold this version: what is older, in memory or queued, is read no more.
    pub(crate) fn overtaken(&self, key: &Key, version: Version) {
        self.clock.observe(version);
        self.threads.entry_by_ref(key).and_compute_with(|held| {
            let is_behind = self.pending.meet(key, version).is_some();
            self.fences.raise_seen(key, version);
            self.absences.iter().for_each(|absences| absences.invalidate(key));
            match held {
                Some(held) if held.value().is_queued && !is_behind => Op::Remove,
                Some(held) if held.value().record.version < version => Op::Remove,
                _ => Op::Nop,
            }
        });
    }

    /// A write that began with `ticket` is on disk in the queue: from now on it is the newest of its thread.
    pub(crate) fn enqueued(
        &self,
        record: &Arc<Record>,
        ticket: &Ticket,
        blindness: Option<Blindness>,
        queued_at: Timestamp,
    ) {
        let (key, version) = (&record.key, record.version);
        self.threads.entry_by_ref(key).and_compute_with(|held| {
            if !self.pending.insert(key, version, blindness, queued_at) {
                return Op::Nop;
            }
            // The source of truth may have shown something newer while it was being written to disk, which memory may
            // have dropped again.
            let version = self.pending.straight(version, blindness, queued_at);
            if let Some(seen) = ticket.seen(key).filter(|seen| *seen > version) {
                self.pending.meet(key, seen);
                return self.without_leftover(key, held.as_ref().map(moka::Entry::value));
            }
            if let Some(held) = held.as_ref().map(moka::Entry::value)
                && !held.is_queued
                && !(blindness.is_some() && held.is_recalled)
                && held.record.version > version
            {
                self.pending.meet(key, held.record.version);
                return Op::Nop;
            }
            self.fences.raise(key, version);
            self.absences.iter().for_each(|absences| absences.invalidate(key));
            let now = self.clock.moment();
            if record.value.is_some() { Op::Put(Entry::queued(record, blindness, now)) } else { Op::Remove }
        });
    }

    /// Takes a queued write, read from disk, into memory again.
    pub(crate) fn recall_queued(&self, record: &Arc<Record>, blindness: Option<Blindness>) -> Arc<Entry> {
        let entry = Entry::queued(record, blindness, self.clock.moment());
        self.threads.entry_by_ref(&record.key).and_compute_with(|held| {
            let is_no_better = held.is_none_or(|held| !self.tells_its_expiry(held.value()));
            let is_wanted = is_no_better && self.pending.covers(record.key.as_str(), record.version);
            if is_wanted { Op::Put(Arc::clone(&entry)) } else { Op::Nop }
        });
        entry
    }

    /// Takes a last known copy, read from disk, into memory again, or finds what is there by now; `None` where the thread
    /// changed meanwhile, so that it is to be looked at once more.
    pub(crate) fn recall(
        &self,
        ticket: &Ticket,
        record: Arc<Record>,
        age: Duration,
        is_read: bool,
    ) -> Option<Arc<Entry>> {
        let key = record.key.clone();
        let now = self.clock.moment();
        let confirmed = now.minus(age);
        let mut recalled = None;
        self.threads.entry_by_ref(&key).and_compute_with(|held| {
            let is_overtaken = ticket.is_overtaken(&key, record.version);
            if is_overtaken || self.pending.current(&key).is_some() {
                return Op::Nop;
            }
            match held.map(moka::Entry::into_value) {
                // Nothing that waits in the queue is the newest: this is a leftover.
                Some(held) if held.is_queued => {}
                // Another reader was faster. Whether that stays in memory until it is looked up again, nobody knows.
                Some(held)
                    if held.record.is_live(self.clock.at(now)) || held.record.version > record.version =>
                {
                    recalled = Some(if is_read { held.marked() } else { held });
                    return Op::Nop;
                }
                _ => {}
            }
            let entry = Arc::new(Entry {
                record,
                confirmed,
                is_queued: false,
                blindness: None,
                is_recalled: true,
                accessed: is_read.into(),
                first_reads: Some(Arc::clone(&self.first_reads)).filter(|_| !is_read),
            });
            recalled = Some(Arc::clone(&entry));
            Op::Put(entry)
        });
        recalled
    }

    /// A queued write is in the source of truth, or was, seen by a call that began at `began`. Only where that call brought
    /// it there, it was the newest then.
    pub(crate) fn stored(&self, record: &Arc<Record>, began: Moment, was_newest: bool) {
        let (key, version) = (&record.key, record.version);
        self.threads.entry_by_ref(key).and_compute_with(|held| {
            self.fences.raise_seen(key, version);
            let is_it =
                |held: &Arc<Entry>| held.is_queued && self.pending.covers(key.as_str(), held.record.version);
            let held = held.map(moka::Entry::into_value);
            let is_held = held.as_ref().is_some_and(is_it);
            let is_current = self.pending.covers(key.as_str(), version);
            self.pending.settle(key, version);
            if !is_held || !is_current {
                return self.without_leftover(key, held.as_ref());
            }
            let accessed = true.into();
            Op::Put(Arc::new(Entry {
                record: Arc::clone(record),
                confirmed: began,
                is_queued: false,
                blindness: None,
                is_recalled: !was_newest,
                accessed,
                first_reads: None,
            }))
        });
    }

    /// A queued write will never be in the source of truth, which holds `newer` where that is known.
    pub(crate) fn died(&self, key: &Key, version: Version, newer: Option<Version>) {
        if let Some(newer) = newer {
            self.overtaken(key, newer);
        }
        self.threads.entry_by_ref(key).and_compute_with(|held| {
            let is_current = self.pending.current(key) == Some(version);
            let held = held.map(moka::Entry::into_value);
            let is_held = held.as_ref().is_some_and(|held| is_current && held.is_queued);
            self.pending.settle(key, version);
            if is_held { Op::Remove } else { self.without_leftover(key, held.as_ref()) }
        });
    }

    /// The file has queued writes no more: they are stored, or replaced by a newer write of this daemon.
    pub(crate) fn settled(&self, settled: Settled) {
        for (key, version) in settled {
            self.threads.entry_by_ref(&key).and_compute_with(|held| {
                self.pending.settle(&key, version);
                self.without_leftover(&key, held.as_ref().map(moka::Entry::value))
            });
        }
    }

    /// A queued write is held only as long as its mark says that it is the newest: to be returned after a mark has changed.
    fn without_leftover(&self, key: &Key, held: Option<&Arc<Entry>>) -> Op<Arc<Entry>> {
        let is_leftover =
            |held: &Arc<Entry>| held.is_queued && !self.pending.covers(key.as_str(), held.record.version);
        if held.is_some_and(is_leftover) { Op::Remove } else { Op::Nop }
    }

    /// Drops a thread from memory, as memory itself may at any time.
    #[cfg(feature = "testing")]
    pub(crate) fn evict(&self, key: &Key) {
        self.threads.invalidate(key);
    }

    /// The threads that were read since the last call.
    pub(crate) fn take_accessed(&self) -> Vec<Key> {
        let accessed = self.threads.iter().filter(|(_, entry)| entry.accessed.swap(false, Relaxed));
        accessed.map(|(key, _)| Key::clone(&key)).collect()
    }

    /// Copies of what came by a listing or the warm-up and was read since this was last called.
    pub(crate) fn take_first_reads(&self) -> Vec<Copy> {
        let keys = std::mem::take(&mut *self.first_reads.lock());
        // Before memory is asked, so that what is overtaken afterwards is told by it.
        let ticket = self.fences.begin();
        let entries = keys.iter().filter_map(|key| self.peek(key));
        let is_copy = |entry: &Arc<Entry>| {
            !entry.is_queued && !ticket.is_overtaken(&entry.record.key, entry.record.version)
        };
        let copy = |entry: Arc<Entry>| Copy {
            record: Arc::clone(&entry.record),
            confirmed_at: self.clock.at(entry.confirmed),
            is_own: false,
            rank: Rank::Read,
        };
        entries.filter(is_copy).map(copy).collect()
    }

    /// Threads held, and the bytes that they take.
    pub(crate) fn size(&self) -> (u64, u64) {
        self.threads.run_pending_tasks();
        (self.threads.entry_count(), self.threads.weighted_size())
    }
}

/// Takes room, if there is as much.
fn take(room: &mut u64, bytes: u64) -> bool {
    let left = room.checked_sub(bytes);
    *room = left.unwrap_or(*room);
    left.is_some()
}

impl Entry {
    fn queued(record: &Arc<Record>, blindness: Option<Blindness>, confirmed: Moment) -> Arc<Self> {
        let (record, accessed) = (Arc::clone(record), true.into());
        let (is_recalled, first_reads) = (false, None);
        Arc::new(Self { record, confirmed, is_queued: true, blindness, is_recalled, accessed, first_reads })
    }

    /// Marks it as read. Mostly it is marked already, and a load is cheaper than a store that other cores must see.
    pub(crate) fn marked(self: Arc<Self>) -> Arc<Self> {
        if !self.accessed.load(Relaxed) {
            self.accessed.store(true, Relaxed);
            self.first_reads.iter().for_each(|reads| reads.lock().push(self.record.key.clone()));
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Json;

    fn written(key: &Key, clock: &Clock) -> Arc<Record> {
        let expires_at = clock.now().plus(Duration::from_secs(60));
        let deletion = Record::deletion(key.clone(), clock.stamp().version);
        Arc::new(Record { value: Some(Json::trusted("1")), expires_at, ..deletion })
    }

    /// A load finds a queued write stored, and is itself overtaken by a write whose outcome is unknown. The queued write
    /// stayed in memory without a mark, and each read in an outage looked 1,000 times for what hid behind it.
    #[test]
    fn a_queued_write_found_stored_by_an_overtaken_load_does_not_hide_its_copy() {
        let (clock, fences, key) = (Arc::new(Clock::of_truth()), Fences::default(), Key::new("k").unwrap());
        let pending = Arc::new(Pending::new(Vec::new(), Arc::clone(&clock)));
        let evictions = Counter::noop();
        let near =
            Near::new(1 << 20, None, fences.clone(), Arc::clone(&pending), Arc::clone(&clock), evictions);
        let load = fences.begin();
        let queued = written(&key, &clock);
        near.enqueued(&queued, &fences.begin(), None, clock.now());
        near.doubt(&key, written(&key, &clock).version);
        near.recall_queued(&queued, None);
        assert!(near.queued(&key).is_some());
        let learnt = near.learn(&key, &load, Moment::now(), News::Found(Arc::clone(&queued)));
        assert!(matches!(learnt, Learnt::Overtaken), "{learnt:?}");
        assert!(near.queued(&key).is_none() && near.peek(&key).is_none(), "nothing marks it as the newest");
        let copy = near.recall(&fences.begin(), queued, Duration::ZERO, true);
        assert!(copy.is_some(), "the copy on disk is an answer");
    }
}
