//! Python and threadkeep work on the same rows.

use std::time::Instant;

use threadkeep::WriteOutcome;

use super::*;
use crate::process::Python;
use crate::stack::Fault;

on_each_server!(
    both_sides_read_append_and_delete,
    expiry_applies_to_both_sides,
    late_replay_restores_no_deleted_conversation,
);

async fn both_sides_read_append_and_delete(server: Server) {
    let stack = shared(server).await;
    let gateway = stack.gateway().await;
    let (cache, mut python) = (daemon(&gateway).await, Python::changed(&gateway).await);
    let (key, user) = (key("both"), key("user"));
    let set = json!({"thread_id": key, "data": messages(&["p1"]), "ttl": HOUR, "user_id": user});
    python.call("set", set.clone()).await.unwrap();
    assert_eq!(value(&cache, &key).await, Some(messages(&["p1"])));
    append(&cache, &key, "r1").await;
    assert_eq!(python.get(&key).await, Some(messages(&["p1", "r1"])));
    python.set(&key, &messages(&["p1", "r1", "p2"]), HOUR as f64).await;
    append(&cache, &key, "r2").await;
    assert_eq!(python.get(&key).await, Some(messages(&["p1", "r1", "p2", "r2"])));
    assert_eq!(value(&cache, &key).await, Some(messages(&["p1", "r1", "p2", "r2"])));

    // A read in Python sets the access time, which is not a new version.
    let columns = "select version from conversation_threads where thread_id";
    let version = || stack.psql(&format!("{columns} = '{key}'"));
    let before = version();
    stack.psql(&format!(
        "update conversation_threads set accessed_at = '2000-01-01' where thread_id = '{key}'"
    ));
    python.get(&key).await;
    let marked = "select accessed_at > now() - interval '1 hour' from conversation_threads where thread_id";
    assert_eq!((stack.psql(&format!("{marked} = '{key}'")).as_str(), version()), ("t", before));

    python.delete(&key).await;
    assert_eq!((value(&cache, &key).await, python.get(&key).await), (None, None));
    python.call("set", set).await.unwrap();
    assert_eq!(value(&cache, &key).await, Some(messages(&["p1"])));
    let of_user = |all: Value| all.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let listed = python.call("of_user", json!({"user_id": user})).await.unwrap();
    assert_eq!((of_user(listed), cache.list(&user).await.unwrap().len()), (vec![key.clone()], 1));
    cache.remove(&key).await.unwrap();
    assert_eq!((value(&cache, &key).await, python.get(&key).await), (None, None));
    assert!(!python.append(&key, "too late").await, "an append also finds no conversation");
    assert_eq!(python.call("of_user", json!({"user_id": user})).await.unwrap(), json!({}));
    python.set(&key, &messages(&["p3"]), HOUR as f64).await;
    assert_eq!(value(&cache, &key).await, Some(messages(&["p3"])));
}

