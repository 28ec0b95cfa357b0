//! Queued writes in memory, from the enqueue to the replay.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use moka::ops::compute::Op;

use super::{CacheEntry, MemoryCache};
use crate::cache::read_token::ReadToken;
use crate::model::clock::UnsyncedPeriod;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};
use crate::outage::CompletedWrites;
use crate::outage::replay::ReplayObserver;

impl MemoryCache {
    /// Admits a write that the outage file has committed to the queue (I3).
    ///
    /// From now on the write is the newest of its conversation. The write took `token` before its version was
    /// issued.
    pub(crate) fn admit_queued(
        &self,
        record: &Arc<Record>,
        token: &ReadToken,
        unsynced: Option<UnsyncedPeriod>,
        queued_at: Timestamp,
    ) {
        let (key, version) = (&record.key, record.version);
        self.entries.entry_by_ref(key).and_compute_with(|current| {
            let current = current.as_ref().map(moka::Entry::value);
            // The index rejects this write if a newer one is marked, so no older write replaces its entry.
            if !self.queue_index.insert(key, version, unsynced, queued_at) {
                return Op::Nop;
            }
            // A call may have seen a newer version in the store during the commit. Memory may have evicted
            // that version since, but the token still knows it.
            let version = self.queue_index.corrected(version, unsynced, queued_at);
            if let Some(seen) = token.confirmed(key).filter(|seen| *seen > version) {
                self.queue_index.observe_stored(key, seen);
                return self.remove_leftover(key, current);
            }
            // A provisional version and the version of a copy cannot be compared, so that copy does not win
            // (I8).
            if let Some(current) = current
                && !current.is_queued
                && !(unsynced.is_some() && current.is_never_fresh)
                && current.record.version > version
            {
                self.queue_index.observe_stored(key, current.record.version);
                return Op::Nop;
            }
            // A load that began before the enqueue must not replace the queued write (I16).
            self.floors.raise(key, version);
            self.forget_absence(key);
            let now = self.clock.moment();
            // A queued remove leaves no entry. The queue answers for it (I14).
            if record.value.is_some() {
                Op::Put(CacheEntry::queued(record, unsynced, now))
            } else {
                Op::Remove
            }
        });
    }

    /// Admits a queued write that a caller has read from the outage file.
    pub(crate) fn admit_queued_from_disk(
        &self,
        record: &Arc<Record>,
        unsynced: Option<UnsyncedPeriod>,
    ) -> Arc<CacheEntry> {
        let entry = CacheEntry::queued(record, unsynced, self.clock.moment());
        self.entries.entry_by_ref(&record.key).and_compute_with(|current| {
            let is_better = current.is_none_or(|current| !self.expiry_is_valid(current.value()));
            // Replay may have completed the write during the read. Without a mark the entry would be a
            // leftover (I5).
            let is_admitted =
                is_better && self.queue_index.is_newest_queued(record.key.as_str(), record.version);
            if is_admitted { Op::Put(Arc::clone(&entry)) } else { Op::Nop }
        });
        entry
    }

    /// Records that the store holds, or held, a queued write.
    ///
    /// A call that began at `requested_at` saw it. `was_newest` is true if that call itself stored the
    /// write, because the write was the newest at that time.
    pub(crate) fn mark_stored(&self, record: &Arc<Record>, requested_at: Moment, was_newest: bool) {
        let (key, version) = (&record.key, record.version);
        self.entries.entry_by_ref(key).and_compute_with(|current| {
            self.floors.raise_confirmed(key, version);
            let current = current.map(moka::Entry::into_value);
            let is_newest_queued = |current: &Arc<CacheEntry>| {
                current.is_queued && self.queue_index.is_newest_queued(key.as_str(), current.record.version)
            };
            // Both conditions are read before the index forgets the write.
            let is_cached = current.as_ref().is_some_and(is_newest_queued);
            let is_newest = self.queue_index.is_newest_queued(key.as_str(), version);
            self.queue_index.remove(key, version);
            if !is_cached || !is_newest {
                return self.remove_leftover(key, current.as_ref());
            }
            Op::Put(Arc::new(CacheEntry {
                // If another call stored the write, the store may hold a newer version by now. So it is not
                // fresh.
                is_never_fresh: !was_newest,
                accessed: AtomicBool::new(true),
                ..CacheEntry::new(Arc::clone(record), requested_at)
            }))
        });
    }

    /// Records that a queued write became a dead letter. `newer` is the version in the store, if known.
    pub(crate) fn mark_dead(&self, key: &Key, version: Version, newer: Option<Version>) {
        // This raises the floor before the mark goes, so no result below `newer` enters in between (I2).
        if let Some(newer) = newer {
            self.invalidate_superseded(key, newer);
        }
        self.entries.entry_by_ref(key).and_compute_with(|current| {
            let is_newest = self.queue_index.newest(key) == Some(version);
            let current = current.map(moka::Entry::into_value);
            let is_cached = current.as_ref().is_some_and(|current| is_newest && current.is_queued);
            self.queue_index.remove(key, version);
            if is_cached { Op::Remove } else { self.remove_leftover(key, current.as_ref()) }
        });
    }

    /// Forgets queued writes that left the outage file: stored, or replaced by a newer write of this daemon.
    pub(crate) fn mark_completed(&self, completed: CompletedWrites) {
        for (key, version) in completed {
            self.entries.entry_by_ref(&key).and_compute_with(|current| {
                self.queue_index.remove(&key, version);
                self.remove_leftover(&key, current.as_ref().map(moka::Entry::value))
            });
        }
    }
}

impl ReplayObserver for MemoryCache {
    fn stored(&self, record: &Arc<Record>, requested_at: Moment, was_newest: bool) {
        self.mark_stored(record, requested_at, was_newest);
    }

    fn dead_lettered(&self, key: &Key, version: Version, newer: Option<Version>) {
        self.mark_dead(key, version, newer);
    }
}
