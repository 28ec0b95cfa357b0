//! The handle that a daemon holds.

mod found;
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
use crate::warmup::{Stove, WarmUp};

pub use found::Found;
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
    trouble: Mutex<Option<Error>>,
    metrics: Metrics,
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("backend", &self.0.backend).field("origin", &self.0.origin).finish()
    }
}

/// How the cache and its source of truth are doing.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Health {
    /// `local`, `supabase`, `memory`, or `custom`.
    pub backend: &'static str,
    /// The breaker's state, where the backend has one.
    pub breaker: Option<State>,
    /// Why the breaker is not closed; or what keeps the store from working though it answers, until it works again: a
    /// refused key, missing migrations, a full disk.
    pub cause: Option<Error>,
    /// Threads in memory.
    pub threads: u64,
    /// The bytes that they take.
    pub bytes: u64,
    /// What waits on the local disk, where there is such a file.
    pub queue: Option<Queue>,
    /// How far the warm-up is.
    pub warm_up: WarmUp,
}

/// What the file beside the source of truth holds.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Queue {
    /// Where the file lies.
    pub path: std::path::PathBuf,
    /// Acknowledged writes that are not yet in the source of truth: falls while they are replayed.
    pub records: u64,
    /// Their bytes, as counted against the bound.
    pub bytes: u64,
    /// How long the oldest has been waiting.
    pub oldest: Option<Duration>,
    /// Acknowledged writes that the source of truth turned out not to take.
    pub dead_letters: u64,
    /// Last known copies.
    pub copies: u64,
    /// Their bytes.
    pub copies_bytes: u64,
}

impl Health {
    /// Whether the source of truth can be worked with, as far as is known.
    pub fn is_available(&self) -> bool {
        self.cause.is_none() && self.breaker.is_none_or(|state| state == State::Closed)
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
        let near = Arc::new(Near::new(bytes, fresh_for, fences.clone(), Arc::clone(&pending), clock));
        let replay = spool.as_ref().map(|spool| {
            let (origin, spool) = (Arc::clone(&origin), Arc::clone(spool));
            let replay = Replay::new(origin, spool, Arc::clone(&near), Arc::clone(&pending));
            tokio::spawn(replay.run()).abort_handle()
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
        let warming = tokio::spawn(stove.run()).abort_handle();
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
            trouble: Mutex::default(),
            metrics: Metrics::new(),
            limits,
        });
        tokio::spawn(upkeep::keep_up(Arc::downgrade(&inner), inner.limits.upkeep_every));
        Self(inner)
    }

    /// How the cache and its source of truth are doing; asks nobody.
    pub fn health(&self) -> Health {
        let breaker = self.0.origin.breaker();
        let state = breaker.map(crate::breaker::Breaker::state);
        let is_cut_off = state.is_some_and(|state| state != State::Closed);
        let outage = breaker.filter(|_| is_cut_off).and_then(crate::breaker::Breaker::cause);
        let cause = outage.or_else(|| self.0.trouble().clone());
        let (threads, bytes) = self.0.near.size();
        let (queue, warm_up) = (self.0.queue(), *self.0.warm_up.borrow());
        Health { backend: self.0.backend, breaker: state, cause, threads, bytes, queue, warm_up }
    }

    /// Waits until the newest threads are in memory: from the source of truth, or, while that is away, from the local disk.
    /// Nobody has to: what is not there yet is loaded when it is read.
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
    /// later get [`ErrorKind::Closed`], and the queue's file can be opened by another process.
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
            self.0.report_accesses().await;
            self.0.drain().await;
        };
        let unfinished = tokio::select! {
            () = all_done => 0,
            () = tokio::time::sleep(deadline) => *self.0.writing.borrow(),
        };
        self.0.close_spool().await;
        Ok(Shutdown { unfinished, still_queued: self.0.pending.len() })
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

/// What a call to the origin does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Read,
    Write,
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

    /// Takes note of what a call to the origin says about it. That a file can be read does not mean that it can be
    /// written, so only a write ends the trouble with a file.
    fn note<T>(&self, call: Call, result: Result<T>) -> Result<T> {
        match &result {
            Ok(_) => {
                let mut trouble = self.trouble();
                let is_over = |error: &Error| call == Call::Write || error.kind() != ErrorKind::Local;
                if trouble.as_ref().is_some_and(is_over) {
                    tracing::info!("the source of truth works again");
                    *trouble = None;
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::Denied | ErrorKind::Schema | ErrorKind::Local) => {
                let mut trouble = self.trouble();
                if trouble.is_none() {
                    tracing::error!(error = %e, "the source of truth needs an operator");
                }
                *trouble = Some(e.clone());
            }
            Err(_) => {}
        }
        result
    }

    fn trouble(&self) -> MutexGuard<'_, Option<Error>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_reachable(&self) -> bool {
        self.origin.breaker().is_none_or(|breaker| breaker.state() == State::Closed)
    }
}
