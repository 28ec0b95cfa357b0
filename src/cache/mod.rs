//! The cache: the handle that a daemon holds.
//!
//! Each operation has a file: `get`, `put`, `write` (the write path), `update`, `list`. `memory` holds
//! conversations, `outage` talks to the outage file.

pub(crate) mod conversation;
mod dead_letters;
mod gauges;
mod get;
pub(crate) mod health;
mod key_lock;
pub(crate) mod list;
mod maintenance;
pub(crate) mod memory;
mod outage;
mod page_size;
mod put;
mod read_token;
mod single_flight;
mod update;
pub(crate) mod warmup;
mod write;
mod write_progress;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

use crate::cache::memory::{Admission, MemoryCache};
use crate::cache::read_token::VersionFloors;
use crate::cache::single_flight::SingleFlight;
use crate::cache::warmup::{Warmer, WarmupProgress};
use crate::error::{Error, ErrorKind, Result};
use crate::observe::alert::{Access, OperatorAlert};
use crate::observe::metrics::Metrics;
use crate::outage::IndexEntry;
use crate::outage::file::OutageFile;
use crate::outage::index::QueueIndex;
use crate::outage::replay::Replayer;
use crate::resilience::breaker::BreakerState;
use crate::resilience::tasks;
use crate::store::Store;

pub use conversation::Conversation;
pub use dead_letters::DeadLetters;
pub use health::QueueHealth;
pub use put::{Put, Remove};
pub use update::Update;

/// A cache of conversations over a store. Clone the handle freely, and use it from any task.
///
/// Memory answers reads. A write reaches the store, or the queue on the local disk, before the cache
/// acknowledges it. All futures are cancel-safe: the cache completes the work of a caller that has gone,
/// and updates memory.
///
/// ```
/// use threadkeep::Cache;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> threadkeep::Result<()> {
/// let cache = Cache::builder().memory().open().await?;
/// cache.put("thread-1", "hello").await?;
/// assert_eq!(cache.get("thread-1").await?.unwrap().json(), r#""hello""#);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Cache(Arc<Shared>);

/// The limits of a cache.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// The time to live of a write that sets none.
    pub(crate) ttl: Duration,
    /// The size limit of one value, in bytes.
    pub(crate) value_bytes: usize,
    /// The limit on bytes of conversations in memory.
    pub(crate) memory_bytes: u64,
    /// The limit on bytes of writes in flight.
    pub(crate) in_flight_bytes: usize,
    /// The time during which a validated entry is fresh. `None` if no other process can write.
    pub(crate) fresh_for: Option<Duration>,
    /// The limit on conversations that the warm-up loads.
    pub(crate) warmup_limit: usize,
    /// The wait of a read before the stale fallback answers, and of a write before the cache queues it.
    pub(crate) soft_timeout: Duration,
    /// The interval of the maintenance.
    pub(crate) maintenance_interval: Duration,
    /// The treatment of a write during an outage.
    pub(crate) on_outage: OnOutage,
}

/// The treatment of a write during an outage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnOutage {
    /// The cache queues the write on the local disk, and answers [`Queued`](crate::WriteOutcome::Queued).
    Queue,
    /// The cache returns an error.
    Reject,
}

struct Shared {
    backend: &'static str,
    store: Arc<dyn Store>,
    limits: Limits,
    memory: Arc<MemoryCache>,
    /// The outage file, if the backend has one.
    file: Option<Arc<OutageFile>>,
    queue_index: Arc<QueueIndex>,
    replay: Option<AbortHandle>,
    warming: AbortHandle,
    warmup: watch::Receiver<WarmupProgress>,
    floors: VersionFloors,
    single_flight: SingleFlight<Result<Admission>>,
    key_locks: key_lock::KeyLocks,
    /// Permits for writes in flight, one for each KiB.
    write_budget: Arc<Semaphore>,
    /// The number of writes in flight. `shutdown` waits until it is zero.
    writing: watch::Sender<usize>,
    is_closed: AtomicBool,
    /// The failure that needs an operator, as the last call to the store showed it.
    alert: Arc<OperatorAlert>,
    /// The error of the last failed enqueue. Maintenance clears it when another attempt makes sense.
    enqueue_error: Mutex<Option<Error>>,
    metrics: Metrics,
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("backend", &self.0.backend).field("store", &self.0.store).finish()
    }
}

/// The remaining work after a shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// The number of writes without a known outcome at the deadline.
    pub unfinished: usize,
    /// The number of acknowledged writes in the queue. The next start replays them.
    pub still_queued: usize,
}

