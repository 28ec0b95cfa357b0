//! The stale fallback, the breaker, and the health of the cache while the store fails.

use std::time::{Duration, Instant};

use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{BreakerState, Cache, ErrorKind, Freshness};

use crate::{SECOND, bare, open_breaker, resilient, wait_until};

#[tokio::test]
async fn get_in_outage_is_stale_if_cached_else_unavailable() {
    let (cache, faults) = resilient(5 * SECOND).await;
    cache.put("known", &1).await.unwrap();
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
    assert_eq!(
        cache.get("known").await.unwrap().unwrap().json(),
        "1",
        "the failed put leaves memory unchanged"
    );
    assert!(cache.list("u").await.unwrap_err().is_outage());
    faults.clear();
    wait_until("the breaker closes", || cache.health().is_available()).await;
    assert_eq!(cache.get("known").await.unwrap().unwrap().freshness(), Freshness::Fresh);
    assert!(cache.get("unknown").await.unwrap().is_none());
}

#[tokio::test]
async fn get_in_outage_rejects_an_expired_copy() {
    let (cache, faults) = resilient(5 * SECOND).await;
    cache.put("t", &1).ttl(Duration::from_millis(200)).await.unwrap();
    faults.always(Fault::Refuse);
    assert!(cache.get("t").await.unwrap().is_some());
    tokio::time::sleep(Duration::from_millis(220)).await;
    // Another daemon may have written a later expiry, so the cache cannot return `None`.
    assert!(cache.get("t").await.unwrap_err().is_outage());
}

#[tokio::test]
async fn get_with_stale_copy_waits_for_the_soft_timeout_only() {
    let (cache, faults) = bare(|cache| cache.fresh_for(Duration::ZERO).soft_timeout(SECOND / 5)).await;
    cache.put("t", &1).await.unwrap();
    faults.script([Fault::Hang]);
    let found = cache.get("t").await.unwrap().unwrap();
    assert!(matches!(found.freshness(), Freshness::Stale { .. }));
    assert_eq!(faults.calls("load"), 1);
    faults.clear();
}

#[tokio::test]
async fn get_with_rejected_key_is_stale_if_cached() {
    let (cache, faults) = resilient(SECOND).await;
    cache.put("known", &1).await.unwrap();
    faults.always(Fault::Fail(ErrorKind::Unauthorized));
    assert!(matches!(cache.get("known").await.unwrap().unwrap().freshness(), Freshness::Stale { .. }));
    assert_eq!(cache.get("unknown").await.unwrap_err().kind(), ErrorKind::Unauthorized);
}

#[tokio::test]
async fn get_with_any_error_is_stale_if_cached() {
    let (cache, faults) = bare(|cache| cache.fresh_for(Duration::ZERO)).await;
    cache.put("known", &1).await.unwrap();
    for kind in
        [ErrorKind::SchemaOutdated, ErrorKind::Rejected, ErrorKind::Overloaded, ErrorKind::Unauthorized]
    {
        faults.script([Fault::Fail(kind), Fault::Fail(kind)]);
        assert!(matches!(cache.get("known").await.unwrap().unwrap().freshness(), Freshness::Stale { .. }));
        assert_eq!(cache.get("unknown").await.unwrap_err().kind(), kind);
    }
}

