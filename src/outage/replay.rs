//! Replay: the transfer of the queue to the store, whenever the store is available.
//!
//! Replay sends the queue in order and in batches. If a batch fails while the probe succeeds, replay sends its writes alone. A
//! write that fails alone waits, and the others pass it. A write becomes a dead letter only by its own fault (I10).

mod batch_sizer;
mod send;
mod state;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::JoinError;

use crate::error::{Error, ErrorKind, Result};
use crate::model::version::Timestamp;
use crate::observe::alert::{Access, OperatorAlert};
use crate::observe::metrics::Metrics;
use crate::outage::file::OutageFile;
use crate::resilience::backoff::Backoff;
use crate::store::Store;
use batch_sizer::{BatchSizer, MIN_BATCH_RECORDS};
use state::{CallResult, FinishedCall, ReplayState};

const MAX_BATCH_BYTES: usize = 1 << 20;
/// The batches in flight. While the store works on one, replay completes the previous one or reads the next one.
const MAX_CONCURRENT_BATCHES: usize = 2;
/// The pauses while the store is unavailable but the breaker is closed.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(10);
/// The longest pause that the store can ask for by `Retry-After`.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Sends the queue to the store.
#[derive(Debug, Clone)]
pub(crate) struct Replayer {
    store: Arc<dyn Store>,
    file: Arc<OutageFile>,
    /// Without traffic, only replay notices that the store rejects a key, or accepts it again.
    alert: Arc<OperatorAlert>,
    metrics: Arc<Metrics>,
    /// One permit: batches are sent one after the other.
    send_permit: Arc<Semaphore>,
}

impl Replayer {
    pub(crate) fn new(store: Arc<dyn Store>, file: Arc<OutageFile>, alert: Arc<OperatorAlert>) -> Self {
        let (metrics, send_permit) = (Arc::new(Metrics::new()), Arc::new(Semaphore::new(1)));
        Self { store, file, alert, metrics, send_permit }
    }

    /// Replays until the task is aborted, with and without traffic.
    pub(crate) async fn run(self) {
        let (mut state, mut pauses) = (ReplayState::default(), new_pauses());
        let mut began = None;
        let mut queue = self.file.queue();
        loop {
            // Both are registered before the queue is read, so that no change and no accepted write in between is missed.
            let rows = queue.borrow_and_update().rows;
            let mended = self.alert.mended();
            log_progress(&mut began, rows);
            self.wait_for_breaker().await;
            if rows > 0
                && state.unavailable.is_none()
                && let Err(error) = self.ensure_clock_synced().await
            {
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
                pause(&error, pauses.next(), mended).await;
                state.resume(accepted);
                continue;
            }
            self.file.set_parked(state.parked());
            let due = state.next_due();
            let finished = tokio::select! {
                Some(finished) = state.in_flight.join_next() => finished,
                // Before a pause, the loop waits for its batches alone, because no new call may start.
                _ = queue.changed(), if state.unavailable.is_none() => continue,
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
    async fn ensure_clock_synced(&self) -> Result<()> {
        let clock = self.store.clock();
        if clock.is_synced() {
            return Ok(());
        }
        // Taken before the probe, because a jump during the probe makes the answer worthless.
        let asked = clock.moment();
        let probed = self.store.probe().await;
        self.alert.note(Access::Probe, &probed);
        probed?;
        clock.trust(asked);
        clock.settled().await;
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
        for key in state.due() {
            match self.file.first_of(vec![key.clone()]).await?.pop() {
                Some(queued) => state.send_alone(self, queued),
                None => _ = state.isolated.remove(&key),
            }
        }
        if state.batches() == 0 {
            // Round-trip times of an earlier replay may not hold any more.
            state.sizer = BatchSizer::default();
        }
        // The cursor has passed these conversations, whose first row has found its end or its final version since.
        let mut unblocked = self.file.take_unblocked();
        while state.batches() < MAX_CONCURRENT_BATCHES {
            let records = state.sizer.records();
            let next = if unblocked.is_empty() {
                let next = self.file.next_batch(state.cursor, records, MAX_BATCH_BYTES).await?;
                let Some(last) = next.last() else { break };
                // The cursor passes isolated writes, too. They are sent when they are due.
                state.cursor = last.seq;
                next
            } else {
                self.file.first_of(unblocked.drain(..records.min(unblocked.len())).collect()).await?
            };
            state.send(self, next);
        }
        for key in unblocked {
            self.file.unblock(key);
        }
        Ok(())
    }

    /// Records the result of a call. Returns whether the store answered.
    fn on_finished(&self, state: &mut ReplayState, finished: Result<FinishedCall, JoinError>) -> bool {
        let FinishedCall { keys, result, took } = match finished {
            Ok(finished) => finished,
            Err(error) => {
                // The panic took the keys of the batch along. So replay reads the whole queue again.
                tracing::error!(%error, "replay task panicked; replay restarts from the head of the queue");
                state.restart();
                return false;
            }
        };
        for (key, _) in &keys {
            state.busy.remove(key);
        }
        // A small batch says nothing about the time that full batches take.
        if matches!(result, CallResult::Completed(_)) && keys.len() >= MIN_BATCH_RECORDS {
            state.sizer.record(took);
        }
        match result {
            CallResult::Completed(retries) => {
                keys.iter().for_each(|(key, _)| state.passed(key));
                state.log_new_waits(&retries);
                for (key, version, wait) in retries {
                    state.isolate(key, version, wait, self.alert.accepted());
                }
                true
            }
            CallResult::Unavailable(error) => {
                keys.iter().for_each(|(key, _)| state.count_try(key));
                state.unavailable = Some(error);
                false
            }
            CallResult::Rejected(error) => {
                for (key, version) in keys {
                    state.rejected(key, version, &error, self.alert.accepted());
                }
                true
            }
        }
    }
}

/// Pauses after an error of the store. An accepted live write ends the pause, after the first pause at the earliest.
async fn pause(error: &Error, next: Option<Duration>, mended: impl Future<Output = ()>) {
    let pause = next.max(error.retry_after()).unwrap_or(MAX_PAUSE).min(MAX_RETRY_AFTER);
    tracing::debug!(%error, ?pause, "replay pauses: the store takes no writes");
    tokio::time::sleep(pause.min(FIRST_PAUSE)).await;
    tokio::select! {
        () = tokio::time::sleep(pause.saturating_sub(FIRST_PAUSE)) => {}
        () = mended => {}
    }
}

/// Logs the start and the end of a replay. `began` has the start, and the largest number of queued writes since.
fn log_progress(began: &mut Option<(Instant, u64)>, queued: u64) {
    match began {
        None if queued > 0 => {
            *began = Some((Instant::now(), queued));
            tracing::info!(writes = queued, "replay begins: the queue holds writes for the store");
        }
        Some((start, most)) if queued == 0 => {
            tracing::info!(writes = *most, after = ?start.elapsed(), "replay is done: the queue is empty");
            *began = None;
        }
        Some((_, most)) => *most = queued.max(*most),
        None => {}
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
