//! Replay: the transfer of the queue to the store, whenever the store is available.
//!
//! Replay sends the queue in order and in batches. If a batch fails while the probe succeeds, replay sends its writes alone. A
//! write that fails alone waits, and the others pass it. A write becomes a dead letter only by its own fault (I10).

mod batch_sizer;
mod outcome;
mod progress;
mod send;
mod state;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::JoinError;

use crate::error::{Error, ErrorKind, Result};
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};
use crate::observe::alert::{Access, OperatorAlert};
use crate::observe::metrics::Metrics;
use crate::outage::QueuedRow;
use crate::outage::file::OutageFile;
use crate::outage::index::QueueIndex;
use crate::resilience::backoff::Backoff;
use crate::store::Store;
use batch_sizer::{BatchSizer, MIN_BATCH_RECORDS};
use progress::ProgressLog;
use state::{BatchResult, FinishedBatch, ReplayState};

const MAX_BATCH_BYTES: usize = 1 << 20;
/// The batches in flight. While the store works on one, replay completes the previous one or reads the next one.
const MAX_CONCURRENT_BATCHES: usize = 2;
/// The pauses while the store is unavailable but the breaker is closed.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// The longest pause that the store can ask for by `Retry-After`.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// The part of the cache that learns the end of queued writes.
pub(crate) trait ReplayObserver: std::fmt::Debug + Send + Sync {
    /// The store holds the write, as a call that began at `began` found. `was_newest` if that call stored it.
    fn stored(&self, record: &Arc<Record>, began: Moment, was_newest: bool);
    /// The store will never hold the write. It holds `newer`, if that is known.
    fn dead_lettered(&self, key: &Key, version: Version, newer: Option<Version>);
}

/// Sends the queue to the store.
#[derive(Debug, Clone)]
pub(crate) struct Replayer {
    store: Arc<dyn Store>,
    file: Arc<OutageFile>,
    observer: Arc<dyn ReplayObserver>,
    queue_index: Arc<QueueIndex>,
    /// Without traffic, only replay notices that the store rejects a key, or accepts it again.
    alert: Arc<OperatorAlert>,
    metrics: Arc<Metrics>,
    /// One permit: batches are sent one after the other.
    send_permit: Arc<Semaphore>,
}

