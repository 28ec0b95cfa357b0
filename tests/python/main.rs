//! The plan's class in Python works beside threadkeep on the same rows, with the four changes of the guide.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

#[macro_use]
#[path = "../stack/mod.rs"]
mod stack;

mod changes;
mod process;
mod together;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use stack::{Gateway, Server, Stack};
use threadkeep::Cache;

const HOUR: u64 = 3_600;

async fn shared(server: Server) -> &'static Stack {
    tokio::task::spawn_blocking(move || Stack::shared(server)).await.unwrap()
}

/// Returns the servers that can compare versions in a filter. Lite parses them as JavaScript numbers.
fn with_exact_numbers() -> impl Iterator<Item = Server> {
    Server::installed().filter(|server| *server != Server::Lite)
}

/// Opens a daemon with its own queue, which loads from the database at each read.
async fn daemon(gateway: &Gateway) -> Cache {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let queue: PathBuf = directory.keep().join("queue.db");
    let builder = Cache::builder().supabase(&gateway.url(), &gateway.keys().secret).queue(queue);
    builder.fresh_for(Duration::ZERO).warmup_limit(0).open().await.unwrap()
}

/// Returns a thread id that no other test uses.
fn key(name: &str) -> String {
    format!("{name}-{:016x}", fastrand::u64(..))
}

async fn value(cache: &Cache, key: &str) -> Option<Value> {
    cache.get(key).await.unwrap().map(|found| found.decode().unwrap())
}

fn messages(all: &[&str]) -> Value {
    json!({"messages": all})
}

/// Adds a turn to a conversation.
async fn append(cache: &Cache, key: &str, turn: &str) {
    let add = |value: Option<Value>| {
        let mut value = value.unwrap();
        value["messages"].as_array_mut().unwrap().push(turn.into());
        Ok(Some(value))
    };
    cache.update(key, add).await.unwrap();
}

async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    for _ in 0..3_000 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("timeout: {what}");
}
