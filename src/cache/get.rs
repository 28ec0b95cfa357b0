//! The read path: memory, then one load for all callers, then the stale fallback.

use std::sync::Arc;
use std::time::Instant;

use tracing::Instrument;

use crate::cache::memory::{Admission, CacheEntry, Observation};
use crate::cache::outage::{
    MAX_LOOKUP_TIME, MAX_LOOKUPS, QueueLookup, ReplicaLookup, can_enqueue, changes_too_fast,
};
use crate::cache::read_token::ReadToken;
use crate::cache::{Access, Cache, Conversation, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::outcome::Freshness;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::observe::metrics::ReadResult;
use crate::outage::CopyRank;
use crate::store::{LoadRequest, Loaded};

impl Cache {
    /// Returns the conversation with this thread id, or `None` if it does not exist.
    ///
    /// Memory answers if the store validated the entry within `fresh_for`. Such a read does no I/O, takes
    /// no lock of threadkeep, and does not allocate, parse or copy. If a write of this daemon waits in the
    /// queue, that write is the answer. Otherwise one load serves all callers.
    ///
    /// In an outage, or after the soft timeout, the stale fallback answers: an unexpired copy from memory
    /// or from the local disk. Such a copy reports its age as [`Stale`](crate::Freshness::Stale). Only the
    /// store, or a queued remove, makes this return `None`.
    ///
    /// # Errors
    ///
    /// * [`ErrorKind::Unavailable`] if the store is unreachable and no copy is known.
    /// * [`ErrorKind::Invalid`] if `key` is not a valid thread id.
    /// * [`ErrorKind::Overloaded`] if too many loads are in flight, or if the conversation changes during
    ///   each attempt.
    /// * [`ErrorKind::Unauthorized`] or [`ErrorKind::SchemaOutdated`] if the store rejects the key, or
    ///   lacks the migrations, and no copy is known.
    /// * [`ErrorKind::LocalStorage`] if the disk fails.
    /// * [`ErrorKind::Closed`] after a shutdown.
    ///
    /// ```
    /// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
    /// match cache.get("thread-1").await? {
    ///     Some(found) => println!("{} ({:?})", found.json(), found.freshness()),
    ///     None => println!("start a new conversation"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get(&self, key: impl AsRef<str>) -> Result<Option<Conversation>> {
        let shared = &self.0;
        shared.check_not_shut_down()?;
        if let Some((entry, freshness)) =
            shared.memory.get_servable(key.as_ref(), || !shared.is_breaker_closed())
        {
            shared.metrics.read(match freshness {
                Freshness::Fresh => ReadResult::Hit,
                Freshness::Queued => ReadResult::Queued,
                Freshness::Stale { .. } => ReadResult::Stale,
            });
            return Ok(Some(Conversation::new(entry, freshness)));
        }
        let key = Key::new(key)?;
        let span = tracing::debug_span!("get", thread_id = %key);
        let result = shared.get_miss(&key).instrument(span).await;
        shared.metrics.read(match &result {
            Ok(Some(found)) if found.freshness() == Freshness::Fresh => ReadResult::Miss,
            Ok(Some(found)) if found.freshness() == Freshness::Queued => ReadResult::Queued,
            Ok(Some(_)) => ReadResult::Stale,
            Ok(None) => ReadResult::Absent,
            Err(_) => ReadResult::Failed,
        });
        result
    }
}

