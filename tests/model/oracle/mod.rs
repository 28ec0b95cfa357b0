//! Judges a history by acknowledged writes and their overlap in time. The oracle knows no versions.
//!
//! Operations are intervals. A write is *before* another if it ended before the other began. Within one life of a handle
//! that is exact. Between handles a margin applies, because clocks issue the versions (DESIGN.md, Clocks). A write ends
//! when its caller gets an answer or an error, because its version was issued earlier. An abandoned write never ends.

mod dead_letters;
mod drift;
mod files;
mod log;
mod order;
mod register;
#[cfg(test)]
mod tests;

pub use drift::note_drift;
use threadkeep::ErrorKind;

use crate::history::{FileChange, History, Jump, Moment, Op, OpKind, Outcome, WriteKind};

/// Returns the first violation: its key, if any, and a message with the operations of that key.
pub fn violation(history: &History) -> Option<(Option<usize>, String)> {
    let keys = history.ops.iter().map(|op| op.key).max().map_or(0, |last| last + 1);
    let of_key = |key| match key < history.rules.registers {
        true => register::check(history, key),
        false => log::check(history, key),
    };
    let verdict = errors(history).map_err(|message| (None, message)).and_then(|()| {
        (0..keys).try_for_each(|key| {
            let verdict = of_key(key).and_then(|()| dead_letters::check(history, key));
            verdict.map_err(|message| (Some(key), format!("{message}\n{}", transcript(history, key))))
        })
    });
    verdict.err()
}

/// Milliseconds are cut off, not rounded.
const ROUNDING_MS: i64 = 3;

type Verdict = Result<(), String>;

/// Checks that the world can justify the kind of each error.
fn errors(history: &History) -> Verdict {
    let is_justified = |op: &Op, kind: ErrorKind| match kind {
        ErrorKind::Unavailable | ErrorKind::Overloaded | ErrorKind::Unauthorized | ErrorKind::Closed => true,
        ErrorKind::Conflict => {
            op.write().is_some_and(|write| matches!(write.kind, WriteKind::Replace | WriteKind::Append))
        }
        kind if kind.as_str() == "queue_full" => history.rules.queue_may_be_full && op.write().is_some(),
        _ => false,
    };
    let kind = |op: &Op| match &op.kind {
        OpKind::Read(Err(kind)) => Some(*kind),
        OpKind::Write(write) => match write.outcome {
            Outcome::Failed(kind) => Some(kind),
            _ => None,
        },
        OpKind::Read(Ok(_)) => None,
    };
    match history.ops.iter().find(|op| kind(op).is_some_and(|kind| !is_justified(op, kind))) {
        Some(op) => Err(format!("unjustified error: {op}")),
        None => Ok(()),
    }
}

/// Formats all operations, notes and dead letters of one key.
fn transcript(history: &History, key: usize) -> String {
    let ops = history.ops.iter().filter(|op| op.key == key).map(|op| (op.begin.tick, format!("  {op}\n")));
    let note =
        |(at, message): &(Moment, String)| (at.tick, format!("  {}/{} *** {message}\n", at.tick, at.ms));
    let mut lines: Vec<(u64, String)> = ops.chain(history.notes.iter().map(note)).collect();
    let dead = history.dead_letters.iter().filter(|dead| dead.key == key).map(|dead| format!("  {dead:?}\n"));
    let last = history.finals.iter().filter(|last| last.key == key).map(|last| format!("  {last:?}\n"));
    let change = |change: &FileChange| (change.at.tick, format!("  {change:?}\n"));
    lines.extend(history.file_changes.iter().map(change));
    // A jump has no tick of its own. It comes after the operations that began before it.
    let jump = |jump: &Jump| {
        let tick =
            history.ops.iter().rev().find(|op| op.begin.ms <= jump.at_ms).map_or(0, |op| op.begin.tick);
        (tick, format!("  {jump:?}\n"))
    };
    lines.extend(history.jumps.iter().map(jump));
    lines.sort();
    let lines: String = lines.into_iter().map(|(_, line)| line).chain(dead).chain(last).collect();
    format!("  {:?}\n{lines}", history.rules)
}
