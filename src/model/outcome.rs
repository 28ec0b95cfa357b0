//! Outcomes of reads and writes: the freshness of a value, and the place that keeps a write.

use std::time::Duration;

use crate::model::moment::Moment;
use crate::model::version::Version;

/// The freshness of a value that a read returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Freshness {
    /// The store validated the value within the time set by `fresh_for`.
    Fresh,
    /// The value is a write of this daemon in the queue. No newer version is known.
    Queued,
    /// The store is unreachable or slow, and validated the value `age` ago.
    Stale {
        /// The time since the store last validated the value.
        age: Duration,
    },
}

impl Freshness {
    pub(crate) fn stale(validated_at: Moment, now: Moment) -> Self {
        Self::Stale { age: now.since(validated_at) }
    }
}

/// The durability of an acknowledged write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum WriteOutcome {
    /// The store committed the write.
    Stored,
    /// The store already holds a newer version, and keeps that version.
    Superseded,
    /// The write is synced to the local disk (I4). The queue keeps it until the store holds it or a newer version. Also the
    /// answer without an outage, while the conversation has queued writes.
    Queued,
    /// The write is only in the memory of this process. The backend `memory` answers so.
    Volatile,
    /// The conversation is absent, and the append was only for a present one. Nothing has changed.
    Absent,
}

/// The result of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Appended {
    /// The durability.
    pub outcome: WriteOutcome,
    /// The version of the conversation after the append. `None` if only the queue has the append, if the first answer was lost, or
    /// if the conversation is absent.
    pub version: Option<Version>,
    /// The number of items in the array after the append. `None` as for the version.
    pub length: Option<u64>,
}

impl From<WriteOutcome> for Appended {
    fn from(outcome: WriteOutcome) -> Self {
        Self { outcome, version: None, length: None }
    }
}

/// The result of one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// The store accepted this write, now or in an earlier attempt. Or it accepted a later write of the same daemon instead.
    Stored,
    /// The store holds a newer record, of this version.
    Superseded(Version),
    /// The condition does not hold: the store has this version.
    Conflict(Version),
    /// The store appended the items now. Memory needs no load if it holds the version before.
    Appended {
        /// The version of the conversation now.
        version: Version,
        /// The version of the conversation before.
        over: Version,
        /// The number of items in the array now.
        length: u64,
    },
    /// The store applied the append in an earlier attempt. The conversation has this version now.
    AppendedBefore(Version),
    /// The append was only for a present conversation, and the conversation is absent.
    Absent,
    /// The target of the append is not an array, or its path leads through something that is not an object.
    NotAnArray,
    /// The conversation would be too large after the append.
    TooLarge,
    /// The version is ahead of the store's clock. The response has corrected the caller's clock.
    VersionInFuture,
    /// The version is more than 7 days old.
    TooOld,
}
