//! Conversations in memory, limited by bytes, and a negative cache of known absences.
//!
//! [`MemoryCache::drive`] is the only function that changes a key. It runs the state machine under moka's lock of the key (I5).

mod named;
mod observer;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use foldhash::fast::RandomState;
use metrics::Counter;
use moka::notification::RemovalCause;
use moka::ops::compute::Op;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use parking_lot::Mutex;

use super::active::{ActiveKeys, ReadToken};
use super::copies::Call;
use super::key_state::{Answer, Cached, Event, Held, KeyState, Origin, Queued, Times, step};
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::outcome::Freshness;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::outage::{CopyRank, QueueTrust, QueuedKey, ReplicaRecord};
use crate::store::Write;
use named::FeedMoments;
pub(super) use named::Validity;

/// The limit on entries of the negative cache. It is a cache of its own, so that a scan of unknown thread ids evicts no
/// conversation.
const MAX_ABSENCES: u64 = 10_000;
/// The limit on the age of an absence. The setting `fresh_for` can lower it.
const MAX_ABSENCE_AGE: Duration = Duration::from_secs(2);
/// The bytes of an entry beyond its record: moka's nodes and reference counts. `tests/allocations` measures them.
const ENTRY_OVERHEAD: usize = 420;

/// The memory of the cache.
#[derive(Debug)]
pub(super) struct MemoryCache {
    entries: Cache<Key, Arc<CacheEntry>, RandomState>,
    /// The versions of known absences, and the times of the calls that showed them. `None` if `fresh_for` is zero.
    negative_cache: Option<Cache<Key, (Version, Moment), RandomState>>,
    pub(super) keys: ActiveKeys,
    clock: Arc<Clock>,
    /// The time during which a validated entry is fresh. `None` if no other process can write.
    fresh_for: Option<Duration>,
    feed: FeedMoments,
    first_reads: Arc<FirstReads>,
    /// The limit on bytes of memory up to which list pages and the warm-up fill it. The lock admits one page at a time.
    max_listed_bytes: Mutex<u64>,
}

/// A conversation in memory.
#[derive(Debug)]
pub(super) struct CacheEntry {
    held: Held,
    /// Whether a caller has read the entry since the last report of access times.
    accessed: AtomicBool,
    /// The list of first reads, if no caller has asked for the conversation yet.
    first_reads: Option<Arc<FirstReads>>,
}

/// The keys of entries from list pages or the warm-up that callers have read since.
#[derive(Debug, Default)]
struct FirstReads(Mutex<Vec<Key>>);

/// The reason why a value enters memory.
#[derive(Debug)]
pub(super) enum Wish<'a> {
    /// A caller asked for the conversation, or wrote it.
    Caller,
    /// A list page or the warm-up brought it. A new entry enters only if so many bytes are free.
    Listed(&'a mut u64),
}

/// The result of an event for the caller that brought it.
#[derive(Debug, Clone)]
pub(super) enum Admission {
    /// The current entry. It is in memory, unless a list page found no room.
    Cached(Arc<CacheEntry>),
    /// The conversation does not exist. Its last version is this.
    Absent(Version),
    /// A newer version became known meanwhile. The caller looks again.
    Stale,
    /// A newer write waits in the queue.
    QueuedIsNewer,
}

/// What memory knows of a conversation at one moment.
#[derive(Debug)]
pub(super) struct View {
    pub(super) entry: Option<Arc<CacheEntry>>,
    pub(super) absent: Option<(Version, Moment)>,
    pub(super) queued: Queued,
}

impl View {
    /// Returns the newest known version.
    pub(super) fn newest(&self) -> Version {
        let cached = match (&self.entry, self.absent) {
            (Some(entry), _) => entry.record().version,
            (None, absent) => absent.map_or(Version::NONE, |(version, _)| version),
        };
        cached.max(self.queued.version().unwrap_or_default())
    }
}

impl CacheEntry {
    pub(super) fn record(&self) -> &Arc<Record> {
        &self.held.record
    }

