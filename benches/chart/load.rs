//! A steady load. Each call is a task of its own and starts by the clock, so that slow responses do not slow the load.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use threadkeep::{Cache, Freshness, WriteOutcome};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

/// Conversations that this daemon has read. The load also writes the first half of them.
pub const KNOWN: Group = ("known", 600);
/// Conversations that only another daemon has read. The load reads each of them once.
pub const STRANGERS: Group = ("stranger", 1_500);
/// Interval of the reads. Every fifth tick adds a write, and every fiftieth a read of a stranger.
const TICK: Duration = Duration::from_millis(2);
const VALUE_BYTES: usize = 1_000;

/// Name prefix and number of conversations.
pub type Group = (&'static str, usize);

/// The outcome of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallOutcome {
    Fresh,
    Queued,
    Stale,
    Failed,
}

/// One call of the load.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub started: Instant,
    pub took: Duration,
    pub is_read: bool,
    pub outcome: CallOutcome,
}

pub struct Load {
    calls: Arc<Mutex<Vec<Call>>>,
    ticks: tokio::task::JoinHandle<JoinSet<()>>,
    stop: tokio::sync::watch::Sender<bool>,
}

pub async fn seed(cache: &Cache, (name, count): Group) {
    for at in 0..count {
        cache.put(format!("{name}-{at}"), &"x".repeat(VALUE_BYTES)).await.unwrap();
    }
}

impl Load {
    pub fn begin(cache: &Cache) -> Self {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let calls = Arc::<Mutex<Vec<Call>>>::default();
        let ticks = tokio::spawn(tick(cache.clone(), Arc::clone(&calls), stopped));
        Self { calls, ticks, stop }
    }

    /// Returns the calls that ended since the last call of this function.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    pub async fn end(self) {
        self.stop.send_replace(true);
        self.ticks.await.unwrap().join_all().await;
    }
}

async fn tick(
    cache: Cache,
    calls: Arc<Mutex<Vec<Call>>>,
    stopped: tokio::sync::watch::Receiver<bool>,
) -> JoinSet<()> {
    static STRANGER: AtomicUsize = AtomicUsize::new(0);
    let mut tasks = JoinSet::new();
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for tick in 0_u64.. {
        ticks.tick().await;
        if *stopped.borrow() {
            break;
        }
        while tasks.try_join_next().is_some() {}
        let mut spawn = |call: fn(Cache, String) -> CallFuture, thread_id: String| {
            let (cache, calls) = (cache.clone(), Arc::clone(&calls));
            tasks.spawn(async move {
                let started = Instant::now();
                let (is_read, outcome) = call(cache, thread_id).await;
                calls.lock().unwrap().push(Call { started, took: started.elapsed(), is_read, outcome });
            });
        };
        spawn(read, format!("known-{}", fastrand::usize(..KNOWN.1)));
        if tick % 5 == 0 {
            spawn(write, format!("known-{}", fastrand::usize(..KNOWN.1 / 2)));
        }
        if tick % 50 == 0 {
            spawn(read, format!("stranger-{}", STRANGER.fetch_add(1, Relaxed) % STRANGERS.1));
        }
    }
    tasks
}

type CallFuture = std::pin::Pin<Box<dyn Future<Output = (bool, CallOutcome)> + Send>>;

fn read(cache: Cache, thread_id: String) -> CallFuture {
    Box::pin(async move {
        let outcome = match cache.get(&thread_id).await {
            Ok(Some(found)) => match found.freshness() {
                Freshness::Fresh => CallOutcome::Fresh,
                Freshness::Queued => CallOutcome::Queued,
                _ => CallOutcome::Stale,
            },
            // The cache has lost a conversation, or reports an outage as absence (I14).
            Ok(None) => panic!("{thread_id} is absent"),
            Err(error) if error.is_outage() => CallOutcome::Failed,
            Err(error) => panic!("{error}"),
        };
        (true, outcome)
    })
}

fn write(cache: Cache, thread_id: String) -> CallFuture {
    Box::pin(async move {
        let outcome = match cache.put(&thread_id, &"y".repeat(VALUE_BYTES)).await {
            Ok(WriteOutcome::Queued) => CallOutcome::Queued,
            Ok(_) => CallOutcome::Fresh,
            Err(error) => panic!("a put failed: {error}"),
        };
        (false, outcome)
    })
}
