//! The write path: the store, the outage file, memory, and then the caller (I1).
//!
//! A [`WriteTask`] owns a write from its first attempt to the acknowledgement. After the soft timeout, or in an outage, the
//! task queues the write on the local disk and answers `Queued`. A request in flight continues, and its late answer settles the
//! queued write. A write keeps its version for ever, so the store recognises it.
//!
//! The meaning of each verdict (`WriteTask::conclude`):
//!
//! | verdict | outage file and memory | a write that is queued by now | caller |
//! |---|---|---|---|
//! | `Stored` | hold the value | is settled | `Stored` |
//! | `Superseded(v)` | drop everything older than `v` | is settled | `Superseded` |
//! | `Conflict(v)` | drop everything older than `v` | is settled | `Conflict`; an update runs again |
//! | `VersionInFuture` | | replay sends it again | the task waits, then as an outage |
//! | `TooOld` | | is settled | `Rejected` |
//! | an outage | drop older values if the outcome is unknown (I6) | stays | `Queued`, else the error |
//! | another error | drop older values if the outcome is unknown (I6) | stays | the error |

mod attempt;

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tokio::task::JoinError;
use tracing::Instrument;

use super::copies::{Call, Observed};
use super::key_lock::KeyLockGuard;
use super::key_state::Event;
use super::put::PendingWrite;
use super::{Access, OnOutage, Shared, within};
use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::IssuedVersion;
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::outcome::WriteOutcome;
use crate::observe::metrics::WriteResult;
use crate::outage::Enqueued;
use crate::outage::file::OutageFile;
use crate::resilience::tasks;
use crate::store::{Applied, Condition, Write};

/// The unit of the write budget.
pub(super) const KIB: usize = 1024;

impl Shared {
    /// Writes in a task, so that the write completes even if the caller goes. Counts the result.
    ///
    /// An update brings its key lock, and a put or remove shares one. The lock is held until the caller could be answered (C1).
    pub(super) async fn write(
        self: &Arc<Self>,
        pending: PendingWrite,
        key_lock: Option<Arc<KeyLockGuard>>,
    ) -> Result<WriteOutcome> {
        let written = async {
            // The write is counted before the check. So a shutdown sees this write, or this write sees the shutdown.
            let counter = WriteCounter::begin(&self.writing);
            self.check_not_shut_down()?;
            if let Some(metadata) = &pending.options.metadata {
                self.check_size("the metadata", metadata)?;
            }
            if self.queue_if_enabled().is_none() {
                self.check_breaker()?;
            }
            let budget = self.acquire_budget(&pending).await?;
            let (key, called_at) = (pending.key.clone(), self.copies.clock.moment());
            let (sender, receiver) = oneshot::channel();
            let task = WriteTask { shared: Arc::clone(self), pending, called_at };
            let task = async move {
                task.run(key_lock, sender).await;
                drop((budget, counter));
            };
            let task = tasks::spawn(task.in_current_span());
            match receiver.await {
                Ok(result) => result,
                Err(_) => Err(self.task_ended(&key, task.await.err())),
            }
        };
        let result = written.await.map(|outcome| self.acknowledged(outcome));
        self.metrics.wrote(match &result {
            Ok(WriteOutcome::Stored) => WriteResult::Stored,
            Ok(WriteOutcome::Superseded) => WriteResult::Superseded,
            Ok(WriteOutcome::Queued) => WriteResult::Queued,
            Ok(WriteOutcome::Volatile) => WriteResult::Volatile,
            Err(_) => WriteResult::Failed,
        });
        result
    }

    /// Creates the error of a task that panicked, or that the end of the runtime stopped.
    fn task_ended(&self, key: &Key, cause: Option<JoinError>) -> Error {
        // The store may hold the write (I6).
        self.copies.memory.tell(key, Event::Unknown(self.copies.clock.issue().version));
        let message = format!("the task that wrote conversation {key} ended early");
        let error = Error::new(ErrorKind::Unavailable, message).with_key(key.as_str()).with_outcome_unknown();
        cause.map_or(error.clone(), |cause| error.with_source(cause))
    }

