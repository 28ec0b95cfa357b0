//! Imports of older data into an outage file that is in use.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use threadkeep::Cache;
use threadkeep::store::{Clock, Json, Key, Local, Memory, Record, Store, Version, Write};
use threadkeep::tools::{ImportItem, QueueAdmin, QueuedWrite};

const HOUR: Duration = Duration::from_secs(3_600);

/// Writes a file of the backend `local`, with a conversation of an hour ago.
async fn write_local_file(path: &Path) {
    let local = Local::open(path).await.unwrap();
    let (at, expires_at) = (local.clock().now().minus(HOUR), local.clock().now().plus(HOUR));
    let old =
        Record::put(Key::new("k").unwrap(), Version::min_at(at), Json::new("\"old\"").unwrap(), expires_at);
    local.apply(&[Write::new(old)]).await.unwrap();
}

async fn open(memory: &Arc<Memory>, queue: &Path) -> Cache {
    Cache::builder().store(Arc::clone(memory)).queue(queue).open().await.unwrap()
}

async fn put_and_close(memory: &Arc<Memory>, queue: &Path, key: &str) {
    let cache = open(memory, queue).await;
    cache.put(key, "new").await.unwrap();
    cache.shutdown(Duration::from_secs(30)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn migrated_older_conversation_does_not_replace_the_stored_one() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Arc::new(Memory::new());
    // The second file has no copy of the conversation.
    for (at, key) in ["k", "another"].into_iter().enumerate() {
        let (from, queue) =
            (dir.path().join(format!("local{at}.db")), dir.path().join(format!("queue{at}.db")));
        put_and_close(&memory, &queue, key).await;
        write_local_file(&from).await;
        let admin = QueueAdmin::open(&queue).await.unwrap();
        admin.migrate_from(&from, |_| {}).await.unwrap();
        admin.close().await.unwrap();
        drop(admin);
        let cache = open(&memory, &queue).await;
        super::wait_until_drained(&cache).await;
        assert_eq!(cache.get("k").await.unwrap().unwrap().json(), "\"new\"");
        cache.shutdown(Duration::from_secs(30)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn migrated_older_conversation_does_not_replace_a_queued_write() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("local.db");
    write_local_file(&from).await;
    let admin = QueueAdmin::open_for(dir.path().join("queue.db"), "here").await.unwrap();
    let clock = Clock::new();
    let value = Json::new("\"new\"").unwrap();
    let new =
        Record::put(Key::new("k").unwrap(), clock.issue_version(), value.clone(), clock.now().plus(HOUR));
    admin.import(vec![ImportItem::Queued(QueuedWrite::new(new, clock.now()))]).await.unwrap();
    admin.migrate_from(&from, |_| {}).await.unwrap();
    let rows = admin.queued(None).await.unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].write.record.value, Some(value));
}

/// The line of an export is provisional. Its version alone decides, and the clock sync of the new file does not make it newer.
#[tokio::test(flavor = "multi_thread")]
async fn imported_provisional_write_does_not_replace_a_newer_one() {
    let dir = tempfile::tempdir().unwrap();
    let (memory, queue) = (Arc::new(Memory::new()), dir.path().join("queue.db"));
    let cache = open(&memory, &dir.path().join("another.db")).await;
    cache.put("k", "new").await.unwrap();
    put_and_close(&memory, &queue, "another").await;
    let clock = Clock::new();
    let (at, expires_at) = (clock.now().minus(HOUR), clock.now().plus(HOUR));
    let value = Json::new("\"old\"").unwrap();
    let old = Record::put(Key::new("k").unwrap(), Version::min_at(at), value, expires_at);
    let mut queued = QueuedWrite::new(old, at);
    queued.is_provisional = true;
    let admin = QueueAdmin::open(&queue).await.unwrap();
    admin.import(vec![ImportItem::Queued(queued)]).await.unwrap();
    admin.close().await.unwrap();
    drop(admin);
    super::wait_until_drained(&open(&memory, &queue).await).await;
    cache.evict("k").unwrap();
    assert_eq!(cache.get("k").await.unwrap().unwrap().json(), "\"new\"");
}
