//! Races and odd clocks: each of these lost, doubled or hid something once.

use std::sync::Arc;
use std::time::Duration;

use threadkeep::testing::{Fault, Faulty};
use threadkeep::{
    Cache, Durability, ErrorKind, Freshness, Guard, Key, Loaded, Memory, QueueFile, Store, Want,
};

use super::{DEADLINE, World, cut_off, drained, found, sleep};

fn append(turn: i32) -> impl Fn(Option<Vec<i32>>) -> threadkeep::Result<Option<Vec<i32>>> {
    move |turns| Ok(Some([turns.unwrap_or_default(), vec![turn]].concat()))
}

fn letters(cache: &Cache) -> u64 {
    cache.health().queue.unwrap().dead_letters
}

/// A late answer of an early attempt resets base and chain of what goes on from it.
#[tokio::test]
async fn a_late_answer_leaves_alone_what_went_on_from_it() {
    let mut world = World::new();
    let faulty = Faulty::new(Arc::clone(&world.truth));
    world.faults = faulty.faults();
    let cache = Cache::builder()
        .store(Guard::new(faulty, Duration::from_secs(3)))
        .queue(world.dir.path().join("q.db"))
        .fresh_for(Duration::ZERO)
        .patience(Duration::from_millis(100))
        .open()
        .await
        .unwrap();
    let _ = cache.put("k", &vec![0]).await.unwrap();
    world.faults.fail_trials(true);
    let faults = world.faults.clone();
    let slow = |t: Option<Vec<i32>>| {
        faults.script([Fault::DelayAnswer(Duration::from_millis(1500))]);
        append(1)(t)
    };
    assert_eq!(cache.update("k", slow).await.unwrap(), Durability::Queued);
    sleep(50).await; // the replay of it has failed twice
    let lost = |t: Option<Vec<i32>>| {
        // Delay = passes, although trials fail.
        faults.script([Fault::Delay(Duration::from_millis(1)), Fault::LoseAnswer]);
        append(2)(t)
    };
    assert_eq!(cache.update("k", lost).await.unwrap(), Durability::Queued);
    sleep(100).await;
    assert_eq!(world.stored("k").await.as_deref(), Some("[0,1,2]"), "stored, and the answer was lost");
    assert_eq!(cache.update("k", append(3)).await.unwrap(), Durability::Queued);
    sleep(1500).await; // the late answer of the first
    world.faults.fail_trials(false);
    drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), letters(&cache)), (Some("[0,1,2,3]"), 0));
}

/// A write that comes while an older one of its thread is sent alone is never sent.
#[tokio::test]
async fn a_write_that_comes_while_an_older_one_is_sent_alone_is_sent() {
    let mut world = World::new();
    let cache = world.open().await;
    world.faults.poison("k", Fault::Fail(ErrorKind::Busy));
    world.faults.script([Fault::Fail(ErrorKind::Denied)]);
    assert_eq!(cache.put("k", &1).await.unwrap(), Durability::Queued);
    sleep(200).await; // batch and single both failed: parked for 2 s
    world.faults.poison("k", Fault::Delay(Duration::from_millis(150)));
    let before = world.faults.calls("apply");
    while world.faults.calls("apply") == before {
        sleep(5).await;
    }
    world.faults.script([Fault::Fail(ErrorKind::Denied)]);
    assert_eq!(cache.put("k", &2).await.unwrap(), Durability::Queued);
    world.faults.antidote();
    drained(&cache).await; // 15 s
}

/// An update that went on from a queued one which has died meanwhile overwrites what that one lost against.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_over_a_dead_one_undoes_nothing() {
    let (mut one, mut two) = (World::new(), World::new());
    two.truth = Arc::clone(&one.truth);
    let (first, second) = (one.open().await, two.open().await);
    let _ = first.put("k", &vec![0]).await.unwrap();
    one.away(&first).await;
    assert_eq!(second.update("k", append(1)).await.unwrap(), Durability::Stored);
    sleep(5).await;
    assert_eq!(first.update("k", append(2)).await.unwrap(), Durability::Queued);
    let mut runs = 0;
    let (cache, faults) = (first.clone(), one.faults.clone());
    let slow = |t: Option<Vec<i32>>| {
        runs += 1;
        if runs == 1 {
            tokio::task::block_in_place(|| {
                faults.heal();
                while letters(&cache) == 0 || cache.health().queue.unwrap().records > 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                faults.always(Fault::Refuse);
            });
        }
        append(3)(t)
    };
    let result = first.update("k", slow).await;
    one.faults.heal();
    drained(&first).await;
    let stored = one.stored("k").await.unwrap();
    assert!(
        stored.starts_with("[0,1"),
        "{result:?}: what the other daemon was told is stored is gone: {stored}"
    );
}

