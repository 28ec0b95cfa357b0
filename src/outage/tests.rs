mod appends;
mod clocks;
mod copies;

use std::path::Path;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::file::OutageFile;
use super::replay::Replayer;
use super::*;
use crate::model::clock::{Clock, IssuedVersion};
use crate::model::json::Json;
use crate::model::moment::test_clock;
use crate::observe::alert::OperatorAlert;
use crate::store::{Applied, LoadRequest, Loaded, Memory, Store};

const LIMITS: FileLimits = FileLimits { queue: 1 << 24, replica: 1 << 24 };
const HOUR: Duration = Duration::from_secs(3_600);

/// A file with a clock and an observer.
struct World {
    file: Arc<OutageFile>,
    clock: Arc<Clock>,
    queued: Vec<QueuedKey>,
    seen: Arc<Seen>,
}

/// The observations, as text.
#[derive(Debug, Default)]
struct Seen(Mutex<Vec<String>>);

impl Seen {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock())
    }
}

impl QueueObserver for Seen {
    fn settled(&self, key: &Key, _: Version, verdict: &Verdict, left: Option<Tail>) {
        let verdict = match verdict {
            Verdict::Stored => "stored",
            Verdict::Appended(_) => "appended",
            Verdict::Dead { .. } => "dead",
        };
        self.0.lock().push(format!("{} {verdict}, more {}", key.as_str(), left.is_some()));
    }
    fn corrected(&self, changed: &[Corrected]) {
        self.0.lock().extend(changed.iter().map(|corrected| format!("{} corrected", corrected.key.as_str())));
    }
}

impl World {
    async fn save_copy(&self, copy: ReplicaRecord) {
        self.file.submit_copies(vec![copy]).await.unwrap().await.unwrap().unwrap();
    }

    async fn open(path: &Path, clock: Clock) -> Self {
        let clock = Arc::new(clock);
        let (file, queued) = OutageFile::open(path, "here", LIMITS, Arc::clone(&clock)).await.unwrap();
        let (file, seen) = (Arc::new(file), Arc::<Seen>::default());
        file.set_observer(Arc::clone(&seen) as _);
        tokio::spawn(Arc::clone(&file).run_clock_sync());
        Self { file, clock, queued, seen }
    }

    /// Answers for a store with the correct clock.
    async fn sync(&self) {
        self.sync_to(Clock::authoritative().now()).await;
    }

    async fn sync_to(&self, shown: Timestamp) {
        // The clock notices a jump here, and ignores an answer from before.
        self.clock.now();
        let now = Instant::now();
        self.clock.correct(now, now, shown);
        assert!(self.clock.settled().await);
    }

    /// Queues a put, or an update of `base`.
    async fn queue(&self, key: &str, json: &str, base: Option<Version>) -> Version {
        let issued = self.clock.issue();
        let value = Json::new(json).unwrap();
        let record = Record::put(name(key), issued.version, value, issued.shown.plus(HOUR));
        let mut write = Write::new(record).with_writer(self.file.writer());
        write.condition = base.map_or(Condition::Any, Condition::IfVersion);
        let enqueued =
            self.file.enqueue(write, issued.is_provisional, issued.shown, None, |_| {}).await.unwrap();
        assert_eq!(enqueued, Enqueued::Queued { version: issued.version, has_appends: false });
        issued.version
    }

    /// Queues an update that was not sent.
    async fn update(&self, issued: IssuedVersion, base: Version, syncs: u64) -> Enqueued {
        let write = Write::new(Record::tombstone(name("k"), issued.version)).with_writer(self.file.writer());
        let write = write.with_if_version(base);
        let queued = self.file.enqueue(write, issued.is_provisional, issued.shown, Some(syncs), |_| {});
        queued.await.unwrap()
    }

    async fn rows(&self) -> Vec<QueuedWrite> {
        self.file.page(0, 1_000, usize::MAX).await.unwrap()
    }

    async fn replay(&self, store: &Arc<Memory>) {
        let replayer =
            Replayer::new(Arc::clone(store) as _, Arc::clone(&self.file), Arc::<OperatorAlert>::default());
        let task = tokio::spawn(replayer.run());
        let mut queue = self.file.queue();
        queue.wait_for(|queue| queue.rows == 0).await.unwrap();
        task.abort();
    }
}

fn name(key: &str) -> Key {
    Key::new(key).unwrap()
}

