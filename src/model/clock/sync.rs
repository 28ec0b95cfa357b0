//! The sync of a clock with the store's clock, and the jumps that end it.
//!
//! While the clock is unsynced, versions are provisional. The next answer of the store is pending until the outage file has
//! corrected its provisional rows (`outage/clock_sync.rs`). Without an outage file, the answer counts at once.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Instant;

use super::{Clock, is_credible};
use crate::model::moment::{ClockReading, Moment, read_clocks, system_millis};
use crate::model::version::{MAX_CLOCK_SKEW, Timestamp, Version, millis};

/// The drift in milliseconds beyond which an authoritative clock follows the system clock.
const MAX_DRIFT_MS: u64 = 20;
/// The value of `Clock::synced_at` before the first sync.
pub(super) const UNSYNCED: u64 = u64::MAX;

/// The correction of an unsynced clock, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Correction(pub(crate) i64);

/// The part of the sync that only answers and jumps use.
#[derive(Debug, Default)]
pub(super) struct SyncState {
    /// The outage file ends an unsynced period, after it has corrected its rows. Without a file, an answer ends it.
    pub(super) is_by_file: bool,
    /// The value for `Clock::time_at_zero` by the answer that waits for the outage file.
    pub(super) pending: Option<i64>,
    /// The milliseconds that the monotonic clock had missed by the last jump.
    pub(super) missed: i64,
}

impl Clock {
    /// Reacts to a reading of this machine's clocks: counts a new jump, and follows the system clock if this clock is
    /// authoritative.
    pub(super) fn notice(&self, reading: ClockReading, read_exactly: impl Fn() -> (Moment, i64)) {
        if reading.moment.jumps() != self.seen_jumps.load(Relaxed) {
            self.on_jump(&mut self.sync.lock(), reading);
        }
        if self.is_authoritative && (reading.wall - self.at(reading.moment).0).unsigned_abs() > MAX_DRIFT_MS {
            self.follow_system(read_exactly());
        }
    }

    /// Counts a jump, which ends the sync. If the clock was unsynced before, its time stays, because one answer corrects both.
    #[cold]
    pub(super) fn on_jump(&self, sync: &mut SyncState, ClockReading { moment, wall, missed }: ClockReading) {
        // Another OS thread may have counted this jump while this one waited for the lock.
        if moment.jumps() <= self.seen_jumps.load(Relaxed) {
            return;
        }
        let was_synced = self.synced_at.load(Relaxed) == u64::from(self.seen_jumps.load(Relaxed));
        // The part of this jump alone: earlier jumps are counted already.
        let missed = missed - std::mem::replace(&mut sync.missed, missed);
        let last = self.last_version();
        if was_synced && is_credible(last, Timestamp(self.at(moment).0 - missed)) {
            // It may be an observed version. Later versions are above those, too.
            self.continue_above(last);
        }
        // The store gave the pending answer before the jump.
        if sync.pending.take().is_some() {
            self.sync_changed.notify_waiters();
        }
        if was_synced && !self.is_authoritative {
            let time_at_zero = self.time_at_zero.load(Relaxed);
            let not_passed = not_passed(time_at_zero + moment.millis(), wall, missed);
            self.time_at_zero.store(time_at_zero - not_passed, Release);
        }
        // Release order: a reader that sees the number also sees the time.
        self.seen_jumps.store(moment.jumps(), Release);
        if !self.is_authoritative {
            self.jump_noticed.notify_one();
        }
    }

    /// Follows the system clock after a step. Expiry follows it in both directions. The time of versions never goes back, so
    /// no later write loses against an earlier write.
    #[cold]
    fn follow_system(&self, (moment, system): (Moment, i64)) {
        let _sync = self.sync.lock();
        self.version_time_at_zero.fetch_max(self.time_at_zero.load(Relaxed), Relaxed);
        self.time_at_zero.store(system - moment.millis(), Release);
    }

    /// Waits for a jump that leaves this clock unsynced until the next answer of the store.
    pub(crate) async fn jumped(&self) {
        self.jump_noticed.notified().await;
    }

    /// Whether versions are final. False from the start or a jump until the end of the next sync.
    pub(crate) fn is_synced(&self) -> bool {
        self.is_authoritative || u64::from(self.moment().jumps()) == self.synced_at.load(Acquire)
    }

    /// Waits until no answer of the store waits for the outage file. Returns whether the clock is synced.
    pub(crate) async fn settled(&self) -> bool {
        self.wait_for_sync(|| self.pending().is_none().then(|| self.is_synced())).await
    }

    /// Waits until an answer of the store waits for the outage file.
    pub(crate) async fn answered(&self) -> Correction {
        self.wait_for_sync(|| self.pending()).await
    }

    async fn wait_for_sync<T>(&self, find: impl Fn() -> Option<T>) -> T {
        loop {
            // Before the look, so that no change in between is missed.
            let changed = self.sync_changed.notified();
            if let Some(found) = find() {
                return found;
            }
            changed.await;
        }
    }

    /// Returns the correction by the answer that waits for the outage file.
    pub(crate) fn pending(&self) -> Option<Correction> {
        self.moment();
        let pending = self.sync.lock().pending?;
        Some(Correction(pending.saturating_sub(self.time_at_zero.load(Relaxed))))
    }

    /// Returns the correction by the answer that waits for the outage file, and the present time by that answer.
    pub(crate) fn pending_with_time(&self) -> Option<(Correction, Timestamp)> {
        let moment = self.moment();
        let sync = self.sync.lock();
        let corrected = sync.pending?;
        let correction = Correction(corrected.saturating_sub(self.time_at_zero.load(Relaxed)));
        let now = Timestamp(corrected.saturating_add(moment.millis()));
        // After a jump, the answer and this moment belong to different times, and rows could be ahead by the jump.
        (moment.jumps() == self.seen_jumps.load(Relaxed)).then_some((correction, now))
    }