    pub(super) fn validated_at(&self) -> Moment {
        self.held.at
    }

    pub(super) fn origin(&self) -> Origin {
        self.held.origin
    }

    /// Whether a caller has read the entry since the last report of access times.
    pub(super) fn is_accessed(&self) -> bool {
        self.accessed.load(Relaxed)
    }

    /// Marks the entry as read, and returns it.
    pub(super) fn touched(self: Arc<Self>) -> Arc<Self> {
        // A load is cheaper than a store, which the other cores must see. Most entries are marked already.
        if !self.accessed.load(Relaxed) {
            self.accessed.store(true, Relaxed);
            if let Some(first_reads) = &self.first_reads {
                first_reads.0.lock().push(self.record().key.clone());
            }
        }
        self
    }
}

impl MemoryCache {
    pub(super) fn new(
        max_bytes: u64,
        fresh_for: Option<Duration>,
        clock: Arc<Clock>,
        evictions: Counter,
    ) -> Self {
        let weigh =
            |_: &Key, entry: &Arc<CacheEntry>| u32::try_from(weight(entry.record())).unwrap_or(u32::MAX);
        let entries = Cache::builder()
            .max_capacity(max_bytes)
            .weigher(weigh)
            // moka's default policy rejects new entries while the old ones are hot. A new conversation is the hottest.
            .eviction_policy(EvictionPolicy::lru())
            .eviction_listener(move |_, _, cause| {
                if cause == RemovalCause::Size {
                    evictions.increment(1);
                }
            })
            .build_with_hasher(RandomState::default());
        let max_age = fresh_for.map_or(MAX_ABSENCE_AGE, |span| span.min(MAX_ABSENCE_AGE));
        let absences = || Cache::builder().max_capacity(MAX_ABSENCES).time_to_live(max_age);
        Self {
            entries,
            negative_cache: (!max_age.is_zero())
                .then(|| absences().build_with_hasher(RandomState::default())),
            keys: ActiveKeys::default(),
            clock,
            fresh_for,
            feed: FeedMoments::default(),
            first_reads: Arc::default(),
            max_listed_bytes: Mutex::new(max_bytes / 2),
        }
    }

    /// Returns the entry if `get` may return it without a call to store or disk, with its freshness.
    ///
    /// Such an entry is fresh, or the newest queued write, or in an outage any entry.
    pub(super) fn hit(
        &self,
        key: &str,
        is_circuit_open: impl FnOnce() -> bool,
    ) -> Option<(Arc<CacheEntry>, Freshness)> {
        let validity = self.validity();
        let entry = self.entries.get(key)?;
        let now = self.clock.moment();
        // Expiry follows the store's clock (I17).
        if self.clock.at(now) >= entry.record().expires_at {
            return None;
        }
        let freshness = match entry.origin() {
            Origin::Queue => Freshness::Queued,
            _ if self.is_fresh(&entry, validity, now) => Freshness::Fresh,
            _ => is_circuit_open().then(|| Freshness::stale(validity.validated_at(&entry), now))?,
        };
        Some((entry.touched(), freshness))
    }

    /// Returns everything that memory knows of a conversation. Each part was true during this call.
    pub(super) fn view(&self, key: &Key) -> View {
        let entry = self.entries.get(key);
        // Read after the entry. An absence that a new entry has just replaced was true at this call's start.
        let absent = if entry.is_none() { self.absence(key) } else { None };
        View { entry, absent, queued: self.keys.queued(key) }
    }

    /// Returns true if `get` may call the entry fresh at `now`.
    pub(super) fn is_fresh(&self, entry: &CacheEntry, validity: Validity, now: Moment) -> bool {
        entry.origin() == Origin::Store
            && validity.may_be_fresh(entry, now)
            && self.is_within_fresh(validity.validated_at(entry), now)
    }

