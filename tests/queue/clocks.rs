//! The queue and the replay under wrong clocks (I8, I17).

use std::sync::Arc;
use std::time::Duration;

use threadkeep::store::{Condition, LoadRequest, Loaded, Memory, ResilientStore, Store};
use threadkeep::testing::{Fault, FaultStore};
use threadkeep::{Cache, ErrorKind, Freshness, Key, WriteOutcome};

use crate::{DEADLINE, World, append, dead_letters, found, sleep, wait_until_drained, wait_until_open};

/// A store in memory for a daemon with a skewed clock. Each response corrects the clock.
#[derive(Debug)]
struct Skewed(Arc<Memory>, Arc<threadkeep::store::Clock>);

#[async_trait::async_trait]
impl Store for Skewed {
    fn clock(&self) -> &Arc<threadkeep::store::Clock> {
        &self.1
    }
    async fn load(&self, requests: &[LoadRequest]) -> threadkeep::Result<Vec<Loaded>> {
        let loaded = self.0.load(requests).await;
        self.sync_clock();
        loaded
    }
    async fn apply(
        &self,
        writes: &[threadkeep::store::Write],
    ) -> threadkeep::Result<Vec<threadkeep::store::Applied>> {
        let applied = self.0.apply(writes).await;
        self.sync_clock();
        applied
    }
    async fn list(
        &self,
        request: &threadkeep::store::ListRequest,
    ) -> threadkeep::Result<threadkeep::store::ListPage> {
        let page = self.0.list(request).await;
        self.sync_clock();
        page
    }
    async fn touch(&self, _: &[Key]) -> threadkeep::Result<()> {
        Ok(())
    }
    async fn purge(&self, _: usize) -> threadkeep::Result<usize> {
        Ok(0)
    }
    async fn probe(&self) -> threadkeep::Result<()> {
        self.sync_clock();
        Ok(())
    }
}

impl Skewed {
    fn sync_clock(&self) {
        let now = std::time::Instant::now();
        self.1.correct(now, now, self.0.clock().now());
    }
}

impl World {
    /// Opens a cache with a clock that is off by `by` milliseconds, on a machine that was rebooted. With
    /// `in_outage`, the store is unavailable.
    pub async fn open_skewed(&mut self, by: i64, in_outage: bool) -> Cache {
        let skewed = Skewed(Arc::clone(&self.store), Arc::new(threadkeep::store::Clock::skewed(by)));
        self.open_after_reboot(skewed, in_outage).await
    }

    async fn open_after_reboot(&mut self, skewed: Skewed, in_outage: bool) -> Cache {
        let file = self.dir.path().join("q.db");
        if file.exists() {
            let file = rusqlite::Connection::open(file).unwrap();
            file.execute("delete from meta where name = 'clock_checkpoint'", []).unwrap();
        }
        self.open_on(skewed, in_outage).await
    }

    /// Opens a cache like `open_skewed`, but without a reboot.
    async fn reopen_skewed(&mut self, by: i64, in_outage: bool) -> Cache {
        let skewed = Skewed(Arc::clone(&self.store), Arc::new(threadkeep::store::Clock::skewed(by)));
        self.open_on(skewed, in_outage).await
    }

    async fn open_on(&mut self, skewed: Skewed, in_outage: bool) -> Cache {
        let faulty = FaultStore::new(skewed);
        self.faults = faulty.faults();
        if in_outage {
            self.faults.always(Fault::Refuse);
        }
        let builder = Cache::builder()
            .store(ResilientStore::new(faulty, DEADLINE))
            .queue(self.dir.path().join("q.db"))
            .fresh_for(Duration::ZERO)
            .soft_timeout(DEADLINE / 2);
        let cache = builder.open().await.unwrap();
        if in_outage {
            wait_until_open(&cache).await;
        }
        cache
    }
}

/// Queues a put during an outage, restarts with a clock that is behind, and queues an update of the put.
async fn updated_behind() -> (World, Cache) {
    let mut world = World::new();
    let cache = world.open_skewed(0, false).await;
    world.start_outage(&cache).await;
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Queued);
    drop(cache);
    let cache = world.open_skewed(-60_000, true).await;
    assert_eq!(cache.update("k", append(1)).await.unwrap(), WriteOutcome::Queued);
    (world, cache)
}

