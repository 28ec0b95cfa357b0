//! Measures the formulas of the section "Capacity".

use std::path::Path;
use std::time::Duration;

use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore};
use threadkeep::{Cache, ErrorKind};

const BOUND: usize = 32 << 20;
const VALUE: usize = 1_000;
const TASKS: usize = 64;
/// The memory of the process outside its limit: code, stacks, SQLite's page caches.
const OVERHEAD: u64 = 50 << 20;
/// The largest size of the write-ahead log.
const MAX_LOG: u64 = 64 << 20;

/// Returns the resident memory of this process in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

fn size(path: &Path) -> u64 {
    path.metadata().map_or(0, |file| file.len())
}

/// Puts up to `most` conversations concurrently. Stops when the queue is full.
async fn put_many(cache: &Cache, most: usize) {
    let task = |task: usize| {
        let (cache, value) = (cache.clone(), "x".repeat(VALUE));
        tokio::spawn(async move {
            for at in (task..most).step_by(TASKS) {
                match cache.put(format!("thread-{at:09}"), &value).await {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::QueueFull => return,
                    Err(error) => panic!("{error}"),
                }
            }
        })
    };
    for task in (0..TASKS).map(task).collect::<Vec<_>>() {
        task.await.unwrap();
    }
}

/// Runs both measurements in order, because both read the memory of the process. The queue runs first, so that it does
/// not reuse memory that the other measurement has freed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn capacity_formulas_hold() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    queue(dir.path()).await;
    memory(dir.path()).await;
}

async fn memory(dir: &Path) {
    // The allocator may have kept the memory of the queue's measurement.
    let before = resident();
    let cache = Cache::builder().local(dir.join("local.db")).cache_max_bytes(BOUND).open().await.unwrap();
    put_many(&cache, 2 * BOUND / VALUE).await;
    let (health, taken) = (cache.health(), resident().saturating_sub(before));
    println!(
        "memory: {} threads, {} bytes counted, {taken} more bytes resident",
        health.conversations, health.bytes
    );
    assert!(health.bytes <= BOUND as u64 + BOUND as u64 / 50);
    assert!(taken <= BOUND as u64 * 3 / 2 + OVERHEAD, "{taken} bytes");
    cache.shutdown(Duration::from_secs(60)).await.unwrap();
}

async fn queue(dir: &Path) {
    let faulty = FaultStore::new(Memory::new());
    let faults = faulty.faults();
    let path = dir.join("queue.db");
    let builder = Cache::builder().store(ResilientStore::new(faulty, Duration::from_millis(100)));
    let cache = builder.queue(&path).queue_max_bytes(BOUND).cache_max_bytes(1 << 20).open().await.unwrap();
    faults.always(Fault::Refuse);
    // The measurement starts with a part of the writes in the queue, so that shared memory does not count.
    put_many(&cache, BOUND / VALUE / 3).await;
    let (half, before) = (cache.health().queue.unwrap(), resident());
    put_many(&cache, usize::MAX / 2).await;
    let (queue, grown) = (cache.health().queue.unwrap(), resident().saturating_sub(before));
    let grown = grown / (queue.records - half.records);
    let (file, log) = (size(&path), size(&dir.join("queue.db-wal")));
    println!(
        "queue: {} writes, {} bytes counted, {file} bytes in the file, {log} in its log, {} bytes resident for each",
        queue.records, queue.bytes, grown
    );
    assert!(queue.bytes <= BOUND as u64 && queue.bytes > BOUND as u64 - 10_000);
    assert!(file <= BOUND as u64 * 6 / 5, "{file} bytes");
    assert!(log <= MAX_LOG + MAX_LOG / 4, "{log} bytes");
    assert!(grown < 1_000, "{grown} bytes for each");
}
