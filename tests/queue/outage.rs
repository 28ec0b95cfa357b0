//! Queued writes in an outage, and their replay after it.

use std::sync::Arc;
use std::time::Duration;

use threadkeep::testing::Fault;
use threadkeep::{Cache, ErrorKind, Freshness, OnOutage, WriteOutcome};

use crate::{DEADLINE, World, found, queued, sleep, wait_until_drained, wait_until_open};

#[tokio::test]
async fn writes_in_outage_are_queued_and_replayed_after_it() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("removed", &0).await.unwrap();
    world.start_outage(&cache).await;
    assert_eq!(cache.put("put", &1).await.unwrap(), WriteOutcome::Queued);
    assert_eq!(cache.put("put", &2).await.unwrap(), WriteOutcome::Queued);
    assert_eq!(cache.remove("removed").await.unwrap(), WriteOutcome::Queued);
    assert_eq!(found(&cache, "put").await, Some(("2".into(), Freshness::Queued)));
    assert_eq!(found(&cache, "removed").await, None, "a queued remove makes the get return `None` (I14)");
    cache.evict("put").unwrap();
    assert_eq!(
        found(&cache, "put").await,
        Some(("2".into(), Freshness::Queued)),
        "the queue on disk answers the get"
    );
    assert_eq!(queued(&cache), 2, "the queue has one write for each conversation");
    assert_eq!(world.stored("put").await, None);
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("put").await.as_deref(), Some("2"));
    assert_eq!(world.stored("removed").await, None);
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
    assert_eq!(found(&cache, "put").await, Some(("2".into(), Freshness::Fresh)));
}

#[tokio::test]
async fn restart_in_outage_keeps_queue_and_replica() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("stored", &"before").await.unwrap();
    world.start_outage(&cache).await;
    cache.put("queued", &"during").await.unwrap();
    drop(cache);
    let cache = world.open_in_outage().await;
    assert_eq!(found(&cache, "queued").await, Some(("\"during\"".into(), Freshness::Queued)));
    let (json, freshness) = found(&cache, "stored").await.unwrap();
    assert_eq!(json, "\"before\"");
    assert!(matches!(freshness, Freshness::Stale { age } if age < Duration::from_secs(60)), "{freshness:?}");
    assert_eq!(cache.get("unknown").await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(
        cache.list("u").await.unwrap_err().kind(),
        ErrorKind::Unavailable,
        "a listing without the store would be incomplete"
    );
    let append = |current: Option<String>| Ok(Some(current.unwrap() + " and after"));
    assert_eq!(cache.update("stored", append).await.unwrap(), WriteOutcome::Queued);
    assert_eq!(cache.update("queued", append).await.unwrap(), WriteOutcome::Queued);
    let left = cache.shutdown(Duration::from_secs(1)).await.unwrap();
    assert_eq!((left.unfinished, left.still_queued), (0, 3), "an update stands behind its queued put");
    let cache = world.open().await;
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("stored").await.as_deref(), Some("\"before and after\""));
    assert_eq!(world.stored("queued").await.as_deref(), Some("\"during and after\""));
}

#[tokio::test]
async fn slow_put_is_queued_and_completed_by_its_late_response() {
    let mut world = World::new();
    let cache = world.open().await;
    world.faults.script([Fault::DelayResponse(DEADLINE * 3 / 4)]);
    assert_eq!(cache.put("slow", &1).await.unwrap(), WriteOutcome::Queued);
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("slow").await.as_deref(), Some("1"));
    assert_eq!(found(&cache, "slow").await, Some(("1".into(), Freshness::Fresh)));
}

#[tokio::test]
async fn unauthorized_put_is_queued_and_stored_with_a_valid_key() {
    let mut world = World::new();
    let cache = world.open().await;
    world.faults.always(Fault::Fail(ErrorKind::Unauthorized));
    assert_eq!(cache.put("denied", &1).await.unwrap(), WriteOutcome::Queued);
    assert!(!cache.health().is_available(), "a rejected key is an operator alert");
    assert_eq!(
        cache.get("unknown").await.unwrap_err().kind(),
        ErrorKind::Unauthorized,
        "a rejected key must not look like an absent conversation"
    );
    assert_eq!(cache.list("u").await.unwrap_err().kind(), ErrorKind::Unauthorized);
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("denied").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn put_after_outage_replaces_the_queued_put() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("k", &1).await.unwrap();
    world.start_outage(&cache).await;
    assert_eq!(cache.put("k", &2).await.unwrap(), WriteOutcome::Queued);
    // From now on, replay fails and live writes succeed. A conversation with queued writes keeps to the queue.
    world.faults.clear();
    world.faults.fail_replays(true);
    while !cache.health().is_available() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(cache.put("k", &3).await.unwrap(), WriteOutcome::Queued);
    cache.evict("k").unwrap();
    assert_eq!(found(&cache, "k").await, Some(("3".into(), Freshness::Queued)));
    assert_eq!(cache.health().queue.unwrap().records, 1);
    world.faults.fail_replays(false);
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("k").await.as_deref(), Some("3"));
    assert_eq!(
        cache.health().queue.unwrap().dead_letters,
        0,
        "a write replaced by its own daemon is no dead letter (I10)"
    );
}

