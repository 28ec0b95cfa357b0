//! The write path: the store, the outage file, memory, and then the caller (I1).
//!
//! A [`WriteTask`] owns a write from its first attempt to the acknowledgement. After the soft timeout, or in an outage, the
//! task queues the write on the local disk and answers `Queued`. A request in flight continues, and its late answer settles the
//! queued write. A write keeps its version for ever.
//!
//! The meaning of each verdict (`WriteTask::conclude`):
//!
//! | verdict | outage file and memory | a write that is queued by now | caller |
//! |---|---|---|---|
//! | `Stored` | hold the value | is settled | `Stored` |
//! | `Appended` | hold the value if they held the one before, else drop everything older | is settled | `Stored` |
//! | `AppendedBefore(v)` | drop everything older than `v` | is settled | `Stored` |
//! | `Superseded(v)` | drop everything older than `v` | is settled | `Superseded` |
//! | `Conflict(v)` | drop everything older than `v` | is settled | `Conflict`; an update runs again |
//! | `VersionInFuture` | | replay sends it again | the task waits, then as an outage |
//! | `Absent` | | is settled | `Absent` |
//! | `NotAnArray`, `TooLarge`, `TooOld` | | is settled | `Rejected` |
//! | an outage | drop older values if the outcome is unknown (I6) | stays | `Queued`, else the error |
//! | another error | drop older values if the outcome is unknown (I6) | stays | the error |

mod admission;
mod attempt;

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinError;
use tracing::Instrument;

use super::copies::{Call, Observed};
use super::key_lock::KeyLockGuard;
use super::key_state::{Event, Origin};
use super::put::{Base, PendingWrite};
use super::{Access, Shared, within};
use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::IssuedVersion;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::outcome::{Appended, WriteOutcome};
use crate::outage::Enqueued;
use crate::outage::file::OutageFile;
use crate::resilience::tasks;
use crate::store::{Applied, Write};

pub(super) use admission::{AdmittedWrite, KIB};

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
            let admitted =
                self.admit_write(pending.value.as_ref(), pending.options.metadata.as_ref()).await?;
            let (key, called_at) = (pending.key.clone(), self.copies.clock.moment());
            let (sender, receiver) = oneshot::channel();
            let task = WriteTask { shared: Arc::clone(self), pending, called_at };
            let task = async move {
                task.run(key_lock, sender).await;
                drop(admitted);
            };
            let task = tasks::spawn(task.in_current_span());
            match receiver.await {
                Ok(result) => result,
                Err(_) => Err(self.task_ended(&key, task.await.err())),
            }
        };
        let result = written.await.map(|appended: Appended| appended.outcome);
        self.metrics.wrote(result.as_ref().ok().copied());
        result
    }

    /// Creates the error of a task that panicked, or that the end of the runtime stopped.
    pub(super) fn task_ended(&self, key: &Key, cause: Option<JoinError>) -> Error {
        // The store may hold the write (I6).
        self.copies.memory.tell(key, Event::Unknown(self.copies.clock.issue().version));
        let message = format!("the task that wrote conversation {key} ended early");
        let error = Error::new(ErrorKind::Unavailable, message).with_key(key.as_str()).with_outcome_unknown();
        cause.map_or(error.clone(), |cause| error.with_source(cause))
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
            // Another call may have got the answer that the outage file still works on.
            if !clock.is_synced() && clock.pending().is_none() {
                // Taken before the probe, because a jump during the probe makes the answer worthless.
                let asked = clock.moment();
                self.note(Access::Probe, self.store.probe().await)?;
                clock.trust(asked);
            }
            // The outage file corrects the provisional writes first.
            if clock.settled().await { Ok(()) } else { Err(clock_unknown()) }
        };
        within(self.limits.soft_timeout, sync).await.unwrap_or_else(|| Err(clock_unknown()))
    }
}

/// A write on its way to the store or to the queue.
pub(super) struct WriteTask {
    pub(super) shared: Arc<Shared>,
    pub(super) pending: PendingWrite,
    /// The time of the call. The time to live starts here.
    pub(super) called_at: Moment,
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
    sender: oneshot::Sender<Result<Appended>>,
    _key_lock: Arc<KeyLockGuard>,
}

impl Reply {
    fn send(self, result: Result<Appended>) {
        self.sender.send(result).ok();
    }
}

