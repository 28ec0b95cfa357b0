//! Synchronisation of a clock with the store's answers, and its reaction to jumps of this machine's clocks.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Instant;

use super::corrections::{Corrections, UnsyncedPeriod, not_passed};
use super::{Clock, IssuedVersion};
use crate::model::moment::{ClockReading, Moment, read_clocks, system_millis};
use crate::model::version::{MAX_CLOCK_SKEW, Timestamp, Version, millis};

/// The drift in milliseconds beyond which an authoritative clock follows the system clock.
const MAX_DRIFT_MS: u64 = 20;

impl Clock {
    /// Reacts to a reading of this machine's clocks: counts a new jump, and follows the system clock if this clock is
    /// authoritative.
    pub(super) fn notice(&self, reading: ClockReading, read_exactly: impl Fn() -> (Moment, i64)) {
        if reading.moment.jumps() != self.seen_jumps.load(Relaxed) {
            self.on_jump(&mut self.corrections(), reading);
        }
        if self.is_authoritative && (reading.wall - self.at(reading.moment).0).unsigned_abs() > MAX_DRIFT_MS {
            self.follow_system(read_exactly());
        }
    }

    /// Begins an unsynced period. If one lasts already, its assumed time stays, because one answer corrects both.
    #[cold]
    pub(super) fn on_jump(
        &self,
        corrections: &mut Corrections,
        ClockReading { moment, wall, missed }: ClockReading,
    ) {
        // Another OS thread may have counted this jump while this one waited for the lock.
        if moment.jumps() <= self.seen_jumps.load(Relaxed) {
            return;
        }
        self.seen_jumps.store(moment.jumps(), Release);
        // The part of this jump alone: earlier jumps are counted already.
        let missed = missed - std::mem::replace(&mut corrections.missed, missed);
        if self.is_authoritative {
            return;
        }
        if self.unsynced_number.load(Relaxed) == 0 {
            let time_at_zero = self.time_at_zero.load(Relaxed);
            corrections.assumed = time_at_zero - not_passed(time_at_zero + moment.millis(), wall, missed);
            self.time_at_zero.store(corrections.assumed, Relaxed);
            // Release order: a reader that sees the number also sees the assumed time.
            self.unsynced_number.store(corrections.ended() + 1, Release);
        }
        self.jump_noticed.notify_one();
    }

    /// Follows the system clock after a step. Expiry follows it in both directions. The time of versions never goes back, so
    /// no later write loses against an earlier write.
    #[cold]
    fn follow_system(&self, (moment, system): (Moment, i64)) {
        let mut corrections = self.corrections();
        self.version_time_at_zero.fetch_max(self.time_at_zero.load(Relaxed), Relaxed);
        corrections.assumed = system - moment.millis();
        self.time_at_zero.store(corrections.assumed, Release);
    }

    /// Waits for a jump that leaves this clock unsynced until the next answer of the store.
    pub(crate) async fn jumped(&self) {
        self.jump_noticed.notified().await;
    }

    /// Returns the unsynced period as of the last reading of this machine's clocks.
    pub(super) fn noted_unsynced(&self) -> Option<UnsyncedPeriod> {
        self.unsynced_number.load(Acquire).checked_sub(1).map(UnsyncedPeriod)
    }

    /// Returns the present unsynced period, or `None` if the clock is synced.
    pub(crate) fn unsynced(&self) -> Option<UnsyncedPeriod> {
        self.moment();
        self.noted_unsynced()
    }

    /// Returns the present unsynced period, or else the last one.
    pub(crate) fn last_unsynced_period(&self) -> UnsyncedPeriod {
        let corrections = self.corrections();
        self.noted_unsynced().unwrap_or_else(|| UnsyncedPeriod(corrections.ended().saturating_sub(1)))
    }

    /// Returns the last unsynced period that has ended.
    pub(crate) fn last_ended(&self) -> Option<UnsyncedPeriod> {
        self.corrections().ended().checked_sub(1).map(UnsyncedPeriod)
    }

    /// Sets the clock to the time that an earlier process of this daemon knew. Only the first unsynced period accepts it.
    pub(crate) fn resume(&self, now: Timestamp) {
        let moment = self.moment();
        let mut corrections = self.corrections();
        if self.noted_unsynced() == Some(UnsyncedPeriod(0)) {
            corrections.assumed = now.0 - moment.millis();
            self.time_at_zero.store(corrections.assumed, Relaxed);
        }
    }

    /// Corrects the clock by an answer of the store: its clock showed `shown` between `sent` and `received`.
    ///
    /// The two moments bound the error from both sides, and the clock moves to the nearer bound. The clock ignores the answer
    /// if this machine's clocks have jumped since `sent`.
    ///
    /// ```
    /// use std::time::Instant;
    /// use threadkeep::store::Clock;
    ///
    /// let (clock, store) = (Clock::new(), Clock::skewed(60_000));
    /// let sent = Instant::now();
    /// clock.correct(sent, Instant::now(), store.now());
    /// assert!((clock.now().0 - store.now().0).abs() < 1_000);
    /// ```
    pub fn correct(&self, sent: Instant, received: Instant, shown: Timestamp) {
        self.correct_at(sent.into(), received.into(), shown);
    }

