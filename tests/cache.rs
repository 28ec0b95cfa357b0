//! The handle, over stores in this process whose faults are planned.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use serde_json::{Value, json};
use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{Builder, Cache, Durability, ErrorKind, Freshness, Guard, Memory, State};

const SECOND: Duration = Duration::from_secs(1);

/// A cache over a store in memory, without guard.
async fn bare(setup: impl FnOnce(Builder) -> Builder) -> (Cache, Faults) {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    (setup(Cache::builder().store(store)).open().await.unwrap(), faults)
}

/// A cache over a guarded store in memory, whose calls may take `deadline`.
async fn guarded(deadline: Duration) -> (Cache, Faults) {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let cache = Cache::builder().store(Guard::new(store, deadline)).fresh_for(Duration::ZERO);
    (cache.open().await.unwrap(), faults)
}

async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..6_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("this never came true: {what}");
}

/// Fails until the breaker opens.
async fn open_breaker(cache: &Cache, faults: &Faults) {
    faults.always(Fault::Refuse);
    while cache.health().breaker == Some(State::Closed) {
        cache.get("no such thread").await.unwrap_err();
    }
}

#[tokio::test]
async fn what_is_put_is_found_with_all_that_belongs_to_it() {
    let (cache, faults) = bare(|cache| cache).await;
    let value = json!({"messages": ["hello", null, 1.5]});
    let put = cache.put("t", &value).ttl(60 * SECOND).user("u").metadata(&json!({"tag": 1}));
    assert_eq!(put.await.unwrap(), Durability::Stored);
    for _ in 0..2 {
        let found = cache.get("t").await.unwrap().unwrap();
        assert_eq!((found.key().as_str(), found.user()), ("t", Some("u")));
        assert_eq!(found.decode::<Value>().unwrap(), value);
        assert_eq!((found.json(), found.metadata()), (&*value.to_string(), r#"{"tag":1}"#));
        assert_eq!(found.freshness(), Freshness::Fresh);
        let life = (found.expires_at() - chrono::DateTime::<chrono::Utc>::from(found.version().at()))
            .num_milliseconds();
        assert!((59_000..=60_000).contains(&life), "{life} ms");
        cache.evict("t").unwrap();
    }
    assert_eq!(faults.calls("load"), 1, "the first get was answered from memory");
    assert_eq!(
        cache.get("t").await.unwrap().unwrap().decode::<u32>().unwrap_err().kind(),
        ErrorKind::Mismatch
    );
}

#[tokio::test]
async fn a_hit_hands_out_the_same_bytes() {
    let (cache, _) = bare(|cache| cache).await;
    let _ = cache.put("t", "hello").await.unwrap();
    let (one, two) = (cache.get("t").await.unwrap().unwrap(), cache.get("t").await.unwrap().unwrap());
    assert!(std::ptr::eq(one.json(), two.json()));
}

#[tokio::test]
async fn a_removed_thread_is_absent_and_a_put_brings_it_back() {
    let (cache, _) = bare(|cache| cache).await;
    assert!(cache.get("t").await.unwrap().is_none());
    let _ = cache.put("t", &1).await.unwrap();
    assert!(cache.get("t").await.unwrap().is_some(), "a cached absence is gone with the put");
    assert_eq!(cache.remove("t").await.unwrap(), Durability::Stored);
    assert!(cache.get("t").await.unwrap().is_none());
    let _ = cache.put("t", &2).await.unwrap();
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), "2");
}

#[tokio::test]
async fn an_expired_thread_is_absent() {
    let (cache, _) = bare(|cache| cache).await;
    let _ = cache.put("t", &1).ttl(Duration::from_millis(300)).await.unwrap();
    assert!(cache.get("t").await.unwrap().is_some());
    tokio::time::sleep(Duration::from_millis(320)).await;
    assert!(cache.get("t").await.unwrap().is_none());
}

