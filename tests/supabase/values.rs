//! A value survives PostgREST and `jsonb` unchanged.

use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::stack::Server;
use crate::{get, key, random, shared};

/// Excludes Lite, because its JavaScript rounds numbers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn number_in_jsonb_is_unchanged() {
    let (_, _, cache) = shared(Server::Postrust).await;
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (key, is_wide) = (key("numbers"), seed % 3 == 0);
        let kept = random::json(&mut random, 4, is_wide);
        let text = |count: u8| format!(r#"{{"kept": {kept}, "count": {count}}}"#);
        let value = RawValue::from_string(text(0)).unwrap();
        cache.put(&key, &value).await.unwrap();
        let stored = async |count: u8| {
            cache.evict(&key).unwrap();
            let found = get(&cache, &key).await.unwrap();
            let (found, expected) = (found.json(), text(count));
            assert_eq!(random::canonical(found, true), random::canonical(&expected, true), "seed {seed}");
        };
        stored(0).await;
        if is_wide {
            continue;
        }
        for times in 1..=2 {
            let change = |now: Option<Value>| {
                let mut now = now.unwrap();
                now["count"] = json!(times);
                Ok(Some(now))
            };
            cache.update(&key, change).await.unwrap();
            stored(times).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn float_in_jsonb_stays_a_float() {
    let (_, _, cache) = shared(Server::Postrust).await;
    let floats = [0.0, 1.0, 0.1 + 0.2, 1e15, 1e16, -1e18, 1.9e19, 1e22, 1e300, f64::MAX, f64::from_bits(1)];
    let key = key("floats");
    cache.put(&key, &floats).await.unwrap();
    cache.evict(&key).unwrap();
    let found = get(&cache, &key).await.unwrap();
    assert_eq!(found.decode::<Vec<f64>>().unwrap(), floats);
    assert_eq!(found.decode::<Value>().unwrap(), json!(floats), "{}", found.json());
}