    /// Returns the outcome for the caller. The backend `memory` stores nothing beyond the process.
    pub(super) fn acknowledged(&self, outcome: WriteOutcome) -> WriteOutcome {
        match outcome {
            WriteOutcome::Stored if self.backend == "memory" => WriteOutcome::Volatile,
            other => other,
        }
    }

    /// Takes a share of the write budget. An abandoned write keeps its share until it ends.
    async fn acquire_budget(&self, pending: &PendingWrite) -> Result<OwnedSemaphorePermit> {
        let value = pending.value.as_ref().map_or(0, Json::len);
        let metadata = pending.options.metadata.as_ref().map_or(0, Json::len);
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

    /// Returns the outage file if the settings let a write enter its queue.
    pub(super) fn queue_if_enabled(&self) -> Option<&Arc<OutageFile>> {
        self.copies.file.as_ref().filter(|_| self.limits.on_outage == OnOutage::Queue)
    }

    /// Returns the number of clock syncs that may have given queued writes other versions.
    pub(super) fn clock_syncs(&self) -> u64 {
        self.copies.file.as_ref().map_or(0, |file| file.syncs())
    }

    /// Syncs the clock by a probe, because only a synced clock issues versions for the store (I8). One probe serves all
    /// callers.
    async fn sync_clock(&self) -> Result<()> {
        let clock = &self.copies.clock;
        let sync = async {
            let _probe = self.clock_probe.lock().await;
            if clock.is_synced() {
                return Ok(());
            }
            // Another call may have got the answer that the outage file still works on.
            if clock.pending().is_none() {
                // Taken before the probe, because a jump during the probe makes the answer worthless.
                let asked = clock.moment();
                self.note(Access::Probe, self.store.probe().await)?;
                clock.trust(asked);
            }
            // The outage file corrects the provisional writes first.
            clock.synced().await;
            Ok(())
        };
        let message = "the store's clock is unknown: the store does not answer";
        let is_late = || Error::new(ErrorKind::Unavailable, message);
        within(self.limits.soft_timeout, sync).await.ok_or_else(is_late)?
    }
}

/// A write on its way to the store or to the queue.
struct WriteTask {
    shared: Arc<Shared>,
    pending: PendingWrite,
    /// The time of the call. The time to live starts here.
    called_at: Moment,
}

/// A write with its version.
struct IssuedWrite {
    write: Write,
    issued: IssuedVersion,
    /// The token is older than the version and the request, and lives until memory knows the write (I2).
    call: Arc<Call>,
}

/// The way to the caller. It holds the key lock until the answer (C1).
struct Reply {
    sender: oneshot::Sender<Result<WriteOutcome>>,
    _key_lock: Arc<KeyLockGuard>,
}

impl Reply {
    fn send(self, result: Result<WriteOutcome>) {
        self.sender.send(result).ok();
    }
}

impl WriteTask {
    /// Holds the key lock, and decides between store and queue.
    async fn run(self, key_lock: Option<Arc<KeyLockGuard>>, sender: oneshot::Sender<Result<WriteOutcome>>) {
        let (shared, key) = (&self.shared, &self.pending.key);
        let key_lock = match key_lock {
            Some(held) => held,
            None => match shared.key_locks.share(key).await {
                Ok(shared) => Arc::new(shared),
                Err(busy) => return drop(sender.send(Err(busy))),
            },
        };
        let reply = Reply { sender, _key_lock: key_lock };
        let Some(file) = shared.queue_if_enabled() else { return reply.send(self.store().await) };
        let can_send = self.can_send().await;
        let write = self.issue();
        let read_after = self.pending.base.map(|base| base.syncs);
        if !can_send || write.issued.is_provisional {
            let queued = self.enqueue(file, &write, read_after).await;
            reply.send(match queued {
                Err(refused) if self.may_pass_the_queue(file, &write, &refused) => {
                    file.raise_mark(write.issued.version).await;
                    self.store_refused(&write, refused, self.attempt(&write)).await
                }
                queued => queued,
            });
        } else if read_after.is_some_and(|syncs| syncs != file.syncs()) {
            // Replay may have sent the queued base meanwhile, with another version.
            reply.send(Err(conflict(key)));
        } else {
            self.store_or_queue(file, &write, reply).await;
        }
    }

