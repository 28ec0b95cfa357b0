//! Races between writes, replay, late responses and other daemons. Each schedule failed once.

use std::sync::Arc;
use std::time::Duration;

use threadkeep::store::ResilientStore;
use threadkeep::testing::{Fault, FaultStore};
use threadkeep::{Cache, ErrorKind, Freshness, WriteOutcome};

use crate::{DEADLINE, World, append, dead_letters, found, sleep, wait_until_drained};

/// Returns the closure of an update that appends a turn. During its first run, `meanwhile` happens.
fn append_after(
    turn: i32,
    meanwhile: impl Future<Output = ()>,
) -> impl FnMut(Option<Vec<i32>>) -> threadkeep::Result<Option<Vec<i32>>> {
    let mut meanwhile = Some(meanwhile);
    move |turns| {
        if let Some(meanwhile) = meanwhile.take() {
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(meanwhile));
        }
        append(turn)(turns)
    }
}

/// A late response of the first update must not reset the base of the queued updates after it.
#[tokio::test]
async fn late_response_keeps_the_updates_after_it() {
    let mut world = World::new();
    let faulty = FaultStore::new(Arc::clone(&world.store));
    world.faults = faulty.faults();
    let cache = Cache::builder()
        .store(ResilientStore::new(faulty, Duration::from_secs(3)))
        .queue(world.dir.path().join("q.db"))
        .fresh_for(Duration::ZERO)
        .soft_timeout(Duration::from_millis(100))
        .open()
        .await
        .unwrap();
    cache.put("k", &vec![0]).await.unwrap();
    world.faults.fail_replays(true);
    let faults = world.faults.clone();
    let slow = |t: Option<Vec<i32>>| {
        faults.script([Fault::DelayResponse(Duration::from_millis(1500))]);
        append(1)(t)
    };
    assert_eq!(cache.update("k", slow).await.unwrap(), WriteOutcome::Queued);
    for turn in [2, 3] {
        assert_eq!(cache.update("k", append(turn)).await.unwrap(), WriteOutcome::Queued);
    }
    assert_eq!(world.stored("k").await.as_deref(), Some("[0,1]"), "the first update is stored");
    sleep(1500).await; // the late response of the first update arrives
    world.faults.fail_replays(false);
    wait_until_drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), dead_letters(&cache)), (Some("[0,1,2,3]"), 0));
}

/// Replay sends a write alone after a failed batch. A newer write of the same conversation must be sent after it.
#[tokio::test]
async fn put_during_an_isolated_replay_of_its_key_is_replayed() {
    let mut world = World::new();
    let cache = world.open().await;
    world.faults.fail_key("k", Fault::Fail(ErrorKind::Overloaded));
    world.faults.script([Fault::Fail(ErrorKind::Unauthorized)]);
    assert_eq!(cache.put("k", &1).await.unwrap(), WriteOutcome::Queued);
    sleep(200).await; // the batch and the single call fail; the write is parked for 2 s
    world.faults.fail_key("k", Fault::Delay(Duration::from_millis(150)));
    let before = world.faults.calls("apply");
    while world.faults.calls("apply") == before {
        sleep(5).await;
    }
    world.faults.script([Fault::Fail(ErrorKind::Unauthorized)]);
    assert_eq!(cache.put("k", &2).await.unwrap(), WriteOutcome::Queued);
    world.faults.clear_key_faults();
    wait_until_drained(&cache).await;
}

/// An update builds on a queued update that becomes a dead letter. The new update must not overwrite the winner.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn update_over_a_new_dead_letter_keeps_the_winner() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = Arc::clone(&one.store);
    let (first, second) = (one.open().await, two.open().await);
    first.put("k", &vec![0]).await.unwrap();
    one.start_outage(&first).await;
    assert_eq!(second.update("k", append(1)).await.unwrap(), WriteOutcome::Stored);
    sleep(5).await;
    assert_eq!(first.update("k", append(2)).await.unwrap(), WriteOutcome::Queued);
    let mut runs = 0;
    let (cache, faults) = (first.clone(), one.faults.clone());
    let slow = |t: Option<Vec<i32>>| {
        runs += 1;
        if runs == 1 {
            tokio::task::block_in_place(|| {
                faults.clear();
                while dead_letters(&cache) == 0 || cache.health().queue.unwrap().records > 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                faults.always(Fault::Refuse);
            });
        }
        append(3)(t)
    };
    let result = first.update("k", slow).await;
    one.faults.clear();
    wait_until_drained(&first).await;
    let stored = one.stored("k").await.unwrap();
    assert!(stored.starts_with("[0,1"), "{result:?}: the stored write of the other daemon is lost: {stored}");
}

