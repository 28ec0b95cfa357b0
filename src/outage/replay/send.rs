//! One call of replay: send, read the answers, complete.

use std::time::{Duration, Instant};

use tokio::sync::SemaphorePermit;

use super::Replayer;
use super::state::{CallResult, IsolatedWrite};
use crate::error::{Error, ErrorKind, Result};
use crate::model::json::Json;
use crate::model::record::Record;
use crate::model::version::{MAX_CLOCK_SKEW, Timestamp, Version};
use crate::observe::alert::Access;
use crate::observe::metrics::ReplayResult;
use crate::outage::settle::Answer;
use crate::outage::{QueuedWrite, Verdict};
use crate::store::{Applied, Write};

/// The time after which a batch overlaps with a slow one.
const OVERLAP_AFTER: Duration = Duration::from_millis(100);
/// The margin of a wait for the store's clock.
const CLOCK_MARGIN: Duration = Duration::from_millis(50);
/// The longest wait for the store's clock between two tries.
const MAX_FUTURE_PAUSE: Duration = Duration::from_secs(60);

impl Replayer {
    /// Sends a batch or one isolated write, and completes the writes that have found their end. Returns also the time that the
    /// store took.
    pub(super) async fn send(
        &self,
        batch: Vec<QueuedWrite>,
        isolated: Option<IsolatedWrite>,
    ) -> (CallResult, Duration) {
        let permit = match isolated {
            None => self.send_permit().await,
            // An isolated call has one record, and a slow batch must not delay it.
            Some(_) => None,
        };
        // After the wait, because the clock may have jumped meanwhile.
        let now = match self.known_now() {
            Ok(now) => now,
            Err(unknown) => return (CallResult::Unavailable(unknown), Duration::ZERO),
        };
        let start = Instant::now();
        let applied = self.apply(&batch, now).await;
        let took = start.elapsed();
        // The store is free for the next batch while this one is completed in the file.
        drop(permit);
        let result = match applied {
            Ok(applied) => {
                self.alert.wrote(Ok(&applied));
                self.settle(&batch, applied).await
            }
            Err(error) => self.diagnose(&batch, error, isolated).await,
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

    async fn apply(&self, batch: &[QueuedWrite], now: Timestamp) -> Result<Vec<Applied>> {
        let writes: Vec<Write> = batch.iter().map(|queued| to_write(queued, now)).collect();
        let applied = self.store.apply_once(&writes).await?;
        if applied.len() == batch.len() {
            return Ok(applied);
        }
        Err(Error::new(ErrorKind::SchemaOutdated, "the store did not answer for all records"))
    }

    async fn settle(&self, batch: &[QueuedWrite], applied: Vec<Applied>) -> CallResult {
        let (mut answers, mut retries) = (Vec::new(), Vec::new());
        for (queued, applied) in batch.iter().zip(applied) {
            let (key, version) = (queued.key().clone(), queued.version());
            match applied {
                // A sent write keeps its version (C7). Real time catches up with it.
                Applied::VersionInFuture => retries.push((key, version, self.until_accepted(version))),
                applied => answers.push((key, version, Ok(applied))),
            }
        }
        match self.finish(answers).await {
            Ok(()) => CallResult::Completed(retries),
            // Replay sends the writes again, and the store recognises them.
            Err(error) => CallResult::Unavailable(error),
        }
    }

    fn until_accepted(&self, version: Version) -> Duration {
        let accepted_below = self.store.clock().now_for_versions().plus(MAX_CLOCK_SKEW);
        version.at().since(accepted_below).min(MAX_FUTURE_PAUSE) + CLOCK_MARGIN
    }

    /// Finds the fault of a failed call: a record in it, or the store.
    ///
    /// A write becomes a dead letter if the store rejected it twice alone, by its own fault, and accepts others (I10).
    async fn diagnose(
        &self,
        batch: &[QueuedWrite],
        error: Error,
        isolated: Option<IsolatedWrite>,
    ) -> CallResult {
        let may_be_a_record = error.is_outage() || error.may_affect_one_record() || error.needs_operator();
        if !may_be_a_record || error.kind() == ErrorKind::LocalStorage {
            return CallResult::Unavailable(error);
        }
        // An outage and a bad record can give the same error. The probe tells them apart.
        if let Err(unavailable) = self.store.probe().await {
            self.alert.note::<()>(Access::Probe, &Err(unavailable.clone()));
            return CallResult::Unavailable(unavailable);
        }
        let (Some(isolated), [queued]) = (isolated, batch) else {
            // In a batch nothing tells which record is at fault.
            return CallResult::Rejected(error);
        };
        let is_record_fault = isolated.was_tried() && error.is_record_fault();
        let others_pass = isolated.was_tried() && self.alert.accepted() > isolated.accepted;
        // The store has accepted another write since, so the store works.
        if others_pass {
            return if is_record_fault {
                self.add_dead_letter(queued, &error).await
            } else {
                CallResult::Rejected(error)
            };
        }
        // The probe has neither value nor user, so it passes a constraint that all real records fail.
        let is_constraint = error.code().is_some_and(|code| code.starts_with("23"));
        // Nothing else was accepted. If several conversations fail alike, the store is at fault (I10).
        match self.alert.note_record_failure(queued.key(), &error) {
            Some(common) => CallResult::Unavailable(common),
            None if is_record_fault && !is_constraint => self.add_dead_letter(queued, &error).await,
            None => CallResult::Rejected(error),
        }
    }

    async fn add_dead_letter(&self, queued: &QueuedWrite, error: &Error) -> CallResult {
        let rejected = (queued.key().clone(), queued.version(), Err(error.to_string()));
        match self.finish(vec![rejected]).await {
            Ok(()) => CallResult::Completed(Vec::new()),
            Err(error) => CallResult::Unavailable(error),
        }
    }

    /// Settles writes in the outage file, which tells memory (I1).
    async fn finish(&self, answers: Vec<Answer>) -> Result<()> {
        let keys: Vec<_> = answers.iter().map(|(key, ..)| key.clone()).collect();
        // A write without a verdict was settled, replaced or given another base, and must not be counted twice.
        for (key, verdict) in keys.into_iter().zip(self.file.settle_all(answers).await?) {
            self.metrics.replayed(match verdict {
                None => {
                    // The cursor has passed the conversation.
                    self.file.unblock(key);
                    continue;
                }
                Some(Verdict::Stored | Verdict::Appended(_)) => ReplayResult::Stored,
                Some(Verdict::Dead { reason, newer }) => {
                    tracing::error!(
                        thread_id = %key, %reason,
                        "a queued write became a dead letter; the outage file keeps it until an operator deletes it"
                    );
                    newer.map_or(ReplayResult::Rejected, |_| ReplayResult::Superseded)
                }
            });
        }
        Ok(())
    }
}

/// Returns the request for a queued write. An expired write is sent without its value. Otherwise the older record that it
/// replaces would come back. An append replaces nothing.
fn to_write(queued: &QueuedWrite, now: Timestamp) -> Write {
    let record = &queued.write.record;
    if record.is_live(now) || queued.write.append.is_some() {
        return queued.write.clone();
    }
    let expired = Record { value: None, metadata: Json::default(), ..Record::clone(record) };
    Write { record: expired.into(), ..queued.write.clone() }
}
