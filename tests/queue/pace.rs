//! The number of replay batches in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::store::{
    Applied, Clock, ListPage, ListRequest, LoadRequest, Loaded, Memory, ResilientStore, Store, Write,
};
use threadkeep::testing::FaultStore;
use threadkeep::{Cache, Key, Result};

use crate::{World, wait_until_drained};

/// A store that takes `batch_time` for each replay batch, and counts the batches that overlap another batch.
#[derive(Debug)]
struct SlowStore {
    memory: Arc<Memory>,
    batch_time: Duration,
    counts: Arc<BatchCounts>,
}

#[derive(Debug, Default)]
struct BatchCounts {
    batches: AtomicUsize,
    in_flight: AtomicUsize,
    overlapping: AtomicUsize,
}

#[async_trait]
impl Store for SlowStore {
    fn clock(&self) -> &Arc<Clock> {
        self.memory.clock()
    }
    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.memory.load(requests).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.memory.apply(writes).await
    }
    async fn apply_once(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.counts.batches.fetch_add(1, SeqCst);
        if self.counts.in_flight.fetch_add(1, SeqCst) > 0 {
            self.counts.overlapping.fetch_add(1, SeqCst);
        }
        tokio::time::sleep(self.batch_time).await;
        let applied = self.memory.apply(writes).await;
        self.counts.in_flight.fetch_sub(1, SeqCst);
        applied
    }
    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        self.memory.list(page).await
    }
    async fn touch(&self, _: &[Key]) -> Result<()> {
        Ok(())
    }
    async fn purge(&self, _: usize) -> Result<usize> {
        Ok(0)
    }
    async fn probe(&self) -> Result<()> {
        Ok(())
    }
}

/// Queues 3,000 writes, waits for their replay, and returns the counts.
async fn replay(batch_time: Duration) -> Arc<BatchCounts> {
    let (mut world, counts) = (World::new(), Arc::new(BatchCounts::default()));
    let slow = SlowStore { memory: Arc::clone(&world.store), batch_time, counts: Arc::clone(&counts) };
    let faulty = FaultStore::new(slow);
    world.faults = faulty.faults();
    let builder = Cache::builder().store(ResilientStore::new(faulty, Duration::from_secs(10)));
    let cache = builder.queue(world.dir.path().join("q.db")).open().await.unwrap();
    world.start_outage(&cache).await;
    queue_many(&cache).await;
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("t2999").await.as_deref(), Some("2999"));
    counts
}

async fn queue_many(cache: &Cache) {
    let mut puts = tokio::task::JoinSet::new();
    for at in 0..3_000 {
        let cache = cache.clone();
        puts.spawn(async move { cache.put(format!("t{at}"), &at).await });
    }
    while let Some(put) = puts.join_next().await {
        let _ = put.unwrap().unwrap();
    }
}

/// A busy machine may delay a short call, so a quarter of the batches may overlap.
#[tokio::test]
async fn replay_sends_fast_batches_one_at_a_time() {
    let counts = replay(Duration::from_millis(10)).await;
    let (batches, overlapping) = (counts.batches.load(SeqCst), counts.overlapping.load(SeqCst));
    assert!(
        batches >= 6 && overlapping <= batches / 4,
        "{overlapping} of {batches} batches overlapped another batch"
    );
}

#[tokio::test]
async fn replay_sends_a_second_batch_beside_a_slow_batch() {
    let counts = replay(Duration::from_millis(400)).await;
    let (batches, overlapping) = (counts.batches.load(SeqCst), counts.overlapping.load(SeqCst));
    assert!(
        batches >= 6 && overlapping >= batches / 4,
        "{overlapping} of {batches} batches overlapped another batch"
    );
}
