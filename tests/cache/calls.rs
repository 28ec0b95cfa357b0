//! Gets, puts, updates and listings over a store that works, is slow, or loses responses.

use std::time::Duration;

use serde_json::{Value, json};
use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore};
use threadkeep::{Cache, ErrorKind, Freshness, WriteOutcome};

use crate::{SECOND, bare, resilient, wait_until};

#[tokio::test]
async fn get_returns_value_user_metadata_and_expiry_of_a_put() {
    let (cache, faults) = bare(|cache| cache).await;
    let value = json!({"messages": ["hello", null, 1.5]});
    let put = cache.put("t", &value).ttl(60 * SECOND).user("u").metadata(&json!({"tag": 1}));
    assert_eq!(put.await.unwrap(), WriteOutcome::Stored);
    for _ in 0..2 {
        let found = cache.get("t").await.unwrap().unwrap();
        assert_eq!((found.key().as_str(), found.user()), ("t", Some("u")));
        assert_eq!(found.decode::<Value>().unwrap(), value);
        assert_eq!((found.json(), found.metadata()), (&*value.to_string(), r#"{"tag":1}"#));
        assert_eq!(found.freshness(), Freshness::Fresh);
        let ttl_ms = (found.expires_at() - chrono::DateTime::<chrono::Utc>::from(found.version().at()))
            .num_milliseconds();
        assert!((59_000..=60_000).contains(&ttl_ms), "{ttl_ms} ms");
        cache.evict("t").unwrap();
    }
    assert_eq!(faults.calls("load"), 1, "memory answers the first get");
    assert_eq!(cache.get("t").await.unwrap().unwrap().decode::<u32>().unwrap_err().kind(), ErrorKind::Decode);
}

#[tokio::test]
async fn get_hits_share_the_same_bytes() {
    let (cache, _) = bare(|cache| cache).await;
    cache.put("t", "hello").await.unwrap();
    let (one, two) = (cache.get("t").await.unwrap().unwrap(), cache.get("t").await.unwrap().unwrap());
    assert!(std::ptr::eq(one.json(), two.json()));
}

#[tokio::test]
async fn get_after_remove_is_none_until_the_next_put() {
    let (cache, _) = bare(|cache| cache).await;
    assert!(cache.get("t").await.unwrap().is_none());
    cache.put("t", &1).await.unwrap();
    assert!(cache.get("t").await.unwrap().is_some(), "the put ends the cached absence");
    assert_eq!(cache.remove("t").await.unwrap(), WriteOutcome::Stored);
    assert!(cache.get("t").await.unwrap().is_none());
    cache.put("t", &2).await.unwrap();
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), "2");
}

#[tokio::test]
async fn get_of_expired_conversation_is_none() {
    let (cache, _) = bare(|cache| cache).await;
    cache.put("t", &1).ttl(Duration::from_millis(300)).await.unwrap();
    assert!(cache.get("t").await.unwrap().is_some());
    tokio::time::sleep(Duration::from_millis(320)).await;
    assert!(cache.get("t").await.unwrap().is_none());
}

#[tokio::test]
async fn absence_is_cached_for_two_seconds() {
    let (cache, faults) = bare(|cache| cache).await;
    for _ in 0..100 {
        assert!(cache.get("t").await.unwrap().is_none());
    }
    assert_eq!(faults.calls("load"), 1);
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    assert!(cache.get("t").await.unwrap().is_none());
    assert_eq!(faults.calls("load"), 2);
}

#[tokio::test]
async fn get_of_cold_key_is_single_flight_after_a_cancelled_caller() {
    let (cache, faults) = bare(|cache| cache).await;
    cache.put("t", &1).await.unwrap();
    cache.evict("t").unwrap();
    faults.script([Fault::Delay(Duration::from_millis(300))]);
    let first = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get("t").await }
    });
    wait_until("the load began", || faults.calls("load") == 1).await;
    let gets: Vec<_> = (0..1_000)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.get("t").await })
        })
        .collect();
    tokio::task::yield_now().await;
    first.abort();
    for get in gets {
        assert_eq!(get.await.unwrap().unwrap().unwrap().json(), "1");
    }
    assert_eq!(faults.calls("load"), 1);
}