/// An update is queued over a version which this daemon itself has replaced meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_over_what_this_daemon_has_replaced_is_made_anew() {
    let mut world = World::new();
    let cache = world.open().await;
    let _ = cache.put("k", &vec![0]).await.unwrap();
    let mut runs = 0;
    let (other, faults) = (cache.clone(), world.faults.clone());
    let slow = |t: Option<Vec<i32>>| {
        runs += 1;
        if runs == 1 {
            tokio::task::block_in_place(|| {
                let put = async { other.put("k", &vec![10]).await };
                let stored = tokio::runtime::Handle::current().block_on(put).unwrap();
                assert_eq!(stored, Durability::Stored);
                faults.always(Fault::Refuse);
            });
        }
        append(1)(t)
    };
    let result = cache.update("k", slow).await;
    world.faults.heal();
    drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), letters(&cache)), (Some("[10,1]"), 0), "{result:?}");
}

/// A memory whose daemon's clock is off.
#[derive(Debug)]
struct Skewed(Arc<Memory>, Arc<threadkeep::Clock>);

#[async_trait::async_trait]
impl Store for Skewed {
    fn clock(&self) -> &Arc<threadkeep::Clock> {
        &self.1
    }
    async fn load(&self, wants: &[Want]) -> threadkeep::Result<Vec<Loaded>> {
        let r = self.0.load(wants).await;
        self.learn();
        r
    }
    async fn apply(&self, w: &[threadkeep::Write]) -> threadkeep::Result<Vec<threadkeep::Applied>> {
        let r = self.0.apply(w).await;
        self.learn();
        r
    }
    async fn recent(&self, p: &threadkeep::Page) -> threadkeep::Result<threadkeep::Recent> {
        let r = self.0.recent(p).await;
        self.learn();
        r
    }
    async fn touch(&self, _: &[Key]) -> threadkeep::Result<()> {
        Ok(())
    }
    async fn purge(&self, _: usize) -> threadkeep::Result<usize> {
        Ok(0)
    }
    async fn probe(&self) -> threadkeep::Result<()> {
        self.learn();
        Ok(())
    }
}

impl Skewed {
    fn learn(&self) {
        let now = std::time::Instant::now();
        self.1.correct(now, now, self.0.clock().now());
    }
}

impl World {
    /// Starts with such a clock, cut off from the start or not, on a machine that was booted meanwhile.
    async fn open_skewed(&mut self, by: i64, cut: bool) -> Cache {
        let skewed = Skewed(Arc::clone(&self.truth), Arc::new(threadkeep::Clock::skewed(by)));
        self.open_booted(skewed, cut).await
    }

    async fn open_booted(&mut self, skewed: Skewed, cut: bool) -> Cache {
        let file = self.dir.path().join("q.db");
        if file.exists() {
            let file = rusqlite::Connection::open(file).unwrap();
            file.execute("delete from about where name = 'anchor'", []).unwrap();
        }
        self.open_on(skewed, cut).await
    }

    /// The same without a boot.
    async fn open_again(&mut self, by: i64, cut: bool) -> Cache {
        let skewed = Skewed(Arc::clone(&self.truth), Arc::new(threadkeep::Clock::skewed(by)));
        self.open_on(skewed, cut).await
    }

    async fn open_on(&mut self, skewed: Skewed, cut: bool) -> Cache {
        let faulty = Faulty::new(skewed);
        self.faults = faulty.faults();
        if cut {
            self.faults.always(Fault::Refuse);
        }
        let builder = Cache::builder()
            .store(Guard::new(faulty, DEADLINE))
            .queue(self.dir.path().join("q.db"))
            .fresh_for(Duration::ZERO)
            .patience(DEADLINE / 2);
        let cache = builder.open().await.unwrap();
        if cut {
            cut_off(&cache).await;
        }
        cache
    }
}

