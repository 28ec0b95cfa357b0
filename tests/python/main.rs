//! The plan's class in Python works beside threadkeep on the same rows, with the four changes that the guide names.
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

/// The servers on which a filter can compare versions. Lite reads the digits in a filter as a JavaScript number.
fn with_exact_numbers() -> impl Iterator<Item = Server> {
    Server::installed().filter(|server| *server != Server::Lite)
}

/// A daemon that asks the database at each read, with a queue of its own.
async fn daemon(gateway: &Gateway) -> Cache {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let queue: PathBuf = directory.keep().join("queue.db");
    let builder = Cache::builder().supabase(&gateway.url(), &gateway.keys().secret).queue(queue);
    builder.fresh_for(Duration::ZERO).warm_threads(0).open().await.unwrap()
}

/// A thread id that no other test has.
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
    let _ = cache.update(key, add).await.unwrap();
}

async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    for _ in 0..3_000 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("this never came true: {what}");
}
