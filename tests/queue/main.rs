//! The queue, the replica and the replay, over a store that fails by script.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod alone;
mod listings;
mod pace;
mod races;
mod traces;

use std::sync::Arc;
use std::time::Duration;

use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{
    Builder, Cache, Durability, ErrorKind, Freshness, Guard, Key, Loaded, Memory, OnOutage, Store, Want,
};

const DEADLINE: Duration = Duration::from_millis(200);

/// A source of truth that outlives the daemons, and the directory of one daemon's file.
struct World {
    truth: Arc<Memory>,
    faults: Faults,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let truth = Arc::new(Memory::new());
        let faults = Faulty::new(Arc::clone(&truth)).faults();
        Self { truth, faults, dir: tempfile::tempdir().unwrap() }
    }

    fn builder(&mut self) -> Builder {
        let faulty = Faulty::new(Arc::clone(&self.truth));
        self.faults = faulty.faults();
        let builder =
            Cache::builder().store(Guard::new(faulty, DEADLINE)).queue(self.dir.path().join("q.db"));
        builder.fresh_for(Duration::ZERO).patience(DEADLINE / 2)
    }

    async fn open(&mut self) -> Cache {
        self.builder().open().await.unwrap()
    }

    /// Starts while the source of truth is away.
    async fn open_cut_off(&mut self) -> Cache {
        let builder = self.builder();
        self.faults.always(Fault::Refuse);
        let cache = builder.open().await.unwrap();
        cut_off(&cache).await;
        cache
    }

    async fn away(&self, cache: &Cache) {
        self.faults.always(Fault::Refuse);
        cut_off(cache).await;
    }

    /// What the source of truth holds.
    async fn stored(&self, key: &str) -> Option<String> {
        let wants = [Want::from(Key::new(key).unwrap())];
        match self.truth.load(&wants).await.unwrap().pop().unwrap() {
            Loaded::Found(record) => record.value.as_ref().map(|value| value.as_str().to_owned()),
            _ => None,
        }
    }
}

/// Asks until the breaker is open.
async fn cut_off(cache: &Cache) {
    for _ in 0..20 {
        if !cache.health().is_available() {
            return;
        }
        let _ = cache.get("nobody has this id").await;
    }
    panic!("the breaker does not open");
}

fn queued(cache: &Cache) -> u64 {
    cache.health().queue.unwrap().records
}

