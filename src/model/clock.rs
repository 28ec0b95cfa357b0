//! Issues versions by a hybrid logical clock that follows the store's clock.
//!
//! The idea is from Kulkarni et al., "Logical Physical Clocks" (2014). A version has physical milliseconds and a counter, and
//! is never at or below a version already seen.

mod sync;

use std::fmt;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::moment::{ClockReading, Moment, read_clocks, system_millis};
use super::version::{LOW_BITS, MAX_CLOCK_SKEW, RANDOM_BITS, Timestamp, Version};
pub(crate) use sync::{Correction, not_passed};
use sync::{SyncState, UNSYNCED};

/// A version with the state of the clock that issued it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IssuedVersion {
    /// The version.
    pub version: Version,
    issued_at: Moment,
    /// The time that the clock showed at the issue.
    pub(crate) shown: Timestamp,
    /// Whether the clock was unsynced. Clock sync gives such a version its final value (I8).
    pub(crate) is_provisional: bool,
    /// The era in which the version rises. It decides about the writer.
    pub(crate) era: u32,
}

impl IssuedVersion {
    /// Returns the time that the clock showed at a moment before the issue.
    ///
    /// If the clocks have jumped between the two, the elapsed time is unknown. Then `earlier` counts as the time of the issue,
    /// so that a conversation with a life from `earlier` on does not expire too soon.
    pub(crate) fn shown_at(&self, earlier: Moment) -> Timestamp {
        if earlier.is_comparable_to(self.issued_at) {
            self.shown.minus(self.issued_at.since(earlier))
        } else {
            self.shown
        }
    }
}

/// Estimates the store's clock, and issues versions above the last version seen.
///
/// The clock starts from the system clock and counts the time of this machine, sleep included. It moves only if an answer of
/// the store proves it wrong. Such an answer carries a time between the request and the response. The two bound
/// the error, and the clock moves to the nearer bound. A jump of this machine's clocks makes the clock
/// unsynced, as at the start, until the next answer.
///
/// ```
/// use std::time::{Duration, Instant};
/// use threadkeep::store::{Clock, Version};
///
/// let (clock, store) = (Clock::new(), Clock::skewed(60_000));
/// let sent = Instant::now();
/// clock.correct(sent, Instant::now(), store.now());
/// assert!((clock.now().0 - store.now().0).abs() < 1_000);
///
/// let seen = store.issue_version();
/// clock.observe(seen);
/// assert!(clock.issue_version() > seen);
///
/// let (own, stored) = (Clock::authoritative(), Version::min_at(clock.now().plus(Duration::from_secs(60))));
/// own.advance(stored);
/// assert!(own.issue_version() > stored && own.now_for_versions() >= stored.at());
/// ```
pub struct Clock {
    /// The time of the store's clock, in milliseconds, at moment zero.
    time_at_zero: AtomicI64,
    /// The time of versions at moment zero, if it is later. An authoritative clock needs it after the system clock was set
    /// back.
    version_time_at_zero: AtomicI64,
    /// The last version issued or observed.
    last_version: AtomicI64,
    /// Locked after `sync`, if both are.
    finals: Mutex<FinalVersions>,
    /// The milliseconds by which the clock started ahead of the system clock.
    skew: i64,
    /// The store has no clock but the system clock, so the system clock is right by definition.
    is_authoritative: bool,
    /// The number of jumps that this clock has reacted to.
    seen_jumps: AtomicU32,
    /// The number of jumps before the last sync, or [`UNSYNCED`]. The clock is synced as long as no further jump happens.
    synced_at: AtomicU64,
    /// Locked by each answer and each jump.
    sync: Mutex<SyncState>,
    /// Wakes [`jumped`](Self::jumped) after a jump that leaves the clock unsynced.
    jump_noticed: Notify,
    /// Wakes the waiters for an answer and for the end of the sync.
    sync_changed: Notify,
}