impl Cache {
    /// Creates a cache over an open store, and starts its background tasks.
    pub(crate) fn new(
        store: Arc<dyn Store>,
        backend: &'static str,
        limits: Limits,
        file: Option<(OutageFile, Vec<IndexEntry>)>,
    ) -> Self {
        let floors = VersionFloors::default();
        let clock = Arc::clone(store.clock());
        let (file, waiting) = file.map(|(file, waiting)| (Arc::new(file), waiting)).unzip();
        let queue_index = Arc::new(QueueIndex::new(waiting.unwrap_or_default(), Arc::clone(&clock)));
        let metrics = Metrics::new();
        let memory = Arc::new(MemoryCache::new(
            limits.memory_bytes,
            limits.fresh_for,
            floors.clone(),
            Arc::clone(&queue_index),
            clock,
            metrics.evictions.clone(),
        ));
        let alert = Arc::<OperatorAlert>::default();
        let replay = file.as_ref().map(|file| {
            let (store, file, observer) = (Arc::clone(&store), Arc::clone(file), Arc::clone(&memory) as _);
            let replay = Replayer::new(store, file, observer, Arc::clone(&queue_index), Arc::clone(&alert));
            tasks::spawn_for_good(replay.run()).abort_handle()
        });
        let (progress, warmup) = watch::channel(WarmupProgress::default());
        let warmer = Warmer {
            store: Arc::clone(&store),
            file: file.clone(),
            memory: Arc::clone(&memory),
            floors: floors.clone(),
            max_count: limits.warmup_limit,
            max_bytes: limits.memory_bytes / 2,
            progress,
        };
        let warming = tasks::spawn_for_good(warmer.run()).abort_handle();
        let shared = Arc::new(Shared {
            backend,
            store,
            memory,
            file,
            queue_index,
            replay,
            warming,
            warmup,
            floors,
            single_flight: SingleFlight::default(),
            key_locks: key_lock::KeyLocks::default(),
            write_budget: Arc::new(Semaphore::new(limits.in_flight_bytes / write::KIB)),
            writing: watch::Sender::new(0),
            is_closed: AtomicBool::new(false),
            alert,
            enqueue_error: Mutex::default(),
            metrics,
            limits,
        });
        shared.spawn_sampling_and_maintenance();
        Self(shared)
    }

    /// Waits until the warm-up has loaded the newest conversations into memory.
    ///
    /// The warm-up reads them from the store, or in an outage from the local disk. A daemon need not wait:
    /// `get` loads a conversation that is not in memory yet. The backends `local` and `memory` have no
    /// warm-up, so this returns at once.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`] if the cache shuts down during the wait.
    ///
    /// ```
    /// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
    /// let progress = cache.warm().await?;
    /// println!("{} conversations in memory", progress.conversations);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn warm(&self) -> Result<WarmupProgress> {
        let mut progress = self.0.warmup.clone();
        let warmup = progress.wait_for(|progress| progress.is_done).await;
        warmup.map(|warmup| *warmup).map_err(|_| closed())
    }

    /// Shuts the cache down within `deadline`.
    ///
    /// The cache accepts no more calls. It waits for the writes in flight and, if the store is reachable,
    /// until the queue is empty. The outage file keeps the rest of the queue for the next start. Then
    /// another process can open the file. Later calls, and writes that the store takes after the deadline,
    /// get [`ErrorKind::Closed`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`] if the cache was shut down before.
    ///
    /// ```
    /// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
    /// let left = cache.shutdown(std::time::Duration::from_secs(5)).await?;
    /// println!("{} writes wait for the next start", left.still_queued);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn shutdown(&self, deadline: Duration) -> Result<ShutdownReport> {
        if self.0.is_closed.swap(true, Relaxed) {
            return Err(closed());
        }
        let mut writing = self.0.writing.subscribe();
        let all_done = async {
            writing.wait_for(|count| *count == 0).await.ok();
            let shared = Arc::clone(&self.0);
            tasks::run(async move { shared.flush_access_times().await }).await.ok();
            self.0.drain().await;
        };
        let unfinished = tokio::select! {
            () = all_done => 0,
            () = tokio::time::sleep(deadline) => *self.0.writing.borrow(),
        };
        self.0.close_outage_file().await;
        // Callers on a runtime with one thread get their results before this returns.
        tokio::task::yield_now().await;
        Ok(ShutdownReport { unfinished, still_queued: self.0.queue_index.len() })
    }

    /// Records the failure of the first contact with the store as an operator alert.
    pub(crate) fn note_first_contact(&self, failure: Error) {
        self.0.alert.note::<()>(Access::Probe, &Err(failure));
    }

    /// Evicts a conversation from memory, as memory itself may at any time.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if `key` is not a valid thread id.
    ///
    /// ```
    /// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
    /// cache.evict("thread-1")?;
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "testing")]
    pub fn evict(&self, key: impl AsRef<str>) -> Result<()> {
        self.0.memory.evict(&crate::model::key::Key::new(key)?);
        Ok(())
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the cache was shut down")
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.replay.iter().for_each(AbortHandle::abort);
        self.warming.abort();
    }
}

impl Shared {
    fn spawn_sampling_and_maintenance(self: &Arc<Self>) {
        tasks::spawn_for_good(gauges::run(self));
        let interval = self.limits.maintenance_interval;
        tasks::spawn_for_good(maintenance::run(Arc::downgrade(self), interval));
    }

    fn check_not_shut_down(&self) -> Result<()> {
        if self.is_closed.load(Relaxed) { Err(closed()) } else { Ok(()) }
    }

    /// Returns the error of an open breaker at once, without a call to the store.
    fn check_breaker(&self) -> Result<()> {
        self.store.breaker().map_or(Ok(()), crate::resilience::breaker::Breaker::check)
    }

    /// Updates the operator alert from the result of a call to the store.
    fn note<T>(&self, call: Access, result: Result<T>) -> Result<T> {
        self.alert.note(call, &result);
        result
    }

    fn last_enqueue_error(&self) -> MutexGuard<'_, Option<Error>> {
        self.enqueue_error.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_breaker_closed(&self) -> bool {
        self.store.breaker().is_none_or(|breaker| breaker.state() == BreakerState::Closed)
    }
}