/// Restarted in an outage with a clock that is behind: an update of what is queued is acknowledged and not seen.
#[tokio::test]
async fn a_clock_behind_the_file_hides_no_update() {
    let mut world = World::new();
    let cache = world.open_skewed(0, false).await;
    world.away(&cache).await;
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Queued);
    drop(cache);
    let cache = world.open_skewed(-60_000, true).await;
    assert_eq!(cache.update("k", append(1)).await.unwrap(), Durability::Queued);
    let got = tokio::time::timeout(Duration::from_secs(3), cache.get("k")).await;
    let got = got.map(|f| f.map(|f| f.map(|f| f.json().to_owned())));
    println!("in the outage: {got:?}");
    world.faults.heal();
    sleep(3_000).await;
    println!("stored {:?}, health {:?}", world.stored("k").await, cache.health().queue);
    let after = tokio::time::timeout(Duration::from_secs(3), cache.get("k")).await;
    let after = after.map(|f| f.map(|f| f.map(|f| (f.json().to_owned(), f.freshness()))));
    println!("after it: {after:?}");
    assert_eq!(got.unwrap().unwrap().as_deref(), Some("[0,1]"));
}

/// … and a put of what was seen lately is thrown away.
#[tokio::test]
async fn a_clock_behind_the_file_loses_no_put() {
    let mut world = World::new();
    let cache = world.open_skewed(0, false).await;
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Stored);
    world.away(&cache).await;
    drop(cache);
    let cache = world.open_skewed(-60_000, true).await;
    let put = cache.put("k", &vec![1]).await;
    world.faults.heal();
    sleep(1_500).await;
    assert_eq!((world.stored("k").await.as_deref(), put.unwrap()), (Some("[1]"), Durability::Queued));
}

/// Before the first contact, an update of a queued put is sent as a put, and undoes what another daemon did.
#[tokio::test]
async fn an_update_of_a_put_from_before_the_first_contact_undoes_nothing() {
    let (mut one, mut two) = (World::new(), World::new());
    two.truth = Arc::clone(&one.truth);
    let second = two.open().await;
    let first = one.open_skewed(0, true).await;
    assert_eq!(first.put("k", &vec![0]).await.unwrap(), Durability::Queued);
    sleep(5).await;
    assert_eq!(second.put("k", &vec![100]).await.unwrap(), Durability::Stored);
    sleep(5).await;
    assert_eq!(first.update("k", append(1)).await.unwrap(), Durability::Queued);
    one.faults.heal();
    drained(&first).await;
    assert_eq!((one.stored("k").await.as_deref(), letters(&first)), (Some("[100]"), 1));
}

/// A full queue takes dead letters without end, of a write that still waits.
#[tokio::test]
async fn a_full_queue_takes_no_dead_letters() {
    let (mut one, mut two) = (World::new(), World::new());
    two.truth = Arc::clone(&one.truth);
    let second = two.open().await;
    let first = one.builder().queue_bytes(3_000).open().await.unwrap();
    one.away(&first).await;
    let big = "x".repeat(1_000);
    assert_eq!(first.put("k", &big).await.unwrap(), Durability::Queued);
    assert_eq!(first.put("other", &big).await.unwrap(), Durability::Queued);
    sleep(5).await;
    assert_eq!(second.put("k", &big).user("u").await.unwrap(), Durability::Stored);
    one.faults.heal();
    one.faults.fail_trials(true);
    while !first.health().is_available() {
        sleep(5).await;
    }
    assert_eq!(first.list("u").await.unwrap().len(), 1);
    one.away(&first).await;
    for _ in 0..5 {
        let error = first.update("k", |text: Option<String>| Ok(text)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::QueueFull);
    }
    let queue = first.health().queue.unwrap();
    assert_eq!((queue.records, queue.dead_letters), (2, 0), "nothing was taken: {queue:?}");
}

