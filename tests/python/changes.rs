//! Shows on the unchanged class why users of the plan's class need four changes.

use threadkeep::WriteOutcome;

use super::*;
use crate::process::Python;
use crate::stack::Fault;

on_each_server!(
    without_on_conflict_the_second_write_fails,
    without_the_expiry_deleted_conversations_are_listed,
    put_replaces_and_upsert_keeps_user_and_metadata,
);

/// Change 1. Lite has no roles, so only the other servers can reject the anon key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anon_key_is_rejected_for_every_call() {
    for server in Server::installed().filter(|server| *server != Server::Lite) {
        let gateway = shared(server).await.gateway().await;
        for anon in [gateway.keys().anon_jwt, gateway.keys().publishable] {
            let mut python = Python::planned(&gateway, &anon);
            let set = json!({"thread_id": key("anon"), "data": messages(&[]), "ttl": HOUR});
            for (method, arguments) in [("set", set), ("of_user", json!({"user_id": "x"}))] {
                assert_eq!(python.call(method, arguments).await, Err("42501".into()), "{server:?} {method}");
            }
        }
    }
}

/// Change 2.
async fn without_on_conflict_the_second_write_fails(server: Server) {
    let gateway = shared(server).await.gateway().await;
    let mut python = Python::planned(&gateway, &gateway.keys().secret);
    let set = json!({"thread_id": key("twice"), "data": messages(&[]), "ttl": HOUR});
    assert_eq!(python.call("set", set.clone()).await, Ok(Value::Null));
    assert_eq!(python.call("set", set).await, Err("23505".into()));
}

/// Change 3.
async fn without_the_expiry_deleted_conversations_are_listed(server: Server) {
    let gateway = shared(server).await.gateway().await;
    let (cache, mut planned) = (daemon(&gateway).await, Python::planned(&gateway, &gateway.keys().secret));
    let (key, user) = (key("gone"), key("user"));
    cache.put(&key, &messages(&["r1"])).user(&user).ttl(Duration::from_millis(100)).await.unwrap();
    eventually("it expires", async || value(&cache, &key).await.is_none()).await;
    let listed = planned.call("of_user", json!({"user_id": user})).await.unwrap();
    assert_eq!(listed, json!({&key: messages(&["r1"])}));
    let mut changed = Python::changed(&gateway).await;
    assert_eq!(changed.call("of_user", json!({"user_id": user})).await.unwrap(), json!({}));
}

/// Change 4. The test uses the changed class, because the unchanged class cannot write twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_version_a_turn_is_lost() {
    for server in with_exact_numbers() {
        lose_a_turn_and_keep_one(server).await;
    }
}

async fn lose_a_turn_and_keep_one(server: Server) {
    let stack = shared(server).await;
    let (gateway, of_python) = (stack.gateway().await, stack.gateway().await);
    let (cache, mut changed) = (daemon(&gateway).await, Python::changed(&of_python).await);
    let key = key("turn");
    changed.set(&key, &messages(&["p1"]), HOUR as f64).await;
    // An append by `get` and `set`, with a turn of the daemon between the two calls.
    let read = changed.get(&key).await.unwrap();
    append(&cache, &key, "r1").await;
    let turns = [read["messages"][0].as_str().unwrap(), "p2"];
    changed.set(&key, &messages(&turns), HOUR as f64).await;
    assert_eq!(value(&cache, &key).await, Some(messages(&["p1", "p2"])), "r1 is lost");
    // The same with `append`, whose update waits until the daemon has written.
    of_python.forget();
    of_python.script([Fault::Pass, Fault::Hang]);
    let between = async {
        of_python.wait_for(2, "conversation_threads").await;
        append(&cache, &key, "r2").await;
        of_python.release();
    };
    let (was_appended, ()) = tokio::join!(changed.append(&key, "p3"), between);
    assert!(was_appended);
    assert_eq!(value(&cache, &key).await, Some(messages(&["p1", "p2", "r2", "p3"])));
}

async fn put_replaces_and_upsert_keeps_user_and_metadata(server: Server) {
    let stack = shared(server).await;
    let gateway = stack.gateway().await;
    let (cache, mut python) = (daemon(&gateway).await, Python::changed(&gateway).await);
    let key = key("whose");
    let columns = || {
        stack.psql(&format!("select user_id, metadata from conversation_threads where thread_id = '{key}'"))
    };
    let put = cache.put(&key, &messages(&[])).user("u1").metadata(&json!({"m": 1}));
    assert_eq!(put.await.unwrap(), WriteOutcome::Stored);
    python.set(&key, &messages(&["p1"]), HOUR as f64).await;
    assert_eq!(columns(), r#"u1|{"m": 1}"#);
    cache.put(&key, &messages(&["r1"])).await.unwrap();
    assert_eq!(columns(), "|{}");
}