    /// Returns true if the write may go to the store: its key has no queued writes (C2), and the clock is synced (I8).
    async fn can_send(&self) -> bool {
        let shared = &self.shared;
        !shared.copies.memory.is_queued(&self.pending.key)
            && shared.is_breaker_closed()
            && (shared.copies.clock.is_synced() || shared.sync_clock().await.is_ok())
    }

    /// Whether a write that the queue refused may go to the store past the queued writes of its conversation. The store then takes
    /// those for covered, if they are of one own run. An update may not: it goes on from them.
    fn may_pass_the_queue(&self, file: &OutageFile, write: &IssuedWrite, refused: &Error) -> bool {
        let is_refused = matches!(refused.kind(), ErrorKind::LocalStorage | ErrorKind::QueueFull);
        is_refused
            && self.pending.base.is_none()
            && !write.issued.is_provisional
            && self.shared.is_breaker_closed()
            && self.shared.copies.clock.is_synced()
            && !file.has_rows_of_an_earlier_part()
    }

    /// Writes to the store or, in an outage and after the soft timeout, to the queue.
    async fn store_or_queue(&self, file: &OutageFile, write: &IssuedWrite, reply: Reply) {
        // An opening of the file after a crash starts above every version that was sent (C8).
        file.raise_mark(write.issued.version).await;
        let mut attempt = std::pin::pin!(self.attempt(write));
        match within(self.shared.limits.soft_timeout, &mut attempt).await {
            Some(Err(outage)) if can_enqueue(&outage) => {
                let queued = self.enqueue(file, write, None).await;
                reply.send(queued.map_err(|full| enqueue_failed(full, &outage)));
            }
            Some(applied) => reply.send(self.conclude(write, applied, None).await),
            None => match self.enqueue(file, write, None).await {
                // The request still runs, and its late answer settles the queued write.
                Ok(outcome) => {
                    reply.send(Ok(outcome));
                    self.conclude(write, attempt.await, Some(file)).await.ok();
                }
                Err(refused) => reply.send(self.store_refused(write, refused, attempt).await),
            },
        }
    }

    /// Waits for the store, because the queue has refused the write.
    async fn store_refused(
        &self,
        write: &IssuedWrite,
        refused: Error,
        attempt: impl Future<Output = Result<Observed<Applied>>>,
    ) -> Result<WriteOutcome> {
        match attempt.await {
            Err(outage) if can_enqueue(&outage) => Err(enqueue_failed(refused, &outage)),
            applied => self.conclude(write, applied, None).await,
        }
    }

    /// Writes to a store without a queue.
    async fn store(&self) -> Result<WriteOutcome> {
        if !self.shared.copies.clock.is_synced() {
            self.shared.sync_clock().await?;
        }
        let write = self.issue();
        self.conclude(&write, self.attempt(&write).await, None).await
    }

    fn issue(&self) -> IssuedWrite {
        let (shared, pending) = (&self.shared, &self.pending);
        let call = shared.copies.begin();
        // Versions of a conversation never fall in one process, also if the clock does.
        let issued = shared.copies.clock.issue_after(shared.copies.memory.view(&pending.key).newest());
        let record = pending.record(issued.version, issued.shown_at(self.called_at), shared.limits.ttl);
        let mut write = Write::new(record).with_writer(shared.writer);
        write.condition = pending.base.map_or(Condition::Any, |base| Condition::IfVersion(base.version));
        IssuedWrite { write, issued, call }
    }

