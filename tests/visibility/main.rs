//! The change feed on real stacks: a write of one daemon, or by SQL, is visible in another daemon within two poll intervals.
//!
//! `VISIBILITY_WRITES=100000 cargo test --release --all-features --test visibility -- --nocapture` runs longer.
//! `FEED_SECONDS=120 … feed_spares` measures the requests of eight daemons (benches/RESULTS.md).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

#[macro_use]
#[path = "../stack/mod.rs"]
mod stack;

mod requests;
mod restored;
mod writes;

use std::time::{Duration, Instant};

use stack::{Gateway, Server, Stack};
use threadkeep::{Builder, Cache};

const SECOND: Duration = Duration::from_secs(1);
/// The bound for an event that must come, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Reads a number from the environment.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

async fn start(server: Server) -> Stack {
    tokio::task::spawn_blocking(move || Stack::start(server)).await.unwrap()
}

/// Returns a builder whose calls wait for a busy machine, so that no write is queued and no stale value answers.
fn builder(gateway: &Gateway) -> Builder {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let builder = Cache::builder().supabase(&gateway.url(), &gateway.keys().secret);
    builder.queue(directory.keep().join("queue.db")).warmup_limit(0).timeout(LIMIT).soft_timeout(LIMIT)
}

async fn eventually(condition: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while began.elapsed() < 2 * LIMIT {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("condition never became true: {condition}");
}