/// The final versions of a daemon. They rise within an era.
///
/// If the store's clock is set back, the versions fall with it. Then a new era begins, and the daemon counts as another
/// writer. Otherwise the store would take a new write for a repeated one.
#[derive(Debug, Default)]
struct FinalVersions {
    last: Version,
    era: u32,
}

impl FinalVersions {
    /// Begins a new era if the versions have fallen.
    fn begin_era_if_fallen(&mut self, now: Timestamp) {
        if !is_credible(self.last, now) {
            *self = Self { last: Version::NONE, era: self.era + 1 };
        }
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::skewed(0)
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clock").field("now", &self.now()).finish_non_exhaustive()
    }
}

impl Clock {
    /// Creates a clock that starts from the system clock. See [`Clock`] for an example.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates the clock of a store that uses the system clock, such as a file or a map on this machine.
    ///
    /// The clock follows the system clock forward and back, and no answer has to confirm it. Call [`advance`](Self::advance)
    /// with the newest stored version when such a store opens. See [`Clock`] for an example.
    pub fn authoritative() -> Self {
        Self { is_authoritative: true, ..Self::new() }
    }

    /// Creates a clock that starts `by_millis` ahead of the system clock, or behind it if negative. Tests use it to imitate a
    /// machine whose clock is wrong. See [`Clock`] for an example.
    pub fn skewed(by_millis: i64) -> Self {
        let ClockReading { moment, missed, .. } = read_clocks();
        let time_at_zero = system_millis().saturating_add(by_millis).saturating_sub(moment.millis());
        Self {
            time_at_zero: time_at_zero.into(),
            version_time_at_zero: i64::MIN.into(),
            last_version: 0.into(),
            finals: Mutex::default(),
            skew: by_millis,
            is_authoritative: false,
            seen_jumps: moment.jumps().into(),
            synced_at: UNSYNCED.into(),
            sync: Mutex::new(SyncState { missed, ..SyncState::default() }),
            jump_noticed: Notify::new(),
            sync_changed: Notify::new(),
        }
    }

    /// Returns the present moment. Each reading also notices a jump of this machine's clocks.
    pub(crate) fn moment(&self) -> Moment {
        let reading = read_clocks();
        self.notice(reading, || (Moment::now(), system_millis()));
        reading.moment
    }

    /// Returns the present time by the store's clock, as far as it is known. See [`Clock`] for an example.
    pub fn now(&self) -> Timestamp {
        self.at(self.moment())
    }

    pub(crate) fn at(&self, moment: impl Into<Moment>) -> Timestamp {
        // Acquire order: a reader that sees the time after a jump also sees the jump.
        Timestamp(self.time_at_zero.load(Acquire).saturating_add(moment.into().millis()))
    }

    pub(crate) fn known_now(&self) -> Option<Timestamp> {
        let reading = self.reading();
        (!reading.is_provisional).then_some(reading.shown)
    }

    /// Returns the time of this clock with its state. No jump and no answer comes between the two.
    fn reading(&self) -> IssuedVersion {
        let moment = self.moment();
        let reading = |moment: Moment, is_provisional| IssuedVersion {
            version: Version::NONE,
            issued_at: moment,
            shown: self.at(moment),
            is_provisional,
            era: 0,
        };
        let is_synced = || self.is_authoritative || self.synced_at.load(Acquire) == u64::from(moment.jumps());
        // Before and after the time: an answer that ends a period in between must not make the wrong time look synced.
        let was_synced = is_synced();
        let synced = reading(moment, false);
        // A jump in between may have moved the time at zero, which then does not belong to this moment.
        if was_synced && is_synced() && Moment::now().is_comparable_to(moment) {
            return synced;
        }
        // Under the lock, no answer and no jump comes between the values.
        let mut sync = self.sync.lock();
        let now = read_clocks();
        self.on_jump(&mut sync, now);
        reading(now.moment, self.synced_at.load(Relaxed) != u64::from(now.moment.jumps()))
    }

