//! A get returns the value of the put unchanged, and an update keeps the parts that it does not change.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod json;
mod random;
mod untouched;

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use threadkeep::{Cache, ErrorKind, WriteOutcome};

use random::canonical;

const ROUNDS: u64 = 150;

fn raw(text: &str) -> Box<RawValue> {
    RawValue::from_string(text.to_owned()).unwrap()
}

async fn stored(cache: &Cache, key: &str) -> String {
    cache.get(key).await.unwrap().unwrap().json().to_owned()
}

/// Increments one member of a conversation through `Value`.
async fn increment(cache: &Cache, key: &str) -> threadkeep::Result<WriteOutcome> {
    cache
        .update(key, |now: Option<Value>| {
            let mut now = now.unwrap();
            now["count"] = json!(now["count"].as_u64().unwrap() + 1);
            Ok(Some(now))
        })
        .await
}

/// Checks that a get returns the text of the put, also after updates of another member.
async fn check_values_are_unchanged(cache: &Cache) {
    for seed in 0..ROUNDS {
        let mut random = fastrand::Rng::with_seed(seed);
        let (key, kept) = (format!("t{seed}"), random::json(&mut random, 4, false));
        let text = |count: u8| format!(r#"{{"kept": {kept}, "count": {count}}}"#);
        cache.put(&key, &raw(&text(0))).metadata(&raw(&text(9))).await.unwrap();
        assert_eq!(stored(cache, &key).await, text(0), "seed {seed}");
        for times in 1..=2 {
            let _ = increment(cache, &key).await.unwrap();
            let expected = canonical(&text(times), false);
            assert_eq!(canonical(&stored(cache, &key).await, false), expected, "seed {seed}");
        }
        let found = cache.get(&key).await.unwrap().unwrap();
        assert_eq!(found.metadata(), text(9), "seed {seed}");
    }
}

#[tokio::test]
async fn numbers_in_memory_are_unchanged() {
    let cache = Cache::builder().memory().open().await.unwrap();
    check_values_are_unchanged(&cache).await;
}

#[tokio::test]
async fn numbers_in_a_local_file_are_unchanged_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let open = async || Cache::builder().local(dir.path().join("t.db")).open().await.unwrap();
    let cache = open().await;
    check_values_are_unchanged(&cache).await;
    let mut before = Vec::new();
    for seed in 0..ROUNDS {
        before.push(stored(&cache, &format!("t{seed}")).await);
    }
    cache.shutdown(Duration::from_secs(60)).await.unwrap();
    drop(cache);
    let cache = open().await;
    for (seed, before) in before.iter().enumerate() {
        assert_eq!(stored(&cache, &format!("t{seed}")).await, *before);
    }
}

