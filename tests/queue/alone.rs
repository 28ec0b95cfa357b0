//! A daemon without competitors makes no dead letters of its own writes. This holds for any order of arrival of its requests,
//! and for a kill at any moment (I7, I10).

use std::future::IntoFuture;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use threadkeep::store::{
    Applied, Clock, ListPage, ListRequest, LoadRequest, Loaded, Memory, ResilientStore, Store, Write,
};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{Builder, Cache, ErrorKind, Key, OnOutage, Result, WriteOutcome};

use crate::{World, append, dead_letters, found, queued};

/// A limit above the duration of each step, so that no timeout affects a test.
const LONG_TIMEOUT: Duration = Duration::from_secs(30);
/// The interval between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

async fn wait_until(condition: impl Fn() -> bool) {
    let started = std::time::Instant::now();
    while !condition() {
        assert!(started.elapsed() < LONG_TIMEOUT, "timed out: the condition never holds");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// A network that can delay writes. The test decides when a delayed write arrives, even after its sender was killed.
#[derive(Debug)]
struct Network {
    store: Arc<Memory>,
    is_delaying: AtomicBool,
    delayed: Mutex<Vec<Write>>,
}

impl Network {
    fn to(store: &Arc<Memory>) -> Arc<Self> {
        Arc::new(Self { store: Arc::clone(store), is_delaying: false.into(), delayed: Mutex::default() })
    }

    fn delayed(&self) -> usize {
        self.delayed.lock().unwrap().len()
    }

    /// Delivers the delayed writes to the store.
    async fn deliver(&self) {
        self.is_delaying.store(false, SeqCst);
        let delayed = std::mem::take(&mut *self.delayed.lock().unwrap());
        for write in delayed {
            self.store.apply(&[write]).await.unwrap();
        }
    }
}

#[async_trait::async_trait]
impl Store for Network {
    fn clock(&self) -> &Arc<Clock> {
        self.store.clock()
    }
    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.store.load(requests).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        if self.is_delaying.load(SeqCst) {
            self.delayed.lock().unwrap().extend(writes.iter().cloned());
            std::future::pending::<()>().await;
        }
        self.store.apply(writes).await
    }
    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        self.store.list(page).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.store.touch(keys).await
    }
    async fn purge(&self, limit: usize) -> Result<usize> {
        self.store.purge(limit).await
    }
    async fn probe(&self) -> Result<()> {
        self.store.probe().await
    }
}

impl World {
    /// Makes a builder over a network. Its timeouts are long, so that only an error queues a write.
    fn builder_on(&mut self, network: &Arc<Network>) -> Builder {
        let faulty = FaultStore::new(Arc::clone(network));
        self.faults = faulty.faults();
        let builder = Cache::builder()
            .store(ResilientStore::new(faulty, LONG_TIMEOUT))
            .queue(self.dir.path().join("q.db"));
        builder.fresh_for(Duration::ZERO).soft_timeout(LONG_TIMEOUT).warmup_limit(0)
    }

    /// Runs the steps of a daemon and then kills it. No task of the daemon continues.
    fn run_and_kill<F: Future<Output = ()>>(
        &mut self,
        network: &Arc<Network>,
        steps: impl FnOnce(Cache, Faults) -> F,
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        runtime.block_on(async {
            let cache = self.builder_on(network).open().await.unwrap();
            steps(cache, self.faults.clone()).await;
        });
        runtime.shutdown_timeout(LONG_TIMEOUT);
    }

    /// Waits for the replay of the queue, and returns the stored value and the number of dead letters.
    async fn replay(&self, cache: &Cache) -> (Option<String>, u64) {
        self.faults.fail_replays(false);
        wait_until(|| queued(cache) == 0).await;
        (self.stored("k").await, dead_letters(cache))
    }
}

/// Queues an update by refusing its call to the store.
async fn queue_update(faults: &Faults, cache: &Cache, turn: i32) {
    queue_update_by(Fault::Refuse, faults, cache, turn).await;
}

/// Queues an update: each attempt meets `fault`, and each replay fails.
async fn queue_update_by(fault: Fault, faults: &Faults, cache: &Cache, turn: i32) {
    faults.fail_replays(true);
    let failing_update = |turns| {
        faults.script([fault, fault]);
        append(turn)(turns)
    };
    assert_eq!(cache.update("k", failing_update).await.unwrap(), WriteOutcome::Queued);
}

/// Runs a test on its own runtime, because each simulated process also has its own runtime.
fn block_on<F: Future>(test: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test)
}

