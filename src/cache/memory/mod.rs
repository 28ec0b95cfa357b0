//! Conversations in memory, limited by bytes, and a negative cache of known absences.
//!
//! Every change of a key runs under moka's lock of that key. So the entry, the absence, the version floor
//! and the queue index of a conversation change together (I5).

mod access;
mod admit;
mod entry;
mod invalidate;
mod lookup;
mod queued;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use foldhash::fast::RandomState;
use metrics::Counter;
use moka::notification::RemovalCause;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;

use crate::cache::read_token::VersionFloors;
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::outage::index::QueueIndex;

pub(crate) use entry::{Admission, CacheEntry, Observation};

use entry::FirstReads;

/// The limit on entries of the negative cache. It is a cache of its own, so that a scan of unknown thread
/// ids evicts no conversation.
const MAX_ABSENCES: u64 = 10_000;
/// The limit on the age of an absence. The setting `fresh_for` can lower it.
const MAX_ABSENCE_AGE: Duration = Duration::from_secs(2);
/// The bytes of an entry beyond its record: moka's nodes and reference counts. `tests/allocations` measures
/// them.
const ENTRY_OVERHEAD: usize = 420;

/// The memory of the cache.
#[derive(Debug)]
pub(crate) struct MemoryCache {
    entries: Cache<Key, Arc<CacheEntry>, RandomState>,
    /// The versions of known absences, and the times of the requests that showed them. `None` if
    /// `fresh_for` is zero.
    negative_cache: Option<Cache<Key, (Version, Moment), RandomState>>,
    floors: VersionFloors,
    queue_index: Arc<QueueIndex>,
    clock: Arc<Clock>,
    /// The time during which a validated entry is fresh. `None` if no other process can write.
    fresh_for: Option<Duration>,
    first_reads: Arc<FirstReads>,
    /// The limit on bytes of memory up to which list pages and the warm-up fill it. The lock admits one page
    /// at a time.
    max_listed_bytes: Mutex<u64>,
}

impl MemoryCache {
    pub(crate) fn new(
        max_bytes: u64,
        fresh_for: Option<Duration>,
        floors: VersionFloors,
        queue_index: Arc<QueueIndex>,
        clock: Arc<Clock>,
        evictions: Counter,
    ) -> Self {
        let weigh =
            |_: &Key, entry: &Arc<CacheEntry>| u32::try_from(weight(&entry.record)).unwrap_or(u32::MAX);
        let entries = Cache::builder()
            .max_capacity(max_bytes)
            .weigher(weigh)
            // moka's default policy rejects new entries while the old ones are hot. A new conversation is
            // the hottest.
            .eviction_policy(EvictionPolicy::lru())
            .eviction_listener(move |_, _, cause| {
                if cause == RemovalCause::Size {
                    evictions.increment(1);
                }
            })
            .build_with_hasher(RandomState::default());
        let max_age = fresh_for.map_or(MAX_ABSENCE_AGE, |span| span.min(MAX_ABSENCE_AGE));
        let negative_cache = (!max_age.is_zero()).then(|| {
            Cache::builder()
                .max_capacity(MAX_ABSENCES)
                .time_to_live(max_age)
                .build_with_hasher(RandomState::default())
        });
        Self {
            entries,
            negative_cache,
            floors,
            queue_index,
            clock,
            fresh_for,
            first_reads: Arc::default(),
            max_listed_bytes: Mutex::new(max_bytes / 2),
        }
    }

    /// Returns the number of conversations in memory, and their bytes.
    pub(crate) fn size(&self) -> (u64, u64) {
        self.entries.run_pending_tasks();
        (self.entries.entry_count(), self.entries.weighted_size())
    }

    /// Evicts a conversation, as moka may at any time.
    #[cfg(feature = "testing")]
    pub(crate) fn evict(&self, key: &Key) {
        self.entries.invalidate(key);
    }

    fn forget_absence(&self, key: &Key) {
        if let Some(negative_cache) = &self.negative_cache {
            negative_cache.invalidate(key);
        }
    }
}

/// Returns the bytes that a conversation takes in memory.
pub(crate) fn weight(record: &Record) -> u64 {
    (record.bytes() + ENTRY_OVERHEAD) as u64
}
