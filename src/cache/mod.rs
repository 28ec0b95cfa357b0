//! The cache: the handle that a daemon holds.
//!
//! Each operation has a file: `read` (get, and the base of an update), `put`, `update`, `write` (the write path), `list`.
//! `key_state` decides what memory knows of a conversation, `memory` drives it, and `copies` holds the order of file and
//! memory.

mod active;
mod append;
pub(crate) mod conversation;
mod copies;
mod dead_letters;
mod feed;
mod gauges;
pub(crate) mod health;
mod key_lock;
mod key_state;
pub(crate) mod list;
mod maintenance;
mod memory;
mod page_size;
mod put;
mod read;
mod single_flight;
mod update;
pub(crate) mod warmup;
mod write;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::AbortHandle;

use crate::error::{Error, ErrorKind, Result};
use crate::model::outcome::WriteOutcome;
use crate::model::writer::WriterId;
use crate::observe::alert::{Access, OperatorAlert};
use crate::observe::metrics::Metrics;
use crate::outage::QueuedKey;
use crate::outage::file::OutageFile;
use crate::outage::replay::Replayer;
use crate::resilience::breaker::BreakerState;
use crate::resilience::tasks;
use crate::store::Store;
use copies::Copies;
use feed::{Feed, FeedProgress};
use memory::{Admission, MemoryCache};
use single_flight::SingleFlight;
use warmup::{Warmer, WarmupProgress, WarmupState};

pub use append::AppendCall;
pub use conversation::Conversation;
pub use dead_letters::DeadLetters;
pub use health::QueueHealth;
pub use put::{Put, Remove};
pub use update::Update;

/// A cache of conversations over a store. Clone the handle freely, and use it from any task.
///
/// Memory answers reads. A write reaches the store, or the queue on the local disk, before the cache acknowledges it. All
/// futures are cancel-safe: the cache completes the work of a caller that has gone, and updates memory.
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
#[derive(Debug, Clone, Default)]
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
    /// The interval of the change feed. Zero turns it off.
    pub(crate) feed_interval: Duration,
    /// The interval of the maintenance.
    pub(crate) maintenance_interval: Duration,
    /// The treatment of a write during an outage.
    pub(crate) on_outage: OnOutage,
}

/// The treatment of a write during an outage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnOutage {
    /// The cache queues the write on the local disk, and answers [`Queued`](crate::WriteOutcome::Queued).
    #[default]
    Queue,
    /// The cache returns an error.
    Reject,
}

struct Shared {
    backend: &'static str,
    /// The outcome of a stored write. The backend `memory` stores nothing beyond the process.
    stored: WriteOutcome,
    store: Arc<dyn Store>,
    /// The writer of this handle in the first era of the clock.
    writer: WriterId,
    limits: Limits,
    copies: Arc<Copies>,
    /// The outage file, if the settings let a write enter its queue.
    queue: Option<Arc<OutageFile>>,
    /// Replay, clock sync, warm-up and change feed. They use the outage file, so they end before it is closed.
    file_tasks: Vec<AbortHandle>,
    warmup: watch::Receiver<WarmupProgress>,
    feed: watch::Receiver<Option<FeedProgress>>,
    single_flight: SingleFlight<Result<Admission>>,
    key_locks: key_lock::KeyLocks,
    append_groups: append::AppendGroups,
    /// Admits one probe at a time that syncs the clock.
    clock_probe: tokio::sync::Mutex<()>,
    /// Permits for writes in flight, one for each KiB.
    write_budget: Arc<Semaphore>,
    /// The number of writes in flight. `shutdown` waits until it is zero.
    writing: watch::Sender<usize>,
    is_closed: AtomicBool,
    /// The failure that needs an operator, as the last call to the store showed it.
    alert: Arc<OperatorAlert>,
    /// The error of the last failed enqueue. Maintenance clears it when another attempt makes sense.
    enqueue_error: Mutex<Option<Error>>,
    metrics: Arc<Metrics>,
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
        file: Option<(OutageFile, Vec<QueuedKey>)>,
    ) -> Self {
        let (clock, metrics) = (Arc::clone(store.clock()), Arc::new(Metrics::new()));
        let (memory_bytes, evictions) = (limits.memory_bytes, metrics.evictions.clone());
        let memory =
            Arc::new(MemoryCache::new(memory_bytes, limits.fresh_for, Arc::clone(&clock), evictions));
        let alert = Arc::<OperatorAlert>::default();
        let (file, file_tasks) = file.map(|file| start_file(file, &store, &memory, &alert)).unzip();
        let writer = file.as_ref().map_or_else(WriterId::random, |file| file.writer());
        let copies = Arc::new(Copies { memory, file, clock });
        let (progress, warmup) = watch::channel(WarmupProgress::default());
        let (first_poll, feed_began) = oneshot::channel();
        let warmer = Warmer {
            store: Arc::clone(&store),
            copies: Arc::clone(&copies),
            max_count: limits.warmup_limit,
            max_bytes: limits.memory_bytes / 2,
            progress,
            feed_began,
        };
        let mut file_tasks = file_tasks.unwrap_or_default();
        file_tasks.push(tasks::spawn_for_good(warmer.run()).abort_handle());
        let (feed, feed_progress) = Feed::new(Arc::clone(&store), Arc::clone(&copies), Arc::clone(&metrics));
        // If no entry is fresh for any time, each read asks the store, and the feed has no use.
        if !limits.feed_interval.is_zero() && limits.fresh_for.is_some_and(|span| !span.is_zero()) {
            file_tasks.push(tasks::spawn_for_good(feed.run(limits.feed_interval, first_poll)).abort_handle());
        }
        let shared = Arc::new(Shared {
            backend,
            stored: if backend == "memory" { WriteOutcome::Volatile } else { WriteOutcome::Stored },
            store,
            writer,
            queue: copies.file.clone().filter(|_| limits.on_outage == OnOutage::Queue),
            copies,
            file_tasks,
            warmup,
            feed: feed_progress,
            clock_probe: tokio::sync::Mutex::default(),
            single_flight: SingleFlight::default(),
            key_locks: key_lock::KeyLocks::default(),
            append_groups: append::AppendGroups::default(),
            write_budget: Arc::new(Semaphore::new(limits.in_flight_bytes / write::KIB)),
            writing: watch::Sender::new(0),
            is_closed: AtomicBool::new(false),
            alert,
            enqueue_error: Mutex::default(),
            metrics,
            limits,
        });
        shared.set_soft_timeout_of_breaker();
        shared.spawn_sampling_and_maintenance();
        Self(shared)
    }

    /// Waits until the warm-up has loaded the newest conversations into memory.
    ///
    /// The warm-up reads them from the store, or in an outage from the local disk. A daemon need not wait: `get` loads a
    /// conversation that is not in memory yet. The backends `local` and `memory` have no warm-up, so this returns at once.
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
        let warmup = progress.wait_for(|progress| progress.state != WarmupState::Running).await;
        warmup.map(|warmup| *warmup).map_err(|_| closed())
    }

    /// Shuts the cache down within `deadline`.
    ///
    /// The cache accepts no more calls. It waits for the writes in flight and, if the store is reachable, until the queue is
    /// empty. The outage file keeps the rest of the queue for the next start. Then a process can open the file again. Without a
    /// shutdown, requests in flight keep the file open after the last handle is dropped. Later
    /// calls, and writes that the store takes after the deadline, get [`ErrorKind::Closed`].
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
        Ok(ShutdownReport { unfinished, still_queued: self.0.queued() })
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
        self.0.copies.memory.tell(&crate::model::key::Key::new(key)?, key_state::Event::Evicted);
        Ok(())
    }
}

