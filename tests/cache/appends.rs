//! Appends over a store that works, is slow, or loses responses.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use threadkeep::store::Memory;
use threadkeep::testing::{Fault, FaultStore};
use threadkeep::{Cache, ErrorKind, Freshness, WriteOutcome};

use crate::{SECOND, bare, resilient};

async fn value(cache: &Cache, key: &str) -> Value {
    cache.get(key).await.unwrap().unwrap().decode().unwrap()
}

#[tokio::test]
async fn append_creates_the_conversation_and_memory_follows() {
    let (cache, faults) = bare(|cache| cache).await;
    let first = cache.append("t", &["a", "b"]).ttl(60 * SECOND).user("u").await.unwrap();
    assert_eq!((first.outcome, first.length), (WriteOutcome::Stored, Some(2)));
    let second = cache.append("t", &["c"]).user("other").await.unwrap();
    assert_eq!((second.outcome, second.length), (WriteOutcome::Stored, Some(3)));
    assert!(second.version > first.version);
    let found = cache.get("t").await.unwrap().unwrap();
    assert_eq!((found.json(), found.user()), (r#"["a","b","c"]"#, Some("u")));
    assert_eq!((Some(found.version()), found.freshness()), (second.version, Freshness::Fresh));
    assert_eq!(faults.calls("load"), 0, "memory follows without a load");
}

#[tokio::test]
async fn append_at_a_member_leaves_the_rest_alone() {
    let (cache, _) = bare(|cache| cache).await;
    cache.put("t", &json!({"title": "x", "messages": [1]})).await.unwrap();
    assert_eq!(cache.append("t", &[2]).at("messages").await.unwrap().length, Some(2));
    assert_eq!(cache.append("t", &[3]).at(["state", "log"]).await.unwrap().length, Some(1));
    let expected = json!({"title": "x", "messages": [1, 2], "state": {"log": [3]}});
    assert_eq!(value(&cache, "t").await, expected);
    cache.evict("t").unwrap();
    assert_eq!(value(&cache, "t").await, expected, "the store holds the same");
}

#[tokio::test]
async fn append_follows_the_version_in_the_store() {
    let store = Arc::new(Memory::new());
    let open = || async { Cache::builder().store(FaultStore::new(Arc::clone(&store))).open().await.unwrap() };
    let (one, other) = (open().await, open().await);
    one.put("t", &[1]).await.unwrap();
    assert_eq!(other.append("t", &[2]).await.unwrap().length, Some(2));
    // This memory holds the version before, so the append must not build on it.
    assert_eq!(one.append("t", &[3]).await.unwrap().length, Some(3));
    assert_eq!(value(&one, "t").await, json!([1, 2, 3]));
}

#[tokio::test]
async fn append_that_does_not_fit_rejects_no_other_of_its_group() {
    let (cache, _) = bare(|cache| cache.max_value_bytes(1_000)).await;
    let big = "x".repeat(995);
    let append = |number: usize| {
        let item = if number == 3 { json!(big) } else { json!(number) };
        let cache = cache.clone();
        async move { cache.append("t", &[item]).await.map(|appended| appended.length) }
    };
    let lengths = futures::future::join_all((0..8).map(append)).await;
    for (number, length) in lengths.iter().enumerate() {
        match (number, length) {
            (3, Err(error)) => assert_eq!(error.kind(), ErrorKind::Rejected),
            (3, Ok(_)) => panic!("the big item fits"),
            (_, length) => {
                assert_eq!(*length.as_ref().unwrap(), Some(number as u64 + u64::from(number < 3)));
            }
        }
    }
    assert_eq!(value(&cache, "t").await, json!([0, 1, 2, 4, 5, 6, 7]));
}

#[tokio::test]
async fn append_only_if_present_leaves_an_absent_one_absent() {
    let (cache, _) = bare(|cache| cache).await;
    let append = |item: i32| cache.append("t", &[item]).only_if_present();
    assert_eq!(append(1).await.unwrap().outcome, WriteOutcome::Absent);
    assert!(cache.get("t").await.unwrap().is_none());
    cache.put("t", &[0]).await.unwrap();
    assert_eq!(append(1).await.unwrap().length, Some(2));
    cache.remove("t").await.unwrap();
    assert_eq!(append(2).await.unwrap().outcome, WriteOutcome::Absent);
}

#[tokio::test]
async fn append_to_a_bad_target_is_rejected_and_changes_nothing() {
    let (cache, _) = bare(|cache| cache.max_value_bytes(1_000)).await;
    cache.put("t", &json!({"title": "x"})).await.unwrap();
    for (append, text) in [
        (cache.append("t", &[1]), "the conversation is not an array"),
        (cache.append("t", &[1]).at("title"), "it has no array at title"),
        (cache.append("t", &[1]).at(["title", "x"]), "it has no array at title.x"),
        (cache.append("t", &["x".repeat(990)]).at("m"), "the conversation would exceed 1000 bytes"),
    ] {
        let error = append.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Rejected);
        assert!(error.to_string().contains(text), "{error}");
    }
    assert_eq!(value(&cache, "t").await, json!({"title": "x"}));
    for append in [
        cache.append("t", "text"),
        cache.append("t", &json!([])),
        cache.append("t", &[1]).at([""; 17]),
        cache.append("t", &[1]).at("a\0b"),
    ] {
        assert_eq!(append.await.unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[tokio::test]
async fn appends_at_once_travel_together_and_keep_their_order() {
    let (cache, faults) = bare(|cache| cache).await;
    faults.always(Fault::Delay(Duration::from_millis(20)));
    let appends: Vec<_> =
        (0..200).map(|item| tokio::spawn(cache.append("t", &[item]).into_future())).collect();
    let mut lengths = Vec::new();
    for append in appends {
        lengths.push(append.await.unwrap().unwrap().length.unwrap());
    }
    let items: Vec<u64> = cache.get("t").await.unwrap().unwrap().decode().unwrap();
    for (item, length) in lengths.iter().enumerate() {
        assert_eq!(
            items[usize::try_from(*length).unwrap() - 1],
            item as u64,
            "the length after its own item"
        );
    }
    assert!(faults.calls("apply") < 20, "{} calls", faults.calls("apply"));
}

#[tokio::test]
async fn append_is_stored_once_if_the_response_is_lost() {
    let (cache, faults) = resilient(SECOND).await;
    cache.append("t", &[1]).await.unwrap();
    faults.script([Fault::DropResponse]);
    let repeated = cache.append("t", &[2]).await.unwrap();
    assert_eq!(
        (repeated.outcome, repeated.length),
        (WriteOutcome::Stored, None),
        "the first answer was lost"
    );
    assert_eq!(value(&cache, "t").await, json!([1, 2]));
    assert_eq!(cache.append("t", &[3]).await.unwrap().length, Some(3));
}
