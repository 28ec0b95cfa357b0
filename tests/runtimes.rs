//! Runtimes that stand still between two requests, and runtimes that end before the cache does.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::future::{Future, IntoFuture};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{
    Batched, Builder, Cache, Durability, ErrorKind, Freshness, Guard, Key, Loaded, Memory, Queue, State,
    Store, Want,
};
use tokio::runtime::Runtime;

const SECOND: Duration = Duration::from_secs(1);

fn of_one_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn with_workers() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Waits without any runtime: nothing of the caller's is polled meanwhile.
fn comes_true(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < 60 * SECOND, "this never came true: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a daemon holds, whose requests are carried out on one runtime after the other.
struct World {
    truth: Arc<Memory>,
    faults: Faults,
    dir: tempfile::TempDir,
    next: Box<dyn Fn() -> Option<Runtime>>,
    runtime: Runtime,
}

impl World {
    fn new(next: impl Fn() -> Option<Runtime> + 'static, first: Runtime) -> (Self, Builder) {
        let truth = Arc::new(Memory::new());
        let faulty = Faulty::new(Arc::clone(&truth));
        let faults = faulty.faults();
        let dir = tempfile::tempdir().unwrap();
        let _on_it = first.enter();
        let store = Batched::new(Guard::new(faulty, SECOND / 5));
        let builder = Cache::builder().store(store).queue(dir.path().join("q.db")).fresh_for(Duration::ZERO);
        (Self { truth, faults, dir, next: Box::new(next), runtime: first }, builder)
    }

    /// One request, after which nobody polls anything.
    fn request<T>(&mut self, request: impl Future<Output = T>) -> T {
        let result = self.runtime.block_on(request);
        if let Some(next) = (self.next)() {
            self.runtime = next;
        }
        result
    }

    fn stored(&self, key: &str) -> Option<String> {
        let wants = [Want::from(Key::new(key).unwrap())];
        let loaded = futures::executor::block_on(self.truth.load(&wants)).unwrap().pop().unwrap();
        match loaded {
            Loaded::Found(record) => record.value.as_ref().map(|value| value.as_str().to_owned()),
            _ => None,
        }
    }
}

fn queue(cache: &Cache) -> Queue {
    cache.health().queue.unwrap()
}

/// An outage, and its end, of which only the work in the background can hear.
fn an_outage_ends_without_requests(world: &mut World, builder: Builder) {
    let cache = world.request(builder.open()).unwrap();
    assert!(world.dir.path().join("q.db").exists());
    for round in 0..3 {
        let key = format!("t{round}");
        assert_eq!(world.request(cache.put(&key, "before").into_future()).unwrap(), Durability::Stored);
        world.faults.always(Fault::Refuse);
        assert_eq!(world.request(cache.put(&key, "during").into_future()).unwrap(), Durability::Queued);
        for at in 0..20 {
            let _ = world.request(cache.get(format!("nobody {at}")));
        }
        assert_ne!(cache.health().breaker, Some(State::Closed));
        let found = world.request(cache.get(&key)).unwrap().unwrap();
        assert_eq!((found.json(), found.freshness()), ("\"during\"", Freshness::Queued));
        world.faults.heal();
        comes_true("the breaker closes", || cache.health().breaker == Some(State::Closed));
        comes_true("the queue is replayed", || queue(&cache).records == 0);
        assert_eq!(world.stored(&key).as_deref(), Some("\"during\""));
        let found = world.request(cache.get(&key)).unwrap().unwrap();
        assert_eq!((found.json(), found.freshness()), ("\"during\"", Freshness::Fresh));
        let update = cache.update(&key, |now: Option<String>| Ok(now.map(|now| now + " and after")));
        assert_eq!(world.request(update.into_future()).unwrap(), Durability::Stored);
    }
    let shutdown = world.request(cache.shutdown(30 * SECOND)).unwrap();
    assert_eq!((shutdown.unfinished, shutdown.still_queued), (0, 0));
}

#[test]
fn an_outage_ends_while_a_runtime_of_one_thread_stands_still() {
    let (mut world, builder) = World::new(|| None, of_one_thread());
    an_outage_ends_without_requests(&mut world, builder);
}

#[test]
fn an_outage_ends_when_each_request_has_a_runtime_of_its_own() {
    for make in [of_one_thread, with_workers] {
        let (mut world, builder) = World::new(move || Some(make()), make());
        an_outage_ends_without_requests(&mut world, builder);
    }
}

/// It was away when the cache was opened, so that the first contact is the probe's.
#[test]
fn a_first_contact_is_made_while_the_runtime_stands_still() {
    let (mut world, builder) = World::new(|| Some(of_one_thread()), of_one_thread());
    world.faults.always(Fault::Refuse);
    let cache = world.request(builder.open()).unwrap();
    for at in 0..20 {
        let _ = world.request(cache.get(format!("nobody {at}")));
    }
    assert_eq!(world.request(cache.put("t", &1).into_future()).unwrap(), Durability::Queued);
    world.faults.heal();
    comes_true("the queue is replayed", || queue(&cache).records == 0);
    assert_eq!(world.stored("t").as_deref(), Some("1"));
}

#[test]
fn a_load_that_is_slow_goes_on_while_the_runtime_stands_still() {
    let (mut world, builder) = World::new(|| None, of_one_thread());
    let cache = world.request(builder.fresh_for(60 * SECOND).open()).unwrap();
    let _ = world.request(cache.put("t", &1).into_future()).unwrap();
    cache.evict("t").unwrap();
    world.faults.script([Fault::Delay(SECOND / 20)]);
    let get = cache.get("t");
    // The caller gives up.
    world.request(async { tokio::time::timeout(Duration::from_millis(1), get).await.ok() });
    comes_true("the thread comes into memory", || cache.health().threads == 1);
    let listed = world.request(cache.list("nobody").into_future()).unwrap();
    assert!(listed.is_empty());
}

fn open_local(path: &Path, runtime: &Runtime) -> Cache {
    runtime.block_on(Cache::builder().local(path).open()).unwrap()
}

#[test]
fn a_local_file_outlives_the_runtimes_of_its_callers() {
    let dir = tempfile::tempdir().unwrap();
    for make in [of_one_thread, with_workers] {
        let cache = open_local(&dir.path().join("t.db"), &make());
        for round in 0..5 {
            let runtime = make();
            let put = cache.put("t", &round).user("u").into_future();
            assert_eq!(runtime.block_on(put).unwrap(), Durability::Stored);
            drop(runtime);
            let runtime = make();
            assert_eq!(runtime.block_on(cache.get("t")).unwrap().unwrap().json(), round.to_string());
            let listed = runtime.block_on(cache.list("u").into_future()).unwrap();
            assert_eq!(listed.len(), 1);
        }
        make().block_on(cache.shutdown(30 * SECOND)).unwrap();
        assert_eq!(make().block_on(cache.get("t")).unwrap_err().kind(), ErrorKind::Closed);
    }
}

/// Lanes whose runtime ends under them hand on what waits.
#[test]
fn a_batch_goes_on_when_the_runtime_ends_on_which_others_were_sent() {
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    let store = Arc::new(Batched::new(faulty));
    faults.always(Fault::Hang);
    let (first, second) = (with_workers(), with_workers());
    let load = |store: &Arc<Batched<_>>, at: usize| {
        let store = Arc::clone(store);
        async move { store.load(&[Want::from(Key::new(format!("t{at}")).unwrap())]).await }
    };
    let lost: Vec<_> = (0..4).map(|at| first.spawn(load(&store, at))).collect();
    comes_true("all lanes are taken", || faults.calls("load") == 4);
    let waiting: Vec<_> = (4..40).map(|at| second.spawn(load(&store, at))).collect();
    second.block_on(async { tokio::task::yield_now().await });
    first.shutdown_timeout(SECOND);
    faults.heal();
    for load in waiting {
        let waited = second.block_on(async { tokio::time::timeout(60 * SECOND, load).await });
        let answer = waited.unwrap().unwrap();
        assert!(answer.is_ok() || answer.unwrap_err().is_outage());
    }
    assert!(lost.iter().all(tokio::task::JoinHandle::is_finished));
}