/// As 5a, and memory lets go of it: the read never ends, not even after the outage.
#[tokio::test]
async fn a_clock_behind_the_file_holds_up_no_read() {
    let mut world = World::new();
    let cache = world.open_skewed(0, false).await;
    world.away(&cache).await;
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Queued);
    drop(cache);
    let cache = world.open_skewed(-60_000, true).await;
    assert_eq!(cache.update("k", append(1)).await.unwrap(), Durability::Queued);
    cache.evict("k").unwrap();
    let during = tokio::time::timeout(Duration::from_secs(3), cache.get("k")).await.is_err();
    world.faults.heal();
    sleep(3_000).await;
    assert_eq!(world.stored("k").await.as_deref(), Some("[0,1]"));
    let after = tokio::time::timeout(Duration::from_secs(3), cache.get("k")).await.is_err();
    let left = cache.shutdown(Duration::from_secs(1)).await.unwrap().still_queued;
    assert_eq!((during, after, left), (false, false, 0), "hangs in the outage, after it, still queued");
}

/// A store that says `Ahead` once.
#[derive(Debug)]
struct AheadOnce(Arc<Memory>, std::sync::atomic::AtomicBool);

#[async_trait::async_trait]
impl Store for AheadOnce {
    fn clock(&self) -> &Arc<threadkeep::Clock> {
        self.0.clock()
    }
    async fn load(&self, wants: &[Want]) -> threadkeep::Result<Vec<Loaded>> {
        self.0.load(wants).await
    }
    async fn apply(&self, w: &[threadkeep::Write]) -> threadkeep::Result<Vec<threadkeep::Applied>> {
        if w[0].expect.is_some() && !self.1.swap(true, std::sync::atomic::Ordering::SeqCst) {
            return Ok(vec![threadkeep::Applied::Ahead]);
        }
        self.0.apply(w).await
    }
    async fn recent(&self, p: &threadkeep::Page) -> threadkeep::Result<threadkeep::Recent> {
        self.0.recent(p).await
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

/// An attempt goes on with another stamp after its write was queued: it is stored under one version and dies under
/// the other.
#[tokio::test]
async fn an_attempt_is_not_stamped_anew_after_it_was_queued() {
    let mut world = World::new();
    let faulty = Faulty::new(AheadOnce(Arc::clone(&world.truth), false.into()));
    world.faults = faulty.faults();
    let builder = Cache::builder().store(Guard::new(faulty, DEADLINE)).queue(world.dir.path().join("q.db"));
    let builder = builder.fresh_for(Duration::ZERO).patience(Duration::from_millis(20));
    let cache = builder.open().await.unwrap();
    let _ = cache.put("k", &vec![0]).await.unwrap();
    world.faults.fail_trials(true);
    assert_eq!(cache.update("k", append(1)).await.unwrap(), Durability::Queued);
    sleep(200).await;
    println!("{:?}", world.stored("k").await);
    world.faults.fail_trials(false);
    drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), letters(&cache)), (Some("[0,1]"), 0));
}

/// The first answer of the source of truth is that to a replay: what it was about is settled by nobody.
#[tokio::test]
async fn the_first_answer_may_be_a_replays() {
    let mut world = World::new();
    let cache = world.open_skewed(-60_000, true).await;
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Queued);
    drop(cache);
    let skewed = Skewed(Arc::clone(&world.truth), Arc::new(threadkeep::Clock::skewed(-60_000)));
    let faulty = Faulty::new(skewed);
    world.faults = faulty.faults();
    world.faults.script([Fault::Refuse, Fault::Refuse]); // the probe of `open`
    let builder = Cache::builder().store(Guard::new(faulty, DEADLINE)).queue(world.dir.path().join("q.db"));
    let cache = builder.open().await.unwrap();
    drained(&cache).await;
}