    /// Corrects the clock as [`correct`](Self::correct) does.
    pub(crate) fn correct_at(&self, sent: Moment, received: Moment, shown: Timestamp) {
        self.moment();
        let mut corrections = self.corrections();
        let jumps = self.seen_jumps.load(Relaxed);
        if self.is_authoritative || sent.jumps() != jumps || received.jumps() != jumps {
            return;
        }
        let earliest = shown.0.saturating_sub(received.millis());
        // A caller of `correct` may swap the instants, and `clamp` panics if its bounds cross.
        let latest = shown.0.saturating_sub(sent.millis()).max(earliest);
        self.time_at_zero.store(self.time_at_zero.load(Relaxed).clamp(earliest, latest), Relaxed);
        self.end_unsynced_period(&mut corrections);
    }

    /// Ends the unsynced period without a correction. Callers use it after an answer, sent for at `asked`, of a store that
    /// has no clock of its own.
    pub(crate) fn trust(&self, asked: Moment) {
        let now = self.moment();
        let mut corrections = self.corrections();
        if asked.is_comparable_to(now) && now.jumps() == self.seen_jumps.load(Relaxed) {
            self.end_unsynced_period(&mut corrections);
        }
    }

    fn end_unsynced_period(&self, corrections: &mut Corrections) {
        if self.noted_unsynced().is_none() {
            return;
        }
        let correction_ms = self.time_at_zero.load(Relaxed).saturating_sub(corrections.assumed);
        // New versions must not follow the versions that the wrong clock issued.
        if correction_ms.abs() > millis(MAX_CLOCK_SKEW) {
            let now = self.version_time(read_clocks().moment);
            self.last_version.fetch_min(Version::min_at(now).0, Relaxed);
        }
        corrections.add(correction_ms);
        // Last, so that a reader of a synced clock also reads the corrected time.
        self.unsynced_number.store(0, Release);
    }

    /// Returns the correction of the versions of an unsynced period, in milliseconds, or `None` while the period lasts (I8).
    /// The correction is zero if the clock was right within the [tolerance](MAX_CLOCK_SKEW).
    pub(crate) fn moved(&self, unsynced: UnsyncedPeriod) -> Option<i64> {
        self.exact_correction_ms(unsynced).map(beyond_tolerance)
    }

    /// Returns the correction as [`moved`](Self::moved), also within the tolerance. Expiry is exact (I17).
    pub(crate) fn exact_correction_ms(&self, unsynced: UnsyncedPeriod) -> Option<i64> {
        self.corrections().of(unsynced)
    }

    /// Returns the lead, in milliseconds, of this clock over the system clock before the last correction.
    ///
    /// The lead is not zero if the system clock was set after the start. It is zero within the [tolerance](MAX_CLOCK_SKEW).
    pub(crate) fn ahead_of_system(&self) -> i64 {
        let moment = self.moment();
        let assumed = self.corrections().assumed;
        self.lead_over_system(assumed.saturating_add(moment.millis()))
    }

    /// Returns the known lead, in milliseconds, of the store's clock over the system clock. The lead is zero within the
    /// [tolerance](MAX_CLOCK_SKEW).
    pub(crate) fn offset(&self) -> i64 {
        self.lead_over_system(self.now().0)
    }

    fn lead_over_system(&self, shown: i64) -> i64 {
        beyond_tolerance(shown - system_millis() - self.skew)
    }

    /// Whether the clock was wrong when it issued a version.
    ///
    /// An observed version may have pushed the issued version near the right time. The version is still out of tolerance,
    /// because the correction moves the queued versions of the same period, and they must not pass this version.
    pub(crate) fn is_out_of_tolerance(&self, issued: &IssuedVersion) -> bool {
        let correction = issued.unsynced.map(|unsynced| self.moved(unsynced));
        // A second jump before the answer makes the correction of the first jump unknown.
        let is_unknown = correction == Some(None) && !issued.is_comparable_to(self.moment());
        if is_unknown || correction.flatten().is_some_and(|correction_ms| correction_ms != 0) {
            return true;
        }
        // A jump after the issue changes nothing about a version that was right.
        if self.is_authoritative || !issued.is_comparable_to(self.moment()) {
            return false;
        }
        let (expected, actual) = (self.version_time(issued.issued_at), issued.version.at());
        expected.since(actual) > MAX_CLOCK_SKEW || actual.since(expected) > MAX_CLOCK_SKEW
    }
}

fn beyond_tolerance(off_by_ms: i64) -> i64 {
    if off_by_ms.abs() > millis(MAX_CLOCK_SKEW) { off_by_ms } else { 0 }
}