    /// Returns true if a call at `now` may use a result that the store validated at `validated_at`.
    pub(super) fn is_recent(&self, validated_at: Moment, now: Moment) -> bool {
        validated_at >= now || self.is_within_fresh(validated_at, now)
    }

    /// Returns the same as [`is_recent`](Self::is_recent) for an absence (I14).
    pub(super) fn is_recent_absence(&self, validated_at: Moment, now: Moment) -> bool {
        let is_young = validated_at >= now || now.is_within(MAX_ABSENCE_AGE, validated_at);
        is_young && self.is_recent(validated_at, now)
    }

    fn is_within_fresh(&self, validated_at: Moment, now: Moment) -> bool {
        self.fresh_for.is_none_or(|span| now.is_within(span, validated_at))
    }

    fn absence(&self, key: &Key) -> Option<(Version, Moment)> {
        let absence = self.negative_cache.as_ref()?.get(key)?;
        self.is_recent_absence(absence.1, self.clock.moment()).then_some(absence)
    }

    /// Changes the state of a conversation by an event of a call that took `token` (I5). `at` is the start of that call.
    pub(super) fn drive(
        &self,
        key: &Key,
        token: Option<&ReadToken>,
        at: Moment,
        event: Event,
        wish: Wish<'_>,
    ) -> Admission {
        let times = Times { at, now: self.clock.now(), is_synced: self.clock.is_synced() };
        let mut admission = Admission::Stale;
        self.entries.entry_by_ref(key).and_compute_with(|current| {
            let current = current.map(moka::Entry::into_value);
            let cached = match &current {
                Some(entry) => Cached::Held(entry.held.clone()),
                None => {
                    self.absence(key).map_or(Cached::Nothing, |(version, at)| Cached::Absent { version, at })
                }
            };
            let (cached, answer) = self.keys.change(key, token, |queued, floor| {
                let (state, effect) = step(KeyState { cached, queued, floor }, event, times);
                (state.queued, effect.raised, (state.cached, effect.answer))
            });
            // An absence that stays beside an entry would answer `None` after the entry's eviction (I14).
            match (&self.negative_cache, &cached) {
                (Some(absences), Cached::Absent { version, at }) => {
                    absences.insert(key.clone(), (*version, *at));
                }
                (Some(absences), _) if current.is_none() => absences.invalidate(key),
                _ => {}
            }
            let (op, entry) = self.next_entry(current, &cached, wish);
            admission = match (answer, cached) {
                (Answer::QueuedIsNewer, _) => Admission::QueuedIsNewer,
                (Answer::Current, Cached::Absent { version, .. }) => Admission::Absent(version),
                (Answer::Current, _) => entry.map_or(Admission::Stale, Admission::Cached),
                (Answer::Stale, _) => Admission::Stale,
            };
            op
        });
        admission
    }

    /// Returns moka's operation that makes memory hold `cached`, and the entry of it.
    fn next_entry(
        &self,
        current: Option<Arc<CacheEntry>>,
        cached: &Cached,
        wish: Wish<'_>,
    ) -> (Op<Arc<CacheEntry>>, Option<Arc<CacheEntry>>) {
        let Cached::Held(held) = cached else {
            return (if current.is_some() { Op::Remove } else { Op::Nop }, None);
        };
        let is_same = |entry: &&Arc<CacheEntry>| {
            Arc::ptr_eq(entry.record(), &held.record)
                && (entry.held.at, entry.origin()) == (held.at, held.origin)
        };
        if let Some(same) = current.as_ref().filter(is_same) {
            return (Op::Nop, Some(Arc::clone(same)));
        }
        let first_reads = match (&wish, &current) {
            // A load or write has saved the copy as used, so its first read needs no report.
            (Wish::Caller, _) => None,
            (Wish::Listed(_), Some(current)) => current.first_reads.clone(),
            (Wish::Listed(_), None) => Some(Arc::clone(&self.first_reads)),
        };
        let accessed = AtomicBool::new(current.as_ref().is_some_and(|entry| entry.accessed.load(Relaxed)));
        let entry = Arc::new(CacheEntry { held: held.clone(), accessed, first_reads });
        // Without room, the list still returns the entry, and memory stays as it is.
        let fits = match wish {
            Wish::Listed(free) if current.is_none() => take(free, weight(&held.record)),
            _ => true,
        };
        (if fits { Op::Put(Arc::clone(&entry)) } else { Op::Nop }, Some(entry))
    }