impl WriteTask {
    /// Holds the key lock, and decides between store and queue.
    pub(super) async fn run(
        self,
        key_lock: Option<Arc<KeyLockGuard>>,
        sender: oneshot::Sender<Result<Appended>>,
    ) {
        let (shared, key) = (&self.shared, &self.pending.key);
        let key_lock = match key_lock {
            Some(held) => held,
            None => match shared.key_locks.share(key).await {
                Ok(shared) => Arc::new(shared),
                Err(busy) => return drop(sender.send(Err(busy))),
            },
        };
        let reply = Reply { sender, _key_lock: key_lock };
        let checked = self.check_can_send().await;
        let no_sync = match &shared.copies.file {
            Some(file) => Some(file.hold_clock_sync().await),
            None => None,
        };
        let write = self.issue();
        // This machine's clock may have jumped since the check.
        let can_send = if write.issued.is_provisional { checked.and(Err(clock_unknown())) } else { checked };
        let read_after = self.pending.base.map(|base| base.syncs);
        match (can_send, &shared.queue) {
            (Ok(()), _) if self.pending.base.is_some_and(|base| self.is_outdated(base)) => {
                reply.send(Err(conflict(key)));
            }
            (Ok(()), _) => {
                drop(no_sync);
                self.store_or_queue(&write, reply).await;
            }
            (Err(refused), None) => reply.send(Err(refused)),
            (Err(_), Some(file)) => {
                let queued = self.enqueue(file, &write, read_after).await;
                drop(no_sync);
                reply.send(match queued {
                    Err(refused) if self.may_pass_the_queue(file, &write, &refused).await => {
                        match file.raise_mark(write.issued.version).await {
                            Ok(()) => self.store_refused(&write, refused, self.attempt(&write)).await,
                            Err(closed) => Err(closed),
                        }
                    }
                    queued => queued,
                });
            }
        }
    }

    /// Checks that the write may go to the store: the breaker is closed, the key has no queued writes (C2), and the clock is synced
    /// (I8). A write that may not be queued waits for the end of the queued ones.
    async fn check_can_send(&self) -> Result<()> {
        let (shared, key) = (&self.shared, &self.pending.key);
        shared.check_breaker()?;
        if shared.queue.is_none() {
            shared.wait_for_queue(key).await;
        }
        if shared.copies.memory.keys.is_queued(key) {
            let message = format!("earlier writes of conversation {key} wait in the queue");
            let error = Error::new(ErrorKind::Unavailable, message).with_key(key.as_str());
            return Err(error.with_retry_after(shared.limits.soft_timeout));
        }
        if shared.copies.clock.is_synced() { Ok(()) } else { shared.sync_clock().await }
    }

    /// Whether a request over this base could only conflict. If its response was lost, the queue would hide the newer value.
    fn is_outdated(&self, base: Base) -> bool {
        // Replay may have sent the queued base meanwhile, with another version.
        if base.syncs != self.shared.clock_syncs() {
            return true;
        }
        let held = self.shared.copies.memory.view(&self.pending.key).entry;
        held.is_some_and(|entry| entry.origin() == Origin::Store && entry.record().version > base.version)
    }

    /// Whether a write that the queue refused may go to the store past the queued writes of its conversation. The store then takes
    /// those for covered, if they are of one own run. An update or append may not: it goes on from them. A put before an
    /// append is not covered by it.
    async fn may_pass_the_queue(&self, file: &OutageFile, write: &IssuedWrite, refused: &Error) -> bool {
        matches!(refused.kind(), ErrorKind::LocalStorage | ErrorKind::QueueFull)
            && write.write.head().is_plain()
            && !write.issued.is_provisional
            && file.has_rows_of_daemon_only(&self.pending.key, write.write.writer.daemon()).await
    }

    /// Writes to the store or, in an outage and after the soft timeout, to the queue.
    async fn store_or_queue(&self, write: &IssuedWrite, reply: Reply) {
        // An opening of the file after a crash starts above every version that was sent (C8).
        if let Some(file) = &self.shared.copies.file
            && let Err(closed) = file.raise_mark(write.issued.version).await
        {
            return reply.send(Err(closed));
        }
        let mut attempt = std::pin::pin!(self.attempt(write));
        let Some(file) = &self.shared.queue else {
            return reply.send(self.conclude(write, attempt.await, None).await);
        };
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
    ) -> Result<Appended> {
        match attempt.await {
            Err(outage) if can_enqueue(&outage) => Err(enqueue_failed(refused, &outage)),
            applied => self.conclude(write, applied, None).await,
        }
    }

    /// Issues the version. The caller [holds the clock sync](OutageFile::hold_clock_sync), because the newest known version may be
    /// provisional (I8).
    fn issue(&self) -> IssuedWrite {
        let (shared, pending) = (&self.shared, &self.pending);
        let call = shared.copies.begin();
        // Versions of a conversation never fall in one process, also if the clock does.
        let (clock, newest) = (&shared.copies.clock, shared.copies.memory.view(&pending.key).newest());
        let issued = clock.issue_after(newest);
        let record = pending.record(issued.version, issued.shown_at(self.called_at), shared.limits.ttl);
        let mut write = Write::new(record).with_writer(shared.writer.in_era(issued.era));
        if let Some(base) = pending.base {
            write = write.with_if_version(base.version);
        }
        if let Some(append) = &pending.append {
            write = write.with_append(append.clone());
        }
        IssuedWrite { write, issued, call }
    }

