//! The reads that memory reports: access times to the store, first reads to the replica.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::{CacheEntry, MemoryCache};
use crate::model::key::Key;
use crate::outage::{CopyRank, ReplicaRecord};

impl MemoryCache {
    /// Returns the conversations that callers have read since the last call.
    pub(crate) fn drain_accessed(&self) -> Vec<Key> {
        let accessed = self.entries.iter().filter(|(_, entry)| entry.accessed.swap(false, Relaxed));
        accessed.map(|(key, _)| Key::clone(&key)).collect()
    }

    /// Returns copies of the listed entries that callers have read for the first time since the last call.
    pub(crate) fn drain_first_reads(&self) -> Vec<ReplicaRecord> {
        let keys = std::mem::take(&mut *self.first_reads.lock());
        // The token is older than the lookups, so it shows each later change (I2).
        let token = self.floors.token();
        let entries = keys.iter().filter_map(|key| self.peek(key));
        let is_copy = |entry: &Arc<CacheEntry>| {
            !entry.is_queued && !token.is_superseded(&entry.record.key, entry.record.version)
        };
        let copy = |entry: Arc<CacheEntry>| ReplicaRecord {
            record: Arc::clone(&entry.record),
            confirmed_at: self.clock.at(entry.validated_at),
            is_own: false,
            rank: CopyRank::Read,
        };
        entries.filter(is_copy).map(copy).collect()
    }
}