    /// Changes conversations that no caller has asked for, while half of memory is free. So they evict no entry in use. Present
    /// entries are replaced in any case.
    pub(super) fn drive_listed<T>(
        &self,
        items: impl IntoIterator<Item = T>,
        mut drive: impl FnMut(T, Wish<'_>) -> Admission,
    ) -> Vec<Admission> {
        let max_bytes = self.max_listed_bytes.lock();
        let mut free = max_bytes.saturating_sub(self.size().1);
        items.into_iter().map(|item| drive(item, Wish::Listed(&mut free))).collect()
    }

    /// Restores the newest queued write of a conversation, from an earlier process.
    pub(super) fn resume(&self, QueuedKey { key, version, trust }: &QueuedKey) {
        self.clock.observe(*version);
        let queued = match trust {
            QueueTrust::Newest => Queued::Newest(*version),
            QueueTrust::Superseded => Queued::Superseded(*version),
            QueueTrust::Unverified => Queued::Unverified(*version),
            QueueTrust::Append => Queued::Append(*version),
        };
        self.keys.change(key, None, |_, _| (queued, None, ()));
    }

    /// Returns the number of conversations in memory, and their bytes.
    pub(super) fn size(&self) -> (u64, u64) {
        self.entries.run_pending_tasks();
        (self.entries.entry_count(), self.entries.weighted_size())
    }

    /// Returns the conversations that callers have read since the last call.
    pub(super) fn drain_accessed(&self) -> Vec<Key> {
        let accessed = self.entries.iter().filter(|(_, entry)| entry.accessed.swap(false, Relaxed));
        accessed.map(|(key, _)| Key::clone(&key)).collect()
    }

    /// Returns copies of the listed entries that callers have read for the first time since the last call.
    pub(super) fn drain_first_reads(&self) -> Vec<ReplicaRecord> {
        let keys = std::mem::take(&mut *self.first_reads.0.lock());
        // The token is older than the lookups, so it shows each later change (I2).
        let token = self.keys.token();
        let entries = keys.iter().filter_map(|key| self.entries.get(key));
        let is_copy = |entry: &Arc<CacheEntry>| {
            let record = entry.record();
            entry.origin() != Origin::Queue && token.floor(&record.key).possible <= record.version
        };
        entries
            .filter(is_copy)
            .map(|entry| ReplicaRecord {
                record: Arc::clone(entry.record()),
                confirmed_at: self.clock.at(entry.validated_at()),
                rank: CopyRank::Read,
            })
            .collect()
    }

    /// Admits a write that the outage file has committed to the queue (I3).
    pub(super) fn enqueued(&self, write: &Write, call: &Call, has_appends: bool, is_provisional: bool) {
        let record = Arc::clone(&write.record);
        let key = record.key.clone();
        let event = Event::Enqueued { write: record, has_appends, is_provisional };
        self.drive(&key, Some(&call.token), self.clock.moment(), event, Wish::Caller);
    }

    /// Changes a conversation without a call of its own.
    pub(super) fn tell(&self, key: &Key, event: Event) {
        self.drive(key, None, self.clock.moment(), event, Wish::Caller);
    }
}

/// Takes `bytes` from the free ones, if they suffice.
fn take(free: &mut u64, bytes: u64) -> bool {
    let left = free.checked_sub(bytes);
    *free = left.unwrap_or(*free);
    left.is_some()
}

/// Returns the bytes that a conversation takes in memory.
pub(super) fn weight(record: &Record) -> u64 {
    (record.bytes() + ENTRY_OVERHEAD) as u64
}
