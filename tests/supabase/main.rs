//! threadkeep on real stacks: PostgreSQL behind PostgREST-compatible servers, and a gateway that injects faults.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[macro_use]
#[path = "../stack/mod.rs"]
mod stack;

mod appends;
mod clocks;
mod contract;
mod credentials;
mod database;
mod outages;
#[path = "../values/random.rs"]
mod random;
mod responses;
mod secrets;
mod tombstones;
mod values;
mod verdicts;
mod writes;

use std::path::PathBuf;
use std::time::Duration;

use stack::{Gateway, Server, Stack};
use threadkeep::{Builder, Cache, Conversation, OnOutage};

const SECOND: Duration = Duration::from_secs(1);
/// Longer than a healthy stack takes on a busy machine.
const AMPLE: Duration = Duration::from_secs(60);

/// Returns a builder with the secret key of this gateway and a short freshness time. A healthy stack on a busy
/// machine answers within these limits. A test with a hanging request sets shorter limits.
fn builder(gateway: &Gateway) -> Builder {
    let builder = Cache::builder().supabase(&gateway.url(), &gateway.keys().secret).queue(queue_path());
    // The gateway sees only the requests of the test.
    builder.fresh_for(Duration::ZERO).timeout(5 * SECOND).soft_timeout(5 * SECOND).warmup_limit(0)
}

/// Returns the same builder without a queue, so that an outage fails a write.
fn rejecting(gateway: &Gateway) -> Builder {
    builder(gateway).on_outage(OnOutage::Reject)
}

/// Returns a new path for an outage file.
fn queue_path() -> PathBuf {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    directory.keep().join("queue.db")
}

async fn daemon(gateway: &Gateway) -> Cache {
    builder(gateway).open().await.unwrap()
}

/// Returns the shared stack, a new gateway in front of it, and a daemon that uses the gateway.
async fn shared(server: Server) -> (&'static Stack, Gateway, Cache) {
    let stack = tokio::task::block_in_place(|| Stack::shared(server));
    let gateway = stack.gateway().await;
    let cache = daemon(&gateway).await;
    (stack, gateway, cache)
}

/// Returns a thread id that no other test uses.
fn key(name: &str) -> String {
    format!("{name} {:016x}", fastrand::u64(..))
}

async fn get(cache: &Cache, key: &str) -> Option<Conversation> {
    cache.get(key).await.unwrap()
}

/// Reads columns of a row with SQL.
fn row(stack: &Stack, key: &str, columns: &str) -> String {
    stack
        .psql(&format!("select {columns} from conversation_threads where thread_id = '{key}'"))
        .trim()
        .to_owned()
}

/// Waits until the queue is empty. Checks that no write became a dead letter.
async fn drained(condition: &str, cache: &Cache) {
    eventually(condition, async || cache.health().queue.unwrap().records == 0).await;
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0, "{condition}");
}

async fn eventually(condition: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = std::time::Instant::now();
    while began.elapsed() < AMPLE {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("condition never became true: {condition}");
}
