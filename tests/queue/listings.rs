//! Listings and the warm-up keep conversations in use, with limits that hold only some conversations.

use std::time::Duration;

use threadkeep::{Builder, Cache, Freshness, WriteOutcome};

use crate::{World, found};

const ACTIVE: usize = 20;
/// The limit of memory and of the replica. It holds about sixty conversations of a thousand characters.
const MAX_BYTES: usize = 100_000;
const HOUR: Duration = Duration::from_secs(3_600);

fn active(at: usize) -> String {
    format!("active {at}")
}

fn small_cache(world: &mut World) -> Builder {
    world.builder().cache_max_bytes(MAX_BYTES).replica_max_bytes(MAX_BYTES).warmup_limit(0)
}

/// Writes conversations that the daemon has not seen: the active conversations, then `each` conversations for each user.
async fn fill(world: &World, owner: &str, users: usize, each: usize) {
    let other = Cache::builder().store(std::sync::Arc::clone(&world.store)).open().await.unwrap();
    for at in 0..ACTIVE {
        let put = other.put(active(at), &format!("{at} {}", "x".repeat(1_000))).user(owner);
        assert_eq!(put.await.unwrap(), WriteOutcome::Stored);
    }
    for at in 0..users * each {
        let put = other.put(format!("t{at}"), &"x".repeat(1_000)).user(format!("u{}", at % users));
        assert_eq!(put.await.unwrap(), WriteOutcome::Stored);
    }
}

async fn use_actives(cache: &Cache) {
    for at in 0..ACTIVE {
        assert!(found(cache, &active(at)).await.is_some());
    }
}

/// Counts the active conversations that a get returns in an outage, before and after a restart.
async fn count_readable(world: &mut World, cache: Cache) -> (usize, usize) {
    world.start_outage(&cache).await;
    let before_restart = count(&cache).await;
    drop(cache);
    let builder = small_cache(world);
    world.faults.always(threadkeep::testing::Fault::Refuse);
    let cache = builder.open().await.unwrap();
    crate::wait_until_open(&cache).await;
    (before_restart, count(&cache).await)
}

async fn count(cache: &Cache) -> usize {
    let mut count = 0;
    for at in 0..ACTIVE {
        if let Ok(Some(found)) = cache.get(active(at)).await {
            assert!(matches!(found.freshness(), Freshness::Stale { .. }));
            assert_eq!(found.decode::<String>().unwrap(), format!("{at} {}", "x".repeat(1_000)));
            count += 1;
        }
    }
    count
}

#[tokio::test]
async fn listing_beyond_the_limit_evicts_no_active_conversation() {
    let mut world = World::new();
    fill(&world, "active", 1, 500).await;
    let cache = small_cache(&mut world).open().await.unwrap();
    use_actives(&cache).await;
    for _ in 0..3 {
        assert_eq!(cache.list("u0").limit(1_000).await.unwrap().len(), 500);
    }
    assert_eq!(count_readable(&mut world, cache).await, (ACTIVE, ACTIVE));
}

#[tokio::test]
async fn listing_beyond_the_limit_evicts_nothing_from_memory() {
    let mut world = World::new();
    fill(&world, "active", 1, 500).await;
    let cache = small_cache(&mut world).fresh_for(HOUR).open().await.unwrap();
    use_actives(&cache).await;
    let loads = world.faults.calls("load");
    for _ in 0..3 {
        assert_eq!(cache.list("u0").limit(1_000).await.unwrap().len(), 500);
    }
    use_actives(&cache).await;
    assert_eq!(world.faults.calls("load"), loads, "memory answers each get");
    let health = cache.health();
    assert!(health.bytes <= MAX_BYTES as u64 / 2 + 1_000, "{health:?}");
}

#[tokio::test]
async fn listings_of_many_users_evict_no_active_conversation() {
    let mut world = World::new();
    fill(&world, "active", 50, 10).await;
    let cache = small_cache(&mut world).open().await.unwrap();
    use_actives(&cache).await;
    let users: Vec<_> = (0..50).map(|user| format!("u{user}")).collect();
    for _ in 0..2 {
        let lists = users.iter().map(|user| cache.list(user).into_future());
        for listed in futures::future::join_all(lists).await {
            assert!(listed.unwrap().len() == 10);
        }
    }
    assert_eq!(count_readable(&mut world, cache).await, (ACTIVE, ACTIVE));
}

/// A listing brings the conversations into memory, and gets read them there. The file learns of the reads with the next
/// listing at the latest.
#[tokio::test]
async fn listed_and_read_conversations_count_as_active() {
    let mut world = World::new();
    fill(&world, "u0", 0, 0).await;
    let cache = small_cache(&mut world).fresh_for(HOUR).open().await.unwrap();
    assert_eq!(cache.list("u0").await.unwrap().len(), ACTIVE);
    use_actives(&cache).await;
    assert_eq!(world.faults.calls("load"), 0, "memory holds the listed conversations");
    fill(&world, "active", 1, 500).await;
    for _ in 0..3 {
        assert!(cache.list("u0").limit(400).await.unwrap().len() == 400);
    }
    world.start_outage(&cache).await;
    drop(cache);
    let builder = small_cache(&mut world);
    world.faults.always(threadkeep::testing::Fault::Refuse);
    let cache = builder.open().await.unwrap();
    crate::wait_until_open(&cache).await;
    for at in 0..ACTIVE {
        assert!(cache.get(active(at)).await.unwrap().is_some(), "{at}");
    }
}

#[tokio::test]
async fn new_conversations_evict_only_listed_ones() {
    let mut world = World::new();
    fill(&world, "active", 1, 500).await;
    let cache = small_cache(&mut world).open().await.unwrap();
    use_actives(&cache).await;
    assert_eq!(cache.list("u0").limit(1_000).await.unwrap().len(), 500);
    for at in 0..ACTIVE {
        assert_eq!(cache.put(format!("new {at}"), &"x".repeat(1_000)).await.unwrap(), WriteOutcome::Stored);
    }
    assert_eq!(cache.list("u0").limit(1_000).await.unwrap().len(), 500);
    assert_eq!(count_readable(&mut world, cache).await, (ACTIVE, ACTIVE));
}

#[tokio::test]
async fn warmup_evicts_no_active_conversation() {
    let mut world = World::new();
    fill(&world, "active", 0, 0).await;
    let cache = small_cache(&mut world).open().await.unwrap();
    use_actives(&cache).await;
    drop(cache);
    // Each start loads the newest conversations. The file also holds the active conversations.
    for round in 0..5 {
        let other = Cache::builder().store(std::sync::Arc::clone(&world.store)).open().await.unwrap();
        for at in 0..100 {
            let put = other.put(format!("t{round} {at}"), &"x".repeat(1_000)).await.unwrap();
            assert_eq!(put, WriteOutcome::Stored);
        }
        let cache = small_cache(&mut world).warmup_limit(10_000).open().await.unwrap();
        assert!(cache.warm().await.unwrap().conversations > 20);
        drop(cache);
    }
    let cache = small_cache(&mut world).open().await.unwrap();
    assert_eq!(count_readable(&mut world, cache).await, (ACTIVE, ACTIVE));
}
