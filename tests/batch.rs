//! `BatchingStore`: the calls it merges, the calls it sends alone, and the result of each caller.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use threadkeep::store::{
    Applied, BatchingStore, Json, LoadRequest, Loaded, Memory, Record, ResilientStore, Store, Write,
};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{ErrorKind, Key, Result};
use tokio::task::JoinHandle;

/// The number of calls that `BatchingStore` has in flight at max.
const MAX_CALLS: usize = 4;
const CALL_TIME: Duration = Duration::from_millis(50);

/// Returns the number of calls that may carry `records` waiting records.
///
/// Each call takes at least a quarter of the records, or 16.
fn expected_calls(mut records: usize) -> std::ops::RangeInclusive<usize> {
    let min = records.div_ceil(500).max(MAX_CALLS);
    let mut max = 0;
    while records > 0 {
        records -= records.div_ceil(MAX_CALLS).clamp(16, 500).min(records);
        max += 1;
    }
    min..=max
}

fn store() -> (Arc<BatchingStore<FaultStore<Memory>>>, Faults) {
    let faulty = FaultStore::new(Memory::new());
    let faults = faulty.faults();
    (Arc::new(BatchingStore::new(faulty)), faults)
}

fn write(store: &impl Store, key: &str, value: &str) -> Write {
    let clock = store.clock();
    let (key, version) = (Key::new(key).unwrap(), clock.issue_version());
    let (expires_at, value) = (clock.now().plus(Duration::from_secs(60)), Some(Json::of(value).unwrap()));
    Record { key, version, value, expires_at, user: None, metadata: Json::default() }.into()
}

/// Writes one record from a separate task.
fn put<S: Store>(store: &Arc<S>, key: &str, value: &str) -> JoinHandle<Result<Vec<Applied>>> {
    let (store, write) = (Arc::clone(store), write(store, key, value));
    tokio::spawn(async move { store.apply(&[write]).await })
}

/// Occupies all call slots for writes, so that the next writes wait.
async fn fill_slots<S: Store>(
    store: &Arc<S>,
    faults: &Faults,
    fault: Fault,
) -> Vec<JoinHandle<Result<Vec<Applied>>>> {
    faults.script([fault; MAX_CALLS]);
    let calls = faults.calls("apply");
    let slots = (0..MAX_CALLS).map(|at| put(store, &format!("slot {at}"), "x")).collect();
    while faults.calls("apply") < calls + MAX_CALLS {
        tokio::task::yield_now().await;
    }
    slots
}

async fn value(store: &impl Store, key: &str) -> Option<String> {
    match store.load(&[LoadRequest::from(Key::new(key).unwrap())]).await.unwrap().remove(0) {
        Loaded::Found(record) => record.value.as_ref().map(|json| json.as_str().to_owned()),
        _ => None,
    }
}

#[tokio::test]
async fn batch_single_writes_go_at_once_and_alone() {
    let (store, faults) = store();
    for at in 0..10 {
        assert_eq!(put(&store, &format!("{at}"), "x").await.unwrap().unwrap(), [Applied::Stored]);
    }
    assert_eq!(faults.calls("apply"), 10);
}

#[tokio::test]
async fn batch_writes_that_wait_for_a_slot_go_together() {
    let (store, faults) = store();
    let slots = fill_slots(&store, &faults, Fault::Delay(CALL_TIME)).await;
    // All calls take the same time. The slots become free together, and each slot gets an equal share.
    faults.always(Fault::Delay(CALL_TIME));
    let puts: Vec<_> = (0..1_200).map(|at| put(&store, &format!("thread {at}"), &format!("{at}"))).collect();
    for put in join_all(puts.into_iter().chain(slots)).await {
        assert_eq!(put.unwrap().unwrap(), [Applied::Stored]);
    }
    assert_eq!(faults.calls("apply"), MAX_CALLS + 4, "301, 301, 301 and 297");
    assert_eq!(faults.max_concurrent("apply"), MAX_CALLS);
    assert_eq!(value(&*store, "thread 1199").await.as_deref(), Some("\"1199\""));
    // Loads have slots of their own. Each caller gets the record that it asked for.
    let load = |at: usize| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { (at, value(&*store, &format!("thread {at}")).await) })
    };
    for loaded in join_all((0..1_200).map(load)).await {
        let (at, value) = loaded.unwrap();
        assert_eq!(value, Some(format!("\"{at}\"")));
    }
    assert_eq!(faults.max_concurrent("load"), MAX_CALLS);
    assert_eq!(faults.calls("load"), 1 + MAX_CALLS + 4);
}

#[tokio::test]
async fn batch_ends_at_one_mebibyte() {
    let (store, faults) = store();
    let slots = fill_slots(&store, &faults, Fault::Delay(CALL_TIME)).await;
    let large = "x".repeat(400 << 10);
    let puts: Vec<_> = (0..6).map(|at| put(&store, &format!("large {at}"), &large)).collect();
    let more = put(&store, "larger than a batch", &"x".repeat(2 << 20));
    for put in join_all(puts.into_iter().chain(slots).chain([more])).await {
        assert_eq!(put.unwrap().unwrap(), [Applied::Stored]);
    }
    assert_eq!(faults.calls("apply"), MAX_CALLS + 3 + 1, "each batch takes two large records");
}

