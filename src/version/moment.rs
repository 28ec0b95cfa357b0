//! Moments: a monotonic clock that also counts the time that the machine slept.
//!
//! Why neither `Instant` nor `SystemTime`? On Linux `Instant` does not count suspend, and no monotonic clock counts the time
//! that a virtual machine was paused. The system's clock knows both, but it can be set to anything. So a moment counts the
//! monotonic clock, plus each step of the system's clock ahead of it. A step back changes no moment. Each step in either
//! direction is a *jump*: a moment says how many jumps came before it, and so tells whether two moments can be compared.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicI64, AtomicU32};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::{TOLERANCE, millis};

const NANOS: i64 = 1_000_000;

/// A moment of this process. The time between two moments includes the time that the machine slept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    nanos: i64,
    /// The jumps of the system's clock before it.
    jumps: u32,
}

impl Moment {
    /// The present moment.
    pub fn now() -> Self {
        look().moment
    }

    /// The time from `earlier` to here, zero if that is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(u64::try_from(self.nanos.saturating_sub(earlier.nanos)).unwrap_or(0))
    }

    /// The moment this much earlier.
    pub(crate) fn minus(self, span: Duration) -> Self {
        let span = i64::try_from(span.as_nanos()).unwrap_or(i64::MAX);
        Self { nanos: self.nanos.saturating_sub(span), ..self }
    }

    /// Whether no jump came between the two: the time between them is known.
    pub(crate) fn is_joined_to(self, other: Self) -> bool {
        self.jumps == other.jumps
    }

    /// Whether less than `span` has passed since `earlier`, for certain.
    pub(crate) fn is_within(self, span: Duration, earlier: Self) -> bool {
        self.is_joined_to(earlier) && self.since(earlier) < span
    }

    pub(super) fn jumps(self) -> u32 {
        self.jumps
    }

    pub(super) fn millis(self) -> i64 {
        self.nanos.div_euclid(NANOS)
    }
}

/// An instant before the last jump becomes a moment before it.
impl From<Instant> for Moment {
    fn from(instant: Instant) -> Self {
        with_ticker(|ticker| ticker.moment_of(mono_nanos(instant)))
    }
}

/// What a look at the clocks shows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sight {
    pub(super) moment: Moment,
    /// The system's clock, in milliseconds since the Unix epoch and to some milliseconds.
    pub(super) wall: i64,
    /// The milliseconds among those of the moment that the monotonic clock has missed.
    pub(super) missed: i64,
}

pub(super) fn look() -> Sight {
    with_ticker(|ticker| ticker.look(read))
}

/// What both clocks show.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    /// Nanoseconds of the monotonic clock.
    pub(super) mono: i64,
    /// Milliseconds of the system's clock.
    pub(super) wall: i64,
}

impl Reading {
    /// By how many milliseconds the system's clock is ahead of a monotonic one that shows `mono`.
    fn ahead_of(self, mono: i64) -> i64 {
        self.wall - mono.div_euclid(NANOS)
    }
}

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

#[cfg(not(test))]
fn with_ticker<T>(look: impl FnOnce(&Ticker) -> T) -> T {
    static TICKER: LazyLock<Ticker> = LazyLock::new(|| Ticker::new(read()));
    look(&TICKER)
}

fn read() -> Reading {
    let mono = mono_nanos(Instant::now());
    Reading { mono, wall: coarse_millis() }
}

fn mono_nanos(instant: Instant) -> i64 {
    let nanos = |span: Duration| i64::try_from(span.as_nanos()).unwrap_or(i64::MAX);
    match instant.checked_duration_since(*START) {
        Some(span) => nanos(span),
        None => -nanos(START.duration_since(instant)),
    }
}

/// The system's clock as of the kernel's last tick, some milliseconds ago: a fifth of the price of a precise reading.
#[cfg(all(target_os = "linux", not(test)))]
fn coarse_millis() -> i64 {
    use nix::time::{ClockId, clock_gettime};
    let coarse = clock_gettime(ClockId::CLOCK_REALTIME_COARSE);
    coarse.map_or_else(|_| system_millis(), |shown| millis(shown.into()))
}

