//! Reads from memory, and those that memory cannot answer.

use std::cell::LazyCell;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion};
use futures::executor::block_on;
use threadkeep::{Cache, Freshness, Memory};

use crate::shelf::thread;
use crate::world::{KIB, SIZES, World, roomy, scaled, size};

/// Prime, so that the turns pass all threads, and none is next to the one before.
const STRIDE: usize = 7919;

/// Gets from memory, of one thread after the other. The cache is made if this is not filtered out.
fn gets(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    threads: usize,
    make: impl FnOnce() -> Cache,
    is_right: fn(Freshness) -> bool,
) {
    let made = LazyCell::new(|| (make(), (0..threads).map(thread).collect::<Vec<_>>()));
    let mut turn = 0;
    group.bench_function(id, |bencher| {
        let (cache, keys) = &*made;
        bencher.iter(|| {
            turn += 1;
            let found = block_on(cache.get(&keys[turn * STRIDE % threads])).unwrap().unwrap();
            assert!(is_right(found.freshness()));
            found
        });
    });
}

pub fn hit(criterion: &mut Criterion) {
    let world = World::new();
    let mut group = criterion.benchmark_group("hit");
    let mut hits = |id, threads, bytes| {
        let make = || {
            let cache = world.open(roomy(Cache::builder().memory()));
            world.put_all(&cache, threads, bytes);
            cache
        };
        gets(&mut group, id, threads, make, |freshness| freshness == Freshness::Fresh);
    };
    for bytes in SIZES {
        hits(BenchmarkId::new("by value", size(bytes)), 100, bytes);
    }
    for threads in [1_000, 10_000, 100_000] {
        hits(BenchmarkId::new("by threads", threads), scaled(threads, threads / 100), KIB);
    }
    group.finish();
}

pub fn hit_in_an_outage(criterion: &mut Criterion) {
    let (world, threads) = (World::new(), scaled(10_000, 100));
    let mut group = criterion.benchmark_group("hit in an outage");
    let is_stale = |freshness| matches!(freshness, Freshness::Stale { .. });
    gets(&mut group, BenchmarkId::from_parameter("stale"), threads, || world.cut_off(threads), is_stale);
    let make = || {
        let cache = world.cut_off(threads);
        world.put_all(&cache, threads, KIB);
        cache
    };
    let is_queued = |freshness| freshness == Freshness::Queued;
    gets(&mut group, BenchmarkId::from_parameter("queued"), threads, make, is_queued);
    group.finish();
}

/// Gets by one task of the thread that each turn names, evicted before if it was in memory, which is part of the time.
fn misses(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    world: &World,
    make: impl FnOnce() -> Cache,
    key: fn(usize) -> String,
    is_there: bool,
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
                    assert_eq!(cache.get(&key).await.unwrap().is_some(), is_there);
                }
            })
        });
    });
}

const HELD: usize = 1_000;

pub fn miss(criterion: &mut Criterion) {
    let world = World::new();
    let mut group = criterion.benchmark_group("miss");
    let holding = |cache: Cache| {
        world.put_all(&cache, HELD, KIB);
        cache
    };
    let alone = || holding(world.open(world.before(Memory::new()).0));
    let with_file = || holding(world.with_file());
    let cut_off = || world.cut_off(HELD);
    let held = |turn| thread(turn * STRIDE % HELD);
    let unknown = |turn| format!("nobody-{turn}");
    misses(&mut group, "an id nobody has", &world, alone, unknown, false);
    misses(&mut group, "an id nobody has, again", &world, alone, |_| "nobody".to_owned(), false);
    misses(&mut group, "in the store", &world, alone, held, true);
    misses(&mut group, "in the store, with a file", &world, with_file, held, true);
    misses(&mut group, "in the file, breaker open", &world, cut_off, held, true);
    group.finish();
}
