//! The sums of the section "Capacity", measured.

use std::path::Path;
use std::time::Duration;

use threadkeep::testing::{Fault, Faulty};
use threadkeep::{Cache, ErrorKind, Guard, Memory};

const BOUND: usize = 32 << 20;
const VALUE: usize = 1_000;
const TASKS: usize = 64;
/// What the process takes beside what it is bound to: code, stacks, SQLite's page caches.
const ROOM: u64 = 50 << 20;
/// The write-ahead log, at its largest.
const LOG: u64 = 64 << 20;

/// What of this process is in memory, in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

fn size(path: &Path) -> u64 {
    path.metadata().map_or(0, |file| file.len())
}

/// Puts threads, many at once, until there are so many or one is refused.
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

/// One after the other, since both look at the memory of the process; the queue first, so that it does not get what the other
/// has given back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_and_file_take_what_the_sums_say() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    queue(dir.path()).await;
    memory(dir.path()).await;
}

async fn memory(dir: &Path) {
    // What the queue's part has given back, the allocator may have kept.
    let before = resident();
    let cache = Cache::builder().local(dir.join("local.db")).cache_bytes(BOUND).open().await.unwrap();
    put_many(&cache, 2 * BOUND / VALUE).await;
    let (health, taken) = (cache.health(), resident().saturating_sub(before));
    println!(
        "memory: {} threads, {} bytes counted, {taken} more bytes resident",
        health.threads, health.bytes
    );
    assert!(health.bytes <= BOUND as u64 + BOUND as u64 / 50);
    assert!(taken <= BOUND as u64 * 3 / 2 + ROOM, "{taken} bytes");
    let _ = cache.shutdown(Duration::from_secs(60)).await.unwrap();
}

async fn queue(dir: &Path) {
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    let path = dir.join("queue.db");
    let builder = Cache::builder().store(Guard::new(faulty, Duration::from_millis(100)));
    let cache = builder.queue(&path).queue_bytes(BOUND).cache_bytes(1 << 20).open().await.unwrap();
    faults.always(Fault::Refuse);
    // From the first half to the second, so that what all of them share does not count.
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
    assert!(log <= LOG + LOG / 4, "{log} bytes");
    assert!(grown < 1_000, "{grown} bytes for each");
}
