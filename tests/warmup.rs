//! The warm-up: the conversations that it loads, its end, and concurrent writes.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::sync::Arc;
use std::time::Duration;

use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{Builder, Cache, ErrorKind, Freshness, WarmupState, WriteOutcome};

const CALL_TIME: Duration = Duration::from_millis(100);

/// A store that outlives the daemons, and the directory of their outage file.
struct World {
    store: Arc<Memory>,
    dir: tempfile::TempDir,
}

impl World {
    /// Stores `conversations` values in reverse order, so that number 0 is the newest.
    async fn with(conversations: usize, bytes: usize) -> Self {
        let world = Self { store: Arc::default(), dir: tempfile::tempdir().unwrap() };
        let cache = world.builder().0.warmup_limit(0).open().await.unwrap();
        assert_eq!(cache.warm().await.unwrap().conversations, 0);
        for at in (0..conversations).rev() {
            let put = cache.put(thread_id(at), &"x".repeat(bytes)).await.unwrap();
            assert_eq!(put, WriteOutcome::Stored);
        }
        cache.remove("gone").await.unwrap();
        cache.shutdown(CALL_TIME).await.unwrap();
        world
    }

    fn builder(&self) -> (Builder, Faults) {
        let faulty = FaultStore::new(Arc::clone(&self.store));
        let faults = faulty.faults();
        let builder = Cache::builder()
            .store(ResilientStore::new(faulty, 2 * CALL_TIME))
            .queue(self.dir.path().join("queue.db"));
        let builder = builder.warmup_limit(10_000);
        (builder, faults)
    }
}

fn thread_id(at: usize) -> String {
    format!("thread {at:05}")
}

#[tokio::test]
async fn warmup_loads_the_newest_conversations() {
    let world = World::with(1_300, 10).await;
    let (builder, faults) = world.builder();
    let cache = builder.warmup_limit(1_200).open().await.unwrap();
    let warmup = cache.warm().await.unwrap();
    assert_eq!((warmup.conversations, warmup.state), (1_200, WarmupState::Done));
    assert_eq!(cache.health().warmup, warmup);
    assert_eq!(faults.calls("list"), 3, "pages of 500");
    for at in 0..1_200 {
        assert_eq!(cache.get(thread_id(at)).await.unwrap().unwrap().freshness(), Freshness::Fresh);
    }
    assert_eq!(faults.calls("load"), 0);
    cache.get(thread_id(1_250)).await.unwrap().unwrap();
    assert_eq!(faults.calls("load"), 1, "an older conversation is loaded on demand");
}

/// A page that exceeds the deadline of a call is no outage. The warm-up reads smaller pages.
#[tokio::test]
async fn warmup_reads_smaller_pages_after_a_timeout() {
    for page_size in [1, 40] {
        let world = World::with(120, 10).await;
        let (builder, faults) = world.builder();
        faults.max_page_size(page_size);
        let cache = builder.open().await.unwrap();
        let warmup = cache.warm().await.unwrap();
        assert_eq!((warmup.conversations, warmup.state), (120, WarmupState::Done), "pages of {page_size}");
    }
}

#[tokio::test]
async fn list_reads_smaller_pages_after_a_timeout() {
    let world = World::with(0, 10).await;
    let (builder, faults) = world.builder();
    let cache = builder.warmup_limit(0).open().await.unwrap();
    for at in 0..120 {
        assert_eq!(cache.put(thread_id(at), &at).user("u").await.unwrap(), WriteOutcome::Stored);
    }
    faults.max_page_size(9);
    let listed = cache.list("u").await.unwrap();
    assert_eq!(listed.len(), 100);
    assert!(
        listed.windows(2).all(|pair| pair[0].version() > pair[1].version()),
        "the listing is in order without duplicates"
    );
    faults.max_page_size(0);
    assert_eq!(
        cache.list("u").await.unwrap_err().kind(),
        ErrorKind::Unavailable,
        "the listing ends with an error"
    );
}

#[tokio::test]
async fn warmup_fills_half_of_the_memory_at_most() {
    let world = World::with(2_000, 1_000).await;
    let cache = world.builder().0.cache_max_bytes(1 << 20).open().await.unwrap();
    let warmup = cache.warm().await.unwrap();
    let health = cache.health();
    assert!(health.bytes > 500 << 10 && health.bytes <= 512 << 10, "{health:?}");
    assert_eq!(warmup.conversations as u64, health.conversations, "the warm-up causes no eviction");
}

#[tokio::test]
async fn warmup_in_outage_reads_the_replica_then_the_store() {
    let world = World::with(700, 10).await;
    let (builder, faults) = world.builder();
    faults.always(Fault::Refuse);
    let cache = builder.open().await.unwrap();
    let warmup = cache.warm().await.unwrap();
    assert_eq!((warmup.conversations, warmup.state), (700, WarmupState::FromDisk));
    assert_eq!(cache.health().conversations, 700);
    for at in 0..700 {
        let freshness = cache.get(thread_id(at)).await.unwrap().unwrap().freshness();
        assert!(matches!(freshness, Freshness::Stale { .. }), "{freshness:?}");
    }
    faults.clear();
    while cache.health().warmup.state != WarmupState::Done {
        tokio::time::sleep(CALL_TIME / 20).await;
    }
    while cache.health().warmup.conversations < 700 {
        tokio::time::sleep(CALL_TIME / 20).await;
    }
    assert_eq!(cache.get(thread_id(0)).await.unwrap().unwrap().freshness(), Freshness::Fresh);
}

#[tokio::test]
async fn warmup_waits_for_the_end_of_an_outage() {
    let world = World::with(1_200, 10).await;
    let (builder, faults) = world.builder();
    // The probe and one page succeed. The next twelve calls fail.
    faults.script([Fault::Pass, Fault::Pass].into_iter().chain([Fault::Refuse; 12]));
    let cache = builder.open().await.unwrap();
    assert_eq!(cache.warm().await.unwrap().conversations, 1_200);
}

#[tokio::test]
async fn warmup_page_does_not_replace_a_newer_write() {
    let world = World::with(300, 10).await;
    let (builder, faults) = world.builder();
    // The probe succeeds. The store reads the page at once, but the response is late.
    faults.script([Fault::Pass, Fault::DelayResponse(CALL_TIME)]);
    let cache = builder.open().await.unwrap();
    while faults.calls("list") == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(cache.put(thread_id(1), "newer").await.unwrap(), WriteOutcome::Stored);
    assert_eq!(cache.remove(thread_id(2)).await.unwrap(), WriteOutcome::Stored);
    assert_eq!(cache.warm().await.unwrap().conversations, 300);
    let loads = faults.calls("load");
    assert_eq!(cache.get(thread_id(1)).await.unwrap().unwrap().json(), "\"newer\"");
    assert!(cache.get(thread_id(2)).await.unwrap().is_none());
    assert_eq!(faults.calls("load"), loads, "memory answers both gets");
}

#[tokio::test]
async fn warmup_ends_with_closed_at_shutdown() {
    let world = World::with(10, 10).await;
    let (builder, faults) = world.builder();
    faults.script([Fault::Pass, Fault::Hang]);
    let cache = builder.open().await.unwrap();
    let waiter = tokio::spawn({
        let cache = cache.clone();
        async move { cache.warm().await }
    });
    tokio::task::yield_now().await;
    cache.shutdown(CALL_TIME).await.unwrap();
    assert_eq!(waiter.await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
}
