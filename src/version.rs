//! Versions: a hybrid logical clock that follows the clock of the source of truth.
//!
//! The idea is Kulkarni et al., "Logical Physical Clocks" (2014): physical milliseconds where possible, a counter
//! where needed, and never a version at or below one already seen.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use chrono::{DateTime, Utc};

/// Bits below the milliseconds: a 7-bit counter, seeded at random (RFC 9562, section 6.2, method 1), then 14 random bits. So two
/// daemons that write in the same millisecond give the same version once in two million times.
const LOW_BITS: u32 = 21;
const RANDOM_BITS: u32 = 14;

/// How far a version may be ahead of the source of truth, and a stamp off, before it counts as misjudged.
pub const TOLERANCE: Duration = Duration::from_secs(2);
/// How old a version may be when it is applied. Deletions are remembered for a day longer.
pub const OLDEST: Duration = Duration::from_secs(7 * 86_400);
/// How long a deleted or expired record is remembered, so that a late write meets it.
pub const REMEMBERED: Duration = Duration::from_secs(8 * 86_400);

/// A moment by the clock of the source of truth, in milliseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The moment this much later, at most the end of time.
    pub fn plus(self, span: Duration) -> Self {
        Self(self.0.saturating_add(millis(span)))
    }

    /// The moment this much earlier.
    pub fn minus(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(millis(span)))
    }

    /// The time from `earlier` to here, zero where that is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl From<Timestamp> for DateTime<Utc> {
    fn from(at: Timestamp) -> Self {
        Self::from_timestamp_millis(at.0).unwrap_or(Self::MAX_UTC)
    }
}

fn system_millis() -> i64 {
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the system's clock")]
    let system = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    millis(system.unwrap_or_default())
}

fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}

/// The version of a record: the greater one is the newer. Zero is the version of what never was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version(i64);

impl Version {
    /// The version of a thread that never was.
    pub const NONE: Self = Self(0);

    /// The version with this number, as stores keep it.
    pub const fn from_raw(raw: i64) -> Self {
        Self(raw)
    }

    /// The number that stores keep.
    pub const fn raw(self) -> i64 {
        self.0
    }

    /// When it was given, by the clock of the source of truth.
    pub const fn at(self) -> Timestamp {
        Timestamp(self.0 >> LOW_BITS)
    }

    /// The lowest version of a moment.
    pub const fn lowest(at: Timestamp) -> Self {
        Self(at.0 << LOW_BITS)
    }

    /// The version that a clock would have given that is so many milliseconds ahead.
    pub(crate) const fn shifted(self, millis: i64) -> Self {
        Self(self.0.saturating_add(millis.saturating_mul(1 << LOW_BITS)))
    }

