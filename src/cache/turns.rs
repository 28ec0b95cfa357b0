//! Turns: the updates of one thread through one handle queue up, instead of contending at the source of truth.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedMutexGuard;

use crate::record::Key;

#[derive(Debug, Clone, Default)]
pub(super) struct Turns(Arc<Mutex<HashMap<Key, Arc<tokio::sync::Mutex<()>>>>>);

/// The turn of one update, or a place in the queue for it.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Turns,
    key: Key,
    /// Gone only while it is dropped.
    queue: Option<Arc<tokio::sync::Mutex<()>>>,
    held: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    /// Waits until it is this caller's turn; cancel-safe. First come, first served.
    pub(super) async fn wait(&self, key: &Key) -> Turn {
        let queue = Arc::clone(self.lock().entry(key.clone()).or_default());
        let place = Some(Arc::clone(&queue));
        let mut turn = Turn { turns: self.clone(), key: key.clone(), queue: place, held: None };
        turn.held = Some(queue.lock_owned().await);
        turn
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Arc<tokio::sync::Mutex<()>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.held = None;
        let mut turns = self.turns.lock();
        // Under the lock, so that of two that leave together the second one sees that it is the last.
        self.queue = None;
        if turns.get(&self.key).is_some_and(|queue| Arc::strong_count(queue) == 1) {
            turns.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_are_taken_one_at_a_time_and_leave_nothing_behind() {
        let (turns, key) = (Turns::default(), Key::new("k").unwrap());
        let first = turns.wait(&key).await;
        let mut second = Box::pin(turns.wait(&key));
        let mut given_up = Box::pin(turns.wait(&key));
        assert!(futures_poll(&mut second).is_none() && futures_poll(&mut given_up).is_none());
        drop(given_up);
        drop(first);
        drop(second.await);
        assert!(turns.lock().is_empty());
    }

    fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match std::pin::Pin::new(future).poll(&mut context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        }
    }
}