async fn stored(store: &Memory, key: &str) -> Option<String> {
    match store.load(&[LoadRequest::new(name(key))]).await.unwrap().remove(0) {
        Loaded::Found(record) => record.value.as_ref().map(|value| value.as_str().to_owned()),
        _ => None,
    }
}

#[tokio::test]
async fn rows_of_a_key_follow_each_other_and_a_put_replaces_them() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::authoritative()).await;
    let put = world.queue("k", "1", None).await;
    let update = world.queue("k", "2", Some(put)).await;
    assert_eq!(world.rows().await.iter().map(QueuedWrite::version).collect::<Vec<_>>(), [put, update]);
    let later = world.queue("k", "3", Some(put)).await;
    assert_eq!(world.rows().await.len(), 2, "the later update replaces the earlier one");
    let Folded::Known { record, base } = world.file.fold(&name("k")).await.unwrap() else { panic!() };
    assert_eq!((record.version, base), (later, Some(put)), "an update takes over the base of the one before");
    world.queue("k", "4", None).await;
    assert_eq!((world.rows().await.len(), world.file.usage().queue.records), (1, 1));
}

#[tokio::test]
async fn replay_sends_one_row_of_a_key_at_a_time_and_keeps_copies() {
    let dir = tempfile::tempdir().unwrap();
    let (world, store) =
        (World::open(&dir.path().join("q.db"), Clock::authoritative()).await, Arc::new(Memory::new()));
    for at in 0..300 {
        let put = world.queue(&at.to_string(), "1", None).await;
        world.queue(&at.to_string(), "2", Some(put)).await;
    }
    world.replay(&store).await;
    for at in 0..300 {
        assert_eq!(stored(&store, &at.to_string()).await.as_deref(), Some("2"));
    }
    let usage = world.file.usage();
    assert_eq!((usage.queue.records, usage.dead_letters.records, usage.replica.records), (0, 0, 300));
    let (copy, _) = world.file.lookup_replica(&name("7")).await.unwrap().unwrap();
    assert_eq!(copy.value.as_ref().unwrap().as_str(), "2");
    assert_eq!(world.seen.take().iter().filter(|seen| seen.ends_with("stored, more false")).count(), 300);
}

#[tokio::test]
async fn dead_update_keeps_its_condition() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::authoritative()).await;
    let base = Version::from_raw(6);
    let update = world.queue("k", "1", Some(base)).await;
    let newer = world.clock.issue_version();
    world.file.settle(vec![(name("k"), update, Applied::Conflict(newer))]).await.unwrap();
    let letter = world.file.dead_letters(0, 10).await.unwrap().remove(0);
    assert_eq!((letter.condition, letter.newer), (Condition::IfVersion(base), Some(newer)));
    assert_eq!(world.seen.take(), ["k dead, more false"]);
}

/// The store holds something older than the old base of an imported update. The update gets that base, and is sent again.
#[tokio::test]
async fn imported_update_over_an_older_record_is_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let (world, store) =
        (World::open(&dir.path().join("q.db"), Clock::authoritative()).await, Arc::new(Memory::new()));
    let hours_ago = |hours| Version::min_at(world.clock.now().minus(HOUR * hours));
    let value = Json::new("1").unwrap();
    let older = Record::put(name("k"), hours_ago(160), value, world.clock.now().plus(HOUR));
    assert_eq!(store.apply(&[Write::new(older)]).await.unwrap(), [Applied::Stored]);
    world.queue("k", "2", Some(hours_ago(150))).await;
    tokio::select! {
        () = world.replay(&store) => {}
        () = tokio::time::sleep(HOUR / 60) => panic!("the row is stuck"),
    }
    assert_eq!(stored(&store, "k").await.as_deref(), Some("2"));
    assert_eq!(world.file.usage().dead_letters.records, 0);
}

/// The update has read the queued put. Its value does not contain the newer write of another daemon.
#[tokio::test]
async fn update_of_a_queued_put_takes_no_newer_copy_as_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::authoritative()).await;
    let put = world.queue("k", "1", None).await;
    let newest = world.clock.issue_version();
    let newer = Record::tombstone(name("k"), newest).into();
    world
        .file
        .save_copies(vec![ReplicaRecord { record: newer, confirmed_at: Timestamp(1), rank: CopyRank::Used }])
        .await;
    let update = Write::new(Record::tombstone(name("k"), world.clock.issue_version())).with_if_version(put);
    let enqueued =
        world.file.enqueue(update, false, world.clock.now(), Some(world.file.syncs()), |_| {}).await.unwrap();
    assert_eq!((enqueued, world.rows().await.len()), (Enqueued::Conflict { newer: Some(newest) }, 1));
}