/// A daemon restarts in an outage with a clock that is behind. A get must show an acknowledged update of a queued put.
#[tokio::test]
async fn clock_behind_after_restart_shows_the_queued_update() {
    let (world, cache) = updated_behind().await;
    let got = tokio::time::timeout(Duration::from_secs(3), cache.get("k")).await;
    let got = got.map(|f| f.map(|f| f.map(|f| f.json().to_owned())));
    println!("in the outage: {got:?}");
    world.faults.clear();
    sleep(3_000).await;
    println!("stored {:?}, health {:?}", world.stored("k").await, cache.health().queue);
    let after = tokio::time::timeout(Duration::from_secs(3), cache.get("k")).await;
    let after = after.map(|f| f.map(|f| f.map(|f| (f.json().to_owned(), f.freshness()))));
    println!("after it: {after:?}");
    assert_eq!(got.unwrap().unwrap().as_deref(), Some("[0,1]"));
}

/// A daemon restarts in an outage with a clock that is behind. Replay must store its put over the older stored value.
#[tokio::test]
async fn clock_behind_after_restart_loses_no_put() {
    let mut world = World::new();
    let cache = world.open_skewed(0, false).await;
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Stored);
    world.start_outage(&cache).await;
    drop(cache);
    let cache = world.open_skewed(-60_000, true).await;
    let put = cache.put("k", &vec![1]).await;
    world.faults.clear();
    sleep(1_500).await;
    assert_eq!((world.stored("k").await.as_deref(), put.unwrap()), (Some("[1]"), WriteOutcome::Queued));
}

/// Before the first contact with the store, a put and an update are queued. Replay must not overwrite the newer write of
/// another daemon.
#[tokio::test]
async fn update_queued_before_first_contact_keeps_the_newer_write() {
    let (mut one, mut two) = (World::new(), World::new());
    two.store = Arc::clone(&one.store);
    let second = two.open().await;
    let first = one.open_skewed(0, true).await;
    assert_eq!(first.put("k", &vec![0]).await.unwrap(), WriteOutcome::Queued);
    sleep(5).await;
    assert_eq!(second.put("k", &vec![100]).await.unwrap(), WriteOutcome::Stored);
    sleep(5).await;
    assert_eq!(first.update("k", append(1)).await.unwrap(), WriteOutcome::Queued);
    one.faults.clear();
    wait_until_drained(&first).await;
    assert_eq!(
        (one.stored("k").await.as_deref(), dead_letters(&first)),
        (Some("[100]"), 2),
        "the put and its update"
    );
}

/// A daemon restarts in an outage with a clock that is behind, and memory evicts the conversation. A get must end (I12).
#[tokio::test]
async fn clock_behind_after_restart_blocks_no_get() {
    let (world, cache) = updated_behind().await;
    cache.evict("k").unwrap();
    let during = tokio::time::timeout(Duration::from_secs(3), cache.get("k")).await.is_err();
    world.faults.clear();
    sleep(3_000).await;
    assert_eq!(world.stored("k").await.as_deref(), Some("[0,1]"));
    let after = tokio::time::timeout(Duration::from_secs(3), cache.get("k")).await.is_err();
    let left = cache.shutdown(Duration::from_secs(1)).await.unwrap().still_queued;
    assert_eq!(
        (during, after, left),
        (false, false, 0),
        "the get hangs in the outage, the get hangs after it, queued writes"
    );
}

/// A store that answers `VersionInFuture` once.
#[derive(Debug)]
struct VersionInFutureOnce(Arc<Memory>, std::sync::atomic::AtomicBool);

#[async_trait::async_trait]
impl Store for VersionInFutureOnce {
    fn clock(&self) -> &Arc<threadkeep::store::Clock> {
        self.0.clock()
    }
    async fn load(&self, requests: &[LoadRequest]) -> threadkeep::Result<Vec<Loaded>> {
        self.0.load(requests).await
    }
    async fn apply(
        &self,
        writes: &[threadkeep::store::Write],
    ) -> threadkeep::Result<Vec<threadkeep::store::Applied>> {
        if writes[0].condition != Condition::Any && !self.1.swap(true, std::sync::atomic::Ordering::SeqCst) {
            return Ok(vec![threadkeep::store::Applied::VersionInFuture]);
        }
        self.0.apply(writes).await
    }
    async fn list(
        &self,
        request: &threadkeep::store::ListRequest,
    ) -> threadkeep::Result<threadkeep::store::ListPage> {
        self.0.list(request).await
    }
    async fn touch(&self, _: &[Key]) -> threadkeep::Result<()> {
        Ok(())
    }
    async fn purge(&self, _: usize) -> threadkeep::Result<usize> {
        Ok(0)
    }
    async fn probe(&self) -> threadkeep::Result<()> {
        Ok(())
    }
}

