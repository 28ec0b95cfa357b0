//! A steady load that does not slow down when answers do: each call is a task of its own, begun by the clock.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use threadkeep::{Cache, Durability, Freshness};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

/// Threads that this daemon knows. The first half of them is also written.
pub const KNOWN: Threads = ("known", 600);
/// Threads that only another daemon has had: each is read once.
pub const STRANGERS: Threads = ("stranger", 1_500);
/// One read each; every fifth time a write, and every fiftieth a read of a stranger, comes with it.
const TICK: Duration = Duration::from_millis(2);
const VALUE_BYTES: usize = 1_000;

pub type Threads = (&'static str, usize);

/// How one call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Fresh,
    Queued,
    Stale,
    Failed,
}

/// One call: when it was begun, and how long it took.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub begun: Instant,
    pub took: Duration,
    pub is_read: bool,
    pub end: End,
}

pub struct Load {
    calls: Arc<Mutex<Vec<Call>>>,
    ticks: tokio::task::JoinHandle<JoinSet<()>>,
    stop: tokio::sync::watch::Sender<bool>,
}

pub async fn seed(cache: &Cache, (name, count): Threads) {
    for at in 0..count {
        let _ = cache.put(format!("{name}-{at}"), &"x".repeat(VALUE_BYTES)).await.unwrap();
    }
}

impl Load {
    pub fn begin(cache: &Cache) -> Self {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let calls = Arc::<Mutex<Vec<Call>>>::default();
        let ticks = tokio::spawn(tick(cache.clone(), Arc::clone(&calls), stopped));
        Self { calls, ticks, stop }
    }

    /// The calls that ended since this was asked last.
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
        let mut spawn = |call: fn(Cache, String) -> Ending, thread: String| {
            let (cache, calls) = (cache.clone(), Arc::clone(&calls));
            tasks.spawn(async move {
                let begun = Instant::now();
                let (is_read, end) = call(cache, thread).await;
                calls.lock().unwrap().push(Call { begun, took: begun.elapsed(), is_read, end });
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

type Ending = std::pin::Pin<Box<dyn Future<Output = (bool, End)> + Send>>;

fn read(cache: Cache, thread: String) -> Ending {
    Box::pin(async move {
        let end = match cache.get(&thread).await {
            Ok(Some(found)) => match found.freshness() {
                Freshness::Fresh => End::Fresh,
                Freshness::Queued => End::Queued,
                _ => End::Stale,
            },
            // That would be a thread lost, or an outage taken for absence.
            Ok(None) => panic!("{thread} is gone"),
            Err(error) if error.is_outage() => End::Failed,
            Err(error) => panic!("{error}"),
        };
        (true, end)
    })
}

fn write(cache: Cache, thread: String) -> Ending {
    Box::pin(async move {
        let end = match cache.put(&thread, &"y".repeat(VALUE_BYTES)).await {
            Ok(Durability::Queued) => End::Queued,
            Ok(_) => End::Fresh,
            Err(error) => panic!("a write was not taken: {error}"),
        };
        (false, end)
    })
}
