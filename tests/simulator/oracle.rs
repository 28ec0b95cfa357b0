//! The promises: what the store may apply, and what must hold when everything has arrived.

use std::collections::BTreeSet;

use super::daemon::Reading;
use super::rule::Environment;
use super::store::StoredRow;
use crate::model::version::{Timestamp, Version};
use crate::store::{Condition, WriteHead, WriteKind};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Put,
    Remove,
    Update,
    UpdateRemove,
    Append,
    /// An update of its own old version: it replaces anything older than that.
    Import,
    SqlPut,
    SqlUpdate,
    SqlDelete,
}

impl Kind {
    pub fn is_plain(self) -> bool {
        matches!(self, Self::Put | Self::Remove)
    }

    pub fn is_update(self) -> bool {
        matches!(self, Self::Update | Self::UpdateRemove)
    }

    fn removes(self) -> bool {
        matches!(self, Self::Remove | Self::UpdateRemove | Self::SqlDelete)
    }
}

/// Everything that an update knows of the conversation.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// The number of entries of the history that the copy contains.
    pub entries: usize,
    /// Queued writes that the value contains.
    pub ops: BTreeSet<usize>,
    /// Whether the value was absent.
    pub is_absent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acknowledged {
    No,
    Stored,
    Queued,
}

/// One call of one caller.
#[derive(Debug, Clone)]
pub struct Op {
    pub id: usize,
    pub kind: Kind,
    /// The daemon, or `None` for plain SQL.
    pub daemon: Option<usize>,
    pub head: WriteHead,
    pub expires_at: Timestamp,
    pub seen: Seen,
    pub acknowledged: Acknowledged,
    pub is_dead: bool,
    pub replaced_by: Option<usize>,
    /// Whether a daemon that is alone may make a dead letter of it: it was made of what a power cut left.
    pub is_excused: bool,
    /// Whether the daemon knew a newer version when it acknowledged the write as queued.
    pub is_outdated: bool,
}

/// One applied write.
#[derive(Debug, Clone)]
pub struct Entry {
    pub op: usize,
    pub version: Version,
    pub row_version: Version,
}

#[derive(Debug, Default)]
pub struct Oracle {
    pub ops: Vec<Op>,
    pub history: Vec<Entry>,
    /// Expiries of values that a later write found expired.
    ended_lives: Vec<Timestamp>,
    /// An update, and an own write that it overwrote unseen.
    overwritten: Vec<(usize, usize)>,
}

/// A broken promise: a kind for the shrinking, and the sentence.
#[derive(Debug, Clone)]
pub struct Violation {
    pub kind: &'static str,
    pub text: String,
}

fn broken<T>(kind: &'static str, text: String) -> Result<T, Violation> {
    Err(Violation { kind, text })
}

impl Oracle {
    pub fn entry_of(&self, op: usize) -> Option<usize> {
        self.history.iter().position(|entry| entry.op == op)
    }

    /// Checks a value that the daemon shows to its caller.
    pub fn check_read(&self, reading: &Reading) -> Result<(), Violation> {
        match reading.doubled {
            Some(op) => broken("an append twice in a value", self.name(op)),
            None => Ok(()),
        }
    }

