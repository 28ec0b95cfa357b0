//! The example daemon on a machine that sleeps. The store is a local file, or a real database with its own clock.

use std::path::Path;

use serde_json::json;

use crate::machine::{Machine, environment, millis, with_clocks};
use crate::process::Daemon;
use crate::stack::{Fault, Server, Stack};
use crate::{HOUR, wait_until};

async fn start(settings: &[(&str, &str)], clocks: &Path) -> (Daemon, Machine) {
    let environment = environment(clocks);
    let preloaded = environment.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let settings: Vec<_> = settings.iter().copied().chain(preloaded).collect();
    (Daemon::start(&settings).await, with_clocks(clocks))
}

#[tokio::test]
async fn daemon_with_local_file_keeps_conversations_after_sleep() {
    let directory = tempfile::tempdir().unwrap();
    let (mut daemon, machine) = start(&[], &directory.path().join("clocks")).await;
    let _ = daemon.chat("before", None).await;
    machine.sleep(63 * HOUR);
    let begun = daemon.chat("after", None).await;
    assert_eq!((begun.status, &begun.body["durability"]), (200, &json!("stored")), "{begun:?}");
    daemon.kill().await;
    daemon.restart().await;
    let found = daemon.get(&begun.id()).await;
    assert_eq!(found.status, 200, "{found:?}");
    machine.sleep(25 * HOUR);
    assert_eq!(daemon.get(&begun.id()).await.status, 404, "the conversation has expired");
}

/// The test does not move the clock of the database. The database sees a daemon whose clocks were set.
#[tokio::test(flavor = "multi_thread")]
async fn daemon_on_supabase_keeps_writes_after_a_clock_jump() {
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    for (wall, boot) in [(63, 63), (8, 0), (-8, -8), (-8, 0)] {
        let hours = |hours: i64| hours * millis(HOUR);
        let directory = tempfile::tempdir().unwrap();
        let gateway = stack.gateway().await;
        let (url, key) = (gateway.url(), gateway.keys().secret);
        let settings =
            [("CONVERSATION_STORAGE_BACKEND", "supabase"), ("SUPABASE_URL", &url), ("SUPABASE_KEY", &key)];
        let (mut daemon, machine) = start(&settings, &directory.path().join("clocks")).await;
        let known = daemon.chat("before", None).await.id();

        machine.step(hours(wall), hours(boot));
        gateway.always(Fault::html(522));
        let queued = daemon.chat("right after", None).await;
        assert_eq!((queued.status, &queued.body["durability"]), (200, &json!("queued")), "{queued:?}");
        let stale = daemon.get(&known).await;
        assert_ne!(stale.body["freshness"], "fresh", "{wall} h: {stale:?}");
        gateway.clear();
        wait_until("the queue is drained", async || {
            daemon.request("GET", "/healthz", None).await.body["queue"]["records"] == json!(0)
        })
        .await;
        let health = daemon.request("GET", "/healthz", None).await.body;
        assert_eq!(health["queue"]["dead_letters"], json!(0), "{wall} h: {health}");

        machine.step(hours(wall), hours(boot));
        let stored = daemon.chat("alone", None).await;
        assert_eq!((stored.status, &stored.body["durability"]), (200, &json!("stored")), "{stored:?}");
        let again = daemon.chat("and on", Some(&known)).await;
        assert_eq!((again.status, &again.body["durability"]), (200, &json!("stored")), "{again:?}");
        daemon.kill().await;
        for id in [known, queued.id(), stored.id()] {
            let left = "round(extract(epoch from expires_at - clock_timestamp()) / 3600)";
            let row =
                stack.psql(&format!("select {left} from conversation_threads where thread_id = '{id}'"));
            assert_eq!(row.trim(), "24", "{wall} h: hours left for {id}");
        }
    }
}