#[tokio::test]
async fn queued_write_older_than_another_daemons_is_a_dead_letter() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = Arc::clone(&one.store);
    let (first, second) = (one.open().await, two.open().await);
    one.start_outage(&first).await;
    assert_eq!(first.put("put", &"older").await.unwrap(), WriteOutcome::Queued);
    assert_eq!(first.remove("removed").await.unwrap(), WriteOutcome::Queued);
    tokio::time::sleep(Duration::from_millis(3)).await;
    assert_eq!(second.put("put", &"newer").await.unwrap(), WriteOutcome::Stored);
    assert_eq!(second.put("removed", &"newer").await.unwrap(), WriteOutcome::Stored);
    assert_eq!(second.put("other way round", &"older").await.unwrap(), WriteOutcome::Stored);
    tokio::time::sleep(Duration::from_millis(3)).await;
    assert_eq!(first.put("other way round", &"newer").await.unwrap(), WriteOutcome::Queued);
    one.faults.clear();
    wait_until_drained(&first).await;
    for key in ["put", "removed", "other way round"] {
        assert_eq!(one.stored(key).await.as_deref(), Some("\"newer\""), "{key}");
        assert_eq!(found(&first, key).await.unwrap().0, "\"newer\"", "{key}");
    }
    let letters = first.dead_letters().await.unwrap();
    let mut dead_keys: Vec<_> = letters.iter().map(|letter| letter.record.key.as_str()).collect();
    dead_keys.sort_unstable();
    assert_eq!(dead_keys, ["put", "removed"]);
    assert!(letters.iter().all(|letter| letter.reason == "superseded" && letter.newer.is_some()));
    assert_eq!(first.delete_dead_letters(&letters[1]).await.unwrap(), 2);
    assert_eq!(first.health().queue.unwrap().dead_letters, 0);
}

#[tokio::test]
async fn queued_update_never_undoes_another_daemons_write() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = Arc::clone(&one.store);
    let (first, second) = (one.open().await, two.open().await);
    first.put("k", &vec![0]).await.unwrap();
    let append = |turn: i32| move |turns: Option<Vec<i32>>| Ok(Some([turns.unwrap(), vec![turn]].concat()));
    one.start_outage(&first).await;
    assert_eq!(second.update("k", append(1)).await.unwrap(), WriteOutcome::Stored);
    assert_eq!(first.update("k", append(2)).await.unwrap(), WriteOutcome::Queued);
    assert_eq!(first.update("k", append(3)).await.unwrap(), WriteOutcome::Queued);
    one.faults.clear();
    wait_until_drained(&first).await;
    assert_eq!(one.stored("k").await.as_deref(), Some("[0,1]"));
    let letters = first.dead_letters().await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].record.value.as_ref().unwrap().as_str(), "[0,2,3]");
    assert_eq!(found(&first, "k").await.unwrap().0, "[0,1]");
}

#[tokio::test]
async fn updates_apply_once_through_lost_responses_and_outages() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("k", &Vec::<i32>::new()).await.unwrap();
    for turn in 0..30 {
        match turn % 5 {
            1 => world.faults.always(Fault::DropResponse),
            3 => world.faults.always(Fault::Refuse),
            _ => world.faults.clear(),
        }
        let append = |turns: Option<Vec<i32>>| Ok(Some([turns.unwrap(), vec![turn]].concat()));
        cache.update("k", append).await.unwrap();
    }
    world.faults.clear();
    wait_until_drained(&cache).await;
    let turns: Vec<String> = (0..30).map(|turn| turn.to_string()).collect();
    assert_eq!(world.stored("k").await, Some(format!("[{}]", turns.join(","))));
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
}

