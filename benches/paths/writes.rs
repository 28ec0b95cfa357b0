//! Measures stored and queued puts.

use std::cell::LazyCell;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use threadkeep::{Cache, WriteOutcome};

use crate::shelf::thread;
use crate::world::{SIZES, World, size, value, without_limits};

const TASKS: usize = 64;
/// More keys than tasks, so that no task waits for the key lock of another task.
const KEYS: usize = 2 * TASKS;

fn puts(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    world: &World,
    (tasks, bytes): (usize, usize),
    make: impl FnOnce() -> Cache,
    expected: WriteOutcome,
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
        puts(&mut group, id("a store and a file"), &world, (1, bytes), remote, WriteOutcome::Stored);
        let local = || world.open(without_limits(Cache::builder().local(world.file())));
        puts(&mut group, id("local"), &world, (1, bytes), local, WriteOutcome::Stored);
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
            puts(&mut group, id, &world, (tasks, bytes), || world.in_outage(0), WriteOutcome::Queued);
        }
    }
    group.finish();
}
