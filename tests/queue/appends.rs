//! Appends in the queue: what a reader sees, the replay, dead letters, and the way to another file.

use std::time::Duration;

use threadkeep::store::{Append, ArrayPath, Condition, Json, Key, Record, Version};
use threadkeep::testing::Fault;
use threadkeep::tools::{ImportItem, QueueAdmin, QueuedWrite};
use threadkeep::{Cache, DeadLetter, ErrorKind, Freshness, WriteOutcome};

use crate::{World, append as add, dead_letters, found, queued, sleep, wait_until_drained};

async fn append(cache: &Cache, key: &str, items: &[i32]) {
    assert_eq!(cache.append(key, items).await.unwrap().outcome, WriteOutcome::Queued);
}

fn as_queued(json: &str) -> Option<(String, Freshness)> {
    Some((json.to_owned(), Freshness::Queued))
}

#[tokio::test]
async fn restart_in_outage_keeps_appends_and_their_value() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("known", &[0]).user("u").await.unwrap();
    world.start_outage(&cache).await;
    for item in [1, 2] {
        append(&cache, "known", &[item]).await;
        append(&cache, "new", &[item]).await;
    }
    assert_eq!(found(&cache, "known").await, as_queued("[0,1,2]"));
    assert_eq!(cache.get("known").await.unwrap().unwrap().user(), Some("u"));
    assert_eq!(cache.get("new").await.unwrap_err().kind(), ErrorKind::Unavailable);
    drop(cache);
    let cache = world.open_in_outage().await;
    assert_eq!((found(&cache, "known").await, queued(&cache)), (as_queued("[0,1,2]"), 4));
    append(&cache, "known", &[3]).await;
    assert_eq!(found(&cache, "known").await, as_queued("[0,1,2,3]"));
    assert_eq!(cache.get("new").await.unwrap_err().kind(), ErrorKind::Unavailable);
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!(world.stored("known").await.as_deref(), Some("[0,1,2,3]"));
    assert_eq!(world.stored("new").await.as_deref(), Some("[1,2]"));
    assert_eq!(dead_letters(&cache), 0);
    world.start_outage(&cache).await;
    for (key, value) in [("known", "[0,1,2,3]"), ("new", "[1,2]")] {
        let (json, freshness) = found(&cache, key).await.unwrap();
        assert_eq!(json, value, "the replica follows replay");
        assert!(matches!(freshness, Freshness::Stale { .. }), "{freshness:?}");
    }
}

#[tokio::test]
async fn update_that_leaves_a_queued_remove_alone_is_queued() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("k", &[0]).await.unwrap();
    world.start_outage(&cache).await;
    cache.remove("k").await.unwrap();
    let nothing = async || cache.update("k", |_: Option<Vec<i32>>| Ok(None)).await.unwrap();
    assert_eq!(nothing().await, WriteOutcome::Queued, "the store still has the conversation");
    assert_eq!(queued(&cache), 1);
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!(nothing().await, WriteOutcome::Stored);
}

/// A put or remove replaces the appends below it, and an update goes on from them.
#[tokio::test]
async fn appends_keep_their_order_with_other_writes() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("k", &[0]).await.unwrap();
    world.start_outage(&cache).await;
    append(&cache, "k", &[1]).await;
    cache.update("k", add(2)).await.unwrap();
    append(&cache, "k", &[3]).await;
    cache.update("k", add(4)).await.unwrap();
    cache.update("k", add(5)).await.unwrap();
    append(&cache, "k", &[6]).await;
    assert_eq!((found(&cache, "k").await, queued(&cache)), (as_queued("[0,1,2,3,4,5,6]"), 5));
    append(&cache, "put", &[1]).await;
    cache.put("put", &[2]).await.unwrap();
    append(&cache, "put", &[3]).await;
    append(&cache, "removed", &[1]).await;
    cache.remove("removed").await.unwrap();
    assert_eq!(found(&cache, "removed").await, None);
    append(&cache, "removed", &[2]).await;
    assert_eq!((found(&cache, "removed").await, queued(&cache)), (as_queued("[2]"), 9));
    world.faults.clear();
    wait_until_drained(&cache).await;
    for (key, value) in [("k", "[0,1,2,3,4,5,6]"), ("put", "[2,3]"), ("removed", "[2]")] {
        assert_eq!(
            (world.stored(key).await.as_deref(), found(&cache, key).await.unwrap().0),
            (Some(value), value.into())
        );
    }
    assert_eq!(dead_letters(&cache), 0);
}