async fn expiry_applies_to_both_sides(server: Server) {
    const LIFE: Duration = Duration::from_secs(3);
    let gateway = shared(server).await.gateway().await;
    let (cache, mut python) = (daemon(&gateway).await, Python::changed(&gateway).await);
    let keys = [key("of-python"), key("of-rust")];
    for (at, key) in keys.iter().enumerate() {
        let begun = Instant::now();
        match at {
            0 => python.set(key, &messages(&["brief"]), LIFE.as_secs_f64()).await,
            _ => {
                assert_eq!(
                    cache.put(key, &messages(&["brief"])).ttl(LIFE).await.unwrap(),
                    WriteOutcome::Stored
                )
            }
        }
        eventually("it expires", async || {
            let seen = [value(&cache, key).await, python.get(key).await];
            // Both sides use one clock. threadkeep rounds times to milliseconds, and Python does not round.
            let is_early = begun.elapsed() + Duration::from_millis(50) < LIFE;
            assert!(!is_early || seen.iter().all(Option::is_some), "{seen:?} after {:?}", begun.elapsed());
            seen.iter().all(Option::is_none)
        })
        .await;
        assert!(!python.append(key, "too late").await);
    }
    // Both sides can write the conversation again.
    let [of_python, of_rust] = &keys;
    cache.put(of_python, &messages(&["again"])).await.unwrap();
    python.set(of_rust, &messages(&["again"]), HOUR as f64).await;
    for key in &keys {
        assert_eq!(value(&cache, key).await, Some(messages(&["again"])));
        assert_eq!(python.get(key).await, Some(messages(&["again"])));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_turns_of_both_sides_are_all_kept() {
    for server in with_exact_numbers() {
        keep_concurrent_turns(server).await;
    }
}

async fn keep_concurrent_turns(server: Server) {
    const TURNS: usize = 15;
    let gateway = shared(server).await.gateway().await;
    let (cache, mut python) = (daemon(&gateway).await, Python::changed(&gateway).await);
    let key = key("turns");
    python.set(&key, &messages(&[]), HOUR as f64).await;
    let of_python = async {
        for turn in 0..TURNS {
            assert!(python.append(&key, &format!("p{turn}")).await);
        }
    };
    let of_rust = async {
        for turn in 0..TURNS {
            append(&cache, &key, &format!("r{turn}")).await;
        }
    };
    tokio::join!(of_python, of_rust);
    let kept = value(&cache, &key).await.unwrap();
    let kept: Vec<&str> =
        kept["messages"].as_array().unwrap().iter().map(|turn| turn.as_str().unwrap()).collect();
    for side in ["p", "r"] {
        let of_side: Vec<_> = kept.iter().filter(|turn| turn.starts_with(side)).copied().collect();
        assert_eq!(of_side, (0..TURNS).map(|turn| format!("{side}{turn}")).collect::<Vec<_>>(), "{kept:?}");
    }
}

/// The daemon removes the conversation between Python's read and Python's write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python_append_restores_no_deleted_conversation() {
    for server in with_exact_numbers() {
        remove_within_an_append(server).await;
    }
}

async fn remove_within_an_append(server: Server) {
    let stack = shared(server).await;
    let (gateway, of_python) = (stack.gateway().await, stack.gateway().await);
    let (cache, mut python) = (daemon(&gateway).await, Python::changed(&of_python).await);
    let key = key("deleted");
    python.set(&key, &messages(&["p1"]), HOUR as f64).await;
    of_python.forget();
    of_python.script([Fault::Pass, Fault::Hang]);
    let remove = async {
        of_python.wait_for(2, "conversation_threads").await;
        cache.remove(&key).await.unwrap();
        of_python.release();
    };
    let (was_appended, ()) = tokio::join!(python.append(&key, "p2"), remove);
    assert!(!was_appended);
    assert_eq!((value(&cache, &key).await, python.get(&key).await), (None, None));
}

/// A daemon queues a put in an outage. Meanwhile other clients write and delete the conversation. The plan's class then
/// deletes the rows.
async fn late_replay_restores_no_deleted_conversation(server: Server) {
    // The test deletes all expired rows, so it needs a private stack.
    let stack = tokio::task::spawn_blocking(move || Stack::start(server)).await.unwrap();
    let (cut_off, gateway) = (stack.gateway().await, stack.gateway().await);
    let (late, cache) = (daemon(&cut_off).await, daemon(&gateway).await);
    let mut python = Python::planned(&gateway, &gateway.keys().secret);
    let [read, purged, deleted] = ["read", "purged", "deleted"].map(key);
    cut_off.refuse().await;
    for key in [&read, &purged, &deleted] {
        assert_eq!(late.put(key, &messages(&["late"])).await.unwrap(), WriteOutcome::Queued);
        assert_eq!(cache.put(key, &messages(&["newer"])).await.unwrap(), WriteOutcome::Stored);
    }
    for key in [&read, &purged] {
        cache.remove(key).await.unwrap();
    }
    python.delete(&deleted).await;
    assert_eq!(python.get(&read).await, None);
    python.call("delete_expired", json!({})).await.unwrap();
    cut_off.accept().await;
    eventually("the queue is empty", async || late.health().queue.unwrap().records == 0).await;
    for key in [&read, &purged, &deleted] {
        assert_eq!((value(&cache, key).await, python.get(key).await), (None, None), "{key} was restored");
    }
}