impl Shared {
    /// Reads a conversation that memory cannot answer: queue, load, stale fallback.
    async fn get_miss(self: &Arc<Self>, key: &Key) -> Result<Option<Conversation>> {
        let (requested_at, start) = (Moment::now(), Instant::now());
        // Each round costs one load, and repeats only if the conversation changed during that load (I12).
        for _ in (0..MAX_LOOKUPS).take_while(|_| start.elapsed() < MAX_LOOKUP_TIME) {
            if self.memory.absent(key).is_some() {
                return Ok(None);
            }
            if let QueueLookup::Newest(entry, _) = self.lookup_queued(key).await? {
                return Ok(entry.map(Conversation::queued));
            }
            // Another load may have ended since the first look at memory.
            if let Some(entry) = self.memory.get_fresh(key.as_str()) {
                return Ok(Some(Conversation::fresh(entry)));
            }
            let mut load = match self.check_breaker().and_then(|()| self.load(key)) {
                Ok(load) => load,
                Err(e) => return self.stale_fallback(key).await.map(|(found, _)| found).ok_or(e),
            };
            let loaded = tokio::select! {
                biased;
                loaded = load.wait() => loaded.and_then(|loaded| loaded),
                Some((found, _)) = self.stale_fallback_after_soft_timeout(key) => return Ok(found),
            };
            match loaded {
                // The record expired on its way. Only the store knows whether another writer renewed it.
                Ok(Admission::Cached(entry)) if !self.is_live(&entry) => {}
                // This caller joined an old load. The result may be older than `Fresh` allows, so the loop
                // loads again.
                Ok(Admission::Cached(_)) if !self.memory.is_recent(load.started_at, requested_at) => {}
                Ok(Admission::Absent(_)) if !self.memory.is_recent_absence(load.started_at, requested_at) => {
                }
                Ok(Admission::Cached(entry)) => return Ok(Some(Conversation::fresh(entry.touched()))),
                Ok(Admission::Absent(_)) => return Ok(None),
                Ok(Admission::BelowFloor) => {}
                // The queued write is the newest. If it has expired, the stored record that it replaces
                // counts as absent too.
                Ok(Admission::QueuedIsNewer) => match self.lookup_queued(key).await? {
                    QueueLookup::Newest(entry, _) => return Ok(entry.map(Conversation::queued)),
                    QueueLookup::Expired(_) => return Ok(None),
                    QueueLookup::NotQueued => continue,
                },
                // No error says that the conversation is absent, so a copy is a correct answer (I14).
                Err(e) => return self.stale_fallback(key).await.map(|(found, _)| found).ok_or(e),
            }
            // The version that made this load stale may be in memory, validated during this call.
            let is_current = |entry: &Arc<CacheEntry>| {
                self.memory.is_fresh(entry, Moment::now()) || entry.validated_at >= requested_at
            };
            if let Some(entry) = self.memory.get_stale(key).filter(is_current) {
                return Ok(Some(Conversation::fresh(entry)));
            }
        }
        self.stale_fallback(key).await.map(|(found, _)| found).ok_or_else(|| changes_too_fast(key))
    }

    /// Reads the stale fallback, in this order: queued write, memory, replica. Expired entries are skipped.
    ///
    /// The lookup runs at return time. So the result is never older than a write that was acknowledged
    /// meanwhile (I16). A queued remove gives no conversation. The version is the one that an update starts
    /// from.
    async fn stale_fallback(&self, key: &Key) -> Option<(Option<Conversation>, Version)> {
        let in_memory = || self.memory.get_stale(key).map(|entry| versioned(self.to_conversation(entry)));
        for _ in 0..MAX_LOOKUPS {
            match self.lookup_queued(key).await {
                Ok(QueueLookup::Newest(entry, version)) => {
                    return Some((entry.map(Conversation::queued), version));
                }
                Ok(QueueLookup::NotQueued) => {}
                Ok(QueueLookup::Expired(_)) | Err(_) => return None,
            }
            if let Some(found) = in_memory() {
                return Some(found);
            }
            match self.lookup_replica(key).await {
                ReplicaLookup::Found(found) => return Some(versioned(found)),
                // A load may have filled memory meanwhile.
                ReplicaLookup::Missing => return in_memory(),
                ReplicaLookup::Raced => {}
            }
        }
        None
    }

    async fn stale_fallback_after_soft_timeout(&self, key: &Key) -> Option<(Option<Conversation>, Version)> {
        tokio::time::sleep(self.limits.soft_timeout).await;
        self.stale_fallback(key).await
    }

