//! What memory costs: a hit allocates nothing beyond moka's own; and what a thread takes that the warm-up brought in.
//!
//! `allocation_counter` is the allocator here, and counts what the thread of a test does. Its runtime is on that thread,
//! too: while hits are counted it stands still, so that a get that were no hit would not come back. The tests take turns,
//! since moka leaves what it drops to whichever thread comes by (crossbeam-epoch).
//!
//! `cargo test --all-features --test allocations -- --nocapture` prints the numbers.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used)]

mod shelf;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use allocation_counter::measure;
use futures::executor::block_on;
use metrics_exporter_prometheus::PrometheusBuilder;
use moka::policy::EvictionPolicy;
use shelf::{Shelf, thread};
use threadkeep::testing::{Fault, Faulty};
use threadkeep::{Cache, Freshness, Guard, Memory};
use tokio::runtime::Runtime;

const THREADS: usize = 500;
const GETS: usize = 20_000;
/// Moka allocates where it keeps house, every 64 gets and every now and then: so many more times may it have come to that.
const LEEWAY: u64 = GETS as u64 / 100;
const KIB: usize = 1024;
const WARMED: usize = 20_000;

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn runtime() -> Runtime {
    // What the background does is counted, too.
    threadkeep::testing::stay_on_this_thread();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn value() -> String {
    "x".repeat(KIB)
}

async fn put_all(cache: &Cache) {
    for at in 0..THREADS {
        let _ = cache.put(thread(at), &value()).await.unwrap();
    }
}

/// How often memory is allocated in so many gets, after as many that are not counted.
fn allocations(get: impl AsyncFn(&str)) -> u64 {
    let keys: Vec<String> = (0..THREADS).map(thread).collect();
    let get_all = || {
        block_on(async {
            for turn in 0..GETS {
                get(&keys[turn % THREADS]).await;
            }
        });
    };
    get_all();
    measure(get_all).count_total
}

/// What two mokas allocate for themselves in as many gets, of the hasher and the policy that the cache has: `sync`, as in the
/// cache, and `future`, whose housekeeping takes more.
fn of_moka() -> (u64, u64) {
    type Value = Arc<str>;
    let weigh = |_: &String, value: &Value| value.len() as u32;
    let (lru, hasher) = (EvictionPolicy::lru, foldhash::fast::RandomState::default);
    let sync = moka::sync::Cache::builder().max_capacity(1 << 30).weigher(weigh).eviction_policy(lru());
    let sync = sync.build_with_hasher(hasher());
    let future = moka::future::Cache::builder().max_capacity(1 << 30).weigher(weigh).eviction_policy(lru());
    let future = future.build_with_hasher(hasher());
    for at in 0..THREADS {
        sync.insert(thread(at), Value::from(value()));
        block_on(future.insert(thread(at), Value::from(value())));
    }
    let of_sync = allocations(async |key| assert!(sync.get(key).is_some()));
    (of_sync, allocations(async |key| assert!(future.get(key).await.is_some())))
}

fn assert_nothing_beyond_moka(what: &str, cache: &Cache, is_it: impl Fn(Freshness) -> bool) {
    let ours = allocations(async |key| assert!(is_it(cache.get(key).await.unwrap().unwrap().freshness())));
    let (sync, future) = of_moka();
    println!("{GETS} {what} hits allocate {ours} times; gets of moka::sync {sync}, of moka::future {future}");
    assert!(ours <= sync + LEEWAY, "{what}: {ours} allocations, and {sync} of moka::sync");
    assert!(ours <= future, "{what}: {ours} allocations, and {future} of moka::future");
}

async fn in_health() -> Cache {
    let cache = Cache::builder().memory().open().await.unwrap();
    put_all(&cache).await;
    cache
}

/// All threads are in memory, none is fresh any more, and the source of truth is away.
async fn in_an_outage(dir: &Path) -> Cache {
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    let builder = Cache::builder().store(Guard::new(faulty, Duration::from_secs(1)));
    let cache = builder.queue(dir.join("queue.db")).fresh_for(Duration::ZERO).open().await.unwrap();
    put_all(&cache).await;
    faults.always(Fault::Refuse);
    while cache.health().is_available() {
        let _ = cache.get("nobody has this id").await;
    }
    cache
}

fn assert_that_no_hit_allocates() {
    let (runtime, dir) = (runtime(), tempfile::tempdir().unwrap());
    let cache = runtime.block_on(in_health());
    assert_nothing_beyond_moka("fresh", &cache, |freshness| freshness == Freshness::Fresh);
    let cache = runtime.block_on(in_an_outage(dir.path()));
    assert_nothing_beyond_moka("stale", &cache, |freshness| matches!(freshness, Freshness::Stale { .. }));
    runtime.block_on(put_all(&cache));
    assert_nothing_beyond_moka("queued", &cache, |freshness| freshness == Freshness::Queued);
}

#[test]
fn a_hit_allocates_nothing_beyond_mokas_own() {
    let _turn = turn();
    assert_that_no_hit_allocates();
}

#[test]
fn neither_does_a_hit_that_is_counted() {
    let _turn = turn();
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, assert_that_no_hit_allocates);
    let exported = recorder.handle().render();
    for outcome in ["hit", "stale", "queued"] {
        let counted = format!("threadkeep_reads_total{{outcome=\"{outcome}\"}} {}\n", 2 * GETS);
        assert!(exported.contains(&counted), "{counted} is not in {exported}");
    }
}

#[test]
fn a_warmed_thread_takes_at_most_512_bytes_beyond_key_and_value() {
    let (_turn, runtime, shelf) = (turn(), runtime(), Shelf::new(WARMED, KIB));
    let builder = Cache::builder().store(shelf).cache_bytes(1 << 30).warm_threads(WARMED);
    let mut opened = None;
    let taken = measure(|| {
        runtime.block_on(async {
            let cache = opened.insert(builder.open().await.unwrap());
            assert_eq!(cache.warm().await.unwrap().threads, WARMED);
            assert_eq!(cache.health().threads as usize, WARMED, "no housekeeping is left to be done");
        });
    });
    let each = taken.bytes_current as f64 / WARMED as f64;
    let beyond = each - (thread(0).len() + KIB) as f64;
    println!("{WARMED} threads of 1 KiB take {each:.0} bytes each, {beyond:.0} beyond key and value");
    assert!((0.0..=512.0).contains(&beyond), "{beyond:.0} bytes a thread beyond key and value");
}