    /// Applies a verdict as the table at the head of this file says. `queue` holds the write if the caller got `Queued` before.
    async fn conclude(
        &self,
        IssuedWrite { write, .. }: &IssuedWrite,
        applied: Result<Observed<Applied>>,
        queue: Option<&OutageFile>,
    ) -> Result<Appended> {
        let (applied, copies, outcome) = (applied?, &self.shared.copies, self.shared.stored);
        let (record, key) = (&write.record, &write.record.key);
        if let Some(file) = queue
            && let Err(error) = file.settle(vec![(key.clone(), record.version, applied.value)]).await
        {
            tracing::debug!(%error, "the late answer to a queued write was lost; replay sends the write again");
        }
        match (applied.value, queue) {
            (Applied::Stored | Applied::Appended { .. } | Applied::AppendedBefore(_), Some(_)) => {
                Ok(WriteOutcome::Queued.into())
            }
            (Applied::Stored, None) => {
                copies.keep_own(&applied, Arc::clone(record)).await?;
                Ok(outcome.into())
            }
            (Applied::AppendedBefore(version), None) => {
                copies.supersede(key, version).await?;
                Ok(outcome.into())
            }
            (Applied::Appended { version, length, .. }, None) => {
                match copies.follow(write, &applied.value).await {
                    Some(record) => copies.keep_own(&applied, record).await?,
                    None => copies.supersede(key, version).await?,
                }
                Ok(Appended { outcome, version: Some(version), length: Some(length) })
            }
            (Applied::Superseded(newer), _) => {
                copies.supersede(key, newer).await?;
                Ok(WriteOutcome::Superseded.into())
            }
            (Applied::Conflict(newer), _) => {
                copies.supersede(key, newer).await?;
                Err(conflict(key))
            }
            (Applied::Absent, _) => Ok(WriteOutcome::Absent.into()),
            (refused, _) => Err(rejected(write, refused)),
        }
    }

    /// Queues the write. `Queued` means that the outage file has synced it to the local disk (I4).
    /// `read_after` is for an update that was not sent.
    async fn enqueue(
        &self,
        file: &OutageFile,
        issued: &IssuedWrite,
        read_after: Option<u64>,
    ) -> Result<Appended> {
        let IssuedWrite { write, issued, call } = issued;
        let (is_provisional, queued) = (issued.is_provisional, write.clone());
        let (memory, call) = (Arc::clone(&self.shared.copies.memory), Arc::clone(call));
        // Memory learns of the commit before any caller does (I3).
        let on_commit = move |enqueued: &Enqueued| match enqueued {
            Enqueued::Queued { has_appends, .. } => {
                memory.enqueued(&queued, &call, *has_appends, is_provisional)
            }
            Enqueued::Superseded(version) | Enqueued::Conflict { newer: Some(version) } => {
                memory.tell(&queued.record.key, Event::Newer(*version));
            }
            Enqueued::Covered | Enqueued::Conflict { newer: None } => {}
        };
        let enqueued = file.enqueue(write.clone(), is_provisional, issued.shown, read_after, on_commit).await;
        *self.shared.enqueue_error.lock() = enqueued.as_ref().err().cloned();
        match enqueued? {
            Enqueued::Queued { .. } | Enqueued::Covered => Ok(WriteOutcome::Queued.into()),
            // A load found this very write in the store.
            Enqueued::Superseded(held) if held == issued.version => Ok(self.shared.stored.into()),
            Enqueued::Superseded(_) => Ok(WriteOutcome::Superseded.into()),
            Enqueued::Conflict { .. } => Err(conflict(&write.record.key)),
        }
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

fn clock_unknown() -> Error {
    let message =
        "the store's clock is unknown: the store does not answer, or the outage file cannot be written";
    Error::new(ErrorKind::Unavailable, message)
}

fn conflict(key: &Key) -> Error {
    let message = format!("another writer changed conversation {key} meanwhile");
    Error::new(ErrorKind::Conflict, message).with_key(key.as_str())
}

/// Creates the error of a write that the store has refused for good.
fn rejected(write: &Write, refused: Applied) -> Error {
    let (key, append) = (&write.record.key, write.append.as_ref());
    let place = append.map_or(String::new(), |append| append.at.to_string());
    let (reason, remedy) = match refused {
        Applied::NotAnArray if place.is_empty() => {
            ("the conversation is not an array".into(), "name an array inside it")
        }
        Applied::NotAnArray => (format!("it has no array at {place}"), "name another array"),
        Applied::TooLarge => {
            let limit = append.map_or(0, |append| append.max_bytes);
            (format!("the conversation would exceed {limit} bytes"), "raise CONVERSATION_MAX_VALUE_BYTES")
        }
        _ => ("the store does not accept a version of this clock".into(), "synchronise this machine's clock"),
    };
    let error = Error::new(ErrorKind::Rejected, format!("conversation {key} was not written: {reason}"));
    error.with_key(key.as_str()).with_remedy(remedy)
}
