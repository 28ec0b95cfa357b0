//! What comes after an outage, or a start: the queue is replayed, memory is warmed.

use std::cell::LazyCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use threadkeep::{Cache, Memory};

use crate::shelf::Shelf;
use crate::world::{KIB, World, scaled, size};

const SECOND: Duration = Duration::from_secs(1);

/// A file in which so many writes wait, and which nobody has open.
fn queue(world: &World, records: usize, bytes: usize) -> PathBuf {
    let file = world.file();
    let (builder, faults) = world.before(Memory::new());
    let cache = world.open(builder.queue(&file));
    world.cut(&cache, &faults);
    world.put_all(&cache, records, bytes);
    let left = world.block_on(cache.shutdown(60 * SECOND)).unwrap();
    assert_eq!(left.still_queued, records);
    file
}

/// How long it takes until all that waits in the file is in the store, once the file is open. Changes a copy.
fn replayed(world: &World, file: &Path) -> Duration {
    let copy = world.file();
    fs::copy(file, &copy).unwrap();
    let (builder, calls) = world.before(Memory::new());
    let cache = world.open(builder.queue(&copy));
    let began = Instant::now();
    world.block_on(async {
        while cache.health().queue.unwrap().records > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let took = began.elapsed();
    assert!(calls.calls("apply") > 0, "something waited");
    close(world, &cache);
    fs::remove_file(copy).unwrap();
    took
}

fn close(world: &World, cache: &Cache) {
    assert_eq!(world.block_on(cache.shutdown(60 * SECOND)).unwrap().unfinished, 0);
}

pub fn replay(criterion: &mut Criterion) {
    let world = World::new();
    let mut group = criterion.benchmark_group("replay");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).measurement_time(4 * SECOND);
    for (records, bytes) in [(10_000, KIB), (1_000, 16 * KIB)] {
        let id = BenchmarkId::new(format!("{records} records"), size(bytes));
        let records = scaled(records, 100);
        let file = LazyCell::new(|| queue(&world, records, bytes));
        group.throughput(Throughput::Elements(records as u64)).bench_function(id, |bencher| {
            let file = LazyCell::force(&file);
            bencher.iter_custom(|times| (0..times).map(|_| replayed(&world, file)).sum());
        });
    }
    group.finish();
}

/// How long it takes until so many threads are in memory, and also in the file if there is one.
fn warmed(world: &World, threads: usize, file: Option<PathBuf>) -> Duration {
    let (builder, _) = world.before(Shelf::new(threads, KIB));
    let builder = builder.warm_threads(threads);
    let cache = world.open(file.iter().fold(builder, |builder, file| builder.queue(file)));
    let began = Instant::now();
    assert_eq!(world.block_on(cache.warm()).unwrap().threads, threads);
    let took = began.elapsed();
    close(world, &cache);
    file.iter().for_each(|file| fs::remove_file(file).unwrap());
    took
}

pub fn warm_up(criterion: &mut Criterion) {
    let (world, threads) = (World::new(), scaled(20_000, 600));
    let mut group = criterion.benchmark_group("warm-up");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).measurement_time(4 * SECOND);
    group.throughput(Throughput::Elements(threads as u64));
    for (name, has_file) in [("memory", false), ("memory and file", true)] {
        group.bench_function(name, |bencher| {
            let once = |_| warmed(&world, threads, has_file.then(|| world.file()));
            bencher.iter_custom(|times| (0..times).map(once).sum());
        });
    }
    group.finish();
}
