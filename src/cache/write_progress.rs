//! The state of one write in flight.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{oneshot, watch};

use crate::cache::key_lock::KeyLockGuard;
use crate::error::Result;
use crate::model::clock::IssuedVersion;
use crate::model::moment::Moment;
use crate::model::outcome::WriteOutcome;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::outage::index::DirectWriteGuard;

/// The last request of a write to the store.
#[derive(Debug, Clone)]
pub(super) struct SentWrite {
    pub(super) record: Arc<Record>,
    /// The version that the store must hold, if the write has a condition.
    pub(super) if_version: Option<Version>,
    pub(super) issued: IssuedVersion,
    /// The time of the call. The time to live starts here.
    pub(super) called_at: Moment,
}

/// The progress of a write, shared by its attempt and by the soft timeout.
#[derive(Debug, Default)]
pub(super) struct WriteProgress {
    last_sent: Mutex<Option<SentWrite>>,
    direct_writes: Mutex<Vec<DirectWriteGuard>>,
    /// Whether the write is in the queue, and its caller has its answer.
    pub(super) is_queued: AtomicBool,
}

impl WriteProgress {
    /// Records the request that is sent next.
    pub(super) fn set_last_sent(&self, sent: SentWrite) {
        *self.lock() = Some(sent);
    }

    /// Keeps the guard of a direct write until this write ends.
    pub(super) fn add_direct_write(&self, guard: DirectWriteGuard) {
        self.direct_writes.lock().unwrap_or_else(PoisonError::into_inner).push(guard);
    }

    /// Returns the last request.
    pub(super) fn last_sent(&self) -> Option<SentWrite> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<SentWrite>> {
        self.last_sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sender of the outcome. It holds the key lock of an update until the outcome is known.
pub(super) struct Responder {
    pub(super) sender: oneshot::Sender<Result<WriteOutcome>>,
    pub(super) _key_lock: Option<Arc<KeyLockGuard>>,
}

impl Responder {
    pub(super) fn respond(self, result: Result<WriteOutcome>) {
        self.sender.send(result).ok();
    }
}

/// Counts a write in flight until the drop.
pub(super) struct WriteCounter(watch::Sender<usize>);

impl WriteCounter {
    pub(super) fn begin(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for WriteCounter {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}
