//! Draws a real outage: `cargo bench --bench chart --features testing` writes `benches/outage.svg`.
//!
//! The stack is real: PostgreSQL and postrust behind the tests' gateway (run `tests/install` first). The load is steady.
//! All settings but `fresh_for` have their defaults. In this outage every request hangs, which is the worst case: a
//! rejected request would fail at once. Without `--bench` (`cargo test --benches`), the run is shorter and does not write
//! `benches/outage.svg`.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs)]

mod load;
mod panels;
mod series;
#[path = "../../tests/stack/mod.rs"]
mod stack;
mod svg;

use std::time::{Duration, Instant};

use load::Load;
use series::{Outage, Series};
use stack::{Fault, Server, Stack};
use threadkeep::{BreakerState, Cache};

const BEFORE: Duration = Duration::from_secs(8);
const OUTAGE: Duration = Duration::from_secs(20);
const AFTER: Duration = Duration::from_secs(6);
/// Short, so that fresh entries become stale within the picture.
const FRESH_FOR: Duration = Duration::from_secs(5);
const PICTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/outage.svg");
const QUICK_PICTURE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/outage.svg");

#[tokio::main(worker_threads = 2)]
async fn main() {
    let is_quick = std::env::args().all(|arg| arg != "--bench");
    let span = |span: Duration| if is_quick { span * 2 / 5 } else { span };
    let stack = tokio::task::block_in_place(|| Stack::start(Server::Postrust));
    let gateway = stack.gateway().await;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let builder = || Cache::builder().supabase(&gateway.url(), &gateway.keys().secret).fresh_for(FRESH_FOR);
    let others = builder().without_queue().open().await.unwrap();
    let cache = builder().queue(dir.path().join("queue.db")).open().await.unwrap();
    // Else the warm-up would load conversations that this daemon must not know.
    cache.warm().await.unwrap();
    load::seed(&others, load::STRANGERS).await;
    load::seed(&cache, load::KNOWN).await;

    let load = Load::begin(&cache);
    // Spreads the expiry of the entries over time, so that loads do not come in one burst.
    tokio::time::sleep(FRESH_FOR).await;
    let mut series = Series::begin(&load);
    series.watch(&cache, &load, span(BEFORE)).await;

    let began = series.now();
    gateway.always(Fault::Hang);
    series.watch(&cache, &load, span(OUTAGE)).await;
    gateway.clear();
    let ended = series.now();

    let recovery = Instant::now();
    while !is_recovered(&cache) {
        assert!(
            recovery.elapsed() < Duration::from_secs(60),
            "the cache does not recover: {:?}",
            cache.health()
        );
        series.watch(&cache, &load, series::STEP).await;
    }
    let recovered = series.now();
    series.watch(&cache, &load, span(AFTER)).await;
    load.end().await;

    let outage = Outage { began, ended, recovered };
    let picture = if is_quick { QUICK_PICTURE } else { PICTURE };
    std::fs::write(picture, panels::draw(&series, &outage)).unwrap();
    println!("{}", series.summary(&outage));
    if !is_quick {
        println!("\nwritten: benches/outage.svg");
    }
}

fn is_recovered(cache: &Cache) -> bool {
    let health = cache.health();
    health.breaker == Some(BreakerState::Closed) && health.queue.is_some_and(|queue| queue.records == 0)
}