#[tokio::test]
async fn absence_is_remembered_for_seconds_only() {
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
async fn a_thousand_gets_of_a_cold_key_cause_one_load_also_when_the_first_gives_up() {
    let (cache, faults) = bare(|cache| cache).await;
    let _ = cache.put("t", &1).await.unwrap();
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
async fn known_threads_are_stale_in_an_outage_and_unknown_ones_unavailable() {
    let (cache, faults) = guarded(5 * SECOND).await;
    let _ = cache.put("known", &1).await.unwrap();
    faults.always(Fault::Refuse);
    let found = cache.get("known").await.unwrap().unwrap();
    assert!(
        matches!(found.freshness(), Freshness::Stale { age } if age < 5 * SECOND),
        "{:?}",
        found.freshness()
    );
    let error = cache.get("unknown").await.unwrap_err();
    assert_eq!((error.kind(), error.outcome_unknown()), (ErrorKind::Unavailable, false));
    let error = cache.put("known", &2).await.unwrap_err();
    assert_eq!((error.kind(), error.outcome_unknown()), (ErrorKind::Unavailable, false));
    assert_eq!(cache.get("known").await.unwrap().unwrap().json(), "1", "memory is as it was");
    assert!(cache.list("u").await.unwrap_err().is_outage());
    faults.heal();
    wait_until("the breaker closes", || cache.health().is_available()).await;
    assert_eq!(cache.get("known").await.unwrap().unwrap().freshness(), Freshness::Fresh);
    assert!(cache.get("unknown").await.unwrap().is_none());
}

#[tokio::test]
async fn a_copy_that_has_expired_is_no_answer_in_an_outage() {
    let (cache, faults) = guarded(5 * SECOND).await;
    let _ = cache.put("t", &1).ttl(Duration::from_millis(200)).await.unwrap();
    faults.always(Fault::Refuse);
    assert!(cache.get("t").await.unwrap().is_some());
    tokio::time::sleep(Duration::from_millis(220)).await;
    // Another daemon may have renewed it.
    assert!(cache.get("t").await.unwrap_err().is_outage());
}

#[tokio::test]
async fn a_slow_source_of_truth_costs_a_reader_with_a_stale_copy_its_patience_only() {
    let (cache, faults) = bare(|cache| cache.fresh_for(Duration::ZERO).patience(SECOND / 5)).await;
    let _ = cache.put("t", &1).await.unwrap();
    faults.script([Fault::Hang]);
    let found = cache.get("t").await.unwrap().unwrap();
    assert!(matches!(found.freshness(), Freshness::Stale { .. }));
    assert_eq!(faults.calls("load"), 1);
    faults.heal();
}

#[tokio::test]
async fn a_write_whose_answer_is_lost_leaves_nothing_stale_behind() {
    let (cache, faults) = bare(|cache| cache).await;
    let _ = cache.put("t", &1).await.unwrap();
    faults.script([Fault::LoseAnswer]);
    assert!(cache.put("t", &2).await.unwrap_err().outcome_unknown());
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), "2", "the store is asked");
    faults.script([Fault::Fail(ErrorKind::Refused)]);
    assert_eq!(cache.put("t", &3).await.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(
        (cache.get("t").await.unwrap().unwrap().json(), faults.calls("load")),
        ("2", 1),
        "memory as it was"
    );
}

#[tokio::test]
async fn an_abandoned_put_is_completed_and_updates_memory() {
    let (cache, faults) = bare(|cache| cache).await;
    faults.script([Fault::Delay(SECOND)]);
    tokio::select! {
        biased;
        _ = cache.put("t", &1).into_future() => panic!("the put is delayed"),
        () = tokio::time::sleep(Duration::from_millis(20)) => {}
    }
    wait_until("the put is in memory", || cache.health().threads == 1).await;
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), "1");
    assert_eq!(faults.calls("load"), 0);
}

#[tokio::test]
async fn abandoned_work_is_bounded() {
    let (cache, faults) = bare(|cache| cache.patience(SECOND / 10)).await;
    faults.always(Fault::Hang);
    let value = "x".repeat(8 << 20 >> 1);
    let mut refused = None;
    for at in 0..32 {
        let put = cache.put(format!("t{at}"), &value).into_future();
        tokio::select! {
            biased;
            result = put => refused = Some(result.unwrap_err()),
            () = tokio::time::sleep(Duration::from_millis(250)) => continue,
        }
        break;
    }
    let refused = refused.expect("no write was refused");
    assert_eq!(refused.kind(), ErrorKind::Busy);
    assert!(faults.calls("apply") < 20, "64 MiB hold fewer than 20 values of 4 MiB");
    faults.heal();
}

