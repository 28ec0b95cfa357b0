//! How many batches of a replay are on their way at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::testing::Faulty;
use threadkeep::{
    Applied, Cache, Clock, Guard, Key, Loaded, Memory, Page, Recent, Result, Store, Want, Write,
};

use super::{World, drained};

/// Takes so long for a replay's batch, and counts those that came while another one was there.
#[derive(Debug)]
struct Slow {
    memory: Arc<Memory>,
    way: Duration,
    seen: Arc<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    batches: AtomicUsize,
    now: AtomicUsize,
    beside: AtomicUsize,
}

#[async_trait]
impl Store for Slow {
    fn clock(&self) -> &Arc<Clock> {
        self.memory.clock()
    }
    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        self.memory.load(wants).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.memory.apply(writes).await
    }
    async fn apply_on_trial(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.seen.batches.fetch_add(1, SeqCst);
        if self.seen.now.fetch_add(1, SeqCst) > 0 {
            self.seen.beside.fetch_add(1, SeqCst);
        }
        tokio::time::sleep(self.way).await;
        let applied = self.memory.apply(writes).await;
        self.seen.now.fetch_sub(1, SeqCst);
        applied
    }
    async fn recent(&self, page: &Page) -> Result<Recent> {
        self.memory.recent(page).await
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

/// Queues some thousands of writes and has them replayed.
async fn replayed(way: Duration) -> Arc<Seen> {
    let (mut world, seen) = (World::new(), Arc::new(Seen::default()));
    let slow = Slow { memory: Arc::clone(&world.truth), way, seen: Arc::clone(&seen) };
    let faulty = Faulty::new(slow);
    world.faults = faulty.faults();
    let builder = Cache::builder().store(Guard::new(faulty, Duration::from_secs(10)));
    let cache = builder.queue(world.dir.path().join("q.db")).open().await.unwrap();
    world.away(&cache).await;
    queue_many(&cache).await;
    world.faults.heal();
    drained(&cache).await;
    assert_eq!(world.stored("t2999").await.as_deref(), Some("2999"));
    seen
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

/// On a machine that does other things a short call may take long.
#[tokio::test]
async fn one_batch_is_sent_at_a_time() {
    let seen = replayed(Duration::from_millis(10)).await;
    let (batches, beside) = (seen.batches.load(SeqCst), seen.beside.load(SeqCst));
    assert!(batches >= 6 && beside <= batches / 4, "{beside} of {batches} came beside another");
}

#[tokio::test]
async fn beside_a_batch_that_takes_long_the_next_one_is_sent() {
    let seen = replayed(Duration::from_millis(400)).await;
    let (batches, beside) = (seen.batches.load(SeqCst), seen.beside.load(SeqCst));
    assert!(batches >= 6 && beside >= batches / 4, "{beside} of {batches} came beside another");
}
