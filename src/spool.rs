//! What goes into a spool and comes out of it: the file beside a source of truth that can be away. The file itself is
//! `local::spool`; without the feature `sqlite` there is none.

use std::sync::Arc;

use crate::record::{Key, Record};
use crate::version::{Blindness, Timestamp, Version};

/// A write to be queued.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) record: Arc<Record>,
    /// Of an update: the version that it goes on from.
    pub(crate) over: Option<Version>,
    /// Whether it was sent, so that it may be in the source of truth already.
    pub(crate) is_sent: bool,
    /// When it was stamped, by the clock that stamped it.
    pub(crate) stamped_at: Timestamp,
    /// The blindness of that clock then.
    pub(crate) blindness: Option<Blindness>,
}

/// What became of a write that was to be queued.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Enqueued {
    /// It is on disk, as it was stamped: perhaps by a blind clock.
    Kept { blindness: Option<Blindness>, queued_at: Timestamp },
    /// The thread is at another version than the one that it goes on from.
    Conflict,
    /// Something newer is in the queue.
    Overtaken,
    /// The source of truth was seen to hold this version: newer, or not what it goes on from.
    Behind(Version),
    /// The source of truth was seen to hold it.
    Stored,
    /// This one is newer by its version, though it was made before: an update that waits in the queue, or what a clock that was
    /// right has stamped.
    Crossed(Version),
}

/// A write that waits in the queue.
#[derive(Debug, Clone)]
pub(crate) struct Queued {
    pub(crate) record: Arc<Record>,
    /// Of an update: what may be stored where it is applied is this version, an older one, or one of `chain`.
    pub(crate) base: Option<Version>,
    /// Versions of its own that may have been stored.
    pub(crate) chain: Vec<Version>,
    /// Newer versions of this daemon that take its place if they are stored: puts that were sent past it, and its own
    /// version before it was stamped anew.
    pub(crate) replaced_by: Vec<Version>,
    pub(crate) is_sent: bool,
    /// The order in which they were queued.
    pub(crate) seq: i64,
    /// False where it has been stored meanwhile.
    pub(crate) is_waiting: bool,
    /// What version and expiry wait for: the end of this blindness.
    pub(crate) blindness: Option<Blindness>,
}

/// A queued write as it is marked in memory when the file is opened.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) key: Key,
    /// As stamped.
    pub(crate) version: Version,
    /// Stamped by a blind clock.
    pub(crate) blindness: Option<Blindness>,
    pub(crate) queued_at: Timestamp,
    /// The source of truth was seen to hold something newer.
    pub(crate) is_overtaken: bool,
    /// Something newer may have been stored without the file hearing of it: nobody reads it before that is known.
    pub(crate) is_doubtful: bool,
}

/// What became of a queued write.
#[derive(Debug, Clone)]
pub(crate) enum Fate {
    /// The source of truth holds it.
    Stored,
    /// The source of truth holds this newer write of the same daemon, which took its place.
    Replaced(Version),
    /// The source of truth will never hold it.
    Dead(Reason),
}

/// Why a queued write was not stored.
#[derive(Debug, Clone)]
pub(crate) struct Reason {
    /// In words.
    pub(crate) text: String,
    /// The version that it lost against, if it did.
    pub(crate) newer: Option<Version>,
}

/// A copy to be kept.
#[derive(Debug, Clone)]
pub(crate) struct Copy {
    pub(crate) record: Arc<Record>,
    /// When the source of truth confirmed it.
    pub(crate) confirmed_at: Timestamp,
    /// Whether it is a write of this handle, which takes the place of an older one in the queue.
    pub(crate) is_own: bool,
    pub(crate) rank: Rank,
}

/// Which copies go first if there are too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rank {
    /// A caller wrote or asked for this conversation: goes after the listed ones, in the order of writing.
    Used,
    /// It came by a listing or the warm-up: goes first, unless a caller has used the conversation before.
    Listed,
    /// It came so, and a caller has read it in memory since.
    Read,
}

/// Queued writes that have found their end, by key and version.
pub(crate) type Settled = Vec<(Key, Version)>;