/// During an update, the handle learns of another daemon's write, and then the outage begins. The update runs again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn update_over_a_known_newer_version_runs_again_in_an_outage() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = Arc::clone(&one.store);
    let (first, second) = (one.open().await, two.open().await);
    first.put("k", &vec![0]).await.unwrap();
    let slow = append_after(2, async {
        second.put("k", &vec![1]).await.unwrap();
        assert_eq!(found(&first, "k").await.unwrap().0, "[1]");
        one.start_outage(&first).await;
    });
    assert_eq!(first.update("k", slow).await.unwrap(), WriteOutcome::Queued);
    one.faults.clear();
    wait_until_drained(&first).await;
    assert_eq!((one.stored("k").await.as_deref(), dead_letters(&first)), (Some("[1,2]"), 0));
}

/// The same without an outage: the request of the first run could only conflict. Without a response it would be queued, and
/// readers who saw the other daemon's write would see an older value.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn update_over_a_known_newer_version_runs_again_before_it_is_sent() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = Arc::clone(&one.store);
    let (first, second) = (one.open().await, two.open().await);
    first.put("k", &vec![0]).await.unwrap();
    let sent = one.faults.calls("apply");
    let mut runs = 0;
    let mut append = append_after(2, async {
        second.put("k", &vec![1]).await.unwrap();
        assert_eq!(found(&first, "k").await.unwrap().0, "[1]");
    });
    let slow = |t: Option<Vec<i32>>| {
        runs += 1;
        append(t)
    };
    assert_eq!(first.update("k", slow).await.unwrap(), WriteOutcome::Stored);
    assert_eq!((runs, one.faults.calls("apply") - sent), (2, 1));
    assert_eq!(one.stored("k").await.as_deref(), Some("[1,2]"));
}

/// If the queue is full, rejected updates of a queued write must not add dead letters.
#[tokio::test]
async fn full_queue_adds_no_dead_letters() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = Arc::clone(&one.store);
    let second = two.open().await;
    let first = one.builder().queue_max_bytes(3_000).open().await.unwrap();
    one.start_outage(&first).await;
    let big = "x".repeat(1_000);
    assert_eq!(first.put("k", &big).await.unwrap(), WriteOutcome::Queued);
    assert_eq!(first.put("other", &big).await.unwrap(), WriteOutcome::Queued);
    sleep(5).await;
    assert_eq!(second.put("k", &big).user("u").await.unwrap(), WriteOutcome::Stored);
    one.faults.clear();
    one.faults.fail_replays(true);
    while !first.health().is_available() {
        sleep(5).await;
    }
    assert_eq!(first.list("u").await.unwrap().len(), 1);
    one.start_outage(&first).await;
    for _ in 0..5 {
        let error = first.update("k", |text: Option<String>| Ok(text)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::QueueFull);
    }
    let queue = first.health().queue.unwrap();
    assert_eq!((queue.records, queue.dead_letters), (2, 0), "the queue is unchanged: {queue:?}");
}

/// A gateway that answers 404 to each request must not turn queued writes into dead letters (I10).
#[tokio::test]
async fn gateway_that_rejects_everything_makes_no_dead_letter() {
    let mut world = World::new();
    let cache = world.open().await;
    world.start_outage(&cache).await;
    for at in 0..10 {
        assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap(), WriteOutcome::Queued);
    }
    world.faults.always(Fault::Fail(ErrorKind::Rejected));
    sleep(3_000).await;
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!((dead_letters(&cache), world.stored("t3").await.as_deref()), (0, Some("3")));
}

/// Replay finds a write that is already stored. The get must not return it as fresh, because another daemon updated it.
#[tokio::test]
async fn write_stored_before_its_replay_is_not_fresh() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = Arc::clone(&one.store);
    let second = two.open().await;
    let builder = one.builder().fresh_for(Duration::from_secs(30));
    let first = builder.open().await.unwrap();
    one.faults.always(Fault::DropResponse);
    assert_eq!(first.put("k", &vec![0]).await.unwrap(), WriteOutcome::Queued);
    one.start_outage(&first).await;
    assert_eq!(second.update("k", append(1)).await.unwrap(), WriteOutcome::Stored);
    one.faults.clear();
    wait_until_drained(&first).await;
    assert_eq!(found(&first, "k").await, Some(("[0,1]".into(), Freshness::Fresh)));
}

/// Two readers find a copy in the replica. One reader admits it to memory. The other reader must not depend on memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn replica_copy_is_returned_to_each_of_several_readers() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("k", &1).await.unwrap();
    world.start_outage(&cache).await;
    let read = |cache: Cache| async move {
        for _ in 0..2_000 {
            let (json, freshness) = found(&cache, "k").await.unwrap();
            assert!(json == "1" && matches!(freshness, Freshness::Stale { .. }), "{json} {freshness:?}");
            cache.evict("k").unwrap();
        }
    };
    futures::future::join_all((0..4).map(|_| tokio::spawn(read(cache.clone()))))
        .await
        .into_iter()
        .for_each(Result::unwrap);
}