    /// Reads the base value of an update.
    ///
    /// The sources are memory (if `may_trust_memory`), the queue and the store. In an outage the stale
    /// fallback answers, if updates may be queued.
    pub(super) async fn read_for_update(
        self: &Arc<Self>,
        key: &Key,
        mut may_trust_memory: bool,
    ) -> Result<(Option<Conversation>, Version)> {
        let start = Instant::now();
        for _ in (0..MAX_LOOKUPS).take_while(|_| start.elapsed() < MAX_LOOKUP_TIME) {
            if may_trust_memory && let Some(entry) = self.memory.get_fresh(key.as_str()) {
                return Ok(versioned(Conversation::fresh(entry)));
            }
            if may_trust_memory && let Some(version) = self.memory.absent(key) {
                return Ok((None, version));
            }
            if let QueueLookup::Newest(entry, version) = self.lookup_queued(key).await? {
                return Ok((entry.map(Conversation::queued), version));
            }
            let loaded = match self.check_breaker().and_then(|()| self.load(key)) {
                Ok(mut load) => tokio::select! {
                    biased;
                    loaded = load.wait() => loaded.and_then(|loaded| loaded),
                    Some(found) = self.stale_fallback_after_soft_timeout(key), if self.queue_if_enabled().is_some() => {
                        return Ok(found);
                    }
                },
                Err(e) => Err(e),
            };
            match loaded {
                Ok(Admission::Cached(entry)) if !self.is_live(&entry) => {}
                Ok(Admission::Cached(entry)) => return Ok(versioned(Conversation::fresh(entry))),
                Ok(Admission::Absent(version)) => return Ok((None, version)),
                // The writer that made this load stale has left its version in memory.
                Ok(Admission::BelowFloor) => may_trust_memory = true,
                Ok(Admission::QueuedIsNewer) => {
                    if let QueueLookup::Expired(version) = self.lookup_queued(key).await? {
                        return Ok((None, version));
                    }
                }
                Err(e) if self.queue_if_enabled().is_some() && can_enqueue(&e) => {
                    return self.stale_fallback(key).await.ok_or(e);
                }
                Err(e) => return Err(e),
            }
        }
        Err(changes_too_fast(key))
    }

    /// Returns true if the record did not expire on its way.
    pub(super) fn is_live(&self, entry: &CacheEntry) -> bool {
        entry.record.is_live(self.store.clock().now())
    }

    /// Joins or starts the load of a conversation.
    fn load(
        self: &Arc<Self>,
        key: &Key,
    ) -> Result<crate::cache::single_flight::LoadHandle<Result<Admission>>> {
        let (shared, wanted) = (Arc::clone(self), key.clone());
        self.single_flight.join_or_start(key, &self.floors, |token| async move {
            shared.load_into_memory(&wanted, &token).await
        })
    }

    /// Loads a conversation, and hands the result to the outage file and then to memory (I1, I3).
    async fn load_into_memory(&self, key: &Key, token: &ReadToken) -> Result<Admission> {
        let requested_at = Moment::now();
        let cached = self.memory.peek(key);
        let known_version = cached.as_ref().map(|cached| cached.record.version);
        let loaded = self.store.load(&[LoadRequest { key: key.clone(), if_none_match: known_version }]).await;
        let loaded = self.note(Access::Read, loaded)?.pop();
        // The outage file comes before memory (I3). A reader that finds the entry evicted then finds the
        // copy.
        let observation = match (loaded, cached) {
            (Some(Loaded::Found(record)), _) => {
                self.save_copies([Arc::clone(&record)], token, requested_at, CopyRank::Used).await;
                Observation::Found(record)
            }
            (Some(Loaded::NotModified), Some(cached)) => {
                if let Some(file) = &self.file {
                    file.confirm(key, cached.record.version, self.store.clock().at(requested_at)).await;
                }
                Observation::Found(Arc::clone(&cached.record))
            }
            (Some(Loaded::Absent(version)), _) => {
                self.save_copies(
                    [Arc::new(Record::tombstone(key.clone(), version))],
                    token,
                    requested_at,
                    CopyRank::Used,
                )
                .await;
                Observation::Absent(version)
            }
            (None | Some(Loaded::NotModified), _) => {
                let message = format!("the store returned no result for conversation {key}");
                return Err(Error::new(ErrorKind::SchemaOutdated, message).with_key(key.as_str()));
            }
        };
        let admission = self.memory.admit(key, token, requested_at, observation);
        if matches!(admission, Admission::BelowFloor) {
            self.metrics.stale_loads.increment(1);
        }
        Ok(admission)
    }
}

/// Pairs a found conversation with its version.
fn versioned(found: Conversation) -> (Option<Conversation>, Version) {
    let version = found.version();
    (Some(found), version)
}
