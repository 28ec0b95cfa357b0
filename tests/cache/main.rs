//! The `Cache` handle over stores in this process with planned faults.
#![allow(clippy::unwrap_used)]

mod appends;
mod calls;
mod lifecycle;
mod outage;
mod silent;

use std::time::Duration;

use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{BreakerState, Builder, Cache};

const SECOND: Duration = Duration::from_secs(1);

/// Opens a cache over a store in memory without `ResilientStore`.
async fn bare(setup: impl FnOnce(Builder) -> Builder) -> (Cache, Faults) {
    let store = FaultStore::new(Memory::new());
    let faults = store.faults();
    (setup(Cache::builder().store(store)).open().await.unwrap(), faults)
}

/// Opens a cache over a `ResilientStore` in memory with this deadline for each call.
async fn resilient(deadline: Duration) -> (Cache, Faults) {
    let store = FaultStore::new(Memory::new());
    let faults = store.faults();
    let cache = Cache::builder().store(ResilientStore::new(store, deadline)).fresh_for(Duration::ZERO);
    (cache.open().await.unwrap(), faults)
}

async fn wait_until(event: &str, condition: impl Fn() -> bool) {
    for _ in 0..6_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("timed out: {event}");
}

/// Makes calls fail until the breaker opens.
async fn open_breaker(cache: &Cache, faults: &Faults) {
    faults.always(Fault::Refuse);
    while cache.health().breaker == Some(BreakerState::Closed) {
        cache.get("no such conversation").await.unwrap_err();
    }
}
