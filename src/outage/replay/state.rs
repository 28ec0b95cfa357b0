//! The state of replay between two calls.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tracing::Instrument;
use tracing::instrument::WithSubscriber;

use super::Replayer;
use super::batch_sizer::BatchSizer;
use crate::error::{Error, ErrorKind};
use crate::model::clock::UnsyncedPeriod;
use crate::model::key::Key;
use crate::model::version::Version;
use crate::outage::QueuedRow;

/// The isolated writes in flight.
const MAX_ISOLATED_CALLS: usize = 4;
/// A write that fails alone waits for 2 s, then 4 s, and so on up to this.
const MAX_ISOLATED_PAUSE: Duration = Duration::from_secs(60);
/// The number of failures after which a write counts as parked.
const PARKED_AFTER: u32 = 3;
/// The pause before replay looks again at a write that a direct write replaces, or that was rejected for the first time.
pub(super) const RECHECK_AFTER: Duration = Duration::from_millis(50);

/// The way a call sends queued writes.
#[derive(Debug, Clone, Copy)]
pub(super) enum SendMode {
    Batch,
    /// One [`IsolatedWrite`], with its state.
    Alone {
        was_tried: bool,
        accepted: u64,
    },
}

/// The result of a call.
#[derive(Debug)]
pub(super) enum BatchResult {
    /// The store answered. These writes are sent again, each after a pause; the others have found their end.
    Completed(Vec<(Key, Version, Duration)>),
    /// The store takes no writes.
    Unavailable(Error),
    /// The store takes writes, but rejected this call.
    Rejected(Error),
}

/// A call that has returned.
#[derive(Debug)]
pub(super) struct FinishedBatch {
    pub(super) was_alone: bool,
    pub(super) keys: Vec<(Key, Version)>,
    pub(super) result: BatchResult,
    pub(super) took: Duration,
}

/// A write that failed in a batch. Replay sends it alone from then on.
#[derive(Debug)]
pub(super) struct IsolatedWrite {
    version: Version,
    failures: u32,
    due: Instant,
    is_in_flight: bool,
    /// The number of calls that sent the write alone and failed.
    tries: u32,
    /// The number of writes that the store had accepted when this one was isolated, or when replay last paused. If the number
    /// grows, the store accepts others, and a failure is the fault of this write.
    accepted: u64,
}

/// The state of replay between two calls.
#[derive(Debug, Default)]
pub(super) struct ReplayState {
    pub(super) in_flight: JoinSet<FinishedBatch>,
    pub(super) batches: usize,
    pub(super) sizer: BatchSizer,
    pub(super) isolated: HashMap<Key, IsolatedWrite>,
    /// The `seq` up to which batches have read the queue.
    pub(super) cursor: i64,
    /// The last unsynced period whose correction was applied to the queue.
    pub(super) corrected_until: Option<UnsyncedPeriod>,
    /// The failure that makes replay pause.
    pub(super) unavailable: Option<Error>,
}

impl ReplayState {
    /// Whether a write may go into a batch. A newer write of an isolated conversation may.
    pub(super) fn can_batch(&mut self, queued: &QueuedRow) -> bool {
        let key = &queued.record.key;
        let Some(isolated) = self.isolated.get(key) else { return true };
        // This version has failed a batch, and would fail the next one.
        if isolated.is_in_flight || isolated.version == queued.record.version {
            return false;
        }
        self.isolated.remove(key);
        true
    }

    pub(super) fn send(&mut self, replayer: &Replayer, batch: Vec<QueuedRow>) {
        self.batches += 1;
        self.spawn(replayer, batch, SendMode::Batch);
    }

    pub(super) fn send_alone(&mut self, replayer: &Replayer, queued: QueuedRow) {
        if let Some(isolated) = self.isolated.get_mut(&queued.record.key) {
            isolated.is_in_flight = true;
            // A newer write may have replaced the isolated one since.
            isolated.version = queued.record.version;
            let (was_tried, accepted) = (isolated.tries > 0, isolated.accepted);
            self.spawn(replayer, vec![queued], SendMode::Alone { was_tried, accepted });
        }
    }

    fn spawn(&mut self, replayer: &Replayer, batch: Vec<QueuedRow>, mode: SendMode) {
        let was_alone = matches!(mode, SendMode::Alone { .. });
        let replayer = replayer.clone();
        let keys = batch.iter().map(|queued| (queued.record.key.clone(), queued.record.version)).collect();
        let span = tracing::debug_span!("replay", records = batch.len());
        let send = async move {
            let (result, took) = replayer.send(batch, mode).await;
            FinishedBatch { was_alone, keys, result, took }
        };
        // A spawned task inherits neither span nor subscriber.
        self.in_flight.spawn(send.instrument(span).with_current_subscriber());
    }

