//! A daemon of the simulator: its clock, its file, its attempts. The queue's rules are the real ones.

use super::oracle::{Oracle, START, Seen};
use super::rule::Rule;
use crate::model::version::{Timestamp, Version};
use crate::model::writer::WriterId;
use crate::outage::rules::{Placement, QueuedHead, base_for_update, fold_start, must_update_wait, place};
use crate::store::{Condition, WriteKind};

/// What the store told about the conversation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Copy {
    pub version: Version,
    /// The number of entries of the history that it contains.
    pub entries: usize,
    pub has_value: bool,
    pub expires_at: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueueRow {
    pub head: QueuedHead,
    pub op: usize,
}

/// The outage file.
#[derive(Debug, Clone, PartialEq)]
pub struct File {
    pub rows: Vec<QueueRow>,
    pub copy: Option<Copy>,
    pub mark: Version,
    pub dead_letters: Vec<usize>,
}

/// The value that an update goes on from, read under the key lock.
#[derive(Debug, Clone)]
pub struct Reading {
    pub base: Version,
    pub seen: Seen,
    pub is_excused: bool,
    /// A queued append whose items the value has twice.
    pub doubled: Option<usize>,
}

#[derive(Debug, Clone)]
pub struct Daemon {
    pub index: usize,
    pub part: i64,
    pub opening: i64,
    pub clock_error: i64,
    pub is_synced: bool,
    pub last_version: Version,
    pub memory: Option<Copy>,
    pub file: File,
    pub synced_file: File,
    pub live: Vec<usize>,
    pub reading: Option<Reading>,
    pub in_replay: Option<Version>,
    /// Whether a power cut has lost something, and the store has told nothing since.
    pub is_doubtful: bool,
    /// The first opening after the last power cut.
    pub cut_at: i64,
}

impl Daemon {
    pub fn new(index: usize) -> Self {
        let file = File { rows: Vec::new(), copy: None, mark: Version::NONE, dead_letters: Vec::new() };
        let none = Version::NONE;
        let part = 1 + i64::try_from(index).unwrap();
        Self {
            index,
            part,
            opening: 1,
            clock_error: 0,
            is_synced: true,
            last_version: none,
            memory: None,
            synced_file: file.clone(),
            file,
            live: Vec::new(),
            reading: None,
            in_replay: None,
            is_doubtful: false,
            cut_at: 0,
        }
    }

    pub fn writer(&self, off: &[Rule]) -> WriterId {
        let opening = if off.contains(&Rule::OpeningId) { 1 } else { self.opening };
        WriterId::from_raw((self.part << 24) | opening)
    }

    /// Issues a version. Its low bits differ for each daemon. It is even, unless the rule is off.
    pub fn issue(&mut self, now: Timestamp, off: &[Rule]) -> Version {
        let step = if off.contains(&Rule::OddVersions) { 1 } else { 2 };
        let low = i64::try_from(self.index).unwrap() * step;
        let at = |millis: i64| Version::from_raw(Version::min_at(Timestamp(millis)).raw() | low);
        let shown = now.0 + self.clock_error;
        let fresh = at(shown);
        let version = if fresh > self.last_version { fresh } else { at(self.last_version.at().0 + 1) };
        self.last_version = version;
        version
    }

    pub fn observe(&mut self, version: Version) {
        self.last_version = self.last_version.max(version);
    }

    /// Starts the process on its file: a new opening, a clock above the mark and above the queue.
    pub fn open(&mut self, off: &[Rule]) {
        self.opening += 1;
        self.memory = None;
        self.live.clear();
        self.reading = None;
        self.in_replay = None;
        let mark = if off.contains(&Rule::Mark) { Version::NONE } else { self.file.mark };
        let queued = self.file.rows.iter().map(|row| row.head.write.version).max().unwrap_or_default();
        self.last_version = if off.contains(&Rule::FileVersions) { mark } else { mark.max(queued) };
    }

    /// Returns what is known of the store's row.
    pub fn copy(&self) -> Option<Copy> {
        match (self.memory, self.file.copy) {
            (Some(memory), Some(file)) => Some(if memory.version >= file.version { memory } else { file }),
            (memory, file) => memory.or(file),
        }
    }

    pub fn stored(&self) -> Version {
        self.copy().map_or(Version::NONE, |copy| copy.version)
    }

    pub fn heads(&self) -> Vec<QueuedHead> {
        self.file.rows.iter().map(|row| row.head).collect()
    }

    pub fn sync(&mut self) {
        self.synced_file = self.file.clone();
    }

