//! The history of a world as its callers saw it. The oracle gets nothing else.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use threadkeep::ErrorKind;

use crate::clocks::jumps_since;

/// The stored document: the ids of the writes that made it. A register has one id, a log or chat one id for each write since the last
/// put.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    pub ids: Vec<u64>,
    /// Makes some documents larger.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pad: String,
}

/// A point in time: its rank among all moments, and the milliseconds since the world began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    pub tick: u64,
    pub ms: i64,
}

/// One operation of a caller.
#[derive(Debug, Clone)]
pub struct Op {
    /// The handle. A client with plain SQL counts as one more handle.
    pub handle: usize,
    /// The number of restarts of the handle before this operation.
    pub life: u32,
    pub key: usize,
    pub begin: Moment,
    /// `None` if the caller gave up waiting.
    pub end: Option<Moment>,
    /// The error of the handle's clock in milliseconds.
    pub off_ms: i64,
    /// The error of the final version and expiry, in milliseconds, because the clock jumped in an unsynced period.
    pub drift: Drift,
    pub kind: OpKind,
}

/// The milliseconds by which the version of a queued write may be too early or too late.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drift {
    /// True if the version may have been provisional.
    pub is_possible: bool,
    pub early_ms: i64,
    pub late_ms: i64,
}

/// A jump of the system clock.
#[derive(Debug, Clone, Copy)]
pub struct Jump {
    /// The milliseconds since the world began.
    pub at_ms: i64,
    pub by_ms: i64,
}

#[derive(Debug, Clone)]
pub enum OpKind {
    Write(WriteOp),
    Read(Result<Reading, ErrorKind>),
}

#[derive(Debug, Clone)]
pub struct WriteOp {
    pub id: u64,
    pub kind: WriteKind,
    pub ttl_ms: i64,
    pub outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteKind {
    Put,
    Remove,
    /// An update of a register. It replaces the document.
    Replace,
    /// An update that appends to a log or chat.
    Append,
    /// An append of `Cache::append` to a log or chat.
    Add,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Stored,
    Superseded,
    Queued,
    /// A definite error: the write must have changed nothing.
    Failed(ErrorKind),
    /// The error says that the outcome is unknown, or the caller gave up waiting.
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// The ids in the document; `None` if the document is absent.
    pub seen: Option<Vec<u64>>,
    pub claim: Claim,
}

/// The freshness that a reading reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    Fresh,
    Stale,
    Queued,
    Absent,
}

/// A dead letter that a handle holds at the end.
#[derive(Debug, Clone)]
pub struct DeadWrite {
    pub handle: usize,
    pub key: usize,
    /// Empty for a tombstone.
    pub ids: Vec<u64>,
    /// True if the ids are those of appends.
    pub is_add: bool,
}

/// An operator's act on the outage file of a handle that was down, or a boot of the machine. After a boot the file may be
/// older, as after a power cut, so it counts as its own copy.
#[derive(Debug, Clone, Copy)]
pub struct FileChange {
    pub handle: usize,
    pub at: Moment,
    /// The handle whose file became this file, and the moment of its copy. `None` if the file was deleted.
    pub source: Option<(usize, Moment)>,
}

/// The document in the store at the end.
#[derive(Debug, Clone)]
pub struct FinalState {
    pub key: usize,
    pub seen: Option<Vec<u64>>,
    pub at: Moment,
}

/// The tolerances of a world and its settings, as far as the oracle needs them.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// Two writes of different handles or lives that are closer than this may have either order.
    pub order_ms: i64,
    /// The times at which a handle opened an outage file again, or at which the clock jumped. Then the versions of a handle may
    /// be ahead for a while, because they begin above the mark in the file. Other handles follow such versions.
    pub mark_starts_ms: Vec<i64>,
    /// The largest error of a clock after its first clock sync.
    pub clock_ms: i64,
    pub fresh_ms: i64,
    /// Keys below this number are registers (put, remove, replace).
    pub registers: usize,
    /// Keys from `registers` to this number are logs (append only, no expiry). The others are chats (all kinds, no expiry).
    pub logs: usize,
    /// True if the replica has room for all records, so that a handle can serve each known conversation in an outage.
    pub replica_keeps_all: bool,
    /// True if the queue is so small that a write may fail because the queue is full.
    pub queue_may_be_full: bool,
}

