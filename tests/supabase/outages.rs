//! Every kind of outage: known threads go on and say that they are stale, the others are unavailable, writes are queued
//! on disk, and all recovers by itself.

use std::future::IntoFuture;
use std::time::Duration;

use threadkeep::{BreakerState, Cache, ErrorKind, Freshness, WriteOutcome};

use crate::stack::{Fault, Gateway, Server, Stack};
use crate::{AMPLE, SECOND, builder, daemon, drained, eventually, get, key, shared};

on_each_server!(
    killed_postgresql,
    killed_server,
    faults_of_the_gateway,
    a_start_during_an_outage,
    retry_after_is_honoured,
    callers_do_not_reach_an_open_breaker,
);

/// Lives through an outage that `begin` begins and `end` ends.
async fn live_through(what: &str, cache: &Cache, begin: impl AsyncFnOnce(), end: impl AsyncFnOnce()) {
    let (known, unknown, written) = (key("known"), key("unknown"), key("written"));
    cache.put(&known, "before").await.unwrap();
    // On a busy machine it may have been queued, or the breaker be open, before the outage begins.
    drained(what, cache).await;
    eventually(what, async || {
        let found = cache.get(&known).await;
        found.is_ok_and(|found| found.is_some_and(|found| found.freshness() == Freshness::Fresh))
    })
    .await;
    begin().await;
    for round in 0..8 {
        let found = get(cache, &known).await.unwrap();
        assert_eq!(found.json(), "\"before\"", "{what}, round {round}");
        assert!(matches!(found.freshness(), Freshness::Stale { .. }), "{what}, round {round}");
        let error = cache.get(&unknown).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{what}, round {round}: {error}");
        assert!(error.to_string().len() > 20, "it says why: {error}");
        let durability = cache.put(&written, &round).await.unwrap();
        assert_eq!(durability, WriteOutcome::Queued, "{what}, round {round}");
        let found = get(cache, &written).await.unwrap();
        assert_eq!((found.json(), found.freshness()), (&*round.to_string(), Freshness::Queued), "{what}");
    }
    assert_ne!(cache.health().breaker, Some(BreakerState::Closed), "{what}");
    assert!(cache.health().cause.is_some(), "{what}");
    end().await;
    eventually(what, async || {
        cache.get(&known).await.is_ok_and(|found| {
            found.is_some_and(|found| found.freshness() == Freshness::Fresh && found.json() == "\"before\"")
        })
    })
    .await;
    drained(what, cache).await;
    eventually(what, async || {
        let found = cache.get(&written).await.ok().flatten();
        found.is_some_and(|found| (found.json(), found.freshness()) == ("7", Freshness::Fresh))
    })
    .await;
    eventually(what, async || cache.get(&unknown).await.is_ok_and(|found| found.is_none())).await;
    cache.put(&known, "after").await.unwrap();
    assert_eq!(get(cache, &known).await.unwrap().json(), "\"after\"", "{what}");
}

/// A stack that may be broken, and a daemon behind it.
async fn own(server: Server) -> (Stack, Gateway, Cache) {
    let stack = tokio::task::spawn_blocking(move || Stack::start(server)).await.unwrap();
    let gateway = stack.gateway().await;
    let cache = daemon(&gateway).await;
    (stack, gateway, cache)
}

async fn killed_postgresql(server: Server) {
    let (stack, _gateway, cache) = own(server).await;
    let block = |change: fn(&Stack)| tokio::task::block_in_place(|| change(&stack));
    let begin = async || block(Stack::stop_postgres);
    live_through("PostgreSQL is killed", &cache, begin, async || block(Stack::start_postgres)).await;
}

async fn killed_server(server: Server) {
    let (stack, _gateway, cache) = own(server).await;
    let block = |change: fn(&Stack)| tokio::task::block_in_place(|| change(&stack));
    let begin = async || block(Stack::kill_server);
    live_through("the REST server is killed", &cache, begin, async || block(Stack::start_server)).await;
}

async fn faults_of_the_gateway(server: Server) {
    let (_, gateway, _) = shared(server).await;
    // Nothing here takes long to answer; what hangs may hang for a shorter time.
    let cache = builder(&gateway).timeout(SECOND / 2).soft_timeout(SECOND / 10).open().await.unwrap();
    for (what, fault) in [
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
        live_through(what, &cache, begin, async || gateway.clear()).await;
    }
    live_through("refused", &cache, async || gateway.refuse().await, async || gateway.accept().await).await;
}

async fn a_start_during_an_outage(server: Server) {
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

async fn retry_after_is_honoured(server: Server) {
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
    assert_eq!(gateway.seen().len(), 1, "nothing else was sent");
}

async fn callers_do_not_reach_an_open_breaker(server: Server) {
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
    eventually("it closes without traffic", async || cache.health().is_available()).await;
    drained("without traffic", &cache).await;
}

/// A daemon whose runtime has one thread, on which nothing is polled between two requests: neither the probe nor the replay nor
/// a pooled connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_of_one_thread_lives_through_an_outage() {
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
                let _ = runtime.block_on(cache.get("nobody has this id"));
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