    /// The version that a clock would have given that is so many milliseconds ahead of the one that showed `at` then.
    /// What that one had seen may have pushed it ahead of what it showed, which the right one would not have needed.
    pub(crate) fn straightened(self, moved: i64, at: Timestamp) -> Self {
        let lead = self.at().0.saturating_sub(at.0).max(0);
        if moved == 0 { self } else { self.shifted(moved - lead) }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A version and the moment it was given, so that a clock found wrong later can tell.
#[derive(Debug, Clone, Copy)]
pub struct Stamp {
    /// The version given.
    pub version: Version,
    given: Instant,
    /// By a clock that no answer had put right yet.
    is_blind: bool,
}

/// What the clock of the source of truth shows, as far as this process knows, and the last version seen.
///
/// It starts from the system's clock, runs on the monotonic one, and moves only when an answer of the source of truth
/// proves it wrong: an answer that was asked for at `sent` and came at `received` and says `truth` bounds the
/// difference of the two clocks from both sides, and the clock moves to the nearer bound.
pub struct Clock {
    /// The monotonic moment that `truth` belongs to.
    start: Instant,
    /// Milliseconds of truth at `start`.
    truth: AtomicI64,
    /// By how much versions run ahead of the time, where the store has no clock but the system's and that was set back.
    lead: AtomicI64,
    /// The last version given or seen.
    last: AtomicI64,
    /// What the clock started from, and by how much that was ahead of the system's clock.
    started_at: AtomicI64,
    skew: i64,
    /// See [`moved`](Self::moved).
    moved: OnceLock<i64>,
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
    /// A clock that starts from the system's.
    pub fn new() -> Self {
        Self::default()
    }

    /// The clock of a store that has none but the system's: right by definition, from the start.
    pub(crate) fn of_truth() -> Self {
        Self { moved: OnceLock::from(0), ..Self::new() }
    }

    /// A clock that starts `by_millis` ahead of the system's (behind, where negative), as on a machine whose clock is
    /// wrong.
    pub fn skewed(by_millis: i64) -> Self {
        let truth = system_millis().saturating_add(by_millis);
        Self {
            start: Instant::now(),
            truth: truth.into(),
            lead: 0.into(),
            last: 0.into(),
            started_at: truth.into(),
            skew: by_millis,
            moved: OnceLock::new(),
        }
    }

    /// The present moment.
    pub fn now(&self) -> Timestamp {
        self.at(Instant::now())
    }

    /// The moment that a reading of the monotonic clock stands for.
    pub fn at(&self, moment: Instant) -> Timestamp {
        Timestamp(self.truth.load(Relaxed) + self.elapsed(moment))
    }

    /// A version above every one given or seen so far.
    pub fn stamp(&self) -> Stamp {
        let given = Instant::now();
        let is_blind = self.moved().is_none();
        let low = fastrand::i64(0..1 << RANDOM_BITS);
        let now = self.version_time(given);
        let fresh = Version::lowest(now).0 | fastrand::i64(0..1 << LOW_BITS);
        // What lies further ahead than any store accepts was seen or given by a clock that was wrong: following it
        // would make every write be refused until real time catches up.
        let horizon = Version::lowest(now.plus(2 * TOLERANCE)).0;
        // The counter moves and the random bits are drawn anew; past the last counter this runs into the next
        // millisecond, which is as the paper has it.
        let after = |last: i64| match last < horizon {
            true => fresh.max((((last >> RANDOM_BITS) + 1) << RANDOM_BITS) | low),
            false => fresh,
        };
        let last = self.last.fetch_update(Relaxed, Relaxed, |last| Some(after(last)));
        Stamp { version: Version(after(last.unwrap_or_else(|last| last))), given, is_blind }
    }

    /// A version above this one, too, however far ahead that lies.
    pub(crate) fn stamp_after(&self, other: Version) -> Version {
        self.observe(other);
        self.stamp().version.max(Version(other.0.saturating_add(1)))
    }

    /// Moves past a version given elsewhere.
    pub fn observe(&self, seen: Version) {
        self.last.fetch_max(seen.0, Relaxed);
    }

    /// Goes on from what the clock of the source of truth must show now, by what was known of it before this process began.
    #[cfg(feature = "sqlite")]
    pub(crate) fn resume(&self, now: Timestamp) {
        if self.moved.get().is_none() {
            let start = now.0 - self.elapsed(Instant::now());
            self.truth.store(start, Relaxed);
            self.started_at.store(start, Relaxed);
        }
    }

    /// Learns that the source of truth's clock showed `shown` at some moment between `sent` and `received`.
    pub fn correct(&self, sent: Instant, received: Instant, shown: Timestamp) {
        let earliest = shown.0 - self.elapsed(received);
        let latest = shown.0 - self.elapsed(sent);
        self.truth.fetch_update(Relaxed, Relaxed, |truth| Some(truth.clamp(earliest, latest))).ok();
        let moved = self.truth.load(Relaxed) - self.started_at.load(Relaxed);
        self.moved.get_or_init(|| {
            // What it gave while it was wrong is not to be followed any more.
            if moved.abs() > millis(TOLERANCE) {
                self.last.fetch_min(Version::lowest(self.now_for_versions()).0, Relaxed);
            }
            moved
        });
    }

    /// By how many milliseconds the first answer moved this clock, if there was one: what was stamped before is off by so
    /// much. Zero where the clock was right within the [tolerance](TOLERANCE).
    pub(crate) fn moved(&self) -> Option<i64> {
        self.moved_exactly().map(|moved| if moved.abs() > millis(TOLERANCE) { moved } else { 0 })
    }

    /// As [`moved`](Self::moved), also within the tolerance: what expires, expires exactly.
    pub(crate) fn moved_exactly(&self) -> Option<i64> {
        self.moved.get().copied()
    }

    /// By how many milliseconds this clock was ahead of the system's before an answer [moved](Self::moved) it, where the
    /// system's may have been set since it started; zero within the [tolerance](TOLERANCE).
    pub(crate) fn ahead_of_system(&self) -> i64 {
        let unmoved = self.started_at.load(Relaxed) + self.elapsed(Instant::now());
        let ahead = unmoved - system_millis() - self.skew;
        if ahead.abs() > millis(TOLERANCE) { ahead } else { 0 }
    }

    /// The time that versions go by: the present, or, where the store holds versions from a time when the system's clock
    /// was ahead, a time line that goes on from those. Expiry goes by the present all the same.
    pub fn now_for_versions(&self) -> Timestamp {
        self.version_time(Instant::now())
    }

    /// For a store that has no clock but the system's: the newest version that it holds when it is opened.
    pub fn advance(&self, stored: Version) {
        self.lead.fetch_max(stored.at().0 - self.now().0, Relaxed);
        self.observe(stored);
    }

    fn version_time(&self, moment: Instant) -> Timestamp {
        Timestamp(self.at(moment).0 + self.lead.load(Relaxed))
    }

    /// Whether a stamp was given by a clock that has since been found wrong; also where a version that it had seen pushed the
    /// stamp near the right time: what that clock queued before is put right, and must not overtake this.
    pub(crate) fn misjudged(&self, stamp: &Stamp) -> bool {
        if stamp.is_blind && self.moved().is_some_and(|moved| moved != 0) {
            return true;
        }
        let then = self.version_time(stamp.given);
        let claimed = stamp.version.at();
        then.since(claimed) > TOLERANCE || claimed.since(then) > TOLERANCE
    }

    fn elapsed(&self, moment: Instant) -> i64 {
        millis(moment.saturating_duration_since(self.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(span: u64) -> Duration {
        Duration::from_millis(span)
    }

    #[test]
    fn stamps_rise_within_a_millisecond_and_past_what_was_seen() {
        let clock = Clock::new();
        let stamps: Vec<_> = (0..10_000).map(|_| clock.stamp().version).collect();
        assert!(stamps.windows(2).all(|pair| pair[0] < pair[1]));
        let seen = Version::lowest(clock.now().plus(ms(1500)));
        clock.observe(seen);
        assert!(clock.stamp().version > seen);
    }

    #[test]
    fn an_answer_corrects_a_clock_that_is_off_either_way() {
        for skew in [-300_000, 300_000] {
            let (right, wrong) = (Clock::new(), Clock::skewed(skew));
            let early = wrong.stamp();
            let now = Instant::now();
            wrong.correct(now, now, right.now());
            assert!((wrong.now().0 - right.now().0).abs() <= 5, "skew {skew}");
            assert!(wrong.misjudged(&early) && !wrong.misjudged(&wrong.stamp()), "skew {skew}");
            assert!((wrong.stamp().version.at().0 - right.now().0).abs() <= 5, "skew {skew}");
            wrong.observe(early.version);
            assert!((wrong.stamp().version.at().0 - right.now().0).abs() <= 5, "skew {skew}, and seen again");
        }
    }

    #[test]
    fn a_stamp_of_a_clock_that_was_wrong_is_misjudged_also_where_what_that_had_seen_pushed_it_near_the_right_time()
     {
        let (right, wrong) = (Clock::new(), Clock::skewed(-3_000));
        wrong.observe(Version::lowest(right.now().minus(ms(500))));
        let (early, now) = (wrong.stamp(), Instant::now());
        wrong.correct(now, now, right.now());
        assert!(wrong.misjudged(&early) && !wrong.misjudged(&wrong.stamp()));
    }

    #[test]
    fn daemons_that_write_in_the_same_millisecond_hardly_ever_give_the_same_version() {
        // Where the counters began alike it were one in 16,384.
        let met =
            (0..300_000).filter(|_| Clock::new().stamp().version == Clock::new().stamp().version).count();
        assert!(met <= 3, "{met}");
    }

    #[test]
    fn an_answer_within_the_bounds_moves_nothing() {
        let clock = Clock::new();
        let sent = Instant::now();
        let before = clock.at(sent);
        clock.correct(sent, sent + ms(500), before.plus(ms(200)));
        assert_eq!(clock.at(sent), before);
    }

    #[test]
    fn versions_go_on_from_what_is_stored_though_the_clock_was_set_back() {
        let clock = Clock::skewed(-60_000);
        let stored = Version::lowest(Clock::new().now());
        clock.advance(stored);
        let stamp = clock.stamp();
        assert!(stamp.version > stored && !clock.misjudged(&stamp));
        assert!(clock.now() < stored.at(), "expiry goes by the system's clock");
    }
}