    /// Applies a verdict as the table at the head of this file says. `queue` holds the write if the caller got `Queued` before.
    async fn conclude(
        &self,
        IssuedWrite { write: Write { record, .. }, .. }: &IssuedWrite,
        applied: Result<Observed<Applied>>,
        queue: Option<&OutageFile>,
    ) -> Result<WriteOutcome> {
        let (applied, copies, key) = (applied?, &self.shared.copies, &record.key);
        if let Some(file) = queue
            && let Err(error) = file.settle(vec![(key.clone(), record.version, applied.value)]).await
        {
            tracing::debug!(%error, "the late answer to a queued write was lost; replay sends the write again");
        }
        match (applied.value, queue) {
            (Applied::Stored, None) => {
                let stored = copies.persist_own(applied.map(|_| Arc::clone(record))).await?;
                copies.admit(stored);
                Ok(WriteOutcome::Stored)
            }
            (Applied::Stored, Some(_)) => Ok(WriteOutcome::Queued),
            (Applied::Superseded(newer), _) => {
                copies.supersede(key, newer).await;
                Ok(WriteOutcome::Superseded)
            }
            (Applied::Conflict(newer), _) => {
                copies.supersede(key, newer).await;
                Err(conflict(key))
            }
            (Applied::TooOld | Applied::VersionInFuture, _) => {
                let reason = "the store does not accept a version of this clock";
                let error =
                    Error::new(ErrorKind::Rejected, format!("conversation {key} was not written: {reason}"));
                Err(error.with_key(key.as_str()).with_remedy("synchronise this machine's clock"))
            }
        }
    }

    /// Queues the write. `Queued` means that the outage file has synced it to the local disk (I4).
    /// `read_after` is for an update that was not sent.
    async fn enqueue(
        &self,
        file: &OutageFile,
        issued: &IssuedWrite,
        read_after: Option<u64>,
    ) -> Result<WriteOutcome> {
        let IssuedWrite { write, issued, call } = issued;
        let (is_provisional, record) = (issued.is_provisional, Arc::clone(&write.record));
        let (memory, call) = (Arc::clone(&self.shared.copies.memory), Arc::clone(call));
        // Memory learns of the commit before any caller does (I3).
        let on_commit = move |enqueued: &Enqueued| match enqueued {
            Enqueued::Queued { .. } => memory.enqueued(record, &call, is_provisional),
            Enqueued::Superseded(version) | Enqueued::Conflict { newer: Some(version) } => {
                memory.tell(&record.key, Event::Newer(*version));
            }
            Enqueued::Covered | Enqueued::Conflict { newer: None } => {}
        };
        let enqueued = file.enqueue(write.clone(), is_provisional, issued.shown, read_after, on_commit).await;
        *self.shared.last_enqueue_error() = enqueued.as_ref().err().cloned();
        match enqueued? {
            Enqueued::Queued { .. } | Enqueued::Covered => Ok(WriteOutcome::Queued),
            // A load found this very write in the store.
            Enqueued::Superseded(held) if held == issued.version => Ok(WriteOutcome::Stored),
            Enqueued::Superseded(_) => Ok(WriteOutcome::Superseded),
            Enqueued::Conflict { .. } => Err(conflict(&write.record.key)),
        }
    }
}

/// Counts a write in flight until the drop.
struct WriteCounter(watch::Sender<usize>);

impl WriteCounter {
    fn begin(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for WriteCounter {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Returns true if a write that failed so may enter the queue.
///
/// Such a failure does not concern the record: the store is unreachable, rejects the key, or lacks the migrations.
pub(super) fn can_enqueue(error: &Error) -> bool {
    error.is_outage() || matches!(error.kind(), ErrorKind::Unauthorized | ErrorKind::SchemaOutdated)
}

/// Creates the error for a write that the store and then the queue refused. It keeps `outcome_unknown` of the first failure.
fn enqueue_failed(enqueue_error: Error, failure: &Error) -> Error {
    if !failure.outcome_unknown() {
        return enqueue_error;
    }
    let message = format!("{}; the store may hold the write nevertheless", enqueue_error.message());
    enqueue_error.with_message(message).with_outcome_unknown()
}

fn conflict(key: &Key) -> Error {
    let message = format!("another writer changed conversation {key} meanwhile");
    Error::new(ErrorKind::Conflict, message).with_key(key.as_str())
}
