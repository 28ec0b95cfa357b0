//! The validity of the replica, and the work that the writer has not committed yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

use crate::error::Error;
use crate::sqlite::database::SharedLock;

/// Bytes that the writer got and has not committed yet. They count in a total until the drop.
pub(in crate::outage) struct InFlightBytes {
    total: Arc<AtomicUsize>,
    bytes: usize,
}

impl InFlightBytes {
    pub(in crate::outage) fn new(total: &Arc<AtomicUsize>, bytes: usize) -> Self {
        total.fetch_add(bytes, SeqCst);
        Self { total: Arc::clone(total), bytes }
    }
}

impl Drop for InFlightBytes {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, SeqCst);
    }
}

/// Whether copies may be older than acknowledged writes, because a copy could not be written (I16).
#[derive(Debug)]
pub(in crate::outage) struct ReplicaValidity {
    failures: AtomicU64,
    /// The number of failures after which all copies have been dropped.
    restored: AtomicU64,
    /// The lock file tells the next process.
    lock: SharedLock,
}

impl ReplicaValidity {
    pub(in crate::outage) fn new(lock: SharedLock) -> Self {
        Self { failures: AtomicU64::new(0), restored: AtomicU64::new(0), lock }
    }

    pub(super) fn failures(&self) -> u64 {
        self.failures.load(SeqCst)
    }

    pub(in crate::outage) fn is_invalid(&self) -> bool {
        self.restored.load(SeqCst) < self.failures()
    }

    /// Makes all copies invalid. Returns whether they were valid before.
    pub(in crate::outage) fn invalidate(&self) -> bool {
        let before = self.failures.fetch_add(1, SeqCst);
        self.restored.load(SeqCst) == before
    }

    pub(super) fn record_failure(&self, error: &Error) {
        // A full disk would repeat this line for every read.
        if self.invalidate() {
            tracing::error!(%error, "the replica cannot write a copy; it hands out no copy until a write succeeds");
        }
        self.lock.note(|| self.is_invalid());
    }

    /// Restores the validity after all copies older than `failures` were dropped. A later failure keeps the replica invalid.
    pub(super) fn restore(&self, failures: u64) {
        // Most calls restore nothing, and need no write to the lock file.
        if self.restored.fetch_max(failures, SeqCst) < failures {
            self.lock.note(|| self.is_invalid());
        }
    }
}
