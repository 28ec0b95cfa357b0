//! Listings and the warm-up beside conversations in use, with bounds that hold only some conversations.

use std::time::Duration;

use threadkeep::{Builder, Cache, Durability, Freshness};

use crate::{World, found};

const ACTIVE: usize = 20;
/// Conversations of a thousand characters; memory and replica hold some sixty.
const BOUND: usize = 100_000;
const HOUR: Duration = Duration::from_secs(3_600);

fn active(at: usize) -> String {
    format!("active {at}")
}

fn small(world: &mut World) -> Builder {
    world.builder().cache_bytes(BOUND).replica_bytes(BOUND).warm_threads(0)
}

/// Writes conversations that a daemon does not know: those that will be in use, and after them many of some users.
async fn fill(world: &World, whose: &str, users: usize, each: usize) {
    let other = Cache::builder().store(std::sync::Arc::clone(&world.truth)).open().await.unwrap();
    for at in 0..ACTIVE {
        let put = other.put(active(at), &format!("{at} {}", "x".repeat(1_000))).user(whose);
        assert_eq!(put.await.unwrap(), Durability::Stored);
    }
    for at in 0..users * each {
        let put = other.put(format!("t{at}"), &"x".repeat(1_000)).user(format!("u{}", at % users));
        assert_eq!(put.await.unwrap(), Durability::Stored);
    }
}

async fn use_actives(cache: &Cache) {
    for at in 0..ACTIVE {
        assert!(found(cache, &active(at)).await.is_some());
    }
}

/// Counts the active conversations that can be read in an outage, and after a restart in it.
async fn readable(world: &mut World, cache: Cache) -> (usize, usize) {
    world.away(&cache).await;
    let there = count(&cache).await;
    drop(cache);
    let builder = small(world);
    world.faults.always(threadkeep::testing::Fault::Refuse);
    let cache = builder.open().await.unwrap();
    crate::cut_off(&cache).await;
    (there, count(&cache).await)
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
async fn listing_beyond_the_bounds_displaces_no_conversation_in_use() {
    let mut world = World::new();
    fill(&world, "active", 1, 500).await;
    let cache = small(&mut world).open().await.unwrap();
    use_actives(&cache).await;
    for _ in 0..3 {
        assert_eq!(cache.list("u0").limit(1_000).await.unwrap().len(), 500);
    }
    assert_eq!(readable(&mut world, cache).await, (ACTIVE, ACTIVE));
}

#[tokio::test]
async fn listing_beyond_the_bounds_displaces_nothing_from_memory() {
    let mut world = World::new();
    fill(&world, "active", 1, 500).await;
    let cache = small(&mut world).fresh_for(HOUR).open().await.unwrap();
    use_actives(&cache).await;
    let loads = world.faults.calls("load");
    for _ in 0..3 {
        assert_eq!(cache.list("u0").limit(1_000).await.unwrap().len(), 500);
    }
    use_actives(&cache).await;
    assert_eq!(world.faults.calls("load"), loads, "all are in memory");
    let health = cache.health();
    assert!(health.bytes <= BOUND as u64 / 2 + 1_000, "{health:?}");
}

#[tokio::test]
async fn listings_of_many_users_displace_no_conversation_in_use() {
    let mut world = World::new();
    fill(&world, "active", 50, 10).await;
    let cache = small(&mut world).open().await.unwrap();
    use_actives(&cache).await;
    let users: Vec<_> = (0..50).map(|user| format!("u{user}")).collect();
    for _ in 0..2 {
        let lists = users.iter().map(|user| cache.list(user).into_future());
        for listed in futures::future::join_all(lists).await {
            assert!(listed.unwrap().len() == 10);
        }
    }
    assert_eq!(readable(&mut world, cache).await, (ACTIVE, ACTIVE));
}

/// They come by a listing, and are read in memory: the file learns that with the next listing at the latest.
#[tokio::test]
async fn conversations_that_were_listed_and_then_read_are_in_use() {
    let mut world = World::new();
    fill(&world, "u0", 0, 0).await;
    let cache = small(&mut world).fresh_for(HOUR).open().await.unwrap();
    assert_eq!(cache.list("u0").await.unwrap().len(), ACTIVE);
    use_actives(&cache).await;
    assert_eq!(world.faults.calls("load"), 0, "there is room for them in memory");
    fill(&world, "active", 1, 500).await;
    for _ in 0..3 {
        assert!(cache.list("u0").limit(400).await.unwrap().len() == 400);
    }
    world.away(&cache).await;
    drop(cache);
    let builder = small(&mut world);
    world.faults.always(threadkeep::testing::Fault::Refuse);
    let cache = builder.open().await.unwrap();
    crate::cut_off(&cache).await;
    for at in 0..ACTIVE {
        assert!(cache.get(active(at)).await.unwrap().is_some(), "{at}");
    }
}

#[tokio::test]
async fn new_conversations_take_the_room_of_those_that_were_only_listed() {
    let mut world = World::new();
    fill(&world, "active", 1, 500).await;
    let cache = small(&mut world).open().await.unwrap();
    use_actives(&cache).await;
    assert_eq!(cache.list("u0").limit(1_000).await.unwrap().len(), 500);
    for at in 0..ACTIVE {
        assert_eq!(cache.put(format!("new {at}"), &"x".repeat(1_000)).await.unwrap(), Durability::Stored);
    }
    assert_eq!(cache.list("u0").limit(1_000).await.unwrap().len(), 500);
    assert_eq!(readable(&mut world, cache).await, (ACTIVE, ACTIVE));
}

#[tokio::test]
async fn warm_up_displaces_no_conversation_in_use() {
    let mut world = World::new();
    fill(&world, "active", 0, 0).await;
    let cache = small(&mut world).open().await.unwrap();
    use_actives(&cache).await;
    drop(cache);
    // Each start warms up with what is newest, beside what the file holds of those in use.
    for round in 0..5 {
        let other = Cache::builder().store(std::sync::Arc::clone(&world.truth)).open().await.unwrap();
        for at in 0..100 {
            let put = other.put(format!("t{round} {at}"), &"x".repeat(1_000)).await.unwrap();
            assert_eq!(put, Durability::Stored);
        }
        let cache = small(&mut world).warm_threads(10_000).open().await.unwrap();
        assert!(cache.warm().await.unwrap().threads > 20);
        drop(cache);
    }
    let cache = small(&mut world).open().await.unwrap();
    assert_eq!(readable(&mut world, cache).await, (ACTIVE, ACTIVE));
}
