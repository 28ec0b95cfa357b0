//! Batches: what they gather, what they leave alone, and what becomes of their callers.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{
    Applied, Batched, ErrorKind, Guard, Json, Key, Loaded, Memory, Record, Result, Store, Want, Write,
};
use tokio::task::JoinHandle;

/// How many calls are under way at once at most.
const LANES: usize = 4;
const SPAN: Duration = Duration::from_millis(50);

/// Calls in which so many records that wait go: each takes a share of a quarter at least, or 16.
fn calls_for(mut records: usize) -> std::ops::RangeInclusive<usize> {
    let fewest = records.div_ceil(500).max(LANES);
    let mut most = 0;
    while records > 0 {
        records -= records.div_ceil(LANES).clamp(16, 500).min(records);
        most += 1;
    }
    fewest..=most
}

fn store() -> (Arc<Batched<Faulty<Memory>>>, Faults) {
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    (Arc::new(Batched::new(faulty)), faults)
}

fn write(store: &impl Store, key: &str, value: &str) -> Write {
    let clock = store.clock();
    let (key, version) = (Key::new(key).unwrap(), clock.stamp().version);
    let (expires_at, value) = (clock.now().plus(Duration::from_secs(60)), Some(Json::of(value).unwrap()));
    Record { key, version, value, expires_at, user: None, metadata: Json::default() }.into()
}

/// A put by a caller of its own.
fn put<S: Store>(store: &Arc<S>, key: &str, value: &str) -> JoinHandle<Result<Vec<Applied>>> {
    let (store, write) = (Arc::clone(store), write(store, key, value));
    tokio::spawn(async move { store.apply(&[write]).await })
}

/// Takes all lanes for writes; what comes next has to wait.
async fn occupy<S: Store>(
    store: &Arc<S>,
    faults: &Faults,
    fault: Fault,
) -> Vec<JoinHandle<Result<Vec<Applied>>>> {
    faults.script([fault; LANES]);
    let calls = faults.calls("apply");
    let lanes = (0..LANES).map(|at| put(store, &format!("lane {at}"), "x")).collect();
    while faults.calls("apply") < calls + LANES {
        tokio::task::yield_now().await;
    }
    lanes
}

async fn value(store: &impl Store, key: &str) -> Option<String> {
    match store.load(&[Want::from(Key::new(key).unwrap())]).await.unwrap().remove(0) {
        Loaded::Found(record) => record.value.as_ref().map(|json| json.as_str().to_owned()),
        _ => None,
    }
}

#[tokio::test]
async fn what_comes_alone_goes_at_once_and_alone() {
    let (store, faults) = store();
    for at in 0..10 {
        assert_eq!(put(&store, &format!("{at}"), "x").await.unwrap().unwrap(), [Applied::Stored]);
    }
    assert_eq!(faults.calls("apply"), 10);
}

#[tokio::test]
async fn what_comes_while_all_lanes_are_taken_goes_together() {
    let (store, faults) = store();
    let lanes = occupy(&store, &faults, Fault::Delay(SPAN)).await;
    // All calls take as long, so that the lanes get free together, and each has its share.
    faults.always(Fault::Delay(SPAN));
    let puts: Vec<_> = (0..1_200).map(|at| put(&store, &format!("thread {at}"), &format!("{at}"))).collect();
    for put in join_all(puts.into_iter().chain(lanes)).await {
        assert_eq!(put.unwrap().unwrap(), [Applied::Stored]);
    }
    assert_eq!(faults.calls("apply"), LANES + 4, "301, 301, 301 and 297");
    assert_eq!(faults.most_at_once("apply"), LANES);
    assert_eq!(value(&*store, "thread 1199").await.as_deref(), Some("\"1199\""));
    // Loads go by lanes of their own, and each caller gets what it asked for.
    let load = |at: usize| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { (at, value(&*store, &format!("thread {at}")).await) })
    };
    for loaded in join_all((0..1_200).map(load)).await {
        let (at, value) = loaded.unwrap();
        assert_eq!(value, Some(format!("\"{at}\"")));
    }
    assert_eq!(faults.most_at_once("load"), LANES);
    assert_eq!(faults.calls("load"), 1 + LANES + 4);
}

#[tokio::test]
async fn a_batch_ends_at_a_mebibyte() {
    let (store, faults) = store();
    let lanes = occupy(&store, &faults, Fault::Delay(SPAN)).await;
    let large = "x".repeat(400 << 10);
    let puts: Vec<_> = (0..6).map(|at| put(&store, &format!("large {at}"), &large)).collect();
    let more = put(&store, "larger than a batch", &"x".repeat(2 << 20));
    for put in join_all(puts.into_iter().chain(lanes).chain([more])).await {
        assert_eq!(put.unwrap().unwrap(), [Applied::Stored]);
    }
    assert_eq!(faults.calls("apply"), LANES + 3 + 1, "two large ones in each");
}

