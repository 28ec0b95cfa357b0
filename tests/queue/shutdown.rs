//! A shutdown with queued writes.

use std::time::Duration;

use threadkeep::store::{Json, Record, Store, Timestamp, Write};
use threadkeep::testing::Fault;
use threadkeep::{ErrorKind, Key, Version, WriteOutcome};

use crate::{DEADLINE, World, found};

#[tokio::test]
async fn shutdown_drains_the_queue() {
    let mut world = World::new();
    let cache = world.open().await;
    world.faults.script([Fault::Delay(DEADLINE * 3 / 4)]);
    assert_eq!(cache.put("k", &1).await.unwrap(), WriteOutcome::Queued);
    let left = cache.shutdown(Duration::from_secs(5)).await.unwrap();
    assert_eq!((left.unfinished, left.still_queued), (0, 0));
    assert_eq!(world.stored("k").await.as_deref(), Some("1"));
    assert_eq!(cache.put("k", &2).await.unwrap_err().kind(), ErrorKind::Closed);
    let again = world.open().await;
    assert_eq!(found(&again, "k").await.unwrap().0, "1", "the shutdown releases the lock of the file");
}

/// After a restart in an outage, the cache would not have the acknowledged write.
#[tokio::test]
async fn put_stored_after_shutdown_is_not_acknowledged() {
    let mut world = World::new();
    let cache = world.builder().soft_timeout(10 * DEADLINE).open().await.unwrap();
    assert_eq!(cache.put("k", &1).await.unwrap(), WriteOutcome::Stored);
    world.faults.script([Fault::DelayResponse(DEADLINE / 2)]);
    let shutdown = async {
        tokio::time::sleep(DEADLINE / 10).await;
        cache.shutdown(Duration::ZERO).await.unwrap()
    };
    let (put, left) = tokio::join!(async { cache.put("k", &2).await }, shutdown);
    let error = put.unwrap_err();
    assert_eq!((error.kind(), error.outcome_unknown()), (ErrorKind::Closed, true), "{error}");
    assert_eq!((left.unfinished, world.stored("k").await.as_deref()), (1, Some("2")));
    let again = world.open_in_outage().await;
    assert_eq!(found(&again, "k").await.unwrap().0, "1", "the get returns the last acknowledged write");
}

/// After a restart in an outage, the cache would show a value that is older than the one that won.
#[tokio::test]
async fn put_that_lost_after_shutdown_is_not_acknowledged() {
    let mut world = World::new();
    let cache = world.builder().soft_timeout(10 * DEADLINE).open().await.unwrap();
    assert_eq!(cache.put("k", &1).await.unwrap(), WriteOutcome::Stored);
    let newer = Version::min_at(Timestamp(cache.get("k").await.unwrap().unwrap().version().at().0 + 1_000));
    let expires_at = newer.at().plus(Duration::from_secs(3_600));
    let record = Record::put(Key::new("k").unwrap(), newer, Json::of(&3).unwrap(), expires_at);
    world.store.apply(&[Write::new(record)]).await.unwrap();
    world.faults.script([Fault::DelayResponse(DEADLINE / 2)]);
    let shutdown = async {
        tokio::time::sleep(DEADLINE / 10).await;
        cache.shutdown(Duration::ZERO).await.unwrap()
    };
    let (put, _) = tokio::join!(async { cache.put("k", &2).await }, shutdown);
    let error = put.unwrap_err();
    assert_eq!((error.kind(), error.outcome_unknown()), (ErrorKind::Closed, true), "{error}");
}

#[tokio::test]
async fn shutdown_probes_the_store_before_it_gives_up() {
    let mut world = World::new();
    let cache = world.open().await;
    world.start_outage(&cache).await;
    for at in 0..50 {
        assert_eq!(cache.put(format!("{at}"), &at).await.unwrap(), WriteOutcome::Queued);
    }
    // The cache has not noticed the end of the outage. The next regular probe may be far away.
    world.faults.clear();
    let left = cache.shutdown(Duration::from_secs(10)).await.unwrap();
    assert_eq!((left.unfinished, left.still_queued), (0, 0));
    // If the outage continues, one probe ends the shutdown before its deadline.
    let cache = world.open().await;
    world.start_outage(&cache).await;
    assert_eq!(cache.put("left", &1).await.unwrap(), WriteOutcome::Queued);
    let started = std::time::Instant::now();
    let left = cache.shutdown(Duration::from_secs(10)).await.unwrap();
    assert!(left.still_queued == 1 && started.elapsed() < Duration::from_secs(5), "{left:?}");
}
