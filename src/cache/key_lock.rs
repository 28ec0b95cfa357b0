//! Key locks: puts and removes of one conversation share its lock, and an update holds it alone (C1).
//!
//! Without the lock, an update could overwrite a put of this handle that it has not read. The updates of one handle would also
//! conflict at the store and repeat their work.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use super::within;
use crate::error::{Error, ErrorKind, Result};
use crate::model::key::Key;

/// The limit on the wait for a lock (I12).
const MAX_WAIT: Duration = Duration::from_secs(60);
const RETRY_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Default)]
pub(super) struct KeyLocks(Arc<Mutex<LocksByKey>>);

type LocksByKey = HashMap<Key, Arc<RwLock<()>>, foldhash::fast::RandomState>;

/// The lock of one key, held or awaited by one write.
#[derive(Debug)]
pub(super) struct KeyLockGuard {
    key_locks: KeyLocks,
    key: Key,
    hold: Hold,
}

#[derive(Debug)]
enum Hold {
    /// Before the wait and during the drop.
    Nothing,
    Shared(#[allow(dead_code, reason = "held until the drop")] OwnedRwLockReadGuard<()>),
    Alone(#[allow(dead_code, reason = "held until the drop")] OwnedRwLockWriteGuard<()>),
}

impl KeyLocks {
    /// Waits for a share of the lock of a key, first come, first served. Cancel-safe.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Overloaded`] after a minute: too many updates wait, or an update waits for this very write.
    pub(super) async fn share(&self, key: &Key) -> Result<KeyLockGuard> {
        let (mut guard, lock) = self.entry(key);
        guard.hold = Hold::Shared(within(MAX_WAIT, lock.read_owned()).await.ok_or_else(|| busy(key))?);
        Ok(guard)
    }

    /// Waits for the whole lock of a key, as [`share`](Self::share) does.
    pub(super) async fn hold_alone(&self, key: &Key) -> Result<KeyLockGuard> {
        let (mut guard, lock) = self.entry(key);
        guard.hold = Hold::Alone(within(MAX_WAIT, lock.write_owned()).await.ok_or_else(|| busy(key))?);
        Ok(guard)
    }

    /// If the caller goes during its wait, the guard's drop removes the entry of the map.
    fn entry(&self, key: &Key) -> (KeyLockGuard, Arc<RwLock<()>>) {
        let lock = Arc::clone(self.0.lock().entry(key.clone()).or_default());
        (KeyLockGuard { key_locks: self.clone(), key: key.clone(), hold: Hold::Nothing }, lock)
    }
}

fn busy(key: &Key) -> Error {
    let message = format!("updates of conversation {key} hold its lock for {MAX_WAIT:?}");
    Error::new(ErrorKind::Overloaded, message).with_key(key.as_str()).with_retry_after(RETRY_AFTER)
}

impl Drop for KeyLockGuard {
    fn drop(&mut self) {
        // The count is read under the map's lock. So the second of two simultaneous drops sees that it is the last.
        let mut key_locks = self.key_locks.0.lock();
        self.hold = Hold::Nothing;
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
        let first = key_locks.hold_alone(&key).await.unwrap();
        let mut second = Box::pin(key_locks.share(&key));
        let mut cancelled = Box::pin(key_locks.hold_alone(&key));
        assert!(poll_once(&mut second).is_none() && poll_once(&mut cancelled).is_none());
        drop(cancelled);
        drop(first);
        let shares = (second.await.unwrap(), key_locks.share(&key).await.unwrap());
        drop(shares);
        assert!(key_locks.0.lock().is_empty(), "the map keeps an entry without a guard");
    }

    fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(future).poll(&mut context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        }
    }
}
