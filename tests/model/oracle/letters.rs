//! Dead letters: only what was queued gets there, and only where the other handle wrote, too.

use super::Verdict;
use crate::history::{Dead, History, Op, Outcome, What};

pub fn check(history: &History, key: usize) -> Verdict {
    for dead in history.dead.iter().filter(|dead| dead.key == key) {
        let is_log = key >= history.rules.registers;
        let assert_right =
            if is_log { is_overtaken_log(history, dead) } else { check_register(history, dead)? };
        if !assert_right {
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

/// The source of truth has moved on by an update that this document lacks.
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
    // A life that began with a wrong clock and without a contact is to the ones before it as another handle.
    let earlier = |letter: &Op| {
        shown(history, dead).any(|op| op.life < letter.life && !history.rules.is_before(op, letter))
    };
    // An update of the same handle that was made at once did not know of it.
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

/// A put or remove loses to what is newer. An update also to what it did not know of.
fn may_have_won(history: &History, other: &Op, letter: &Op) -> bool {
    let is_update = letter.write().is_some_and(|write| write.what == What::Replace);
    is_update || !history.rules.is_before(other, letter)
}