/// A write must not get a new version after it is queued. With two versions, it would be stored and also become a dead
/// letter.
#[tokio::test]
async fn queued_write_gets_no_new_version() {
    let mut world = World::new();
    let faulty = FaultStore::new(VersionInFutureOnce(Arc::clone(&world.store), false.into()));
    world.faults = faulty.faults();
    let builder =
        Cache::builder().store(ResilientStore::new(faulty, DEADLINE)).queue(world.dir.path().join("q.db"));
    let builder = builder.fresh_for(Duration::ZERO).soft_timeout(Duration::from_millis(20));
    let cache = builder.open().await.unwrap();
    cache.put("k", &vec![0]).await.unwrap();
    world.faults.fail_replays(true);
    assert_eq!(cache.update("k", append(1)).await.unwrap(), WriteOutcome::Queued);
    sleep(200).await;
    println!("{:?}", world.stored("k").await);
    world.faults.fail_replays(false);
    wait_until_drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), dead_letters(&cache)), (Some("[0,1]"), 0));
}

/// The first response of the store may be the response to a replay. The replay must complete its writes.
#[tokio::test]
async fn replay_completes_with_the_first_response_of_the_store() {
    let mut world = World::new();
    let cache = world.open_skewed(-60_000, true).await;
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Queued);
    drop(cache);
    let skewed = Skewed(Arc::clone(&world.store), Arc::new(threadkeep::store::Clock::skewed(-60_000)));
    let faulty = FaultStore::new(skewed);
    world.faults = faulty.faults();
    world.faults.script([Fault::Refuse, Fault::Refuse]); // the probe of `open`
    let builder =
        Cache::builder().store(ResilientStore::new(faulty, DEADLINE)).queue(world.dir.path().join("q.db"));
    let cache = builder.open().await.unwrap();
    wait_until_drained(&cache).await;
}

/// A process with a resumed clock assigns a correct version. The next process syncs its clock before it opens the file. It
/// must not correct that version again (I8).
#[tokio::test]
async fn version_of_a_resumed_clock_is_not_corrected_twice() {
    const BEHIND: i64 = -60_000;
    let mut world = World::new();
    let cache = world.open_skewed(BEHIND, false).await;
    assert_eq!(cache.put("k", &0).await.unwrap(), WriteOutcome::Stored);
    drop(cache);
    let cache = world.reopen_skewed(BEHIND, true).await;
    assert_eq!(cache.put("k", &1).await.unwrap(), WriteOutcome::Queued);
    drop(cache);
    sleep(1_200).await; // an opening starts up to a second ahead of the last one (C8)
    let mut other = World::new();
    other.store = Arc::clone(&world.store);
    assert_eq!(other.open().await.put("k", &2).await.unwrap(), WriteOutcome::Stored);

    let skewed = Skewed(Arc::clone(&world.store), Arc::new(threadkeep::store::Clock::skewed(BEHIND)));
    skewed.sync_clock();
    let cache = world.open_after_reboot(skewed, false).await;
    wait_until_drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), dead_letters(&cache)), (Some("2"), 1));
}

/// A daemon restarts with a clock that is behind by less than the tolerance of the correction. Its new writes must win over
/// its earlier writes.
#[tokio::test]
async fn clock_slightly_behind_resumes_after_the_versions_in_file() {
    let mut world = World::new();
    let cache = world.open_skewed(0, false).await;
    assert_eq!(cache.put("put", &vec![0]).await.unwrap(), WriteOutcome::Stored);
    assert_eq!(cache.put("updated", &vec![0]).await.unwrap(), WriteOutcome::Stored);
    world.start_outage(&cache).await;
    drop(cache);
    let cache = world.open_skewed(-1_500, true).await;
    assert_eq!(cache.put("put", &vec![1]).await.unwrap(), WriteOutcome::Queued);
    assert_eq!(cache.update("updated", append(1)).await.unwrap(), WriteOutcome::Queued);
    world.faults.clear();
    wait_until_drained(&cache).await;
    for (key, json) in [("put", "[1]"), ("updated", "[0,1]")] {
        assert_eq!(world.stored(key).await.as_deref(), Some(json), "{key}");
    }
    assert_eq!(dead_letters(&cache), 0);
}

