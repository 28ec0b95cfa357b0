//! The state of replay between two calls.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tracing::Instrument;
use tracing::instrument::WithSubscriber;

use super::Replayer;
use super::batch_sizer::BatchSizer;
use crate::error::{Error, ErrorKind};
use crate::model::key::Key;
use crate::model::version::Version;
use crate::outage::QueuedWrite;

/// The isolated writes in flight.
const MAX_ISOLATED_CALLS: usize = 4;
/// A write that fails alone waits for 2 s, then 4 s, and so on up to this.
const MAX_ISOLATED_PAUSE: Duration = Duration::from_secs(60);
/// The number of failures after which a write counts as parked.
const PARKED_AFTER: u32 = 3;
/// The pause before replay sends a write again that was rejected for the first time.
const RECHECK_AFTER: Duration = Duration::from_millis(50);

/// The result of a call.
#[derive(Debug)]
pub(super) enum CallResult {
    /// The store answered. These writes are sent again, each after a pause; the others have found their end.
    Completed(Vec<(Key, Version, Duration)>),
    /// The store takes no writes.
    Unavailable(Error),
    /// The store takes writes, but rejected this call.
    Rejected(Error),
}

/// A call that has returned.
#[derive(Debug)]
pub(super) struct FinishedCall {
    pub(super) keys: Vec<(Key, Version)>,
    pub(super) result: CallResult,
    pub(super) took: Duration,
}

/// A write that failed in a batch. Replay sends it alone from then on.
#[derive(Debug, Clone, Copy)]
pub(super) struct IsolatedWrite {
    version: Version,
    failures: u32,
    due: Instant,
    /// The number of calls that sent the write alone and failed.
    tries: u32,
    /// The number of writes that the store had accepted when this one was isolated, or when replay last paused. If the number
    /// grows, the store accepts others, and a failure is the fault of this write.
    pub(super) accepted: u64,
}

impl IsolatedWrite {
    pub(super) fn was_tried(&self) -> bool {
        self.tries > 0
    }
}

/// The state of replay between two calls.
#[derive(Debug, Default)]
pub(super) struct ReplayState {
    pub(super) in_flight: JoinSet<FinishedCall>,
    pub(super) sizer: BatchSizer,
    /// A conversation here and in `busy` has an isolated write in flight, and none in a batch.
    pub(super) isolated: HashMap<Key, IsolatedWrite>,
    /// The `seq` up to which batches have read the queue.
    pub(super) cursor: i64,
    /// Conversations with a row in flight. No other row of them is sent (C5).
    pub(super) busy: HashSet<Key>,
    /// The failure that makes replay pause.
    pub(super) unavailable: Option<Error>,
}

impl ReplayState {
    /// Whether a write may go into a batch. A newer write of an isolated conversation may.
    fn can_batch(&mut self, replayer: &Replayer, queued: &QueuedWrite) -> bool {
        let key = queued.key();
        if self.busy.contains(key) {
            // Looked at again after the call in flight.
            replayer.file.unblock(key.clone());
            return false;
        }
        let Some(isolated) = self.isolated.get(key) else { return true };
        // This version has failed a batch, and would fail the next one.
        if isolated.version == queued.version() {
            return false;
        }
        self.isolated.remove(key);
        true
    }

    /// Sends the writes that may go into a batch.
    pub(super) fn send(&mut self, replayer: &Replayer, mut batch: Vec<QueuedWrite>) {
        batch.retain(|queued| self.can_batch(replayer, queued));
        if !batch.is_empty() {
            self.spawn(replayer, batch, None);
        }
    }

    pub(super) fn send_alone(&mut self, replayer: &Replayer, queued: QueuedWrite) {
        if let Some(isolated) = self.isolated.get_mut(queued.key()) {
            // A newer write may have replaced the isolated one since.
            isolated.version = queued.version();
            let isolated = Some(*isolated);
            self.spawn(replayer, vec![queued], isolated);
        }
    }

    fn spawn(&mut self, replayer: &Replayer, batch: Vec<QueuedWrite>, isolated: Option<IsolatedWrite>) {
        let replayer = replayer.clone();
        self.busy.extend(batch.iter().map(|queued| queued.key().clone()));
        let keys = batch.iter().map(|queued| (queued.key().clone(), queued.version())).collect();
        let span = tracing::debug_span!("replay", records = batch.len());
        let send = async move {
            let (result, took) = replayer.send(batch, isolated).await;
            FinishedCall { keys, result, took }
        };
        // A spawned task inherits neither span nor subscriber.
        self.in_flight.spawn(send.instrument(span).with_current_subscriber());
    }

    /// Returns the number of batches in flight.
    pub(super) fn batches(&self) -> usize {
        self.in_flight.len() - self.isolated_in_flight()
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
        self.isolated.iter().filter(move |(key, isolated)| !self.busy.contains(*key) && may_go(isolated))
    }

    fn isolated_in_flight(&self) -> usize {
        self.busy.iter().filter(|key| self.isolated.contains_key(*key)).count()
    }

    /// Returns the number of parked writes. A write that was completed or replaced counts until it is due.
    pub(super) fn parked(&self) -> u64 {
        self.isolated.values().filter(|isolated| isolated.failures >= PARKED_AFTER).count() as u64
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
        let isolated = IsolatedWrite { version, failures: 0, due, accepted, tries: 0 };
        self.isolated.insert(key, isolated);
    }

    /// Logs one line for all writes of a call that wait for the first time, because a jump of the clock can affect the whole queue.
    pub(super) fn log_new_waits(&self, retries: &[(Key, Version, Duration)]) {
        let is_known = |key, version| self.isolated.get(key).is_some_and(|known| known.version == version);
        let mut new = retries.iter().filter(|(key, version, _)| !is_known(key, *version));
        if let Some((key, version, wait)) = new.next() {
            tracing::info!(
                thread_id = %key, %version, writes = 1 + new.count(), ?wait,
                "replay cannot send queued writes yet: their versions are too far ahead of the store's clock; replay retries them"
            );
        }
    }

    /// Makes all isolated writes due.
    fn retry_all(&mut self) {
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

    /// Records that an isolated write has passed. Makes its conversation due, because a batch may have skipped a newer write.
    pub(super) fn passed(&mut self, key: &Key) {
        let Some(isolated) = self.isolated.get_mut(key) else { return };
        isolated.due = Instant::now();
        if isolated.failures > 0 {
            // The cause of its failures is mended, and perhaps the cause of the others' failures.
            self.retry_all();
        }
    }

    /// Counts an outage during the call of an isolated write. It is no proof against the write, so it counts as no failure.
    pub(super) fn count_try(&mut self, key: &Key) {
        if let Some(isolated) = self.isolated.get_mut(key) {
            isolated.tries += 1;
        }
    }

    /// Records that a call failed. In a batch one record fails the whole call, and nothing tells which. So each write goes alone.
    /// A write that failed alone stays in the queue, and waits longer after each failure.
    pub(super) fn rejected(&mut self, key: Key, version: Version, error: &Error, accepted: u64) {
        let Some(isolated) = self.isolated.get_mut(&key) else {
            return self.isolate(key, version, Duration::ZERO, accepted);
        };
        isolated.tries += 1;
        if isolated.tries == 1 {
            tracing::info!(thread_id = %key, %error, "a queued write failed alone; replay sends it again after a pause");
        }
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
        self.unavailable = Some(Error::new(ErrorKind::Unavailable, "the replay task panicked"));
    }
}
