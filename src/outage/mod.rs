//! The outage file: the local SQLite file that keeps writes and last known copies while the store is away.
//!
//! The file has three parts. The queue holds writes that the store does not have yet. The replica holds last known copies of
//! the store's records. The dead letters are queued writes that the store will not hold. Replay transfers the queue to the
//! store.

pub(crate) mod admin;
mod clock_checkpoint;
mod clock_correction;
mod complete;
mod dead_letters;
mod enqueue;
pub(crate) mod file;
mod import;
pub(crate) mod index;
pub(crate) mod inspect;
mod offline;
mod queue;
pub(crate) mod replay;
mod replica;
mod row;
mod writer_state;

use std::sync::Arc;

use crate::model::clock::UnsyncedPeriod;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};

/// A write to be queued.
#[derive(Debug, Clone)]
pub(crate) struct NewQueuedWrite {
    pub(crate) record: Arc<Record>,
    /// The version that an update changes. `None` for a put or a remove without a condition.
    pub(crate) base: Option<Version>,
    /// Whether the write was sent before, so that the store may hold it already.
    pub(crate) is_dispatched: bool,
    /// The time that the clock showed when it issued the version.
    pub(crate) issued_at: Timestamp,
    /// The unsynced period in which the version was issued. `None` if the version is final.
    pub(crate) unsynced: Option<UnsyncedPeriod>,
}

/// The decision about a write to be queued.
#[derive(Debug, Clone, Copy)]
pub(crate) enum EnqueueOutcome {
    /// The write is synced to disk, under the version that it was issued. That version may be provisional.
    Queued { unsynced: Option<UnsyncedPeriod>, queued_at: Timestamp },
    /// The conversation is at another version than the base of the update.
    Conflict,
    /// The queue holds a newer write of the conversation.
    SupersededInQueue,
    /// The store holds this version, which is newer or is not the base of the update.
    SupersededInStore(Version),
    /// The store holds this very write.
    AlreadyStored,
    /// A queued write was made earlier but has this higher version. The caller retries with a version above it.
    Reordered(Version),
}

/// A write in the queue.
#[derive(Debug, Clone)]
pub(crate) struct QueuedRow {
    pub(crate) record: Arc<Record>,
    /// The version that an update changes. The update may replace this version, an older one, or one of `sent_versions`.
    pub(crate) base: Option<Version>,
    /// Versions of this write, or of writes that it includes, that the store may hold.
    pub(crate) sent_versions: Vec<Version>,
    /// Newer versions of this daemon that replace this write if the store holds them: puts that bypassed the queue, and the
    /// version that this write had before.
    pub(crate) replaced_by: Vec<Version>,
    pub(crate) is_dispatched: bool,
    /// The position in the queue.
    pub(crate) seq: i64,
    /// False if the store has got the write meanwhile.
    pub(crate) is_queued: bool,
    /// The unsynced period that must end before version and expiry are final.
    pub(crate) unsynced: Option<UnsyncedPeriod>,
}

/// A queued write as the index needs it when the file is opened.
#[derive(Debug)]
pub(crate) struct IndexEntry {
    pub(crate) key: Key,
    /// The version as it was issued.
    pub(crate) version: Version,
    /// The unsynced period in which the version was issued.
    pub(crate) unsynced: Option<UnsyncedPeriod>,
    pub(crate) queued_at: Timestamp,
    /// Whether the store was seen to hold a newer version.
    pub(crate) is_superseded: bool,
    /// Whether the store may hold a newer version that the file does not know. Reads skip such a write until the store has
    /// been asked (I16).
    pub(crate) is_unverified: bool,
}

/// The end of a queued write.
#[derive(Debug, Clone)]
pub(crate) enum ReplayOutcome {
    /// The store holds the write.
    Stored,
    /// The store holds this newer write of the same daemon, which replaces the queued one.
    Replaced(Version),
    /// The store will never hold the write.
    DeadLettered(DeadLetterReason),
}

