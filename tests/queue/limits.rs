//! A full queue, and records that the store rejects.

use std::time::Duration;

use threadkeep::testing::Fault;
use threadkeep::{ErrorKind, Freshness, WriteOutcome};

use crate::{DEADLINE, World, found, queued, sleep, wait_until_drained};

#[tokio::test]
async fn full_queue_rejects_new_writes() {
    let mut world = World::new();
    let cache = world.builder().queue_max_bytes(5_000).open().await.unwrap();
    world.start_outage(&cache).await;
    assert!(!cache.health().is_available() && cache.health().can_write().is_ok());
    let value = "x".repeat(1_000);
    let mut queued_writes = 0;
    let error = loop {
        match cache.put(format!("t{queued_writes}"), &value).await {
            Ok(outcome) => assert_eq!(outcome, WriteOutcome::Queued),
            Err(error) => break error,
        }
        queued_writes += 1;
    };
    assert_eq!(error.kind(), ErrorKind::QueueFull);
    assert!(
        error.to_string().contains("CONVERSATION_QUEUE_MAX_BYTES") && !error.outcome_unknown(),
        "{error}"
    );
    assert!(
        error.to_string().contains("was not queued") && !error.to_string().contains("may hold the write"),
        "{error}"
    );
    assert_eq!((queued(&cache), queued_writes), (4, 4));
    assert_eq!(cache.health().can_write().unwrap_err().kind(), ErrorKind::QueueFull);
    assert_eq!(
        cache.put("t0", &"shorter").await.unwrap(),
        WriteOutcome::Queued,
        "the new write replaces the queued write"
    );
    assert!(cache.health().can_write().is_ok());
    assert!(cache.get(format!("t{queued_writes}")).await.unwrap_err().is_outage());
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("t0").await.as_deref(), Some("\"shorter\""));
    assert_eq!(world.stored(&format!("t{queued_writes}")).await, None);
}

/// The response is lost, or it comes after the soft timeout.
#[tokio::test]
async fn full_queue_error_says_that_the_write_may_be_stored() {
    for fault in [Fault::DropResponse, Fault::DelayResponse(DEADLINE * 2)] {
        let mut world = World::new();
        let cache = world.builder().queue_max_bytes(100).open().await.unwrap();
        world.faults.always(fault);
        let error = cache.put("k", &"x".repeat(1_000)).await.unwrap_err();
        assert!(error.kind() == ErrorKind::QueueFull && error.outcome_unknown(), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains("was not queued") && text.contains("may hold the write nevertheless"),
            "{text}"
        );
        assert!(world.stored("k").await.is_some());
    }
}

#[tokio::test]
async fn failing_record_delays_no_other_and_opens_no_breaker() {
    let mut world = World::new();
    let cache = world.open().await;
    world.start_outage(&cache).await;
    for at in 0..20 {
        cache.put(format!("t{at}"), &at).await.unwrap();
    }
    world.faults.fail_key("t7", Fault::Hang);
    world.faults.fail_key("t13", Fault::Fail(ErrorKind::Rejected));
    world.faults.clear();
    for _ in 0..500 {
        if queued(&cache) == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(queued(&cache), 1, "{:?}", cache.health());
    assert!(cache.health().is_available());
    let letters = cache.dead_letters().await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].record.key.as_str(), "t13");
    assert!(letters[0].reason.contains("rejected"), "{}", letters[0].reason);
    cache.put("another", &1).await.unwrap();
    assert_eq!(found(&cache, "t7").await, Some(("7".into(), Freshness::Queued)));
    for _ in 0..30 {
        tokio::time::sleep(DEADLINE / 2).await;
        assert!(cache.health().is_available(), "{:?}", cache.health());
    }
    world.faults.clear_key_faults();
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("t7").await.as_deref(), Some("7"));
}

/// For example, an operator added a constraint. Two callers get the error. After that, the cache treats it as a fault of the
/// store.
#[tokio::test]
async fn rejections_of_several_conversations_are_a_store_fault() {
    let mut world = World::new();
    let cache = world.open().await;
    for at in 0..6 {
        world.faults.fail_key(format!("t{at}"), Fault::Fail(ErrorKind::Rejected));
    }
    for at in 0..2 {
        assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap_err().kind(), ErrorKind::Rejected);
        // A second rejection of one conversation says nothing about other conversations.
        assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap_err().kind(), ErrorKind::Rejected);
    }
    assert!(cache.health().is_available());
    for at in 2..6 {
        assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap(), WriteOutcome::Queued);
    }
    let cause = cache.health().cause.unwrap();
    assert!(cause.to_string().contains("takes no writes"), "{cause}");
    sleep(1_500).await;
    assert_eq!((queued(&cache), cache.health().queue.unwrap().dead_letters), (4, 0));
    world.faults.clear_key_faults();
    // A stored live write wakes the replay. The backoff of the replay may be ten seconds.
    assert_eq!(cache.put("t0", &0).await.unwrap(), WriteOutcome::Stored);
    assert!(cache.health().is_available());
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("t5").await.as_deref(), Some("5"));
}
