//! Moments: a monotonic clock that also counts the time that the machine slept.
//!
//! Why neither `Instant` nor `SystemTime`? On Linux `Instant` does not count suspend, and no monotonic clock counts the pause
//! of a virtual machine. The system clock counts both, but an operator can set it to any time. So a moment is the monotonic
//! clock plus each forward step of the system clock. A backward step changes no moment.
//!
//! A step in either direction is a *jump*. A moment carries the number of jumps before it. Two moments with one number can be
//! compared: the time between them is known.

mod atomic;

use std::sync::LazyLock;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicI64, AtomicU32, fence};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use super::version::{MAX_CLOCK_SKEW, millis};
pub(crate) use atomic::AtomicMoment;

const NANOS_PER_MILLI: i64 = 1_000_000;

/// A moment of this process. The time between two moments includes the time that the machine slept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment {
    nanos: i64,
    /// The number of jumps of the system clock before this moment.
    jumps: u32,
}

impl Moment {
    pub(crate) fn now() -> Self {
        read_clocks().moment
    }

    /// Returns the time that passed since `earlier`, or zero if `earlier` is later than `self`.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(u64::try_from(self.nanos.saturating_sub(earlier.nanos)).unwrap_or(0))
    }

    pub(crate) fn minus(self, span: Duration) -> Self {
        let span = i64::try_from(span.as_nanos()).unwrap_or(i64::MAX);
        Self { nanos: self.nanos.saturating_sub(span), ..self }
    }

    /// Whether this moment is later by a millisecond or more.
    pub(crate) fn is_after(self, other: Self) -> bool {
        self.millis() > other.millis()
    }

    /// Whether no jump lies between the two moments, so that the time between them is known.
    pub(crate) fn is_comparable_to(self, other: Self) -> bool {
        self.jumps == other.jumps
    }

    /// Whether certainly less than `span` has passed since `earlier`. A jump in between makes this false.
    pub(crate) fn is_within(self, span: Duration, earlier: Self) -> bool {
        self.is_comparable_to(earlier) && self.since(earlier) < span
    }

    pub(super) fn jumps(self) -> u32 {
        self.jumps
    }

    pub(super) fn millis(self) -> i64 {
        self.nanos.div_euclid(NANOS_PER_MILLI)
    }
}

/// Converts an instant. An instant before the last jump becomes a moment before that jump.
impl From<Instant> for Moment {
    fn from(instant: Instant) -> Self {
        with_ticker(|ticker| ticker.moment_of(mono_nanos(instant)))
    }
}

/// A reading of this machine's clocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClockReading {
    pub(super) moment: Moment,
    /// The system clock in milliseconds since the Unix epoch, exact to some milliseconds.
    pub(super) wall: i64,
    /// The part of the moment, in milliseconds, that the monotonic clock has missed.
    pub(super) missed: i64,
}

/// Reads the clocks, and counts a jump if the system clock has jumped.
pub(super) fn read_clocks() -> ClockReading {
    with_ticker(|ticker| ticker.read(read_raw))
}

/// The times that the monotonic clock and the system clock show.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawReading {
    /// The monotonic clock in nanoseconds.
    pub(super) mono: i64,
    /// The system clock in milliseconds.
    pub(super) wall: i64,
}

impl RawReading {
    /// Returns the lead of the system clock, in milliseconds, over a monotonic clock that shows `mono`.
    fn ahead_of(self, mono: i64) -> i64 {
        self.wall - mono.div_euclid(NANOS_PER_MILLI)
    }
}

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

#[cfg(not(test))]
fn with_ticker<T>(call: impl FnOnce(&Ticker) -> T) -> T {
    static TICKER: LazyLock<Ticker> = LazyLock::new(|| Ticker::new(read_raw()));
    call(&TICKER)
}

fn read_raw() -> RawReading {
    // The monotonic clock comes first. `count_jump` relies on this order.
    let mono = mono_nanos(Instant::now());
    RawReading { mono, wall: coarse_millis() }
}

fn mono_nanos(instant: Instant) -> i64 {
    let nanos = |span: Duration| i64::try_from(span.as_nanos()).unwrap_or(i64::MAX);
    match instant.checked_duration_since(*START) {
        Some(span) => nanos(span),
        // The instant may be older than the first use of `START`.
        None => -nanos(START.duration_since(instant)),
    }
}

/// Reads the system clock as of the kernel's last tick, some milliseconds ago. A precise reading costs five times as much.
#[cfg(all(target_os = "linux", not(test)))]
fn coarse_millis() -> i64 {
    use nix::time::{ClockId, clock_gettime};
    let coarse = clock_gettime(ClockId::CLOCK_REALTIME_COARSE);
    coarse.map_or_else(|_| system_millis(), |shown| millis(shown.into()) + stepped())
}

