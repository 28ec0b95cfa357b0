//! Clocks that are wrong, over a store in this process whose clock is right.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{
    Applied, Cache, Clock, Durability, ErrorKind, Key, Loaded, Memory, Page, Recent, Result, Store, Version,
    Want, Write,
};

const SECOND: Duration = Duration::from_secs(1);

/// A store with a clock of its own that answers correct, as Supabase's is.
#[derive(Debug)]
struct Remote {
    store: Faulty<Memory>,
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
    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        self.call(self.store.load(wants)).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.call(self.store.apply(writes)).await
    }
    async fn recent(&self, page: &Page) -> Result<Recent> {
        self.call(self.store.recent(page)).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.call(self.store.touch(keys)).await
    }
    async fn purge(&self, most: usize) -> Result<usize> {
        self.call(self.store.purge(most)).await
    }
    async fn probe(&self) -> Result<()> {
        self.call(self.store.probe()).await
    }
}

/// A cache whose clock is off, and the first contact fails, so that it does not know.
async fn off_by(millis: i64) -> (Cache, Faults, Arc<Clock>) {
    let store = Faulty::new(Memory::new());
    let (faults, clock) = (store.faults(), Arc::new(Clock::skewed(millis)));
    faults.script([Fault::Refuse]);
    let cache = Cache::builder().store(Remote { store, clock: Arc::clone(&clock) }).open().await.unwrap();
    (cache, faults, clock)
}

#[tokio::test]
async fn the_first_write_by_a_wrong_clock_expires_at_the_right_time() {
    for off in [-300_000, 300_000] {
        let (cache, _, clock) = off_by(off).await;
        assert_eq!(cache.put("t", &1).ttl(60 * SECOND).await.unwrap(), Durability::Stored);
        let left = cache.get("t").await.unwrap().unwrap().expires_at() - chrono::DateTime::from(clock.now());
        assert!((59_000..=60_050).contains(&left.num_milliseconds()), "{off}: {left}");
        let append = |turns: Option<Vec<u8>>| Ok(Some([turns.unwrap_or_default(), vec![1]].concat()));
        let (cache, _, _) = off_by(off).await;
        for _ in 0..3 {
            assert_eq!(cache.update("u", append).await.unwrap(), Durability::Stored);
        }
        assert_eq!(cache.get("u").await.unwrap().unwrap().json(), "[1,1,1]", "{off}");
    }
}

#[tokio::test]
async fn a_lost_answer_to_what_a_fast_clock_stamped_does_not_stop_other_writes() {
    let (cache, faults, _) = off_by(300_000).await;
    faults.script([Fault::DelayAnswer(SECOND / 5), Fault::Pass]);
    let lost = tokio::spawn(cache.put("lost", &1).into_future());
    while faults.calls("apply") == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(cache.put("other", &1).await.unwrap(), Durability::Stored);
    assert_eq!(lost.await.unwrap().unwrap(), Durability::Stored);
    faults.script([Fault::LoseAnswer]);
    assert_eq!(cache.put("lost", &2).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(cache.put("other", &2).await.unwrap(), Durability::Stored);
}

#[tokio::test]
async fn one_version_from_the_future_does_not_stop_other_writes() {
    let (cache, _, clock) = off_by(0).await;
    clock.observe(Version::lowest(clock.now().plus(60 * SECOND)));
    assert_eq!(cache.put("other", &1).await.unwrap(), Durability::Stored);
}

#[tokio::test]
async fn a_clock_a_few_seconds_off_can_write() {
    for off in [-4_200, -3_000, -2_100, 1_000, 2_100, 3_000, 3_900, 4_200] {
        let (cache, _, _) = off_by(off).await;
        assert_eq!(cache.put("t", &1).await.unwrap(), Durability::Stored, "{off}");
        assert_eq!(cache.put("t", &2).await.unwrap(), Durability::Stored, "{off}");
    }
}

/// The put's answer shows that its stamp was wrong; meanwhile an update has gone on from it.
#[tokio::test]
async fn a_put_that_is_stamped_anew_undoes_nobodys_update() {
    let (cache, faults, _) = off_by(-300_000).await;
    faults.script([Fault::DelayAnswer(SECOND / 3)]);
    let put = tokio::spawn(cache.put("t", &["a"]).into_future());
    while faults.calls("apply") == 0 {
        tokio::task::yield_now().await;
    }
    let append =
        |turns: Option<Vec<String>>| Ok(Some([turns.unwrap_or_default(), vec!["b".to_owned()]].concat()));
    assert_eq!(cache.update("t", append).await.unwrap(), Durability::Stored);
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), r#"["a","b"]"#);
    assert_eq!(put.await.unwrap().unwrap(), Durability::Stored);
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), r#"["a","b"]"#);
}

#[tokio::test]
async fn an_error_while_a_write_is_stamped_anew_says_that_it_may_be_stored() {
    let (cache, faults, _) = off_by(-300_000).await;
    faults.script([Fault::Pass, Fault::Refuse]);
    assert!(cache.put("t", "new").await.unwrap_err().outcome_unknown());
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), "\"new\"");
}