/// Starts the next process after a stored update whose response was lost. Replay fails for now, and the warm-up loads the
/// stored update.
async fn open_with_warmup(world: &mut World, network: &Arc<Network>) -> Cache {
    let builder = world.builder_on(network).soft_timeout(Duration::from_millis(20)).warmup_limit(10);
    world.faults.fail_replays(true);
    let cache = builder.open().await.unwrap();
    assert_eq!(cache.warm().await.unwrap().conversations, 1);
    cache
}

fn store_update_with_lost_response(world: &mut World, network: &Arc<Network>) {
    world.run_and_kill(network, |cache, faults| async move {
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Stored);
        queue_update_by(Fault::DropResponse, &faults, &cache, 1).await;
    });
}

/// The schedule that `tests/kill` found under load:
///
/// 1. An update is stored and its response is lost. The update is in the queue when its process is killed.
/// 2. The warm-up of the next process loads the stored update before replay sends it.
/// 3. A second update builds on the loaded version and is stored directly.
/// 4. A third update is queued. It must not make a dead letter of the first update, which is still in the queue.
#[test]
fn stored_update_in_queue_survives_two_later_updates() {
    let mut world = World::new();
    let network = &Network::to(&world.store);
    store_update_with_lost_response(&mut world, network);
    block_on(async {
        let cache = open_with_warmup(&mut world, network).await;
        assert_eq!(cache.update("k", append(2)).await.unwrap(), WriteOutcome::Stored);
        queue_update(&world.faults, &cache, 3).await;
        assert_eq!(world.replay(&cache).await, (Some("[0,1,2,3]".into()), 0));
    });
}

/// The first update waits in the queue, although the store has it. Many later updates of the daemon come between.
#[test]
fn stored_update_in_queue_survives_many_later_updates() {
    let mut world = World::new();
    let network = &Network::to(&world.store);
    store_update_with_lost_response(&mut world, network);
    block_on(async {
        let cache = open_with_warmup(&mut world, network).await;
        for turn in 2..20 {
            assert_eq!(cache.update("k", append(turn)).await.unwrap(), WriteOutcome::Stored);
        }
        let (stored, letters) = world.replay(&cache).await;
        assert_eq!((stored.unwrap().matches(',').count(), letters), (19, 0));
    });
}

/// A put of a killed process arrives after the next process has read the conversation and queued an update of it.
#[test]
fn delayed_put_of_a_killed_process_makes_no_dead_letter() {
    let mut world = World::new();
    let network = &Network::to(&world.store);
    world.run_and_kill(network, |cache, _| async move {
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Stored);
        network.is_delaying.store(true, SeqCst);
        tokio::spawn(cache.put("k", &vec![9]).into_future());
        wait_until(|| network.delayed() == 1).await;
    });
    network.is_delaying.store(false, SeqCst);
    block_on(async {
        let cache = world.builder_on(network).open().await.unwrap();
        assert_eq!(found(&cache, "k").await.unwrap().0, "[0]");
        queue_update(&world.faults, &cache, 1).await;
        network.deliver().await;
        assert_eq!(world.stored("k").await.as_deref(), Some("[9]"), "the unacknowledged put is stored");
        assert_eq!(world.replay(&cache).await, (Some("[0,1]".into()), 0));
    });
}

/// An update of a killed process arrives after the next process has queued an update.
#[test]
fn delayed_update_of_a_killed_process_makes_no_dead_letter() {
    let mut world = World::new();
    let network = &Network::to(&world.store);
    world.run_and_kill(network, |cache, _| async move {
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Stored);
        network.is_delaying.store(true, SeqCst);
        tokio::spawn(async move { cache.update("k", append(9)).await });
        wait_until(|| network.delayed() == 1).await;
    });
    network.is_delaying.store(false, SeqCst);
    block_on(async {
        let cache = world.builder_on(network).soft_timeout(Duration::from_millis(20)).open().await.unwrap();
        assert_eq!(found(&cache, "k").await.unwrap().0, "[0]");
        queue_update(&world.faults, &cache, 1).await;
        network.deliver().await;
        assert_eq!(found(&cache, "k").await.unwrap().0, "[0,1]", "the queued update is the newest version");
        queue_update(&world.faults, &cache, 2).await;
        assert_eq!(world.replay(&cache).await, (Some("[0,1,2]".into()), 0));
    });
}

/// A put follows a queued update through the queue, although the store works. Then the process is killed.
#[test]
fn put_after_a_queued_update_is_queued_and_replaces_it() {
    for warmup_limit in [0, 10] {
        let mut world = World::new();
        let network = &Network::to(&world.store);
        world.run_and_kill(network, |cache, faults| async move {
            assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Stored);
            queue_update(&faults, &cache, 1).await;
            assert_eq!(cache.put("k", &vec![9]).await.unwrap(), WriteOutcome::Queued);
        });
        block_on(async {
            let builder = world.builder_on(network).warmup_limit(warmup_limit);
            world.faults.fail_replays(true);
            let cache = builder.open().await.unwrap();
            cache.warm().await.unwrap();
            assert_eq!(world.replay(&cache).await, (Some("[9]".into()), 0));
            assert_eq!(found(&cache, "k").await.unwrap().0, "[9]");
        });
    }
}

