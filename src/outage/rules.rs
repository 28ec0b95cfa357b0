//! The rules for the queued writes of one conversation (C2 to C5, C7). Pure functions: no I/O, no clock, no lock.
//!
//! `rows` are the queued writes of the conversation, in the order of their versions. `stored` is the newest version that the
//! store told, as the copy in the outage file has it. `tests/simulator` runs random schedules over these functions and `decide`.

use crate::model::version::{Timestamp, Version};
use crate::model::writer::WriterId;
use crate::store::{Applied, Condition, WriteHead, WriteKind};

/// The part of a queued write that decides about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueuedHead {
    pub(crate) write: WriteHead,
    /// Whether the version comes from an unsynced period. Such a version is compared with other queued versions only.
    pub(crate) is_provisional: bool,
}

impl QueuedHead {
    /// The order of the writes of a conversation. A provisional write is newer than one with a final version, whatever the numbers
    /// say, because its process has seen no answer since.
    fn order(&self) -> (bool, Version) {
        (self.is_provisional, self.write.version)
    }
}

/// The outcome of a write at the queue. Enqueue, requeue and import use the same outcomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Placement {
    /// The write becomes a row. The rows with these versions leave the queue in the same transaction.
    Insert { replaced: Vec<Version> },
    /// A row makes this write unnecessary: the same write, or a newer put or remove. The caller gets `Queued`.
    Covered,
    /// The store holds this newer version. The put or remove has no effect any more.
    Superseded(Version),
}

/// The outcome of a row after a verdict of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settlement {
    /// The store accepted the write. The row becomes a copy.
    Stored,
    /// The store will never accept the write. The row becomes a dead letter, synced before the next row of the key is sent.
    DeadLetter,
    /// The store accepts the write later. The row stays, with its version.
    Stays,
}

/// Decides about a write that comes to the queue (C2, C4).
///
/// A write below a queued put or remove could only be overwritten by that one. A put or remove replaces all rows below its
/// version. An update replaces the update before it, because both have one base and the later value contains the earlier one.
/// It does not matter if the store got the replaced row: then the later update lands over an own run.
pub(crate) fn place(rows: &[QueuedHead], new: &QueuedHead, stored: Version) -> Placement {
    let write = &new.write;
    let covers = |row: &QueuedHead| row.write == *write || row.write.is_plain() && row.order() >= new.order();
    if rows.iter().any(covers) {
        return Placement::Covered;
    }
    if write.is_plain() && !new.is_provisional && write.version < stored {
        return Placement::Superseded(stored);
    }
    let is_tail = |row: &QueuedHead| rows.last().is_some_and(|tail| tail == row);
    let replaces = |row: &&QueuedHead| {
        row.order() < new.order() && (write.is_plain() || is_tail(row) && continues(write, &row.write))
    };
    let replaced = rows.iter().filter(replaces).map(|row| row.write.version).collect();
    Placement::Insert { replaced }
}

/// Whether both are updates of one daemon over one base.
fn continues(write: &WriteHead, row: &WriteHead) -> bool {
    let is_update = |head: &WriteHead| head.condition != Condition::Any && head.kind != WriteKind::Append;
    is_update(row)
        && is_update(write)
        && row.condition == write.condition
        && row.writer.daemon() == write.writer.daemon()
}

/// Returns the base of an update whose value comes from the newest of the rows and the copy (C3).
///
/// A base is a version that the store told, or that a queued put or remove will have. The version of an own queued update is
/// none: if that update conflicts, a comparison of numbers would take the row of another daemon for an own run. An update of
/// an earlier daemon part (before a power cut) is the exception, because no own run leads over it. Its version must match exactly.
pub(crate) fn base_for_update(rows: &[QueuedHead], stored: Version, writer: WriterId) -> Version {
    rows.iter().fold(stored, |base, row| match row.write.condition {
        _ if row.write.kind == WriteKind::Append => base,
        // The store has moved on without this row, and the value is the copy's.
        _ if !row.is_provisional && row.write.version < stored => base,
        Condition::IfVersion(inherited) if row.write.writer.daemon() == writer.daemon() => inherited,
        _ => row.write.version,
    })
}

/// Returns the row to send (C5). Replay sends no other row of the conversation before the verdict is in the file.
pub(crate) fn next_to_send(rows: &[QueuedHead]) -> Option<&QueuedHead> {
    rows.first().filter(|row| !row.is_provisional)
}

/// Decides about the row with this version after a verdict, also one of a late live attempt.
///
/// Returns `None` if the row has left the queue. The answer then has no meaning for the queue.
pub(crate) fn settle(rows: &[QueuedHead], version: Version, applied: &Applied) -> Option<Settlement> {
    rows.iter().find(|row| row.write.version == version)?;
    Some(match applied {
        Applied::Stored => Settlement::Stored,
        Applied::VersionInFuture => Settlement::Stays,
        _ => Settlement::DeadLetter,
    })
}

/// Returns the rows after the correction of the clock by `millis` (C7).
///
/// A provisional version moves with the clock, but not beyond `now`, which rows of an earlier period with another clock need. It
/// stays above the row before it and above `floor`, the newest of the copy and the mark. It keeps its random low bits, so two
/// daemons that correct over one copy do not meet. A base that is the version of a provisional row follows that row.
pub(crate) fn corrected(rows: &[QueuedHead], millis: i64, floor: Version, now: Timestamp) -> Vec<WriteHead> {
    let mut done: Vec<WriteHead> = Vec::with_capacity(rows.len());
    for row in rows {
        let mut write = row.write;
        if row.is_provisional {
            let moved_to = |at: i64| row.write.version.shifted(at - row.write.version.at().0);
            let before = done.last().map_or(floor, |row| row.version.max(floor));
            let moved = moved_to(now.0.min(row.write.version.at().0 + millis));
            write.version = if moved > before { moved } else { moved_to(before.at().0 + 1) };
            let is_base = |other: &QueuedHead| {
                other.is_provisional && Condition::IfVersion(other.write.version) == write.condition
            };
            if let Some(at) = rows.iter().position(is_base) {
                write.condition = Condition::IfVersion(done[at].version);
            }
        }
        done.push(write);
    }
    done
}