async fn drained(cache: &Cache) {
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(60) {
        if queued(cache) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the queue is not drained: {:?}", cache.health());
}

async fn sleep(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

async fn found(cache: &Cache, key: &str) -> Option<(String, Freshness)> {
    cache.get(key).await.unwrap().map(|found| (found.json().to_owned(), found.freshness()))
}

#[tokio::test]
async fn writes_go_on_in_an_outage_and_reach_the_source_of_truth_after_it() {
    let mut world = World::new();
    let cache = world.open().await;
    let _ = cache.put("removed", &0).await.unwrap();
    world.away(&cache).await;
    assert_eq!(cache.put("put", &1).await.unwrap(), Durability::Queued);
    assert_eq!(cache.put("put", &2).await.unwrap(), Durability::Queued);
    assert_eq!(cache.remove("removed").await.unwrap(), Durability::Queued);
    assert_eq!(found(&cache, "put").await, Some(("2".into(), Freshness::Queued)));
    assert_eq!(found(&cache, "removed").await, None, "a queued delete is an answer");
    cache.evict("put").unwrap();
    assert_eq!(found(&cache, "put").await, Some(("2".into(), Freshness::Queued)), "from disk");
    assert_eq!(queued(&cache), 2, "one for each thread");
    assert_eq!(world.stored("put").await, None);
    world.faults.heal();
    drained(&cache).await;
    assert_eq!(world.stored("put").await.as_deref(), Some("2"));
    assert_eq!(world.stored("removed").await, None);
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
    assert_eq!(found(&cache, "put").await, Some(("2".into(), Freshness::Fresh)));
}

#[tokio::test]
async fn a_restart_in_an_outage_keeps_queue_and_last_known_copies() {
    let mut world = World::new();
    let cache = world.open().await;
    let _ = cache.put("stored", &"before").await.unwrap();
    world.away(&cache).await;
    let _ = cache.put("queued", &"during").await.unwrap();
    drop(cache);
    let cache = world.open_cut_off().await;
    assert_eq!(found(&cache, "queued").await, Some(("\"during\"".into(), Freshness::Queued)));
    let (json, freshness) = found(&cache, "stored").await.unwrap();
    assert_eq!(json, "\"before\"");
    assert!(matches!(freshness, Freshness::Stale { age } if age < Duration::from_secs(60)), "{freshness:?}");
    assert_eq!(cache.get("unknown").await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(cache.list("u").await.unwrap_err().kind(), ErrorKind::Unavailable, "it would lack threads");
    let append = |current: Option<String>| Ok(Some(current.unwrap() + " and after"));
    assert_eq!(cache.update("stored", append).await.unwrap(), Durability::Queued);
    assert_eq!(cache.update("queued", append).await.unwrap(), Durability::Queued);
    let left = cache.shutdown(Duration::from_secs(1)).await.unwrap();
    assert_eq!((left.unfinished, left.still_queued), (0, 2));
    let cache = world.open().await;
    drained(&cache).await;
    assert_eq!(world.stored("stored").await.as_deref(), Some("\"before and after\""));
    assert_eq!(world.stored("queued").await.as_deref(), Some("\"during and after\""));
}

#[tokio::test]
async fn a_write_that_takes_too_long_is_queued_and_settled_by_its_late_answer() {
    let mut world = World::new();
    let cache = world.open().await;
    world.faults.script([Fault::DelayAnswer(DEADLINE * 3 / 4)]);
    assert_eq!(cache.put("slow", &1).await.unwrap(), Durability::Queued);
    drained(&cache).await;
    assert_eq!(world.stored("slow").await.as_deref(), Some("1"));
    assert_eq!(found(&cache, "slow").await, Some(("1".into(), Freshness::Fresh)));
}

#[tokio::test]
async fn a_denied_write_is_queued_and_goes_through_when_the_key_is_mended() {
    let mut world = World::new();
    let cache = world.open().await;
    world.faults.always(Fault::Fail(ErrorKind::Denied));
    assert_eq!(cache.put("denied", &1).await.unwrap(), Durability::Queued);
    assert!(!cache.health().is_available(), "it is an alarm");
    assert_eq!(cache.get("unknown").await.unwrap_err().kind(), ErrorKind::Denied, "it is no absence");
    assert_eq!(cache.list("u").await.unwrap_err().kind(), ErrorKind::Denied);
    world.faults.heal();
    drained(&cache).await;
    assert_eq!(world.stored("denied").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn what_is_stored_after_the_outage_is_newer_than_what_was_queued_in_it() {
    let mut world = World::new();
    let cache = world.open().await;
    let _ = cache.put("k", &1).await.unwrap();
    world.away(&cache).await;
    assert_eq!(cache.put("k", &2).await.unwrap(), Durability::Queued);
    // Replay fails from now on, while live writes pass: the queued mark stays.
    world.faults.heal();
    world.faults.fail_trials(true);
    while !cache.health().is_available() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(cache.put("k", &3).await.unwrap(), Durability::Stored);
    cache.evict("k").unwrap();
    assert_eq!(found(&cache, "k").await, Some(("3".into(), Freshness::Fresh)));
    world.faults.fail_trials(false);
    drained(&cache).await;
    assert_eq!(world.stored("k").await.as_deref(), Some("3"));
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0, "it was replaced by its own daemon");
}

#[tokio::test]
async fn the_loser_of_two_daemons_is_a_dead_letter() {
    let (mut one, mut two) = (World::new(), World::new());
    two.truth = Arc::clone(&one.truth);
    let (first, second) = (one.open().await, two.open().await);
    one.away(&first).await;
    assert_eq!(first.put("put", &"older").await.unwrap(), Durability::Queued);
    assert_eq!(first.remove("removed").await.unwrap(), Durability::Queued);
    tokio::time::sleep(Duration::from_millis(3)).await;
    assert_eq!(second.put("put", &"newer").await.unwrap(), Durability::Stored);
    assert_eq!(second.put("removed", &"newer").await.unwrap(), Durability::Stored);
    assert_eq!(second.put("other way round", &"older").await.unwrap(), Durability::Stored);
    tokio::time::sleep(Duration::from_millis(3)).await;
    assert_eq!(first.put("other way round", &"newer").await.unwrap(), Durability::Queued);
    one.faults.heal();
    drained(&first).await;
    for key in ["put", "removed", "other way round"] {
        assert_eq!(one.stored(key).await.as_deref(), Some("\"newer\""), "{key}");
        assert_eq!(found(&first, key).await.unwrap().0, "\"newer\"", "{key}");
    }
    let letters = first.dead_letters().await.unwrap();
    let mut dead: Vec<_> = letters.iter().map(|letter| letter.record.key.as_str()).collect();
    dead.sort_unstable();
    assert_eq!(dead, ["put", "removed"]);
    assert!(letters.iter().all(|letter| letter.reason == "superseded" && letter.newer.is_some()));
    assert_eq!(first.forget_dead_letters(&letters[1]).await.unwrap(), 2);
    assert_eq!(first.health().queue.unwrap().dead_letters, 0);
}

#[tokio::test]
async fn a_queued_update_does_not_undo_what_another_daemon_did_meanwhile() {
    let (mut one, mut two) = (World::new(), World::new());
    two.truth = Arc::clone(&one.truth);
    let (first, second) = (one.open().await, two.open().await);
    let _ = first.put("k", &vec![0]).await.unwrap();
    let append = |turn: i32| move |turns: Option<Vec<i32>>| Ok(Some([turns.unwrap(), vec![turn]].concat()));
    one.away(&first).await;
    assert_eq!(second.update("k", append(1)).await.unwrap(), Durability::Stored);
    assert_eq!(first.update("k", append(2)).await.unwrap(), Durability::Queued);
    assert_eq!(first.update("k", append(3)).await.unwrap(), Durability::Queued);
    one.faults.heal();
    drained(&first).await;
    assert_eq!(one.stored("k").await.as_deref(), Some("[0,1]"));
    let letters = first.dead_letters().await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].record.value.as_ref().unwrap().as_str(), "[0,2,3]");
    assert_eq!(found(&first, "k").await.unwrap().0, "[0,1]");
}

#[tokio::test]
async fn updates_through_lost_answers_and_an_outage_are_made_once() {
    let mut world = World::new();
    let cache = world.open().await;
    let _ = cache.put("k", &Vec::<i32>::new()).await.unwrap();
    for turn in 0..30 {
        match turn % 5 {
            1 => world.faults.always(Fault::LoseAnswer),
            3 => world.faults.always(Fault::Refuse),
            _ => world.faults.heal(),
        }
        let append = |turns: Option<Vec<i32>>| Ok(Some([turns.unwrap(), vec![turn]].concat()));
        let _ = cache.update("k", append).await.unwrap();
    }
    world.faults.heal();
    drained(&cache).await;
    let turns: Vec<String> = (0..30).map(|turn| turn.to_string()).collect();
    assert_eq!(world.stored("k").await, Some(format!("[{}]", turns.join(","))));
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
}

#[tokio::test]
async fn a_full_queue_refuses_and_takes_nothing() {
    let mut world = World::new();
    let cache = world.builder().queue_bytes(5_000).open().await.unwrap();
    world.away(&cache).await;
    assert!(!cache.health().is_available() && cache.health().can_write().is_ok());
    let value = "x".repeat(1_000);
    let mut taken = 0;
    let error = loop {
        match cache.put(format!("t{taken}"), &value).await {
            Ok(durability) => assert_eq!(durability, Durability::Queued),
            Err(error) => break error,
        }
        taken += 1;
    };
    assert_eq!(error.kind(), ErrorKind::QueueFull);
    assert!(error.to_string().contains("CONVERSATION_QUEUE_BYTES") && !error.outcome_unknown(), "{error}");
    assert!(
        error.to_string().contains("was not queued") && !error.to_string().contains("may be stored"),
        "{error}"
    );
    assert_eq!((queued(&cache), taken), (4, 4));
    assert_eq!(cache.health().can_write().unwrap_err().kind(), ErrorKind::QueueFull);
    assert_eq!(
        cache.put("t0", &"shorter").await.unwrap(),
        Durability::Queued,
        "it takes the place of the old"
    );
    assert!(cache.health().can_write().is_ok());
    assert!(cache.get(format!("t{taken}")).await.unwrap_err().is_outage());
    world.faults.heal();
    drained(&cache).await;
    assert_eq!(world.stored("t0").await.as_deref(), Some("\"shorter\""));
    assert_eq!(world.stored(&format!("t{taken}")).await, None);
}

/// By an answer that is lost, and by one that does not come while the caller waits.
#[tokio::test]
async fn a_full_queue_does_not_deny_what_may_be_stored() {
    for fault in [Fault::LoseAnswer, Fault::DelayAnswer(DEADLINE * 2)] {
        let mut world = World::new();
        let cache = world.builder().queue_bytes(100).open().await.unwrap();
        world.faults.always(fault);
        let error = cache.put("k", &"x".repeat(1_000)).await.unwrap_err();
        assert!(error.kind() == ErrorKind::QueueFull && error.outcome_unknown(), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("was not queued") && text.contains("may be stored all the same"), "{text}");
        assert!(world.stored("k").await.is_some());
    }
}

#[tokio::test]
async fn a_write_that_expires_in_the_queue_is_not_readable_afterwards_nor_is_what_it_replaced() {
    let mut world = World::new();
    let cache = world.open().await;
    let _ = cache.put("k", &"replaced").await.unwrap();
    world.away(&cache).await;
    let short = Duration::from_millis(50);
    assert_eq!(cache.put("k", &"short").ttl(short).await.unwrap(), Durability::Queued);
    tokio::time::sleep(short * 2).await;
    assert!(cache.get("k").await.unwrap_err().is_outage(), "another daemon may have renewed it");
    world.faults.heal();
    world.faults.fail_trials(true);
    while !cache.health().is_available() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(found(&cache, "k").await, None, "before it is replayed");
    world.faults.fail_trials(false);
    drained(&cache).await;
    assert_eq!(found(&cache, "k").await, None);
    assert_eq!(world.stored("k").await, None);
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
}

#[tokio::test]
async fn a_poison_record_delays_no_other_and_opens_no_breaker() {
    let mut world = World::new();
    let cache = world.open().await;
    world.away(&cache).await;
    for at in 0..20 {
        let _ = cache.put(format!("t{at}"), &at).await.unwrap();
    }
    world.faults.poison("t7", Fault::Hang);
    world.faults.poison("t13", Fault::Fail(ErrorKind::Refused));
    world.faults.heal();
    for _ in 0..500 {
        if queued(&cache) == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(queued(&cache), 1, "{:?}", cache.health());
    assert!(cache.health().is_available());
    let letters = cache.dead_letters().await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].record.key.as_str(), "t13");
    assert!(letters[0].reason.contains("refused"), "{}", letters[0].reason);
    let _ = cache.put("another", &1).await.unwrap();
    assert_eq!(found(&cache, "t7").await, Some(("7".into(), Freshness::Queued)));
    for _ in 0..30 {
        tokio::time::sleep(DEADLINE / 2).await;
        assert!(cache.health().is_available(), "{:?}", cache.health());
    }
    world.faults.antidote();
    drained(&cache).await;
    assert_eq!(world.stored("t7").await.as_deref(), Some("7"));
}

/// A constraint that an operator added, say: two callers hear of it, then it is the store's fault.
#[tokio::test]
async fn a_refusal_of_several_threads_in_a_row_is_the_stores() {
    let mut world = World::new();
    let cache = world.open().await;
    for at in 0..6 {
        world.faults.poison(format!("t{at}"), Fault::Fail(ErrorKind::Refused));
    }
    for at in 0..2 {
        assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap_err().kind(), ErrorKind::Refused);
        // Again the same thread: that shows nothing about others.
        assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap_err().kind(), ErrorKind::Refused);
    }
    assert!(cache.health().is_available());
    for at in 2..6 {
        assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap(), Durability::Queued);
    }
    let cause = cache.health().cause.unwrap();
    assert!(cause.to_string().contains("takes no writes"), "{cause}");
    sleep(1_500).await;
    assert_eq!((queued(&cache), cache.health().queue.unwrap().dead_letters), (4, 0));
    world.faults.antidote();
    // A live write that is stored wakes the replay, whose own pause may be ten seconds by now.
    assert_eq!(cache.put("t0", &0).await.unwrap(), Durability::Stored);
    assert!(cache.health().is_available());
    drained(&cache).await;
    assert_eq!(world.stored("t5").await.as_deref(), Some("5"));
}