#[tokio::test]
async fn bad_input_is_refused_at_the_door() {
    let (cache, faults) = bare(|cache| cache.max_bytes(1_000)).await;
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
async fn sixty_four_concurrent_updates_are_each_applied_once_though_answers_are_lost() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let cache = Cache::builder().store(Guard::new(store, 5 * SECOND)).open().await.unwrap();
    faults.script([Fault::Pass, Fault::Pass, Fault::LoseAnswer].repeat(60));
    let updates = (0..64_u32).map(|turn| {
        let cache = cache.clone();
        tokio::spawn(async move {
            let append = |turns: Option<Vec<u32>>| Ok(Some([turns.unwrap_or_default(), vec![turn]].concat()));
            cache.update("t", append).await
        })
    });
    for update in updates.collect::<Vec<_>>() {
        assert_eq!(update.await.unwrap().unwrap(), Durability::Stored);
    }
    let mut turns: Vec<u32> = cache.get("t").await.unwrap().unwrap().decode().unwrap();
    turns.sort_unstable();
    assert_eq!(turns, (0..64).collect::<Vec<_>>());
}

#[tokio::test]
async fn an_update_sees_removes_keeps_and_declines() {
    let (cache, faults) = bare(|cache| cache).await;
    let declined = cache
        .update("t", |now: Option<u8>| now.map_or(Err(threadkeep::Error::aborted("none")), |n| Ok(Some(n))));
    assert_eq!(declined.await.unwrap_err().kind(), ErrorKind::Aborted);
    assert_eq!(cache.update("t", |_: Option<u8>| Ok(None)).await.unwrap(), Durability::Stored);
    assert_eq!(faults.calls("apply"), 0, "nothing was there to remove");
    let _ = cache.put("t", &1).user("u").metadata(&json!({"a": 1})).await.unwrap();
    let _ = cache.update("t", |now: Option<u8>| Ok(now.map(|n| n + 1))).await.unwrap();
    let found = cache.get("t").await.unwrap().unwrap();
    assert_eq!((found.json(), found.user(), found.metadata()), ("2", Some("u"), r#"{"a":1}"#));
    let _ = cache.update("t", |now: Option<u8>| Ok(now)).user("v").metadata(&json!(7)).await.unwrap();
    let found = cache.get("t").await.unwrap().unwrap();
    assert_eq!((found.user(), found.metadata()), (Some("v"), "7"));
    let _ = cache.update("t", |_: Option<u8>| Ok(None)).await.unwrap();
    assert!(cache.get("t").await.unwrap().is_none());
    let _ = cache.put("t", "text").await.unwrap();
    let misread = cache.update("t", |now: Option<u8>| Ok(now)).await.unwrap_err();
    assert_eq!(misread.kind(), ErrorKind::Mismatch);
}

#[tokio::test]
async fn a_listing_has_a_users_live_threads_in_pages() {
    let (cache, _) = bare(|cache| cache).await;
    for at in 0..7 {
        let _ = cache.put(format!("t{at}"), &at).user("u").await.unwrap();
    }
    let _ = cache.put("other", &0).user("v").await.unwrap();
    let _ = cache.remove("t5").await.unwrap();
    let names = |found: &[threadkeep::Found]| {
        found.iter().map(|found| found.key().as_str().to_owned()).collect::<Vec<_>>()
    };
    let first = cache.list("u").limit(4).await.unwrap();
    assert_eq!(names(&first), ["t6", "t4", "t3", "t2"]);
    let rest = cache.list("u").after(&first[3]).await.unwrap();
    assert_eq!(names(&rest), ["t1", "t0"]);
    assert!(cache.list("w").await.unwrap().is_empty());
}

#[tokio::test]
async fn while_the_breaker_is_open_no_caller_reaches_the_store_and_one_probe_at_a_time_does() {
    let (cache, faults) = guarded(SECOND).await;
    let _ = cache.put("known", &1).await.unwrap();
    open_breaker(&cache, &faults).await;
    faults.always(Fault::Delay(Duration::from_millis(400)));
    let before = (faults.calls("load"), faults.calls("apply"));
    let state = || cache.health().breaker.unwrap();
    let mut seen = std::collections::HashSet::new();
    faults.heal();
    faults.always(Fault::Hang);
    wait_until("a probe hangs: half open", || state() == State::HalfOpen).await;
    for _ in 0..1_000 {
        seen.insert(state().as_str());
        assert_eq!(cache.get("known").await.unwrap().unwrap().json(), "1");
        assert!(cache.get("unknown").await.unwrap_err().is_outage());
        assert!(cache.put("known", &2).await.unwrap_err().is_outage());
    }
    let callers = (0..1_000).map(|_| {
        let cache = cache.clone();
        tokio::spawn(async move { cache.get("unknown").await.is_err() && cache.put("t", &1).await.is_err() })
    });
    for caller in callers.collect::<Vec<_>>() {
        assert!(caller.await.unwrap());
    }
    assert_eq!((faults.calls("load"), faults.calls("apply")), before, "no caller reached the store");
    // A hung probe ends at its deadline and is followed by others.
    let probes = faults.calls("probe");
    wait_until("the next probes", || faults.calls("probe") >= probes + 2).await;
    assert_eq!(faults.most_at_once("probe"), 1);
    faults.heal();
    wait_until("the breaker closes, with no traffic at all", || state() == State::Closed).await;
    assert_eq!(cache.get("known").await.unwrap().unwrap().freshness(), Freshness::Fresh);
    assert!(seen.contains("half_open"));
}

#[tokio::test]
async fn write_only_traffic_sees_the_breaker_close() {
    let (cache, faults) = guarded(SECOND).await;
    open_breaker(&cache, &faults).await;
    assert!(cache.put("t", &1).await.unwrap_err().is_outage());
    faults.heal();
    let mut tries = 0;
    while cache.put("t", &1).await.is_err() {
        tries += 1;
        assert!(tries < 2_000, "the breaker stays open");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(cache.health().breaker, Some(State::Closed));
}

#[tokio::test]
async fn misses_conflicts_and_refusals_never_open_the_breaker() {
    let (cache, faults) = guarded(SECOND).await;
    for at in 0..200 {
        assert!(cache.get(format!("missing {at}")).await.unwrap().is_none());
    }
    for kind in [ErrorKind::Denied, ErrorKind::Refused, ErrorKind::Schema] {
        faults.always(Fault::Fail(kind));
        for _ in 0..50 {
            assert_eq!(cache.put("t", &1).await.unwrap_err().kind(), kind);
        }
    }
    assert_eq!(cache.health().breaker, Some(State::Closed));
}

#[tokio::test]
async fn a_denied_read_is_answered_by_what_is_at_hand() {
    let (cache, faults) = guarded(SECOND).await;
    let _ = cache.put("known", &1).await.unwrap();
    faults.always(Fault::Fail(ErrorKind::Denied));
    assert!(matches!(cache.get("known").await.unwrap().unwrap().freshness(), Freshness::Stale { .. }));
    assert_eq!(cache.get("unknown").await.unwrap_err().kind(), ErrorKind::Denied);
}

#[tokio::test]
async fn shutdown_finishes_what_is_under_way_and_takes_nothing_more() {
    let (cache, faults) = bare(|cache| cache).await;
    faults.script([Fault::Delay(SECOND / 5)]);
    let put = tokio::spawn(cache.put("t", &1).into_future());
    wait_until("the put is under way", || faults.calls("apply") == 1).await;
    assert_eq!(cache.shutdown(5 * SECOND).await.unwrap().unfinished, 0);
    assert_eq!(put.await.unwrap().unwrap(), Durability::Stored);
    assert_eq!(cache.get("t").await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(cache.put("t", &1).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(cache.update("t", |now: Option<u8>| Ok(now)).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(cache.list("u").await.unwrap_err().kind(), ErrorKind::Closed);

    let (cache, faults) = bare(|cache| cache).await;
    faults.script([Fault::Hang]);
    let put = tokio::spawn(cache.put("t", &1).into_future());
    wait_until("the put is under way", || faults.calls("apply") == 1).await;
    assert_eq!(cache.shutdown(SECOND / 10).await.unwrap().unfinished, 1);
    faults.heal();
    assert!(put.await.unwrap().is_err());
}

#[tokio::test]
async fn accesses_are_reported_in_the_background() {
    let (cache, faults) = bare(|cache| cache.upkeep_every(SECOND / 10)).await;
    let _ = cache.put("t", &1).await.unwrap();
    assert!(cache.get("t").await.unwrap().is_some());
    wait_until("the access is reported", || faults.calls("touch") == 1).await;
    wait_until("what is expired is forgotten", || faults.calls("purge") >= 3).await;
    assert_eq!(faults.calls("touch"), 1, "nothing was read since");
    cache.evict("t").unwrap();
    assert!(cache.get("t").await.unwrap().is_some());
    wait_until("the access by a get that loads is reported, too", || faults.calls("touch") == 2).await;
}

#[tokio::test]
async fn memory_is_bounded_by_bytes_and_lets_the_newest_in() {
    let (cache, faults) = bare(|cache| cache.cache_bytes(100_000)).await;
    for at in 0..400 {
        let _ = cache.put(format!("t{at}"), &"x".repeat(1_000)).await.unwrap();
    }
    assert!(cache.health().bytes <= 100_000, "{:?}", cache.health());
    assert!(cache.get("t399").await.unwrap().is_some());
    assert_eq!(faults.calls("load"), 0, "the last one is in memory");
    assert!(cache.get("t0").await.unwrap().is_some());
    assert_eq!(faults.calls("load"), 1, "the first one was evicted");
}

#[tokio::test]
async fn whatever_the_error_is_a_copy_at_hand_is_handed_out() {
    let (cache, faults) = bare(|cache| cache.fresh_for(Duration::ZERO)).await;
    let _ = cache.put("known", &1).await.unwrap();
    for kind in [ErrorKind::Schema, ErrorKind::Refused, ErrorKind::Busy, ErrorKind::Denied] {
        faults.script([Fault::Fail(kind), Fault::Fail(kind)]);
        assert!(matches!(cache.get("known").await.unwrap().unwrap().freshness(), Freshness::Stale { .. }));
        assert_eq!(cache.get("unknown").await.unwrap_err().kind(), kind);
    }
}

#[tokio::test]
async fn health_says_what_an_operator_has_to_mend() {
    let (cache, faults) = bare(|cache| cache).await;
    faults.script([Fault::Fail(ErrorKind::Local)]);
    cache.put("t", &1).await.unwrap_err();
    let health = cache.health();
    assert!(!health.is_available() && health.cause.unwrap().kind() == ErrorKind::Local);
    let _ = cache.put("t", &1).await.unwrap();
    assert!(cache.health().is_available() && cache.health().cause.is_none());
}

#[tokio::test]
async fn a_store_that_is_slow_but_answers_does_not_make_callers_queue_for_ever() {
    let (cache, faults) = guarded(SECOND / 5).await;
    faults.always(Fault::Delay(SECOND * 3 / 20));
    let start = std::time::Instant::now();
    let gets = (0..1_000).map(|at| {
        let cache = cache.clone();
        tokio::spawn(async move { cache.get(format!("t{at}")).await.map_err(|e| e.kind()) })
    });
    let mut busy = 0;
    for get in gets.collect::<Vec<_>>() {
        match get.await.unwrap() {
            Ok(None) => {}
            Err(ErrorKind::Busy) => busy += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(busy > 900 && start.elapsed() < 3 * SECOND, "{busy} busy after {:?}", start.elapsed());
    assert_eq!(faults.most_at_once("load"), 8);
    assert_eq!(cache.health().breaker, Some(State::Closed));
}

#[tokio::test]
async fn a_listing_without_limit_is_made_of_small_pages() {
    let (cache, faults) = guarded(SECOND).await;
    for at in 0..501 {
        let _ = cache.put(format!("t{at}"), &at).user("u").await.unwrap();
    }
    assert_eq!(cache.list("u").limit(usize::MAX).await.unwrap().len(), 501);
    assert_eq!(faults.calls("recent"), 2);
    assert_eq!(cache.list("u").limit(3).await.unwrap().len(), 3);
    assert_eq!(faults.calls("recent"), 3);
}

#[tokio::test]
async fn a_listing_is_newest_first_also_while_its_threads_are_written() {
    let (cache, faults) = bare(|cache| cache).await;
    for at in 0..5 {
        let _ = cache.put(format!("t{at}"), "old").user("u").await.unwrap();
    }
    faults.script([Fault::DelayAnswer(SECOND / 5)]);
    let listing = tokio::spawn(cache.list("u").into_future());
    wait_until("the listing is under way", || faults.calls("recent") == 1).await;
    tokio::time::sleep(SECOND / 20).await;
    let _ = cache.put("t1", "new").user("u").await.unwrap();
    let _ = cache.put("t2", "given away").user("v").await.unwrap();
    let _ = cache.remove("t3").await.unwrap();
    let listed = listing.await.unwrap().unwrap();
    let names: Vec<_> = listed.iter().map(|found| (found.key().as_str(), found.json())).collect();
    assert_eq!(names, [("t1", "\"new\""), ("t4", "\"old\""), ("t0", "\"old\"")]);
}

#[tokio::test]
async fn a_shutdown_counts_a_write_that_waits_for_room() {
    let (cache, faults) = bare(|cache| cache.max_bytes(64 << 20).patience(5 * SECOND)).await;
    faults.script([Fault::Delay(SECOND / 3), Fault::Delay(SECOND / 3)]);
    let large = "x".repeat(40 << 20);
    let first = tokio::spawn(cache.put("first", &large).into_future());
    wait_until("the first put is under way", || faults.calls("apply") == 1).await;
    let second = tokio::spawn(cache.put("second", &large).into_future());
    tokio::time::sleep(SECOND / 20).await;
    assert_eq!(cache.shutdown(10 * SECOND).await.unwrap().unfinished, 0);
    assert!(first.is_finished() && second.is_finished(), "both were waited for");
}

#[test]
fn a_get_on_a_closed_runtime_fails_and_locks_nothing_up() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cache = runtime.block_on(async { Cache::builder().memory().open().await.unwrap() });
    let handle = runtime.handle().clone();
    runtime.shutdown_timeout(SECOND);
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _on_it = handle.enter();
        let results = [(); 2].map(|()| futures::executor::block_on(cache.get("cold")).is_err());
        done.send(results).unwrap();
    });
    assert_eq!(is_done.recv_timeout(10 * SECOND), Ok([true, true]));
}

#[tokio::test]
async fn trouble_with_a_file_ends_with_a_write_and_other_trouble_without_traffic() {
    let (cache, faults) = bare(|cache| cache.upkeep_every(SECOND / 20)).await;
    faults.script([Fault::Fail(ErrorKind::Local)]);
    cache.put("t", &1).await.unwrap_err();
    assert!(cache.get("t").await.unwrap().is_none());
    assert!(!cache.health().is_available(), "a read does not show that the disk has room");
    let _ = cache.put("t", &1).await.unwrap();
    assert!(cache.health().is_available());
    faults.script([Fault::Fail(ErrorKind::Denied)]);
    cache.put("t", &2).await.unwrap_err();
    wait_until("the chores ask again", || cache.health().is_available()).await;
}

#[tokio::test]
async fn a_shutdown_among_callers_who_go_on_counts_only_what_is_under_way() {
    for _ in 0..50 {
        let (cache, _) = bare(|cache| cache).await;
        let callers: Vec<_> = (0..64)
            .map(|at| {
                let cache = cache.clone();
                tokio::spawn(async move { while cache.put(format!("t{at}"), &1).await.is_ok() {} })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert_eq!(cache.shutdown(5 * SECOND).await.unwrap().unfinished, 0);
        futures::future::join_all(callers).await;
    }
}