/// Restores the queued writes of an earlier process, and starts replay and clock sync.
fn start_file(
    (file, queued): (OutageFile, Vec<QueuedKey>),
    store: &Arc<dyn Store>,
    memory: &Arc<MemoryCache>,
    alert: &Arc<OperatorAlert>,
) -> (Arc<OutageFile>, Vec<AbortHandle>) {
    queued.iter().for_each(|queued| memory.resume(queued));
    file.set_observer(Arc::clone(memory) as _);
    let file = Arc::new(file);
    let clock_sync = tasks::spawn_for_good(Arc::clone(&file).run_clock_sync());
    let replay = Replayer::new(Arc::clone(store), Arc::clone(&file), Arc::clone(alert));
    let replay = tasks::spawn_for_good(replay.run());
    (file, vec![clock_sync.abort_handle(), replay.abort_handle()])
}

/// Returns the result of `work`, or `None` after `span` (I12).
async fn within<T>(span: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        done = work => Some(done),
        // Most work is done at once, and needs no timer.
        () = async { tokio::time::sleep(span).await } => None,
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the cache was shut down")
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.file_tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Shared {
    fn spawn_sampling_and_maintenance(self: &Arc<Self>) {
        tasks::spawn_for_good(gauges::run(self));
        let interval = self.limits.maintenance_interval;
        tasks::spawn_for_good(maintenance::run(Arc::downgrade(self), interval));
    }

    /// Tells the breaker from which time on a call counts as slow.
    fn set_soft_timeout_of_breaker(&self) {
        if let Some(breaker) = self.store.breaker() {
            breaker.set_soft_timeout(self.limits.soft_timeout);
        }
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

    fn is_breaker_closed(&self) -> bool {
        self.store.breaker().is_none_or(|breaker| breaker.state() == BreakerState::Closed)
    }

    /// Returns the number of queued writes.
    fn queued(&self) -> usize {
        let rows = self.copies.file.as_ref().map_or(0, |file| file.queue().borrow().rows);
        usize::try_from(rows).unwrap_or(usize::MAX)
    }

    /// Waits until the queue is empty, or until the store is unreachable. If the queue has writes, a probe finds that out
    /// first.
    async fn drain(&self) {
        let (Some(file), true) = (&self.copies.file, self.queued() > 0) else { return };
        let mut changes = file.queue();
        let emptied = async { while self.queued() > 0 && changes.changed().await.is_ok() {} };
        let Some(breaker) = self.store.breaker() else { return emptied.await };
        if breaker.probe_now().await {
            tokio::select! {
                () = emptied => {}
                () = breaker.wait_open() => {}
            }
        }
    }

    /// Stops replay and warm-up, and closes the outage file for other processes to open.
    async fn close_outage_file(&self) {
        self.file_tasks.iter().for_each(AbortHandle::abort);
        if let Some(file) = &self.copies.file
            && let Err(error) = file.close().await
        {
            tracing::warn!(%error, "cannot close the outage file; the next start reads its log again");
        }
    }
}
