//! Caches with a wrong clock, over a store in this process with the correct clock (I8, I17).
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use threadkeep::store::{Applied, Clock, ListPage, ListRequest, LoadRequest, Loaded, Memory, Store, Write};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{Cache, ErrorKind, Key, Result, Version, WriteOutcome};

const SECOND: Duration = Duration::from_secs(1);

/// A store whose responses correct a clock of its own, like the clock of `Supabase`.
#[derive(Debug)]
struct Remote {
    store: FaultStore<Memory>,
    clock: Arc<Clock>,
}

impl Remote {
    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let sent = Instant::now();
        let result = call.await?;
        self.clock.correct(sent, Instant::now(), self.store.clock().now());
        Ok(result)
    }
}

#[async_trait]
impl Store for Remote {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }
    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.call(self.store.load(requests)).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.call(self.store.apply(writes)).await
    }
    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        self.call(self.store.list(page)).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.call(self.store.touch(keys)).await
    }
    async fn purge(&self, limit: usize) -> Result<usize> {
        self.call(self.store.purge(limit)).await
    }
    async fn probe(&self) -> Result<()> {
        self.call(self.store.probe()).await
    }
}

/// Opens a cache with a clock that is off by `millis`. The first call of the store fails, so the cache cannot correct the clock.
async fn off_by(millis: i64) -> (Cache, Faults, Arc<Clock>) {
    let store = FaultStore::new(Memory::new());
    let (faults, clock) = (store.faults(), Arc::new(Clock::skewed(millis)));
    faults.script([Fault::Refuse]);
    let cache = Cache::builder().store(Remote { store, clock: Arc::clone(&clock) }).open().await.unwrap();
    (cache, faults, clock)
}

#[tokio::test]
async fn clock_skewed_first_write_expires_at_the_right_time() {
    for off in [-300_000, 300_000] {
        let (cache, _, clock) = off_by(off).await;
        assert_eq!(cache.put("t", &1).ttl(60 * SECOND).await.unwrap(), WriteOutcome::Stored);
        let left = cache.get("t").await.unwrap().unwrap().expires_at() - chrono::DateTime::from(clock.now());
        assert!((59_000..=60_050).contains(&left.num_milliseconds()), "{off}: {left}");
        let append = |turns: Option<Vec<u8>>| Ok(Some([turns.unwrap_or_default(), vec![1]].concat()));
        let (cache, _, _) = off_by(off).await;
        for _ in 0..3 {
            assert_eq!(cache.update("u", append).await.unwrap(), WriteOutcome::Stored);
        }
        assert_eq!(cache.get("u").await.unwrap().unwrap().json(), "[1,1,1]", "{off}");
    }
}

#[tokio::test]
async fn clock_ahead_lost_response_does_not_block_other_writes() {
    let (cache, faults, _) = off_by(300_000).await;
    faults.script([Fault::DelayResponse(SECOND / 5), Fault::Pass]);
    let lost = tokio::spawn(cache.put("lost", &1).into_future());
    while faults.calls("apply") == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(cache.put("other", &1).await.unwrap(), WriteOutcome::Stored);
    assert_eq!(lost.await.unwrap().unwrap(), WriteOutcome::Stored);
    faults.script([Fault::DropResponse]);
    assert_eq!(cache.put("lost", &2).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(cache.put("other", &2).await.unwrap(), WriteOutcome::Stored);
}

#[tokio::test]
async fn clock_version_from_the_future_does_not_block_other_writes() {
    let (cache, _, clock) = off_by(0).await;
    clock.observe(Version::min_at(clock.now().plus(60 * SECOND)));
    assert_eq!(cache.put("other", &1).await.unwrap(), WriteOutcome::Stored);
}

#[tokio::test]
async fn clock_a_few_seconds_off_can_write() {
    for off in [-4_200, -3_000, -2_100, 1_000, 2_100, 3_000, 3_900, 4_200] {
        let (cache, _, _) = off_by(off).await;
        assert_eq!(cache.put("t", &1).await.unwrap(), WriteOutcome::Stored, "{off}");
        assert_eq!(cache.put("t", &2).await.unwrap(), WriteOutcome::Stored, "{off}");
    }
}

/// The response of the put shows that its version was wrong. Before that response, an update builds on the put.
#[tokio::test]
async fn put_with_corrected_version_keeps_a_later_update() {
    let (cache, faults, _) = off_by(-300_000).await;
    faults.script([Fault::DelayResponse(SECOND / 3)]);
    let put = tokio::spawn(cache.put("t", &["a"]).into_future());
    while faults.calls("apply") == 0 {
        tokio::task::yield_now().await;
    }
    let append =
        |turns: Option<Vec<String>>| Ok(Some([turns.unwrap_or_default(), vec!["b".to_owned()]].concat()));
    assert_eq!(cache.update("t", append).await.unwrap(), WriteOutcome::Stored);
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), r#"["a","b"]"#);
    assert_eq!(put.await.unwrap().unwrap(), WriteOutcome::Stored);
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), r#"["a","b"]"#);
}

/// The first write asks for the store's clock, and is sent once.
#[tokio::test]
async fn put_refused_after_the_clock_sync_was_never_sent() {
    let (cache, faults, _) = off_by(-300_000).await;
    faults.script([Fault::Pass, Fault::Refuse]);
    assert!(!cache.put("t", "new").await.unwrap_err().outcome_unknown());
    assert!(cache.get("t").await.unwrap().is_none());
    assert_eq!(faults.calls("apply"), 1);
}
