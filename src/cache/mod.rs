//! The handle that a daemon holds.

mod found;
mod gauges;
mod health;
mod list;
mod outage;
mod read;
mod turns;
mod update;
mod upkeep;
mod write;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

use crate::background;
use crate::breaker::State;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fences;
use crate::fill::Flights;
#[cfg(feature = "sqlite")]
use crate::local::spool::Spool;
use crate::metrics::Metrics;
use crate::near::{Learnt, Near};
use crate::pending::Pending;
use crate::replay::Replay;
use crate::spool::Waiting;
#[cfg(not(feature = "sqlite"))]
use crate::spool::without::Spool;
use crate::store::Store;
use crate::trouble::{Call, Trouble};
use crate::warmup::{Stove, WarmUp};

pub use found::Found;
pub use health::{Health, Queue};
pub use list::List;
pub use outage::DeadLetters;
pub use update::Update;
pub use write::{Put, Remove};

/// Conversation threads, kept: a handle that is cheap to clone and can be used from any task.
///
/// Reads are answered from memory; writes go to the source of truth before they are acknowledged. All futures are
/// cancel-safe: work whose caller has gone is completed all the same, and still updates memory.
#[derive(Clone)]
pub struct Cache(Arc<Inner>);

/// What bounds a cache.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Time to live of a thread, unless a write says otherwise.
    pub(crate) ttl: Duration,
    /// Bytes of one value.
    pub(crate) value_bytes: usize,
    /// Bytes of threads in memory.
    pub(crate) memory_bytes: u64,
    /// Bytes of writes under way.
    pub(crate) in_flight_bytes: usize,
    /// How long a thread in memory counts as fresh; `None` where nobody else can write.
    pub(crate) fresh_for: Option<Duration>,
    /// How many of the newest threads come into memory at the start.
    pub(crate) warm_threads: usize,
    /// How long a read waits for the source of truth while it has a stale copy, and a write for its turn.
    pub(crate) patience: Duration,
    /// How often accesses are reported and expired records forgotten.
    pub(crate) upkeep_every: Duration,
    /// What becomes of a write while the source of truth cannot take it.
    pub(crate) on_outage: OnOutage,
}

/// What becomes of a write while the source of truth cannot take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnOutage {
    /// It is queued on the local disk, and acknowledged as [`Queued`](crate::Durability::Queued).
    Queue,
    /// It is an error.
    Reject,
}

struct Inner {
    backend: &'static str,
    origin: Arc<dyn Store>,
    limits: Limits,
    near: Arc<Near>,
    /// The file with queue and replica, where there is one.
    spool: Option<Arc<Spool>>,
    pending: Arc<Pending>,
    replay: Option<AbortHandle>,
    warming: AbortHandle,
    warm_up: watch::Receiver<WarmUp>,
    fences: Fences,
    flights: Flights<Result<Learnt>>,
    turns: turns::Turns,
    /// Counts KiB of writes that may still begin.
    room: Arc<Semaphore>,
    writing: watch::Sender<usize>,
    is_closed: AtomicBool,
    /// What an operator has to mend, from the last call to the origin.
    trouble: Arc<Trouble>,
    /// Why the last write that was to be queued was not taken, until it is worth another try.
    refusal: Mutex<Option<Error>>,
    metrics: Metrics,
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("backend", &self.0.backend).field("origin", &self.0.origin).finish()
    }
}

/// What a shutdown leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Shutdown {
    /// Writes whose outcome was not known at the deadline.
    pub unfinished: usize,
    /// Acknowledged writes that wait on disk for the next start.
    pub still_queued: usize,
}

