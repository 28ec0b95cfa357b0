//! The removal of entries that are older than a known version.

use std::sync::Arc;

use moka::ops::compute::Op;

use super::{CacheEntry, MemoryCache};
use crate::model::key::Key;
use crate::model::version::Version;

impl MemoryCache {
    /// Invalidates entries older than `version`. A newer version may exist whose value is unknown (I6).
    pub(crate) fn invalidate_below(&self, key: &Key, version: Version) {
        self.clock.observe(version);
        self.entries.entry_by_ref(key).and_compute_with(|current| {
            // The outcome is unknown, so the floor is not confirmed. A queued write must not lose against
            // it.
            self.floors.raise(key, version);
            self.forget_absence(key);
            match current {
                Some(current) if current.value().record.version < version => Op::Remove,
                _ => Op::Nop,
            }
        });
    }

    /// Invalidates entries and queued writes older than `version`, which the store was seen to hold.
    pub(crate) fn invalidate_superseded(&self, key: &Key, version: Version) {
        self.clock.observe(version);
        self.entries.entry_by_ref(key).and_compute_with(|current| {
            // The index learns the version first, because its answer decides whether a queued entry stays
            // (I5).
            let queued_is_newer = self.queue_index.observe_stored(key, version).is_some();
            self.floors.raise_confirmed(key, version);
            self.forget_absence(key);
            match current {
                Some(current) if current.value().is_queued && !queued_is_newer => Op::Remove,
                Some(current) if current.value().record.version < version => Op::Remove,
                _ => Op::Nop,
            }
        });
    }

    /// Invalidates the entry and the absence that are older than a stale result.
    ///
    /// The floor may come from a write that the store never took, with a version by a clock that was ahead. The
    /// entry can then be older than the stale result, and the result can be an acknowledged write.
    pub(super) fn invalidate_by_stale(
        &self,
        key: &Key,
        version: Version,
        current: Option<&Arc<CacheEntry>>,
    ) -> Op<Arc<CacheEntry>> {
        if let Some(negative_cache) = &self.negative_cache
            && negative_cache.get(key).is_some_and(|(absent, _)| absent < version)
        {
            negative_cache.invalidate(key);
        }
        let is_older = |current: &Arc<CacheEntry>| !current.is_queued && current.record.version < version;
        if current.is_some_and(is_older) { Op::Remove } else { self.remove_leftover(key, current) }
    }

    /// Removes a queued entry that the queue index no longer marks as the newest.
    ///
    /// A change of the index ends with this call, in the same compute of the key (I5).
    pub(super) fn remove_leftover(
        &self,
        key: &Key,
        current: Option<&Arc<CacheEntry>>,
    ) -> Op<Arc<CacheEntry>> {
        let is_leftover = |current: &Arc<CacheEntry>| {
            current.is_queued && !self.queue_index.is_newest_queued(key.as_str(), current.record.version)
        };
        if current.is_some_and(is_leftover) { Op::Remove } else { Op::Nop }
    }
}