/// A daemon with a wrong clock restarts in an outage. Conversations must expire at the right time (I17).
#[tokio::test]
async fn restart_in_outage_resumes_the_corrected_clock() {
    let (short, long) = (Duration::from_millis(500), Duration::from_secs(60));
    for offset in [120_000, -120_000] {
        let mut world = World::new();
        let cache = world.open_skewed(offset, false).await;
        assert_eq!(cache.put("long", &0).ttl(long).await.unwrap(), WriteOutcome::Stored);
        assert_eq!(cache.put("short", &0).ttl(short).await.unwrap(), WriteOutcome::Stored);
        world.start_outage(&cache).await;
        assert_eq!(cache.put("queued", &0).ttl(long).await.unwrap(), WriteOutcome::Queued);
        drop(cache);
        let cache = world.reopen_skewed(offset, true).await;
        let (_, freshness) = found(&cache, "long").await.unwrap();
        assert!(
            matches!(freshness, Freshness::Stale { age } if age < Duration::from_secs(9)),
            "{freshness:?}"
        );
        assert_eq!(found(&cache, "queued").await, Some(("0".into(), Freshness::Queued)));
        assert_eq!(cache.put("queued again", &0).ttl(long).await.unwrap(), WriteOutcome::Queued);
        sleep(600).await; // it expires
        assert_eq!(cache.get("short").await.unwrap_err().kind(), ErrorKind::Unavailable);
        world.faults.clear();
        wait_until_drained(&cache).await;
        for key in ["long", "queued", "queued again"] {
            assert_eq!(world.stored(key).await.as_deref(), Some("0"), "{key}, offset by {offset}");
        }
        assert_eq!(dead_letters(&cache), 0);
    }
}

/// A clock that is slightly behind assigns an expiry. After the clock sync, the write must keep its full time to live.
#[tokio::test]
async fn write_of_a_clock_slightly_behind_keeps_its_ttl() {
    let mut world = World::new();
    let cache = world.open_skewed(-1_500, true).await;
    world.faults.fail_replays(true);
    assert_eq!(cache.put("k", &0).ttl(Duration::from_millis(1_200)).await.unwrap(), WriteOutcome::Queued);
    world.faults.clear();
    while cache.health().breaker != Some(threadkeep::BreakerState::Closed) {
        sleep(5).await;
    }
    assert_eq!(found(&cache, "k").await, Some(("0".into(), Freshness::Queued)));
    sleep(1_300).await; // it expires
    assert_eq!(found(&cache, "k").await, None);
}

/// Clock sync gives the queued put its final version during an update of the put. The update must not keep the old base.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn update_of_a_put_that_clock_sync_corrects_is_no_dead_letter() {
    let (mut world, mut other) = (World::new(), World::new());
    other.store = Arc::clone(&world.store);
    assert_eq!(other.open().await.put("k", "theirs").await.unwrap(), WriteOutcome::Stored);
    let clock = Arc::new(threadkeep::store::Clock::skewed(-60_000));
    let skewed = Skewed(Arc::clone(&world.store), Arc::clone(&clock));
    let cache = world.open_after_reboot(skewed, true).await;
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), WriteOutcome::Queued);
    let mut runs = 0;
    let slow = |t: Option<Vec<i32>>| {
        runs += 1;
        if runs == 1 {
            Skewed(Arc::clone(&world.store), Arc::clone(&clock)).sync_clock();
            tokio::task::block_in_place(|| std::thread::sleep(Duration::from_millis(500)));
        }
        append(1)(t)
    };
    assert_eq!(cache.update("k", slow).await.unwrap(), WriteOutcome::Queued);
    world.faults.clear();
    wait_until_drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), dead_letters(&cache)), (Some("[0,1]"), 0));
}