impl Replayer {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        file: Arc<OutageFile>,
        observer: Arc<dyn ReplayObserver>,
        queue_index: Arc<QueueIndex>,
        alert: Arc<OperatorAlert>,
    ) -> Self {
        let (metrics, send_permit) = (Arc::new(Metrics::new()), Arc::new(Semaphore::new(1)));
        Self { store, file, observer, queue_index, alert, metrics, send_permit }
    }

    /// Replays until the task is aborted, with and without traffic.
    pub(crate) async fn run(self) {
        let (mut state, mut pauses) = (ReplayState::default(), new_pauses());
        let mut progress = ProgressLog::default();
        let mut changes = self.queue_index.watch();
        loop {
            // Both are registered before the queue is read, so that no change and no accepted write in between is missed.
            changes.borrow_and_update();
            let mended = self.alert.mended();
            progress.report(self.queue_index.len());
            self.wait_for_breaker().await;
            if let Err(error) = self.ensure_clock_synced(&state).await {
                state.unavailable = Some(error);
            } else if let Err(error) = self.fill_window(&mut state).await {
                tracing::warn!(%error, "replay cannot read the queue; replay retries after a pause");
                state.unavailable = Some(error);
            }
            // A pause begins when every batch has returned.
            if state.in_flight.is_empty()
                && let Some(error) = state.unavailable.take()
            {
                let accepted = self.alert.accepted();
                let pause = pauses.next().max(error.retry_after()).unwrap_or(MAX_PAUSE).min(MAX_RETRY_AFTER);
                tracing::debug!(%error, ?pause, "replay pauses: the store takes no writes");
                // An accepted live write ends the pause, after the first pause at the earliest.
                tokio::time::sleep(pause.min(FIRST_PAUSE)).await;
                tokio::select! {
                    () = tokio::time::sleep(pause.saturating_sub(FIRST_PAUSE)) => {}
                    () = mended => {}
                }
                state.resume(accepted);
                continue;
            }
            self.queue_index.set_parked(state.parked());
            let due = state.next_due();
            let finished = tokio::select! {
                Some(finished) = state.in_flight.join_next() => finished,
                // Before a pause, the loop waits for its batches alone, because no new call may start.
                _ = changes.changed(), if state.unavailable.is_none() => continue,
                () = sleep_until(due) => continue,
            };
            if self.on_finished(&mut state, finished) {
                pauses = new_pauses();
            }
        }
    }

    async fn wait_for_breaker(&self) {
        if let Some(breaker) = self.store.breaker() {
            breaker.wait_closed().await;
        }
    }

    /// Syncs the clock by a probe, before anything is sent (I8).
    async fn ensure_clock_synced(&self, state: &ReplayState) -> Result<()> {
        let clock = self.store.clock();
        if clock.unsynced().is_none() || state.unavailable.is_some() || self.queue_index.len() == 0 {
            return Ok(());
        }
        // Taken before the probe, because a jump during the probe makes the answer worthless.
        let asked = clock.moment();
        let probed = self.store.probe().await;
        self.alert.note(Access::Probe, &probed);
        probed?;
        clock.trust(asked);
        // The clock ignores the answer after such a jump.
        self.known_now().map(drop)
    }

    /// Returns the store's time. Without it nothing is sent, because a live record could pass for an expired one (I17).
    fn known_now(&self) -> Result<Timestamp> {
        let unknown = || {
            let message = "the store's clock is unknown: this machine's clock jumped, and the store has not answered since";
            Error::new(ErrorKind::Unavailable, message)
        };
        self.store.clock().known_now().ok_or_else(unknown)
    }

    /// Starts as many calls as may be in flight: isolated writes alone, the others in batches.
    async fn fill_window(&self, state: &mut ReplayState) -> Result<()> {
        if state.unavailable.is_some() {
            return Ok(());
        }
        let last_ended = self.store.clock().last_ended();
        // The correction changes versions, so no batch may be in flight.
        if state.corrected_until != last_ended && !state.in_flight.is_empty() {
            return Ok(());
        }
        if state.cursor == 0 || state.corrected_until != last_ended {
            // The cursor has passed the writes that were provisional, so the queue is read from its head again.
            (state.cursor, state.corrected_until) = (0, last_ended);
            self.file.apply_clock_correction().await?;
            self.queue_index.apply_clock_correction();
        }
        // Before the rows are read, so that a replacing write knows that they may have been sent (I7).
        self.file.mark_dispatched().await?;
        for key in state.due() {
            match self.file.queued(&key).await?.filter(|queued| queued.is_queued) {
                Some(queued) if queued.is_dispatched && queued.unsynced.is_none() => {
                    state.send_alone(self, queued)
                }
                // A newer write replaced it just now. The next round marks that one as dispatched.
                Some(_) => {}
                None => _ = state.isolated.remove(&key),
            }
        }
        if state.batches == 0 {
            // Round-trip times of an earlier replay may not hold any more.
            state.sizer = BatchSizer::default();
        }
        while state.batches < MAX_CONCURRENT_BATCHES {
            let next = self.file.next_batch(state.cursor, state.sizer.records(), MAX_BATCH_BYTES).await?;
            let Some(last) = next.last() else { break };
            // The cursor passes isolated writes, too. They are sent when they are due.
            state.cursor = last.seq;
            let batch: Vec<QueuedRow> = next.into_iter().filter(|queued| state.can_batch(queued)).collect();
            if !batch.is_empty() {
                state.send(self, batch);
            }
        }
        Ok(())
    }

    /// Records the result of a batch. Returns whether the store answered.
    fn on_finished(&self, state: &mut ReplayState, finished: Result<FinishedBatch, JoinError>) -> bool {
        let FinishedBatch { was_alone, keys, result, took } = match finished {
            Ok(finished) => finished,
            Err(error) => {
                // The panic took the keys of the batch along. So replay reads the whole queue again.
                tracing::error!(%error, "replay task panicked; replay restarts from the head of the queue");
                state.restart();
                return false;
            }
        };
        if !was_alone {
            state.batches -= 1;
            // A small batch says nothing about the time that full batches take.
            if matches!(result, BatchResult::Completed(_)) && keys.len() >= MIN_BATCH_RECORDS {
                state.sizer.record(took);
            }
        }
        match result {
            BatchResult::Completed(retries) => {
                if was_alone && keys.iter().any(|(key, _)| state.has_failed(key)) {
                    // The cause of its failures is mended, and perhaps the cause of the others' failures.
                    state.retry_all();
                }
                for (key, _) in keys.iter().filter(|_| was_alone) {
                    state.recheck(key);
                }
                for (key, version, wait) in retries {
                    state.isolate(key, version, wait, self.alert.accepted());
                }
                true
            }
            BatchResult::Unavailable(error) => {
                // An outage is no proof against a record, so it counts as no failure.
                for (key, _) in &keys {
                    state.release(key, was_alone);
                }
                state.unavailable = Some(error);
                false
            }
            BatchResult::Rejected(error) if was_alone => {
                for (key, _) in &keys {
                    state.record_failure(key, &error);
                }
                true
            }
            BatchResult::Rejected(_) => {
                // One record fails the whole batch, and nothing tells which. So each goes alone.
                let accepted = self.alert.accepted();
                for (key, version) in keys {
                    state.isolate(key, version, Duration::ZERO, accepted);
                }
                true
            }
        }
    }
}

fn new_pauses() -> Backoff {
    Backoff::new(FIRST_PAUSE, MAX_PAUSE)
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
