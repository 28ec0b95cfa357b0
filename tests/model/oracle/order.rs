//! The order of writes, and the writes that count.

use crate::history::{Dead, History, Op, Outcome, Rules, What};

/// The source of a reading: a write, or no write at all.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    Never,
    Write(&'a Op),
}

/// A clock that goes on from the anchor is off by no more than this before its first answer, and what it stamps stays off.
/// One that is off by more is put right.
const RESUMED_MS: i64 = 100;

fn stays_off_ms(op: &Op) -> i64 {
    let off = op.off_ms.abs();
    if off < RESUMED_MS { off } else { 0 }
}

impl Rules {
    /// Returns true if `a` is surely older than `b`.
    pub fn is_before(&self, a: &Op, b: &Op) -> bool {
        let Some(end) = a.end else { return false };
        match (a.handle, a.life) == (b.handle, b.life) {
            true => end.tick < b.begin.tick,
            false => {
                let slack = self.order_ms + stays_off_ms(a) + stays_off_ms(b);
                end.ms + slack < b.begin.ms && end.tick < b.begin.tick
            }
        }
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
    /// The writes to a key.
    pub fn writes(&self, key: usize) -> impl Iterator<Item = &Op> {
        self.ops.iter().filter(move |op| op.key == key && op.write().is_some())
    }

    /// Returns the write with this id if readers may see it.
    pub fn shown(&self, key: usize, id: u64) -> Option<&Op> {
        self.writes(key).find(|op| {
            op.write().is_some_and(|w| w.id == id && w.what != What::Remove && w.outcome.may_show())
        })
    }

    /// Whether it was queued and became a dead letter, or part of one: an update takes those with it that it went on
    /// from in the queue.
    pub fn is_dead(&self, op: &Op) -> bool {
        let is_update = |op: &Op| op.write().is_some_and(|write| write.what == What::Replace);
        let went_on = |later: &Op| {
            later.handle == op.handle
                && is_update(later)
                && self.is_letter(later)
                && later.end.is_none_or(|end| end.tick > op.begin.tick)
        };
        self.is_letter(op) || self.is_queued(op) && is_update(op) && self.writes(op.key).any(went_on)
    }

    /// Returns true if the write is a dead letter. The removes of one handle cannot be told apart.
    fn is_letter(&self, op: &Op) -> bool {
        let is_meant = |ids: &[u64]| {
            op.write().is_some_and(|write| match write.what {
                What::Remove => ids.is_empty(),
                _ => ids.contains(&write.id),
            })
        };
        let is_it = |dead: &Dead| (dead.handle, dead.key) == (op.handle, op.key) && is_meant(&dead.ids);
        self.is_queued(op) && self.dead.iter().any(is_it)
    }

    fn is_queued(&self, op: &Op) -> bool {
        op.write().is_some_and(|write| matches!(write.outcome, Outcome::Queued | Outcome::Unknown))
    }

    /// Whether the store must in the end hold it or something newer.
    pub fn is_kept(&self, op: &Op) -> bool {
        op.write().is_some_and(|write| match write.outcome {
            Outcome::Stored | Outcome::Superseded => true,
            Outcome::Queued => !self.is_dead(op),
            Outcome::Failed(_) | Outcome::Unknown => false,
        })
    }
}