/// What a clock stamped that went on from the anchor is moved once more, where the next process heard of the source of truth
/// before it opened the file.
#[tokio::test]
async fn what_a_clock_stamped_that_was_resumed_stays_right() {
    const BEHIND: i64 = -60_000;
    let mut world = World::new();
    let cache = world.open_skewed(BEHIND, false).await;
    assert_eq!(cache.put("k", &0).await.unwrap(), Durability::Stored);
    drop(cache);
    let cache = world.open_again(BEHIND, true).await;
    assert_eq!(cache.put("k", &1).await.unwrap(), Durability::Queued);
    drop(cache);
    sleep(5).await;
    let mut other = World::new();
    other.truth = Arc::clone(&world.truth);
    assert_eq!(other.open().await.put("k", &2).await.unwrap(), Durability::Stored);

    let skewed = Skewed(Arc::clone(&world.truth), Arc::new(threadkeep::Clock::skewed(BEHIND)));
    skewed.learn();
    let cache = world.open_booted(skewed, false).await;
    drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), letters(&cache)), (Some("2"), 1));
}

/// A gateway that answers 404 to everything empties the queue into the dead letters.
#[tokio::test]
async fn a_gateway_that_refuses_everything_costs_no_queued_write() {
    let mut world = World::new();
    let cache = world.open().await;
    world.away(&cache).await;
    for at in 0..10 {
        assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap(), Durability::Queued);
    }
    world.faults.always(Fault::Fail(ErrorKind::Refused));
    sleep(3_000).await;
    world.faults.heal();
    drained(&cache).await;
    assert_eq!((letters(&cache), world.stored("t3").await.as_deref()), (0, Some("3")));
}

/// What replay finds stored long ago is handed out as fresh, though another daemon has gone on from it.
#[tokio::test]
async fn what_was_stored_long_before_its_replay_is_not_fresh() {
    let (mut one, mut two) = (World::new(), World::new());
    two.truth = Arc::clone(&one.truth);
    let second = two.open().await;
    let builder = one.builder().fresh_for(Duration::from_secs(30));
    let first = builder.open().await.unwrap();
    one.faults.always(Fault::LoseAnswer);
    assert_eq!(first.put("k", &vec![0]).await.unwrap(), Durability::Queued);
    one.away(&first).await;
    assert_eq!(second.update("k", append(1)).await.unwrap(), Durability::Stored);
    one.faults.heal();
    drained(&first).await;
    assert_eq!(found(&first, "k").await, Some(("[0,1]".into(), Freshness::Fresh)));
}

/// Of two readers who find the copy on disk, one takes it into memory; the other must not need it to stay there.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_copy_that_another_reader_was_faster_with_is_handed_out_whatever_memory_does() {
    let mut world = World::new();
    let cache = world.open().await;
    let _ = cache.put("k", &1).await.unwrap();
    world.away(&cache).await;
    let read = |cache: Cache| async move {
        for _ in 0..2_000 {
            let (json, freshness) = found(&cache, "k").await.unwrap();
            assert!(json == "1" && matches!(freshness, Freshness::Stale { .. }), "{json} {freshness:?}");
            cache.evict("k").unwrap();
        }
    };
    futures::future::join_all((0..4).map(|_| tokio::spawn(read(cache.clone()))))
        .await
        .into_iter()
        .for_each(Result::unwrap);
}

/// A late answer of a put from before the one that a queued update goes on from made the update take that put's place no more.
#[tokio::test]
async fn a_late_answer_of_an_older_put_leaves_an_update_of_a_newer_one_alone() {
    let mut world = World::new();
    let faulty = Faulty::new(Arc::clone(&world.truth));
    world.faults = faulty.faults();
    let guard = Guard::new(faulty, Duration::from_secs(3));
    let builder = Cache::builder().store(guard).queue(world.dir.path().join("q.db"));
    let cache = builder.fresh_for(Duration::ZERO).patience(DEADLINE / 2).open().await.unwrap();
    world.faults.fail_trials(true);
    world.faults.script([Fault::DelayAnswer(Duration::from_secs(1))]);
    assert_eq!(cache.put("k", &vec![0]).await.unwrap(), Durability::Queued);
    assert_eq!(world.stored("k").await.as_deref(), Some("[0]"), "its answer is on the way");
    world.faults.script([Fault::Fail(ErrorKind::Denied)]);
    assert_eq!(cache.put("k", &vec![1]).await.unwrap(), Durability::Queued);
    assert_eq!(cache.update("k", append(2)).await.unwrap(), Durability::Queued);
    sleep(1_200).await; // the late answer
    world.faults.fail_trials(false);
    drained(&cache).await;
    assert_eq!((world.stored("k").await.as_deref(), letters(&cache)), (Some("[1,2]"), 0));
}