/// An update waits for a put of its conversation that is under way, and builds on it.
#[tokio::test]
async fn update_waits_for_a_put_under_way() {
    let mut world = World::new();
    let network = Network::to(&world.store);
    let cache = world.builder_on(&network).open().await.unwrap();
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Stored);
    let before = world.faults.calls("apply");
    world.faults.script([Fault::Delay(Duration::from_millis(500))]);
    let put = tokio::spawn(cache.put("k", &vec![9]).into_future());
    wait_until(|| world.faults.calls("apply") > before).await;
    queue_update(&world.faults, &cache, 1).await;
    assert_eq!(put.await.unwrap().unwrap(), WriteOutcome::Stored);
    assert_eq!(world.replay(&cache).await, (Some("[9,1]".into()), 0));
}

/// An update that lost against another daemon is a dead letter, even if this daemon writes again.
#[test]
fn update_that_lost_to_another_daemon_is_a_dead_letter() {
    let (mut world, mut other) = (World::new(), World::new());
    let network = &Network::to(&world.store);
    world.run_and_kill(network, |cache, faults| async move {
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Stored);
        queue_update(&faults, &cache, 1).await;
    });
    block_on(async {
        let second = other.builder_on(network).open().await.unwrap();
        assert_eq!(second.update("k", append(2)).await.unwrap(), WriteOutcome::Stored);
        let cache = open_with_warmup(&mut world, network).await;
        assert_eq!(cache.update("k", append(3)).await.unwrap(), WriteOutcome::Queued);
        assert_eq!(world.replay(&cache).await, (Some("[0,2,3]".into()), 1));
    });
}

/// Makes the next opening of the file the first one after a reboot: no own run leads over it.
fn reboot(world: &World) {
    let file = rusqlite::Connection::open(world.dir.path().join("q.db")).unwrap();
    assert_eq!(file.execute("delete from meta where name = 'writer'", []).unwrap(), 1);
}

/// The next process may not queue writes. A write that finds an update in the queue waits for it, and does not pass it (C2).
#[test]
fn rejecting_daemon_passes_no_queued_update() {
    let mut world = World::new();
    let network = &Network::to(&world.store);
    world.run_and_kill(network, |cache, faults| async move {
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Stored);
        queue_update(&faults, &cache, 1).await;
    });
    reboot(&world);
    block_on(async {
        let builder = world.builder_on(network).on_outage(OnOutage::Reject);
        world.faults.fail_replays(true);
        let cache = builder.soft_timeout(Duration::from_millis(50)).open().await.unwrap();
        let put = cache.put("k", &vec![9]).await.map_err(|error| error.kind());
        let update = cache.update("k", append(2)).await.map_err(|error| error.kind());
        assert_eq!((put, update), (Err(ErrorKind::Unavailable), Err(ErrorKind::Unavailable)));
        assert_eq!(world.replay(&cache).await, (Some("[0,1]".into()), 0));
        assert_eq!(cache.put("k", &vec![9]).await.unwrap(), WriteOutcome::Stored);
    });
}

/// The queue began with a row of the last boot, which replay has sent. A put that the full queue refuses goes to the store again.
#[test]
fn put_passes_a_full_queue_without_rows_of_the_last_boot() {
    let mut world = World::new();
    let network = &Network::to(&world.store);
    world.run_and_kill(network, |cache, faults| async move {
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Stored);
        queue_update(&faults, &cache, 1).await;
    });
    reboot(&world);
    block_on(async {
        let cache = world.builder_on(network).queue_max_bytes(3_000).open().await.unwrap();
        assert_eq!(world.replay(&cache).await, (Some("[0,1]".into()), 0));
        world.faults.fail_replays(true);
        // Always, because a call of a background task could take a single fault.
        world.faults.always(Fault::Fail(ErrorKind::Unauthorized));
        for key in ["k", "other"] {
            assert_eq!(cache.put(key, &"x".repeat(1_000)).await.unwrap(), WriteOutcome::Queued);
        }
        world.faults.always(Fault::Pass);
        assert_eq!(cache.put("k", &"y".repeat(2_000)).await.unwrap(), WriteOutcome::Stored);
        let (stored, letters) = world.replay(&cache).await;
        assert_eq!((stored.map(|stored| stored.starts_with("\"y")), letters), (Some(true), 0));
    });
}
