//! The admission of results from the store and of copies from the replica.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use moka::ops::compute::Op;

use super::{Admission, CacheEntry, MemoryCache, Observation, weight};
use crate::cache::read_token::ReadToken;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::record::Record;

impl MemoryCache {
    /// Admits the result of a store call that took `token` and began at `requested_at`.
    ///
    /// Entries that memory holds at the start of the call are never newer than the result. A later change
    /// raises the floor. So a result above the floor replaces the entry, even if its version is lower:
    /// another client may have deleted the row, or restored the database.
    pub(crate) fn admit(
        &self,
        key: &Key,
        token: &ReadToken,
        requested_at: Moment,
        observation: Observation,
    ) -> Admission {
        self.admit_within(key, token, requested_at, observation, None)
    }

    /// Admits a list page, or a page of the warm-up, as [`admit`](Self::admit) does.
    ///
    /// No caller has read these conversations yet. A new entry enters only while half of memory is free, so
    /// it evicts no entry in use. Present entries are replaced in any case.
    pub(crate) fn admit_listed(
        &self,
        records: &[Arc<Record>],
        token: &ReadToken,
        requested_at: Moment,
    ) -> Vec<Admission> {
        let max_bytes = self.max_listed_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free_bytes = max_bytes.saturating_sub(self.size().1);
        let admit = |record: &Arc<Record>| {
            let observation = Observation::Found(Arc::clone(record));
            self.admit_within(&record.key, token, requested_at, observation, Some(&mut free_bytes))
        };
        records.iter().map(admit).collect()
    }

    /// Admits an observation. A listed one carries the bytes that are free for listed entries.
    fn admit_within(
        &self,
        key: &Key,
        token: &ReadToken,
        requested_at: Moment,
        observation: Observation,
        free_bytes: Option<&mut u64>,
    ) -> Admission {
        let version = observation.version();
        self.clock.observe(version);
        let mut admission = Admission::BelowFloor;
        // Floor, entry and absence change together, under the lock of the key (I5).
        self.entries.entry_by_ref(key).and_compute_with(|current| {
            let current = current.map(moka::Entry::into_value);
            // A queued write above the result stays the newest, so the entry stays too (I16).
            if self.queue_index.observe_stored(key, version).is_some() {
                admission = Admission::QueuedIsNewer;
                return Op::Nop;
            }
            if token.is_superseded(key, version) {
                return self.invalidate_by_stale(key, version, current.as_ref());
            }
            // From now on, an older result of a slower call is stale (I2).
            self.floors.raise_confirmed(key, version);
            match observation {
                Observation::Found(record) => {
                    // An absence that stays would answer `None` after an eviction of this entry (I14).
                    self.forget_absence(key);
                    let is_admitted =
                        current.is_some() || free_bytes.as_ref().is_none_or(|free| **free >= weight(&record));
                    let is_listed = free_bytes.is_some();
                    if let Some(free_bytes) = free_bytes.filter(|_| is_admitted && current.is_none()) {
                        *free_bytes -= weight(&record);
                    }
                    let entry = Arc::new(self.found_entry(record, requested_at, current, is_listed));
                    admission = Admission::Cached(Arc::clone(&entry));
                    // Without room, the list still returns the entry, and memory stays as it is.
                    if is_admitted { Op::Put(entry) } else { Op::Nop }
                }
                Observation::Absent(version) => {
                    admission = Admission::Absent(version);
                    if let Some(negative_cache) = &self.negative_cache {
                        negative_cache.insert(key.clone(), (version, requested_at));
                    }
                    Op::Remove
                }
            }
        });
        admission
    }

    /// Creates the entry of a found record. It inherits the marks of the entry that it replaces.
    fn found_entry(
        &self,
        record: Arc<Record>,
        requested_at: Moment,
        current: Option<Arc<CacheEntry>>,
        is_listed: bool,
    ) -> CacheEntry {
        let first_reads = match &current {
            // A load or write has saved the copy as used, so its first read needs no report.
            _ if !is_listed => None,
            Some(current) => current.first_reads.clone(),
            None => Some(Arc::clone(&self.first_reads)),
        };
        let accessed = AtomicBool::new(current.is_some_and(|current| current.accessed.load(Relaxed)));
        CacheEntry { accessed, first_reads, ..CacheEntry::new(record, requested_at) }
    }

    /// Admits a copy from the replica, or returns the entry that another caller has admitted meanwhile.
    ///
    /// Returns `None` if the conversation changed during the read of the replica. The caller looks again.
    pub(crate) fn admit_replica(
        &self,
        token: &ReadToken,
        record: Arc<Record>,
        age: Duration,
        is_read: bool,
    ) -> Option<Arc<CacheEntry>> {
        let key = record.key.clone();
        let now = self.clock.moment();
        let mut admitted = None;
        self.entries.entry_by_ref(&key).and_compute_with(|current| {
            let is_superseded = token.is_superseded(&key, record.version);
            // A queued write is newer than any copy. The caller looks into the queue again.
            if is_superseded || self.queue_index.newest(&key).is_some() {
                return Op::Nop;
            }
            match current.map(moka::Entry::into_value) {
                // The index has no write of this key, so the queued entry is a leftover.
                Some(current) if current.is_queued => {}
                // Another caller was faster. This call returns that entry, because moka may evict it before
                // a second lookup.
                Some(current)
                    if current.record.is_live(self.clock.at(now))
                        || current.record.version > record.version =>
                {
                    admitted = Some(if is_read { current.touched() } else { current });
                    return Op::Nop;
                }
                _ => {}
            }
            let entry = Arc::new(CacheEntry {
                is_never_fresh: true,
                accessed: AtomicBool::new(is_read),
                first_reads: Some(Arc::clone(&self.first_reads)).filter(|_| !is_read),
                ..CacheEntry::new(record, now.minus(age))
            });
            admitted = Some(Arc::clone(&entry));
            Op::Put(entry)
        });
        admitted
    }
}
