//! The rules for the queued writes of one conversation (C2 to C5, C7, C9). Pure functions: no I/O, no clock, no lock.
//!
//! `rows` are the queued writes of the conversation, in the order of their versions. `stored` is the newest version that the
//! store told, as the copy in the outage file has it. `tests/simulator` runs random schedules over these functions and `decide`.

use std::time::Duration;

use super::Tail;
use crate::model::version::{MAX_WRITE_AGE, Timestamp, Version};
use crate::model::writer::WriterId;
use crate::store::{Applied, Condition, WriteHead, WriteKind};

/// The time that an imported write may wait in the queue before the database rejects it as too old. See [`MAX_WRITE_AGE`].
const AGE_MARGIN: Duration = Duration::from_secs(86_400);

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

    pub(crate) fn is_append(&self) -> bool {
        self.write.kind == WriteKind::Append
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
    /// The store has the items of the append. A copy of the version before follows, and an older one goes.
    Appended,
    /// The store will never accept the write. The row becomes a dead letter, synced before the next row of the key is sent.
    DeadLetter,
    /// The store accepts the write later. The row stays, with its version.
    Stays,
    /// The row stays, with this base, and is sent again.
    Rebased(Version),
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

/// The place where the value of a conversation begins. The queued appends after it follow in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FoldStart {
    /// The copy. All queued appends follow.
    Copy,
    /// The queued put, remove or update at this place.
    Row(usize),
}

/// Returns the place where the value of a conversation with queued appends begins, or `None` if nobody knows the value (C9).
///
/// `has_value` tells whether the copy has a live value. A copy that is as new as a queued append may have its items already, and no
/// reader may see them twice. A put, remove or update that is older than the copy has no part in the value.
pub(crate) fn fold_start(rows: &[QueuedHead], stored: Version, has_value: bool) -> Option<FoldStart> {
    let is_above = |row: &QueuedHead| row.is_provisional || row.write.version > stored;
    if let Some(place) = rows.iter().rposition(|row| !row.is_append() && is_above(row)) {
        return Some(FoldStart::Row(place));
    }
    let may_be_doubled = rows.iter().any(|row| row.is_append() && !is_above(row));
    (has_value && !may_be_doubled).then_some(FoldStart::Copy)
}

/// Whether an update has to wait until replay has sent queued writes of an earlier daemon part (C9).
///
/// Nobody knows the version of the row after an append of that part. And an append of this part over another daemon's row would
/// lend it its own run.
pub(crate) fn must_update_wait(rows: &[QueuedHead], writer: WriterId) -> bool {
    rows.iter().any(QueuedHead::is_append)
        && rows.iter().any(|row| row.write.writer.daemon() != writer.daemon())
}

/// Returns the newest of the rows except the one with this version.
pub(super) fn tail_without(rows: &[QueuedHead], version: Version) -> Option<Tail> {
    let left = || rows.iter().filter(|row| row.write.version != version);
    let has_appends = left().any(QueuedHead::is_append);
    left().next_back().map(|row| Tail { version: row.write.version, has_appends })
}

/// Returns the row to send (C5). Replay sends no other row of the conversation before the verdict is in the file.
pub(crate) fn next_to_send(rows: &[QueuedHead]) -> Option<&QueuedHead> {
    rows.first().filter(|row| !row.is_provisional)
}

/// Decides about a row after a verdict, also one of a late live attempt.
///
/// A conversation of a local file that was last written long ago is queued as an update of its own version. It replaces
/// anything older, as a put does. So it gets the older version of the store as its base. A second answer to the first request
/// names that base again.
pub(crate) fn settle(row: &WriteHead, applied: Applied, now: Timestamp) -> Settlement {
    match (applied, row.condition) {
        (Applied::Appended { .. } | Applied::AppendedBefore(_), _) => Settlement::Appended,
        // A copy of this very version came by a load.
        (Applied::Stored, _) if row.kind == WriteKind::Append => Settlement::Appended,
        (Applied::Stored, _) => Settlement::Stored,
        // The store has this very write, from another writer id.
        (Applied::Superseded(held) | Applied::Conflict(held), _) if held == row.version => Settlement::Stored,
        (Applied::VersionInFuture, _) => Settlement::Stays,
        (Applied::Conflict(held), Condition::IfVersion(base)) if held <= base && is_too_old(base, now) => {
            Settlement::Rebased(held)
        }
        _ => Settlement::DeadLetter,
    }
}

/// Whether a version is so old that the database rejects it, or soon will.
pub(crate) fn is_too_old(version: Version, now: Timestamp) -> bool {
    version < Version::min_at(now.minus(MAX_WRITE_AGE - AGE_MARGIN))
}

/// Returns the rows after the correction of the clock by `millis` (C7).
///
/// A provisional version moves with the clock, but not beyond `now`, which rows of an earlier period with another clock need. It
/// stays above the row before it and above `floor`, the newest of the copy and the final versions of this era. It keeps its random low bits, so two
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