    /// Issues a version above every version issued or observed so far. It is even. See [`Clock`] for an example.
    pub fn issue_version(&self) -> Version {
        self.issue().version
    }

    /// Issues a version as [`issue_version`](Self::issue_version) does, with the state of the clock.
    pub(crate) fn issue(&self) -> IssuedVersion {
        let reading = self.reading();
        // After the system clock was set back, versions continue from the stored ones (I9).
        let now = reading.shown.max(self.min_version_time(reading.issued_at));
        // Issued versions are even. A version that a store makes is odd, so the two never meet.
        let fresh = Version::min_at(now).0 | fastrand::i64(0..1 << (LOW_BITS - 1)) << 1;
        let random = fastrand::i64(0..1 << (RANDOM_BITS - 1)) << 1;
        // The counter moves, and the random bits are new. After the last counter the sum runs into the next millisecond, as
        // in the paper.
        let next = |last: i64| (((last >> RANDOM_BITS) + 1) << RANDOM_BITS) | random;
        let after = |last: i64| if is_credible(Version(last), now) { fresh.max(next(last)) } else { fresh };
        let last = self.last_version.fetch_update(Relaxed, Relaxed, |last| Some(after(last)));
        let mut version = Version(after(last.unwrap_or_else(|last| last)));
        let mut finals = self.finals.lock();
        if !reading.is_provisional {
            finals.begin_era_if_fallen(now);
            // An observed version far ahead may hide the last one.
            version = version.max(finals.last.next_issued());
            finals.last = version;
        }
        IssuedVersion { version, era: finals.era, ..reading }
    }

    /// Issues a version above `other`, even if `other` is beyond the limit of clock skew.
    pub(crate) fn issue_after(&self, other: Version) -> IssuedVersion {
        self.observe(other);
        let issued = self.issue();
        IssuedVersion { version: issued.version.max(other.next_issued()), ..issued }
    }

    /// Observes a version of another clock, so that later versions of this clock are greater. See [`Clock`] for an example.
    pub fn observe(&self, seen: Version) {
        self.last_version.fetch_max(seen.0, Relaxed);
    }

    fn last_version(&self) -> Version {
        Version(self.last_version.load(Relaxed))
    }

    pub(crate) fn era(&self) -> u32 {
        self.finals.lock().era
    }

    /// Returns the version below which all versions of the first era are. `None` in a later era.
    pub(crate) fn end_of_first_era(&self) -> Option<Version> {
        let finals = self.finals.lock();
        (finals.era == 0).then(|| finals.last.max(self.last_version()))
    }

    /// Returns the time that new versions carry.
    ///
    /// It is the present time. If the store holds versions from a time when the system clock was ahead, it is a later time that
    /// continues from those versions. Expiry uses the present time in both cases. See [`Clock`] for an example.
    pub fn now_for_versions(&self) -> Timestamp {
        self.version_time(self.moment())
    }

    /// Continues from the newest version that a store without a clock of its own holds when it opens.
    /// See [`Clock`] for an example.
    pub fn advance(&self, stored: Version) {
        let stored_at_zero = stored.at().0.saturating_sub(self.moment().millis());
        self.version_time_at_zero.fetch_max(stored_at_zero, Relaxed);
        self.observe(stored);
    }

    fn version_time(&self, moment: Moment) -> Timestamp {
        self.at(moment).max(self.min_version_time(moment))
    }

    fn min_version_time(&self, moment: Moment) -> Timestamp {
        Timestamp(self.version_time_at_zero.load(Relaxed).saturating_add(moment.millis()))
    }
}

/// Whether later versions follow this one. A version far ahead came from a wrong clock, and no store accepts one that follows
/// it. It is ignored, so that writes do not fail until real time catches up.
fn is_credible(version: Version, now: Timestamp) -> bool {
    version < Version::min_at(now.plus(2 * MAX_CLOCK_SKEW))
}

#[cfg(test)]
mod tests;