/// A daemon that is started again, while its clock is behind by less than is put right, loses against what it wrote before.
#[tokio::test]
async fn a_clock_that_is_behind_a_little_goes_on_from_what_the_file_holds() {
    let mut world = World::new();
    let cache = world.open_skewed(0, false).await;
    assert_eq!(cache.put("put", &vec![0]).await.unwrap(), Durability::Stored);
    assert_eq!(cache.put("updated", &vec![0]).await.unwrap(), Durability::Stored);
    world.away(&cache).await;
    drop(cache);
    let cache = world.open_skewed(-1_500, true).await;
    assert_eq!(cache.put("put", &vec![1]).await.unwrap(), Durability::Queued);
    assert_eq!(cache.update("updated", append(1)).await.unwrap(), Durability::Queued);
    world.faults.heal();
    drained(&cache).await;
    for (key, json) in [("put", "[1]"), ("updated", "[0,1]")] {
        assert_eq!(world.stored(key).await.as_deref(), Some(json), "{key}");
    }
    assert_eq!(letters(&cache), 0);
}

/// What expires while its load is under way is handed out as fresh.
#[tokio::test]
async fn what_expires_on_its_way_is_not_handed_out() {
    let mut world = World::new();
    let faulty = Faulty::new(Arc::clone(&world.truth));
    world.faults = faulty.faults();
    let guard = Guard::new(faulty, Duration::from_secs(3));
    let builder = Cache::builder().store(guard).queue(world.dir.path().join("q.db"));
    let cache = builder.patience(Duration::from_secs(3)).open().await.unwrap();
    let ttl = Duration::from_millis(300);
    for key in ["got", "updated", "listed"] {
        assert_eq!(cache.put(key, &vec![0]).ttl(ttl).user("u").await.unwrap(), Durability::Stored);
        cache.evict(key).unwrap();
    }
    let slow = || world.faults.script([Fault::DelayAnswer(2 * ttl)]);
    slow();
    let (listed, got, updated) = tokio::join!(
        async { cache.list("u").await.unwrap().len() },
        async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            slow();
            found(&cache, "got").await
        },
        async {
            tokio::time::sleep(Duration::from_millis(40)).await;
            slow();
            cache.update("updated", append(1)).await.unwrap()
        },
    );
    assert_eq!((listed, got, updated), (0, None, Durability::Stored));
    assert_eq!(world.stored("updated").await.as_deref(), Some("[1]"), "it went on from what had expired");
}

/// A daemon with a wrong clock that is started again in an outage loses threads, or keeps them too long.
#[tokio::test]
async fn a_daemon_goes_on_by_the_clock_that_the_one_before_it_knew() {
    let (short, long) = (Duration::from_millis(500), Duration::from_secs(60));
    for off in [120_000, -120_000] {
        let mut world = World::new();
        let cache = world.open_skewed(off, false).await;
        assert_eq!(cache.put("long", &0).ttl(long).await.unwrap(), Durability::Stored);
        assert_eq!(cache.put("short", &0).ttl(short).await.unwrap(), Durability::Stored);
        world.away(&cache).await;
        assert_eq!(cache.put("queued", &0).ttl(long).await.unwrap(), Durability::Queued);
        drop(cache);
        let cache = world.open_again(off, true).await;
        let (_, freshness) = found(&cache, "long").await.unwrap();
        assert!(
            matches!(freshness, Freshness::Stale { age } if age < Duration::from_secs(9)),
            "{freshness:?}"
        );
        assert_eq!(found(&cache, "queued").await, Some(("0".into(), Freshness::Queued)));
        assert_eq!(cache.put("queued again", &0).ttl(long).await.unwrap(), Durability::Queued);
        sleep(600).await; // until it has expired
        assert_eq!(cache.get("short").await.unwrap_err().kind(), ErrorKind::Unavailable);
        world.faults.heal();
        drained(&cache).await;
        for key in ["long", "queued", "queued again"] {
            assert_eq!(world.stored(key).await.as_deref(), Some("0"), "{key}, off by {off}");
        }
        assert_eq!(letters(&cache), 0);
    }
}