#[tokio::test]
async fn put_with_lost_response_leaves_no_stale_copy() {
    let (cache, faults) = bare(|cache| cache).await;
    cache.put("t", &1).await.unwrap();
    faults.script([Fault::DropResponse]);
    assert!(cache.put("t", &2).await.unwrap_err().outcome_unknown());
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), "2", "the get loads from the store");
    faults.script([Fault::Fail(ErrorKind::Rejected)]);
    assert_eq!(cache.put("t", &3).await.unwrap_err().kind(), ErrorKind::Rejected);
    assert_eq!(
        (cache.get("t").await.unwrap().unwrap().json(), faults.calls("load")),
        ("2", 1),
        "the rejected put leaves memory unchanged"
    );
}

#[tokio::test]
async fn put_with_dropped_future_completes_and_updates_memory() {
    let (cache, faults) = bare(|cache| cache).await;
    faults.script([Fault::Delay(SECOND)]);
    tokio::select! {
        biased;
        _ = cache.put("t", &1).into_future() => panic!("the put is delayed"),
        () = tokio::time::sleep(Duration::from_millis(20)) => {}
    }
    wait_until("the put is in memory", || cache.health().conversations == 1).await;
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), "1");
    assert_eq!(faults.calls("load"), 0);
}

#[tokio::test]
async fn put_is_overloaded_beyond_the_limit_of_dropped_writes() {
    let (cache, faults) = bare(|cache| cache.soft_timeout(SECOND / 10)).await;
    faults.always(Fault::Hang);
    let value = "x".repeat(8 << 20 >> 1);
    let mut rejection = None;
    for at in 0..32 {
        let put = cache.put(format!("t{at}"), &value).into_future();
        tokio::select! {
            biased;
            result = put => rejection = Some(result.unwrap_err()),
            () = tokio::time::sleep(Duration::from_millis(250)) => continue,
        }
        break;
    }
    let rejection = rejection.expect("the cache accepts more than its limit of dropped writes");
    assert_eq!(rejection.kind(), ErrorKind::Overloaded);
    assert!(faults.calls("apply") < 20, "64 MiB hold fewer than 20 values of 4 MiB");
    faults.clear();
}

