//! Puts that are stored, and puts that are queued.

use std::cell::LazyCell;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use threadkeep::{Cache, Durability};

use crate::shelf::thread;
use crate::world::{SIZES, World, roomy, size, value};

const TASKS: usize = 64;
/// More than tasks, so that none waits for the turn of another.
const KEYS: usize = 2 * TASKS;

fn puts(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    world: &World,
    (tasks, bytes): (usize, usize),
    make: impl FnOnce() -> Cache,
    expected: Durability,
) {
    let cache = LazyCell::new(make);
    group.throughput(Throughput::Elements(1)).bench_function(id, |bencher| {
        let (cache, value) = (LazyCell::force(&cache), value(bytes));
        bencher.iter_custom(|count| {
            let (cache, value) = (cache.clone(), value.clone());
            world.run(tasks, count as usize, move |at| {
                let (cache, value) = (cache.clone(), value.clone());
                async move { assert_eq!(cache.put(thread(at % KEYS), &value).await.unwrap(), expected) }
            })
        });
    });
}

pub fn put(criterion: &mut Criterion) {
    let world = World::new();
    let mut group = criterion.benchmark_group("put");
    group.sampling_mode(SamplingMode::Flat);
    for bytes in SIZES {
        let id = |backend| BenchmarkId::new(backend, size(bytes));
        let remote = || world.with_file();
        puts(&mut group, id("a store and a file"), &world, (1, bytes), remote, Durability::Stored);
        let local = || world.open(roomy(Cache::builder().local(world.file())));
        puts(&mut group, id("local"), &world, (1, bytes), local, Durability::Stored);
    }
    group.finish();
}

pub fn queued_put(criterion: &mut Criterion) {
    let world = World::new();
    let mut group = criterion.benchmark_group("queued put");
    group.sampling_mode(SamplingMode::Flat);
    for bytes in SIZES {
        for (name, tasks) in [("one task", 1), ("64 tasks", TASKS)] {
            let id = BenchmarkId::new(name, size(bytes));
            puts(&mut group, id, &world, (tasks, bytes), || world.cut_off(0), Durability::Queued);
        }
    }
    group.finish();
}