/// A put, a newer put and an update of it are queued. The late response of the first put must not break the update.
#[tokio::test]
async fn late_response_of_an_older_put_keeps_the_update() {
    let mut world = World::new();
    let faulty = FaultStore::new(Arc::clone(&world.store));
    world.faults = faulty.faults();
    let resilient = ResilientStore::new(faulty, Duration::from_secs(3));
    let builder = Cache::builder().store(resilient).queue(world.dir.path().join("q.db"));
    let cache = builder.fresh_for(Duration::ZERO).soft_timeout(DEADLINE / 2).open().await.unwrap();
    world.faults.fail_replays(true);
    world.faults.script([Fault::DelayResponse(Duration::from_secs(1))]);
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Queued);
    assert_eq!(world.stored("k").await.as_deref(), Some("[0]"), "the put is stored and its response is late");
    world.faults.script([Fault::Fail(ErrorKind::Unauthorized)]);
    assert_eq!(cache.put("k", &vec![1]).await.unwrap(), WriteOutcome::Queued);
    assert_eq!(cache.update("k", append(2)).await.unwrap(), WriteOutcome::Queued);
    sleep(1_200).await; // the late response arrives
    world.faults.fail_replays(false);
    wait_until_drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), dead_letters(&cache)), (Some("[1,2]"), 0));
}

/// A record that expires during its load must not be returned.
#[tokio::test]
async fn record_that_expires_during_its_load_is_absent() {
    let mut world = World::new();
    let faulty = FaultStore::new(Arc::clone(&world.store));
    world.faults = faulty.faults();
    let resilient = ResilientStore::new(faulty, Duration::from_secs(3));
    let builder = Cache::builder().store(resilient).queue(world.dir.path().join("q.db"));
    let cache = builder.soft_timeout(Duration::from_secs(3)).open().await.unwrap();
    let ttl = Duration::from_millis(300);
    for key in ["got", "updated", "listed"] {
        assert_eq!(cache.put(key, &vec![0]).ttl(ttl).user("u").await.unwrap(), WriteOutcome::Stored);
        cache.evict(key).unwrap();
    }
    let slow = || world.faults.script([Fault::DelayResponse(2 * ttl)]);
    slow();
    let (listed, got, updated) = tokio::join!(
        async { cache.list("u").await.unwrap().len() },
        async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            slow();
            found(&cache, "got").await
        },
        async {
            tokio::time::sleep(Duration::from_millis(40)).await;
            slow();
            cache.update("updated", append(1)).await.unwrap()
        },
    );
    assert_eq!((listed, got, updated), (0, None, WriteOutcome::Stored));
    assert_eq!(
        world.stored("updated").await.as_deref(),
        Some("[1]"),
        "the update must not build on the expired value"
    );
}

/// A remove overtakes a load, and the replica evicts the tombstone. The late load must not restore its copy (I2).
#[tokio::test]
async fn late_load_does_not_restore_an_old_copy() {
    let mut world = World::new();
    let cache = world.builder().replica_max_bytes(1_000).open().await.unwrap();
    assert_eq!(cache.put("k", &0).await.unwrap(), WriteOutcome::Stored);
    cache.evict("k").unwrap();
    world.faults.script([Fault::DelayResponse(5 * DEADLINE)]);
    let late = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get("k").await }
    });
    while world.faults.calls("load") == 0 {
        tokio::task::yield_now().await;
    }
    sleep(5).await; // the load reads the record
    assert_eq!(cache.remove("k").await.unwrap(), WriteOutcome::Stored);
    for at in 0..20 {
        assert_eq!(cache.put(format!("{at}"), &"x".repeat(100)).await.unwrap(), WriteOutcome::Stored);
    }
    world.faults.always(Fault::Refuse);
    let error = late.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "no copy of the conversation is left");
}

/// A write that the store has perhaps superseded is not read before the store has been asked.
#[tokio::test]
async fn unverified_and_superseded_writes_are_not_read_before_their_replay() {
    let mut world = World::new();
    let cache = world.open_in_outage().await;
    for key in ["unverified", "superseded", "verified"] {
        assert_eq!(cache.put(key, key).await.unwrap(), WriteOutcome::Queued);
    }
    cache.shutdown(Duration::ZERO).await.unwrap();
    // Copies were lost after the first write, and the store was seen with a newer version of the second one.
    let sql = "insert into meta select 'unverified', seq from records where key = 'unverified';
               insert into records select 1000, key, 0, version + 2, expires_at, at, bytes, writer, if_version, 0, user, metadata, null, null
                   from records where key = 'superseded';";
    rusqlite::Connection::open(world.dir.path().join("q.db")).unwrap().execute_batch(sql).unwrap();
    let cache = world.open_in_outage().await;
    assert_eq!(cache.get("verified").await.unwrap().unwrap().freshness(), Freshness::Queued);
    for key in ["unverified", "superseded"] {
        let error = cache.get(key).await.unwrap_err();
        assert!(error.is_outage(), "{key} is not readable before its verification: {error}");
    }
    world.faults.clear();
    wait_until_drained(&cache).await;
    for key in ["verified", "unverified", "superseded"] {
        assert_eq!(world.stored(key).await.unwrap(), format!("{key:?}"));
    }
}
