//! The warm-up: what it brings into memory, when it stops, and that it undoes nothing.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::sync::Arc;
use std::time::Duration;

use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{Builder, Cache, Durability, ErrorKind, Freshness, Guard, Memory};

const SPAN: Duration = Duration::from_millis(100);

/// A source of truth that outlives the daemons, and where their file lies.
struct World {
    truth: Arc<Memory>,
    dir: tempfile::TempDir,
}

impl World {
    /// With so many threads, the last written first.
    async fn with(threads: usize, bytes: usize) -> Self {
        let world = Self { truth: Arc::default(), dir: tempfile::tempdir().unwrap() };
        let cache = world.builder().0.warm_threads(0).open().await.unwrap();
        assert_eq!(cache.warm().await.unwrap().threads, 0);
        for at in (0..threads).rev() {
            let put = cache.put(name(at), &"x".repeat(bytes)).await.unwrap();
            assert_eq!(put, Durability::Stored);
        }
        let _ = cache.remove("gone").await.unwrap();
        let _ = cache.shutdown(SPAN).await.unwrap();
        world
    }

    fn builder(&self) -> (Builder, Faults) {
        let faulty = Faulty::new(Arc::clone(&self.truth));
        let faults = faulty.faults();
        let builder =
            Cache::builder().store(Guard::new(faulty, 2 * SPAN)).queue(self.dir.path().join("queue.db"));
        let builder = builder.warm_threads(10_000);
        (builder, faults)
    }
}

fn name(at: usize) -> String {
    format!("thread {at:05}")
}

#[tokio::test]
async fn the_newest_threads_are_in_memory_before_anybody_asks() {
    let world = World::with(1_300, 10).await;
    let (builder, faults) = world.builder();
    let cache = builder.warm_threads(1_200).open().await.unwrap();
    let warm_up = cache.warm().await.unwrap();
    assert_eq!((warm_up.threads, warm_up.is_from_disk), (1_200, false));
    assert_eq!(cache.health().warm_up, warm_up);
    assert_eq!(faults.calls("recent"), 3, "pages of 500");
    for at in 0..1_200 {
        assert_eq!(cache.get(name(at)).await.unwrap().unwrap().freshness(), Freshness::Fresh);
    }
    assert_eq!(faults.calls("load"), 0);
    cache.get(name(1_250)).await.unwrap().unwrap();
    assert_eq!(faults.calls("load"), 1, "an older one is loaded");
}

/// A page that takes longer than a call may is no outage: the warm-up asks for less.
#[tokio::test]
async fn pages_that_take_too_long_are_asked_for_in_smaller_ones() {
    for longest in [1, 40] {
        let world = World::with(120, 10).await;
        let (builder, faults) = world.builder();
        faults.longest_page(longest);
        let cache = builder.open().await.unwrap();
        let warm_up = cache.warm().await.unwrap();
        assert_eq!((warm_up.threads, warm_up.is_from_disk), (120, false), "pages of {longest}");
    }
}

#[tokio::test]
async fn a_listing_asks_for_less_where_a_page_takes_too_long() {
    let world = World::with(0, 10).await;
    let (builder, faults) = world.builder();
    let cache = builder.warm_threads(0).open().await.unwrap();
    for at in 0..120 {
        assert_eq!(cache.put(name(at), &at).user("u").await.unwrap(), Durability::Stored);
    }
    faults.longest_page(9);
    let listed = cache.list("u").await.unwrap();
    assert_eq!(listed.len(), 100);
    assert!(listed.windows(2).all(|pair| pair[0].version() > pair[1].version()), "in order, each once");
    faults.longest_page(0);
    assert_eq!(cache.list("u").await.unwrap_err().kind(), ErrorKind::Unavailable, "it ends all the same");
}

#[tokio::test]
async fn the_warm_up_leaves_half_of_the_memory_to_what_comes() {
    let world = World::with(2_000, 1_000).await;
    let cache = world.builder().0.cache_bytes(1 << 20).open().await.unwrap();
    let warm_up = cache.warm().await.unwrap();
    let health = cache.health();
    assert!(health.bytes > 500 << 10 && health.bytes <= 512 << 10, "{health:?}");
    assert_eq!(warm_up.threads as u64, health.threads, "nothing was evicted");
}

#[tokio::test]
async fn in_an_outage_it_takes_the_last_known_copies_and_afterwards_what_is_stored() {
    let world = World::with(700, 10).await;
    let (builder, faults) = world.builder();
    faults.always(Fault::Refuse);
    let cache = builder.open().await.unwrap();
    let warm_up = cache.warm().await.unwrap();
    assert_eq!((warm_up.threads, warm_up.is_from_disk), (700, true));
    assert_eq!(cache.health().threads, 700);
    for at in 0..700 {
        let freshness = cache.get(name(at)).await.unwrap().unwrap().freshness();
        assert!(matches!(freshness, Freshness::Stale { .. }), "{freshness:?}");
    }
    faults.heal();
    while cache.health().warm_up.is_from_disk {
        tokio::time::sleep(SPAN / 20).await;
    }
    while cache.health().warm_up.threads < 700 {
        tokio::time::sleep(SPAN / 20).await;
    }
    assert_eq!(cache.get(name(0)).await.unwrap().unwrap().freshness(), Freshness::Fresh);
}

#[tokio::test]
async fn an_outage_in_its_middle_is_waited_out() {
    let world = World::with(1_200, 10).await;
    let (builder, faults) = world.builder();
    // The probe, a page, and then nothing for a while.
    faults.script([Fault::Pass, Fault::Pass].into_iter().chain([Fault::Refuse; 12]));
    let cache = builder.open().await.unwrap();
    assert_eq!(cache.warm().await.unwrap().threads, 1_200);
}

#[tokio::test]
async fn what_is_written_while_a_page_travels_is_not_undone_by_it() {
    let world = World::with(300, 10).await;
    let (builder, faults) = world.builder();
    // The probe at the start, then the page, which is read at once and comes late.
    faults.script([Fault::Pass, Fault::DelayAnswer(SPAN)]);
    let cache = builder.open().await.unwrap();
    while faults.calls("recent") == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(cache.put(name(1), "newer").await.unwrap(), Durability::Stored);
    assert_eq!(cache.remove(name(2)).await.unwrap(), Durability::Stored);
    assert_eq!(cache.warm().await.unwrap().threads, 300);
    let loads = faults.calls("load");
    assert_eq!(cache.get(name(1)).await.unwrap().unwrap().json(), "\"newer\"");
    assert!(cache.get(name(2)).await.unwrap().is_none());
    assert_eq!(faults.calls("load"), loads, "both are known");
}

#[tokio::test]
async fn a_shutdown_ends_it_and_whoever_waits_for_it() {
    let world = World::with(10, 10).await;
    let (builder, faults) = world.builder();
    faults.script([Fault::Pass, Fault::Hang]);
    let cache = builder.open().await.unwrap();
    let waits = tokio::spawn({
        let cache = cache.clone();
        async move { cache.warm().await }
    });
    tokio::task::yield_now().await;
    let _ = cache.shutdown(SPAN).await.unwrap();
    assert_eq!(waits.await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
}