impl Cache {
    pub(crate) fn over(
        origin: Arc<dyn Store>,
        backend: &'static str,
        limits: Limits,
        spool: Option<(Spool, Vec<Waiting>)>,
    ) -> Self {
        let fences = Fences::default();
        let clock = Arc::clone(origin.clock());
        let (spool, waiting) = spool.map(|(spool, waiting)| (Arc::new(spool), waiting)).unzip();
        let pending = Arc::new(Pending::new(waiting.unwrap_or_default(), Arc::clone(&clock)));
        let (bytes, fresh_for) = (limits.memory_bytes, limits.fresh_for);
        let metrics = Metrics::new();
        let evictions = metrics.evictions.clone();
        let near = Near::new(bytes, fresh_for, fences.clone(), Arc::clone(&pending), clock, evictions);
        let near = Arc::new(near);
        let trouble = Arc::<Trouble>::default();
        let replay = spool.as_ref().map(|spool| {
            let (origin, spool) = (Arc::clone(&origin), Arc::clone(spool));
            let replay =
                Replay::new(origin, spool, Arc::clone(&near), Arc::clone(&pending), Arc::clone(&trouble));
            background::spawn_for_good(replay.run()).abort_handle()
        });
        let (progress, warm_up) = watch::channel(WarmUp::default());
        let stove = Stove {
            origin: Arc::clone(&origin),
            spool: spool.clone(),
            near: Arc::clone(&near),
            fences: fences.clone(),
            most: limits.warm_threads,
            most_bytes: limits.memory_bytes / 2,
            progress,
        };
        let warming = background::spawn_for_good(stove.run()).abort_handle();
        let room = Arc::new(Semaphore::new(limits.in_flight_bytes / write::KIB));
        let inner = Arc::new(Inner {
            backend,
            origin,
            near,
            spool,
            pending,
            replay,
            warming,
            warm_up,
            fences,
            flights: Flights::default(),
            turns: turns::Turns::default(),
            room,
            writing: watch::Sender::new(0),
            is_closed: AtomicBool::new(false),
            trouble,
            refusal: Mutex::default(),
            metrics,
            limits,
        });
        background::spawn_for_good(gauges::follow(&inner));
        background::spawn_for_good(upkeep::keep_up(Arc::downgrade(&inner), inner.limits.upkeep_every));
        Self(inner)
    }

    /// Waits until the newest threads are in memory: from the source of truth, or, while that is away, from the local disk.
    /// Nobody has to: what is not there yet is loaded when it is read. With the backends `local` and `memory` there is no
    /// warm-up to wait for.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] where the cache is shut down meanwhile.
    pub async fn warm(&self) -> Result<WarmUp> {
        let mut progress = self.0.warm_up.clone();
        let warm_up = progress.wait_for(|progress| progress.is_done).await;
        warm_up.map(|warm_up| *warm_up).map_err(|_| closed())
    }

    /// Takes no more calls, waits until the writes under way are done and, while the source of truth can be reached, the
    /// queue is empty, at most for `deadline`. What is still queued is kept on disk for the next start. Calls that come
    /// later get [`ErrorKind::Closed`], as do writes that are stored only after the deadline, and the queue's file can be
    /// opened by another process.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] where it was shut down before.
    pub async fn shutdown(&self, deadline: Duration) -> Result<Shutdown> {
        if self.0.is_closed.swap(true, Relaxed) {
            return Err(closed());
        }
        let mut writing = self.0.writing.subscribe();
        let all_done = async {
            writing.wait_for(|count| *count == 0).await.ok();
            let inner = Arc::clone(&self.0);
            background::run(async move { inner.report_accesses().await }).await.ok();
            self.0.drain().await;
        };
        let unfinished = tokio::select! {
            () = all_done => 0,
            () = tokio::time::sleep(deadline) => *self.0.writing.borrow(),
        };
        self.0.close_spool().await;
        // Callers on this thread hear of their writes before this returns.
        tokio::task::yield_now().await;
        Ok(Shutdown { unfinished, still_queued: self.0.pending.len() })
    }

    /// Takes note of why the origin took no writes when it was contacted first.
    pub(crate) fn note_first_contact(&self, failure: Error) {
        self.0.trouble.note::<()>(Call::Probe, &Err(failure));
    }

    /// Drops a thread from memory, as memory itself may at any time.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where `key` is none.
    #[cfg(feature = "testing")]
    pub fn evict(&self, key: impl AsRef<str>) -> Result<()> {
        self.0.near.evict(&crate::record::Key::new(key)?);
        Ok(())
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the cache was shut down")
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.replay.iter().for_each(AbortHandle::abort);
        self.warming.abort();
    }
}

impl Inner {
    fn check_open(&self) -> Result<()> {
        if self.is_closed.load(Relaxed) { Err(closed()) } else { Ok(()) }
    }

    /// Refuses at once, and for nearly nothing, what could not reach the source of truth.
    fn check_reachable(&self) -> Result<()> {
        self.origin.breaker().map_or(Ok(()), crate::breaker::Breaker::check)
    }

    /// Takes note of what a call to the origin says about it.
    fn note<T>(&self, call: Call, result: Result<T>) -> Result<T> {
        self.trouble.note(call, &result);
        result
    }

    fn refusal(&self) -> MutexGuard<'_, Option<Error>> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_reachable(&self) -> bool {
        self.origin.breaker().is_none_or(|breaker| breaker.state() == State::Closed)
    }
}
