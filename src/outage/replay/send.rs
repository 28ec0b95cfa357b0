//! One call of replay: send, read the answers, complete.

use std::time::{Duration, Instant};

use tokio::sync::SemaphorePermit;

use super::Replayer;
use super::outcome::{outcome, rebase_target, to_write};
use super::state::{BatchResult, RECHECK_AFTER, SendMode};
use crate::error::{Error, ErrorKind, Result};
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::version::{MAX_CLOCK_SKEW, Timestamp, Version};
use crate::observe::alert::Access;
use crate::observe::metrics::ReplayResult;
use crate::outage::{DeadLetterReason, QueuedRow, ReplayOutcome};
use crate::store::{Applied, Write};

/// The time after which a batch overlaps with a slow one.
const OVERLAP_AFTER: Duration = Duration::from_millis(100);
/// The number of times that a conflicting update is sent over the stored version.
const MAX_REBASES: usize = 3;
/// The margin of a wait for the store's clock.
const CLOCK_MARGIN: Duration = Duration::from_millis(50);
/// The pause after the outage file could not be written.
const FILE_RETRY: Duration = Duration::from_secs(1);

impl Replayer {
    /// Sends a batch, and completes the writes that have found their end. Returns also the time that the store took.
    pub(super) async fn send(&self, batch: Vec<QueuedRow>, mode: SendMode) -> (BatchResult, Duration) {
        let permit = match mode {
            SendMode::Batch => self.send_permit().await,
            // An isolated call has one record, and a slow batch must not delay it.
            SendMode::Alone { .. } => None,
        };
        // After the wait, because the clock may have jumped meanwhile.
        let now = match self.known_now() {
            Ok(now) => now,
            Err(unknown) => return (BatchResult::Unavailable(unknown), Duration::ZERO),
        };
        let (began, start) = (Moment::now(), Instant::now());
        let applied = self.apply(&batch, now).await;
        let took = start.elapsed();
        // The store is free for the next batch while this one is completed in the file.
        drop(permit);
        let result = match applied {
            Ok(applied) => {
                self.alert.wrote(Ok(&applied));
                self.handle_outcomes(batch, applied, began).await
            }
            Err(error) => self.diagnose(batch, error, mode).await,
        };
        (result, took)
    }