    /// Checks a write that the store has just applied over `before`.
    pub fn on_applied(
        &mut self,
        op: usize,
        version: Version,
        before: Option<StoredRow>,
        after: Version,
    ) -> Result<(), Violation> {
        let name = self.name(op);
        let at = version.at();
        if self.entry_of(op).is_some() {
            return broken("applied twice", name);
        }
        if before.is_some_and(|row| after <= row.state.version) {
            return broken("the row version falls", name);
        }
        if !matches!(self.ops[op].kind, Kind::Append) && after != version {
            return broken("the row has another version than the write", name);
        }
        self.check_order(op, version)?;
        if self.ops[op].kind == Kind::Import && self.history.iter().any(|entry| entry.version > IMPORTED) {
            return broken("an import over a newer write", name);
        }
        if self.ops[op].kind == Kind::Append && self.ended_lives.iter().any(|end| at < *end) {
            return broken("an append to an expired life", name);
        }
        let is_present = before.is_some_and(|row| !row.is_gone(at));
        if self.ops[op].head.condition == Condition::IfPresent && !is_present {
            return broken("an append to an absent conversation", name);
        }
        if before.is_some_and(|row| row.has_value && row.state.expires_at <= at) {
            self.ended_lives.extend(before.map(|row| row.state.expires_at));
        }
        if self.ops[op].kind.is_update() {
            self.check_unseen(op, before.is_none_or(|row| row.is_gone(at)))?;
        }
        self.history.push(Entry { op, version, row_version: after });
        Ok(())
    }

    /// A conflict needs a write that the update has not seen.
    pub fn on_conflict(&self, op: usize) -> Result<(), Violation> {
        let update = &self.ops[op];
        let is_unseen = |entry: &Entry| !update.seen.ops.contains(&entry.op);
        if update.is_excused || self.history.iter().skip(update.seen.entries).any(is_unseen) {
            return Ok(());
        }
        broken("a conflict with nothing", self.name(op))
    }

    /// The queue keeps one put or remove, and one update for each base and daemon part.
    pub fn check_rows(&self, rows: &[WriteHead]) -> Result<(), Violation> {
        let is_plain = WriteHead::is_plain;
        let is_doubled = |(at, row): (usize, &WriteHead)| {
            rows[..at].iter().any(|before| match row.kind {
                WriteKind::Append => false,
                _ if is_plain(row) => is_plain(before),
                _ => before.condition == row.condition && before.writer.daemon() == row.writer.daemon(),
            })
        };
        match rows.iter().enumerate().any(is_doubled) && !rows.iter().any(|row| row.kind == WriteKind::Append)
        {
            true => broken("the queue grows", format!("{rows:?}")),
            false => Ok(()),
        }
    }

    /// Nothing older undoes a remove or goes over a newer put.
    fn check_order(&self, op: usize, version: Version) -> Result<(), Violation> {
        let kind = self.ops[op].kind;
        for (at, entry) in self.history.iter().enumerate().filter(|(_, entry)| entry.version > version) {
            let other = self.ops[entry.op].kind;
            let is_unseen = at >= self.ops[op].seen.entries;
            let undoes = other.removes() && (!kind.is_update() || kind == Kind::Update && is_unseen);
            let overwrites = matches!(other, Kind::Put | Kind::SqlPut) && !kind.is_update();
            if undoes || overwrites {
                let text = format!("{} undoes {}", self.name(op), self.name(entry.op));
                return broken("an older write over a newer one", text);
            }
        }
        Ok(())
    }

    /// An update overwrites only what it saw, or own writes that nobody was told of.
    fn check_unseen(&mut self, op: usize, is_gone: bool) -> Result<(), Violation> {
        let (update, mut pairs) = (&self.ops[op], Vec::new());
        // A put that the value contains was to overwrite everything older, whatever became of it.
        let puts = update.seen.ops.iter().map(|op| &self.ops[*op]).filter(|op| op.kind.is_plain());
        let overwrites = puts.map(|put| put.head.version).max().unwrap_or_default();
        for entry in self.history.iter().skip(update.seen.entries).rev() {
            let other = &self.ops[entry.op];
            let is_seen = update.seen.ops.contains(&entry.op);
            if (update.seen.is_absent && is_gone || entry.row_version < overwrites) && !is_seen {
                break;
            }
            if !is_seen && other.daemon != update.daemon {
                let text = format!("{} overwrites {} of another", self.name(op), self.name(entry.op));
                return broken("an unseen write overwritten", text);
            }
            if !is_seen {
                pairs.push((op, entry.op));
            }
            if other.kind.is_plain() || is_seen && other.seen.is_absent && other.kind.is_update() {
                break;
            }
        }
        self.overwritten.extend(pairs);
        Ok(())
    }

