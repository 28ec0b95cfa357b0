//! A daemon that is alone with its conversations makes no dead letter of its own writes, whatever the order in which
//! its requests arrive, and whenever it is killed.

use std::future::IntoFuture;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{
    Applied, Builder, Cache, Clock, Durability, Guard, Key, Loaded, Memory, Page, Recent, Result, Store,
    Want, Write,
};

use super::{World, found, queued};

/// Longer than anything here takes, so that no limit decides a test.
const AMPLE: Duration = Duration::from_secs(30);
/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(5);

fn append(turn: i32) -> impl Fn(Option<Vec<i32>>) -> Result<Option<Vec<i32>>> {
    move |turns| Ok(Some([turns.unwrap_or_default(), vec![turn]].concat()))
}

fn letters(cache: &Cache) -> u64 {
    cache.health().queue.unwrap().dead_letters
}

async fn until(is_so: impl Fn() -> bool) {
    let began = std::time::Instant::now();
    while !is_so() {
        assert!(began.elapsed() < AMPLE, "it does not come about");
        tokio::time::sleep(LOOK).await;
    }
}

/// A network on which writes can be overdue: they arrive when the test says so, whatever became of their sender.
#[derive(Debug)]
struct Network {
    truth: Arc<Memory>,
    holds: AtomicBool,
    overdue: Mutex<Vec<Write>>,
}

impl Network {
    fn to(truth: &Arc<Memory>) -> Arc<Self> {
        Arc::new(Self { truth: Arc::clone(truth), holds: false.into(), overdue: Mutex::default() })
    }

    fn overdue(&self) -> usize {
        self.overdue.lock().unwrap().len()
    }

    /// The overdue writes arrive.
    async fn deliver(&self) {
        self.holds.store(false, SeqCst);
        let overdue = std::mem::take(&mut *self.overdue.lock().unwrap());
        for write in overdue {
            self.truth.apply(&[write]).await.unwrap();
        }
    }
}

#[async_trait::async_trait]
impl Store for Network {
    fn clock(&self) -> &Arc<Clock> {
        self.truth.clock()
    }
    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        self.truth.load(wants).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        if self.holds.load(SeqCst) {
            self.overdue.lock().unwrap().extend(writes.iter().cloned());
            std::future::pending::<()>().await;
        }
        self.truth.apply(writes).await
    }
    async fn recent(&self, page: &Page) -> Result<Recent> {
        self.truth.recent(page).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.truth.touch(keys).await
    }
    async fn purge(&self, most: usize) -> Result<usize> {
        self.truth.purge(most).await
    }
    async fn probe(&self) -> Result<()> {
        self.truth.probe().await
    }
}

impl World {
    /// A daemon on a network, patient enough that only an error sends a write into the queue.
    fn on(&mut self, network: &Arc<Network>) -> Builder {
        let faulty = Faulty::new(Arc::clone(network));
        self.faults = faulty.faults();
        let builder = Cache::builder().store(Guard::new(faulty, AMPLE)).queue(self.dir.path().join("q.db"));
        builder.fresh_for(Duration::ZERO).patience(AMPLE).warm_threads(0)
    }

    /// A daemon that lives as `life` says, and is killed then: nothing of it runs on.
    fn live_and_die<F: Future<Output = ()>>(
        &mut self,
        network: &Arc<Network>,
        life: impl FnOnce(Cache, Faults) -> F,
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        runtime.block_on(async {
            let cache = self.on(network).open().await.unwrap();
            life(cache, self.faults.clone()).await;
        });
        runtime.shutdown_timeout(AMPLE);
    }

    /// Lets it replay, and says what is stored then, and how many dead letters there are.
    async fn settle(&self, cache: &Cache) -> (Option<String>, u64) {
        self.faults.fail_trials(false);
        until(|| queued(cache) == 0).await;
        (self.stored("k").await, letters(cache))
    }
}

/// An update that the source of truth does not take, so that it waits in the queue.
async fn queue(faults: &Faults, cache: &Cache, turn: i32) {
    queue_by(Fault::Refuse, faults, cache, turn).await;
}

/// An update that is queued because each try at it meets this fault, and replay another one.
async fn queue_by(fault: Fault, faults: &Faults, cache: &Cache, turn: i32) {
    faults.fail_trials(true);
    let meets_it = |turns| {
        faults.script([fault, fault]);
        append(turn)(turns)
    };
    assert_eq!(cache.update("k", meets_it).await.unwrap(), Durability::Queued);
}

/// A runtime of its own for each process, and this thread for the test.
fn block_on<F: Future>(test: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test)
}

/// The next process on the file of one whose update is stored, though its answer was lost: replay fails as yet, and the
/// warm-up has found the update stored.
async fn warmed_beside_what_is_stored(world: &mut World, network: &Arc<Network>) -> Cache {
    let builder = world.on(network).patience(Duration::from_millis(20)).warm_threads(10);
    world.faults.fail_trials(true);
    let cache = builder.open().await.unwrap();
    assert_eq!(cache.warm().await.unwrap().threads, 1);
    cache
}

fn store_and_lose_the_answer(world: &mut World, network: &Arc<Network>) {
    world.live_and_die(network, |cache, faults| async move {
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Stored);
        queue_by(Fault::LoseAnswer, &faults, &cache, 1).await;
    });
}

