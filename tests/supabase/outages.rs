//! Outages of every kind. Known conversations stay readable as stale, unknown conversations are unavailable, and writes
//! are queued on disk. The daemon recovers without help.

use std::future::IntoFuture;
use std::time::Duration;

use threadkeep::{BreakerState, Cache, ErrorKind, Freshness, WriteOutcome};

use crate::stack::{Fault, Gateway, Server, Stack};
use crate::{AMPLE, SECOND, builder, daemon, drained, eventually, get, key, shared};

on_each_server!(
    outage_by_killed_postgresql_recovers,
    outage_by_killed_rest_server_recovers,
    outage_by_gateway_fault_recovers,
    start_during_an_outage_queues_writes,
    probe_waits_for_retry_after,
    open_breaker_sends_only_probes,
);

/// Checks reads and writes during an outage and the recovery. `begin` begins the outage, `end` ends it.
async fn assert_outage(outage: &str, cache: &Cache, begin: impl AsyncFnOnce(), end: impl AsyncFnOnce()) {
    let (known, unknown, written) = (key("known"), key("unknown"), key("written"));
    cache.put(&known, "before").await.unwrap();
    // On a busy machine, a slow store may queue this write or open the breaker before the outage begins.
    drained(outage, cache).await;
    eventually(outage, async || {
        let found = cache.get(&known).await;
        found.is_ok_and(|found| found.is_some_and(|found| found.freshness() == Freshness::Fresh))
    })
    .await;
    begin().await;
    for round in 0..8 {
        let found = get(cache, &known).await.unwrap();
        assert_eq!(found.json(), "\"before\"", "{outage}, round {round}");
        assert!(matches!(found.freshness(), Freshness::Stale { .. }), "{outage}, round {round}");
        let error = cache.get(&unknown).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{outage}, round {round}: {error}");
        assert!(error.to_string().len() > 20, "the error must name its cause: {error}");
        let outcome = cache.put(&written, &round).await.unwrap();
        assert_eq!(outcome, WriteOutcome::Queued, "{outage}, round {round}");
        let found = get(cache, &written).await.unwrap();
        assert_eq!((found.json(), found.freshness()), (&*round.to_string(), Freshness::Queued), "{outage}");
    }
    assert_ne!(cache.health().breaker, Some(BreakerState::Closed), "{outage}");
    assert!(cache.health().cause.is_some(), "{outage}");
    end().await;
    eventually(outage, async || {
        cache.get(&known).await.is_ok_and(|found| {
            found.is_some_and(|found| found.freshness() == Freshness::Fresh && found.json() == "\"before\"")
        })
    })
    .await;
    drained(outage, cache).await;
    eventually(outage, async || {
        let found = cache.get(&written).await.ok().flatten();
        found.is_some_and(|found| (found.json(), found.freshness()) == ("7", Freshness::Fresh))
    })
    .await;
    eventually(outage, async || cache.get(&unknown).await.is_ok_and(|found| found.is_none())).await;
    cache.put(&known, "after").await.unwrap();
    assert_eq!(get(cache, &known).await.unwrap().json(), "\"after\"", "{outage}");
}

/// Starts a private stack, which the test may break, and a daemon.
async fn private(server: Server) -> (Stack, Gateway, Cache) {
    let stack = tokio::task::spawn_blocking(move || Stack::start(server)).await.unwrap();
    let gateway = stack.gateway().await;
    let cache = daemon(&gateway).await;
    (stack, gateway, cache)
}

async fn outage_by_killed_postgresql_recovers(server: Server) {
    let (stack, _gateway, cache) = private(server).await;
    let block = |change: fn(&Stack)| tokio::task::block_in_place(|| change(&stack));
    let begin = async || block(Stack::stop_postgres);
    assert_outage("PostgreSQL is killed", &cache, begin, async || block(Stack::start_postgres)).await;
}

async fn outage_by_killed_rest_server_recovers(server: Server) {
    let (stack, _gateway, cache) = private(server).await;
    let block = |change: fn(&Stack)| tokio::task::block_in_place(|| change(&stack));
    let begin = async || block(Stack::kill_server);
    assert_outage("the REST server is killed", &cache, begin, async || block(Stack::start_server)).await;
}

async fn outage_by_gateway_fault_recovers(server: Server) {
    let (_, gateway, _) = shared(server).await;
    // All responses here are fast, so a hanging request gets a shorter timeout.
    let cache = builder(&gateway).timeout(SECOND / 2).soft_timeout(SECOND / 10).open().await.unwrap();
    for (outage, fault) in [
        ("hanging", Fault::Hang),
        ("HTML 522", Fault::html(522)),
        ("HTML 502", Fault::html(502)),
        ("HTML with status 200", Fault::html(200)),
        ("paused project", Fault::html(540)),
        ("too many connections", Fault::json_error(500, "53300")),
        ("statement timeout", Fault::json_error(500, "57014")),
        ("schema cache not loaded", Fault::json_error(503, "PGRST002")),
        ("reset", Fault::Reset),
        ("truncated", Fault::Truncate),
    ] {
        let begin = async || gateway.always(fault);
        assert_outage(outage, &cache, begin, async || gateway.clear()).await;
    }
    assert_outage("refused", &cache, async || gateway.refuse().await, async || gateway.accept().await).await;
}