#[tokio::test]
async fn copy_beside_a_queued_write_stays_and_wins_reads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.db");
    let world = World::open(&path, Clock::authoritative()).await;
    let put = world.queue("k", "1", None).await;
    let record = Record::put(
        name("k"),
        world.clock.issue_version(),
        Json::new("2").unwrap(),
        world.clock.now().plus(HOUR),
    );
    let copy = |record: &Record| ReplicaRecord {
        record: record.clone().into(),
        confirmed_at: Timestamp(1),
        rank: CopyRank::Used,
    };
    world.save_copy(copy(&record)).await;
    world.file.close().await.unwrap();
    let world = World::open(&path, Clock::authoritative()).await;
    assert_eq!((world.queued[0].version, world.queued[0].trust), (put, QueueTrust::Superseded));
    let later = world.queue("k", "3", None).await;
    world.save_copy(copy(&Record { version: later, ..record })).await;
    assert_eq!((world.rows().await.len(), world.seen.take()), (0, vec!["k stored, more false".to_owned()]));
}

#[tokio::test]
async fn daemon_part_of_the_writer_changes_with_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (path, backup) = (dir.path().join("q.db"), dir.path().join("backup.db"));
    let open = async || {
        let world = World::open(&path, Clock::authoritative()).await;
        world.file.close().await.unwrap();
        world.file.writer()
    };
    let (first, second) = (open().await, open().await);
    assert!(first != second && first.daemon() == second.daemon());
    std::fs::copy(&path, &backup).unwrap();
    let third = open().await;
    assert_eq!(third.daemon(), second.daemon());
    std::fs::copy(&backup, &path).unwrap();
    assert_ne!(open().await.daemon(), third.daemon(), "the file was restored in place");
}

#[tokio::test]
async fn opening_issues_versions_above_the_mark() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.db");
    let world = World::open(&path, Clock::authoritative()).await;
    let sent = world.clock.issue_version();
    world.file.raise_mark(sent).await.unwrap();
    world.file.close().await.unwrap();
    let world = World::open(&path, Clock::skewed(-1_000)).await;
    assert!(world.clock.issue_version() > sent);
    let put = world.queue("k", "1", None).await;
    world.sync().await;
    assert!(world.rows().await[0].version() > sent && put > sent && world.clock.issue_version() > sent);
}

#[tokio::test]
async fn file_of_format_1_is_converted_without_loss() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.db");
    rusqlite::Connection::open(&path).unwrap().execute_batch(include_str!("tests/format_1.sql")).unwrap();
    let world = World::open(&path, Clock::new()).await;
    let at = |millis: i64| Version::min_at(Timestamp(millis));
    let rows = world.rows().await;
    let row = |at: usize| (rows[at].key().as_str(), rows[at].write.condition, rows[at].is_provisional);
    let update_of = Condition::IfVersion;
    assert_eq!(row(0), ("put", Condition::Any, false));
    assert_eq!(row(1), ("update", update_of(Version::from_raw(7)), false));
    assert_eq!((row(2).0, row(3)), ("updated put", ("superseded", Condition::Any, false)));
    assert_eq!(rows[2].write.condition, update_of(rows[4].version()), "the put of the update is a row again");
    assert_eq!((row(4), rows.len()), (("updated put", Condition::Any, true), 5));
    assert!(rows[4].version() == at(35) && rows[2].version() > rows[4].version());
    let trust = |key: &str| world.queued.iter().find(|queued| queued.key.as_str() == key).unwrap().trust;
    assert_eq!((trust("superseded"), trust("put")), (QueueTrust::Unverified, QueueTrust::Unverified));
    assert_eq!(world.file.dead_letters(0, 10).await.unwrap()[0].newer, Some(at(6)));
    assert!(world.file.lookup_replica(&name("copy")).await.unwrap().is_some());
    assert_eq!(world.file.usage().queue, Usage { records: 5, bytes: 1_500 });
}

/// The first building had other names in the same format.
#[tokio::test]
async fn file_of_the_first_building_is_rejected_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.db");
    let first = "create table about (name text not null primary key, value text not null) strict;
                 insert into about values ('role', 'queue');
                 create table records (key text primary key, pending integer);
                 pragma application_id = 0x74686b70; pragma user_version = 1;";
    rusqlite::Connection::open(&path).unwrap().execute_batch(first).unwrap();
    let error = OutageFile::open(&path, "here", LIMITS, Arc::default()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("queue export") && text.contains("queue import"), "{text}");
}