#[tokio::test]
async fn a_record_that_is_refused_fails_alone() {
    for (kind, at_fault) in [(ErrorKind::Refused, 37), (ErrorKind::Invalid, 0), (ErrorKind::Busy, 99)] {
        let (store, faults) = store();
        faults.poison(format!("thread {at_fault}"), Fault::Fail(kind));
        let lanes = occupy(&store, &faults, Fault::Delay(SPAN)).await;
        let puts: Vec<_> = (0..100).map(|at| put(&store, &format!("thread {at}"), "x")).collect();
        for (at, put) in join_all(puts).await.into_iter().enumerate() {
            match put.unwrap() {
                Ok(applied) => assert!(applied == [Applied::Stored] && at != at_fault, "{at}: {applied:?}"),
                Err(error) => assert_eq!((error.kind(), at), (kind, at_fault)),
            }
        }
        join_all(lanes).await;
        assert!(faults.calls("apply") < LANES + 20, "halves, not one by one: {}", faults.calls("apply"));
    }
}

#[tokio::test]
async fn an_outage_is_everybodys_and_splits_nothing() {
    let (store, faults) = store();
    let lanes = occupy(&store, &faults, Fault::Delay(SPAN)).await;
    faults.always(Fault::LoseAnswer);
    let puts: Vec<_> = (0..100).map(|at| put(&store, &format!("thread {at}"), "x")).collect();
    for put in join_all(puts).await {
        let error = put.unwrap().unwrap_err();
        assert!(error.is_outage() && error.outcome_unknown(), "{error:?}");
    }
    join_all(lanes).await;
    let calls = faults.calls("apply") - LANES;
    assert!(calls_for(100).contains(&calls), "{calls}");
}

#[tokio::test]
async fn writes_of_one_thread_keep_their_order_in_a_batch() {
    let (store, faults) = store();
    let lanes = occupy(&store, &faults, Fault::Delay(SPAN)).await;
    let first = write(&*store, "thread", "0");
    let chain = std::iter::successors(Some(first), |last| {
        Some(Write { expect: Some(last.record.version), ..write(&*store, "thread", "next") })
    });
    let calls = chain.take(50).map(|write| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { store.apply(&[write]).await })
    });
    // Each is stored over the one before it, or it would conflict.
    for call in join_all(calls.collect::<Vec<_>>()).await {
        assert_eq!(call.unwrap().unwrap(), [Applied::Stored]);
    }
    join_all(lanes).await;
}

#[tokio::test]
async fn callers_who_outrun_the_store_are_told_so() {
    let (store, faults) = store();
    let lanes = occupy(&store, &faults, Fault::Hang).await;
    let puts: Vec<_> = (0..20_001).map(|at| put(&store, &format!("thread {at}"), "x")).collect();
    let mut results: Vec<_> = puts.into_iter().collect();
    let error = results.pop().unwrap().await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.retry_after().is_some() && !error.outcome_unknown());
    faults.heal();
    join_all(lanes).await;
    for put in join_all(results).await {
        assert_eq!(put.unwrap().unwrap(), [Applied::Stored]);
    }
    let calls = faults.calls("apply") - LANES;
    assert!(calls_for(20_000).contains(&calls), "{calls}");
}

#[tokio::test]
async fn who_goes_takes_nobody_with_him() {
    let (store, faults) = store();
    let lanes = occupy(&store, &faults, Fault::Hang).await;
    let (stays, goes) = (put(&store, "stays", "x"), put(&store, "goes", "x"));
    tokio::task::yield_now().await;
    goes.abort();
    // The lanes are given up, too: what waits goes on in their place.
    lanes.iter().for_each(JoinHandle::abort);
    assert_eq!(stays.await.unwrap().unwrap(), [Applied::Stored]);
    assert_eq!(value(&*store, "goes").await, None, "nobody waited for it when it was to be sent");
    for at in 0..2 * LANES {
        assert_eq!(
            put(&store, &format!("{at}"), "x").await.unwrap().unwrap(),
            [Applied::Stored],
            "lanes are free"
        );
    }
}

#[tokio::test]
async fn behind_an_open_breaker_nothing_waits() {
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    let store = Arc::new(Batched::new(Guard::new(faulty, Duration::from_secs(5))));
    faults.always(Fault::Refuse);
    while store.breaker().unwrap().check().is_ok() {
        put(&store, "thread", "x").await.unwrap().unwrap_err();
    }
    let calls = faults.calls("apply");
    let puts: Vec<_> = (0..1_000).map(|at| put(&store, &format!("thread {at}"), "x")).collect();
    for put in join_all(puts).await {
        assert!(put.unwrap().unwrap_err().is_outage());
    }
    assert_eq!(faults.calls("apply"), calls);
}
