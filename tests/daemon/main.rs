//! Tests the example daemon as a process: start, kill, restart.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

#[macro_use]
#[path = "../stack/mod.rs"]
mod stack;

mod process;

use std::time::Duration;

use process::{Answer, Daemon};
use serde_json::json;
use stack::{Fault, Gateway, Server, Stack};

/// Returns the texts of a conversation. The user's and the daemon's messages alternate.
fn contents(answer: &Answer) -> Vec<String> {
    let messages = answer.body["messages"].as_array().unwrap();
    messages.iter().map(|message| message["content"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn conversation_without_settings_survives_sigterm_and_sigkill() {
    let mut daemon = Daemon::start(&[]).await;
    let first = daemon.chat("one", None).await;
    assert_eq!((first.status, &first.body["durability"]), (200, &json!("stored")));
    let id = first.id();

    assert!(daemon.terminate().await.success());
    daemon.restart().await;
    let second = daemon.chat("two", Some(&id)).await;
    assert_eq!((second.status, second.id()), (200, id.clone()));

    daemon.kill().await;
    daemon.restart().await;
    assert_eq!(daemon.chat("three", Some(&id)).await.status, 200);
    let conversation = daemon.get(&id).await;
    assert_eq!(conversation.body["freshness"], "fresh");
    let texts: Vec<String> = contents(&conversation).into_iter().step_by(2).collect();
    assert_eq!(texts, ["one", "two", "three"]);
    assert!(daemon.log().contains("kept in a local file"));
    let mode = std::fs::metadata(daemon.directory().join("threadkeep.db")).unwrap().permissions();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777,
        0o600,
        "the file is readable by its owner alone"
    );
}

on_each_server!(conversation_survives_sigkill_and_is_in_its_row);

async fn on_supabase(gateway: &Gateway, more: &[(&str, &str)]) -> Daemon {
    let (url, key) = (gateway.url(), gateway.keys().secret);
    let settings =
        [("CONVERSATION_STORAGE_BACKEND", "supabase"), ("SUPABASE_URL", &url), ("SUPABASE_KEY", &key)];
    Daemon::start(&[&settings, more].concat()).await
}

/// Starts a chat, kills and restarts the daemon, continues the chat by its `continuation_id`, and reads the row with SQL.
async fn conversation_survives_sigkill_and_is_in_its_row(server: Server) {
    let stack = tokio::task::block_in_place(|| Stack::shared(server));
    let gateway = stack.gateway().await;
    let mut daemon = on_supabase(&gateway, &[]).await;
    let id = daemon.chat("hello", None).await.id();
    daemon.kill().await;
    daemon.restart().await;
    let second = daemon.chat("again", Some(&id)).await;
    assert_eq!((second.status, second.id()), (200, id.clone()));
    assert!(second.body["reply"].as_str().unwrap().contains("before that: hello"));
    let texts = "select string_agg(message ->> 'content', '|' order by at) from conversation_threads,
                jsonb_array_elements(conversation_data -> 'messages') with ordinality as entry(message, at)";
    let row = stack.psql(&format!("{texts} where thread_id = '{id}' and message ->> 'role' = 'user'"));
    assert_eq!(row.trim(), "hello|again");
    let user = stack.psql(&format!("select user_id from conversation_threads where thread_id = '{id}'"));
    assert_eq!(user.trim(), "u1");
    assert!(!daemon.log().contains(&gateway.keys().secret), "the log contains the key");
}

#[tokio::test]
async fn unknown_expired_or_deleted_conversation_returns_404() {
    let daemon = Daemon::start(&[("CONVERSATION_TIMEOUT_HOURS", "0.0003")]).await;
    let id = daemon.chat("brief", None).await.id();
    assert_eq!(daemon.get(&id).await.status, 200);
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let gone = [daemon.get(&id).await, daemon.chat("more", Some(&id)).await, daemon.delete(&id).await];
    let unknown = [daemon.get("x").await, daemon.chat("more", Some("x")).await, daemon.delete("x").await];
    let deleted = daemon.chat("to be deleted", None).await.id();
    assert_eq!(daemon.delete(&deleted).await.status, 204);
    for answer in gone.into_iter().chain(unknown).chain([daemon.get(&deleted).await]) {
        assert_eq!(answer.status, 404);
        assert!(answer.body["error"].as_str().unwrap().contains("not found or has expired"), "{answer:?}");
    }
}

#[tokio::test]
async fn bad_request_returns_its_cause() {
    let daemon = Daemon::start(&[("CONVERSATION_MAX_VALUE_BYTES", "2KiB")]).await;
    let cases = [
        (json!({"mess": 1}), 422, "message"),
        (json!({"message": "x".repeat(3_000)}), 400, "CONVERSATION_MAX_VALUE_BYTES"),
        // One byte above the limit, so that the daemon reads all of the request before it answers.
        (json!({"message": "x".repeat((2 << 20) - 13)}), 413, "; send at most 2 MiB"),
    ];
    for (body, status, word) in cases {
        let answer = daemon.post("/chat", &body).await;
        assert_eq!(answer.status, status);
        assert!(answer.body["error"].as_str().unwrap().contains(word), "{answer:?}");
    }
    assert_eq!(daemon.get(&"x".repeat(600)).await.status, 400);
}

/// The messages of a turn stay together. A turn's answer counts the turns that its request saw, so concurrent turns make it a lower bound.
#[tokio::test]
async fn concurrent_turns_are_all_stored_with_their_answers() {
    let daemon = Daemon::start(&[]).await;
    let id = daemon.chat("0", None).await.id();
    let turns: Vec<String> = (1..30).map(|turn| turn.to_string()).collect();
    let answers = futures::future::join_all(turns.iter().map(|turn| daemon.chat(turn, Some(&id)))).await;
    let stored = contents(&daemon.get(&id).await);
    assert_eq!(stored.len(), 60);
    for (turn, answer) in turns.iter().zip(answers) {
        let at = stored.iter().position(|text| text == turn).unwrap();
        assert_eq!((answer.status, &answer.body["reply"]), (200, &json!(stored[at + 1])));
        let number = stored[at + 1].strip_prefix("This is turn ").and_then(|rest| rest.split('.').next());
        assert!((2..=at / 2 + 1).contains(&number.unwrap().parse().unwrap()), "{stored:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_conversation_in_outage_returns_503_not_404() {
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    let gateway = stack.gateway().await;
    let daemon = on_supabase(&gateway, &[("CONVERSATION_FRESH_SECONDS", "0")]).await;
    let id = daemon.chat("known", None).await.id();
    gateway.always(Fault::html(522));
    for _ in 0..10 {
        let known = daemon.get(&id).await;
        assert_eq!((known.status, &known.body["freshness"]), (200, &json!("stale")), "{known:?}");
        for answer in [daemon.get("unknown").await, daemon.chat("more", Some("unknown")).await] {
            assert_eq!(answer.status, 503, "{answer:?}");
            assert!(answer.retry_after.unwrap() >= 1);
        }
        let begun = daemon.chat("new", None).await;
        assert_eq!((begun.status, &begun.body["durability"]), (200, &json!("queued")), "{begun:?}");
        let next = daemon.chat("next", Some(&begun.id())).await;
        assert_eq!((next.status, &next.body["durability"]), (200, &json!("queued")), "{next:?}");
        let begun = daemon.get(&begun.id()).await;
        assert_eq!((begun.status, &begun.body["freshness"]), (200, &json!("queued")), "{begun:?}");
        assert_eq!(contents(&begun).into_iter().step_by(2).collect::<Vec<_>>(), ["new", "next"]);
    }
    let health = daemon.request("GET", "/healthz", None).await;
    assert_eq!((health.status, &health.body["available"]), (200, &json!(false)));
    assert_eq!(health.body["queue"]["records"], json!(20));
    gateway.clear();
    for _ in 0..500 {
        let health = daemon.request("GET", "/healthz", None).await;
        if health.body["queue"]["records"] == json!(0) {
            assert_eq!(daemon.chat("after", Some(&id)).await.status, 200);
            return assert_eq!(daemon.get("unknown").await.status, 404);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the daemon did not recover");
}

#[tokio::test(flavor = "multi_thread")]
async fn daemon_stopped_during_request_completes_it_first() {
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    let gateway = stack.gateway().await;
    let mut daemon = on_supabase(&gateway, &[]).await;
    gateway.rule(|seen| match seen.path.contains("apply") {
        true => Fault::Slow(Duration::from_secs(1)),
        false => Fault::Pass,
    });
    let client = daemon.clone_client();
    let (answer, stopped) = tokio::join!(client.chat("slow", None), async {
        gateway.wait_for(1, "threadkeep_apply").await;
        daemon.terminate().await
    });
    assert_eq!(answer.status, 200);
    assert!(stopped.success());
    let row = stack.psql(&format!("select 1 from conversation_threads where thread_id = '{}'", answer.id()));
    assert_eq!(row.trim(), "1");
}

/// Rolls back to the memory backend. The daemon must run with any other settings.
#[tokio::test]
async fn memory_backend_with_broken_settings_runs_and_warns() {
    let broken = [
        ("SUPABASE_URL", "junk"),
        ("CONVERSATION_LOCAL_PATH", "/no/such/place"),
        ("CONVERSATION_STORAGE_BACKEND", "memory"),
    ];
    let daemon = Daemon::start(&broken).await;
    let id = daemon.chat("hello", None).await.id();
    assert_eq!(daemon.get(&id).await.status, 200);
    assert!(daemon.log().contains("lost on restart"), "{}", daemon.log());
    let fallback = Daemon::start(&[("CONVERSATION_STORAGE_BACKEND", "supabase")]).await;
    assert!(fallback.log().contains("FALLING BACK TO MEMORY"), "{}", fallback.log());
    assert!(fallback.log().contains("SUPABASE_KEY"), "{}", fallback.log());
}

#[tokio::test]
async fn wrong_settings_stop_daemon_and_list_all_problems() {
    let junk = [
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("CONVERSATION_STRICT", "maybe"),
        ("CONVERSATION_TIMEOUT_HOURS", "soon"),
        ("CONVERSATION_MAX_VALUE_BYTES", "-1"),
        ("SUPABASE_URL", "nowhere"),
        ("SUPABASE_KEY", "with a \u{1}"),
    ];
    let (status, log) = Daemon::fail(&junk).await;
    assert!(!status.success());
    for (name, _) in &junk[1..] {
        assert!(log.contains(name), "{name} is missing in: {log}");
    }
    let (status, log) = Daemon::fail(&[("CONVERSATION_LOCAL_PATH", "/proc/no/such.db")]).await;
    assert!(
        !status.success() && log.contains("CONVERSATION_LOCAL_PATH") && log.contains("writable"),
        "{log}"
    );
}

#[tokio::test]
async fn second_daemon_on_same_file_names_the_first_process() {
    let daemon = Daemon::start(&[]).await;
    let path = daemon.directory().join("threadkeep.db");
    let (status, log) = Daemon::fail(&[("CONVERSATION_LOCAL_PATH", path.to_str().unwrap())]).await;
    assert!(!status.success());
    assert!(log.contains(&format!("in use by process {}", daemon.id())), "{log}");
}

#[tokio::test]
async fn settings_unset_in_environment_come_from_dotenv_file() {
    let dotenv = "CONVERSATION_STORAGE_BACKEND=memory\nCONVERSATION_TIMEOUT_HOURS=\"1\"\n# comment\n";
    let daemon = Daemon::start_with_file(dotenv, &[]).await;
    assert!(daemon.log().contains("lost on restart"), "{}", daemon.log());
    let daemon = Daemon::start_with_file(dotenv, &[("CONVERSATION_STORAGE_BACKEND", "local")]).await;
    assert!(daemon.log().contains("kept in a local file"), "{}", daemon.log());
}
