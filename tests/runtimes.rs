//! Runtimes that stand still between two requests, and runtimes that end before the cache ends.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::future::{Future, IntoFuture};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use threadkeep::store::{BatchingStore, LoadRequest, Loaded, Memory, ResilientStore, Store, Supabase};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{BreakerState, Builder, Cache, ErrorKind, Freshness, Key, QueueHealth, WriteOutcome};
use tokio::runtime::Runtime;

const SECOND: Duration = Duration::from_secs(1);

fn current_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn multi_thread() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// Waits without a runtime, so that no task of the caller is polled during the wait.
fn wait_until(event: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < 60 * SECOND, "timed out: {event}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A daemon that runs each request on the next runtime.
struct World {
    store: Arc<Memory>,
    faults: Faults,
    dir: tempfile::TempDir,
    next: Box<dyn Fn() -> Option<Runtime>>,
    runtime: Runtime,
}

impl World {
    fn new(next: impl Fn() -> Option<Runtime> + 'static, first: Runtime) -> (Self, Builder) {
        let store = Arc::new(Memory::new());
        let faulty = FaultStore::new(Arc::clone(&store));
        let faults = faulty.faults();
        let dir = tempfile::tempdir().unwrap();
        let _context = first.enter();
        let batching = BatchingStore::new(ResilientStore::new(faulty, SECOND / 5));
        let builder =
            Cache::builder().store(batching).queue(dir.path().join("q.db")).fresh_for(Duration::ZERO);
        (Self { store, faults, dir, next: Box::new(next), runtime: first }, builder)
    }

    /// Runs one request. After it, no task on the runtime is polled.
    fn run<T>(&mut self, request: impl Future<Output = T>) -> T {
        let result = self.runtime.block_on(request);
        if let Some(next) = (self.next)() {
            self.runtime = next;
        }
        result
    }

    fn stored(&self, key: &str) -> Option<String> {
        let requests = [LoadRequest::from(Key::new(key).unwrap())];
        let loaded = futures::executor::block_on(self.store.load(&requests)).unwrap().pop().unwrap();
        match loaded {
            Loaded::Found(record) => record.value.as_ref().map(|value| value.as_str().to_owned()),
            _ => None,
        }
    }
}

fn queue(cache: &Cache) -> QueueHealth {
    cache.health().queue.unwrap()
}

/// Starts and ends outages. Only background work of the cache can notice the end.
fn check_outages_end_without_requests(world: &mut World, builder: Builder) {
    let cache = world.run(builder.open()).unwrap();
    assert!(world.dir.path().join("q.db").exists());
    for round in 0..3 {
        let key = format!("t{round}");
        assert_eq!(world.run(cache.put(&key, "before").into_future()).unwrap(), WriteOutcome::Stored);
        world.faults.always(Fault::Refuse);
        assert_eq!(world.run(cache.put(&key, "during").into_future()).unwrap(), WriteOutcome::Queued);
        for at in 0..20 {
            let _ = world.run(cache.get(format!("unknown {at}")));
        }
        assert_ne!(cache.health().breaker, Some(BreakerState::Closed));
        let found = world.run(cache.get(&key)).unwrap().unwrap();
        assert_eq!((found.json(), found.freshness()), ("\"during\"", Freshness::Queued));
        world.faults.clear();
        wait_until("the breaker closes", || cache.health().breaker == Some(BreakerState::Closed));
        wait_until("the queue is replayed", || queue(&cache).records == 0);
        assert_eq!(world.stored(&key).as_deref(), Some("\"during\""));
        let found = world.run(cache.get(&key)).unwrap().unwrap();
        assert_eq!((found.json(), found.freshness()), ("\"during\"", Freshness::Fresh));
        let update = cache.update(&key, |now: Option<String>| Ok(now.map(|now| now + " and after")));
        assert_eq!(world.run(update.into_future()).unwrap(), WriteOutcome::Stored);
    }
    let shutdown = world.run(cache.shutdown(30 * SECOND)).unwrap();
    assert_eq!((shutdown.unfinished, shutdown.still_queued), (0, 0));
}

#[test]
fn outage_ends_while_a_current_thread_runtime_stands_still() {
    let (mut world, builder) = World::new(|| None, current_thread());
    check_outages_end_without_requests(&mut world, builder);
}

#[test]
fn outage_ends_with_a_separate_runtime_for_each_request() {
    for make in [current_thread, multi_thread] {
        let (mut world, builder) = World::new(move || Some(make()), make());
        check_outages_end_without_requests(&mut world, builder);
    }
}

/// The store is unavailable when the cache opens, so the probe makes the first contact.
#[test]
fn first_contact_succeeds_while_the_runtime_stands_still() {
    let (mut world, builder) = World::new(|| Some(current_thread()), current_thread());
    world.faults.always(Fault::Refuse);
    let cache = world.run(builder.open()).unwrap();
    for at in 0..20 {
        let _ = world.run(cache.get(format!("unknown {at}")));
    }
    assert_eq!(world.run(cache.put("t", &1).into_future()).unwrap(), WriteOutcome::Queued);
    world.faults.clear();
    wait_until("the queue is replayed", || queue(&cache).records == 0);
    assert_eq!(world.stored("t").as_deref(), Some("1"));
}

#[test]
fn slow_load_completes_while_the_runtime_stands_still() {
    let (mut world, builder) = World::new(|| None, current_thread());
    let cache = world.run(builder.fresh_for(60 * SECOND).open()).unwrap();
    world.run(cache.put("t", &1).into_future()).unwrap();
    cache.evict("t").unwrap();
    world.faults.script([Fault::Delay(SECOND / 20)]);
    let get = cache.get("t");
    // The caller drops the get before the load ends.
    world.run(async { tokio::time::timeout(Duration::from_millis(1), get).await.ok() });
    wait_until("the conversation is in memory", || cache.health().conversations == 1);
    let listed = world.run(cache.list("unknown").into_future()).unwrap();
    assert!(listed.is_empty());
}

fn open_local(path: &Path, runtime: &Runtime) -> Cache {
    runtime.block_on(Cache::builder().local(path).open()).unwrap()
}

#[test]
fn local_file_works_after_the_runtimes_of_its_callers_end() {
    let dir = tempfile::tempdir().unwrap();
    for make in [current_thread, multi_thread] {
        let cache = open_local(&dir.path().join("t.db"), &make());
        for round in 0..5 {
            let runtime = make();
            let put = cache.put("t", &round).user("u").into_future();
            assert_eq!(runtime.block_on(put).unwrap(), WriteOutcome::Stored);
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

/// A dispatch slot whose runtime ends passes the waiting calls to another task.
#[test]
fn batch_continues_after_the_runtime_of_its_slots_ends() {
    let faulty = FaultStore::new(Memory::new());
    let faults = faulty.faults();
    let store = Arc::new(BatchingStore::new(faulty));
    faults.always(Fault::Hang);
    let (first, second) = (multi_thread(), multi_thread());
    let load = |store: &Arc<BatchingStore<_>>, at: usize| {
        let store = Arc::clone(store);
        async move { store.load(&[LoadRequest::from(Key::new(format!("t{at}")).unwrap())]).await }
    };
    let lost: Vec<_> = (0..4).map(|at| first.spawn(load(&store, at))).collect();
    wait_until("all slots are busy", || faults.calls("load") == 4);
    let waiting: Vec<_> = (4..40).map(|at| second.spawn(load(&store, at))).collect();
    second.block_on(async { tokio::task::yield_now().await });
    first.shutdown_timeout(SECOND);
    faults.clear();
    for load in waiting {
        let waited = second.block_on(async { tokio::time::timeout(60 * SECOND, load).await });
        let result = waited.unwrap().unwrap();
        assert!(result.is_ok() || result.unwrap_err().is_outage());
    }
    assert!(lost.iter().all(tokio::task::JoinHandle::is_finished));
}

#[test]
fn request_is_sent_while_the_application_fills_the_blocking_pool() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().max_blocking_threads(1).enable_all().build().unwrap();
    let listener = std::net::TcpListener::bind("localhost:0").unwrap();
    let url = format!("http://localhost:{}", listener.local_addr().unwrap().port());
    let ((release, occupied), (send, connected)) =
        (std::sync::mpsc::channel::<()>(), std::sync::mpsc::channel());
    std::thread::spawn(move || send.send(listener.accept().is_ok()));
    runtime.spawn_blocking(move || occupied.recv());
    let call = runtime.spawn(async move { Supabase::new(&url, "sb_secret_x").unwrap().probe().await });
    assert_eq!(connected.recv_timeout(60 * SECOND), Ok(true));
    call.abort();
    drop(release);
}