#[tokio::test]
async fn get_from_a_slow_store_is_overloaded_beyond_capacity() {
    let (cache, faults) = resilient(SECOND / 5).await;
    faults.always(Fault::Delay(SECOND * 3 / 20));
    let start = Instant::now();
    let gets = (0..1_000).map(|at| {
        let cache = cache.clone();
        tokio::spawn(async move { cache.get(format!("t{at}")).await.map_err(|e| e.kind()) })
    });
    let mut overloaded = 0;
    for get in gets.collect::<Vec<_>>() {
        match get.await.unwrap() {
            Ok(None) => {}
            Err(ErrorKind::Overloaded) => overloaded += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(
        overloaded > 900 && start.elapsed() < 3 * SECOND,
        "{overloaded} calls overloaded after {:?}",
        start.elapsed()
    );
    assert_eq!(faults.max_concurrent("load"), 8);
    assert_eq!(cache.health().breaker, Some(BreakerState::Closed));
}

#[tokio::test]
async fn open_breaker_lets_one_probe_and_no_caller_through() {
    let (cache, faults) = resilient(SECOND).await;
    cache.put("known", &1).await.unwrap();
    open_breaker(&cache, &faults).await;
    faults.always(Fault::Delay(Duration::from_millis(400)));
    let before = (faults.calls("load"), faults.calls("apply"));
    let state = || cache.health().breaker.unwrap();
    let mut seen = std::collections::HashSet::new();
    faults.clear();
    faults.always(Fault::Hang);
    wait_until("the breaker is half-open while a probe hangs", || state() == BreakerState::HalfOpen).await;
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
    // A probe that hangs ends at its deadline. The breaker then sends the next probe (I11).
    let probes = faults.calls("probe");
    wait_until("two further probes are sent", || faults.calls("probe") >= probes + 2).await;
    assert_eq!(faults.max_concurrent("probe"), 1);
    faults.clear();
    wait_until("the breaker closes without traffic", || state() == BreakerState::Closed).await;
    assert_eq!(cache.get("known").await.unwrap().unwrap().freshness(), Freshness::Fresh);
    assert!(seen.contains("half_open"));
}

/// Opens a cache whose store has just answered at once. A slow machine may need several attempts.
async fn prompt(deadline: Duration, soft_timeout: Duration) -> (Cache, Faults) {
    let store = FaultStore::new(Memory::new());
    let faults = store.faults();
    let cache = Cache::builder().store(ResilientStore::new(store, deadline)).soft_timeout(soft_timeout);
    let cache = cache.fresh_for(Duration::ZERO).open().await.unwrap();
    for _ in 0..1_000 {
        let start = Instant::now();
        cache.put("known", &1).await.unwrap();
        if start.elapsed() < soft_timeout / 4 {
            return (cache, faults);
        }
    }
    panic!("no call was fast");
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_store_opens_the_breaker_long_before_the_deadline() {
    let (cache, faults) = prompt(60 * SECOND, SECOND).await;
    faults.always(Fault::Hang);
    let start = Instant::now();
    let gets: Vec<_> = (0..40)
        .map(|at| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.get(format!("unknown {at}")).await.unwrap_err() })
        })
        .collect();
    // A known conversation costs its caller the soft timeout at most.
    assert!(matches!(cache.get("known").await.unwrap().unwrap().freshness(), Freshness::Stale { .. }));
    wait_until("the breaker opens", || cache.health().breaker != Some(BreakerState::Closed)).await;
    let opened = start.elapsed();
    println!("a hanging store: no call waits after {opened:.3?}");
    assert!(opened >= SECOND * 3 / 2 && opened < 20 * SECOND, "opened after {opened:?}");
    assert!(cache.get("unknown").await.unwrap_err().to_string().contains("no call succeeded for 1.5s"));
    // Calls that wait for a slot fail with the opening. The others wait for the store.
    wait_until("the waiting calls end", || gets.iter().filter(|get| get.is_finished()).count() >= 32).await;
    assert!(start.elapsed() < 30 * SECOND, "{:?}", start.elapsed());
    faults.clear();
    wait_until("the breaker closes", || cache.health().is_available()).await;
    assert_eq!(cache.get("known").await.unwrap().unwrap().freshness(), Freshness::Fresh);
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_but_working_store_keeps_the_breaker_closed() {
    for soft_timeout in [SECOND / 4, SECOND] {
        let (cache, faults) = prompt(60 * SECOND, soft_timeout).await;
        faults.always(Fault::Delay(SECOND * 9 / 10));
        let gets: Vec<_> = (0..24)
            .map(|at| {
                let cache = cache.clone();
                tokio::spawn(async move { cache.get(format!("unknown {at}")).await })
            })
            .collect();
        for get in gets {
            assert!(get.await.unwrap().unwrap().is_none());
            assert_eq!(cache.health().breaker, Some(BreakerState::Closed));
        }
        assert_eq!(faults.calls("probe"), 1, "only the start has probed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn breaker_stays_closed_if_only_the_probe_passes() {
    let (cache, faults) = prompt(4 * SECOND, SECOND / 4).await;
    let puts: Vec<_> = (0..6)
        .map(|at| {
            let (cache, key) = (cache.clone(), format!("locked {at}"));
            faults.fail_key(&key, Fault::Hang);
            tokio::spawn(async move { cache.put(key, &1).await })
        })
        .collect();
    let is_closed = || cache.health().breaker == Some(BreakerState::Closed);
    wait_until("the breaker opens", || !is_closed()).await;
    wait_until("the probe closes the breaker", is_closed).await;
    // Each put is sent once more after its deadline, and hangs again.
    wait_until("all puts are sent again", || faults.calls("apply") >= 13).await;
    let start = Instant::now();
    while start.elapsed() < SECOND * 5 / 2 {
        assert!(is_closed(), "opened again after {:?}", start.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    faults.clear_key_faults();
    for put in puts {
        assert!(put.await.unwrap().unwrap_err().is_outage());
    }
}

#[tokio::test]
async fn breaker_closes_under_write_only_traffic() {
    let (cache, faults) = resilient(SECOND).await;
    open_breaker(&cache, &faults).await;
    assert!(cache.put("t", &1).await.unwrap_err().is_outage());
    faults.clear();
    let mut tries = 0;
    while cache.put("t", &1).await.is_err() {
        tries += 1;
        assert!(tries < 2_000, "the breaker stays open");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(cache.health().breaker, Some(BreakerState::Closed));
}

#[tokio::test]
async fn breaker_stays_closed_on_misses_and_rejections() {
    let (cache, faults) = resilient(SECOND).await;
    for at in 0..200 {
        assert!(cache.get(format!("missing {at}")).await.unwrap().is_none());
    }
    for kind in [ErrorKind::Unauthorized, ErrorKind::Rejected, ErrorKind::SchemaOutdated] {
        faults.always(Fault::Fail(kind));
        for _ in 0..50 {
            assert_eq!(cache.put("t", &1).await.unwrap_err().kind(), kind);
        }
    }
    assert_eq!(cache.health().breaker, Some(BreakerState::Closed));
}

#[tokio::test]
async fn health_shows_a_local_storage_error_until_a_write() {
    let (cache, faults) = bare(|cache| cache).await;
    faults.script([Fault::Fail(ErrorKind::LocalStorage)]);
    cache.put("t", &1).await.unwrap_err();
    let health = cache.health();
    assert!(!health.is_available() && health.cause.unwrap().kind() == ErrorKind::LocalStorage);
    cache.put("t", &1).await.unwrap();
    assert!(cache.health().is_available() && cache.health().cause.is_none());
}

#[tokio::test]
async fn health_recovers_from_disk_errors_by_a_write_only() {
    let (cache, faults) = bare(|cache| cache.maintenance_interval(SECOND / 20)).await;
    faults.script([Fault::Fail(ErrorKind::LocalStorage)]);
    cache.put("t", &1).await.unwrap_err();
    assert!(cache.get("t").await.unwrap().is_none());
    assert!(!cache.health().is_available(), "a read does not show that the disk has free space");
    cache.put("t", &1).await.unwrap();
    assert!(cache.health().is_available());
    faults.script([Fault::Fail(ErrorKind::Unauthorized)]);
    cache.put("t", &2).await.unwrap_err();
    wait_until("maintenance checks the store again", || cache.health().is_available()).await;
}
