//! What an outage costs, each beside what it is to be compared with, in one run: `cargo bench --bench outage`.
//!
//! Reads from memory with the breaker open beside reads in health; queued puts beside one synced SQLite commit for each
//! write on the same disk.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures::executor::block_on;
use threadkeep::testing::{Fault, Faulty};
use threadkeep::{Cache, Durability, Freshness, Guard, Memory};
use tokio::runtime::Runtime;

const THREADS: usize = 10_000;
const TASKS: usize = 64;
/// Reads are compared in turn, since the machine's speed changes while they are measured.
const ROUNDS: usize = 25;
const GETS: usize = 50_000;

struct World {
    runtime: Runtime,
    dir: tempfile::TempDir,
    keys: Vec<String>,
    value: String,
}

impl World {
    fn new() -> Self {
        let keys = (0..THREADS).map(|at| format!("thread-{at:08}")).collect();
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { runtime: Runtime::new().unwrap(), dir, keys, value: "x".repeat(1024) }
    }

    /// A cache whose store knows all threads: in health all of them are fresh, in an outage none is.
    fn cache(&self, name: &str, is_away: bool) -> Cache {
        self.runtime.block_on(async {
            let faulty = Faulty::new(Arc::new(Memory::new()));
            let faults = faulty.faults();
            let builder = Cache::builder().store(Guard::new(faulty, Duration::from_millis(100)));
            let builder = builder.queue(self.dir.path().join(name)).queue_bytes(8 << 30);
            let fresh_for = if is_away { Duration::ZERO } else { Duration::from_secs(86_400) };
            let cache = builder.fresh_for(fresh_for).open().await.unwrap();
            for key in &self.keys {
                let _ = cache.put(key, &self.value).await.unwrap();
            }
            while is_away && cache.health().is_available() {
                faults.always(Fault::Refuse);
                let _ = cache.get("nobody has this id").await;
            }
            cache
        })
    }

    /// So many puts, by so many tasks at once.
    fn put(&self, cache: &Cache, puts: u64, tasks: usize) -> Duration {
        self.runtime.block_on(async {
            let began = Instant::now();
            let tasks = (0..tasks).map(|task| {
                let (cache, value) = (cache.clone(), self.value.clone());
                let puts = (task as u64..puts).step_by(tasks);
                tokio::spawn(async move {
                    for at in puts {
                        let put = cache.put(format!("put-{}", at % 1_000), &value).await.unwrap();
                        assert_eq!(put, Durability::Queued);
                    }
                })
            });
            for task in tasks.collect::<Vec<_>>() {
                task.await.unwrap();
            }
            began.elapsed()
        })
    }
}

fn gets(_: &mut Criterion) {
    let world = World::new();
    let (health, outage, queued) =
        (world.cache("health", false), world.cache("outage", true), world.cache("queued", true));
    world.runtime.block_on(async {
        for key in &world.keys {
            let _ = queued.put(key, &world.value).await.unwrap();
        }
    });
    println!("get from memory: medians of {ROUNDS} rounds, in turn");
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        for (at, (cache, is_right)) in [
            (&health, (|freshness| freshness == Freshness::Fresh) as fn(Freshness) -> bool),
            (&outage, |freshness| matches!(freshness, Freshness::Stale { .. })),
            (&queued, |freshness| freshness == Freshness::Queued),
        ]
        .into_iter()
        .enumerate()
        {
            let began = Instant::now();
            for turn in 0..GETS {
                let found = block_on(cache.get(&world.keys[turn * 7919 % THREADS])).unwrap().unwrap();
                assert!(is_right(found.freshness()));
            }
            times[at].push(began.elapsed().as_secs_f64() * 1e9 / GETS as f64);
        }
    }
    let medians = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[ROUNDS / 2]
    });
    for (name, median) in ["in health", "in an outage, stale", "in an outage, queued"].iter().zip(medians) {
        println!("{name:22} {median:7.0} ns   {:.2}", median / medians[0]);
    }
}

fn puts(criterion: &mut Criterion) {
    let world = World::new();
    let cache = world.cache("puts", true);
    let raw = rusqlite::Connection::open(world.dir.path().join("raw")).unwrap();
    raw.execute_batch(
        "pragma journal_mode = wal; pragma synchronous = full; create table t (key text primary key, value text)",
    )
    .unwrap();
    let mut group = criterion.benchmark_group("put in an outage");
    group.throughput(Throughput::Elements(1)).sample_size(20).measurement_time(Duration::from_secs(5));
    group.bench_function("one synced commit per write", |b| {
        let mut insert = raw.prepare("insert or replace into t values (?1, ?2)").unwrap();
        let mut turn = 0;
        b.iter(|| {
            turn += 1;
            insert.execute((format!("put-{}", turn % 1_000), &world.value)).unwrap();
        });
    });
    group.bench_function("queued, one task", |b| b.iter_custom(|puts| world.put(&cache, puts, 1)));
    group.bench_function("queued, 64 tasks", |b| b.iter_custom(|puts| world.put(&cache, puts, TASKS)));
    group.finish();
}

criterion_group!(benches, gets, puts);
criterion_main!(benches);
