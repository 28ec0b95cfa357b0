//! Judges logs and chats. Updates and appends add to them, so a document has each of them once and in order.
//!
//! A put or remove of a chat replaces what is older. Then nothing older may show, and nothing newer may miss.

use std::collections::HashSet;

use super::dead_letters::is_newer_base;
use super::register::MAX_ABSENT_MS;
use super::{ROUNDING_MS, Verdict};
use crate::history::{Claim, History, Op, OpKind, Outcome, Reading, WriteKind};

pub fn check(history: &History, key: usize) -> Verdict {
    let log = Log { history, key };
    for op in history.ops.iter().filter(|op| op.key == key) {
        match &op.kind {
            OpKind::Read(Ok(reading)) => log.check_read(op, reading)?,
            OpKind::Write(write) if write.outcome == Outcome::Superseded => match write.kind {
                WriteKind::Add if history.writes(key).any(|other| is_newer_base(history, other, op)) => {}
                WriteKind::Add => return Err(format!("an append was superseded by nothing: {op}")),
                WriteKind::Append | WriteKind::Replace => {
                    return Err(format!("an update was superseded, but its caller got no error: {op}"));
                }
                WriteKind::Put | WriteKind::Remove => {}
            },
            _ => {}
        }
    }
    log.check_final()
}

struct Log<'a> {
    history: &'a History,
    key: usize,
}

