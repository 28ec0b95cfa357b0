//! What a seed decides: settings, each worker's operations, and what goes wrong meanwhile. The rest, which call
//! overtakes which, is up to real time.

use std::time::Duration;

use fastrand::Rng;

/// Keys below this are registers, the rest up to [`KEYS`] logs.
pub const REGISTERS: usize = 5;
pub const KEYS: usize = 8;
pub const HANDLES: usize = 2;
/// Tasks that work with one handle at once.
const WORKERS: usize = 3;

#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub settings: Settings,
    /// Each worker's handle, and what it does.
    pub workers: Vec<(usize, Vec<Step>)>,
}

#[derive(Debug, Clone)]
pub struct Settings {
    pub fresh_for: Duration,
    pub patience: Duration,
    pub cache_bytes: usize,
    pub queue_bytes: usize,
    pub replica_bytes: usize,
    /// By how many milliseconds each handle's clock is off when it starts.
    pub skews: [i64; HANDLES],
}

#[derive(Debug, Clone)]
pub struct Step {
    pub pause: Duration,
    pub key: usize,
    pub what: Does,
    pub ttl: Duration,
    /// Bytes beside the ids.
    pub pad: usize,
    pub gives_up_after: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Does {
    Get,
    Put,
    Remove,
    Update,
    Evict,
}

/// What the other side does to a handle's calls.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Trouble {
    Refuse,
    LoseAnswers,
    Deny,
    Slow(Duration),
    SlowAnswers(Duration),
    Hang,
    /// At this rate, calls are refused or their answers lost.
    Flaky(f64),
    /// The next calls only, too few to open the breaker.
    Blips(usize),
    /// One of the other ways in which a gateway fails, by number.
    Other(usize),
}

/// One thing after another goes wrong.
#[derive(Debug, Clone)]
pub struct Episode {
    pub pause: Duration,
    pub whom: Vec<usize>,
    pub trouble: Option<(Trouble, Duration)>,
    /// A handle that is restarted meanwhile.
    pub restart: Option<Restart>,
}

#[derive(Debug, Clone, Copy)]
pub struct Restart {
    pub handle: usize,
    /// How long a shutdown may take; `None` for a crash.
    pub shutdown: Option<Duration>,
}

fn ms(span: u64) -> Duration {
    Duration::from_millis(span)
}

impl Plan {
    pub fn new(seed: u64, operations: usize) -> Self {
        let mut rng = Rng::with_seed(seed);
        let settings = Settings::draw(&mut rng);
        let count = WORKERS * HANDLES;
        let share = |at: usize| operations / count + usize::from(at < operations % count);
        let worker = |at| (at % HANDLES, (0..share(at)).map(|_| Step::draw(&mut rng)).collect());
        Self { seed, settings, workers: (0..count).map(worker).collect() }
    }

    /// What goes wrong, without end.
    pub fn episodes(&self) -> impl Iterator<Item = Episode> + Send + use<> {
        let mut rng = Rng::with_seed(self.seed ^ 0x0EBB_1E50);
        std::iter::repeat_with(move || Episode::draw(&mut rng))
    }
}

impl Settings {
    fn draw(rng: &mut Rng) -> Self {
        const SKEWS: [i64; 9] = [0, 0, 0, 1_500, -1_500, 3_000, -3_000, 300_000, -300_000];
        let large = 64 << 20;
        let is_skewed = rng.bool();
        let mut skew = || if is_skewed { SKEWS[rng.usize(..SKEWS.len())] } else { 0 };
        let skews = [skew(), skew()];
        Self {
            fresh_for: [ms(0), ms(30), ms(300), ms(3_600_000)][rng.usize(..4)],
            patience: ms(rng.u64(30..120)),
            cache_bytes: if rng.bool() { 1_500 } else { large },
            queue_bytes: if rng.u8(..5) == 0 { 1_000 } else { large },
            replica_bytes: if rng.u8(..5) == 0 { 1_000 } else { large },
            skews,
        }
    }
}

impl Step {
    fn draw(rng: &mut Rng) -> Self {
        let what = match rng.u8(..100) {
            ..45 => Does::Get,
            45..66 => Does::Put,
            66..74 => Does::Remove,
            74..93 => Does::Update,
            93.. => Does::Evict,
        };
        let is_of_log = what == Does::Update && rng.u8(..3) > 0
            || matches!(what, Does::Get | Does::Evict) && rng.u8(..3) == 0;
        let key = if is_of_log { rng.usize(REGISTERS..KEYS) } else { rng.usize(..REGISTERS) };
        Self {
            pause: ms(rng.u64(..24)),
            key,
            what,
            ttl: if !is_of_log && rng.u8(..5) < 2 { ms(rng.u64(300..1_500)) } else { ms(3_600_000) },
            pad: if rng.u8(..8) == 0 { rng.usize(..400) } else { 0 },
            gives_up_after: (rng.u8(..25) == 0).then(|| ms(rng.u64(..20))),
        }
    }
}

impl Episode {
    fn draw(rng: &mut Rng) -> Self {
        let whom = match rng.usize(..3) {
            0 => vec![0],
            1 => vec![1],
            _ => vec![0, 1],
        };
        let trouble = (rng.u8(..8) > 0).then(|| (Trouble::draw(rng), ms(rng.u64(60..900))));
        let restart = (trouble.is_none() || rng.u8(..3) == 0).then(|| Restart {
            handle: rng.usize(..HANDLES),
            shutdown: [None, Some(ms(0)), Some(ms(300))][rng.usize(..3)],
        });
        Self { pause: ms(rng.u64(50..500)), whom, trouble, restart }
    }
}

impl Trouble {
    fn draw(rng: &mut Rng) -> Self {
        match rng.u8(..10) {
            0 | 1 => Self::Refuse,
            2 => Self::LoseAnswers,
            3 => Self::Deny,
            4 => Self::Slow(ms(rng.u64(20..400))),
            5 => Self::SlowAnswers(ms(rng.u64(20..400))),
            6 => Self::Hang,
            7 => Self::Flaky(0.05 + rng.f64() * 0.6),
            8 => Self::Blips(rng.usize(1..4)),
            _ => Self::Other(rng.usize(..64)),
        }
    }
}