#[tokio::test]
async fn reject_takes_nothing_but_still_drains_what_was_queued() {
    let mut world = World::new();
    let cache = world.open().await;
    world.away(&cache).await;
    let _ = cache.put("k", &1).await.unwrap();
    drop(cache);
    let builder = world.builder().on_outage(OnOutage::Reject);
    world.faults.always(Fault::Refuse);
    let cache = builder.open().await.unwrap();
    cut_off(&cache).await;
    assert_eq!(cache.put("other", &1).await.unwrap_err().kind(), ErrorKind::Unavailable);
    let refusal = cache.health().can_write().unwrap_err();
    assert!(refusal.to_string().contains("CONVERSATION_ON_OUTAGE"), "{refusal}");
    assert_eq!(found(&cache, "k").await, Some(("1".into(), Freshness::Queued)));
    world.faults.heal();
    drained(&cache).await;
    assert_eq!(world.stored("k").await.as_deref(), Some("1"));
}

/// What is logged by this process.
fn log_of_the_process() -> Arc<std::sync::Mutex<Vec<u8>>> {
    #[derive(Clone)]
    struct Log(Arc<std::sync::Mutex<Vec<u8>>>);
    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log(Arc::default());
    let writer = log.clone();
    tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).try_init().ok();
    log.0
}