/// A finished world.
#[derive(Debug, Clone, Default)]
pub struct History {
    pub ops: Vec<Op>,
    pub dead_letters: Vec<DeadWrite>,
    pub file_changes: Vec<FileChange>,
    pub finals: Vec<FinalState>,
    /// Faults and restarts. The oracle ignores them; its messages show them.
    pub notes: Vec<(Moment, String)>,
    pub jumps: Vec<Jump>,
    pub rules: Rules,
}

/// Records operations while they run.
#[derive(Debug)]
pub struct Recorder {
    start: Instant,
    ticks: AtomicU64,
    ids: AtomicU64,
    ops: Mutex<Vec<Op>>,
    notes: Mutex<Vec<(Moment, String)>>,
}

impl Recorder {
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            ticks: 0.into(),
            ids: 0.into(),
            ops: Mutex::default(),
            notes: Mutex::default(),
        }
    }

    pub fn now(&self) -> Moment {
        let tick = self.ticks.fetch_add(1, SeqCst) + 1;
        Moment { tick, ms: i64::try_from(self.start.elapsed().as_millis()).unwrap() }
    }

    pub fn id(&self) -> u64 {
        self.ids.fetch_add(1, SeqCst) + 1
    }

    /// Returns the jumps of the system clock since the world began.
    pub fn jumps(&self) -> Vec<Jump> {
        let at_ms = |at: Instant| i64::try_from(at.duration_since(self.start).as_millis()).unwrap();
        jumps_since(self.start).into_iter().map(|(at, by_ms)| Jump { at_ms: at_ms(at), by_ms }).collect()
    }

    pub fn push(&self, op: Op) {
        self.ops().push(op);
    }

    pub fn note(&self, text: String) {
        self.notes.lock().unwrap().push((self.now(), text));
    }

    pub fn notes(&self) -> Vec<(Moment, String)> {
        self.notes.lock().unwrap().clone()
    }

    /// Takes the recorded operations, ordered by their begin.
    pub fn take(&self) -> Vec<Op> {
        let mut ops = std::mem::take(&mut *self.ops());
        ops.sort_by_key(|op| op.begin.tick);
        ops
    }

    fn ops(&self) -> MutexGuard<'_, Vec<Op>> {
        self.ops.lock().unwrap()
    }
}

impl Op {
    pub fn write(&self) -> Option<&WriteOp> {
        match &self.kind {
            OpKind::Write(write) => Some(write),
            OpKind::Read(_) => None,
        }
    }
}

impl Outcome {
    /// Returns true if readers may see the write. A superseded write may have been stored first, if its response was
    /// lost.
    pub fn may_show(self) -> bool {
        !matches!(self, Self::Failed(_))
    }
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let end = self.end.map_or_else(|| "…".to_owned(), |end| format!("{}/{}", end.tick, end.ms));
        write!(
            f,
            "{}/{}–{end} handle {}.{} key {} ",
            self.begin.tick, self.begin.ms, self.handle, self.life, self.key
        )?;
        if self.off_ms.abs() > 1 {
            write!(f, "(off {} ms) ", self.off_ms)?;
        }
        if self.drift != Drift::default() {
            write!(f, "({:?}) ", self.drift)?;
        }
        match &self.kind {
            OpKind::Write(write) => {
                write!(f, "{:?} {} ttl {} → {:?}", write.kind, write.id, write.ttl_ms, write.outcome)
            }
            OpKind::Read(Ok(reading)) => write!(f, "get → {:?} {:?}", reading.claim, reading.seen),
            OpKind::Read(Err(kind)) => write!(f, "get → {kind:?}"),
        }
    }
}