impl Log<'_> {
    fn check_read(&self, read: &Op, reading: &Reading) -> Verdict {
        let Some(end) = read.end else { return Ok(()) };
        let seen = reading.seen.as_deref().unwrap_or_default();
        self.check_entries(seen, end.tick).map_err(|message| format!("{message}: {read}"))?;
        let required = self.required(read, reading);
        let is_revived = |op: &Op| self.is_revived_by(seen, op) && !self.may_be_superseded(op, end.tick);
        if let Some((reason, op)) = required.iter().find(|(_, op)| is_revived(op)) {
            return Err(format!("shows what is older than {op}, {reason}: {read}"));
        }
        let may_miss = |op: &Op| {
            is_remove(op) || self.may_be_replaced(op, end.tick) || self.may_be_superseded(op, end.tick)
        };
        let is_missing = |op: &Op| id(op).is_none_or(|id| !seen.contains(&id)) && !may_miss(op);
        match required.iter().find(|(_, op)| is_missing(op)) {
            Some((reason, op)) => Err(format!("the update, {reason}, is missing: {read}, {op}")),
            None => Ok(()),
        }
    }

    /// Returns true if a put or remove that is newer than the operation may have taken its place before `until`.
    fn may_be_replaced(&self, op: &Op, until: u64) -> bool {
        let is_newer = |other: &&Op| {
            !std::ptr::eq(*other, op)
                && is_whole(other)
                && other.begin.tick < until
                && other.write().is_some_and(|write| write.outcome.may_show())
                && !self.history.rules.is_before(other, op)
        };
        self.history.writes(self.key).any(|other| is_newer(&other))
    }

    /// Returns true if another handle may have written a newer version than a queued put, remove or update before `until`.
    ///
    /// Such a write becomes a dead letter, unless a later put or remove of its handle took its place in the queue first.
    fn may_be_superseded(&self, op: &Op, until: u64) -> bool {
        let writes = || self.history.writes(self.key);
        let is_newer = |other: &Op| {
            other.handle != op.handle
                && other.begin.tick < until
                && other.write().is_some_and(|write| write.outcome.may_show())
                && !self.history.rules.is_before(other, op)
        };
        let took_its_place = |later: &Op| {
            later.handle == op.handle
                && is_whole(later)
                && later.begin.tick > op.begin.tick
                && self.history.is_queued(later)
        };
        !is_add(op) && self.history.is_queued(op) && writes().any(is_newer) && writes().any(took_its_place)
    }

    /// Returns true if the operation has surely replaced one of these entries.
    fn is_revived_by(&self, seen: &[u64], op: &Op) -> bool {
        let is_kept = op.write().is_some_and(|write| match write.outcome {
            Outcome::Stored => true,
            Outcome::Queued => !self.may_be_dead(op) && !self.history.is_lost_with_file(op),
            _ => false,
        });
        let mut entries = seen.iter().filter_map(|id| self.history.shown(self.key, *id));
        is_whole(op) && is_kept && entries.any(|entry| self.history.rules.is_before(entry, op))
    }

    /// Returns true if the queued put or remove, or a later one that replaced it in the queue, may be a dead letter.
    fn may_be_dead(&self, op: &Op) -> bool {
        let mut dead = self.history.dead_letters.iter().filter(|dead| dead.key == self.key && !dead.is_add);
        dead.any(|dead| self.history.may_queue(dead.handle, op))
    }

    /// Checks that each entry is an update that began before `until` and was not rejected, and that none repeats.
    fn check_entries(&self, seen: &[u64], until: u64) -> Verdict {
        let mut met = HashSet::new();
        for id in seen {
            let Some(op) = self.history.shown(self.key, *id).filter(|op| op.begin.tick < until) else {
                return Err(format!(
                    "shows the update {id}, which no caller made or which the store rejected"
                ));
            };
            if !met.insert(id) && !self.history.may_be_doubled(op) {
                return Err(format!("shows the update {id} twice"));
            }
        }
        Ok(())
    }

    /// Returns the writes that a reading must show, unless newer ones replaced them.
    fn required(&self, read: &Op, reading: &Reading) -> Vec<(&'static str, &Op)> {
        if self.may_expire(read.begin.tick) {
            return Vec::new();
        }
        let is_past = |op: &Op| op.end.is_some_and(|end| end.tick < read.begin.tick);
        let is_own =
            move |op: &Op| op.handle == read.handle && is_past(op) && self.history.is_remembered(op, read);
        let acknowledged = self.history.writes(self.key).filter(|op| is_own(op) && self.is_required(op));
        let earlier = self.history.ops.iter().filter(move |op| {
            op.key == self.key && op.life == read.life && is_own(op) && op.write().is_none()
        });
        let shown = earlier.flat_map(|op| match &op.kind {
            OpKind::Read(Ok(reading)) => reading.seen.clone().unwrap_or_default(),
            _ => Vec::new(),
        });
        let is_exempt = |op: &Op| {
            self.history.is_discarded(op)
                || self.history.is_lost_with_file(op)
                || self.history.may_be_taken_for_repeated(op)
                || self.may_be_undone(op)
        };
        let shown = shown.filter_map(|id| self.history.shown(self.key, id)).filter(|op| !is_exempt(op));
        let has_queued_remove = || {
            let mut removes = self.history.writes(self.key).filter(|op| is_remove(op));
            removes.any(|op| op.handle == read.handle && self.history.is_queued(op))
        };
        let window = match reading.claim {
            Claim::Fresh => self.history.rules.fresh_ms + ROUNDING_MS,
            Claim::Absent if !has_queued_remove() => {
                self.history.rules.fresh_ms.min(MAX_ABSENT_MS) + ROUNDING_MS
            }
            Claim::Absent | Claim::Stale | Claim::Queued => i64::MAX / 2,
        };
        let stored = self.history.writes(self.key).filter(move |op| {
            op.write().is_some_and(|write| write.outcome == Outcome::Stored)
                && op.end.is_some_and(|end| end.ms + window < read.begin.ms)
        });
        let acknowledged = acknowledged.map(|op| ("acknowledged before", op));
        let shown = shown.map(|op| ("shown before", op));
        acknowledged.chain(shown).chain(stored.map(|op| ("stored long ago", op))).collect()
    }

    /// Returns true if forward jumps in an unsynced period may exceed the time to live of a write. The conversation ends with it.
    fn may_expire(&self, until: u64) -> bool {
        let jumps_over = |op: &Op| op.write().is_some_and(|write| op.drift.early_ms >= write.ttl_ms);
        self.history.writes(self.key).any(|op| op.begin.tick < until && jumps_over(op))
    }

    /// Returns true if the store must have taken the write.
    fn is_required(&self, op: &Op) -> bool {
        self.history.is_kept(op)
            && !self.history.may_be_taken_for_repeated(op)
            && op.write().is_some_and(|write| write.outcome != Outcome::Superseded)
    }

    /// Returns true for an unacknowledged update of a process that ended. A queued write of the next process may
    /// overwrite it (I7).
    fn may_be_undone(&self, op: &Op) -> bool {
        let outcome = |op: &Op| op.write().map(|write| write.outcome);
        let replaces_it = |later: &Op| {
            (later.handle, outcome(later)) == (op.handle, Some(Outcome::Queued))
                && later.life > op.life
                && !is_add(later)
        };
        outcome(op) == Some(Outcome::Unknown) && self.history.writes(self.key).any(replaces_it)
    }

    fn check_final(&self) -> Verdict {
        let Some(last) = self.history.finals.iter().find(|last| last.key == self.key) else { return Ok(()) };
        let seen = last.seen.as_deref().unwrap_or_default();
        self.check_entries(seen, u64::MAX).map_err(|message| format!("the database {message}"))?;
        let place = |op: &Op| id(op).and_then(|id| seen.iter().position(|seen| *seen == id));
        for op in self.history.writes(self.key) {
            let may_miss =
                || is_remove(op) || self.may_be_replaced(op, u64::MAX) || self.may_expire(u64::MAX);
            if self.is_required(op) && place(op).is_none() && !may_miss() {
                return Err(format!("an acknowledged update is lost: {op}"));
            }
            if self.is_revived_by(seen, op) && !self.may_be_superseded(op, u64::MAX) {
                return Err(format!("the database has what is older than {op}"));
            }
            // The file of a queued append went away and came back.
            if is_add(op) && self.history.is_lost_with_file(op) {
                continue;
            }
            let is_after = |later: &&Op| is_ordered(op, later) && place(later) < place(op);
            if let Some(later) = self.history.writes(self.key).filter(|op| place(op).is_some()).find(is_after)
            {
                return Err(format!("{later} stands before {op}"));
            }
        }
        Ok(())
    }
}

fn id(op: &Op) -> Option<u64> {
    op.write().map(|write| write.id)
}

fn is_whole(op: &Op) -> bool {
    op.write().is_some_and(|write| matches!(write.kind, WriteKind::Put | WriteKind::Remove))
}

fn is_remove(op: &Op) -> bool {
    op.write().is_some_and(|write| write.kind == WriteKind::Remove)
}

fn is_add(op: &Op) -> bool {
    op.write().is_some_and(|write| write.kind == WriteKind::Add)
}

/// Returns true if the second update surely had the result of the first as its base.
fn is_ordered(first: &Op, second: &Op) -> bool {
    let (Some(one), Some(two)) = (first.write(), second.write()) else { return false };
    let is_made = |outcome| matches!(outcome, Outcome::Stored | Outcome::Queued);
    first.end.is_some_and(|end| end.tick < second.begin.tick)
        && is_made(one.outcome)
        && is_made(two.outcome)
        && (first.handle == second.handle || (one.outcome, two.outcome) == (Outcome::Stored, Outcome::Stored))
}
