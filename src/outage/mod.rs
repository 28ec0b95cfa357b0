//! The outage file: the local SQLite file that keeps writes and last known copies while the store is away.
//!
//! The file has three parts. The queue holds writes that the store does not have yet. The replica holds last known copies of
//! the store's records. The dead letters are queued writes that the store will not hold. Replay transfers the queue to the
//! store.

pub(crate) mod admin;
mod clock_checkpoint;
mod clock_sync;
mod dead_letters;
mod enqueue;
pub(crate) mod file;
mod fold;
mod identity;
mod import;
pub(crate) mod inspect;
mod offline;
mod queue;
pub(crate) mod replay;
mod replica;
mod rows;
pub(crate) mod rules;
mod settle;
mod state;
#[cfg(test)]
mod tests;

use std::ops::AddAssign;
use std::sync::Arc;

use rusqlite::Connection;

use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};
use crate::model::writer::WriterId;
use crate::store::{Append, Condition, Write};
use rules::QueuedHead;

/// A write in the queue: of a cache, of replay, and of the tools.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QueuedWrite {
    /// The position in the queue.
    pub seq: i64,
    /// The write, with its version, writer and condition.
    pub write: Write,
    /// The time of queueing.
    pub queued_at: Timestamp,
    /// Whether version and times come from a clock that was unsynced. Clock sync gives them their final values.
    pub is_provisional: bool,
}

impl QueuedWrite {
    /// Creates a put or a remove without a condition and with a final version, for an import. See [`ImportItem`] for an example.
    pub fn new(record: Record, queued_at: Timestamp) -> Self {
        // A writer of its own: the versions of another writer need not rise.
        let write = Write::new(record).with_writer(WriterId::random());
        Self { seq: 0, write, queued_at, is_provisional: false }
    }

    pub(crate) fn key(&self) -> &Key {
        &self.write.record.key
    }

    pub(crate) fn version(&self) -> Version {
        self.write.record.version
    }

    pub(crate) fn head(&self) -> QueuedHead {
        QueuedHead { write: self.write.head(), is_provisional: self.is_provisional }
    }
}

/// The outcome of a write that came to the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Enqueued {
    /// The write is synced to disk.
    Queued {
        /// The version as it was issued.
        version: Version,
        /// Whether appends are queued. Only [`Folded`] tells the value then.
        has_appends: bool,
    },
    /// A queued write makes this one unnecessary. It is synced to disk.
    Covered,
    /// The store holds this version: the write itself, or a newer one.
    Superseded(Version),
    /// The update was made of a value that is outdated by now, and was not sent. It runs again.
    Conflict {
        /// The newer version of the store, if one is the reason.
        newer: Option<Version>,
    },
}

/// The end of a queued write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The store holds the write, or a newer write of this daemon that replaces it.
    Stored,
    /// The store holds the items of the append. The conversation has this version, or a newer one.
    Appended(Version),
    /// The store will never hold the write.
    Dead {
        reason: String,
        /// The version that superseded the write, if one did.
        newer: Option<Version>,
    },
}

/// The newest queued write of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tail {
    pub(crate) version: Version,
    /// Whether appends are queued. Only [`Folded`] tells the value then.
    pub(crate) has_appends: bool,
}

/// The value of a conversation with queued writes.
#[derive(Debug)]
pub(crate) enum Folded {
    /// No write is queued.
    Nothing,
    /// The value, at the version of the newest queued write. A record without a value is an absence.
    Known {
        record: Arc<Record>,
        /// The base of an update that goes on from this value. `None` if the update has to wait for replay.
        base: Option<Version>,
    },
    /// Appends are queued, and nobody knows the value before the queued appends.
    Unknown {
        /// The version of the newest queued write.
        newest: Version,
    },
}

/// The part of the cache that learns of changes in the queue: after the commit, and before any caller learns of it.
pub(crate) trait QueueObserver: std::fmt::Debug + Send + Sync {
    /// The queued write has found its end. `left` is the newest write of the conversation that is still queued.
    fn settled(&self, key: &Key, version: Version, verdict: &Verdict, left: Option<Tail>);
    /// Clock sync has given queued writes their final versions and times.
    fn corrected(&self, changed: &[Corrected]);
}

/// The final version and expiry of a queued write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Corrected {
    pub(crate) key: Key,
    /// The version as it was issued.
    pub(crate) from: Version,
    pub(crate) version: Version,
    pub(crate) expires_at: Timestamp,
}

/// The newest queued write of a conversation when the file is opened.
#[derive(Debug)]
pub(crate) struct QueuedKey {
    pub(crate) key: Key,
    pub(crate) version: Version,
    pub(crate) trust: QueueTrust,
}

/// The use of a queued write for reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QueueTrust {
    /// No newer version is known.
    Newest,
    /// The store holds a newer version.
    Superseded,
    /// It is an append, or an update behind appends. Only [`Folded`] tells whether its value is known.
    Append,
    /// The store may hold a newer version that the file does not know. Reads skip the write until the store has been asked
    /// (I16).
    Unverified,
}

