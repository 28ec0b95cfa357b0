//! The cache's use of the outage file: writes into the queue, reads from queue and replica.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cache::memory::CacheEntry;
use crate::cache::read_token::ReadToken;
use crate::cache::{Conversation, OnOutage, OutageFile, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::IssuedVersion;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::outcome::WriteOutcome;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::outage::{CopyRank, EnqueueOutcome, NewQueuedWrite, ReplicaRecord};

/// The limit on lookups of one call (I12). Each further lookup needs a change of the conversation during the
/// last one.
pub(super) const MAX_LOOKUPS: usize = 64;
/// The limit on the time of these lookups.
pub(super) const MAX_LOOKUP_TIME: Duration = Duration::from_secs(15);
/// The limit on the wait until the queue index follows a change of the outage file.
const MAX_INDEX_LAG: Duration = Duration::from_secs(5);
/// The limit on new versions of one write, because an older queued write has a higher version (I12).
const MAX_REORDERS: usize = 16;
/// The wait that the errors of this file recommend before a retry.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The result of a lookup in the queue.
pub(super) enum QueueLookup {
    /// The queue has no write of the conversation.
    NotQueued,
    /// The newest write, with its version. A remove has no entry.
    Newest(Option<Arc<CacheEntry>>, Version),
    /// The newest write, whose time to live is over. Another daemon may have renewed the conversation since.
    Expired(Version),
}

/// The result of a lookup in the replica.
pub(super) enum ReplicaLookup {
    /// An unexpired copy.
    Found(Conversation),
    /// The replica has no unexpired copy, or cannot be read.
    Missing,
    /// The conversation changed during the lookup. The caller looks again.
    Raced,
}

impl Shared {
    /// Returns the outage file if the settings let a write enter its queue.
    pub(super) fn queue_if_enabled(&self) -> Option<&Arc<OutageFile>> {
        self.file.as_ref().filter(|_| self.limits.on_outage == OnOutage::Queue)
    }

    /// Queues a write. From then on, the write is the newest of its conversation.
    ///
    /// `Queued` means that the outage file has synced the write to the local disk (I4).
    pub(super) async fn enqueue(
        &self,
        file: &OutageFile,
        record: &Arc<Record>,
        mut issued: IssuedVersion,
        if_version: Option<Version>,
        token: Arc<ReadToken>,
        is_dispatched: bool,
    ) -> Result<WriteOutcome> {
        let (mut record, clock) = (Arc::clone(record), self.store.clock());
        for _ in 0..MAX_REORDERS {
            // A call saw a newer write in the store while this write was in flight. A provisional version
            // cannot be compared yet (I8).
            if issued.unsynced.is_none()
                && token.confirmed(&record.key).is_some_and(|seen| seen > record.version)
            {
                return superseded(&record.key, if_version);
            }
            let IssuedVersion { shown: issued_at, unsynced, .. } = issued;
            let write = NewQueuedWrite {
                record: Arc::clone(&record),
                base: if_version,
                is_dispatched,
                issued_at,
                unsynced,
            };
            let enqueued = file.enqueue(write, self.on_enqueue_commit(&record, &token)).await;
            *self.last_enqueue_error() = enqueued.as_ref().err().cloned();
            return match enqueued? {
                EnqueueOutcome::Queued { .. } => Ok(WriteOutcome::Queued),
                EnqueueOutcome::AlreadyStored => Ok(WriteOutcome::Stored),
                // The older queued write has a higher version. This write gets a version above it, because
                // the older write may yet lose against another daemon, and this write must not be lost
                // with it.
                EnqueueOutcome::Reordered(other) => {
                    let next = clock.issue_after(other);
                    record = record.with_version(next.version, next.shown.0 - issued.shown.0).into();
                    issued = next;
                    continue;
                }
                // This is not `Superseded`: an update would then run again, although the store may hold it.
                EnqueueOutcome::Conflict => Err(super::write::conflict(&record.key)),
                EnqueueOutcome::SupersededInStore(_) | EnqueueOutcome::SupersededInQueue => {
                    superseded(&record.key, if_version)
                }
            };
        }
        Err(changes_too_fast(&record.key))
    }

    /// Returns the callback that takes a committed enqueue to memory (I3).
    fn on_enqueue_commit(
        &self,
        record: &Arc<Record>,
        token: &Arc<ReadToken>,
    ) -> impl FnOnce(EnqueueOutcome) + Send + 'static {
        let (memory, record, token) = (Arc::clone(&self.memory), Arc::clone(record), Arc::clone(token));
        move |enqueued| match enqueued {
            EnqueueOutcome::Queued { unsynced, queued_at } => {
                memory.admit_queued(&record, &token, unsynced, queued_at);
            }
            // Memory may not know the stored version yet, or may have evicted it.
            EnqueueOutcome::SupersededInStore(version) => memory.invalidate_superseded(&record.key, version),
            EnqueueOutcome::AlreadyStored => memory.invalidate_superseded(&record.key, record.version),
            _ => {}
        }
    }

    /// Looks up the newest queued write of a conversation, in memory and then on disk.
    pub(super) async fn lookup_queued(&self, key: &Key) -> Result<QueueLookup> {
        let Some(file) = &self.file else { return Ok(QueueLookup::NotQueued) };
        let deadline = Instant::now() + MAX_INDEX_LAG;
        for _ in 0..MAX_LOOKUPS {
            let Some(version) = self.queue_index.newest(key) else { return Ok(QueueLookup::NotQueued) };
            if let Some(entry) = self.memory.get_queued(key) {
                return Ok(self.check_expiry(entry, version));
            }
            let row = file.queued(key).await?.filter(|row| row.record.version == version);
            match row {
                // Replay has just stored the write, and memory does not know yet.
                Some(row) if !row.is_queued => {
                    self.memory.mark_stored(&row.record, Moment::now(), false);
                    continue;
                }
                Some(row) if row.record.value.is_none() => return Ok(QueueLookup::Newest(None, version)),
                Some(row) => {
                    let entry = self.memory.admit_queued_from_disk(&row.record, row.unsynced);
                    return Ok(self.check_expiry(entry, version));
                }
                None => {}
            }
            // The file replaces or completes the write at this moment. The index follows.
            tokio::select! {
                () = self.queue_index.wait_until(|queue_index| queue_index.newest(key) != Some(version)) => {}
                () = tokio::time::sleep_until(deadline.into()) => break,
            }
        }
        let message =
            format!("the outage file and memory disagree on the queued write of conversation {key}");
        tracing::error!("queue lookup failed: {message}; the call fails");
        let error = Error::new(ErrorKind::Overloaded, message).with_key(key.as_str());
        Err(error.with_retry_after(RETRY_AFTER))
    }

    fn check_expiry(&self, entry: Arc<CacheEntry>, version: Version) -> QueueLookup {
        if self.is_live(&entry) {
            QueueLookup::Newest(Some(entry), version)
        } else {
            QueueLookup::Expired(version)
        }
    }

    /// Looks up the last known copy of a conversation in the replica.
    pub(super) async fn lookup_replica(&self, key: &Key) -> ReplicaLookup {
        let Some(file) = &self.file else { return ReplicaLookup::Missing };
        // The token is older than the read of the file, so a change during the read shows (I2).
        let token = self.floors.token();
        let copy = file.lookup_replica(key).await.inspect_err(|error| {
            tracing::warn!(%error, "cannot read the replica; a read in an outage was answered without it");
        });
        let Ok(Some((record, confirmed_at))) = copy else { return ReplicaLookup::Missing };
        let now = self.store.clock().now();
        if !record.is_live(now) {
            return ReplicaLookup::Missing;
        }
        match self.memory.admit_replica(&token, record, now.since(confirmed_at), true) {
            Some(entry) if entry.record.is_live(now) => ReplicaLookup::Found(self.to_conversation(entry)),
            Some(_) => ReplicaLookup::Missing,
            None => ReplicaLookup::Raced,
        }
    }

    /// Turns an entry of the stale fallback into a conversation. The entry may be fresh by now.
    pub(super) fn to_conversation(&self, entry: Arc<CacheEntry>) -> Conversation {
        let is_fresh = self.memory.is_fresh(&entry, Moment::now());
        if is_fresh { Conversation::fresh(entry) } else { Conversation::stale(entry) }
    }

    /// Saves copies of records that a call saw in the store, before the call returns them.
    ///
    /// The call took `token`, and began at `requested_at`. Stale records are not saved, because the replica
    /// may have dropped the row of the newer version already.
    pub(super) async fn save_copies(
        &self,
        records: impl IntoIterator<Item = Arc<Record>>,
        token: &ReadToken,
        requested_at: Moment,
        rank: CopyRank,
    ) {
        let is_current = |record: &Arc<Record>| !token.is_superseded(&record.key, record.version);
        self.save_copies_of(records.into_iter().filter(is_current), requested_at, rank).await;
    }

    /// Promotes the copies of listed conversations that callers have read since the last call.
    pub(super) async fn save_first_reads(&self) {
        let copies = self.memory.drain_first_reads();
        if let Some(file) = &self.file {
            let memory = Arc::clone(&self.memory);
            file.save_copies(copies, move |completed| memory.mark_completed(completed)).await;
        }
    }

    async fn save_copies_of(
        &self,
        records: impl Iterator<Item = Arc<Record>>,
        requested_at: Moment,
        rank: CopyRank,
    ) {
        let Some(file) = &self.file else { return };
        let confirmed_at = self.store.clock().at(requested_at);
        let copies = records.map(|record| ReplicaRecord { record, confirmed_at, is_own: false, rank });
        let memory = Arc::clone(&self.memory);
        file.save_copies(copies.collect(), move |completed| memory.mark_completed(completed)).await;
    }

    /// Invalidates everything older than `version` in memory and in the outage file.
    ///
    /// The store was seen to hold this version, but its value is unknown.
    pub(super) async fn supersede(&self, key: &Key, version: Version) {
        let tombstone = Arc::new(Record::tombstone(key.clone(), version));
        // The file comes before memory: after an eviction, no older copy may come back (I16).
        self.save_copies_of(std::iter::once(tombstone), Moment::now(), CopyRank::Used).await;
        self.memory.invalidate_superseded(key, version);
    }

    /// Saves the copy of a write of this handle that the store has taken.
    ///
    /// A write without a condition also replaces older queued writes of its conversation.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`] if the outage file is closed. The next start in an outage would not find the
    /// write, so the call does not acknowledge it.
    pub(super) async fn save_own_copy(
        &self,
        record: &Arc<Record>,
        if_version: Option<Version>,
    ) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let copy = ReplicaRecord {
            record: Arc::clone(record),
            confirmed_at: self.store.clock().now(),
            is_own: if_version.is_none(),
            rank: CopyRank::Used,
        };
        let closed = |_| {
            let message = format!("the cache was shut down during the write of conversation {}", record.key);
            Error::new(ErrorKind::Closed, message).with_key(record.key.as_str()).with_outcome_unknown()
        };
        let memory = Arc::clone(&self.memory);
        file.save_own_copy(copy, move |completed| memory.mark_completed(completed)).await.map_err(closed)
    }

    /// Completes a queued write after its request, which outlived the soft timeout, has stored it.
    pub(super) async fn ack_late_write(&self, file: &OutageFile, record: &Arc<Record>, requested_at: Moment) {
        let completed = vec![(record.key.clone(), record.version, crate::outage::ReplayOutcome::Stored)];
        match file.complete(completed).await {
            Ok(_) => self.memory.mark_stored(record, requested_at, true),
            Err(error) => {
                tracing::debug!(%error, "a late write was stored but not completed; replay sends it again");
            }
        }
    }

    /// Waits until the queue has no write of a conversation, at most for the soft timeout.
    ///
    /// An update can then start from the stored record. In an outage, the wait is pointless.
    pub(super) async fn wait_for_queue(&self, key: &Key) {
        if self.queue_index.contains(key) && self.is_breaker_closed() {
            tokio::select! {
                () = self.queue_index.wait_until(|queue_index| !queue_index.contains(key)) => {}
                () = tokio::time::sleep(self.limits.soft_timeout) => {}
            }
        }
    }

    /// Waits until the queue is empty, or until the store is unreachable.
    ///
    /// If the queue has writes, a probe first finds out whether the store is reachable.
    pub(super) async fn drain(&self) {
        let outage_begins = async {
            match self.store.breaker() {
                Some(breaker) => breaker.wait_open().await,
                None => std::future::pending().await,
            }
        };
        let is_breaker_closed = match self.store.breaker() {
            Some(breaker) if self.queue_index.len() > 0 => breaker.probe_now().await,
            _ => self.is_breaker_closed(),
        };
        if is_breaker_closed {
            tokio::select! {
                () = self.queue_index.wait_until(|queue_index| queue_index.len() == 0) => {}
                () = outage_begins => {}
            }
        }
    }

    /// Stops replay and warm-up, and closes the outage file for other processes to open.
    pub(super) async fn close_outage_file(&self) {
        self.replay.iter().for_each(tokio::task::AbortHandle::abort);
        self.warming.abort();
        if let Some(file) = &self.file
            && let Err(error) = file.close().await
        {
            tracing::warn!(%error, "cannot close the outage file; the next start reads its log again");
        }
    }
}

/// Creates the error of a call that reached its limit of lookups.
pub(super) fn changes_too_fast(key: &Key) -> Error {
    let message = format!("conversation {key} changed during each lookup");
    Error::new(ErrorKind::Overloaded, message).with_key(key.as_str()).with_retry_after(RETRY_AFTER)
}

/// Returns the result of a write that is older than the stored version.
fn superseded(key: &Key, if_version: Option<Version>) -> Result<WriteOutcome> {
    match if_version {
        Some(_) => Err(super::write::conflict(key)),
        None => Ok(WriteOutcome::Superseded),
    }
}

/// Returns true if a write that failed so may enter the queue.
///
/// Such a failure does not concern the record: the store is unreachable, rejects the key, or lacks the
/// migrations.
pub(super) fn can_enqueue(error: &Error) -> bool {
    error.is_outage() || matches!(error.kind(), ErrorKind::Unauthorized | ErrorKind::SchemaOutdated)
}
