//! Measures the work after an outage or a start: replay of the queue, and warm-up.

use std::cell::LazyCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use threadkeep::Cache;
use threadkeep::store::Memory;

use crate::shelf::Shelf;
use crate::world::{KIB, World, scaled, size};

const SECOND: Duration = Duration::from_secs(1);

/// Creates a closed outage file with `records` queued writes.
fn queue(world: &World, records: usize, bytes: usize) -> PathBuf {
    let file = world.file();
    let (builder, faults) = world.builder_for(Memory::new());
    let cache = world.open(builder.queue(&file));
    world.start_outage(&cache, &faults);
    world.put_all(&cache, records, bytes);
    let left = world.block_on(cache.shutdown(60 * SECOND)).unwrap();
    assert_eq!(left.still_queued, records);
    file
}

/// Measures the replay of all queued writes of a file. The function works on a copy.
fn time_replay(world: &World, file: &Path) -> Duration {
    let copy = world.file();
    fs::copy(file, &copy).unwrap();
    let (builder, calls) = world.builder_for(Memory::new());
    let cache = world.open(builder.queue(&copy));
    let began = Instant::now();
    world.block_on(async {
        while cache.health().queue.unwrap().records > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let took = began.elapsed();
    assert!(calls.calls("apply") > 0, "replay sent no write");
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
            bencher.iter_custom(|times| (0..times).map(|_| time_replay(&world, file)).sum());
        });
    }
    group.finish();
}

/// Measures the warm-up of `conversations` into memory, and into the outage file if there is one.
fn time_warmup(world: &World, conversations: usize, file: Option<PathBuf>) -> Duration {
    let (builder, _) = world.builder_for(Shelf::new(conversations, KIB));
    let builder = builder.warmup_limit(conversations);
    let cache = world.open(file.iter().fold(builder, |builder, file| builder.queue(file)));
    let began = Instant::now();
    assert_eq!(world.block_on(cache.warm()).unwrap().conversations, conversations);
    let took = began.elapsed();
    close(world, &cache);
    file.iter().for_each(|file| fs::remove_file(file).unwrap());
    took
}

pub fn warmup(criterion: &mut Criterion) {
    let (world, conversations) = (World::new(), scaled(20_000, 600));
    let mut group = criterion.benchmark_group("warm-up");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).measurement_time(4 * SECOND);
    group.throughput(Throughput::Elements(conversations as u64));
    for (name, has_file) in [("memory", false), ("memory and file", true)] {
        group.bench_function(name, |bencher| {
            let once = |_| time_warmup(&world, conversations, has_file.then(|| world.file()));
            bencher.iter_custom(|times| (0..times).map(once).sum());
        });
    }
    group.finish();
}
