//! The write path: the store, the outage file, memory, and then the caller (I1).
//!
//! A write runs in a task of its own. The task sends it to the store. After the soft timeout, or in an
//! outage, the task queues it on the local disk and answers `Queued`. A request in flight continues in the
//! background, and its result completes the queued write.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tracing::Instrument;

use crate::cache::key_lock::KeyLockGuard;
use crate::cache::memory::Observation;
use crate::cache::outage::can_enqueue;
use crate::cache::put::PendingWrite;
use crate::cache::read_token::ReadToken;
use crate::cache::write_progress::{Responder, SentWrite, WriteCounter, WriteProgress};
use crate::cache::{OutageFile, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::outcome::WriteOutcome;
use crate::model::record::Record;
use crate::model::version::{MAX_CLOCK_SKEW, Version};
use crate::observe::metrics::WriteResult;
use crate::resilience::tasks;
use crate::store::{Applied, Write};

/// The unit of the write budget.
pub(super) const KIB: usize = 1024;
/// The limit on new versions of one write after clock corrections (I12).
const MAX_VERSIONS: usize = 4;
/// The wait beyond the computed time until the store accepts a version that was in its future.
const FUTURE_MARGIN: Duration = Duration::from_millis(50);

impl Shared {
    /// Writes, and counts the result. An update holds its key lock until the caller could be answered, even if
    /// the caller goes. After `Queued` the request may still run.
    pub(super) async fn write(
        self: &Arc<Self>,
        pending_write: PendingWrite,
        key_lock: Option<Arc<KeyLockGuard>>,
    ) -> Result<WriteOutcome> {
        let result = self.try_write(pending_write, key_lock).await.map(|outcome| self.acknowledged(outcome));
        self.metrics.wrote(match &result {
            Ok(WriteOutcome::Stored) => WriteResult::Stored,
            Ok(WriteOutcome::Superseded) => WriteResult::Superseded,
            Ok(WriteOutcome::Queued) => WriteResult::Queued,
            Ok(WriteOutcome::Volatile) => WriteResult::Volatile,
            Err(_) => WriteResult::Failed,
        });
        result
    }

    /// Returns the outcome for the caller. The backend `memory` stores nothing beyond the process.
    pub(super) fn acknowledged(&self, outcome: WriteOutcome) -> WriteOutcome {
        match outcome {
            WriteOutcome::Stored if self.backend == "memory" => WriteOutcome::Volatile,
            other => other,
        }
    }

    /// Writes in a task of its own, so that the write completes even if the caller goes.
    async fn try_write(
        self: &Arc<Self>,
        pending_write: PendingWrite,
        key_lock: Option<Arc<KeyLockGuard>>,
    ) -> Result<WriteOutcome> {
        // The write is counted before the check. So a shutdown sees this write, or this write sees the
        // shutdown.
        let counter = WriteCounter::begin(&self.writing);
        self.check_not_shut_down()?;
        if let Some(metadata) = &pending_write.options.metadata {
            self.check_size("the metadata", metadata)?;
        }
        if self.queue_if_enabled().is_none() {
            self.check_breaker()?;
        }
        let budget = self.acquire_budget(&pending_write).await?;
        let (shared, key) = (Arc::clone(self), pending_write.key.clone());
        let (sender, receiver) = oneshot::channel();
        let responder = Responder { sender, _key_lock: key_lock };
        let task = async move {
            shared.execute(pending_write, responder).await;
            drop((budget, counter));
        };
        let task = tasks::spawn(task.in_current_span());
        match receiver.await {
            Ok(result) => result,
            Err(_) => {
                let cause = task.await.err();
                // The runtime shuts down, or the task panicked. The store may hold the write (I6).
                self.memory.invalidate_below(&key, self.store.clock().issue().version);
                let message = format!("the task that wrote conversation {key} ended early");
                let error = Error::new(ErrorKind::Unavailable, message);
                let error = error.with_key(key.as_str()).with_outcome_unknown();
                Err(cause.map_or(error.clone(), |cause| error.with_source(cause)))
            }
        }
    }

    /// Takes a share of the write budget. An abandoned write keeps its share until it ends.
    async fn acquire_budget(&self, pending_write: &PendingWrite) -> Result<OwnedSemaphorePermit> {
        let value = pending_write.value.as_ref().map_or(0, Json::len);
        let metadata = pending_write.options.metadata.as_ref().map_or(0, Json::len);
        let max_kib = self.limits.in_flight_bytes / KIB;
        let kib = u32::try_from((1 + (value + metadata) / KIB).min(max_kib)).unwrap_or(u32::MAX);
        tokio::select! {
            budget = Arc::clone(&self.write_budget).acquire_many_owned(kib) => budget.map_err(|_| super::closed()),
            () = tokio::time::sleep(self.limits.soft_timeout) => {
                let message = format!("{max_kib} KiB of writes are in flight");
                Err(Error::new(ErrorKind::Overloaded, message).with_retry_after(self.limits.soft_timeout))
            }
        }
    }

    /// Writes to the store or, in an outage, to the queue.
    async fn execute(&self, pending_write: PendingWrite, responder: Responder) {
        let Some(file) = self.queue_if_enabled() else {
            return responder.respond(self.write_to_store(pending_write, &WriteProgress::default()).await);
        };
        // An update of a queued write must follow it in the queue, because the store does not have its
        // base.
        let extends_queue = pending_write.if_version.is_some()
            && pending_write.if_version == self.queue_index.newest(&pending_write.key);
        if self.is_breaker_closed() && !extends_queue {
            return self.write_with_soft_timeout(file, pending_write, responder).await;
        }
        let (clock, token) = (self.store.clock(), Arc::new(self.floors.token()));
        let issued = clock.issue();
        let record = pending_write.record(issued.version, issued.shown, self.limits.ttl).into();
        responder.respond(self.enqueue(file, &record, issued, pending_write.if_version, token, false).await);
    }

    /// Writes to the store. After the soft timeout, queues the write while the request continues.
    async fn write_with_soft_timeout(
        &self,
        file: &OutageFile,
        pending_write: PendingWrite,
        responder: Responder,
    ) {
        // The token is older than the version, and lives until the index marks the write (I2).
        let token = Arc::new(self.floors.token());
        let progress = WriteProgress::default();
        let mut writing = std::pin::pin!(self.write_to_store(pending_write, &progress));
        tokio::select! {
            biased;
            result = &mut writing => return responder.respond(match result {
                Err(e) if can_enqueue(&e) => self.enqueue_after_failure(file, &progress, token, &e).await,
                result => result,
            }),
            () = tokio::time::sleep(self.limits.soft_timeout) => {}
        }
        let Some(sent) = self.last_sent(&progress) else { return responder.respond(writing.await) };
        let enqueue_error =
            match self.enqueue(file, &sent.record, sent.issued, sent.if_version, token, true).await {
                Ok(outcome) => {
                    progress.is_queued.store(true, Relaxed);
                    responder.respond(Ok(outcome));
                    // The request still runs. `finish_late` takes its result to memory and queue.
                    return drop(writing.await);
                }
                Err(enqueue_error) => enqueue_error,
            };
        responder.respond(match writing.await {
            Err(e) if can_enqueue(&e) => Err(enqueue_failed(enqueue_error, &e)),
            result => result,
        });
    }

    /// Returns the write as the queue must get it.
    ///
    /// It gets a new version if a clock sync has corrected the clock, or the clock has jumped, since the
    /// request (I8).
    fn last_sent(&self, progress: &WriteProgress) -> Option<SentWrite> {
        let sent = progress.last_sent()?;
        let clock = self.store.clock();
        if sent.issued.is_comparable_to(clock.moment()) && !clock.is_out_of_tolerance(&sent.issued) {
            return Some(sent);
        }
        let issued = clock.issue();
        let shift = issued.shown_at(sent.called_at).0 - sent.issued.shown_at(sent.called_at).0;
        Some(SentWrite { record: sent.record.with_version(issued.version, shift).into(), issued, ..sent })
    }

    /// Queues a write that the store could not take.
    async fn enqueue_after_failure(
        &self,
        file: &OutageFile,
        progress: &WriteProgress,
        token: Arc<ReadToken>,
        failure: &Error,
    ) -> Result<WriteOutcome> {
        let Some(sent) = self.last_sent(progress) else { return Err(failure.clone()) };
        let is_dispatched = failure.outcome_unknown();
        let queued =
            self.enqueue(file, &sent.record, sent.issued, sent.if_version, token, is_dispatched).await;
        queued.map_err(|enqueue_error| enqueue_failed(enqueue_error, failure))
    }

    /// Writes to the store, and hands the result to the outage file and to memory (I1).
    ///
    /// A response can show that this clock was wrong. A version of the wrong clock must neither win nor lose
    /// by its error, and must not expire at the wrong time. So the loop sends the write again with a new
    /// version.
    async fn write_to_store(
        &self,
        mut pending_write: PendingWrite,
        progress: &WriteProgress,
    ) -> Result<WriteOutcome> {
        let clock = self.store.clock();
        let called_at = clock.moment();
        let mut is_stored = false;
        for versions_left in (0..MAX_VERSIONS).rev() {
            // The queue holds the write under its last version. A sent write keeps its version.
            if progress.is_queued.load(Relaxed) {
                return Ok(WriteOutcome::Queued);
            }
            // The token is older than the version and the request (I2).
            let (token, if_version) = (self.floors.token(), pending_write.if_version);
            let issued = clock.issue();
            let record =
                Arc::new(pending_write.record(issued.version, issued.shown_at(called_at), self.limits.ttl));
            progress.set_last_sent(SentWrite { record: Arc::clone(&record), if_version, issued, called_at });
            progress
                .add_direct_write(self.queue_index.begin_direct_write(&pending_write.key, issued.version));
            let applied = self.send(&record, if_version).await;
            let applied = applied.map_err(|e| if is_stored { e.with_outcome_unknown() } else { e })?;
            let is_out_of_tolerance = clock.is_out_of_tolerance(&issued);
            if progress.is_queued.load(Relaxed) {
                return self.finish_late(&record, called_at, applied, is_out_of_tolerance).await;
            }
            match applied {
                Applied::Stored if is_out_of_tolerance && versions_left > 0 => {
                    is_stored = true;
                    self.memory.invalidate_below(&pending_write.key, issued.version);
                    // Another writer may have built on the stored version. The condition protects that
                    // write.
                    pending_write.if_version = Some(issued.version);
                }
                Applied::Superseded(version) | Applied::Conflict(version) if is_stored => {
                    // The store took the write, and another writer has built on it.
                    self.supersede(&pending_write.key, version).await;
                    return Ok(WriteOutcome::Stored);
                }
                Applied::Superseded(_) | Applied::TooOld if is_out_of_tolerance => {}
                Applied::VersionInFuture => self.wait_for_version(issued.version).await,
                applied => return self.finish(&record, if_version, &token, called_at, applied).await,
            }
        }
        let key = &pending_write.key;
        let message =
            format!("conversation {key} was not written: the clocks of the store and this process differ");
        let error = Error::new(ErrorKind::Unavailable, message).with_key(key.as_str());
        let error = error.with_remedy("synchronise this machine's clock").with_retry_after(MAX_CLOCK_SKEW);
        Err(if is_stored { error.with_outcome_unknown() } else { error })
    }

    /// Waits until the store accepts a version that was in its future.
    ///
    /// A version is a little ahead after this clock has passed a version that was ahead. A larger lead comes
    /// from a wrong clock, which the response has just corrected. So no wait is needed.
    async fn wait_for_version(&self, version: Version) {
        let now = self.store.clock().now_for_versions();
        let excess = version.at().since(now.plus(MAX_CLOCK_SKEW));
        if excess <= MAX_CLOCK_SKEW {
            tokio::time::sleep(excess + FUTURE_MARGIN).await;
        }
    }

    /// Sends one version of the write. The outage file records the version first (I7).
    async fn send(&self, record: &Arc<Record>, if_version: Option<Version>) -> Result<Applied> {
        let Some(file) = self.queue_if_enabled() else { return self.apply(record, if_version).await };
        file.record_attempt(&record.key, record.version, if_version.is_none()).await;
        let applied = self.apply(record, if_version).await;
        // The store does not have this version, so a restarted process must not take it for its own.
        if applied.as_ref().is_err_and(|e| !e.outcome_unknown()) {
            file.delete_attempt(&record.key, record.version).await;
        }
        applied
    }

    async fn apply(&self, record: &Arc<Record>, if_version: Option<Version>) -> Result<Applied> {
        let write = Write { record: Arc::clone(record), if_version, is_retry: false };
        let applied = self.store.apply(&[write]).await;
        self.alert.wrote(applied.as_deref());
        let applied = match applied {
            Ok(applied) => applied.first().copied(),
            Err(e) => {
                if e.outcome_unknown() {
                    // The store may hold the write, so memory must not answer with an older version (I6).
                    self.memory.invalidate_below(&record.key, record.version);
                }
                // Without a queue, each caller gets the error of its own record. With a queue, failures of
                // several records in a row count as an outage of writes.
                let may_be_common = e.may_affect_one_record() && self.queue_if_enabled().is_some();
                let common = may_be_common.then(|| self.alert.note_record_failure(&record.key, &e));
                return Err(common.flatten().unwrap_or(e));
            }
        };
        applied.ok_or_else(|| {
            // The store may hold the write (I6).
            self.memory.invalidate_below(&record.key, record.version);
            let message = format!("the store returned no result for conversation {}", record.key);
            let error = Error::new(ErrorKind::SchemaOutdated, message);
            error.with_key(record.key.as_str()).with_outcome_unknown()
        })
    }

    /// Turns the store's verdict into changes of memory and into the result for the caller.
    async fn finish(
        &self,
        record: &Arc<Record>,
        if_version: Option<Version>,
        token: &ReadToken,
        requested_at: Moment,
        applied: Applied,
    ) -> Result<WriteOutcome> {
        let key = &record.key;
        if let Some(version) = superseding_version(applied) {
            self.supersede(key, version).await;
        }
        let error = |kind, reason: &str| {
            Error::new(kind, format!("conversation {key} was not written: {reason}")).with_key(key.as_str())
        };
        match applied {
            Applied::Stored => {
                // The outage file comes before memory (I3). After an eviction, the replica must not return
                // an older version than memory did (I16).
                self.save_own_copy(record, if_version).await?;
                self.memory.admit(key, token, requested_at, Observation::from(Arc::clone(record)));
                Ok(WriteOutcome::Stored)
            }
            Applied::Superseded(_) => Ok(WriteOutcome::Superseded),
            Applied::Conflict(_) => Err(conflict(key)),
            Applied::Indeterminate(_) => {
                let reason = "the store lost a response, and other writers changed it too often since";
                Err(error(ErrorKind::Unavailable, reason).with_outcome_unknown())
            }
            Applied::TooOld | Applied::VersionInFuture => {
                let reason = "the store does not accept a version of this clock";
                Err(error(ErrorKind::Rejected, reason).with_remedy("synchronise this machine's clock"))
            }
        }
    }

    /// Handles the store's verdict on a write that was queued meanwhile.
    ///
    /// A stored write completes the queued write. Replay decides in all other cases.
    async fn finish_late(
        &self,
        record: &Arc<Record>,
        requested_at: Moment,
        applied: Applied,
        is_out_of_tolerance: bool,
    ) -> Result<WriteOutcome> {
        if let Some(version) = superseding_version(applied) {
            self.supersede(&record.key, version).await;
        }
        if applied == Applied::Stored
            && !is_out_of_tolerance
            && let Some(file) = &self.file
        {
            self.ack_late_write(file, record, requested_at).await;
        }
        Ok(WriteOutcome::Queued)
    }
}

/// Returns the version against which a write lost.
fn superseding_version(applied: Applied) -> Option<Version> {
    match applied {
        Applied::Superseded(version) | Applied::Conflict(version) | Applied::Indeterminate(version) => {
            Some(version)
        }
        Applied::Stored | Applied::VersionInFuture | Applied::TooOld => None,
    }
}

/// Creates the error for a write that the store and then the queue refused. It keeps `outcome_unknown` of
/// the first failure.
fn enqueue_failed(enqueue_error: Error, failure: &Error) -> Error {
    if !failure.outcome_unknown() {
        return enqueue_error;
    }
    let message = format!("{}; the store may hold the write nevertheless", enqueue_error.message());
    enqueue_error.with_message(message).with_outcome_unknown()
}

pub(super) fn conflict(key: &Key) -> Error {
    let message = format!("another writer changed conversation {key} meanwhile");
    Error::new(ErrorKind::Conflict, message).with_key(key.as_str())
}
