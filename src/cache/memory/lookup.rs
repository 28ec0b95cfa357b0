//! Reads from memory. None of them does I/O or waits.

use std::sync::Arc;

use super::{CacheEntry, MAX_ABSENCE_AGE, MemoryCache};
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::outcome::Freshness;
use crate::model::version::Version;

impl MemoryCache {
    /// Returns the entry if it is fresh and has not expired.
    pub(crate) fn get_fresh(&self, key: &str) -> Option<Arc<CacheEntry>> {
        let entry = self.entries.get(key)?;
        let now = self.clock.moment();
        (self.is_fresh(&entry, now) && self.clock.at(now) < entry.record.expires_at).then(|| entry.touched())
    }

    /// Returns the entry if `get` may return it without a call to store or disk, with its freshness.
    ///
    /// A servable entry is a fresh entry, the newest queued write, or in an outage a validated entry. A single
    /// lookup covers all three cases.
    pub(crate) fn get_servable(
        &self,
        key: &str,
        is_circuit_open: impl FnOnce() -> bool,
    ) -> Option<(Arc<CacheEntry>, Freshness)> {
        let entry = self.entries.get(key)?;
        let now = self.clock.moment();
        // Expiry follows the store's clock (I17).
        if self.clock.at(now) >= entry.record.expires_at {
            return None;
        }
        let freshness = match &entry {
            entry if self.is_fresh(entry, now) => Freshness::Fresh,
            entry if entry.is_queued => {
                self.expiry_is_valid(entry).then_some(())?;
                self.queue_index.is_newest_queued(key, entry.record.version).then_some(Freshness::Queued)?
            }
            entry => is_circuit_open().then(|| Freshness::stale(entry.validated_at, now))?,
        };
        Some((entry.touched(), freshness))
    }

    /// Returns the entry for the stale fallback: validated once, and not expired.
    pub(crate) fn get_stale(&self, key: &Key) -> Option<Arc<CacheEntry>> {
        let entry = self.entries.get(key)?;
        (!entry.is_queued && self.clock.now() < entry.record.expires_at).then(|| entry.touched())
    }

    /// Returns the queued write in memory if it is the newest of its conversation.
    pub(crate) fn get_queued(&self, key: &Key) -> Option<Arc<CacheEntry>> {
        let entry = self.entries.get(key)?;
        let is_usable = entry.is_queued && self.expiry_is_valid(&entry);
        (is_usable && self.queue_index.is_newest_queued(key.as_str(), entry.record.version))
            .then(|| entry.touched())
    }

    /// Returns true if no clock sync has corrected the expiry of the entry in the outage file.
    pub(super) fn expiry_is_valid(&self, entry: &CacheEntry) -> bool {
        entry.unsynced.is_none() || self.clock.unsynced() == entry.unsynced
    }

    /// Returns the entry in any state.
    pub(crate) fn peek(&self, key: &Key) -> Option<Arc<CacheEntry>> {
        self.entries.get(key)
    }

    /// Returns true if the store validated the entry within `fresh_for`.
    ///
    /// An entry from before the last jump of the clock is not fresh, because its age is unknown.
    pub(crate) fn is_fresh(&self, entry: &CacheEntry, now: Moment) -> bool {
        !entry.is_queued
            && !entry.is_never_fresh
            && self.fresh_for.is_none_or(|span| now.is_within(span, entry.validated_at))
    }

    /// Returns true if a result validated at `validated_at` is fresh for a call made at `requested_at`.
    pub(crate) fn is_recent(&self, validated_at: Moment, requested_at: Moment) -> bool {
        validated_at >= requested_at
            || self.fresh_for.is_none_or(|span| requested_at.is_within(span, validated_at))
    }

    /// Returns the same as [`is_recent`](Self::is_recent) for an absence.
    pub(crate) fn is_recent_absence(&self, validated_at: Moment, requested_at: Moment) -> bool {
        let is_recent = self.is_recent(validated_at, requested_at);
        is_recent && (validated_at >= requested_at || requested_at.is_within(MAX_ABSENCE_AGE, validated_at))
    }

    /// Returns the version of a conversation that is known to be absent (I14).
    pub(crate) fn absent(&self, key: &Key) -> Option<Version> {
        let (version, validated_at) = self.negative_cache.as_ref()?.get(key)?;
        if !self.is_recent_absence(validated_at, self.clock.moment()) {
            return None;
        }
        // `admit` inserts the absence a moment before it removes the entry. Until then other callers still
        // get the entry, so this call must not answer differently.
        (!self.entries.contains_key(key)).then_some(version)
    }
}