/// The reason for a dead letter.
#[derive(Debug, Clone)]
pub(crate) struct DeadLetterReason {
    pub(crate) text: String,
    /// The version that superseded the write, if one did.
    pub(crate) newer: Option<Version>,
}

/// A copy for the replica.
#[derive(Debug, Clone)]
pub(crate) struct ReplicaRecord {
    pub(crate) record: Arc<Record>,
    /// The time at which the store confirmed the record.
    pub(crate) confirmed_at: Timestamp,
    /// Whether the record is a write of this handle that replaces an older queued write.
    pub(crate) is_own: bool,
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

/// Queued writes that have found their end, by key and version.
pub(crate) type CompletedWrites = Vec<(Key, Version)>;

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
    /// Creates a dead letter for an import.
    ///
    /// ```
    /// use threadkeep::store::{Key, Record, Timestamp, Version};
    ///
    /// # fn main() -> threadkeep::Result<()> {
    /// let record = Record::tombstone(Key::new("thread-1")?, Version::from_raw(7));
    /// let letter = threadkeep::DeadLetter::new(record, Timestamp(1), Timestamp(2), "superseded");
    /// assert_eq!(letter.reason, "superseded");
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(record: Record, queued_at: Timestamp, died_at: Timestamp, reason: impl Into<String>) -> Self {
        Self { id: 0, record, queued_at, died_at, reason: reason.into(), newer: None }
    }
}

/// A write in an outage file, as it is listed, exported and imported.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QueuedWrite {
    /// The record to be written. A record without a value is a remove.
    pub record: Record,
    /// The version that an update changes.
    pub base: Option<Version>,
    /// Versions of this write that the store may hold already. [`Version::NONE`] among them marks an update of a queued put,
    /// which replaces everything older than `base`.
    pub sent_versions: Vec<Version>,
    /// Whether the write was sent, so that the store may hold it already.
    pub is_dispatched: bool,
    /// Whether the version comes from the system's clock, because the store's clock was unknown.
    pub is_provisional: bool,
    /// Whether the store was seen to hold a newer version. Replay sends the write, and reads skip it.
    pub is_superseded: bool,
    /// Whether the store may hold a newer version. Replay sends the write, and reads skip it until the store has been asked.
    pub is_unverified: bool,
    /// The time of queueing.
    pub queued_at: Timestamp,
    /// The position in the queue.
    pub seq: i64,
}

impl QueuedWrite {
    /// Creates a put or a remove without a condition and with a final version, for an import.
    ///
    /// ```
    /// use threadkeep::store::{Key, Record, Timestamp, Version};
    ///
    /// # fn main() -> threadkeep::Result<()> {
    /// let record = Record::tombstone(Key::new("thread-1")?, Version::from_raw(7));
    /// let write = threadkeep::tools::QueuedWrite::new(record, Timestamp(1));
    /// assert!(write.base.is_none());
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(record: Record, queued_at: Timestamp) -> Self {
        Self {
            record,
            base: None,
            sent_versions: Vec::new(),
            is_dispatched: false,
            is_provisional: false,
            is_superseded: false,
            is_unverified: false,
            queued_at,
            seq: 0,
        }
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

impl ImportReport {
    /// Adds two reports.
    ///
    /// ```
    /// use threadkeep::tools::ImportReport;
    ///
    /// let sum = ImportReport::default().plus(ImportReport::default());
    /// assert_eq!(sum.queued, 0);
    /// ```
    pub fn plus(self, other: Self) -> Self {
        Self {
            queued: self.queued + other.queued,
            dead_letters: self.dead_letters + other.dead_letters,
            duplicates: self.duplicates + other.duplicates,
            stale: self.stale + other.stale,
            unreadable: self.unreadable + other.unreadable,
        }
    }
}

/// An item of an import into an outage file.
#[derive(Debug, Clone)]
pub enum ImportItem {
    /// A write of another queue.
    Queued(QueuedWrite),
    /// A dead letter of another outage file.
    DeadLetter(DeadLetter),
    /// A conversation of a file of the backend `local`.
    LocalRecord(Record),
}