    /// Returns the isolated writes that are due, up to the number that may start now.
    pub(super) fn due(&self) -> Vec<Key> {
        let now = Instant::now();
        let mut due: Vec<_> = self.idle().filter(|(_, isolated)| isolated.due <= now).collect();
        // The least tried come first. Otherwise a few that always fail would starve the others.
        due.sort_by_key(|(_, isolated)| isolated.tries);
        due.truncate(MAX_ISOLATED_CALLS.saturating_sub(self.isolated_in_flight()));
        due.into_iter().map(|(key, _)| key.clone()).collect()
    }

    /// Returns the isolated writes that may be sent now or later. A write that failed waits until all others have been tried:
    /// if they fail as well, the fault is not its own.
    fn idle(&self) -> impl Iterator<Item = (&Key, &IsolatedWrite)> {
        let are_all_tried = self.isolated.values().all(|isolated| isolated.tries > 0);
        let may_go = move |isolated: &IsolatedWrite| are_all_tried || isolated.tries == 0;
        self.isolated.iter().filter(move |(_, isolated)| !isolated.is_in_flight && may_go(isolated))
    }

    fn isolated_in_flight(&self) -> usize {
        self.isolated.values().filter(|isolated| isolated.is_in_flight).count()
    }

    /// Returns the number of parked writes. A write that was completed or replaced counts until it is due.
    pub(super) fn parked(&self) -> usize {
        self.isolated.values().filter(|isolated| isolated.failures >= PARKED_AFTER).count()
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        // A past due time would make the loop spin while no call may start.
        if self.isolated_in_flight() >= MAX_ISOLATED_CALLS || self.unavailable.is_some() {
            return None;
        }
        self.idle().map(|(_, isolated)| isolated.due).min()
    }

    pub(super) fn isolate(&mut self, key: Key, version: Version, wait: Duration, accepted: u64) {
        let due = Instant::now() + wait;
        let isolated = IsolatedWrite { version, failures: 0, due, is_in_flight: false, accepted, tries: 0 };
        self.isolated.insert(key, isolated);
    }

    pub(super) fn has_failed(&self, key: &Key) -> bool {
        self.isolated.get(key).is_some_and(|isolated| isolated.failures > 0)
    }

    /// Makes all isolated writes due.
    pub(super) fn retry_all(&mut self) {
        let now = Instant::now();
        for isolated in self.isolated.values_mut() {
            (isolated.failures, isolated.due) = (0, now);
        }
    }

    /// Continues after a pause that began when the store had accepted `accepted` writes. Writes accepted before the pause say
    /// nothing about the store any more.
    pub(super) fn resume(&mut self, accepted: u64) {
        self.cursor = 0;
        self.retry_all();
        for isolated in self.isolated.values_mut() {
            isolated.accepted = accepted;
        }
    }

    /// Makes an isolated write due after its call. A batch may have skipped a newer write of the conversation meanwhile.
    pub(super) fn recheck(&mut self, key: &Key) {
        if let Some(isolated) = self.isolated.get_mut(key) {
            (isolated.is_in_flight, isolated.due) = (false, Instant::now());
        }
    }

    pub(super) fn release(&mut self, key: &Key, was_alone: bool) {
        if let Some(isolated) = self.isolated.get_mut(key) {
            isolated.is_in_flight = false;
            isolated.tries += u32::from(was_alone);
        }
    }

    /// Records that a write failed alone. The write stays in the queue, and waits longer after each failure.
    pub(super) fn record_failure(&mut self, key: &Key, error: &Error) {
        let Some(isolated) = self.isolated.get_mut(key) else { return };
        isolated.is_in_flight = false;
        isolated.tries += 1;
        // The first rejection is no proof. The write is sent once more after all others have been tried.
        if isolated.tries == 1 && error.is_record_fault() {
            isolated.due = Instant::now() + RECHECK_AFTER;
            return;
        }
        isolated.failures += 1;
        let pause = Duration::from_secs(1 << isolated.failures.min(12)).min(MAX_ISOLATED_PAUSE);
        isolated.due = Instant::now() + pause;
        // Equal and not greater, so that a series of failures logs one line.
        if isolated.failures == PARKED_AFTER {
            tracing::error!(
                thread_id = %key, %error,
                "a queued write failed {PARKED_AFTER} times alone and is parked; replay retries it every minute"
            );
        }
    }

    /// Drops all calls, and reads the queue from its head after a pause.
    pub(super) fn restart(&mut self) {
        self.in_flight.abort_all();
        // Isolated writes stay isolated. In a batch they would fail the others again.
        *self = Self { isolated: std::mem::take(&mut self.isolated), ..Self::default() };
        for isolated in self.isolated.values_mut() {
            isolated.is_in_flight = false;
        }
        self.unavailable = Some(Error::new(ErrorKind::Unavailable, "the replay task panicked"));
    }
}
