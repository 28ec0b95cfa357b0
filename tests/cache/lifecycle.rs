//! Maintenance, shutdown, and a runtime that is closed.

use std::time::Duration;

use threadkeep::testing::Fault;
use threadkeep::{Cache, ErrorKind, WriteOutcome};

use crate::{SECOND, bare, wait_until};

#[tokio::test]
async fn maintenance_reports_accesses_to_the_store() {
    let (cache, faults) = bare(|cache| cache.maintenance_interval(SECOND / 10)).await;
    cache.put("t", &1).await.unwrap();
    assert!(cache.get("t").await.unwrap().is_some());
    wait_until("the access is reported", || faults.calls("touch") == 1).await;
    wait_until("maintenance purges expired records", || faults.calls("purge") >= 3).await;
    assert_eq!(faults.calls("touch"), 1, "no read came after the report");
    cache.evict("t").unwrap();
    assert!(cache.get("t").await.unwrap().is_some());
    wait_until("the access of a get that loads is reported", || faults.calls("touch") == 2).await;
}

#[tokio::test]
async fn shutdown_finishes_writes_in_flight_and_closes_the_cache() {
    let (cache, faults) = bare(|cache| cache).await;
    faults.script([Fault::Delay(SECOND / 5)]);
    let put = tokio::spawn(cache.put("t", &1).into_future());
    wait_until("the put is in flight", || faults.calls("apply") == 1).await;
    assert_eq!(cache.shutdown(5 * SECOND).await.unwrap().unfinished, 0);
    assert_eq!(put.await.unwrap().unwrap(), WriteOutcome::Stored);
    assert_eq!(cache.get("t").await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(cache.put("t", &1).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(cache.update("t", |now: Option<u8>| Ok(now)).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(cache.list("u").await.unwrap_err().kind(), ErrorKind::Closed);

    let (cache, faults) = bare(|cache| cache).await;
    faults.script([Fault::Hang]);
    let put = tokio::spawn(cache.put("t", &1).into_future());
    wait_until("the put is in flight", || faults.calls("apply") == 1).await;
    assert_eq!(cache.shutdown(SECOND / 10).await.unwrap().unfinished, 1);
    faults.clear();
    assert!(put.await.unwrap().is_err());
}

#[tokio::test]
async fn shutdown_waits_for_a_write_that_waits_for_memory() {
    let (cache, faults) = bare(|cache| cache.max_value_bytes(64 << 20).soft_timeout(5 * SECOND)).await;
    faults.script([Fault::Delay(SECOND / 3), Fault::Delay(SECOND / 3)]);
    let large = "x".repeat(40 << 20);
    let first = tokio::spawn(cache.put("first", &large).into_future());
    wait_until("the first put is in flight", || faults.calls("apply") == 1).await;
    let second = tokio::spawn(cache.put("second", &large).into_future());
    tokio::time::sleep(SECOND / 20).await;
    assert_eq!(cache.shutdown(10 * SECOND).await.unwrap().unfinished, 0);
    assert!(first.is_finished() && second.is_finished(), "the shutdown waits for both puts");
}

#[tokio::test]
async fn shutdown_with_active_callers_leaves_no_unfinished_write() {
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

#[test]
fn get_on_a_closed_runtime_fails_without_a_deadlock() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cache = runtime.block_on(async { Cache::builder().memory().open().await.unwrap() });
    let handle = runtime.handle().clone();
    runtime.shutdown_timeout(SECOND);
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _context = handle.enter();
        let results = [(); 2].map(|()| futures::executor::block_on(cache.get("cold")).is_err());
        done.send(results).unwrap();
    });
    assert_eq!(is_done.recv_timeout(10 * SECOND), Ok([true, true]));
}