#[cfg(feature = "testing")]
#[tokio::test]
async fn numbers_in_the_queue_are_unchanged_after_replay() {
    use threadkeep::Key;
    use threadkeep::store::{LoadRequest, Loaded, Memory, ResilientStore, Store};
    use threadkeep::testing::{Fault, FaultStore};

    let dir = tempfile::tempdir().unwrap();
    let store = std::sync::Arc::new(Memory::new());
    let faulty = FaultStore::new(std::sync::Arc::clone(&store));
    let faults = faulty.faults();
    faults.always(Fault::Refuse);
    let cache = Cache::builder().store(ResilientStore::new(faulty, Duration::from_secs(1)));
    let cache = cache.queue(dir.path().join("q.db")).open().await.unwrap();
    check_values_are_unchanged(&cache).await;
    faults.clear();
    for _ in 0..6_000 {
        if cache.health().queue.unwrap().records == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for seed in 0..ROUNDS {
        let key = format!("t{seed}");
        let requests = [LoadRequest::from(Key::new(&key).unwrap())];
        let Some(Loaded::Found(record)) = store.load(&requests).await.unwrap().pop() else { panic!("{key}") };
        assert_eq!(record.value.as_ref().unwrap().as_str(), stored(&cache, &key).await);
    }
}

#[tokio::test]
async fn non_finite_float_is_rejected_without_a_change() {
    let cache = Cache::builder().memory().open().await.unwrap();
    cache.put("t", &[1.5]).await.unwrap();
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        #[expect(clippy::cast_possible_truncation, reason = "a cast keeps NaN and infinity")]
        let narrow = bad as f32;
        let puts = [
            cache.put("t", &bad).await,
            cache.put("t", &[Some(narrow)]).await,
            cache.put("t", &HashMap::from([("k", (1, bad))])).await,
            cache.put("t", &1).metadata(&HashMap::from([("score", bad)])).await,
            cache.update("t", |now: Option<Vec<f64>>| Ok(now.map(|now| [now, vec![bad]].concat()))).await,
            cache.update("t", |_: Option<Vec<f64>>| Ok(Some(vec![]))).metadata(&bad).await,
        ];
        for put in puts {
            let error = put.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains("a number that is not finite"), "{error}");
        }
        assert_eq!(cache.get("t").await.unwrap().unwrap().decode::<Vec<f64>>().unwrap(), [1.5]);
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Turn {
    Said { text: String, at: u64, score: f64 },
    Rated { by: HashMap<String, f32>, flags: Vec<Option<bool>>, initial: char },
    Ended,
}

#[tokio::test]
async fn value_decodes_to_the_type_of_the_put() {
    let cache = Cache::builder().memory().open().await.unwrap();
    let turns = vec![
        Turn::Said { text: "\u{1F600}\n".into(), at: u64::MAX, score: 0.1 + 0.2 },
        Turn::Rated {
            by: HashMap::from([("a".into(), 0.1), ("b".into(), f32::MAX)]),
            flags: vec![None, Some(true)],
            initial: '\u{e9}',
        },
        Turn::Ended,
    ];
    cache.put("t", &turns).await.unwrap();
    assert_eq!(cache.get("t").await.unwrap().unwrap().decode::<Vec<Turn>>().unwrap(), turns);
    cache.update("t", |now: Option<Vec<Turn>>| Ok(now)).await.unwrap();
    assert_eq!(cache.get("t").await.unwrap().unwrap().decode::<Vec<Turn>>().unwrap(), turns);
    for float in [1e16, 1e19, f64::MAX, f64::from_bits(1), -0.0, 0.1] {
        cache.put("f", &float).await.unwrap();
        let found = cache.get("f").await.unwrap().unwrap();
        assert_eq!(found.decode::<f64>().unwrap().to_bits(), float.to_bits());
        assert_eq!(found.decode::<Value>().unwrap(), json!(float));
    }
    cache.put("i", &(i128::MIN, u128::MAX)).await.unwrap();
    let wide = cache.get("i").await.unwrap().unwrap().decode::<(i128, u128)>().unwrap();
    assert_eq!(wide, (i128::MIN, u128::MAX));
}

/// A caller can put, read and update a number beyond all floats as text.
#[tokio::test]
async fn numbers_beyond_all_floats_are_unchanged_as_raw_values() {
    let cache = Cache::builder().memory().open().await.unwrap();
    for seed in 0..ROUNDS {
        let text = random::json(&mut fastrand::Rng::with_seed(seed), 3, true);
        cache.put("t", &raw(&text)).await.unwrap();
        cache.update("t", |now: Option<Box<RawValue>>| Ok(now)).await.unwrap();
        assert_eq!(stored(&cache, "t").await, text, "seed {seed}");
    }
    cache.put("t", &raw(r#"{"count":0,"huge":1e400}"#)).await.unwrap();
    assert_eq!(increment(&cache, "t").await.unwrap_err().kind(), ErrorKind::Decode);
    assert_eq!(stored(&cache, "t").await, r#"{"count":0,"huge":1e400}"#);
}