/// What bounds a spool.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Bytes of queued writes and dead letters.
    pub(crate) queue: u64,
    /// Bytes of copies.
    pub(crate) replica: u64,
}

/// How many records of a kind there are, and the bytes that they count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) records: u64,
    /// As counted against the bound.
    pub(crate) bytes: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, bytes: u64) {
        self.records += 1;
        self.bytes += bytes;
    }

    pub(crate) fn sub(&mut self, bytes: u64) {
        self.records = self.records.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// What the file holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// Writes that are not yet in the source of truth.
    pub(crate) queue: Tally,
    /// Copies of what is there.
    pub(crate) replica: Tally,
    pub(crate) dead_letters: Tally,
}

/// A write that was acknowledged as [`Queued`](crate::Durability::Queued), and that the source of truth turned out not
/// to take: it is kept until somebody has looked at it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeadLetter {
    /// Its number in the file.
    pub id: i64,
    /// What was to be written; without a value: a deletion.
    pub record: Record,
    /// When it was queued, by the clock of the source of truth.
    pub queued_at: Timestamp,
    /// When it was given up.
    pub died_at: Timestamp,
    /// Why: superseded, refused, or too old.
    pub reason: String,
    /// The version that it lost against, if it did.
    pub newer: Option<Version>,
}

/// A write in the queue's file, as it is listed, exported and imported.
#[cfg(feature = "sqlite")]
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QueuedWrite {
    /// What is to be written; without a value: a deletion.
    pub record: Record,
    /// Of an update: the version that it goes on from.
    pub base: Option<Version>,
    /// Versions of its own that may be in the source of truth already. [`Version::NONE`] among them says that it goes on from
    /// a put, and so takes the place of whatever is older than `base`.
    pub chain: Vec<Version>,
    /// Whether it was sent, so that it may be in the source of truth already.
    pub is_sent: bool,
    /// Whether it was stamped by the system's clock, before the source of truth's was known.
    pub is_unsure: bool,
    /// Whether the source of truth was seen to hold something newer, so that it is replayed, but read no more.
    pub is_overtaken: bool,
    /// Whether the source of truth may hold something newer: it is replayed, and read only once that is known not to be so.
    pub is_doubtful: bool,
    /// When it was queued.
    pub queued_at: Timestamp,
    /// Its number in the file: the order in which they were queued.
    pub seq: i64,
}

/// What became of writes that were taken into a queue's file.
#[cfg(feature = "sqlite")]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Imported {
    /// Writes that wait in the queue now.
    pub queued: usize,
    /// Dead letters that were added.
    pub dead_letters: usize,
    /// What the file held already, or had seen stored.
    pub already: usize,
    /// Writes of which the file holds a newer one, which stays.
    pub older: usize,
}

#[cfg(feature = "sqlite")]
impl Imported {
    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            queued: self.queued + other.queued,
            dead_letters: self.dead_letters + other.dead_letters,
            already: self.already + other.already,
            older: self.older + other.older,
        }
    }
}

/// Whether this can be a time: of the years 1970 to 9999.
#[cfg(feature = "sqlite")]
pub(crate) fn is_time(at: Timestamp) -> bool {
    (0..253_402_300_800_000).contains(&at.0)
}

/// Whether a write that was queued at `queued_at` can have got this version by now: no clock stamps more than some seconds
/// ahead of what it shows, and either that clock or this machine's is right to a day. One beyond would win over whatever is
/// written until its time has come.
#[cfg(feature = "sqlite")]
pub(crate) fn can_be_stamped(version: Version, queued_at: Timestamp, now: Timestamp) -> bool {
    version.at() <= queued_at.max(now).plus(std::time::Duration::from_secs(86_400))
}

/// What is taken into a queue's file.
#[cfg(feature = "sqlite")]
#[derive(Debug, Clone)]
pub(crate) enum Incoming {
    /// A write that waits, or waited, in another queue.
    Queued(QueuedWrite),
    /// A dead letter of another queue.
    Dead(DeadLetter),
    /// A conversation of a file that was the source of truth itself.
    Adopted(Record),
}

