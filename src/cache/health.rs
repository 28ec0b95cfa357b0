//! The health of the cache, of its store and of its outage file.

use std::path::PathBuf;
use std::time::Duration;

use crate::cache::feed::FeedProgress;
use crate::cache::warmup::WarmupProgress;
use crate::cache::{Cache, OnOutage, Shared};
use crate::error::{Error, ErrorKind};
use crate::resilience::breaker::{Breaker, BreakerState};

/// The health of the cache, its store and its outage file, from [`Cache::health`].
///
/// ```
/// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
/// let health = cache.health();
/// println!("{} conversations in memory, breaker {:?}", health.conversations, health.breaker);
/// if !health.is_available() {
///     println!("an outage: {:?}; the cache takes writes: {}", health.cause, health.can_write().is_ok());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Health {
    /// The backend: `local`, `supabase`, `memory`, or `custom`.
    pub backend: &'static str,
    /// The breaker's state, if the store has a breaker.
    pub breaker: Option<BreakerState>,
    /// The cause of the present failure.
    ///
    /// The first of these that exists:
    ///
    /// * the cause of the open breaker
    /// * the failure that needs an operator: a rejected key, or missing migrations
    /// * the fault of the store's file
    /// * the fault of the outage file
    pub cause: Option<Error>,
    /// Whether the store works. A fault of the outage file alone leaves this true.
    is_available: bool,
    /// The number of conversations in memory.
    pub conversations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The limit on their bytes.
    pub max_bytes: u64,
    /// The outage file, if the backend has one.
    pub queue: Option<QueueHealth>,
    /// The progress of the warm-up.
    pub warmup: WarmupProgress,
    /// The change feed. `None` if the settings turn it off, or if the store has no history.
    pub feed: Option<FeedHealth>,
}

/// The change feed: how well this cache follows the writes of other clients.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FeedHealth {
    /// The time since the start of the last complete poll. Memory holds no older value of a conversation that changed before
    /// that poll.
    ///
    /// In an outage the lag grows. Beyond the freshness period, each read asks the store as it does without a feed.
    pub lag: Duration,
    /// The error of the last poll, if it failed. An older schema of the database is a usual cause.
    pub cause: Option<Error>,
}

/// The contents of the outage file: queue, dead letters and replica.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QueueHealth {
    /// The path of the file.
    pub path: PathBuf,
    /// The number of acknowledged writes that the store does not have yet.
    pub records: u64,
    /// Their bytes, as the limit counts them.
    pub bytes: u64,
    /// The limit on bytes of queued writes and dead letters together.
    pub max_bytes: u64,
    /// The age of the oldest queued write.
    pub oldest: Option<Duration>,
    /// The number of queued writes that failed alone, again and again. Replay retries them more and more rarely; they delay no
    /// other write.
    pub parked: u64,
    /// The number of dead letters: acknowledged writes that the store will not take.
    pub dead_letters: u64,
    /// Their bytes, as the limit counts them.
    pub dead_letters_bytes: u64,
    /// The number of last known copies in the replica.
    pub copies: u64,
    /// Their bytes, as their limit counts them.
    pub copies_bytes: u64,
    /// The limit on bytes of the copies.
    pub copies_max_bytes: u64,
    /// The reason why the queue takes no write, if it takes none.
    ///
    /// The queue is full, or the outage file cannot be written, or the setting rejects writes in an outage. An error of the
    /// last write ends with the next queued write, or after one interval of the maintenance.
    pub refusal: Option<Error>,
    /// The fault of the outage file, until it works again: the file was deleted, or its disk is full.
    ///
    /// Replay stops during a fault. Only the queue of a deleted file is still replayed.
    pub fault: Option<Error>,
}

impl Health {
    /// Returns true if the store works, as far as the cache knows. See [`Health`] for an example.
    pub fn is_available(&self) -> bool {
        self.is_available
    }

    /// Checks whether the cache can keep a write now, in the store or in the queue.
    ///
    /// A readiness check uses this. A daemon with a working queue is ready during an outage. The check contacts nothing.
    /// See [`Health`] for an example.
    ///
    /// # Errors
    ///
    /// The reason why neither takes writes: [`QueueFull`](ErrorKind::QueueFull) or [`LocalStorage`](ErrorKind::LocalStorage)
    /// from the queue, [`Unavailable`](ErrorKind::Unavailable) if the setting rejects writes in an outage. Without an outage
    /// file, the [cause](Self::cause).
    pub fn can_write(&self) -> Result<(), Error> {
        if self.is_available() {
            return Ok(());
        }
        match (&self.queue, &self.cause) {
            (Some(queue), _) => queue.refusal.clone().map_or(Ok(()), Err),
            (None, Some(cause)) => Err(cause.clone()),
            (None, None) => Err(Error::new(ErrorKind::Unavailable, "the store is unavailable")),
        }
    }
}

impl Cache {
    /// Returns the health of the cache, its store and its outage file. It contacts nothing.
    /// See [`Health`] for an example.
    pub fn health(&self) -> Health {
        self.0.health()
    }
}

impl Shared {
    pub(super) fn health(&self) -> Health {
        let breaker = self.store.breaker();
        let state = breaker.map(Breaker::state);
        let is_circuit_open = state.is_some_and(|state| state != BreakerState::Closed);
        let outage = breaker.filter(|_| is_circuit_open).and_then(Breaker::cause);
        let cause = outage.or_else(|| self.alert.get()).or_else(|| self.store.fault());
        let is_available = !is_circuit_open && cause.is_none();
        let (conversations, bytes) = self.copies.memory.size();
        let max_bytes = self.limits.memory_bytes;
        Health {
            backend: self.backend,
            breaker: state,
            cause: cause.or_else(|| self.file_fault()),
            is_available,
            conversations,
            bytes,
            max_bytes,
            queue: self.queue_health(),
            warmup: *self.warmup.borrow(),
            feed: self.feed_health(),
        }
    }

    fn feed_health(&self) -> Option<FeedHealth> {
        let FeedProgress { polled, error } = self.feed.borrow().clone()?;
        Some(FeedHealth { lag: self.copies.clock.moment().since(polled), cause: error })
    }

    /// Returns the health of the outage file, if there is one.
    fn queue_health(&self) -> Option<QueueHealth> {
        let file = self.copies.file.as_ref()?;
        let (usage, limits, queue) = (file.usage(), file.limits(), *file.queue().borrow());
        Some(QueueHealth {
            path: file.path().to_owned(),
            records: queue.rows,
            bytes: queue.bytes,
            max_bytes: limits.queue,
            oldest: queue.oldest.map(|oldest| self.copies.clock.now().since(oldest)),
            // Replay forgets a parked write only at its next turn, so it may count too many.
            parked: queue.rows.min(queue.parked),
            dead_letters: usage.dead_letters.records,
            dead_letters_bytes: usage.dead_letters.bytes,
            copies: usage.replica.records,
            copies_bytes: usage.replica.bytes,
            copies_max_bytes: limits.replica,
            refusal: match self.limits.on_outage {
                OnOutage::Queue => self.file_fault().or_else(|| self.enqueue_error.lock().clone()),
                OnOutage::Reject => {
                    let message = "the settings reject writes during an outage";
                    let error = Error::new(ErrorKind::Unavailable, message);
                    Some(error.with_remedy("set CONVERSATION_ON_OUTAGE=queue"))
                }
            },
            fault: self.file_fault(),
        })
    }

    /// Returns the fault of the outage file.
    pub(super) fn file_fault(&self) -> Option<Error> {
        self.copies.file.as_ref().and_then(|file| file.fault())
    }
}