async fn start_during_an_outage_queues_writes(server: Server) {
    let (_, gateway, cache) = shared(server).await;
    let key = key("known before");
    cache.put(&key, "before").await.unwrap();
    gateway.refuse().await;
    let restarted = daemon(&gateway).await;
    assert_eq!(restarted.health().breaker, Some(BreakerState::Open));
    assert!(restarted.get(&key).await.unwrap_err().is_outage());
    assert_eq!(restarted.put(&key, "during").await.unwrap(), WriteOutcome::Queued);
    gateway.accept().await;
    drained("a start in an outage", &restarted).await;
    assert_eq!(get(&cache, &key).await.unwrap().json(), "\"during\"");
}

async fn probe_waits_for_retry_after(server: Server) {
    let (_, gateway, cache) = shared(server).await;
    gateway.always(Fault::retry_after(503, 3));
    while cache.health().breaker == Some(BreakerState::Closed) {
        let error = cache.get(key("any")).await.unwrap_err();
        assert_eq!(error.retry_after(), Some(3 * SECOND), "{error}");
    }
    gateway.forget();
    let opened = std::time::Instant::now();
    gateway.wait_for(1, "threadkeep_probe").await;
    let waited = opened.elapsed();
    assert!(waited > Duration::from_millis(2_500) && waited < AMPLE, "the first probe came after {waited:?}");
    assert_eq!(gateway.seen().len(), 1, "the gateway must see only the probe");
}

async fn open_breaker_sends_only_probes(server: Server) {
    let (_, gateway, cache) = shared(server).await;
    let known = key("known");
    cache.put(&known, "known").await.unwrap();
    gateway.always(Fault::html(522));
    while cache.health().breaker == Some(BreakerState::Closed) {
        cache.get(key("any")).await.unwrap_err();
    }
    gateway.always(Fault::Hang);
    gateway.wait_for(1, "threadkeep_probe").await;
    eventually("a probe hangs", async || cache.health().breaker == Some(BreakerState::HalfOpen)).await;
    gateway.forget();
    let callers = (0..1_000).map(|at| {
        let (cache, known) = (cache.clone(), known.clone());
        tokio::spawn(async move {
            match at % 3 {
                0 => cache.get(&known).await.unwrap().is_some(),
                1 => cache.get(key("unknown")).await.is_err(),
                _ => cache.put(key("new"), "new").await.unwrap() == WriteOutcome::Queued,
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        assert!(caller.await.unwrap());
    }
    let seen = gateway.seen();
    assert!(seen.iter().all(|seen| seen.path.contains("threadkeep_probe")), "{seen:?}");
    gateway.wait_for(2, "threadkeep_probe").await;
    assert_eq!(gateway.max_in_flight("threadkeep_probe"), 1);
    gateway.clear();
    eventually("the breaker closes without traffic", async || cache.health().is_available()).await;
    drained("without traffic", &cache).await;
}

/// The runtime has one OS thread. Between two requests it polls no task: neither the probe, nor replay, nor a pooled
/// connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_threaded_daemon_recovers_from_an_outage() {
    let (_, gateway, _) = shared(Server::Postrust).await;
    let (builder, key) = (builder(&gateway), key("one thread"));
    let daemon = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let cache = runtime.block_on(builder.open()).unwrap();
        for round in 0..3 {
            assert_eq!(
                runtime.block_on(cache.put(&key, &round).into_future()).unwrap(),
                WriteOutcome::Stored
            );
            gateway.always(Fault::html(503));
            let during = format!("during {round}");
            assert_eq!(
                runtime.block_on(cache.put(&key, &during).into_future()).unwrap(),
                WriteOutcome::Queued
            );
            while cache.health().breaker == Some(BreakerState::Closed) {
                let _ = runtime.block_on(cache.get("unknown id"));
            }
            gateway.clear();
            for _ in 0..6_000 {
                let health = cache.health();
                if health.breaker == Some(BreakerState::Closed) && health.queue.unwrap().records == 0 {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            let found = runtime.block_on(cache.get(&key)).unwrap().unwrap();
            assert_eq!((found.decode().unwrap(), found.freshness()), (during, Freshness::Fresh));
        }
    });
    daemon.await.unwrap();
}
