//! A long outage: replay sends 100,000 queued writes to a real database in bounded memory.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "stack/mod.rs"]
mod stack;

use std::time::{Duration, Instant};

use stack::{Server, Stack};
use threadkeep::{Cache, WriteOutcome};

const RECORDS: usize = 100_000;
const MAX_GROWTH: usize = 64 << 20;

/// Returns the resident memory of this process in bytes.
fn resident_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_of_100_000_writes_needs_bounded_memory() {
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    let gateway = stack.gateway().await;
    let dir = tempfile::tempdir().unwrap();
    let builder = Cache::builder().supabase(&gateway.url(), &gateway.keys().secret);
    let cache = builder.queue(dir.path().join("q.db")).cache_max_bytes(1 << 20).open().await.unwrap();
    gateway.refuse().await;
    while cache.health().is_available() {
        let _ = cache.get("volume unknown").await;
    }
    let value = "x".repeat(1_000);
    let queue = |task: usize| {
        let (cache, value) = (cache.clone(), value.clone());
        tokio::spawn(async move {
            for at in (task..RECORDS).step_by(256) {
                let queued = cache.put(format!("volume {at:06}"), &value).await.unwrap();
                assert_eq!(queued, WriteOutcome::Queued);
            }
        })
    };
    let started = Instant::now();
    for task in (0..256).map(queue).collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert_eq!(cache.health().queue.unwrap().records, RECORDS as u64);
    let (queued_after, before, started) = (started.elapsed(), resident_memory(), Instant::now());
    gateway.accept().await;
    let mut peak = before;
    while cache.health().queue.unwrap().records > 0 {
        peak = peak.max(resident_memory());
        // The gateway keeps the requests that it has seen. They would count as growth.
        gateway.forget();
        assert!(started.elapsed() < Duration::from_secs(300), "{:?}", cache.health());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let growth = (peak - before) >> 20;
    println!("queued in {queued_after:.1?}, replayed in {:.1?}, grew by {growth} MiB", started.elapsed());
    assert!(peak - before < MAX_GROWTH, "memory grew by {growth} MiB");
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
    let stored = stack.psql("select count(*) from conversation_threads where thread_id like 'volume %'");
    assert_eq!(stored.trim(), RECORDS.to_string());
}