    /// Forgets copies below a version whose value is unknown.
    pub fn drop_copies_below(&mut self, version: Version) {
        self.memory = self.memory.filter(|copy| copy.version >= version);
        self.file.copy = self.file.copy.filter(|copy| copy.version >= version);
    }

    pub fn save_copy(&mut self, copy: Copy, is_in_file: bool) {
        let is_newer = |held: Option<Copy>| held.is_none_or(|held| held.version <= copy.version);
        if is_newer(self.memory) {
            self.memory = Some(copy);
        }
        if is_in_file && is_newer(self.file.copy) {
            self.file.copy = Some(copy);
        }
    }

    /// Reads the value for an update from queue and copy. `None` if there is no value at hand.
    pub fn read(&self, oracle: &Oracle, now: Timestamp, off: &[Rule]) -> Option<Reading> {
        let heads = self.heads();
        let is_whole = |row: &QueuedHead| !row.is_append();
        let copy = self.copy();
        if copy.is_none() && !heads.iter().any(is_whole) {
            return None;
        }
        let stored = copy.map_or(Version::NONE, |copy| copy.version);
        let has_value = copy.is_some_and(|copy| copy.has_value);
        let is_unknown = !heads.iter().all(is_whole) && fold_start(&heads, stored, has_value).is_none();
        let must_wait = must_update_wait(&heads, self.writer(off));
        if is_unknown && !off.contains(&Rule::AppendInCopy) || must_wait && !off.contains(&Rule::AppendsWait)
        {
            return None;
        }
        let at = Timestamp(now.0 + self.clock_error);
        let mut seen = Seen {
            entries: copy.map_or(0, |copy| copy.entries),
            is_absent: copy.is_none_or(|copy| !copy.has_value || copy.expires_at <= at),
            ..Seen::default()
        };
        let (mut is_excused, mut doubled) = (self.is_doubtful, None);
        for row in &self.file.rows {
            let op = &oracle.ops[row.op];
            is_excused |= op.is_excused;
            let is_below = !row.head.is_provisional && row.head.write.version < stored;
            if is_whole(&row.head) && is_below && !off.contains(&Rule::CopyOverRow) {
                continue;
            }
            if is_whole(&row.head) {
                // The value is the row's, and the copy is not in it.
                seen.entries = op.seen.entries;
                seen.ops = op.seen.ops.clone();
                seen.is_absent = row.head.write.kind == WriteKind::Remove || op.expires_at <= at;
                doubled = None;
            } else {
                let is_in_copy = oracle.history[..seen.entries].iter().any(|entry| entry.op == row.op);
                doubled = doubled.or(is_in_copy.then_some(row.op));
                seen.is_absent = false;
            }
            seen.ops.insert(row.op);
        }
        Some(Reading { base: self.base(&heads, stored, off), seen, is_excused, doubled })
    }

    /// The base of an update, with the switches of the mutants.
    fn base(&self, heads: &[QueuedHead], stored: Version, off: &[Rule]) -> Version {
        let writer = self.writer(off);
        let whole = heads.iter().rev().find(|row| row.write.kind != WriteKind::Append);
        if off.contains(&Rule::BaseAnchor)
            && let Some(row) = whole
        {
            return row.write.version;
        }
        let mut heads = heads.to_vec();
        if off.contains(&Rule::ExactBehindOldPart) {
            heads.iter_mut().for_each(|row| row.write.writer = writer);
        }
        let has_whole = whole.is_some() && off.contains(&Rule::CopyOverRow);
        base_for_update(&heads, if has_whole { Version::NONE } else { stored }, writer)
    }

    /// Places a write in the queue, with the switches of the mutants.
    pub fn place(&self, new: &QueuedHead, off: &[Rule]) -> Placement {
        let heads = self.heads();
        let stored = self.file.copy.map_or(Version::NONE, |copy| copy.version);
        let placed = place(&heads, new, stored);
        let is_update = new.write.condition != Condition::Any;
        match placed {
            Placement::Covered if off.contains(&Rule::Covered) => Placement::Insert { replaced: Vec::new() },
            Placement::Superseded(_) if off.contains(&Rule::Superseded) => place(&heads, new, Version::NONE),
            Placement::Insert { .. } if off.contains(&Rule::UpdateReplaces) && is_update => {
                Placement::Insert { replaced: Vec::new() }
            }
            Placement::Insert { .. } if off.contains(&Rule::PlainReplaces) && !is_update => {
                Placement::Insert { replaced: Vec::new() }
            }
            placed => placed,
        }
    }

    /// A clock that is far off, or right within the tolerance.
    pub fn shows(&self, now: Timestamp) -> i64 {
        now.0 + self.clock_error - START.0
    }
}