    /// Drops the answer that waits for the outage file, which cannot take it now. The next answer tries again.
    pub(crate) fn discard_answer(&self) {
        self.sync.lock().pending = None;
        self.sync_changed.notify_waiters();
    }

    /// Returns the last final version of the era, or a later version observed before a jump. Later versions of the era must be
    /// above it.
    pub(crate) fn last_final(&self) -> Version {
        self.finals.lock().last
    }

    /// Continues above the final versions of an earlier process.
    pub(crate) fn continue_above(&self, last_final: Version) {
        self.observe(last_final);
        let mut finals = self.finals.lock();
        finals.last = finals.last.max(last_final);
    }

    /// Lets the outage file end each unsynced period from now on.
    pub(crate) fn sync_by_file(&self) {
        self.sync.lock().is_by_file = true;
    }

    /// Sets the clock to the time that an earlier process of this daemon knew, if no answer came first.
    pub(crate) fn resume(&self, now: Timestamp) {
        let moment = self.moment();
        let sync = self.sync.lock();
        if self.synced_at.load(Relaxed) == UNSYNCED && sync.pending.is_none() {
            self.time_at_zero.store(now.0 - moment.millis(), Relaxed);
        }
    }

    /// Corrects the clock by an answer of the store: its clock showed `shown` between `sent` and `received`.
    ///
    /// The two moments bound the error from both sides, and the clock moves to the nearer bound. The clock ignores the answer
    /// if this machine's clocks have jumped since `sent`. See [`Clock`] for an example.
    pub fn correct(&self, sent: Instant, received: Instant, shown: Timestamp) {
        self.correct_at(sent.into(), received.into(), shown);
    }

    pub(crate) fn correct_at(&self, sent: Moment, received: Moment, shown: Timestamp) {
        let earliest = shown.0.saturating_sub(received.millis());
        // A caller of `correct` may swap the instants, and `clamp` panics if its bounds cross.
        let latest = shown.0.saturating_sub(sent.millis()).max(earliest);
        self.answer(&[sent, received], |time_at_zero| time_at_zero.clamp(earliest, latest));
    }

    /// Takes an answer, sent for at `asked`, of a store that has no clock of its own. The clock counts as right.
    pub(crate) fn trust(&self, asked: Moment) {
        self.answer(&[asked], |time_at_zero| time_at_zero);
    }

    fn answer(&self, moments: &[Moment], corrected: impl FnOnce(i64) -> i64) {
        self.moment();
        let mut sync = self.sync.lock();
        let jumps = self.seen_jumps.load(Relaxed);
        if self.is_authoritative || moments.iter().any(|moment| moment.jumps() != jumps) {
            return;
        }
        let time_at_zero = self.time_at_zero.load(Relaxed);
        let corrected = corrected(sync.pending.unwrap_or(time_at_zero));
        if self.synced_at.load(Relaxed) == u64::from(jumps) {
            self.time_at_zero.store(corrected, Relaxed);
        } else if !sync.is_by_file {
            self.correct_by(Correction(corrected.saturating_sub(time_at_zero)));
            self.set_synced();
        } else {
            sync.pending = Some(corrected);
            self.sync_changed.notify_waiters();
        }
    }

    /// Ends the unsynced period, after the outage file has corrected its rows by this correction.
    ///
    /// Versions go on above `newest`. If the clocks have jumped meanwhile, the clock is corrected and stays unsynced.
    pub(crate) fn finish_sync(&self, correction: Correction, newest: Version) {
        self.moment();
        let mut sync = self.sync.lock();
        // Before the end of the period. A put in between would get a version below the corrected ones, and lose to them.
        self.continue_above(newest);
        self.correct_by(correction);
        if sync.pending.take().is_some() {
            self.set_synced();
        }
    }

    fn correct_by(&self, correction: Correction) {
        self.time_at_zero.fetch_add(correction.0, Relaxed);
        // New versions must not follow the versions that the wrong clock issued.
        if correction.0.abs() > millis(MAX_CLOCK_SKEW) {
            let now = self.version_time(read_clocks().moment);
            let mut finals = self.finals.lock();
            finals.begin_era_if_fallen(now);
            self.last_version.fetch_min(Version::min_at(now).max(finals.last).0, Relaxed);
        }
    }

    /// Marks the clock as synced. The caller holds the lock.
    fn set_synced(&self) {
        // Last, so that a reader of a synced clock also reads the corrected time.
        self.synced_at.store(self.seen_jumps.load(Relaxed).into(), Release);
        self.sync_changed.notify_waiters();
    }

    /// Returns the known lead, in milliseconds, of this clock over the system clock. The lead is zero within the
    /// [tolerance](MAX_CLOCK_SKEW).
    pub(crate) fn offset(&self) -> i64 {
        let lead = self.now().0 - system_millis() - self.skew;
        if is_beyond_tolerance(lead) { lead } else { 0 }
    }
}

/// Returns the part of the `missed` milliseconds that did not pass: all of them, or none.
///
/// `shown` is the time of the store's clock if the missed time has passed, and `system` is the time of the system clock. If the
/// system clock agrees only with `shown - missed`, the step made a wrong system clock right. Then no time passed.
pub(crate) fn not_passed(shown: i64, system: i64, missed: i64) -> i64 {
    let made_right = is_beyond_tolerance(shown - system) && !is_beyond_tolerance(shown - missed - system);
    if made_right { missed } else { 0 }
}

fn is_beyond_tolerance(by_ms: i64) -> bool {
    by_ms.abs() > millis(MAX_CLOCK_SKEW)
}
