//! Versions: a hybrid logical clock that follows the clock of the source of truth.
//!
//! The idea is Kulkarni et al., "Logical Physical Clocks" (2014): physical milliseconds where possible, a counter
//! where needed, and never a version at or below one already seen.

mod moment;

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicI64, AtomicU32};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::Notify;

pub use moment::Moment;
pub(crate) use moment::system_millis;
use moment::{Sight, look};

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

pub(crate) fn millis(span: Duration) -> i64 {
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

/// A stretch of time in which the clock of the source of truth was not known: from the start of the process or a jump of this
/// machine's clocks until the next answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Blindness(pub(crate) u32);

/// A version and the moment it was given, so that a clock found wrong later can tell.
#[derive(Debug, Clone, Copy)]
pub struct Stamp {
    /// The version given.
    pub version: Version,
    given: Moment,
    /// What the clock showed then.
    pub(crate) shown: Timestamp,
    /// The blindness in which it was given: an answer will tell by how much it is off.
    pub(crate) blindness: Option<Blindness>,
}

impl Stamp {
    /// What the clock that gave it showed at a moment before. If the clocks have jumped between the two, how long that is ago
    /// nobody knows, and it counts as now: what lives from then on must not be taken for expired.
    pub(crate) fn shown_at(&self, earlier: Moment) -> Timestamp {
        if earlier.is_joined_to(self.given) {
            self.shown.minus(self.given.since(earlier))
        } else {
            self.shown
        }
    }

    /// Whether the clocks have jumped since.
    pub(crate) fn is_joined_to(&self, now: Moment) -> bool {
        self.given.is_joined_to(now)
    }
}

/// The drift, in milliseconds, from which on the clock of a store without a clock of its own follows the system's.
const DRIFT: u64 = 20;
/// How many corrections are remembered. What was stamped before them has long been put right.
const CORRECTIONS: usize = 1_024;

/// What the clock of the source of truth shows, as far as this process knows, and the last version seen.
///
/// It starts from the system's clock, counts [moments](Moment), and moves only when an answer of the source of truth
/// proves it wrong: an answer that was asked for at `sent` and came at `received` and says `truth` bounds the
/// difference of the two clocks from both sides, and the clock moves to the nearer bound. After a jump of this machine's
/// clocks it is blind, as at the start, until the next answer.
pub struct Clock {
    /// Milliseconds of truth at moment zero.
    truth: AtomicI64,
    /// The same for versions, if that is more: the store has no clock but the system's, and that was set back.
    floor: AtomicI64,
    /// The last version given or seen.
    last: AtomicI64,
    /// By how much it started ahead of the system's clock.
    skew: i64,
    /// The store has no clock but the system's: that is right by definition.
    is_systems: bool,
    /// The jumps that it has taken note of.
    jumps: AtomicU32,
    /// The number of the present blindness, counted from one; zero if the clock is known. Changes under the lock of
    /// `corrections`.
    blind: AtomicU32,
    corrections: Mutex<Corrections>,
    /// Tells of jumps after which it is blind.
    jumped: Notify,
}

/// What the answers said that ended each blindness.
#[derive(Debug)]
struct Corrections {
    /// What the clock went by in the last blindness, as `truth`.
    assumed: i64,
    /// By how much each answer moved it, the last one at the end.
    moved: VecDeque<i64>,
    /// How many are not remembered any more.
    forgotten: u32,
    /// What the monotonic clock had missed by the last jump.
    missed: i64,
}

impl Corrections {
    /// How many blindnesses have ended.
    fn ended(&self) -> u32 {
        self.forgotten.saturating_add(u32::try_from(self.moved.len()).unwrap_or(u32::MAX))
    }

    /// `None` if that blindness lasts. What is forgotten was put right long ago.
    fn of(&self, Blindness(number): Blindness) -> Option<i64> {
        let Some(at) = number.checked_sub(self.forgotten) else { return Some(0) };
        self.moved.get(at as usize).copied()
    }

    fn add(&mut self, moved: i64) {
        self.moved.push_back(moved);
        if self.moved.len() > CORRECTIONS {
            self.moved.pop_front();
            self.forgotten = self.forgotten.saturating_add(1);
        }
    }
}

/// How much of the time that was `missed`, by the system's clock, has not passed: all of it, if it was the system's clock that
/// was wrong, and is right now. A known clock shows `shown` if it has passed.
pub(crate) fn not_passed(shown: i64, system: i64, missed: i64) -> i64 {
    let is_off = |by: i64| by.abs() > millis(TOLERANCE);
    if is_off(shown - system) && !is_off(shown - missed - system) { missed } else { 0 }
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

    /// The clock of a store that has none but the system's: it follows that, forward and back.
    pub(crate) fn of_truth() -> Self {
        Self { is_systems: true, blind: 0.into(), ..Self::new() }
    }

    /// A clock that starts `by_millis` ahead of the system's (behind, where negative), as on a machine whose clock is
    /// wrong.
    pub fn skewed(by_millis: i64) -> Self {
        let Sight { moment, missed, .. } = look();
        let truth = system_millis().saturating_add(by_millis).saturating_sub(moment.millis());
        Self {
            truth: truth.into(),
            floor: i64::MIN.into(),
            last: 0.into(),
            skew: by_millis,
            is_systems: false,
            jumps: moment.jumps().into(),
            blind: 1.into(),
            corrections: Mutex::new(Corrections {
                assumed: truth,
                moved: VecDeque::new(),
                forgotten: 0,
                missed,
            }),
            jumped: Notify::new(),
        }
    }

    /// The present moment. Each look notices whether this machine's clocks have jumped.
    pub(crate) fn moment(&self) -> Moment {
        let sight = look();
        self.notice(sight, || (Moment::now(), system_millis()));
        sight.moment
    }

    fn notice(&self, sight: Sight, precisely: impl Fn() -> (Moment, i64)) {
        if sight.moment.jumps() != self.jumps.load(Relaxed) {
            self.jump(&mut self.corrections(), sight);
        }
        if self.is_systems && (sight.wall - self.at(sight.moment).0).unsigned_abs() > DRIFT {
            self.follow(precisely());
        }
    }

    /// From now on it is blind, unless it is so already: what it goes by stays the same.
    #[cold]
    fn jump(&self, corrections: &mut Corrections, Sight { moment, wall, missed }: Sight) {
        if moment.jumps() <= self.jumps.load(Relaxed) {
            return;
        }
        self.jumps.store(moment.jumps(), Release);
        let missed = missed - std::mem::replace(&mut corrections.missed, missed);
        if self.is_systems {
            return;
        }
        if self.blind.load(Relaxed) == 0 {
            let truth = self.truth.load(Relaxed);
            corrections.assumed = truth - not_passed(truth + moment.millis(), wall, missed);
            self.truth.store(corrections.assumed, Relaxed);
            self.blind.store(corrections.ended() + 1, Release);
        }
        self.jumped.notify_one();
    }

    /// The system's clock was set: expiry follows it. Versions never go back, so that no later write loses against an earlier
    /// one.
    #[cold]
    fn follow(&self, (moment, system): (Moment, i64)) {
        let mut corrections = self.corrections();
        self.floor.fetch_max(self.truth.load(Relaxed), Relaxed);
        corrections.assumed = system - moment.millis();
        self.truth.store(corrections.assumed, Release);
    }

    /// Waits until a jump of this machine's clocks is noticed that only an answer can mend.
    pub(crate) async fn jumped(&self) {
        self.jumped.notified().await;
    }

    /// The present moment by the clock of the source of truth.
    pub fn now(&self) -> Timestamp {
        self.at(self.moment())
    }

    /// What this clock showed at a moment.
    pub fn at(&self, moment: impl Into<Moment>) -> Timestamp {
        Timestamp(self.truth.load(Relaxed).saturating_add(moment.into().millis()))
    }

    /// The present time, if the clock is known.
    pub(crate) fn known_now(&self) -> Option<Timestamp> {
        let (_, shown, blindness) = self.reading();
        blindness.is_none().then_some(shown)
    }

    /// The present moment, what the clock shows, and whether that is known. The three belong together: no jump and no answer
    /// comes between them.
    fn reading(&self) -> (Moment, Timestamp, Option<Blindness>) {
        let moment = self.moment();
        let shown = self.at(moment);
        if self.blind.load(Acquire) == 0 && self.jumps.load(Acquire) == moment.jumps() {
            return (moment, shown, None);
        }
        let mut corrections = self.corrections();
        let sight = look();
        self.jump(&mut corrections, sight);
        (sight.moment, self.at(sight.moment), self.noted_blindness())
    }

    /// The same as of the last look.
    fn noted_blindness(&self) -> Option<Blindness> {
        self.blind.load(Acquire).checked_sub(1).map(Blindness)
    }

    /// The present blindness; `None` if the clock is known.
    pub(crate) fn blindness(&self) -> Option<Blindness> {
        self.moment();
        self.noted_blindness()
    }

    /// The present blindness, or the last one.
    #[cfg(feature = "sqlite")]
    pub(crate) fn last_blindness(&self) -> Blindness {
        let corrections = self.corrections();
        self.noted_blindness().unwrap_or_else(|| Blindness(corrections.ended().saturating_sub(1)))
    }

    /// The last blindness that has ended.
    pub(crate) fn last_ended(&self) -> Option<Blindness> {
        self.corrections().ended().checked_sub(1).map(Blindness)
    }

    /// A version above every one given or seen so far.
    pub fn stamp(&self) -> Stamp {
        let (given, shown, blindness) = self.reading();
        let low = fastrand::i64(0..1 << RANDOM_BITS);
        let now = shown.max(self.floor_at(given));
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
        Stamp { version: Version(after(last.unwrap_or_else(|last| last))), given, shown, blindness }
    }

    /// A version above this one, too, however far ahead that lies.
    pub(crate) fn stamp_after(&self, other: Version) -> Stamp {
        self.observe(other);
        let stamp = self.stamp();
        Stamp { version: stamp.version.max(Version(other.0.saturating_add(1))), ..stamp }
    }

    /// Moves past a version given elsewhere.
    pub fn observe(&self, seen: Version) {
        self.last.fetch_max(seen.0, Relaxed);
    }

    /// Goes on from what the clock of the source of truth must show now, by what was known of it before this process began.
    #[cfg(feature = "sqlite")]
    pub(crate) fn resume(&self, now: Timestamp) {
        let moment = self.moment();
        let mut corrections = self.corrections();
        if self.noted_blindness() == Some(Blindness(0)) {
            corrections.assumed = now.0 - moment.millis();
            self.truth.store(corrections.assumed, Relaxed);
        }
    }

    /// Learns that the source of truth's clock showed `shown` at some moment between `sent` and `received`. If this machine's
    /// clocks have jumped meanwhile, that says nothing.
    pub fn correct(&self, sent: impl Into<Moment>, received: impl Into<Moment>, shown: Timestamp) {
        let (sent, received) = (sent.into(), received.into());
        self.moment();
        let mut corrections = self.corrections();
        let jumps = self.jumps.load(Relaxed);
        if self.is_systems || sent.jumps() != jumps || received.jumps() != jumps {
            return;
        }
        let earliest = shown.0.saturating_sub(received.millis());
        let latest = shown.0.saturating_sub(sent.millis()).max(earliest);
        self.truth.store(self.truth.load(Relaxed).clamp(earliest, latest), Relaxed);
        self.end_blindness(&mut corrections);
    }

    /// A store that was asked at `asked` and said nothing of its clock has none but this one.
    pub(crate) fn trust(&self, asked: Moment) {
        let now = self.moment();
        let mut corrections = self.corrections();
        if asked.is_joined_to(now) && now.jumps() == self.jumps.load(Relaxed) {
            self.end_blindness(&mut corrections);
        }
    }

    fn end_blindness(&self, corrections: &mut Corrections) {
        if self.noted_blindness().is_none() {
            return;
        }
        let moved = self.truth.load(Relaxed).saturating_sub(corrections.assumed);
        // What it gave while it was wrong is not to be followed any more.
        if moved.abs() > millis(TOLERANCE) {
            let now = self.version_time(look().moment);
            self.last.fetch_min(Version::lowest(now).0, Relaxed);
        }
        corrections.add(moved);
        self.blind.store(0, Release);
    }

    /// By how many milliseconds the answer moved this clock that ended a blindness, if it has ended: what was stamped in it is
    /// off by so much. Zero if the clock was right within the [tolerance](TOLERANCE).
    pub(crate) fn moved(&self, blindness: Blindness) -> Option<i64> {
        self.moved_exactly(blindness).map(|moved| if moved.abs() > millis(TOLERANCE) { moved } else { 0 })
    }

    /// As [`moved`](Self::moved), also within the tolerance: what expires, expires exactly.
    pub(crate) fn moved_exactly(&self, blindness: Blindness) -> Option<i64> {
        self.corrections().of(blindness)
    }

    /// By how many milliseconds this clock was ahead of the system's before an answer [moved](Self::moved) it, where the
    /// system's may have been set since it started; zero within the [tolerance](TOLERANCE).
    #[cfg(feature = "sqlite")]
    pub(crate) fn ahead_of_system(&self) -> i64 {
        let moment = self.moment();
        let assumed = self.corrections().assumed;
        self.ahead(assumed.saturating_add(moment.millis()))
    }

    /// By how many milliseconds the clock of the source of truth is ahead of the system's, as far as is known; zero within the
    /// [tolerance](TOLERANCE).
    pub(crate) fn offset(&self) -> i64 {
        self.ahead(self.now().0)
    }

    fn ahead(&self, shown: i64) -> i64 {
        let ahead = shown - system_millis() - self.skew;
        if ahead.abs() > millis(TOLERANCE) { ahead } else { 0 }
    }

    /// The time that versions go by: the present, or, where the store holds versions from a time when the system's clock
    /// was ahead, a time line that goes on from those. Expiry goes by the present all the same.
    pub fn now_for_versions(&self) -> Timestamp {
        self.version_time(self.moment())
    }

    /// For a store that has no clock but the system's: the newest version that it holds when it is opened.
    pub fn advance(&self, stored: Version) {
        self.floor.fetch_max(stored.at().0.saturating_sub(self.moment().millis()), Relaxed);
        self.observe(stored);
    }

    fn version_time(&self, moment: Moment) -> Timestamp {
        self.at(moment).max(self.floor_at(moment))
    }

    fn floor_at(&self, moment: Moment) -> Timestamp {
        Timestamp(self.floor.load(Relaxed).saturating_add(moment.millis()))
    }

    /// Whether a stamp was given by a clock that has since been found wrong; also where a version that it had seen pushed the
    /// stamp near the right time: what that clock queued before is put right, and must not overtake this.
    pub(crate) fn misjudged(&self, stamp: &Stamp) -> bool {
        let moved = stamp.blindness.map(|blindness| self.moved(blindness));
        // An answer that a jump overtook does not tell whether the stamp was right.
        let is_untold = moved == Some(None) && !stamp.is_joined_to(self.moment());
        if is_untold || moved.flatten().is_some_and(|moved| moved != 0) {
            return true;
        }
        // What was right when it was given stays right: since a jump, nothing is known of the time before.
        if self.is_systems || !stamp.is_joined_to(self.moment()) {
            return false;
        }
        let (then, claimed) = (self.version_time(stamp.given), stamp.version.at());
        then.since(claimed) > TOLERANCE || claimed.since(then) > TOLERANCE
    }

    fn corrections(&self) -> MutexGuard<'_, Corrections> {
        self.corrections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::moment::by_hand;
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

    const HOUR: i64 = 3_600_000;

    /// A clock that an answer has put right, and one of a store whose machine never sleeps. Its answers come at once.
    fn known() -> (Clock, Clock) {
        let (clock, store) = (Clock::new(), Clock::new());
        answer(&clock, store.now());
        (clock, store)
    }

    fn answer(clock: &Clock, shown: Timestamp) {
        let now = Moment::now();
        clock.correct(now, now, shown);
    }

    /// A store on this machine, or on one that slept as long: it moves with the moments.
    #[test]
    fn after_a_sleep_the_clock_has_counted_on_and_is_blind() {
        let (clock, store) = known();
        let (before, early) = (clock.now(), clock.stamp());
        assert!(clock.blindness().is_none() && early.blindness.is_none());
        by_hand::step(63 * HOUR);
        assert!((63 * HOUR..63 * HOUR + 5_000).contains(&(clock.now().0 - before.0)));
        assert!(clock.blindness().is_some() && clock.known_now().is_none());
        let late = clock.stamp();
        assert!(late.version.at().0 - early.version.at().0 >= 63 * HOUR);
        answer(&clock, store.now());
        assert!(clock.blindness().is_none() && !clock.misjudged(&early) && !clock.misjudged(&late));
        assert_eq!(clock.moved(late.blindness.unwrap()), Some(0));
    }

    #[test]
    fn an_answer_tells_by_how_much_what_was_stamped_after_a_jump_is_off() {
        for step in [-8 * HOUR, 8 * HOUR] {
            let (clock, store) = known();
            let (truth, early) = (store.now(), clock.stamp());
            by_hand::step(step);
            let late = clock.stamp();
            let Some(blindness) = late.blindness else { panic!("{step}: it takes itself for known") };
            assert_eq!(clock.moved(blindness), None);
            // This store's clock has gone on as if nothing had been.
            answer(&clock, truth);
            let moved = clock.moved(blindness).unwrap();
            assert!((moved + step.max(0)).abs() < 5_000, "{step}: {moved}");
            assert!((clock.now().0 - truth.0).abs() < 5_000, "{step}");
            assert_eq!(clock.misjudged(&late), step > 0, "{step}: a step back moves no moment");
            assert!(!clock.misjudged(&early), "{step}: what was right stays right");
            assert!((clock.stamp().version.at().0 - truth.0).abs() < 5_000, "{step}");
        }
    }

    /// A paused machine goes on with a clock that is behind; answers say so; then its clock is set.
    #[test]
    fn a_step_that_puts_the_systems_clock_right_moves_nothing() {
        let clock = Clock::new();
        let truth = clock.now().plus(ms(8 * 3_600_000));
        answer(&clock, truth);
        assert!((clock.offset() - 8 * HOUR).abs() < 5_000 && clock.ahead_of_system() == 0);
        by_hand::step(8 * HOUR);
        assert_eq!(clock.offset(), 0);
        assert!((clock.now().0 - truth.0).abs() < 5_000);
        assert!(clock.blindness().is_some(), "it is a guess, though");
        by_hand::step(HOUR);
        assert!((clock.now().0 - truth.0 - HOUR).abs() < 5_000);
    }

    #[test]
    fn each_blindness_has_a_correction_of_its_own() {
        let clock = Clock::skewed(-60_000);
        let truth = Clock::new().now();
        let first = clock.stamp();
        answer(&clock, truth);
        by_hand::step(HOUR);
        let second = clock.stamp();
        by_hand::step(HOUR);
        let third = clock.stamp();
        assert_eq!(second.blindness, third.blindness, "it was blind already");
        answer(&clock, truth.plus(ms(7_200_000 - 300_000)));
        let moved = |stamp: &Stamp| clock.moved(stamp.blindness.unwrap()).unwrap();
        assert!((moved(&first) - 60_000).abs() < 5_000 && (moved(&second) + 300_000).abs() < 5_000);
        assert_eq!(clock.last_ended(), second.blindness);
    }

    #[test]
    fn an_answer_that_a_jump_overtook_says_nothing() {
        let (clock, store) = known();
        let (sent, shown) = (Moment::now(), store.now());
        by_hand::step(8 * HOUR);
        clock.correct(sent, Moment::now(), shown);
        assert!(clock.blindness().is_some(), "it was given before the machine slept");
        clock.trust(sent);
        assert!(clock.blindness().is_some());
        answer(&clock, store.now());
        assert!(clock.blindness().is_none());
    }

    #[test]
    fn the_life_of_what_is_stamped_after_a_jump_does_not_begin_before_it() {
        let (clock, _) = known();
        let began = clock.moment();
        let early = clock.stamp();
        assert_eq!(early.shown_at(began), clock.at(began));
        by_hand::step(63 * HOUR);
        let late = clock.stamp();
        assert_eq!(late.shown_at(began), late.shown);
    }

    #[test]
    fn the_systems_clock_is_followed_forward_and_back_and_versions_rise() {
        let clock = Clock::of_truth();
        let mut last = clock.stamp().version;
        let mut off = 0;
        for step in [63 * HOUR, -HOUR, -70 * HOUR, 1_500, -1_500, 8 * HOUR] {
            by_hand::step(step);
            off += step;
            assert!((clock.now().0 - system_millis()).abs() < 1_000, "{step}, {off}");
            let stamp = clock.stamp();
            assert!(
                (stamp.shown.0 - system_millis()).abs() < 1_000,
                "{step}: expiry goes by the system's clock"
            );
            assert!(stamp.version > last, "{step}: a later write never loses against an earlier one");
            assert!(
                stamp.version.at() <= clock.now_for_versions().plus(TOLERANCE),
                "{step}: nor is it ahead"
            );
            assert!(clock.blindness().is_none() && !clock.misjudged(&stamp), "{step}");
            assert_eq!((clock.offset(), clock.ahead_of_system()), (0, 0), "{step}");
            last = stamp.version;
        }
    }
}
