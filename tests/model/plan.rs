//! The plan of a world: settings, the operations of each worker, and the faults.
//!
//! A seed decides the plan. Real time decides the order of concurrent calls.

use std::time::Duration;

use fastrand::Rng;

/// Keys below this number are registers. The keys from here to [`LOGS`] are logs.
pub const REGISTERS: usize = 5;
/// The keys from here to [`KEYS`] are chats: callers append to them, and put and remove them, too.
pub const LOGS: usize = 8;
pub const KEYS: usize = 10;
pub const HANDLES: usize = 2;
/// Tasks that use one handle concurrently.
const WORKERS_PER_HANDLE: usize = 3;
const MAX_RESTARTS: usize = 20;
/// The number of operations of the handles for each plain statement.
const OPERATIONS_PER_STATEMENT: usize = 5;

#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub settings: Settings,
    /// The handle and the steps of each worker.
    pub workers: Vec<(usize, Vec<Step>)>,
    /// The statements of a client that uses plain SQL.
    pub statements: Vec<Statement>,
}

#[derive(Debug, Clone)]
pub struct Settings {
    pub fresh_for: Duration,
    pub soft_timeout: Duration,
    pub cache_bytes: usize,
    pub queue_bytes: usize,
    pub replica_bytes: usize,
    /// The error of each handle's clock at its start, in milliseconds.
    pub skews: [i64; HANDLES],
    pub use_of_keys: UseOfKeys,
    /// True for each handle with an outage file.
    pub has_file: [bool; HANDLES],
    /// True if an operator copies, restores and deletes outage files.
    pub has_operator: bool,
    /// True if the handles restart up to 20 times, one after another.
    pub is_restless: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UseOfKeys {
    /// Each key belongs to one handle.
    Alone,
    /// All handles use all keys.
    Shared,
    /// A client with plain SQL uses them, too.
    SharedWithSql,
}

/// A plain SQL statement of another client.
#[derive(Debug, Clone)]
pub struct Statement {
    pub pause: Duration,
    pub key: usize,
    pub kind: StatementKind,
    pub ttl: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatementKind {
    /// An upsert of a register or chat.
    Put,
    /// An upsert that adds an id to a log or chat.
    Append,
    /// A delete of a register or chat.
    Delete,
}

#[derive(Debug, Clone)]
pub struct Step {
    pub pause: Duration,
    pub key: usize,
    pub action: Action,
    pub ttl: Duration,
    /// The number of bytes beside the ids.
    pub pad: usize,
    pub abandon_after: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Get,
    Put,
    Remove,
    Update,
    Append,
    Evict,
}

/// A fault between a handle and the store.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LinkFault {
    Refuse,
    LoseResponses,
    Deny,
    Slow(Duration),
    SlowResponses(Duration),
    Hang,
    /// This share of the calls is refused or loses its response.
    Flaky(f64),
    /// This many calls lose their response, too few to open the breaker.
    Blips(usize),
    /// Another fault of a gateway, by number.
    Other(usize),
}

/// One fault, one restart, or both.
#[derive(Debug, Clone)]
pub struct Episode {
    pub pause: Duration,
    pub handles: Vec<usize>,
    pub fault: Option<(LinkFault, Duration)>,
    /// A restart during the fault.
    pub restart: Option<Restart>,
}

#[derive(Debug, Clone, Copy)]
pub struct Restart {
    pub handle: usize,
    /// The limit of the shutdown; `None` for a crash.
    pub shutdown: Option<Duration>,
    pub act: FileAct,
    /// True if the machine boots in between.
    pub reboots: bool,
}

/// An act of an operator on the outage file, between two lives of a handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileAct {
    Keep,
    /// Keeps a copy for later.
    BackUp,
    /// Replaces the file by its last copy, over the present content.
    RestoreInPlace,
    /// Replaces the file by its last copy, as a new file.
    Restore,
    /// Replaces the file by a copy of itself, as a new file.
    Move,
    /// Replaces the file by the last copy of the other handle's file.
    Clone,
    Delete,
}

fn ms(span: u64) -> Duration {
    Duration::from_millis(span)
}

impl Plan {
    /// Draws a plan. `focus` may change the settings.
    pub fn new(seed: u64, operations: usize, focus: impl FnOnce(&mut Settings)) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut settings = Settings::draw(&mut rng);
        focus(&mut settings);
        let count = WORKERS_PER_HANDLE * HANDLES;
        let share = |at: usize| operations / count + usize::from(at < operations % count);
        let mut step = |handle| {
            let step = Step::draw(&mut rng);
            if settings.use_of_keys == UseOfKeys::Alone { step.with_own_key(handle) } else { step }
        };
        let worker = |at| (at % HANDLES, (0..share(at)).map(|_| step(at % HANDLES)).collect());
        let workers = (0..count).map(worker).collect();
        let statements = match settings.use_of_keys {
            UseOfKeys::SharedWithSql => operations / OPERATIONS_PER_STATEMENT,
            UseOfKeys::Alone | UseOfKeys::Shared => 0,
        };
        let statements = (0..statements).map(|_| Statement::draw(&mut rng)).collect();
        Self { seed, settings, workers, statements }
    }

    /// Returns the endless sequence of faults and restarts.
    pub fn episodes(&self) -> impl Iterator<Item = Episode> + Send + use<> {
        let mut rng = Rng::with_seed(self.seed ^ 0x0EBB_1E50);
        let (settings, mut restarts) = (self.settings.clone(), 0);
        std::iter::repeat_with(move || {
            let mut episode = Episode::draw(&mut rng, &settings);
            restarts += usize::from(episode.restart.is_some());
            episode.restart = episode.restart.filter(|_| restarts <= MAX_RESTARTS);
            episode
        })
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
            soft_timeout: ms(rng.u64(30..120)),
            cache_bytes: if rng.bool() { 1_500 } else { large },
            queue_bytes: if rng.u8(..5) == 0 { 1_000 } else { large },
            replica_bytes: if rng.u8(..5) == 0 { 1_000 } else { large },
            skews,
            use_of_keys: [UseOfKeys::Alone, UseOfKeys::Shared, UseOfKeys::SharedWithSql][rng.usize(..3)],
            has_file: [rng.u8(..8) > 0, rng.u8(..8) > 0],
            has_operator: rng.u8(..3) == 0,
            is_restless: rng.u8(..3) == 0,
        }
    }
}

