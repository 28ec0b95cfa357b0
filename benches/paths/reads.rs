//! Measures reads from memory, from the replica and from the store.

use std::cell::LazyCell;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion};
use futures::executor::block_on;
use threadkeep::store::Memory;
use threadkeep::{Cache, Freshness};

use crate::shelf::thread;
use crate::world::{KIB, SIZES, World, scaled, size, without_limits};

/// Step between two reads: a prime, so that the reads visit all conversations and never two neighbours in a row.
const STRIDE: usize = 7919;

/// Measures gets from memory. The cache is created only if the filter of criterion selects the benchmark.
fn gets(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    threads: usize,
    make: impl FnOnce() -> Cache,
    is_expected: fn(Freshness) -> bool,
) {
    let made = LazyCell::new(|| (make(), (0..threads).map(thread).collect::<Vec<_>>()));
    let mut turn = 0;
    group.bench_function(id, |bencher| {
        let (cache, keys) = &*made;
        bencher.iter(|| {
            turn += 1;
            let found = block_on(cache.get(&keys[turn * STRIDE % threads])).unwrap().unwrap();
            assert!(is_expected(found.freshness()));
            found
        });
    });
}

pub fn hit(criterion: &mut Criterion) {
    let world = World::new();
    let mut group = criterion.benchmark_group("hit");
    let mut hits = |id, threads, bytes| {
        let make = || {
            let cache = world.open(without_limits(Cache::builder().memory()));
            world.put_all(&cache, threads, bytes);
            cache
        };
        gets(&mut group, id, threads, make, |freshness| freshness == Freshness::Fresh);
    };
    for bytes in SIZES {
        hits(BenchmarkId::new("by value", size(bytes)), 100, bytes);
    }
    for threads in [1_000, 10_000, 100_000] {
        hits(BenchmarkId::new("by conversations", threads), scaled(threads, threads / 100), KIB);
    }
    group.finish();
}

pub fn hit_in_an_outage(criterion: &mut Criterion) {
    let (world, threads) = (World::new(), scaled(10_000, 100));
    let mut group = criterion.benchmark_group("hit in an outage");
    let is_stale = |freshness| matches!(freshness, Freshness::Stale { .. });
    gets(&mut group, BenchmarkId::from_parameter("stale"), threads, || world.in_outage(threads), is_stale);
    let make = || {
        let cache = world.in_outage(threads);
        world.put_all(&cache, threads, KIB);
        cache
    };
    let is_queued = |freshness| freshness == Freshness::Queued;
    gets(&mut group, BenchmarkId::from_parameter("queued"), threads, make, is_queued);
    group.finish();
}

/// Measures gets of one task that miss memory. The measured time includes the eviction before each get.
fn misses(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    world: &World,
    make: impl FnOnce() -> Cache,
    key: fn(usize) -> String,
    is_found: bool,
) {
    let cache = LazyCell::new(make);
    let mut turn = 0;
    group.bench_function(name, |bencher| {
        let cache = LazyCell::force(&cache);
        bencher.iter_custom(|count| {
            let (cache, first) = (cache.clone(), turn);
            turn += count as usize;
            world.run(1, count as usize, move |at| {
                let (cache, key) = (cache.clone(), key(first + at));
                async move {
                    cache.evict(&key).unwrap();
                    assert_eq!(cache.get(&key).await.unwrap().is_some(), is_found);
                }
            })
        });
    });
}

const STORED: usize = 1_000;

pub fn miss(criterion: &mut Criterion) {
    let world = World::new();
    let mut group = criterion.benchmark_group("miss");
    let filled = |cache: Cache| {
        world.put_all(&cache, STORED, KIB);
        cache
    };
    let alone = || filled(world.open(world.builder_for(Memory::new()).0));
    let with_file = || filled(world.with_file());
    let in_outage = || world.in_outage(STORED);
    let stored = |turn| thread(turn * STRIDE % STORED);
    let unknown = |turn| format!("nobody-{turn}");
    misses(&mut group, "an id nobody has", &world, alone, unknown, false);
    misses(&mut group, "an id nobody has, again", &world, alone, |_| "nobody".to_owned(), false);
    misses(&mut group, "in the store", &world, alone, stored, true);
    misses(&mut group, "in the store, with a file", &world, with_file, stored, true);
    misses(&mut group, "in the file, breaker open", &world, in_outage, stored, true);
    group.finish();
}
