//! The change feed over a store in this process that keeps a history.
//!
//! `FEED_SEED=…` repeats a random schedule, and `FEED_SCHEDULES=…` sets their number.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod history;
mod random;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use history::History;
use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore, Faults, stay_on_this_thread};
use threadkeep::{Builder, Cache, ErrorKind, Freshness, Key, WriteOutcome};

const HOUR: Duration = Duration::from_secs(3600);
/// The time during which a conversation is fresh without a poll.
const BRIEF: Duration = Duration::from_millis(150);
/// The bound for an event that must come, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Returns the builder of a cache that follows the history.
fn builder(store: &Arc<History>, fresh_for: Duration) -> Builder {
    let builder = Cache::builder().store(Arc::clone(store)).fresh_for(fresh_for).soft_timeout(LIMIT);
    builder.feed_interval(Duration::from_millis(10))
}

async fn open(store: &Arc<History>, fresh_for: Duration) -> Cache {
    builder(store, fresh_for).open().await.unwrap()
}

async fn writer(store: &Arc<History>) -> Cache {
    Cache::builder().store(Arc::clone(store)).open().await.unwrap()
}

fn start() -> Arc<History> {
    stay_on_this_thread();
    Arc::default()
}

async fn wait_until(event: &str, mut condition: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while began.elapsed() < LIMIT {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("timed out: {event}");
}

/// Waits until the cache has handled this many more polls.
async fn polled(store: &History, polls: usize) {
    let until = store.handled() + polls;
    wait_until("polls", async || store.handled() >= until).await;
}

async fn get(cache: &Cache, key: &str) -> (u64, Freshness) {
    let found = cache.get(key).await.unwrap().unwrap();
    (found.decode().unwrap(), found.freshness())
}

#[tokio::test]
async fn unnamed_conversations_stay_fresh_without_a_load() {
    let store = start();
    let cache = open(&store, BRIEF).await;
    writer(&store).await.put("read", &1).await.unwrap();
    polled(&store, 2).await;
    cache.put("own", &2).await.unwrap();
    assert_eq!(get(&cache, "read").await, (1, Freshness::Fresh));
    let (began, mut late) = (Instant::now(), 0);
    while began.elapsed() < 4 * BRIEF {
        polled(&store, 1).await;
        let (began, lag) = (Instant::now(), cache.health().feed.unwrap().lag);
        assert_eq!(get(&cache, "read").await, (1, Freshness::Fresh));
        assert_eq!(get(&cache, "own").await, (2, Freshness::Fresh));
        // On a busy machine, the last poll may be too old. Then both reads ask the store.
        late += if lag + began.elapsed() < BRIEF { 0 } else { 2 };
    }
    let loads = store.loads.load(SeqCst);
    assert!(loads <= 1 + late, "only the first read asks the store: {loads} loads, {late} after a late poll");
}

#[tokio::test]
async fn changes_of_another_daemon_are_read_and_reloaded() {
    let store = start();
    let (cache, other) = (open(&store, HOUR).await, writer(&store).await);
    other.put("t", &1).await.unwrap();
    assert_eq!(get(&cache, "t").await, (1, Freshness::Fresh));
    polled(&store, 2).await;
    let loads = store.loads.load(SeqCst);
    other.put("t", &2).await.unwrap();
    wait_until("the reload", async || store.loads.load(SeqCst) > loads).await;
    polled(&store, 2).await;
    assert_eq!(get(&cache, "t").await, (2, Freshness::Fresh));
    assert_eq!(store.loads.load(SeqCst), loads + 1, "the feed has loaded it before the read");
    other.remove("t").await.unwrap();
    polled(&store, 2).await;
    assert!(cache.get("t").await.unwrap().is_none());
    other.put("t", &3).await.unwrap();
    polled(&store, 2).await;
    assert_eq!(get(&cache, "t").await, (3, Freshness::Fresh), "the feed ends an absence, too");
}

#[tokio::test]
async fn load_that_a_poll_overtakes_is_discarded() {
    let store = start();
    let (cache, other) = (open(&store, HOUR).await, writer(&store).await);
    other.put("t", &1).await.unwrap();
    polled(&store, 2).await;
    store.answers.forget_permits(usize::MAX);
    let reader = cache.clone();
    let read = tokio::spawn(async move { get(&reader, "t").await });
    wait_until("the load", async || store.loads.load(SeqCst) == 1).await;
    other.put("t", &2).await.unwrap();
    polled(&store, 2).await;
    store.answers.add_permits(1 << 20);
    assert_eq!(read.await.unwrap(), (2, Freshness::Fresh));
    assert_eq!(store.loads.load(SeqCst), 2);
}

#[tokio::test]
async fn conversation_that_nobody_reads_is_not_reloaded() {
    let store = start();
    let (cache, other) = (open(&store, HOUR).await, writer(&store).await);
    other.put("t", &0).user("u").await.unwrap();
    assert_eq!(cache.list("u").await.unwrap().len(), 1);
    polled(&store, 2).await;
    for value in 1..4 {
        other.put("t", &value).user("u").await.unwrap();
        polled(&store, 2).await;
    }
    assert_eq!(store.loads.load(SeqCst), 0);
    assert_eq!(cache.health().conversations, 0);
    assert_eq!(get(&cache, "t").await, (3, Freshness::Fresh));
}

#[tokio::test]
async fn own_writes_keep_their_values_in_memory() {
    let store = start();
    let cache = open(&store, HOUR).await;
    polled(&store, 1).await;
    for value in 0..20 {
        match value % 2 {
            0 => _ = cache.put("t", &value).await.unwrap(),
            _ => _ = cache.update("t", |_: Option<u64>| Ok(Some(value))).await.unwrap(),
        }
        polled(&store, 1).await;
        assert_eq!(get(&cache, "t").await, (value, Freshness::Fresh));
    }
    assert_eq!(store.loads.load(SeqCst), 0);
}

#[tokio::test]
async fn entry_from_before_the_first_answer_is_not_covered() {
    let store = start();
    let other = writer(&store).await;
    other.put("t", &1).await.unwrap();
    store.polls.forget_permits(usize::MAX);
    let cache = open(&store, HOUR).await;
    wait_until("the first poll", async || store.waits.load(SeqCst)).await;
    assert_eq!(get(&cache, "t").await, (1, Freshness::Fresh));
    // The first answer has this change in its snapshot, so no poll names it.
    other.put("t", &2).await.unwrap();
    assert_eq!(get(&cache, "t").await, (1, Freshness::Fresh), "without a history, the age decides");
    store.polls.add_permits(1 << 20);
    polled(&store, 2).await;
    assert_eq!(get(&cache, "t").await, (2, Freshness::Fresh));
}

#[tokio::test]
async fn freshness_decays_while_polls_fail() {
    let store = start();
    let (cache, other) = (open(&store, BRIEF).await, writer(&store).await);
    other.put("t", &1).await.unwrap();
    polled(&store, 2).await;
    assert_eq!(get(&cache, "t").await.0, 1);
    store.fail_polls(Some(ErrorKind::Unavailable));
    polled(&store, 2).await;
    other.put("t", &2).await.unwrap();
    wait_until("a read asks the store", async || get(&cache, "t").await.0 == 2).await;
    let feed = cache.health().feed.unwrap();
    assert!(feed.lag >= BRIEF && feed.cause.is_some(), "{feed:?}");
    // The history goes on where it was.
    other.put("t", &3).await.unwrap();
    store.fail_polls(None);
    wait_until("a poll succeeds", async || cache.health().feed.unwrap().cause.is_none()).await;
    assert_eq!(get(&cache, "t").await, (3, Freshness::Fresh));
}

#[tokio::test]
async fn poll_that_fails_half_way_continues_and_validates_late() {
    let store = start();
    let (cache, other) = (open(&store, HOUR).await, writer(&store).await);
    let keys: Vec<String> = (0..20).map(|at| format!("t{at}")).collect();
    for key in &keys {
        other.put(key, &1).await.unwrap();
        assert_eq!(get(&cache, key).await.0, 1);
    }
    polled(&store, 2).await;
    store.polls.forget_permits(usize::MAX);
    wait_until("the poll that waits", async || store.waits.load(SeqCst)).await;
    store.limit_pages(1);
    for key in &keys {
        other.put(key, &2).await.unwrap();
    }
    let arrived = store.arrived.load(SeqCst);
    store.polls.add_permits(5);
    wait_until("five pages", async || store.arrived.load(SeqCst) == arrived + 5).await;
    assert_eq!(get(&cache, "t0").await.0, 2, "the names of a page count at once");
    store.fail_polls(Some(ErrorKind::Unavailable));
    store.polls.add_permits(1);
    wait_until("a failure", async || cache.health().feed.unwrap().cause.is_some()).await;
    store.fail_polls(None);
    store.polls.add_permits(1 << 20);
    wait_until("all pages", async || cache.health().feed.unwrap().cause.is_none()).await;
    for key in &keys {
        assert_eq!(get(&cache, key).await, (2, Freshness::Fresh), "{key}");
    }
}

#[tokio::test]
async fn older_schema_and_unknown_cursor_are_survived() {
    let store = start();
    let (cache, other) = (open(&store, BRIEF).await, writer(&store).await);
    other.put("t", &1).await.unwrap();
    polled(&store, 2).await;
    store.fail_polls(Some(ErrorKind::Rejected));
    wait_until("the failure", async || cache.health().feed.unwrap().cause.is_some()).await;
    assert_eq!(get(&cache, "t").await.0, 1);
    store.fail_polls(None);
    wait_until("a new history", async || cache.health().feed.unwrap().cause.is_none()).await;
    store.fail_polls(Some(ErrorKind::SchemaOutdated));
    wait_until("the failure", async || cache.health().feed.unwrap().cause.is_some()).await;
    let arrived = store.arrived.load(SeqCst);
    other.put("t", &2).await.unwrap();
    wait_until("a read asks the store", async || get(&cache, "t").await.0 == 2).await;
    tokio::time::sleep(BRIEF).await;
    assert_eq!(store.arrived.load(SeqCst), arrived, "the feed waits a minute");
}

#[tokio::test]
async fn feed_ends_without_a_history_and_with_the_cache() {
    let store = start();
    let cache = open(&store, HOUR).await;
    polled(&store, 1).await;
    cache.shutdown(HOUR).await.unwrap();
    tokio::task::yield_now().await;
    let arrived = store.arrived.load(SeqCst);
    tokio::time::sleep(BRIEF).await;
    assert_eq!(store.arrived.load(SeqCst), arrived);

    store.lose_history();
    let without_history = open(&store, HOUR).await;
    wait_until("the only poll", async || store.arrived.load(SeqCst) == arrived + 1).await;
    wait_until("the end of the feed", async || without_history.health().feed.is_none()).await;
    for off in [builder(&store, HOUR).feed_interval(Duration::ZERO), builder(&store, Duration::ZERO)] {
        assert!(off.open().await.unwrap().health().feed.is_none());
    }
    tokio::time::sleep(BRIEF).await;
    assert_eq!(store.arrived.load(SeqCst), arrived + 1);
}

fn with_outage_file(store: &Arc<History>, path: &Path) -> (Builder, Faults) {
    let faulty = FaultStore::new(Arc::clone(store));
    let faults = faulty.faults();
    let store = ResilientStore::new(faulty, LIMIT);
    let builder = Cache::builder().store(store).queue(path).fresh_for(HOUR).soft_timeout(LIMIT);
    (builder.feed_interval(Duration::from_millis(10)), faults)
}

async fn open_breaker(cache: &Cache, faults: &Faults) {
    faults.always(Fault::Refuse);
    wait_until("an outage", async || {
        cache.get("unknown").await.ok();
        !cache.health().is_available()
    })
    .await;
}

#[tokio::test]
async fn outage_answers_with_the_replica_and_its_end_is_polled() {
    let (store, dir) = (start(), tempfile::tempdir().unwrap());
    let (builder, faults) = with_outage_file(&store, &dir.path().join("queue.db"));
    let (cache, other) = (builder.open().await.unwrap(), writer(&store).await);
    other.put("t", &1).user("u").await.unwrap();
    assert_eq!(cache.list("u").await.unwrap().len(), 1);
    polled(&store, 2).await;
    other.put("t", &2).user("u").await.unwrap();
    polled(&store, 2).await;
    open_breaker(&cache, &faults).await;
    let found = get(&cache, "t").await;
    assert!(matches!(found, (1, Freshness::Stale { .. })), "nobody has read a newer version: {found:?}");
    assert_eq!(cache.put("queued", &5).await.unwrap(), WriteOutcome::Queued);
    other.put("queued", &6).await.unwrap();
    assert_eq!(get(&cache, "queued").await, (5, Freshness::Queued));
    faults.clear();
    wait_until("the queue", async || cache.health().queue.unwrap().records == 0).await;
    polled(&store, 2).await;
    assert_eq!(get(&cache, "t").await, (2, Freshness::Fresh));
    assert_eq!(get(&cache, "queued").await, (6, Freshness::Fresh));
}

#[tokio::test]
async fn restored_database_drops_memory_and_replica() {
    let (store, dir) = (start(), tempfile::tempdir().unwrap());
    let (builder, faults) = with_outage_file(&store, &dir.path().join("queue.db"));
    let cache = builder.open().await.unwrap();
    let backup = Arc::new(Memory::new());
    let old = Cache::builder().store(Arc::clone(&backup)).open().await.unwrap();
    old.put("t", &1).await.unwrap();
    polled(&store, 1).await;
    for key in ["t", "lost"] {
        cache.put(key, &2).await.unwrap();
    }
    polled(&store, 1).await;
    open_breaker(&cache, &faults).await;
    assert_eq!(cache.put("queued", &3).await.unwrap(), WriteOutcome::Queued);
    store.restore(Arc::clone(&backup));
    faults.clear();
    wait_until("the drop", async || get(&cache, "t").await == (1, Freshness::Fresh)).await;
    assert!(cache.get("lost").await.unwrap().is_none());
    wait_until("the queue", async || cache.health().queue.unwrap().records == 0).await;
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
    assert_eq!(get(&cache, "queued").await.0, 3);
    open_breaker(&cache, &faults).await;
    assert_eq!(get(&cache, "t").await.0, 1);
    let lost = cache.get("lost").await;
    assert!(!matches!(lost, Ok(Some(_))), "no copy of the lost history is left: {lost:?}");
}

#[tokio::test]
async fn write_that_a_restore_overtakes_leaves_no_copy() {
    let (store, dir) = (start(), tempfile::tempdir().unwrap());
    let (builder, faults) = with_outage_file(&store, &dir.path().join("queue.db"));
    let cache = builder.open().await.unwrap();
    polled(&store, 1).await;
    store.acknowledgements.forget_permits(usize::MAX);
    let write = tokio::spawn(cache.put("t", &1).into_future());
    let key = Key::new("t").unwrap();
    wait_until("the write", async || store.newest_before(Instant::now(), &key).is_some()).await;
    store.restore(Arc::default());
    polled(&store, 2).await;
    store.acknowledgements.add_permits(1 << 20);
    assert_eq!(write.await.unwrap().unwrap(), WriteOutcome::Stored);
    assert_eq!(cache.health().queue.unwrap().copies, 0);
    assert!(cache.get("t").await.unwrap().is_none());
    open_breaker(&cache, &faults).await;
    let lost = cache.get("t").await;
    assert!(!matches!(lost, Ok(Some(_))), "{lost:?}");
}