impl Statement {
    fn draw(rng: &mut Rng) -> Self {
        let key = rng.usize(..KEYS);
        let (is_delete, is_put) = (rng.u8(..3) == 0, rng.bool());
        let kind = match key {
            ..LOGS if key >= REGISTERS => StatementKind::Append,
            _ if is_delete => StatementKind::Delete,
            LOGS.. if !is_put => StatementKind::Append,
            _ => StatementKind::Put,
        };
        let is_brief = key < REGISTERS && rng.u8(..5) < 2;
        let ttl = if is_brief { ms(rng.u64(300..1_500)) } else { ms(3_600_000) };
        Self { pause: ms(rng.u64(..30)), key, kind, ttl }
    }
}

impl Step {
    /// Moves the step to a key of the same kind that belongs to this handle alone.
    fn with_own_key(self, handle: usize) -> Self {
        let is_last = [REGISTERS, LOGS, KEYS].contains(&(self.key + 1));
        let key = match self.key % HANDLES == handle {
            true => self.key,
            false if is_last => self.key - 1,
            false => self.key + 1,
        };
        Self { key, ..self }
    }

    fn draw(rng: &mut Rng) -> Self {
        let action = match rng.u8(..100) {
            ..42 => Action::Get,
            42..58 => Action::Put,
            58..65 => Action::Remove,
            65..80 => Action::Update,
            80..93 => Action::Append,
            93.. => Action::Evict,
        };
        let is_for_log = match action {
            Action::Append => true,
            Action::Update => rng.u8(..3) > 0,
            Action::Get | Action::Evict => rng.u8(..2) == 0,
            Action::Put | Action::Remove => rng.u8(..5) == 0,
        };
        let first = if matches!(action, Action::Put | Action::Remove) { LOGS } else { REGISTERS };
        let key = if is_for_log { rng.usize(first..KEYS) } else { rng.usize(..REGISTERS) };
        Self {
            pause: ms(rng.u64(..24)),
            key,
            action,
            ttl: if !is_for_log && rng.u8(..5) < 2 { ms(rng.u64(300..1_500)) } else { ms(3_600_000) },
            pad: if rng.u8(..8) == 0 { rng.usize(..400) } else { 0 },
            abandon_after: (rng.u8(..25) == 0).then(|| ms(rng.u64(..20))),
        }
    }
}

impl Episode {
    fn draw(rng: &mut Rng, settings: &Settings) -> Self {
        let handles = match rng.usize(..3) {
            0 => vec![0],
            1 => vec![1],
            _ => vec![0, 1],
        };
        let slower = if settings.is_restless { 1 } else { 5 };
        let fault = (rng.u8(..8) > 0).then(|| (LinkFault::draw(rng), ms(rng.u64(40..180) * slower)));
        let restart = (fault.is_none() || settings.is_restless || rng.u8(..3) == 0).then(|| Restart {
            handle: rng.usize(..HANDLES),
            shutdown: [None, Some(ms(0)), Some(ms(300))][rng.usize(..3)],
            reboots: rng.u8(..4) == 0,
            act: if settings.has_operator { FileAct::draw(rng) } else { FileAct::Keep },
        });
        Self { pause: ms(rng.u64(10..100) * slower), handles, fault, restart }
    }
}

impl FileAct {
    fn draw(rng: &mut Rng) -> Self {
        match rng.u8(..16) {
            ..6 => Self::Keep,
            6..10 => Self::BackUp,
            10 => Self::RestoreInPlace,
            11 | 12 => Self::Restore,
            13 => Self::Move,
            14 => Self::Clone,
            _ => Self::Delete,
        }
    }
}

impl LinkFault {
    fn draw(rng: &mut Rng) -> Self {
        match rng.u8(..10) {
            0 | 1 => Self::Refuse,
            2 => Self::LoseResponses,
            3 => Self::Deny,
            4 => Self::Slow(ms(rng.u64(20..400))),
            5 => Self::SlowResponses(ms(rng.u64(20..400))),
            6 => Self::Hang,
            7 => Self::Flaky(0.05 + rng.f64() * 0.6),
            8 => Self::Blips(rng.usize(1..4)),
            _ => Self::Other(rng.usize(..64)),
        }
    }
}
