//! The effects of an operator's acts on outage files: copies that come back, files that are deleted.
//!
//! A copy takes the place of a file. Then the writes that were queued after the copy are gone by the operator's act. The last
//! known copies of the store's records are as old as the file. Queued writes of the copy are sent again, and a handle may also
//! get the queued writes of another handle. A write that is sent again is not applied again. Nothing else changes.

use super::dead_letters::is_newer_base;
use crate::history::{FileChange, History, Moment, Op, WriteKind};

impl FileChange {
    /// Returns true if the copy may have the operation of its source in the queue.
    fn may_repeat(&self, op: &Op) -> bool {
        self.source.is_some_and(|(source, at)| source == op.handle && op.begin.tick < at.tick)
    }

    /// Returns true if the change may have taken this operation of the handle out of the file.
    fn hides(&self, op: &Op) -> bool {
        let is_in_copy = |(source, at): (usize, Moment)| {
            source == op.handle && op.end.is_some_and(|end| end.tick < at.tick)
        };
        self.handle == op.handle && op.begin.tick < self.at.tick && !self.source.is_some_and(is_in_copy)
    }
}

impl History {
    /// Returns true if an operator may have removed this queued write, or its dead letter, from the outage file.
    pub fn is_lost_with_file(&self, op: &Op) -> bool {
        self.is_queued(op) && self.file_changes.iter().any(|change| change.hides(op))
    }

    /// Returns true if the handle's file still has the effects of `op` when `read` begins.
    pub fn is_remembered(&self, op: &Op, read: &Op) -> bool {
        let mut changes = self.file_changes.iter();
        !changes.any(|change| change.at.tick < read.begin.tick && change.hides(op))
    }

    /// Returns true if the file of this handle may have had the operation in its queue.
    pub fn may_queue(&self, handle: usize, op: &Op) -> bool {
        let has_copy = |change: &FileChange| change.handle == handle && change.may_repeat(op);
        handle == op.handle || self.file_changes.iter().any(has_copy)
    }

    /// Returns true if a copy brought a queued update or append back whose dead letter went away with the replaced file. If the
    /// daemon has appended since, the store takes the write for a repeated one (DESIGN.md, "Which holes remain?"). So it does if
    /// the copy gives the write a lower version than the replaced file has sent.
    pub fn may_be_taken_for_repeated(&self, op: &Op) -> bool {
        let may_be_dead = |kind| {
            kind == WriteKind::Append || self.writes(op.key).any(|other| is_newer_base(self, other, op))
        };
        let is_counted = |kind| matches!(kind, WriteKind::Replace | WriteKind::Append | WriteKind::Add);
        op.write()
            .is_some_and(|write| op.drift.is_possible && is_counted(write.kind) || may_be_dead(write.kind))
            && self.is_queued(op)
            && self.file_changes.iter().any(|change| change.may_repeat(op))
    }

    /// Returns true if the file and its copy may have sent a queued append with different versions (DESIGN.md, "Which holes
    /// remain?").
    pub fn may_be_doubled(&self, op: &Op) -> bool {
        op.write().is_some_and(|write| write.kind == WriteKind::Add)
            && op.drift.is_possible
            && self.file_changes.iter().any(|change| change.may_repeat(op))
    }

    /// Returns true if the file of this handle does not know the operation, so that it counts as the operation of another
    /// handle.
    pub fn is_foreign(&self, handle: usize, op: &Op) -> bool {
        let is_earlier = |change: &FileChange| change.handle == handle && op.begin.tick < change.at.tick;
        op.handle != handle || self.file_changes.iter().any(is_earlier)
    }
}
