//! Judges dead letters (I10): each was a queued write, and another handle wrote the same conversation.
//!
//! The writes before a change of the outage file count as those of another handle. The file may not know them.

use super::Verdict;
use crate::history::{DeadWrite, History, Op, Outcome, WriteKind};
use crate::plan::HANDLES;

pub fn check(history: &History, key: usize) -> Verdict {
    for dead in history.dead_letters.iter().filter(|dead| dead.key == key) {
        let is_register = key < history.rules.registers;
        let is_whole = key >= history.rules.logs && has_no_condition(history, dead);
        let is_justified = match dead.is_add {
            true => check_append(history, dead)?,
            false if is_register || is_whole => check_register(history, dead)?,
            false => is_overtaken_log(history, dead),
        };
        if !is_justified {
            return Err(format!("dead letter without a competing write: {dead:?}"));
        }
    }
    Ok(())
}

fn others<'a>(history: &'a History, dead: &'a DeadWrite) -> impl Iterator<Item = &'a Op> {
    shown(history, dead).filter(|op| history.is_foreign(dead.handle, op))
}

fn shown<'a>(history: &'a History, dead: &'a DeadWrite) -> impl Iterator<Item = &'a Op> {
    history.writes(dead.key).filter(|op| op.write().is_some_and(|write| write.outcome.may_show()))
}

/// Returns true if the dead letter is that of a put or remove.
fn has_no_condition(history: &History, dead: &DeadWrite) -> bool {
    let last = dead.ids.last().and_then(|last| history.shown(dead.key, *last));
    last.and_then(Op::write).is_none_or(|write| write.kind == WriteKind::Put)
}

/// An append loses only to a newer write without a condition, also one of an earlier life with a wrong clock.
fn check_append(history: &History, dead: &DeadWrite) -> Result<bool, String> {
    let is_lost = |op: &&Op| history.is_queued(op) && is_dead_letter(history, op, dead);
    let lost: Vec<&Op> = history.writes(dead.key).filter(is_lost).collect();
    if lost.is_empty() {
        return Err(format!("dead letter without a queued write: {dead:?}"));
    }
    let is_other = |op: &Op, lost: &Op| history.is_foreign(dead.handle, op) || op.life != lost.life;
    let has_lost = |lost: &&Op| {
        let mut newer = shown(history, dead).filter(|op| is_newer_base(history, op, lost));
        newer.any(|op| is_other(op, lost))
    };
    Ok(lost.iter().any(has_lost))
}

/// Returns true if the append may have lost to this write of the base version.
pub fn is_newer_base(history: &History, op: &Op, append: &Op) -> bool {
    let is_base = op.write().is_some_and(|write| matches!(write.kind, WriteKind::Put | WriteKind::Remove));
    (is_base || op.handle == HANDLES) && !history.rules.is_before(op, append)
}

/// Returns true if the store has an update of another handle that the dead letter lacks.
fn is_overtaken_log(history: &History, dead: &DeadWrite) -> bool {
    others(history, dead).any(|op| op.write().is_some_and(|write| !dead.ids.contains(&write.id)))
}

fn check_register(history: &History, dead: &DeadWrite) -> Result<bool, String> {
    let candidates: Vec<&Op> =
        history.writes(dead.key).filter(|op| is_dead_letter(history, op, dead)).collect();
    let is_queued = |op: &&Op| {
        op.write().is_some_and(|write| matches!(write.outcome, Outcome::Queued | Outcome::Unknown))
    };
    if !candidates.iter().any(is_queued) {
        return Err(format!("dead letter without a queued write: {dead:?}"));
    }
    // A life with a wrong clock and no clock sync counts as another handle for the lives before it.
    let lost_to_earlier_life =
        |lost: &Op| shown(history, dead).any(|op| op.life < lost.life && !history.rules.is_before(op, lost));
    // A concurrent update of the same handle did not see this write.
    let is_own_update = |op: &&Op| {
        op.handle == dead.handle
            && op.write().is_some_and(|write| !matches!(write.kind, WriteKind::Put | WriteKind::Remove))
    };
    let is_concurrent = |lost: &Op| {
        let mut updates = shown(history, dead).filter(is_own_update).filter(|op| !std::ptr::eq(*op, lost));
        updates.any(|op| !history.rules.is_before(op, lost) && !history.rules.is_before(lost, op))
    };
    let lost_to_other = |lost: &Op| {
        others(history, dead).any(|op| !std::ptr::eq(op, lost) && may_have_won(history, op, lost))
    };
    Ok(candidates.iter().any(|lost| lost_to_other(lost) || lost_to_earlier_life(lost) || is_concurrent(lost)))
}

fn is_dead_letter(history: &History, op: &Op, dead: &DeadWrite) -> bool {
    history.may_queue(dead.handle, op)
        && op.write().is_some_and(|write| match dead.ids.as_slice() {
            [] => matches!(write.kind, WriteKind::Remove),
            ids => (write.kind == WriteKind::Add) == dead.is_add && ids.contains(&write.id),
        })
}

/// A put or remove loses to a newer write. An update also loses to a write that it did not see.
fn may_have_won(history: &History, other: &Op, lost: &Op) -> bool {
    let is_update = lost.write().is_some_and(|write| write.kind == WriteKind::Replace);
    is_update || !history.rules.is_before(other, lost)
}
