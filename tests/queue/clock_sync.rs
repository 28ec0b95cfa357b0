//! A disk that fails at the clock sync, while the queue has writes with provisional versions (I8).

use std::sync::Arc;
use std::time::{Duration, Instant};

use threadkeep::{ErrorKind, WriteOutcome};

use crate::{World, dead_letters, found, sleep, wait_until_drained};

/// Until the disk works, writes fail and reads succeed. Then the writes get their final versions.
#[tokio::test]
async fn failed_correction_fails_no_read_and_loses_no_write() {
    let (mut world, mut other) = (World::new(), World::new());
    other.store = Arc::clone(&world.store);
    assert_eq!(other.open().await.put("k", &0).user("u").await.unwrap(), WriteOutcome::Stored);
    let cache = world.open_skewed(-60_000, true).await;
    assert_eq!(cache.put("k", &1).user("u").await.unwrap(), WriteOutcome::Queued);
    let file = rusqlite::Connection::open(world.dir.path().join("q.db")).unwrap();
    let fail = |event| {
        format!(
            "create trigger fail_{event} before {event} on records begin select raise(abort, 'fault'); end;"
        )
    };
    file.execute_batch(&(fail("insert") + &fail("update"))).unwrap();
    world.faults.clear();
    while !cache.health().is_available() {
        sleep(5).await;
    }
    for key in ["k", "other"] {
        assert_eq!(cache.put(key, &2).await.unwrap_err().kind(), ErrorKind::LocalStorage, "{key}");
    }
    let start = Instant::now();
    assert_eq!(cache.list("u").await.unwrap().len(), 1);
    assert_eq!(found(&cache, "k").await.unwrap().0, "1", "a provisional version is compared with nothing");
    assert_eq!(found(&cache, "other").await, None);
    assert!(start.elapsed() < Duration::from_secs(8), "the reads wait for the disk");
    file.execute_batch("drop trigger fail_insert; drop trigger fail_update").unwrap();
    assert!(cache.put("k", &3).await.is_ok());
    wait_until_drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), dead_letters(&cache)), (Some("3"), 0));
    assert_eq!(cache.put("other", &3).await.unwrap(), WriteOutcome::Stored);
}