/// The queue in figures. They change after the observer has been told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct QueueFigures {
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    /// The time of queueing of the first row.
    pub(crate) oldest: Option<Timestamp>,
    /// The number of rows that failed alone again and again.
    pub(crate) parked: u64,
}

/// A copy for the replica.
#[derive(Debug, Clone)]
pub(crate) struct ReplicaRecord {
    pub(crate) record: Arc<Record>,
    /// The time at which the store confirmed the record.
    pub(crate) confirmed_at: Timestamp,
    pub(crate) rank: CopyRank,
}

/// The order of eviction from the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CopyRank {
    /// A caller wrote or read this conversation. Evicted after the listed ones, oldest first.
    Used,
    /// A listing or the warm-up brought it. Evicted first, unless a caller has used the conversation before.
    Listed,
    /// A listing or the warm-up brought it, and a caller has read it in memory since.
    Read,
}

/// The limits of the outage file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileLimits {
    /// Bytes of queued writes and dead letters.
    pub(crate) queue: u64,
    /// Bytes of copies.
    pub(crate) replica: u64,
}

/// The number of records of a kind, and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// The number of records.
    pub records: u64,
    /// The bytes that the records count against the limit.
    pub bytes: u64,
}

impl Usage {
    /// Counts the rows of a table, and sums up `bytes` of each.
    fn of(connection: &Connection, from: &str, bytes: &str) -> rusqlite::Result<Self> {
        let sql = format!("select count(*), coalesce(sum({bytes}), 0) from {from}");
        connection.query_row(&sql, [], |row| {
            let (records, bytes): (i64, i64) = (row.get(0)?, row.get(1)?);
            Ok(Self { records: records.unsigned_abs(), bytes: bytes.unsigned_abs() })
        })
    }

    pub(crate) fn add(&mut self, bytes: u64) {
        self.records += 1;
        self.bytes += bytes;
    }

    pub(crate) fn sub(&mut self, bytes: u64) {
        self.records = self.records.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// The contents of the outage file in figures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct FileUsage {
    pub(crate) queue: Usage,
    pub(crate) replica: Usage,
    pub(crate) dead_letters: Usage,
}

/// A write that was acknowledged as [`Queued`](crate::WriteOutcome::Queued), and that the store will not hold. The outage file
/// keeps it until an operator deletes it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The number of the dead letter in the file.
    pub id: i64,
    /// The record to be written. A record without a value is a remove.
    pub record: Record,
    /// The condition: the version that an update changed.
    pub condition: Condition,
    /// The target of an append. The value of the record has the items.
    pub append: Option<Append>,
    /// The time of queueing, by the store's clock.
    pub queued_at: Timestamp,
    /// The time at which the write became a dead letter.
    pub died_at: Timestamp,
    /// The reason: superseded, rejected, or too old.
    pub reason: String,
    /// The version that superseded the write, if one did.
    pub newer: Option<Version>,
}

impl DeadLetter {
    /// Creates a dead letter for an import. See [`ImportItem`](crate::tools::ImportItem) for an example.
    pub fn new(record: Record, queued_at: Timestamp, died_at: Timestamp, reason: impl Into<String>) -> Self {
        let (condition, reason) = (Condition::Any, reason.into());
        Self { id: 0, record, condition, append: None, queued_at, died_at, reason, newer: None }
    }
}

/// The figures of an import.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImportReport {
    /// Writes that are queued now.
    pub queued: usize,
    /// Dead letters that were added.
    pub dead_letters: usize,
    /// Items that the file held already, or had seen stored.
    pub duplicates: usize,
    /// Writes that are older than a write in the file. The newer write stays.
    pub stale: usize,
    /// Rows of a file that are no valid writes.
    pub unreadable: usize,
}

impl AddAssign for ImportReport {
    fn add_assign(&mut self, other: Self) {
        self.queued += other.queued;
        self.dead_letters += other.dead_letters;
        self.duplicates += other.duplicates;
        self.stale += other.stale;
        self.unreadable += other.unreadable;
    }
}

/// An item of an import into an outage file.
///
/// ```
/// use threadkeep::DeadLetter;
/// use threadkeep::store::{Key, Record, Timestamp, Version};
/// use threadkeep::tools::{ImportItem, QueuedWrite};
///
/// # fn main() -> threadkeep::Result<()> {
/// let record = Record::tombstone(Key::new("thread-1")?, Version::from_raw(7));
/// let letter = DeadLetter::new(record.clone(), Timestamp(1), Timestamp(2), "superseded");
/// let items = [ImportItem::DeadLetter(letter), ImportItem::Queued(QueuedWrite::new(record, Timestamp(1)))];
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub enum ImportItem {
    /// A write of another queue.
    Queued(QueuedWrite),
    /// A dead letter of another outage file.
    DeadLetter(DeadLetter),
    /// A conversation of a file of the backend `local`.
    LocalRecord(Record),
}
