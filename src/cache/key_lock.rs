//! Key locks: the updates of one conversation through one handle run one after another.
//!
//! Without the lock, concurrent updates would conflict at the store and repeat their work.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::model::key::Key;

#[derive(Debug, Clone, Default)]
pub(super) struct KeyLocks(Arc<Mutex<HashMap<Key, Arc<tokio::sync::Mutex<()>>>>>);

/// The lock of one key, held or awaited by one update.
#[derive(Debug)]
pub(super) struct KeyLockGuard {
    key_locks: KeyLocks,
    key: Key,
    /// `None` only during the drop.
    lock: Option<Arc<tokio::sync::Mutex<()>>>,
    held: Option<OwnedMutexGuard<()>>,
}

impl KeyLocks {
    /// Waits for the lock of a key, first come, first served. Cancel-safe.
    pub(super) async fn acquire(&self, key: &Key) -> KeyLockGuard {
        let lock = Arc::clone(self.lock().entry(key.clone()).or_default());
        let mut guard = KeyLockGuard { key_locks: self.clone(), key: key.clone(), lock: None, held: None };
        guard.lock = Some(Arc::clone(&lock));
        // If the caller goes during this wait, the guard's drop removes the entry of the map.
        guard.held = Some(lock.lock_owned().await);
        guard
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Arc<tokio::sync::Mutex<()>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for KeyLockGuard {
    fn drop(&mut self) {
        self.held = None;
        let mut key_locks = self.key_locks.lock();
        // The count is read under the map's lock. So the second of two simultaneous drops sees that it is
        // the last.
        self.lock = None;
        if key_locks.get(&self.key).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            key_locks.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn key_lock_cancelled_waiter_leaves_no_entry() {
        let (key_locks, key) = (KeyLocks::default(), Key::new("k").unwrap());
        let first = key_locks.acquire(&key).await;
        let mut second = Box::pin(key_locks.acquire(&key));
        let mut cancelled = Box::pin(key_locks.acquire(&key));
        assert!(poll_once(&mut second).is_none() && poll_once(&mut cancelled).is_none());
        drop(cancelled);
        drop(first);
        drop(second.await);
        assert!(key_locks.lock().is_empty(), "the map keeps an entry without a guard");
    }

    fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(future).poll(&mut context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        }
    }
}