#[cfg(any(not(target_os = "linux"), test))]
fn coarse_millis() -> i64 {
    system_millis()
}

/// What the system's clock shows, in milliseconds since the Unix epoch.
pub(crate) fn system_millis() -> i64 {
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the system's clock")]
    let system = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let shown = millis(system.unwrap_or_default());
    #[cfg(test)]
    let shown = shown + by_hand::stepped();
    shown
}

/// A unit test sets the clock of its own thread.
#[cfg(test)]
pub(crate) mod by_hand {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        static STEPPED: Cell<i64> = const { Cell::new(0) };
        static TICKER: Ticker = Ticker::new(read());
    }

    /// The machine sleeps for so many milliseconds, or its clock is set.
    pub(crate) fn step(millis: i64) {
        STEPPED.set(STEPPED.get() + millis);
    }

    pub(super) fn stepped() -> i64 {
        STEPPED.get()
    }

    pub(super) fn with_ticker<T>(look: impl FnOnce(&Ticker) -> T) -> T {
        TICKER.with(look)
    }
}
#[cfg(test)]
use by_hand::with_ticker;

/// Counts moments and jumps. A look takes no lock, unless the clocks have jumped.
#[derive(Debug)]
pub(super) struct Ticker {
    /// By how many milliseconds the system's clock was ahead of the monotonic one after the last jump.
    ahead: AtomicI64,
    /// The nanoseconds that the monotonic clock has missed.
    missed: AtomicI64,
    jumps: AtomicU32,
    /// When the last jump was noticed, and what had been missed before it. The lock admits one who counts a jump.
    last: Mutex<(i64, i64)>,
}

impl Ticker {
    pub(super) fn new(Reading { mono, wall }: Reading) -> Self {
        let ahead = Reading { mono, wall }.ahead_of(mono).into();
        Self { ahead, missed: 0.into(), jumps: 0.into(), last: Mutex::new((i64::MIN, 0)) }
    }

    pub(super) fn look(&self, read: impl Fn() -> Reading) -> Sight {
        let mut shown = read();
        let drift = shown.ahead_of(shown.mono) - self.ahead.load(Relaxed);
        if drift.unsigned_abs() > TOLERANCE.as_millis() as u64 {
            self.count_a_jump(&read);
            shown = read();
        }
        let moment = self.moment_at(shown.mono);
        Sight { moment, wall: shown.wall, missed: (moment.nanos - shown.mono).div_euclid(NANOS) }
    }

