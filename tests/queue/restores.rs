//! A restored database: the store has an older version than the local copy, and the store is right.

use std::sync::Arc;
use std::time::Duration;

use threadkeep::store::{Json, Memory, Record, Store, Version, Write};
use threadkeep::{Key, WriteOutcome};

use crate::{World, append, dead_letters, found, wait_until_drained};

const HOUR: Duration = Duration::from_secs(3_600);

/// Makes a store with the value of an hour ago.
async fn restored(value: &str) -> Arc<Memory> {
    let store = Arc::new(Memory::new());
    let (now, key) = (store.clock().now(), Key::new("k").unwrap());
    let (version, value) = (Version::min_at(now.minus(HOUR)), Json::new(value).unwrap());
    store.apply(&[Write::new(Record::put(key, version, value, now.plus(HOUR)))]).await.unwrap();
    store
}

/// A daemon that has seen the restored database makes updates of it in the next outage.
#[tokio::test]
async fn update_after_a_restored_database_is_no_dead_letter() {
    for is_evicted in [false, true] {
        let mut world = World::new();
        let cache = world.open().await;
        assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Stored);
        cache.shutdown(HOUR).await.unwrap();
        // The restore takes longer than any call.
        let file = rusqlite::Connection::open(world.dir.path().join("q.db")).unwrap();
        file.execute("update records set at = at - 3600000", []).unwrap();
        drop(file);
        world.store = restored("[7]").await;
        let cache = world.open().await;
        assert_eq!(found(&cache, "k").await.unwrap().0, "[7]");
        world.start_outage(&cache).await;
        if is_evicted {
            cache.evict("k").unwrap();
        }
        assert_eq!(cache.update("k", append(1)).await.unwrap(), WriteOutcome::Queued);
        world.faults.clear();
        wait_until_drained(&cache).await;
        assert_eq!((world.stored("k").await.as_deref(), dead_letters(&cache)), (Some("[7,1]"), 0));
    }
}