/// What a damaged file still gave.
#[cfg(feature = "sqlite")]
#[derive(Debug, Default)]
pub(crate) struct Salvage {
    pub(crate) queued: Vec<QueuedWrite>,
    pub(crate) dead_letters: Vec<DeadLetter>,
    /// Whose writes these are, where that could be read.
    pub(crate) origin: Option<String>,
    /// Whether the first page had to be replaced.
    pub(crate) had_no_header: bool,
    /// Writes that are known to have been there and could not be read, and the bytes that they counted.
    pub(crate) lost: Tally,
    /// Whether there may have been more that nothing is known of.
    pub(crate) may_lack_more: bool,
}

#[cfg(not(feature = "sqlite"))]
pub(crate) mod without {
    use std::path::Path;

    use super::{
        Arc, Bounds, Copy, DeadLetter, Enqueued, Entry, Fate, Holdings, Key, Queued, Record, Settled,
        Timestamp, Version,
    };
    use crate::error::{Error, Result};

    /// There is none: the type has no values.
    #[derive(Debug)]
    pub(crate) enum Spool {}

    #[allow(clippy::unused_async, reason = "the shape of the real one")]
    impl Spool {
        pub(crate) fn left_behind(_: &Path) -> Option<u64> {
            None
        }
        pub(crate) fn path(&self) -> &Path {
            match *self {}
        }
        pub(crate) fn holdings(&self) -> Holdings {
            match *self {}
        }
        pub(crate) fn bounds(&self) -> Bounds {
            match *self {}
        }
        pub(crate) async fn close(&self) -> Result<()> {
            match *self {}
        }
        pub(crate) async fn tidy(&self) -> Result<()> {
            match *self {}
        }
        pub(crate) fn fault(&self) -> Option<Error> {
            match *self {}
        }
        pub(crate) async fn prove(&self) -> Result<()> {
            match *self {}
        }
        pub(crate) async fn enqueue(&self, _: Entry, _: impl FnOnce(Enqueued)) -> Result<Enqueued> {
            match *self {}
        }
        pub(crate) async fn attempting(&self, _: &Key, _: Version, _: bool) {
            match *self {}
        }
        pub(crate) async fn attempt_failed(&self, _: &Key, _: Version) {
            match *self {}
        }
        pub(crate) async fn queued(&self, _: &Key) -> Result<Option<Queued>> {
            match *self {}
        }
        pub(crate) async fn next(&self, _: i64, _: usize, _: usize) -> Result<Vec<Queued>> {
            match *self {}
        }
        pub(crate) async fn settle(&self, _: Vec<(Key, Version, Fate)>) -> Result<Vec<bool>> {
            match *self {}
        }
        pub(crate) async fn mark_sent(&self) -> Result<()> {
            match *self {}
        }
        pub(crate) async fn straighten(&self) -> Result<()> {
            match *self {}
        }
        pub(crate) async fn restamp(&self, _: &Key, _: Version, _: Version) -> Result<bool> {
            match *self {}
        }
        pub(crate) async fn keep(&self, _: Vec<Copy>, _: impl FnOnce(Settled)) {
            match *self {}
        }
        pub(crate) async fn keep_own(&self, _: Copy, _: impl FnOnce(Settled)) -> Result<()> {
            match *self {}
        }
        pub(crate) async fn confirm(&self, _: &Key, _: Version, _: Timestamp) {
            match *self {}
        }
        pub(crate) async fn last_known(&self, _: &Key) -> Result<Option<(Arc<Record>, Timestamp)>> {
            match *self {}
        }
        pub(crate) async fn copies(&self, _: i64, _: usize) -> Result<Vec<(i64, Arc<Record>, Timestamp)>> {
            match *self {}
        }
        pub(crate) async fn dead_letters(&self, _: i64, _: usize) -> Result<Vec<DeadLetter>> {
            match *self {}
        }
        pub(crate) async fn forget_dead_letters(&self, _: i64) -> Result<usize> {
            match *self {}
        }
    }
}
