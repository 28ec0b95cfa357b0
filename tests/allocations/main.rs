//! Allocations of a hit (none beyond those of moka), and the memory of a conversation that the warm-up loaded.
//!
//! `allocation_counter` is the allocator of this binary. It counts the allocations of the OS thread of a test. The runtime
//! uses the same OS thread and stands still during the count. A get that is no hit would block. The tests run one after
//! another, because any OS thread may free the garbage of moka (crossbeam-epoch).
//!
//! `cargo test --all-features --test allocations -- --nocapture` prints the counts.
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
use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore};
use threadkeep::{Cache, Freshness};
use tokio::runtime::Runtime;

const CONVERSATIONS: usize = 500;
const GETS: usize = 20_000;
/// Limit of extra allocations. Moka runs its own maintenance, which allocates, every 64 gets and at intervals.
const MAX_EXTRA_ALLOCATIONS: u64 = GETS as u64 / 100;
const KIB: usize = 1024;
const WARMED_UP: usize = 20_000;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn run_alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn runtime() -> Runtime {
    // The count includes the background tasks.
    threadkeep::testing::stay_on_this_thread();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn value() -> String {
    "x".repeat(KIB)
}

async fn put_all(cache: &Cache) {
    for at in 0..CONVERSATIONS {
        cache.put(thread(at), &value()).await.unwrap();
    }
}

/// Counts the allocations of `GETS` gets, after the same number of gets without a count.
fn allocations(get: impl AsyncFn(&str)) -> u64 {
    let keys: Vec<String> = (0..CONVERSATIONS).map(thread).collect();
    let get_all = || {
        block_on(async {
            for turn in 0..GETS {
                get(&keys[turn % CONVERSATIONS]).await;
            }
        });
    };
    get_all();
    measure(get_all).count_total
}

/// Counts the allocations of the same gets in two moka caches with the hasher and the policy of `Cache`.
///
/// `Cache` uses `moka::sync`. The maintenance of `moka::future` allocates more.
fn moka_allocations() -> (u64, u64) {
    type Value = Arc<str>;
    let weigh = |_: &String, value: &Value| value.len() as u32;
    let (lru, hasher) = (EvictionPolicy::lru, foldhash::fast::RandomState::default);
    let sync = moka::sync::Cache::builder().max_capacity(1 << 30).weigher(weigh).eviction_policy(lru());
    let sync = sync.build_with_hasher(hasher());
    let future = moka::future::Cache::builder().max_capacity(1 << 30).weigher(weigh).eviction_policy(lru());
    let future = future.build_with_hasher(hasher());
    for at in 0..CONVERSATIONS {
        sync.insert(thread(at), Value::from(value()));
        block_on(future.insert(thread(at), Value::from(value())));
    }
    let of_sync = allocations(async |key| assert!(sync.get(key).is_some()));
    (of_sync, allocations(async |key| assert!(future.get(key).await.is_some())))
}

fn assert_no_extra_allocations(kind: &str, cache: &Cache, is_expected: impl Fn(Freshness) -> bool) {
    let ours =
        allocations(async |key| assert!(is_expected(cache.get(key).await.unwrap().unwrap().freshness())));
    let (sync, future) = moka_allocations();
    println!(
        "{GETS} {kind} hits allocate {ours} times; moka::sync {sync} times, moka::future {future} times"
    );
    assert!(ours <= sync + MAX_EXTRA_ALLOCATIONS, "{kind}: {ours} allocations, but moka::sync makes {sync}");
    assert!(ours <= future, "{kind}: {ours} allocations, but moka::future makes {future}");
}

async fn open_with_store() -> Cache {
    let cache = Cache::builder().memory().open().await.unwrap();
    put_all(&cache).await;
    cache
}

/// Opens a cache in an outage. Memory holds all conversations, and none of them is fresh.
async fn open_in_outage(dir: &Path) -> Cache {
    let faulty = FaultStore::new(Memory::new());
    let faults = faulty.faults();
    let builder = Cache::builder().store(ResilientStore::new(faulty, Duration::from_secs(1)));
    let cache = builder.queue(dir.join("queue.db")).fresh_for(Duration::ZERO).open().await.unwrap();
    put_all(&cache).await;
    faults.always(Fault::Refuse);
    while cache.health().is_available() {
        let _ = cache.get("unknown").await;
    }
    cache
}

fn check_hits_of_each_freshness() {
    let (runtime, dir) = (runtime(), tempfile::tempdir().unwrap());
    let cache = runtime.block_on(open_with_store());
    assert_no_extra_allocations("fresh", &cache, |freshness| freshness == Freshness::Fresh);
    let cache = runtime.block_on(open_in_outage(dir.path()));
    assert_no_extra_allocations("stale", &cache, |freshness| matches!(freshness, Freshness::Stale { .. }));
    runtime.block_on(put_all(&cache));
    assert_no_extra_allocations("queued", &cache, |freshness| freshness == Freshness::Queued);
}

#[test]
fn hit_allocates_no_more_than_moka() {
    let _guard = run_alone();
    check_hits_of_each_freshness();
}

#[test]
fn hit_with_metrics_allocates_no_more_than_moka() {
    let _guard = run_alone();
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, check_hits_of_each_freshness);
    let exported = recorder.handle().render();
    for outcome in ["hit", "stale", "queued"] {
        let counted = format!("threadkeep_reads_total{{outcome=\"{outcome}\"}} {}\n", 2 * GETS);
        assert!(exported.contains(&counted), "{counted} is not in {exported}");
    }
}

#[test]
fn warmed_conversation_takes_at_most_512_extra_bytes() {
    let (_guard, runtime, shelf) = (run_alone(), runtime(), Shelf::new(WARMED_UP, KIB));
    let builder = Cache::builder().store(shelf).cache_max_bytes(1 << 30).warmup_limit(WARMED_UP);
    let mut opened = None;
    let memory = measure(|| {
        runtime.block_on(async {
            let cache = opened.insert(builder.open().await.unwrap());
            assert_eq!(cache.warm().await.unwrap().conversations, WARMED_UP);
            assert_eq!(cache.health().conversations as usize, WARMED_UP, "moka has no pending maintenance");
        });
    });
    let each = memory.bytes_current as f64 / WARMED_UP as f64;
    let beyond = each - (thread(0).len() + KIB) as f64;
    println!(
        "{WARMED_UP} conversations of 1 KiB take {each:.0} bytes each, {beyond:.0} beyond key and value"
    );
    assert!((0.0..=512.0).contains(&beyond), "{beyond:.0} bytes for each conversation beyond key and value");
}