#[tokio::test]
async fn bad_target_is_a_dead_letter_alone() {
    let mut world = World::new();
    let cache = world.builder().max_value_bytes(1_024).open().await.unwrap();
    cache.put("k", &[0]).await.unwrap();
    world.start_outage(&cache).await;
    append(&cache, "k", &[1]).await;
    let at = cache.append("k", &[2]).at("messages").await.unwrap();
    let large = cache.append("k", &["x".repeat(1_000), "x".repeat(14)]).await.unwrap();
    let absent = cache.append("absent", &[1]).only_if_present().await.unwrap();
    assert!([at, large, absent].iter().all(|appended| appended.outcome == WriteOutcome::Queued));
    append(&cache, "k", &[3]).await;
    append(&cache, "other", &[1]).await;
    assert_eq!(found(&cache, "k").await, as_queued("[0,1,3]"), "the value is without those that fail");
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!(
        (world.stored("k").await.as_deref(), world.stored("other").await.as_deref()),
        (Some("[0,1,3]"), Some("[1]"))
    );
    let mut letters = cache.dead_letters().await.unwrap();
    letters.sort_by_key(|letter| letter.record.version);
    let said = |letter: &DeadLetter| letter.reason.clone();
    let reasons: Vec<_> = letters.iter().map(said).collect();
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    for (reason, word) in reasons.iter().zip(["not an array", "too large", "absent"]) {
        assert!(reason.starts_with("rejected") && reason.contains(word), "{reason}");
    }
    assert_eq!(letters[0].append.as_ref().unwrap().at, ArrayPath::from("messages"));
    assert_eq!((letters[2].condition, letters[2].newer), (Condition::IfPresent, None));
}

/// Replay's answer is lost after the commit, again and again.
#[tokio::test]
async fn lost_answers_apply_queued_appends_once() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = std::sync::Arc::clone(&one.store);
    let (first, second) = (one.open().await, two.open().await);
    for item in 0..6 {
        one.faults.script([Fault::DropResponse; 3]);
        first.append("k", &[item]).await.unwrap();
        assert_eq!(second.append("k", &[100 + item]).await.unwrap().outcome, WriteOutcome::Stored);
        match first.get("k").await {
            Ok(found) => {
                let items: Vec<i32> = found.unwrap().decode().unwrap();
                let own: Vec<i32> = items.iter().copied().filter(|item| *item < 100).collect();
                assert_eq!(own, (0..=item).collect::<Vec<_>>(), "{items:?}");
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}"),
        }
    }
    wait_until_drained(&first).await;
    let items: Vec<i32> = serde_json::from_str(&one.stored("k").await.unwrap()).unwrap();
    let part = |other: bool| items.iter().copied().filter(|item| (*item >= 100) == other).collect::<Vec<_>>();
    assert_eq!((part(false), part(true)), ((0..6).collect(), (100..106).collect()), "{items:?}");
    assert_eq!(
        (dead_letters(&first), found(&first, "k").await.unwrap().0),
        (0, one.stored("k").await.unwrap())
    );
}

/// The store has the items already, and another daemon has appended since. The copy shows both, the queue has one of them.
#[tokio::test]
async fn copy_that_may_have_the_items_is_not_shown_with_them() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = std::sync::Arc::clone(&one.store);
    let (first, second) = (one.open().await, two.open().await);
    first.put("k", &[0]).user("u").await.unwrap();
    one.faults.fail_replays(true);
    one.faults.script([Fault::DropResponse, Fault::Refuse]);
    append(&first, "k", &[1]).await;
    assert_eq!(one.stored("k").await.as_deref(), Some("[0,1]"));
    second.append("k", &[2]).await.unwrap();
    while !first.health().is_available() {
        sleep(5).await;
    }
    first.list("u").await.ok();
    one.start_outage(&first).await;
    let error = first.get("k").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let error = first.update("k", add(3)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    append(&first, "k", &[4]).await;
    one.faults.clear();
    one.faults.fail_replays(false);
    wait_until_drained(&first).await;
    assert_eq!(first.update("k", add(5)).await.unwrap(), WriteOutcome::Stored);
    assert_eq!((found(&first, "k").await.unwrap().0, dead_letters(&first)), ("[0,1,2,4,5]".into(), 0));
}

/// A put of another daemon replaces the conversation, and is newer than the append.
#[tokio::test]
async fn append_below_a_newer_put_of_another_daemon_is_a_dead_letter() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = std::sync::Arc::clone(&one.store);
    let (first, second) = (one.open().await, two.open().await);
    first.put("k", &[0]).await.unwrap();
    one.start_outage(&first).await;
    append(&first, "k", &[1]).await;
    sleep(5).await;
    second.put("k", &[9]).await.unwrap();
    one.faults.clear();
    wait_until_drained(&first).await;
    assert_eq!(found(&first, "k").await.unwrap().0, "[9]");
    let letters = first.dead_letters().await.unwrap();
    assert!(
        letters[0].reason.contains("newer put, remove or plain SQL") && letters[0].newer.is_some(),
        "{letters:?}"
    );
    first.shutdown(Duration::from_secs(1)).await.unwrap();
    // The operator wants the items nevertheless, twice.
    let admin = QueueAdmin::open(one.dir.path().join("q.db")).await.unwrap();
    assert!(admin.requeue(&letters[0]).await.unwrap() && !admin.requeue(&letters[0]).await.unwrap());
    admin.import(vec![ImportItem::DeadLetter(letters[0].clone())]).await.unwrap();
    let again = admin.dead_letters(None).await.unwrap().remove(0);
    assert!(admin.requeue(&again).await.unwrap(), "an append replaces no queued write");
    admin.close().await.unwrap();
    let first = one.open().await;
    wait_until_drained(&first).await;
    assert_eq!((found(&first, "k").await.unwrap().0, dead_letters(&first)), ("[9,1,1]".into(), 0));
}

