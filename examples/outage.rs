//! An outage in one process: `cargo run --features testing --example outage`.
//!
//! The store fails on command, behind the same wrapper as Supabase. So reads and writes behave as in a daemon. A test can
//! check a daemon's own reaction in the same way.

use std::time::Duration;

use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore};
use threadkeep::{Cache, Freshness, Result, WriteOutcome};

#[tokio::main]
async fn main() -> Result<()> {
    let store = FaultStore::new(Memory::new());
    let faults = store.faults();
    let queue = std::env::temp_dir().join(format!("threadkeep-outage-{}.db", std::process::id()));
    let resilient = ResilientStore::new(store, Duration::from_secs(1));
    // With `fresh_for` zero, every read asks the store, so that the example shows the outage at once.
    let cache = Cache::builder().store(resilient).queue(&queue).fresh_for(Duration::ZERO).open().await?;

    println!("the store is available");
    print_outcome("put", cache.put("thread-1", &["hello"]).await);
    print_get(&cache, "thread-1").await;

    println!("\nthe store is unavailable");
    faults.always(Fault::Refuse);
    print_get(&cache, "thread-1").await;
    print_get(&cache, "nobody knows").await;
    print_outcome("put", cache.put("thread-2", &["said in the outage"]).await);
    print_get(&cache, "thread-2").await;
    let health = cache.health();
    println!(
        "  breaker {:?}, {} writes queued",
        health.breaker,
        health.queue.map_or(0, |queue| queue.records)
    );

    println!("\nthe store is available again: replay empties the queue");
    faults.clear();
    while cache.health().queue.is_some_and(|queue| queue.records > 0) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    print_get(&cache, "thread-2").await;
    print_get(&cache, "nobody knows").await;
    let report = cache.shutdown(Duration::from_secs(5)).await?;
    println!("\nstopped, {} writes left in the queue", report.still_queued);
    for suffix in ["", "-wal", "-shm", ".lock"] {
        std::fs::remove_file(format!("{}{suffix}", queue.display())).ok();
    }
    Ok(())
}

fn print_outcome(operation: &str, result: Result<WriteOutcome>) {
    match result {
        Ok(outcome) => println!("  {operation}: {outcome:?}"),
        Err(error) => println!("  {operation}: {error}"),
    }
}

async fn print_get(cache: &Cache, id: &str) {
    match cache.get(id).await {
        Ok(Some(found)) => match found.freshness() {
            Freshness::Stale { age } => println!("  get {id}: {}, {age:.1?} old", found.json()),
            freshness => println!("  get {id}: {}, {freshness:?}", found.json()),
        },
        Ok(None) => println!("  get {id}: there is none"),
        Err(error) => println!("  get {id}: {:?}: {error}", error.kind()),
    }
}
