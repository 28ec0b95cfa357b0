//! Judges dead letters (I10): each was a queued write, and another handle wrote the same conversation.

use super::Verdict;
use crate::history::{Dead, History, Op, Outcome, What};

pub fn check(history: &History, key: usize) -> Verdict {
    for dead in history.dead.iter().filter(|dead| dead.key == key) {
        let is_log = key >= history.rules.registers;
        let is_justified =
            if is_log { is_overtaken_log(history, dead) } else { check_register(history, dead)? };
        if !is_justified {
            return Err(format!("a dead letter, though nobody else wrote: {dead:?}"));
        }
    }
    Ok(())
}

fn others<'a>(history: &'a History, dead: &'a Dead) -> impl Iterator<Item = &'a Op> {
    shown(history, dead).filter(|op| op.handle != dead.handle)
}

fn shown<'a>(history: &'a History, dead: &'a Dead) -> impl Iterator<Item = &'a Op> {
    history.writes(dead.key).filter(|op| op.write().is_some_and(|write| write.outcome.may_show()))
}

/// Returns true if the store has an update of another handle that the dead letter lacks.
fn is_overtaken_log(history: &History, dead: &Dead) -> bool {
    others(history, dead).any(|op| op.write().is_some_and(|write| !dead.ids.contains(&write.id)))
}

fn check_register(history: &History, dead: &Dead) -> Result<bool, String> {
    let letters: Vec<&Op> = history.writes(dead.key).filter(|op| is_letter(op, dead)).collect();
    let is_queued = |op: &&Op| {
        op.write().is_some_and(|write| matches!(write.outcome, Outcome::Queued | Outcome::Unknown))
    };
    if !letters.iter().any(is_queued) {
        return Err(format!("a dead letter that nobody queued: {dead:?}"));
    }
    // A life with a wrong clock and no clock sync counts as another handle for the lives before it.
    let earlier = |letter: &Op| {
        shown(history, dead).any(|op| op.life < letter.life && !history.rules.is_before(op, letter))
    };
    // A concurrent update of the same handle did not see this write.
    let own =
        |op: &&Op| op.handle == dead.handle && op.write().is_some_and(|write| write.what == What::Replace);
    let at_once = |letter: &Op| {
        let mut updates = shown(history, dead).filter(own).filter(|op| !std::ptr::eq(*op, letter));
        updates.any(|op| !history.rules.is_before(op, letter) && !history.rules.is_before(letter, op))
    };
    let by_others = |letter: &Op| others(history, dead).any(|op| may_have_won(history, op, letter));
    Ok(letters.iter().any(|letter| by_others(letter) || earlier(letter) || at_once(letter)))
}

fn is_letter(op: &Op, dead: &Dead) -> bool {
    op.handle == dead.handle
        && op.write().is_some_and(|write| match dead.ids.as_slice() {
            [] => matches!(write.what, What::Remove),
            ids => ids.contains(&write.id),
        })
}

/// A put or remove loses to a newer write. An update also loses to a write that it did not see.
fn may_have_won(history: &History, other: &Op, letter: &Op) -> bool {
    let is_update = letter.write().is_some_and(|write| write.what == What::Replace);
    is_update || !history.rules.is_before(other, letter)
}