    /// Looks again under the lock: another thread may have counted this jump, and this one may have stood still between its
    /// two readings.
    #[cold]
    fn count_a_jump(&self, read: impl Fn() -> Reading) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (shown, after) = (read(), read());
        let ahead = self.ahead.load(Relaxed);
        // The system's clock was read between the two readings of the monotonic one.
        let (least, most) = (shown.ahead_of(after.mono) - ahead, shown.ahead_of(shown.mono) - ahead);
        let by = if least > millis(TOLERANCE) {
            least
        } else if most < -millis(TOLERANCE) {
            most
        } else {
            return;
        };
        let missed = self.missed.load(Relaxed);
        *last = (after.mono, missed);
        self.ahead.store(ahead + by, Relaxed);
        self.missed.store(missed.saturating_add(by.max(0).saturating_mul(NANOS)), Relaxed);
        // After the time that was missed: a moment of the new count includes that time.
        self.jumps.fetch_add(1, Release);
        tracing::info!(
            millis = by,
            "this machine's clocks have jumped: it slept, or was paused, or its clock was set"
        );
    }

    fn moment_at(&self, mono: i64) -> Moment {
        let jumps = self.jumps.load(Acquire);
        Moment { nanos: mono.saturating_add(self.missed.load(Relaxed)), jumps }
    }

    /// The moment of a reading of the monotonic clock that may be an old one.
    fn moment_of(&self, mono: i64) -> Moment {
        let (jumped, missed_before) = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let moment = self.moment_at(mono);
        if mono > jumped {
            return moment;
        }
        Moment { nanos: mono.saturating_add(missed_before), jumps: moment.jumps.saturating_sub(1) }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const SECOND: i64 = 1_000;
    const HOUR: i64 = 3_600 * SECOND;

    /// Two clocks in the hands of a test.
    struct Machine {
        mono: Cell<i64>,
        wall: Cell<i64>,
        ticker: Ticker,
    }

    impl Machine {
        fn new() -> Self {
            let (mono, wall) = (Cell::new(0), Cell::new(1_000 * HOUR));
            let ticker = Ticker::new(Reading { mono: 0, wall: wall.get() });
            Self { mono, wall, ticker }
        }

        fn runs(&self, millis: i64) {
            self.mono.set(self.mono.get() + millis * NANOS);
            self.wall.set(self.wall.get() + millis);
        }

        /// It sleeps, is paused, or its clock is set.
        fn steps(&self, millis: i64) {
            self.wall.set(self.wall.get() + millis);
        }

        fn now(&self) -> Moment {
            self.ticker.look(|| Reading { mono: self.mono.get(), wall: self.wall.get() }).moment
        }
    }

    fn between(later: Moment, earlier: Moment) -> i64 {
        later.millis() - earlier.millis()
    }

    #[test]
    fn moments_count_the_time_that_the_machine_slept() {
        let machine = Machine::new();
        let before = machine.now();
        machine.runs(SECOND);
        assert!(machine.now().is_within(Duration::from_secs(2), before));
        machine.steps(63 * HOUR);
        let after = machine.now();
        assert_eq!(between(after, before), SECOND + 63 * HOUR);
        assert!(!after.is_joined_to(before) && after.jumps() == 1);
        assert!(!after.is_within(Duration::MAX, before), "nobody knows how much time has passed");
        assert_eq!(machine.now(), after, "a jump is counted once");
    }

    #[test]
    fn moments_never_go_back_though_the_clock_is_set_back() {
        let machine = Machine::new();
        let mut last = machine.now();
        for (jumps, step) in [(1, -HOUR), (2, 8 * HOUR), (3, -8 * HOUR), (4, HOUR)] {
            machine.steps(step);
            let now = machine.now();
            assert_eq!(between(now, last), step.max(0), "{step}");
            assert_eq!(now.jumps(), jumps);
            last = now;
        }
    }

    #[test]
    fn steps_within_the_tolerance_add_up_to_a_jump() {
        let machine = Machine::new();
        let before = machine.now();
        for _ in 0..3 {
            machine.steps(900);
            machine.runs(100);
            machine.now();
        }
        assert_eq!((between(machine.now(), before), machine.now().jumps()), (300 + 2_700, 1));
    }

    #[test]
    fn a_thread_that_stands_still_between_two_readings_counts_no_jump() {
        let machine = Machine::new();
        let calls = Cell::new(0);
        let sight = machine.ticker.look(|| {
            let mono = machine.mono.get();
            // Only the first reading is torn; the second look finds nothing.
            machine.runs(if calls.replace(calls.get() + 1) == 0 { 60 * SECOND } else { 0 });
            Reading { mono, wall: machine.wall.get() }
        });
        assert_eq!((sight.moment.jumps(), machine.now().jumps()), (0, 0));
    }

    #[test]
    fn an_instant_from_before_a_jump_is_a_moment_from_before_it() {
        let machine = Machine::new();
        machine.runs(SECOND);
        let (early, mono) = (machine.now(), machine.mono.get());
        machine.runs(SECOND);
        machine.steps(8 * HOUR);
        machine.now();
        machine.runs(SECOND);
        assert_eq!(machine.ticker.moment_of(mono), early);
        assert_eq!(machine.ticker.moment_of(machine.mono.get()), machine.now());
    }
}
