//! The order of writes, and the writes that count.

use crate::history::{DeadWrite, History, Op, Outcome, Rules, WriteKind};

/// The source of a reading: a write, or no write at all.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    Never,
    Write(&'a Op),
}

/// The largest error of a resumed clock that clock sync does not correct.
///
/// A clock that resumes from its checkpoint may be off by this much before its first clock sync. Its versions keep the
/// error. Clock sync corrects versions with a larger error.
const MAX_RESUMED_ERROR_MS: i64 = 100;

/// Returns the clock error that the version of a write keeps.
fn kept_error_ms(op: &Op) -> i64 {
    let off = op.off_ms.abs();
    if off < MAX_RESUMED_ERROR_MS { off } else { 0 }
}

/// The largest lead of the mark in an outage file over the last version issued.
const MAX_MARK_MS: i64 = 1_000;

impl Rules {
    /// Returns true if `a` is surely older than `b`.
    pub fn is_before(&self, a: &Op, b: &Op) -> bool {
        let Some(end) = a.end else { return false };
        match (a.handle, a.life) == (b.handle, b.life) {
            true => end.tick < b.begin.tick,
            false => {
                let slack = self.order_ms + kept_error_ms(a) + kept_error_ms(b);
                let (last, first) = (end.ms + a.drift.late_ms, b.begin.ms - b.drift.early_ms);
                self.latest_version_ms(last) + slack < first && end.tick < b.begin.tick
            }
        }
    }

    /// Returns the time of the newest version that any handle may have issued until now.
    fn latest_version_ms(&self, now_ms: i64) -> i64 {
        let earlier = self.mark_starts_ms.iter().filter(|at| **at <= now_ms);
        earlier.map(|at| at + MAX_MARK_MS).max().map_or(now_ms, |mark| mark.max(now_ms))
    }

    pub fn is_older(&self, source: Source<'_>, than: Source<'_>) -> bool {
        match (source, than) {
            (_, Source::Never) => false,
            (Source::Never, Source::Write(_)) => true,
            (Source::Write(a), Source::Write(b)) => self.is_before(a, b),
        }
    }
}

impl History {
    /// Returns the writes to a key.
    pub fn writes(&self, key: usize) -> impl Iterator<Item = &Op> {
        self.ops.iter().filter(move |op| op.key == key && op.write().is_some())
    }

    /// Returns the write with this id if readers may see it.
    pub fn shown(&self, key: usize, id: u64) -> Option<&Op> {
        self.writes(key).find(|op| {
            op.write().is_some_and(|w| w.id == id && w.kind != WriteKind::Remove && w.outcome.may_show())
        })
    }

    /// Returns true if the write became a dead letter or part of one. A queued update contains the queued updates before
    /// it.
    pub fn is_discarded(&self, op: &Op) -> bool {
        let is_update = |op: &Op| op.write().is_some_and(|write| write.kind == WriteKind::Replace);
        let contains_it = |later: &Op| {
            later.handle == op.handle
                && is_update(later)
                && self.is_dead_letter(later)
                && later.end.is_none_or(|end| end.tick > op.begin.tick)
        };
        self.is_dead_letter(op) || self.is_queued(op) && is_update(op) && self.writes(op.key).any(contains_it)
    }

    /// Returns true if the write is a dead letter. The removes of one handle cannot be told apart.
    fn is_dead_letter(&self, op: &Op) -> bool {
        let has_ids = |ids: &[u64]| {
            op.write().is_some_and(|write| match write.kind {
                WriteKind::Remove => ids.is_empty(),
                _ => ids.contains(&write.id),
            })
        };
        // The dead letter of an update has the items of queued appends, too. They are sent nevertheless.
        let is_add = op.write().is_some_and(|write| write.kind == WriteKind::Add);
        let matches_op = |dead: &DeadWrite| {
            (dead.key, dead.is_add) == (op.key, is_add)
                && self.may_queue(dead.handle, op)
                && has_ids(&dead.ids)
        };
        self.is_queued(op) && self.dead_letters.iter().any(matches_op)
    }

    pub fn is_queued(&self, op: &Op) -> bool {
        op.write().is_some_and(|write| matches!(write.outcome, Outcome::Queued | Outcome::Unknown))
    }

    /// Returns true if the final store must hold this write or a newer one.
    pub fn is_kept(&self, op: &Op) -> bool {
        op.write().is_some_and(|write| match write.outcome {
            Outcome::Superseded => write.kind != WriteKind::Add,
            Outcome::Stored => true,
            Outcome::Queued => !self.is_discarded(op) && !self.is_lost_with_file(op),
            Outcome::Failed(_) | Outcome::Unknown => false,
        })
    }
}
