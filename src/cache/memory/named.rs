//! What the change feed tells memory: conversations that changed, and the moment as of which all others are validated.

use std::sync::Arc;
use std::time::Duration;

use super::{CacheEntry, MemoryCache};
use crate::cache::key_state::{Event, Origin};
use crate::model::key::Key;
use crate::model::moment::{AtomicMoment, Moment};
use crate::model::version::Version;

/// The time for which polls validate an entry without a load. So a change that no feed can see, as a restored snapshot of the disk
/// or a statement with triggers off, is not hidden for ever.
const MAX_SPAN_WITHOUT_LOAD: Duration = Duration::from_secs(3600);

/// The moments of the change feed. `cache/feed.rs` tells why they validate an entry.
#[derive(Debug)]
pub(super) struct FeedMoments {
    /// The feed has named each change that a call after this moment did not see.
    since: AtomicMoment,
    /// The start of the last complete poll.
    polled: AtomicMoment,
}

/// A reading of the moments of the feed. It is older than each entry that it judges.
#[derive(Debug, Clone, Copy)]
pub(in crate::cache) struct Validity {
    since: Moment,
    polled: Moment,
}

impl Default for FeedMoments {
    fn default() -> Self {
        Self { since: AtomicMoment::never(), polled: AtomicMoment::default() }
    }
}

impl Validity {
    /// Returns the last moment at which the entry was certainly the newest record.
    pub(in crate::cache) fn validated_at(self, entry: &CacheEntry) -> Moment {
        let loaded = entry.held.at;
        match self.covers(entry) && self.polled.is_within(MAX_SPAN_WITHOUT_LOAD, loaded) {
            true => loaded.max(self.polled),
            false => loaded,
        }
    }

    /// Whether the age of the entry may make it fresh at `now`. Beside a history it may not, if the entry is older: no poll names a
    /// change that the first snapshot has seen.
    pub(super) fn may_be_fresh(self, entry: &CacheEntry, now: Moment) -> bool {
        self.covers(entry) || self.since.is_after(now)
    }

    fn covers(self, entry: &CacheEntry) -> bool {
        entry.held.origin == Origin::Store && entry.held.at.is_after(self.since)
    }
}

impl MemoryCache {
    /// Reads the moments of the feed. The caller reads them before it looks up an entry. An entry that the last poll named is gone
    /// by then.
    pub(in crate::cache) fn validity(&self) -> Validity {
        // `polled` first: a new `polled` must not meet an old `since`.
        let polled = self.feed.polled.load();
        Validity { since: self.feed.since.load(), polled }
    }

    /// Begins a history: from now on, the feed names each change that a new call does not see.
    pub(in crate::cache) fn begin_history(&self) {
        self.feed.since.store(self.clock.moment());
    }

    /// Validates all entries of the history as of the start of a complete poll. All changes of the poll are known.
    pub(in crate::cache) fn validate_unnamed(&self, polled: Moment) {
        self.feed.polled.store(polled);
    }

    /// Drops a value that is older than `version`, and returns its entry.
    ///
    /// A queued write stays. Only replay can tell that it has lost, and until then no other value may answer (I16). The replica
    /// keeps its copy for an outage, because no reader has seen the newer version.
    pub(in crate::cache) fn named(&self, key: &Key, version: Version) -> Option<Arc<CacheEntry>> {
        let entry = self.entries.get(key);
        // Also without an entry, because a load may be in flight (I2).
        self.tell(key, Event::Unknown(version));
        entry.filter(|entry| entry.origin() != Origin::Queue && entry.record().version < version)
    }

    /// Drops all values, because the store was restored. Results of running calls do not come back.
    pub(in crate::cache) fn forget_history(&self) {
        self.keys.expire_tokens();
        let keys: Vec<Arc<Key>> = self.entries.iter().map(|(key, _)| key).collect();
        for key in keys {
            // A queued write stays in the outage file.
            self.tell(&key, Event::Evicted);
        }
        self.negative_cache.iter().for_each(moka::sync::Cache::invalidate_all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::key_state::Held;
    use crate::model::record::Record;

    #[test]
    fn polls_validate_an_entry_for_an_hour_after_its_load() {
        const MINUTE: Duration = Duration::from_secs(60);
        let polled = Moment::now();
        let validity = Validity { since: polled.minus(100 * MINUTE), polled };
        let validated_at = |age| {
            let record = Arc::new(Record::tombstone(Key::new("k").unwrap(), Version::NONE));
            let held = Held { record, at: polled.minus(age), origin: Origin::Store };
            validity.validated_at(&CacheEntry { held, accessed: true.into(), first_reads: None })
        };
        assert_eq!(validated_at(59 * MINUTE), polled);
        assert_eq!(validated_at(61 * MINUTE), polled.minus(61 * MINUTE));
    }
}