#[tokio::test]
async fn write_expired_in_the_queue_is_absent_before_and_after_replay() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("k", &"replaced").await.unwrap();
    world.start_outage(&cache).await;
    let short = Duration::from_millis(50);
    assert_eq!(cache.put("k", &"short").ttl(short).await.unwrap(), WriteOutcome::Queued);
    tokio::time::sleep(short * 2).await;
    assert!(cache.get("k").await.unwrap_err().is_outage(), "another daemon may have written a later expiry");
    world.faults.clear();
    world.faults.fail_replays(true);
    while !cache.health().is_available() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(found(&cache, "k").await, None, "the get before the replay returns `None`");
    world.faults.fail_replays(false);
    wait_until_drained(&cache).await;
    assert_eq!(found(&cache, "k").await, None);
    assert_eq!(world.stored("k").await, None);
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
}

#[tokio::test]
async fn on_outage_reject_queues_nothing_and_replays_old_writes() {
    let mut world = World::new();
    let cache = world.open().await;
    world.start_outage(&cache).await;
    cache.put("k", &1).await.unwrap();
    drop(cache);
    let builder = world.builder().on_outage(OnOutage::Reject);
    world.faults.always(Fault::Refuse);
    let cache = builder.open().await.unwrap();
    wait_until_open(&cache).await;
    assert_eq!(cache.put("other", &1).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let refusal = cache.health().can_write().unwrap_err();
    assert!(refusal.to_string().contains("CONVERSATION_ON_OUTAGE"), "{refusal}");
    assert_eq!(found(&cache, "k").await, Some(("1".into(), Freshness::Queued)));
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("k").await.as_deref(), Some("1"));
}

/// Captures the log of this process.
fn capture_log() -> Arc<std::sync::Mutex<Vec<u8>>> {
    #[derive(Clone)]
    struct Log(Arc<std::sync::Mutex<Vec<u8>>>);
    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log(Arc::default());
    let writer = log.clone();
    tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).try_init().ok();
    log.0
}

#[tokio::test]
async fn other_backend_logs_the_writes_left_in_the_old_queue() {
    let log = capture_log();
    let mut world = World::new();
    let cache = world.open().await;
    world.start_outage(&cache).await;
    cache.put("k", &1).await.unwrap();
    cache.shutdown(Duration::ZERO).await.unwrap();
    let path = world.dir.path().join("q.db");
    let local = world.dir.path().join("local.db");
    for (builder, times) in [(Cache::builder().memory(), 1), (Cache::builder().local(&local), 2)] {
        builder.queue(&path).open().await.unwrap();
        let log = String::from_utf8(log.lock().unwrap().clone()).unwrap();
        let named =
            log.lines().filter(|line| line.contains(path.to_str().unwrap()) && line.contains("writes=1"));
        assert_eq!(named.filter(|line| line.contains("acknowledged writes wait")).count(), times, "{log}");
    }
}

#[tokio::test]
async fn queue_drains_with_write_only_traffic_and_without_traffic() {
    let mut world = World::new();
    let cache = world.open().await;
    world.start_outage(&cache).await;
    cache.put("no traffic", &1).await.unwrap();
    world.faults.clear();
    wait_until_drained(&cache).await;
    world.start_outage(&cache).await;
    world.faults.clear();
    let mut outcome = WriteOutcome::Queued;
    for turn in 0..1_000 {
        outcome = cache.put("writes", &turn).await.unwrap();
        if outcome == WriteOutcome::Stored {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(outcome, WriteOutcome::Stored);
    wait_until_drained(&cache).await;
}

#[tokio::test]
async fn replay_starts_and_ends_the_operator_alert() {
    let mut world = World::new();
    let cache = world.open().await;
    world.faults.always(Fault::Fail(ErrorKind::Unauthorized));
    assert_eq!(cache.put("denied", &1).await.unwrap(), WriteOutcome::Queued);
    assert!(!cache.health().is_available());
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert!(cache.health().is_available(), "a successful replay ends the alert: {:?}", cache.health());
    world.start_outage(&cache).await;
    assert_eq!(cache.put("queued", &1).await.unwrap(), WriteOutcome::Queued);
    world.faults.always(Fault::Fail(ErrorKind::Unauthorized));
    for _ in 0..1_500 {
        if cache.health().cause.is_some_and(|cause| cause.kind() == ErrorKind::Unauthorized) {
            return;
        }
        sleep(10).await;
    }
    panic!("timed out: the replay raises no alert: {:?}", cache.health());
}