#[tokio::test]
async fn batch_rejected_record_fails_alone() {
    for (kind, rejected) in [(ErrorKind::Rejected, 37), (ErrorKind::Invalid, 0), (ErrorKind::Overloaded, 99)]
    {
        let (store, faults) = store();
        faults.fail_key(format!("thread {rejected}"), Fault::Fail(kind));
        let slots = fill_slots(&store, &faults, Fault::Delay(CALL_TIME)).await;
        let puts: Vec<_> = (0..100).map(|at| put(&store, &format!("thread {at}"), "x")).collect();
        for (at, put) in join_all(puts).await.into_iter().enumerate() {
            match put.unwrap() {
                Ok(applied) => assert!(applied == [Applied::Stored] && at != rejected, "{at}: {applied:?}"),
                Err(error) => assert_eq!((error.kind(), at), (kind, rejected)),
            }
        }
        join_all(slots).await;
        assert!(
            faults.calls("apply") < MAX_CALLS + 20,
            "the batch is split in halves, not into single records: {}",
            faults.calls("apply")
        );
    }
}

#[tokio::test]
async fn batch_outage_fails_all_callers_without_a_split() {
    let (store, faults) = store();
    let slots = fill_slots(&store, &faults, Fault::Delay(CALL_TIME)).await;
    faults.always(Fault::DropResponse);
    let puts: Vec<_> = (0..100).map(|at| put(&store, &format!("thread {at}"), "x")).collect();
    for put in join_all(puts).await {
        let error = put.unwrap().unwrap_err();
        assert!(error.is_outage() && error.outcome_unknown(), "{error:?}");
    }
    join_all(slots).await;
    let calls = faults.calls("apply") - MAX_CALLS;
    assert!(expected_calls(100).contains(&calls), "{calls}");
}

#[tokio::test]
async fn batch_writes_of_one_conversation_keep_their_order() {
    let (store, faults) = store();
    let slots = fill_slots(&store, &faults, Fault::Delay(CALL_TIME)).await;
    let first = write(&*store, "thread", "0");
    let chain = std::iter::successors(Some(first), |last| {
        Some(write(&*store, "thread", "next").with_if_version(last.record.version))
    });
    // As many as one batch takes. Several batches travel in parallel, in any order.
    let calls = chain.take(16).map(|write| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { store.apply(&[write]).await })
    });
    // Each write replaces the write before it. In any other order, the write would conflict.
    for call in join_all(calls.collect::<Vec<_>>()).await {
        assert_eq!(call.unwrap().unwrap(), [Applied::Stored]);
    }
    join_all(slots).await;
}

#[tokio::test]
async fn batch_callers_beyond_the_limit_get_overloaded() {
    let (store, faults) = store();
    let slots = fill_slots(&store, &faults, Fault::Hang).await;
    let puts: Vec<_> = (0..20_001).map(|at| put(&store, &format!("thread {at}"), "x")).collect();
    let mut results: Vec<_> = puts.into_iter().collect();
    let error = results.pop().unwrap().await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overloaded);
    assert!(error.retry_after().is_some() && !error.outcome_unknown());
    faults.clear();
    join_all(slots).await;
    for put in join_all(results).await {
        assert_eq!(put.unwrap().unwrap(), [Applied::Stored]);
    }
    let calls = faults.calls("apply") - MAX_CALLS;
    assert!(expected_calls(20_000).contains(&calls), "{calls}");
}

#[tokio::test]
async fn batch_cancelled_caller_leaves_other_callers_alone() {
    let (store, faults) = store();
    let slots = fill_slots(&store, &faults, Fault::Hang).await;
    let (kept, cancelled) = (put(&store, "kept", "x"), put(&store, "cancelled", "x"));
    tokio::task::yield_now().await;
    cancelled.abort();
    // The callers of the slots are cancelled, too. The waiting calls take the slots.
    slots.iter().for_each(JoinHandle::abort);
    assert_eq!(kept.await.unwrap().unwrap(), [Applied::Stored]);
    assert_eq!(value(&*store, "cancelled").await, None, "its caller was gone before the call was sent");
    for at in 0..2 * MAX_CALLS {
        assert_eq!(
            put(&store, &format!("{at}"), "x").await.unwrap().unwrap(),
            [Applied::Stored],
            "the slots are free"
        );
    }
}

#[tokio::test]
async fn batch_calls_fail_at_once_behind_an_open_breaker() {
    let faulty = FaultStore::new(Memory::new());
    let faults = faulty.faults();
    let store = Arc::new(BatchingStore::new(ResilientStore::new(faulty, Duration::from_secs(5))));
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
