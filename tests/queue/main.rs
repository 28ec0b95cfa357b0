//! The queue, the replica and the replay over a store with planned faults.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod alone;
mod appends;
mod clock_sync;
mod clocks;
mod imports;
mod limits;
mod listings;
mod outage;
mod pace;
mod races;
mod restores;
mod shutdown;
mod traces;

use std::sync::Arc;
use std::time::Duration;

use threadkeep::store::{LoadRequest, Loaded, Memory, ResilientStore, Store};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{Builder, Cache, Freshness, Key};

const DEADLINE: Duration = Duration::from_millis(200);

/// A store that outlives the daemons, and the directory with the outage file of one daemon.
struct World {
    store: Arc<Memory>,
    faults: Faults,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let store = Arc::new(Memory::new());
        let faults = FaultStore::new(Arc::clone(&store)).faults();
        Self { store, faults, dir: tempfile::tempdir().unwrap() }
    }

    fn builder(&mut self) -> Builder {
        let faulty = FaultStore::new(Arc::clone(&self.store));
        self.faults = faulty.faults();
        let builder =
            Cache::builder().store(ResilientStore::new(faulty, DEADLINE)).queue(self.dir.path().join("q.db"));
        builder.fresh_for(Duration::ZERO).soft_timeout(DEADLINE / 2)
    }

    async fn open(&mut self) -> Cache {
        self.builder().open().await.unwrap()
    }

    /// Opens a cache during an outage.
    async fn open_in_outage(&mut self) -> Cache {
        let builder = self.builder();
        self.faults.always(Fault::Refuse);
        let cache = builder.open().await.unwrap();
        wait_until_open(&cache).await;
        cache
    }

    async fn start_outage(&self, cache: &Cache) {
        self.faults.always(Fault::Refuse);
        wait_until_open(cache).await;
    }

    /// Reads a value directly from the store.
    async fn stored(&self, key: &str) -> Option<String> {
        let requests = [LoadRequest::from(Key::new(key).unwrap())];
        match self.store.load(&requests).await.unwrap().pop().unwrap() {
            Loaded::Found(record) => record.value.as_ref().map(|value| value.as_str().to_owned()),
            _ => None,
        }
    }
}

/// Sends gets until the breaker opens.
async fn wait_until_open(cache: &Cache) {
    for _ in 0..20 {
        if !cache.health().is_available() {
            return;
        }
        let _ = cache.get("unknown").await;
    }
    panic!("the breaker does not open");
}

fn queued(cache: &Cache) -> u64 {
    cache.health().queue.unwrap().records
}

async fn wait_until_drained(cache: &Cache) {
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_secs(60) {
        if queued(cache) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("timed out: the queue is not drained: {:?}", cache.health());
}

fn dead_letters(cache: &Cache) -> u64 {
    cache.health().queue.unwrap().dead_letters
}

/// Returns the change of an update that appends a number.
fn append(turn: i32) -> impl Fn(Option<Vec<i32>>) -> threadkeep::Result<Option<Vec<i32>>> {
    move |turns| Ok(Some([turns.unwrap_or_default(), vec![turn]].concat()))
}

async fn sleep(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

async fn found(cache: &Cache, key: &str) -> Option<(String, Freshness)> {
    cache.get(key).await.unwrap().map(|found| (found.json().to_owned(), found.freshness()))
}
