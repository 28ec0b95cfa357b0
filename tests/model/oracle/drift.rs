//! The effect of jumps on the versions of writes that were queued in an unsynced period.
//!
//! One answer of the store corrects all provisional versions by one span. A forward jump counts as time that passed (DESIGN.md,
//! Clocks). The jumps of the model are none: an operator sets the clock, and no time passes. So the versions from before the jump become
//! too early. After a boot, the system's clock alone tells how much time has passed. So after a backward jump they may become too late.

use crate::history::{Drift, FileChange, Jump, Op, Outcome};

/// Moments of jumps and of operations are cut off to milliseconds.
const ROUNDING_MS: i64 = 2;

/// Notes the drift of each write that may have had a provisional version.
pub fn note_drift(ops: &mut [Op], jumps: &[Jump], changes: &[FileChange]) {
    let drifts: Vec<Drift> = ops.iter().map(|op| drift(op, ops, jumps, changes)).collect();
    for (op, drift) in ops.iter_mut().zip(drifts) {
        op.drift = drift;
    }
}

fn drift(op: &Op, ops: &[Op], jumps: &[Jump], changes: &[FileChange]) -> Drift {
    let is_queued =
        op.write().is_some_and(|write| matches!(write.outcome, Outcome::Queued | Outcome::Unknown));
    if !is_queued || has_final_version(op, ops, jumps) {
        return Drift::default();
    }
    let until = synced_ms(op, ops, changes);
    let is_meanwhile = |at_ms: i64| op.begin.ms - ROUNDING_MS <= at_ms && at_ms <= until;
    let meanwhile = || jumps.iter().filter(|jump| is_meanwhile(jump.at_ms)).map(|jump| jump.by_ms);
    let was_moved = changes.iter().any(|change| is_meanwhile(change.at.ms));
    Drift {
        is_possible: true,
        early_ms: meanwhile().map(|by_ms| by_ms.max(0)).sum(),
        late_ms: if was_moved { meanwhile().map(|by_ms| (-by_ms).max(0)).sum() } else { 0 },
    }
}

/// Returns true if a stored write shows that the clock was synced, and no jump came between that write and this one.
fn has_final_version(op: &Op, ops: &[Op], jumps: &[Jump]) -> bool {
    let is_before_end = |jump: &&Jump| op.end.is_none_or(|end| jump.at_ms <= end.ms + ROUNDING_MS);
    let last_jump = jumps.iter().filter(is_before_end).map(|jump| jump.at_ms).max();
    ops.iter().any(|other| {
        is_stored(other)
            && (other.handle, other.life) == (op.handle, op.life)
            && other.end.is_some_and(|end| end.tick < op.begin.tick)
            && last_jump.is_none_or(|at_ms| at_ms + ROUNDING_MS < other.begin.ms)
    })
}

/// Returns the time until which the version of a queued write may be provisional. A stored write of the handle shows the end.
fn synced_ms(op: &Op, ops: &[Op], changes: &[FileChange]) -> i64 {
    let Some(end) = op.end else { return i64::MAX };
    let is_later = |other: &&Op| is_stored(other) && other.handle == op.handle && other.begin.tick > end.tick;
    let until = ops.iter().filter(is_later).filter_map(|other| other.end).map(|end| end.ms).min();
    let until = until.unwrap_or(i64::MAX);
    // A copy of the file from before the end has the provisional version again.
    let comes_back = |change: &FileChange| {
        change.source.is_some_and(|(handle, at)| {
            handle == op.handle && at.tick > op.begin.tick && at.ms <= until && change.at.ms > until
        })
    };
    if changes.iter().any(comes_back) { i64::MAX } else { until }
}

fn is_stored(op: &Op) -> bool {
    op.write().is_some_and(|write| write.outcome == Outcome::Stored)
}