/// The schedule that `tests/kill` met under load. An update is stored, its answer is lost, and it waits in the queue when its
/// process is killed. The warm-up of the next process finds it stored, before it is replayed. An update goes on from it,
/// past the queue, and the next one has to be queued: that found the first one still in the queue, older than what it goes
/// on from, and buried it.
#[test]
fn an_update_found_stored_is_no_dead_letter_of_the_update_after_next() {
    let mut world = World::new();
    let network = &Network::to(&world.truth);
    store_and_lose_the_answer(&mut world, network);
    block_on(async {
        let cache = warmed_beside_what_is_stored(&mut world, network).await;
        assert_eq!(cache.update("k", append(2)).await.unwrap(), Durability::Stored);
        queue(&world.faults, &cache, 3).await;
        assert_eq!(world.settle(&cache).await, (Some("[0,1,2,3]".into()), 0));
    });
}

/// As above, and the updates past the queue are so many that the store has forgotten the first one.
#[test]
fn an_update_found_stored_is_no_dead_letter_however_many_follow() {
    let mut world = World::new();
    let network = &Network::to(&world.truth);
    store_and_lose_the_answer(&mut world, network);
    block_on(async {
        let cache = warmed_beside_what_is_stored(&mut world, network).await;
        for turn in 2..20 {
            assert_eq!(cache.update("k", append(turn)).await.unwrap(), Durability::Stored);
        }
        let (stored, letters) = world.settle(&cache).await;
        assert_eq!((stored.unwrap().matches(',').count(), letters), (19, 0));
    });
}

/// A put of the process that was killed arrives after the next process has read the thread, and queued an update of it.
#[test]
fn an_overdue_put_of_a_killed_process_makes_no_dead_letter() {
    let mut world = World::new();
    let network = &Network::to(&world.truth);
    world.live_and_die(network, |cache, _| async move {
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Stored);
        network.holds.store(true, SeqCst);
        tokio::spawn(cache.put("k", &vec![9]).into_future());
        until(|| network.overdue() == 1).await;
    });
    network.holds.store(false, SeqCst);
    block_on(async {
        let cache = world.on(network).open().await.unwrap();
        assert_eq!(found(&cache, "k").await.unwrap().0, "[0]");
        queue(&world.faults, &cache, 1).await;
        network.deliver().await;
        assert_eq!(world.stored("k").await.as_deref(), Some("[9]"), "nobody was told of it");
        assert_eq!(world.settle(&cache).await, (Some("[0,1]".into()), 0));
    });
}

/// An update of the process that was killed arrives so late.
#[test]
fn an_overdue_update_of_a_killed_process_makes_no_dead_letter() {
    let mut world = World::new();
    let network = &Network::to(&world.truth);
    world.live_and_die(network, |cache, _| async move {
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Stored);
        network.holds.store(true, SeqCst);
        tokio::spawn(async move { cache.update("k", append(9)).await });
        until(|| network.overdue() == 1).await;
    });
    network.holds.store(false, SeqCst);
    block_on(async {
        let cache = world.on(network).patience(Duration::from_millis(20)).open().await.unwrap();
        assert_eq!(found(&cache, "k").await.unwrap().0, "[0]");
        queue(&world.faults, &cache, 1).await;
        network.deliver().await;
        assert_eq!(found(&cache, "k").await.unwrap().0, "[0,1]", "the queued one is the newest");
        queue(&world.faults, &cache, 2).await;
        assert_eq!(world.settle(&cache).await, (Some("[0,1,2]".into()), 0));
    });
}

/// A put is sent past a queued update; the process is killed before it hears that the put was stored.
#[test]
fn an_unheard_put_past_a_queued_update_makes_no_dead_letter() {
    for warm_threads in [0, 10] {
        let mut world = World::new();
        let network = &Network::to(&world.truth);
        world.live_and_die(network, |cache, faults| async move {
            assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Stored);
            queue(&faults, &cache, 1).await;
            network.holds.store(true, SeqCst);
            tokio::spawn(cache.put("k", &vec![9]).into_future());
            until(|| network.overdue() == 1).await;
        });
        block_on(async {
            network.deliver().await;
            let builder = world.on(network).warm_threads(warm_threads);
            world.faults.fail_trials(true);
            let cache = builder.open().await.unwrap();
            cache.warm().await.unwrap();
            assert_eq!(world.settle(&cache).await, (Some("[9]".into()), 0));
            assert_eq!(found(&cache, "k").await.unwrap().0, "[9]");
        });
    }
}

/// A put is stamped before an update that is queued, and carried out after it.
#[tokio::test]
async fn a_put_that_is_stored_while_a_newer_update_waits_makes_no_dead_letter() {
    let mut world = World::new();
    let network = Network::to(&world.truth);
    let cache = world.on(&network).open().await.unwrap();
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Stored);
    let before = world.faults.calls("apply");
    world.faults.script([Fault::Delay(Duration::from_millis(500))]);
    let put = tokio::spawn(cache.put("k", &vec![9]).into_future());
    until(|| world.faults.calls("apply") > before).await;
    queue(&world.faults, &cache, 1).await;
    assert_eq!(put.await.unwrap().unwrap(), Durability::Stored);
    assert_eq!(world.settle(&cache).await, (Some("[0,1]".into()), 0));
}

/// What lost against another daemon stays a dead letter, though this one has written more since.
#[test]
fn an_update_that_lost_against_another_daemon_is_a_dead_letter_whatever_follows() {
    let (mut world, mut other) = (World::new(), World::new());
    let network = &Network::to(&world.truth);
    world.live_and_die(network, |cache, faults| async move {
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Stored);
        queue(&faults, &cache, 1).await;
    });
    block_on(async {
        let second = other.on(network).open().await.unwrap();
        assert_eq!(second.update("k", append(2)).await.unwrap(), Durability::Stored);
        let cache = warmed_beside_what_is_stored(&mut world, network).await;
        assert_eq!(cache.update("k", append(3)).await.unwrap(), Durability::Stored);
        assert_eq!(world.settle(&cache).await, (Some("[0,2,3]".into()), 1));
    });
}
