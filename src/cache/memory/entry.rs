//! The entries of memory, and the results of their admission.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::clock::UnsyncedPeriod;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::record::Record;
use crate::model::version::Version;

/// A conversation in memory.
#[derive(Debug)]
pub(crate) struct CacheEntry {
    pub(crate) record: Arc<Record>,
    /// The start of the call by which the store last validated the entry.
    pub(crate) validated_at: Moment,
    /// Whether the entry is a queued write that the store has not confirmed yet.
    pub(crate) is_queued: bool,
    /// The unsynced period whose clock set the expiry of a queued write. After its end, the outage file has
    /// a corrected expiry.
    pub(super) unsynced: Option<UnsyncedPeriod>,
    /// Whether the entry came from the replica or from replay. Such an entry is never fresh, because its
    /// age is unknown or depends on an unverified clock.
    pub(super) is_never_fresh: bool,
    /// Whether a caller has read the entry since the last report of access times.
    pub(super) accessed: AtomicBool,
    /// The list of first reads, if the entry came from a list page or from the warm-up.
    pub(super) first_reads: Option<Arc<FirstReads>>,
}

impl CacheEntry {
    /// Creates an entry that the store has just validated, and that no caller has read yet.
    pub(super) fn new(record: Arc<Record>, validated_at: Moment) -> Self {
        Self {
            record,
            validated_at,
            is_queued: false,
            unsynced: None,
            is_never_fresh: false,
            accessed: AtomicBool::new(false),
            first_reads: None,
        }
    }

    /// Creates the entry of a queued write.
    pub(super) fn queued(
        record: &Arc<Record>,
        unsynced: Option<UnsyncedPeriod>,
        queued_at: Moment,
    ) -> Arc<Self> {
        let entry = Self::new(Arc::clone(record), queued_at);
        Arc::new(Self { is_queued: true, unsynced, accessed: AtomicBool::new(true), ..entry })
    }

    /// Marks the entry as read, and returns it.
    pub(crate) fn touched(self: Arc<Self>) -> Arc<Self> {
        // A load is cheaper than a store, which the other cores must see. Most entries are marked already.
        if !self.accessed.load(Relaxed) {
            self.accessed.store(true, Relaxed);
            if let Some(first_reads) = &self.first_reads {
                first_reads.lock().push(self.record.key.clone());
            }
        }
        self
    }
}

/// The keys of entries from list pages or the warm-up that callers have read since.
#[derive(Debug, Default)]
pub(super) struct FirstReads(Mutex<Vec<Key>>);

impl FirstReads {
    pub(super) fn lock(&self) -> MutexGuard<'_, Vec<Key>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The result of a call to the store for one conversation.
#[derive(Debug)]
pub(crate) enum Observation {
    Found(Arc<Record>),
    Absent(Version),
}

impl Observation {
    pub(super) fn version(&self) -> Version {
        match self {
            Self::Found(record) => record.version,
            Self::Absent(version) => *version,
        }
    }
}

/// Turns a tombstone into an absence.
impl From<Arc<Record>> for Observation {
    fn from(record: Arc<Record>) -> Self {
        if record.value.is_some() { Self::Found(record) } else { Self::Absent(record.version) }
    }
}

/// The result of an admission.
#[derive(Debug, Clone)]
pub(crate) enum Admission {
    /// The current entry. It is in memory, unless a list page found no room. A mark on it is a mark in
    /// memory.
    Cached(Arc<CacheEntry>),
    /// The conversation does not exist. Its last version is this.
    Absent(Version),
    /// The observation is stale: a newer version became known meanwhile. The caller reads again.
    BelowFloor,
    /// A newer write waits in the queue.
    QueuedIsNewer,
}