/// Clock sync came between the read of the base and the queue. The base has another version now.
#[tokio::test]
async fn update_that_read_before_the_sync_runs_again() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::skewed(-300_000)).await;
    let syncs = world.file.syncs();
    let base = world.queue("k", "1", None).await;
    let early = world.clock.issue();
    world.sync().await;
    // One that was issued before the sync, and one that was issued after it.
    for issued in [early, world.clock.issue()] {
        assert_eq!(world.update(issued, base, syncs).await, Enqueued::Conflict { newer: None });
    }
    let base = world.rows().await[0].version();
    let again = world.update(world.clock.issue(), base, world.file.syncs()).await;
    assert!(matches!(again, Enqueued::Queued { .. }), "{again:?}");
    assert_eq!(world.rows().await[1].write.condition, Condition::IfVersion(base));
}

#[tokio::test]
async fn unsent_update_below_a_known_version_runs_again() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::authoritative()).await;
    let (base, newer) = (world.clock.issue_version(), world.clock.issue_version());
    let tombstone = Record::tombstone(name("k"), newer).into();
    let copy = ReplicaRecord { record: tombstone, confirmed_at: Timestamp(1), rank: CopyRank::Used };
    world.save_copy(copy).await;
    let outcome = world.update(world.clock.issue(), base, world.file.syncs()).await;
    assert_eq!((outcome, world.rows().await.len()), (Enqueued::Conflict { newer: Some(newer) }, 0));
}

/// The store has lost the newer version, so the file forgets it, too. Within a minute, a late answer would look the same.
#[tokio::test]
async fn update_after_the_store_lost_its_rows_is_queued() {
    for (age, is_restored) in [(Duration::ZERO, false), (HOUR, false), (HOUR, true)] {
        let dir = tempfile::tempdir().unwrap();
        let world = World::open(&dir.path().join("q.db"), Clock::authoritative()).await;
        let (older, newer, now) =
            (world.clock.issue_version(), world.clock.issue_version(), world.clock.now());
        let restored = if is_restored { older } else { Version::NONE };
        for (version, confirmed_at) in [(newer, now.minus(age)), (restored, now)] {
            let record = Record::tombstone(name("k"), version).into();
            world.file.save_copies(vec![ReplicaRecord { record, confirmed_at, rank: CopyRank::Used }]).await;
        }
        let outcome = world.update(world.clock.issue(), restored, world.file.syncs()).await;
        assert_eq!(matches!(outcome, Enqueued::Queued { .. }), age == HOUR, "{outcome:?}");
    }
}

/// A reader that found memory and file apart waits for this.
#[tokio::test]
async fn row_of_the_same_size_wakes_the_waiters() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::authoritative()).await;
    world.queue("first", "1", None).await;
    world.queue("k", "1", None).await;
    let mut queue = world.file.queue();
    let before = *queue.borrow_and_update();
    world.queue("k", "2", None).await;
    assert!(queue.has_changed().unwrap() && *queue.borrow() == before);
}

#[tokio::test]
async fn save_copies_waits_for_writes_queued_before() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::authoritative()).await;
    let record = || {
        let issued = world.clock.issue();
        Record::put(name("k"), issued.version, Json::trusted("1"), issued.shown.plus(HOUR))
    };
    let (stored, write) = (record(), Write::new(record()).with_writer(world.file.writer()));
    let (committed, on_committed) = tokio::sync::oneshot::channel();
    let (release, hold) = std::sync::mpsc::channel::<()>();
    let on_commit = move |_: &Enqueued| {
        committed.send(()).unwrap();
        hold.recv().ok();
    };
    let now = world.clock.now();
    let enqueue = async { world.file.enqueue(write, false, now, None, on_commit).await.unwrap() };
    let save = async {
        on_committed.await.unwrap();
        let copy = ReplicaRecord { record: stored.into(), confirmed_at: now, rank: CopyRank::Used };
        let mut save = std::pin::pin!(world.file.save_copies(vec![copy]));
        tokio::select! {
            () = &mut save => panic!("the copies returned before the index had the queued write"),
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
        release.send(()).unwrap();
        save.await;
    };
    tokio::join!(enqueue, save);
}
