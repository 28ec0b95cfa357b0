//! Draws an outage lived through: `cargo bench --bench chart --features testing` writes `benches/outage.svg`.
//!
//! The stack is real (PostgreSQL and postrust behind the tests' gateway; run `tests/install` first), the load is steady, and
//! the settings are the defaults but for `fresh_for`. The outage is of the worst kind: nothing is refused, all hangs. Without
//! `--bench`, as `cargo test --benches` calls it, all is shorter, and the picture stays as it is.
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
use threadkeep::{Cache, State};

const BEFORE: Duration = Duration::from_secs(8);
const AWAY: Duration = Duration::from_secs(20);
const AFTER: Duration = Duration::from_secs(6);
/// Short, so that one sees what is fresh become stale.
const FRESH_FOR: Duration = Duration::from_secs(5);
const PICTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/outage.svg");
const QUICK_PICTURE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/outage.svg");

#[tokio::main(worker_threads = 2)]
async fn main() {
    let is_quick = std::env::args().all(|arg| arg != "--bench");
    // An outage has to be longer than the deadline of a call: only then does the breaker open.
    let span = |span: Duration| if is_quick { span * 2 / 5 } else { span };
    let stack = tokio::task::block_in_place(|| Stack::start(Server::Postrust));
    let gateway = stack.gateway().await;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let builder = || Cache::builder().supabase(&gateway.url(), &gateway.keys().secret).fresh_for(FRESH_FOR);
    let others = builder().without_queue().open().await.unwrap();
    load::seed(&others, load::STRANGERS).await;
    let cache = builder().queue(dir.path().join("queue.db")).open().await.unwrap();
    load::seed(&cache, load::KNOWN).await;

    let load = Load::begin(&cache);
    tokio::time::sleep(FRESH_FOR).await; // so that what is re-read is spread over time
    let mut series = Series::begin(&load);
    series.watch(&cache, &load, span(BEFORE)).await;

    let began = series.now();
    gateway.always(Fault::Hang);
    series.watch(&cache, &load, span(AWAY)).await;
    gateway.heal();
    let ended = series.now();

    let healed = Instant::now();
    while !is_well(&cache) {
        assert!(healed.elapsed() < Duration::from_secs(60), "it does not recover: {:?}", cache.health());
        series.watch(&cache, &load, series::STEP).await;
    }
    let well = series.now();
    series.watch(&cache, &load, span(AFTER)).await;
    load.end().await;

    let outage = Outage { began, ended, well };
    let picture = if is_quick { QUICK_PICTURE } else { PICTURE };
    std::fs::write(picture, panels::draw(&series, &outage)).unwrap();
    println!("{}", series.summary(&outage));
    if !is_quick {
        println!("\nwritten: benches/outage.svg");
    }
}

fn is_well(cache: &Cache) -> bool {
    let health = cache.health();
    health.breaker == Some(State::Closed) && health.queue.is_some_and(|queue| queue.records == 0)
}