#[cfg(any(not(target_os = "linux"), test))]
fn coarse_millis() -> i64 {
    system_millis()
}

/// Reads the system clock in milliseconds since the Unix epoch.
pub(crate) fn system_millis() -> i64 {
    #[allow(clippy::disallowed_methods, reason = "the only place that reads the system clock")]
    let system = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    millis(system.unwrap_or_default()) + stepped()
}

/// The milliseconds by which a test has stepped the system clock that this process reads.
#[cfg(all(feature = "testing", not(test)))]
static STEPPED: AtomicI64 = AtomicI64::new(0);

/// Steps the system clock that this process reads, as a sleep of the machine or an operator does. All caches of the process see
/// the step.
///
/// ```
/// // An operator sets the clock an hour ahead. The caches notice it with their next reading of the clock.
/// threadkeep::testing::step_system_clock(3_600_000);
/// ```
#[cfg(all(feature = "testing", not(test)))]
pub fn step_system_clock(millis: i64) {
    STEPPED.fetch_add(millis, Relaxed);
}

#[cfg(all(feature = "testing", not(test)))]
fn stepped() -> i64 {
    STEPPED.load(Relaxed)
}

#[cfg(not(any(feature = "testing", test)))]
const fn stepped() -> i64 {
    0
}

/// Reads the milliseconds since the boot of this machine, including sleep. `None` if the system does not tell.
#[cfg(target_os = "linux")]
pub(crate) fn uptime_millis() -> Option<i64> {
    use nix::time::{ClockId, clock_gettime};
    Some(millis(clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?.into()))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn uptime_millis() -> Option<i64> {
    None
}

/// Lets a unit test step the system clock of its own OS thread.
#[cfg(test)]
pub(crate) mod test_clock {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        static STEPPED: Cell<i64> = const { Cell::new(0) };
        static TICKER: Ticker = Ticker::new(read_raw());
    }

    /// Steps the system clock, as a sleep of the machine or an operator does.
    pub(crate) fn step(millis: i64) {
        STEPPED.set(STEPPED.get() + millis);
    }

    pub(super) fn stepped() -> i64 {
        STEPPED.get()
    }

    pub(super) fn with_ticker<T>(call: impl FnOnce(&Ticker) -> T) -> T {
        TICKER.with(call)
    }
}
#[cfg(test)]
use test_clock::{stepped, with_ticker};

/// Counts moments and jumps. A reading takes no lock, unless the clocks have jumped.
#[derive(Debug)]
pub(super) struct Ticker {
    /// The lead of the system clock over the monotonic clock after the last jump, in milliseconds.
    ahead: AtomicI64,
    /// The time that the monotonic clock has missed, in nanoseconds.
    missed: AtomicI64,
    /// Twice the number of jumps. It is odd while a jump is being counted, so that no reader pairs the number with the missed
    /// time of another jump (a sequence lock).
    sequence: AtomicU32,
    /// The last jump. The lock admits one OS thread at a time that counts a jump.
    last_jump: Mutex<Jump>,
}

/// A jump of the system clock.
#[derive(Debug)]
struct Jump {
    /// The monotonic clock in nanoseconds when the ticker noticed the jump.
    noticed_at: i64,
    /// The value of `Ticker::missed` before the jump.
    missed_before: i64,
}

impl Ticker {
    pub(super) fn new(RawReading { mono, wall }: RawReading) -> Self {
        let ahead = RawReading { mono, wall }.ahead_of(mono).into();
        Self {
            ahead,
            missed: 0.into(),
            sequence: 0.into(),
            last_jump: Mutex::new(Jump { noticed_at: i64::MIN, missed_before: 0 }),
        }
    }

    pub(super) fn read(&self, read_raw: impl Fn() -> RawReading) -> ClockReading {
        let mut shown = read_raw();
        let drift = shown.ahead_of(shown.mono) - self.ahead.load(Relaxed);
        if drift.unsigned_abs() > MAX_CLOCK_SKEW.as_millis() as u64 {
            self.count_jump(&read_raw);
            // The first reading belongs to the time before the count.
            shown = read_raw();
        }
        let moment = self.moment_at(shown.mono);
        ClockReading {
            moment,
            wall: shown.wall,
            missed: (moment.nanos - shown.mono).div_euclid(NANOS_PER_MILLI),
        }
    }