/// Two files have the same appends, as after an export and an import.
#[tokio::test]
async fn imported_appends_apply_once() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("k", &[0]).await.unwrap();
    world.start_outage(&cache).await;
    append(&cache, "k", &[1]).await;
    assert_eq!(cache.append("k", &[2]).only_if_present().await.unwrap().outcome, WriteOutcome::Queued);
    cache.shutdown(Duration::ZERO).await.unwrap();
    let (path, other) = (world.dir.path().join("q.db"), world.dir.path().join("other.db"));
    let from = QueueAdmin::open(&path).await.unwrap();
    let rows = from.queued(None).await.unwrap();
    let items: Vec<_> = rows.iter().cloned().map(ImportItem::Queued).collect();
    let to = QueueAdmin::open_for(&other, from.project().unwrap()).await.unwrap();
    for queued in [2, 0] {
        let (report, invalid) = to.import(items.clone()).await.unwrap();
        assert_eq!((report.queued, report.duplicates, invalid.len()), (queued, 2 - queued, 0));
    }
    let copied = to.queued(None).await.unwrap();
    for (row, copy) in rows.iter().zip(&copied) {
        let (row, copy) = (&row.write, &copy.write);
        assert_eq!((&copy.append, copy.condition, copy.writer), (&row.append, row.condition, row.writer));
    }
    from.close().await.unwrap();
    to.close().await.unwrap();
    for _ in 0..2 {
        let cache = world.open().await;
        wait_until_drained(&cache).await;
        assert_eq!(world.stored("k").await.as_deref(), Some("[0,1,2]"));
        cache.shutdown(Duration::from_secs(1)).await.unwrap();
        std::fs::rename(&other, &path).ok();
    }
}

#[tokio::test]
async fn import_of_an_append_without_items_is_invalid() {
    let dir = tempfile::tempdir().unwrap();
    let admin = QueueAdmin::open_for(dir.path().join("q.db"), "here").await.unwrap();
    let item = |value: Option<&str>, at: ArrayPath| {
        let mut record = Record::tombstone(Key::new("k").unwrap(), Version::from_raw(1 << 40));
        record.value = value.map(|value| Json::new(value).unwrap());
        let mut queued = QueuedWrite::new(record, threadkeep::store::Timestamp(1));
        queued.write = queued.write.with_append(Append::new(at, 1_000));
        ImportItem::Queued(queued)
    };
    let items = vec![
        item(Some("[1]"), ArrayPath::default()),
        item(Some("1"), ArrayPath::default()),
        item(None, ArrayPath::default()),
        item(Some("[1]"), ArrayPath::from("x".repeat(600).as_str())),
    ];
    let (report, invalid) = admin.import(items).await.unwrap();
    assert_eq!((report.queued, invalid.iter().map(|(at, _)| *at).collect::<Vec<_>>()), (1, vec![1, 2, 3]));
}

/// The store works, and only replay fails. A load tells what the appends follow.
#[tokio::test]
async fn unknown_conversation_with_appends_is_loaded_while_the_store_works() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = std::sync::Arc::clone(&one.store);
    let (first, second) = (one.open().await, two.open().await);
    second.put("k", &[0]).await.unwrap();
    sleep(5).await;
    one.faults.fail_replays(true);
    one.faults.script([Fault::Refuse, Fault::Refuse]);
    append(&first, "k", &[1]).await;
    assert_eq!(found(&first, "k").await, as_queued("[0,1]"));
    assert_eq!(first.update("k", add(2)).await.unwrap(), WriteOutcome::Queued);
    one.faults.fail_replays(false);
    wait_until_drained(&first).await;
    assert_eq!((one.stored("k").await.as_deref(), dead_letters(&first)), (Some("[0,1,2]"), 0));
}

#[tokio::test]
async fn append_to_an_expired_queued_put_does_not_hide_another_daemon() {
    let mut world = World::new();
    let cache = world.open().await;
    world.start_outage(&cache).await;
    cache.put("t", &[1]).ttl(Duration::from_millis(50)).await.unwrap();
    sleep(100).await;
    assert_eq!(cache.get("t").await.unwrap_err().kind(), ErrorKind::Unavailable);
    append(&cache, "t", &[3]).await;
    assert_eq!(cache.get("t").await.unwrap_err().kind(), ErrorKind::Unavailable);
    // The first append comes in time, and the second does not.
    cache.put("u", &[1]).ttl(Duration::from_secs(1)).await.unwrap();
    cache.append("u", &[2]).ttl(Duration::from_secs(1)).await.unwrap();
    sleep(1_100).await;
    append(&cache, "u", &[3]).await;
    assert_eq!(cache.get("u").await.unwrap_err().kind(), ErrorKind::Unavailable);
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!((world.stored("t").await.as_deref(), dead_letters(&cache)), (Some("[3]"), 0));
}
