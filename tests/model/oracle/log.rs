//! Judges logs. Compare-and-set updates append to them, so a document has each update once and in order.

use std::collections::HashSet;

use super::{ROUNDING_MS, Verdict};
use crate::history::{Claim, History, Op, OpKind, Outcome, Reading};

pub fn check(history: &History, key: usize) -> Verdict {
    let log = Log { history, key };
    for op in history.ops.iter().filter(|op| op.key == key) {
        match &op.kind {
            OpKind::Read(Ok(reading)) => log.check_read(op, reading)?,
            OpKind::Write(write) if write.outcome == Outcome::Superseded => {
                return Err(format!("an update was superseded, but its caller got no error: {op}"));
            }
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
        let seen: HashSet<u64> = seen.iter().copied().collect();
        match self.required(read, reading).find(|(_, id)| !seen.contains(id)) {
            Some((reason, id)) => Err(format!("the update {id}, {reason}, is missing: {read}")),
            None => Ok(()),
        }
    }

    /// Checks that each entry is an update that began before `until` and was not rejected, and that none repeats.
    fn check_entries(&self, seen: &[u64], until: u64) -> Verdict {
        let mut met = HashSet::new();
        for id in seen {
            if self.history.shown(self.key, *id).is_none_or(|op| op.begin.tick >= until) {
                return Err(format!(
                    "shows the update {id}, which no caller made or which the store rejected"
                ));
            }
            if !met.insert(id) {
                return Err(format!("shows the update {id} twice"));
            }
        }
        Ok(())
    }

    /// Returns the updates that a reading must show.
    fn required<'b>(
        &'b self,
        read: &'b Op,
        reading: &'b Reading,
    ) -> impl Iterator<Item = (&'static str, u64)> + 'b {
        let is_past = |op: &Op| op.end.is_some_and(|end| end.tick < read.begin.tick);
        let is_own =
            move |op: &Op| op.handle == read.handle && is_past(op) && self.history.is_remembered(op, read);
        let acknowledged = self.history.writes(self.key).filter(move |op| is_own(op));
        let acknowledged = acknowledged.filter(|op| self.history.is_kept(op)).filter_map(id);
        let earlier = self.history.ops.iter().filter(move |op| {
            op.key == self.key && op.life == read.life && is_own(op) && op.write().is_none()
        });
        let shown = earlier.flat_map(|op| match &op.kind {
            OpKind::Read(Ok(reading)) => reading.seen.clone().unwrap_or_default(),
            _ => Vec::new(),
        });
        let is_exempt = |op: &Op| {
            self.history.is_discarded(op) || self.history.is_lost_with_file(op) || self.may_be_undone(op)
        };
        let shown = shown.filter(move |id| !self.history.shown(self.key, *id).is_some_and(is_exempt));
        let window = match reading.claim {
            Claim::Fresh | Claim::Absent => self.history.rules.fresh_ms + ROUNDING_MS,
            Claim::Stale | Claim::Queued => i64::MAX / 2,
        };
        let stored = self.history.writes(self.key).filter(move |op| {
            op.write().is_some_and(|write| write.outcome == Outcome::Stored)
                && op.end.is_some_and(|end| end.ms + window < read.begin.ms)
        });
        let mark = |reason: &'static str| move |id: u64| (reason, id);
        acknowledged
            .map(mark("acknowledged before"))
            .chain(shown.map(mark("shown before")))
            .chain(stored.filter_map(id).map(mark("stored long ago")))
    }

    /// Returns true for an unacknowledged update of a process that ended. A queued write of the next process may
    /// overwrite it (I7).
    fn may_be_undone(&self, op: &Op) -> bool {
        let outcome = |op: &Op| op.write().map(|write| write.outcome);
        let replaces_it = |later: &Op| {
            (later.handle, outcome(later)) == (op.handle, Some(Outcome::Queued)) && later.life > op.life
        };
        outcome(op) == Some(Outcome::Unknown) && self.history.writes(self.key).any(replaces_it)
    }

    fn check_final(&self) -> Verdict {
        let Some(last) = self.history.finals.iter().find(|last| last.key == self.key) else { return Ok(()) };
        let seen = last.seen.as_deref().unwrap_or_default();
        self.check_entries(seen, u64::MAX).map_err(|message| format!("the database {message}"))?;
        let place = |op: &Op| id(op).and_then(|id| seen.iter().position(|seen| *seen == id));
        for op in self.history.writes(self.key) {
            if self.history.is_kept(op) && place(op).is_none() {
                return Err(format!("an acknowledged update is lost: {op}"));
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

/// Returns true if the second update surely had the result of the first as its base.
fn is_ordered(first: &Op, second: &Op) -> bool {
    let (Some(one), Some(two)) = (first.write(), second.write()) else { return false };
    let is_made = |outcome| matches!(outcome, Outcome::Stored | Outcome::Queued);
    first.end.is_some_and(|end| end.tick < second.begin.tick)
        && is_made(one.outcome)
        && is_made(two.outcome)
        && (first.handle == second.handle || (one.outcome, two.outcome) == (Outcome::Stored, Outcome::Stored))
}