    /// Reads again under the lock, then counts the jump. Another OS thread may have counted it. This OS thread may also have
    /// been suspended between its readings of the two clocks; then there is no jump.
    #[cold]
    fn count_jump(&self, read_raw: impl Fn() -> RawReading) {
        let mut last_jump = self.last_jump.lock();
        let (shown, after) = (read_raw(), read_raw());
        let ahead = self.ahead.load(Relaxed);
        // The system clock was read between the two readings of the monotonic clock. They bound the step from both sides.
        let (least, most) = (shown.ahead_of(after.mono) - ahead, shown.ahead_of(shown.mono) - ahead);
        // The bound nearer to zero is the certain part of the step.
        let by = if least > millis(MAX_CLOCK_SKEW) {
            least
        } else if most < -millis(MAX_CLOCK_SKEW) {
            most
        } else {
            return;
        };
        let missed = self.missed.load(Relaxed);
        *last_jump = Jump { noticed_at: after.mono, missed_before: missed };
        self.ahead.store(ahead + by, Relaxed);
        self.sequence.fetch_add(1, AcqRel);
        self.missed.store(missed.saturating_add(by.max(0).saturating_mul(NANOS_PER_MILLI)), Relaxed);
        self.sequence.fetch_add(1, Release);
        tracing::info!(
            millis = by,
            "machine clock jumped: the machine slept or was paused, or the system clock was set"
        );
    }

    fn moment_at(&self, mono: i64) -> Moment {
        loop {
            let sequence = self.sequence.load(Acquire);
            let missed = self.missed.load(Relaxed);
            fence(Acquire);
            if sequence.is_multiple_of(2) && sequence == self.sequence.load(Relaxed) {
                return Moment { nanos: mono.saturating_add(missed), jumps: sequence / 2 };
            }
            // A jump is being counted by a few instructions.
            std::hint::spin_loop();
        }
    }

    /// Returns the moment of a reading of the monotonic clock, which may be older than the last jump.
    fn moment_of(&self, mono: i64) -> Moment {
        // The lock keeps a new jump out until both values are read.
        let last_jump = self.last_jump.lock();
        let moment = self.moment_at(mono);
        if mono > last_jump.noticed_at {
            return moment;
        }
        Moment { nanos: mono.saturating_add(last_jump.missed_before), jumps: moment.jumps.saturating_sub(1) }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::test_clock::step;
    use super::*;

    const HOUR: i64 = 3_600_000;

    #[test]
    fn moment_counts_forward_steps_of_the_system_clock_only() {
        let mut last = Moment::now();
        for by in [63 * HOUR, -HOUR, 8 * HOUR, -8 * HOUR] {
            step(by);
            let now = Moment::now();
            assert!((0..1_000).contains(&(now.millis() - last.millis() - by.max(0))), "{by}");
            assert_eq!(now.jumps(), last.jumps() + 1);
            assert!(!now.is_within(Duration::MAX, last), "the time between the moments is unknown");
            last = now;
        }
        assert!(Moment::now().is_within(Duration::from_secs(1), last), "the ticker counts a jump once");
    }

    #[test]
    fn moment_adds_small_steps_up_to_a_jump() {
        let before = Moment::now();
        for _ in 0..3 {
            step(900);
            Moment::now();
        }
        let now = Moment::now();
        assert_eq!(now.jumps(), before.jumps() + 1);
        assert!((2_600..3_700).contains(&(now.millis() - before.millis())));
    }

    /// The OS thread is suspended for a minute between its first readings of the two clocks.
    #[test]
    fn ticker_counts_no_jump_for_a_torn_reading() {
        let ticker = Ticker::new(RawReading { mono: 0, wall: 0 });
        let (minute, calls) = (60_000, Cell::new(0));
        let reading = ticker.read(|| {
            let mono = if calls.replace(calls.get() + 1) == 0 { 0 } else { minute * NANOS_PER_MILLI };
            RawReading { mono, wall: minute }
        });
        assert_eq!((reading.moment.jumps(), reading.moment.millis(), calls.get()), (0, minute, 4));
    }

    /// A moment with the missed time of a later jump would pass for a moment of a synced clock.
    #[test]
    fn moment_never_has_the_time_of_another_jump() {
        let (ticker, wall) = (Ticker::new(RawReading { mono: 0, wall: 0 }), AtomicI64::new(0));
        let read = || ticker.read(|| RawReading { mono: 0, wall: wall.load(Relaxed) }).moment;
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                for _ in 0..2_000_000 {
                    let Moment { nanos, jumps } = read();
                    assert_eq!(nanos, i64::from(jumps) * 3_000 * NANOS_PER_MILLI);
                }
            });
            while !reader.is_finished() {
                wall.fetch_add(3_000, Relaxed);
                read();
            }
        });
    }

    #[test]
    fn moment_of_old_instant_lies_before_the_jump() {
        let instant = Instant::now();
        let early = Moment::from(instant);
        step(8 * HOUR);
        let late = Moment::now();
        assert_eq!((Moment::from(instant), late.jumps()), (early, early.jumps() + 1));
        assert!(Moment::from(Instant::now()).is_comparable_to(late));
    }
}