#[tokio::test]
async fn invalid_input_is_rejected_before_the_store() {
    let (cache, faults) = bare(|cache| cache.max_value_bytes(1_000)).await;
    let invalid = [
        cache.put("", &1).await,
        cache.put("k".repeat(513), &1).await,
        cache.put("a\0b", &1).await,
        cache.put("t", "x\0y").await,
        cache.put("t", &"x".repeat(1_000)).await,
        cache.put("t", &1).metadata(&"x".repeat(1_000)).await,
        cache.put("t", &1).ttl(Duration::ZERO).await,
        cache.put("t", &1).ttl(Duration::MAX).await,
        cache.put("t", &1).user("").await,
        cache.put("t", &std::collections::HashMap::from([((1, 2), 3)])).await,
        cache.remove("").await,
        cache.update("", |now: Option<u8>| Ok(now)).await,
    ];
    for (at, result) in invalid.into_iter().enumerate() {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Invalid, "case {at}");
    }
    assert_eq!(cache.get("").await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(cache.list("").await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(faults.calls("apply") + faults.calls("load"), 0);
}

#[tokio::test]
async fn update_applies_once_with_64_callers_and_lost_responses() {
    let store = FaultStore::new(Memory::new());
    let faults = store.faults();
    let cache = Cache::builder().store(ResilientStore::new(store, 5 * SECOND)).open().await.unwrap();
    faults.script([Fault::Pass, Fault::Pass, Fault::DropResponse].repeat(60));
    let updates = (0..64_u32).map(|turn| {
        let cache = cache.clone();
        tokio::spawn(async move {
            let append = |turns: Option<Vec<u32>>| Ok(Some([turns.unwrap_or_default(), vec![turn]].concat()));
            cache.update("t", append).await
        })
    });
    for update in updates.collect::<Vec<_>>() {
        assert_eq!(update.await.unwrap().unwrap(), WriteOutcome::Stored);
    }
    let mut turns: Vec<u32> = cache.get("t").await.unwrap().unwrap().decode().unwrap();
    turns.sort_unstable();
    assert_eq!(turns, (0..64).collect::<Vec<_>>());
}

#[tokio::test]
async fn update_reads_removes_keeps_and_aborts() {
    let (cache, faults) = bare(|cache| cache).await;
    let declined = cache
        .update("t", |now: Option<u8>| now.map_or(Err(threadkeep::Error::aborted("none")), |n| Ok(Some(n))));
    assert_eq!(declined.await.unwrap_err().kind(), ErrorKind::Aborted);
    assert_eq!(cache.update("t", |_: Option<u8>| Ok(None)).await.unwrap(), WriteOutcome::Stored);
    assert_eq!(faults.calls("apply"), 0, "the update had nothing to remove");
    cache.put("t", &1).user("u").metadata(&json!({"a": 1})).await.unwrap();
    cache.update("t", |now: Option<u8>| Ok(now.map(|n| n + 1))).await.unwrap();
    let found = cache.get("t").await.unwrap().unwrap();
    assert_eq!((found.json(), found.user(), found.metadata()), ("2", Some("u"), r#"{"a":1}"#));
    cache.update("t", |now: Option<u8>| Ok(now)).user("v").metadata(&json!(7)).await.unwrap();
    let found = cache.get("t").await.unwrap().unwrap();
    assert_eq!((found.user(), found.metadata()), (Some("v"), "7"));
    cache.update("t", |_: Option<u8>| Ok(None)).await.unwrap();
    assert!(cache.get("t").await.unwrap().is_none());
    cache.put("t", "text").await.unwrap();
    let misread = cache.update("t", |now: Option<u8>| Ok(now)).await.unwrap_err();
    assert_eq!(misread.kind(), ErrorKind::Decode);
}

#[tokio::test]
async fn list_returns_the_live_conversations_of_a_user_in_pages() {
    let (cache, _) = bare(|cache| cache).await;
    for at in 0..7 {
        cache.put(format!("t{at}"), &at).user("u").await.unwrap();
    }
    cache.put("other", &0).user("v").await.unwrap();
    cache.remove("t5").await.unwrap();
    let names = |found: &[threadkeep::Conversation]| {
        found.iter().map(|found| found.key().as_str().to_owned()).collect::<Vec<_>>()
    };
    let first = cache.list("u").limit(4).await.unwrap();
    assert_eq!(names(&first), ["t6", "t4", "t3", "t2"]);
    let rest = cache.list("u").after(&first[3]).await.unwrap();
    assert_eq!(names(&rest), ["t1", "t0"]);
    assert!(cache.list("w").await.unwrap().is_empty());
}

#[tokio::test]
async fn list_without_limit_reads_pages_of_500() {
    let (cache, faults) = resilient(SECOND).await;
    for at in 0..501 {
        cache.put(format!("t{at}"), &at).user("u").await.unwrap();
    }
    assert_eq!(cache.list("u").limit(usize::MAX).await.unwrap().len(), 501);
    assert_eq!(faults.calls("list"), 2);
    assert_eq!(cache.list("u").limit(3).await.unwrap().len(), 3);
    assert_eq!(faults.calls("list"), 3);
}

#[tokio::test]
async fn list_during_writes_is_newest_first_and_current() {
    let (cache, faults) = bare(|cache| cache).await;
    for at in 0..5 {
        cache.put(format!("t{at}"), "old").user("u").await.unwrap();
    }
    faults.script([Fault::DelayResponse(SECOND / 5)]);
    let listing = tokio::spawn(cache.list("u").into_future());
    wait_until("the listing is in flight", || faults.calls("list") == 1).await;
    tokio::time::sleep(SECOND / 20).await;
    cache.put("t1", "new").user("u").await.unwrap();
    cache.put("t2", "given away").user("v").await.unwrap();
    cache.remove("t3").await.unwrap();
    let listed = listing.await.unwrap().unwrap();
    let names: Vec<_> = listed.iter().map(|found| (found.key().as_str(), found.json())).collect();
    assert_eq!(names, [("t1", "\"new\""), ("t4", "\"old\""), ("t0", "\"old\"")]);
}

#[tokio::test]
async fn memory_is_limited_by_bytes_and_admits_the_newest() {
    let (cache, faults) = bare(|cache| cache.cache_max_bytes(100_000)).await;
    for at in 0..400 {
        cache.put(format!("t{at}"), &"x".repeat(1_000)).await.unwrap();
    }
    assert!(cache.health().bytes <= 100_000, "{:?}", cache.health());
    assert!(cache.get("t399").await.unwrap().is_some());
    assert_eq!(faults.calls("load"), 0, "memory holds the last value");
    assert!(cache.get("t0").await.unwrap().is_some());
    assert_eq!(faults.calls("load"), 1, "memory has evicted the first value");
}