/// The answer of a load that was overtaken puts an old copy back, where the row of what overtook it had to make room.
#[tokio::test]
async fn a_late_load_brings_no_old_copy_back() {
    let mut world = World::new();
    let cache = world.builder().replica_bytes(1_000).open().await.unwrap();
    assert_eq!(cache.put("k", &0).await.unwrap(), Durability::Stored);
    cache.evict("k").unwrap();
    world.faults.script([Fault::DelayAnswer(5 * DEADLINE)]);
    let late = tokio::spawn({
        let cache = cache.clone();
        async move { cache.get("k").await }
    });
    while world.faults.calls("load") == 0 {
        tokio::task::yield_now().await;
    }
    sleep(5).await; // it has read the thread
    assert_eq!(cache.remove("k").await.unwrap(), Durability::Stored);
    for at in 0..20 {
        assert_eq!(cache.put(format!("{at}"), &"x".repeat(100)).await.unwrap(), Durability::Stored);
    }
    world.faults.always(Fault::Refuse);
    let error = late.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "nothing is known of it any more");
}

/// A write that a clock stamped which was behind a little is taken for expired once the clock is right.
#[tokio::test]
async fn what_a_clock_that_was_behind_a_little_stamped_lives_as_long_as_it_was_to() {
    let mut world = World::new();
    let cache = world.open_skewed(-1_500, true).await;
    world.faults.fail_trials(true);
    assert_eq!(cache.put("k", &0).ttl(Duration::from_millis(1_200)).await.unwrap(), Durability::Queued);
    world.faults.heal();
    while cache.health().breaker != Some(threadkeep::State::Closed) {
        sleep(5).await;
    }
    assert_eq!(found(&cache, "k").await, Some(("0".into(), Freshness::Queued)));
    sleep(1_300).await; // until it has expired
    assert_eq!(found(&cache, "k").await, None);
}

/// A write of which nobody knows whether it was overtaken is exported as such, and read again once that is known.
#[tokio::test]
async fn an_export_tells_a_doubtful_write_from_a_superseded_one() {
    let mut world = World::new();
    let cache = world.open_cut_off().await;
    for key in ["sound", "doubtful", "superseded"] {
        assert_eq!(cache.put(key, key).await.unwrap(), Durability::Queued);
    }
    cache.shutdown(Duration::ZERO).await.unwrap();
    let path = world.dir.path().join("q.db");
    let sql = "update records set overtaken = 2 where key = 'doubtful';
               update records set overtaken = 1 where key = 'superseded';";
    rusqlite::Connection::open(&path).unwrap().execute_batch(sql).unwrap();
    let file = QueueFile::open(&path).await.unwrap();
    let writes = file.queued(None).await.unwrap();
    let said: Vec<_> = writes.iter().map(|write| (write.is_doubtful, write.is_overtaken)).collect();
    assert_eq!(said, [(false, false), (true, false), (false, true)]);
    let lines: Vec<String> = writes.iter().map(|write| file.export_write(write).unwrap()).collect();
    file.close().await.unwrap();

    let mut other = World::new();
    let file = QueueFile::open_for(other.dir.path().join("q.db"), "custom").await.unwrap();
    assert_eq!(file.import(&lines, false).await.unwrap().0.queued, 3);
    let again = file.queued(None).await.unwrap();
    let again: Vec<String> = again.iter().map(|write| file.export_write(write).unwrap()).collect();
    assert_eq!(again, lines, "nothing of it is lost on the way");
    file.close().await.unwrap();
    let cache = other.open_cut_off().await;
    assert_eq!(cache.get("sound").await.unwrap().unwrap().freshness(), Freshness::Queued);
    for key in ["doubtful", "superseded"] {
        assert!(cache.get(key).await.unwrap_err().is_outage(), "{key} is not read yet");
    }
    other.faults.heal();
    drained(&cache).await;
    for key in ["sound", "doubtful", "superseded"] {
        assert_eq!(other.stored(key).await.unwrap(), format!("{key:?}"));
    }
}