    /// Checks the promises after everything has arrived.
    pub fn check_end(&self, environment: &Environment) -> Result<(), Violation> {
        for (update, own) in &self.overwritten {
            let (update, own) = (&self.ops[*update], &self.ops[*own]);
            let was_told = own.acknowledged != Acknowledged::No && !own.is_dead && own.replaced_by.is_none();
            if was_told && update.acknowledged != Acknowledged::No {
                let text = format!("{} overwrites {}", self.name(update.id), self.name(own.id));
                return broken("an own acknowledged write overwritten unseen", text);
            }
        }
        self.ops
            .iter()
            .filter(|op| op.acknowledged != Acknowledged::No)
            .try_for_each(|op| self.check(op, environment))
    }

    fn check(&self, op: &Op, environment: &Environment) -> Result<(), Violation> {
        let is_alone = environment.daemons == 1 && !environment.sql && !environment.clone;
        if op.is_dead && is_alone && !op.is_excused {
            return broken("a dead letter alone", self.name(op.id));
        }
        if op.is_dead && op.kind == Kind::Import && self.history.is_empty() {
            return broken("a dead letter of an import over nothing", self.name(op.id));
        }
        if op.is_dead && op.is_outdated && op.kind.is_plain() {
            return broken("a dead letter of a write that was known to be outdated", self.name(op.id));
        }
        // A delayed request finds the conversation that its first copy found absent. The answer cannot be noted, because a noted
        // write is `Stored` when it comes again.
        let may_come_late = op.head.condition == Condition::IfPresent;
        let is_held = self.is_still_held(op.id) && !may_come_late;
        if op.is_dead && is_held && !environment.purge && !environment.expiry {
            return broken("a dead letter of a write that the store holds", self.name(op.id));
        }
        let mut at = op;
        loop {
            if at.is_dead || self.entry_of(at.id).is_some() {
                return Ok(());
            }
            match at.replaced_by {
                Some(by) => at = &self.ops[by],
                None => break,
            }
        }
        let covers = |entry: &Entry| {
            let other = &self.ops[entry.op];
            other.kind.is_plain() && other.daemon == op.daemon && entry.version > at.head.version
        };
        if self.history.iter().any(covers) {
            return Ok(());
        }
        broken("an acknowledged write is lost", self.name(op.id))
    }

    /// Whether the store applied the write, and only appends and updates came after it.
    fn is_still_held(&self, op: usize) -> bool {
        let replaces = |entry: &Entry| {
            let kind = self.ops[entry.op].kind;
            kind.is_plain() || kind.removes() || kind == Kind::SqlPut || kind == Kind::SqlUpdate
        };
        self.entry_of(op).is_some_and(|at| !self.history[at + 1..].iter().any(replaces))
    }

    pub fn name(&self, op: usize) -> String {
        let Op { id, kind, daemon, head, .. } = &self.ops[op];
        let daemon = daemon.map_or("sql".to_owned(), |daemon| format!("d{daemon}"));
        format!("{daemon} {kind:?}#{id}@{}", shown(head.version))
    }
}

/// The beginning of the simulated time.
pub const START: Timestamp = Timestamp(10_000_000_000);

/// The version of an imported conversation, seven days before the start.
pub const IMPORTED: Version = Version::min_at(Timestamp(START.0 - 7 * 86_400_000));

/// A version as a trace shows it: steps of 100 ms since the start, then the low bits.
pub fn shown(version: Version) -> String {
    if version == Version::NONE {
        return "none".to_owned();
    }
    let millis = version.at().0 - START.0;
    let low = version.raw() - Version::min_at(version.at()).raw();
    match (millis % 100, low) {
        (0, 0) => format!("{}", millis / 100),
        (0, low) => format!("{}+{low}", millis / 100),
        (_, low) => format!("{}ms+{low}", millis),
    }
}
