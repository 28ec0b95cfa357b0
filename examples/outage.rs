//! An outage lived through, in one process: `cargo run --features testing --example outage`.
//!
//! The source of truth is a store that fails on command, behind the same guard as Supabase: what happens to reads and
//! writes is what happens with a daemon. So a daemon's own reaction can be tested, too.

use std::time::Duration;

use threadkeep::testing::{Fault, Faulty};
use threadkeep::{Cache, Durability, Freshness, Guard, Memory, Result};

#[tokio::main]
async fn main() -> Result<()> {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let queue = std::env::temp_dir().join(format!("threadkeep-outage-{}.db", std::process::id()));
    let guarded = Guard::new(store, Duration::from_secs(1));
    let cache = Cache::builder().store(guarded).queue(&queue).fresh_for(Duration::ZERO).open().await?;

    println!("in health");
    tell("put", cache.put("thread-1", &["hello"]).await);
    read(&cache, "thread-1").await;

    println!("\nthe source of truth is away");
    faults.always(Fault::Refuse);
    read(&cache, "thread-1").await;
    read(&cache, "nobody knows").await;
    tell("put", cache.put("thread-2", &["said in the outage"]).await);
    read(&cache, "thread-2").await;
    let health = cache.health();
    println!(
        "  breaker {:?}, {} writes queued",
        health.breaker,
        cache.health().queue.map_or(0, |queue| queue.records)
    );

    println!("\nit is back: the queue empties by itself");
    faults.heal();
    while cache.health().queue.is_some_and(|queue| queue.records > 0) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    read(&cache, "thread-2").await;
    read(&cache, "nobody knows").await;
    let left = cache.shutdown(Duration::from_secs(5)).await?;
    println!("\nstopped, {} writes left in the queue", left.still_queued);
    for end in ["", "-wal", "-shm", ".lock"] {
        std::fs::remove_file(format!("{}{end}", queue.display())).ok();
    }
    Ok(())
}

fn tell(what: &str, result: Result<Durability>) {
    match result {
        Ok(durability) => println!("  {what}: {durability:?}"),
        Err(error) => println!("  {what}: {error}"),
    }
}

async fn read(cache: &Cache, thread: &str) {
    match cache.get(thread).await {
        Ok(Some(found)) => match found.freshness() {
            Freshness::Stale { age } => println!("  get {thread}: {}, {age:.1?} old", found.json()),
            freshness => println!("  get {thread}: {}, {freshness:?}", found.json()),
        },
        Ok(None) => println!("  get {thread}: there is none"),
        Err(error) => println!("  get {thread}: {:?}: {error}", error.kind()),
    }
}