#[tokio::test]
async fn another_backend_in_the_place_of_supabase_names_the_queue_that_is_left_behind() {
    let log = log_of_the_process();
    let mut world = World::new();
    let cache = world.open().await;
    world.away(&cache).await;
    let _ = cache.put("k", &1).await.unwrap();
    cache.shutdown(Duration::ZERO).await.unwrap();
    let path = world.dir.path().join("q.db");
    let local = world.dir.path().join("local.db");
    for (builder, times) in [(Cache::builder().memory(), 1), (Cache::builder().local(&local), 2)] {
        builder.queue(&path).open().await.unwrap();
        let log = String::from_utf8(log.lock().unwrap().clone()).unwrap();
        let named =
            log.lines().filter(|line| line.contains(path.to_str().unwrap()) && line.contains("writes=1"));
        assert_eq!(named.filter(|line| line.contains("acknowledged writes wait")).count(), times, "{log}");
    }
}

#[tokio::test]
async fn write_only_traffic_and_none_at_all_both_recover() {
    let mut world = World::new();
    let cache = world.open().await;
    world.away(&cache).await;
    let _ = cache.put("silence", &1).await.unwrap();
    world.faults.heal();
    drained(&cache).await;
    world.away(&cache).await;
    world.faults.heal();
    let mut durability = Durability::Queued;
    for turn in 0..1_000 {
        durability = cache.put("writes", &turn).await.unwrap();
        if durability == Durability::Stored {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(durability, Durability::Stored);
    drained(&cache).await;
}

#[tokio::test]
async fn a_shutdown_drains_the_queue_where_it_can() {
    let mut world = World::new();
    let cache = world.open().await;
    world.faults.script([Fault::Delay(DEADLINE * 3 / 4)]);
    assert_eq!(cache.put("k", &1).await.unwrap(), Durability::Queued);
    let left = cache.shutdown(Duration::from_secs(5)).await.unwrap();
    assert_eq!((left.unfinished, left.still_queued), (0, 0));
    assert_eq!(world.stored("k").await.as_deref(), Some("1"));
    assert_eq!(cache.put("k", &2).await.unwrap_err().kind(), ErrorKind::Closed);
    let again = world.open().await;
    assert_eq!(found(&again, "k").await.unwrap().0, "1", "the file is free for the next");
}

/// Who starts next in an outage would not find it.
#[tokio::test]
async fn what_is_stored_only_after_a_shutdown_is_not_acknowledged() {
    let mut world = World::new();
    let cache = world.builder().patience(10 * DEADLINE).open().await.unwrap();
    assert_eq!(cache.put("k", &1).await.unwrap(), Durability::Stored);
    world.faults.script([Fault::DelayAnswer(DEADLINE / 2)]);
    let shutdown = async {
        tokio::time::sleep(DEADLINE / 10).await;
        cache.shutdown(Duration::ZERO).await.unwrap()
    };
    let (put, left) = tokio::join!(async { cache.put("k", &2).await }, shutdown);
    let error = put.unwrap_err();
    assert_eq!((error.kind(), error.outcome_unknown()), (ErrorKind::Closed, true), "{error}");
    assert_eq!((left.unfinished, world.stored("k").await.as_deref()), (1, Some("2")));
    let again = world.open_cut_off().await;
    assert_eq!(found(&again, "k").await.unwrap().0, "1", "the last that was acknowledged");
}

#[tokio::test]
async fn a_shutdown_asks_whether_the_source_of_truth_is_back() {
    let mut world = World::new();
    let cache = world.open().await;
    world.away(&cache).await;
    for at in 0..50 {
        assert_eq!(cache.put(format!("{at}"), &at).await.unwrap(), Durability::Queued);
    }
    // Nobody has noticed yet, and the next probe may be far away.
    world.faults.heal();
    let left = cache.shutdown(Duration::from_secs(10)).await.unwrap();
    assert_eq!((left.unfinished, left.still_queued), (0, 0));
    // Where it is still away, one probe tells, and nobody waits for the deadline.
    let cache = world.open().await;
    world.away(&cache).await;
    assert_eq!(cache.put("left", &1).await.unwrap(), Durability::Queued);
    let began = std::time::Instant::now();
    let left = cache.shutdown(Duration::from_secs(10)).await.unwrap();
    assert!(left.still_queued == 1 && began.elapsed() < Duration::from_secs(5), "{left:?}");
}

#[tokio::test]
async fn the_alarm_ends_with_the_replay_and_begins_with_it_too() {
    let mut world = World::new();
    let cache = world.open().await;
    world.faults.always(Fault::Fail(ErrorKind::Denied));
    assert_eq!(cache.put("denied", &1).await.unwrap(), Durability::Queued);
    assert!(!cache.health().is_available());
    world.faults.heal();
    drained(&cache).await;
    assert!(cache.health().is_available(), "nobody but the replay has called: {:?}", cache.health());
    world.away(&cache).await;
    assert_eq!(cache.put("queued", &1).await.unwrap(), Durability::Queued);
    world.faults.always(Fault::Fail(ErrorKind::Denied));
    for _ in 0..1_500 {
        if cache.health().cause.is_some_and(|cause| cause.kind() == ErrorKind::Denied) {
            return;
        }
        sleep(10).await;
    }
    panic!("the alarm does not come: {:?}", cache.health());
}