    /// Waits for the batch before this one, for [`OVERLAP_AFTER`] at most (I12).
    async fn send_permit(&self) -> Option<SemaphorePermit<'_>> {
        tokio::select! {
            permit = self.send_permit.acquire() => permit.ok(),
            () = tokio::time::sleep(OVERLAP_AFTER) => None,
        }
    }

    /// Applies a batch. Sends a conflicting update again over the stored version, unless another writer stored that one.
    async fn apply(&self, batch: &[QueuedRow], now: Timestamp) -> Result<Vec<Applied>> {
        let mut writes: Vec<Write> = batch.iter().map(|queued| to_write(queued, now)).collect();
        let mut applied = self.store.apply_once(&writes).await?;
        for _ in 0..MAX_REBASES {
            // A faulty store may answer for fewer or for more records. The check below rejects that.
            let rebased: Vec<(usize, Version)> = (0..applied.len().min(batch.len()))
                .filter_map(|at| Some((at, rebase_target(&batch[at], applied[at])?)))
                .collect();
            if rebased.is_empty() {
                break;
            }
            let retries = rebased.iter().map(|(at, base)| {
                writes[*at].if_version = Some(*base);
                writes[*at].clone()
            });
            let retries: Vec<Write> = retries.collect();
            for ((at, _), result) in rebased.iter().zip(self.store.apply_once(&retries).await?) {
                applied[*at] = result;
            }
        }
        if applied.len() == batch.len() {
            return Ok(applied);
        }
        Err(Error::new(ErrorKind::SchemaOutdated, "the store did not answer for all records"))
    }

    async fn handle_outcomes(
        &self,
        batch: Vec<QueuedRow>,
        applied: Vec<Applied>,
        began: Moment,
    ) -> BatchResult {
        let (mut completed, mut retries) = (Vec::new(), Vec::new());
        for (queued, applied) in batch.into_iter().zip(applied) {
            let (key, version) = (queued.record.key.clone(), queued.record.version);
            match outcome(&queued, applied) {
                // The write lost to a direct write of this handle, which replaces it in the file in a moment.
                Some(ReplayOutcome::DeadLettered(DeadLetterReason { newer: Some(newer), .. }))
                    if self.queue_index.has_direct_write(&key, newer) =>
                {
                    retries.push((key.clone(), version, RECHECK_AFTER));
                }
                Some(outcome) => completed.push((queued, outcome)),
                None => retries.push((key.clone(), version, self.assign_version(&key, version).await)),
            }
        }
        match self.complete(completed, began).await {
            Ok(()) => BatchResult::Completed(retries),
            // Replay sends the writes again, and the store recognises them.
            Err(error) => BatchResult::Unavailable(error),
        }
    }

    /// Finds the fault of a failed call: a record in it, or the store.
    ///
    /// A write becomes a dead letter if the store rejected it twice alone, by its own fault, and accepts others (I10).
    async fn diagnose(&self, batch: Vec<QueuedRow>, error: Error, mode: SendMode) -> BatchResult {
        let may_be_a_record = error.is_outage() || error.may_affect_one_record() || error.needs_operator();
        if !may_be_a_record || error.kind() == ErrorKind::LocalStorage {
            return BatchResult::Unavailable(error);
        }
        // An outage and a bad record can give the same error. The probe tells them apart.
        if let Err(unavailable) = self.store.probe().await {
            self.alert.note::<()>(Access::Probe, &Err(unavailable.clone()));
            return BatchResult::Unavailable(unavailable);
        }
        let (SendMode::Alone { was_tried, accepted }, Some(queued)) = (mode, batch.first()) else {
            // In a batch nothing tells which record is at fault.
            return BatchResult::Rejected(error);
        };
        let is_record_fault = was_tried && error.is_record_fault();
        let others_pass = was_tried && self.alert.accepted() > accepted;
        // The store has accepted another write since, so the store works.
        if others_pass {
            return if is_record_fault {
                self.add_dead_letters(batch, &error).await
            } else {
                BatchResult::Rejected(error)
            };
        }
        // The probe has neither value nor user, so it passes a constraint that all real records fail.
        let is_constraint = error.code().is_some_and(|code| code.starts_with("23"));
        // Nothing else was accepted. If several conversations fail alike, the store is at fault (I10).
        match self.alert.note_record_failure(&queued.record.key, &error) {
            Some(common) => BatchResult::Unavailable(common),
            None if is_record_fault && !is_constraint => self.add_dead_letters(batch, &error).await,
            None => BatchResult::Rejected(error),
        }
    }

    async fn add_dead_letters(&self, batch: Vec<QueuedRow>, error: &Error) -> BatchResult {
        let reason = DeadLetterReason { text: format!("rejected: {error}"), newer: None };
        let dead_letter = |queued| (queued, ReplayOutcome::DeadLettered(reason.clone()));
        match self.complete(batch.into_iter().map(dead_letter).collect(), Moment::now()).await {
            Ok(()) => BatchResult::Completed(Vec::new()),
            Err(error) => BatchResult::Unavailable(error),
        }
    }

    /// Completes writes in the outage file first, then in memory (I1).
    async fn complete(&self, writes: Vec<(QueuedRow, ReplayOutcome)>, began: Moment) -> Result<()> {
        let rows = writes
            .iter()
            .map(|(queued, outcome)| (queued.record.key.clone(), queued.record.version, outcome.clone()));
        let were_queued = self.file.complete(rows.collect()).await?;
        // The others were completed or replaced during the call, and must not be counted twice.
        let completed = writes.into_iter().zip(were_queued).filter(|(_, was_queued)| *was_queued);
        for ((queued, outcome), _) in completed {
            self.metrics.replayed(match &outcome {
                ReplayOutcome::Stored | ReplayOutcome::Replaced(_) => ReplayResult::Stored,
                ReplayOutcome::DeadLettered(DeadLetterReason { newer: Some(_), .. }) => {
                    ReplayResult::Superseded
                }
                ReplayOutcome::DeadLettered(_) => ReplayResult::Rejected,
            });
            let (key, version) = (&queued.record.key, queued.record.version);
            match outcome {
                ReplayOutcome::Stored => self.observer.stored(&queued.record, began, !queued.is_dispatched),
                ReplayOutcome::Replaced(newer) => self.observer.dead_lettered(key, version, Some(newer)),
                ReplayOutcome::DeadLettered(reason) => {
                    tracing::error!(
                        thread_id = %key, reason = %reason.text,
                        "a queued write became a dead letter; the outage file keeps it until an operator deletes it"
                    );
                    self.observer.dead_lettered(key, version, reason.newer);
                }
            }
        }
        Ok(())
    }

    /// Handles a version ahead of the store's clock, and returns the pause before the next try. If the version is only a little
    /// ahead, real time catches up. Otherwise the write gets a version of the present.
    async fn assign_version(&self, key: &Key, version: Version) -> Duration {
        let clock = self.store.clock();
        let excess = version.at().since(clock.now_for_versions().plus(MAX_CLOCK_SKEW));
        if excess <= MAX_CLOCK_SKEW {
            return excess + CLOCK_MARGIN;
        }
        let to = clock.issue().version;
        match self.file.assign_version(key, version, to).await {
            // Memory follows the file, so a failure leaves both at the old version.
            Ok(true) => self.queue_index.assign_version(key, version, to),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(
                    thread_id = %key, %error,
                    "replay cannot write the new version of a queued write to the outage file; replay retries in 1 s"
                );
                return FILE_RETRY;
            }
        }
        Duration::ZERO
    }
}
