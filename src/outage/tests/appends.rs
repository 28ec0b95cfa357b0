//! Appends in the outage file: the format, the value that a reader sees, and the end of a row.

use super::*;
use crate::model::append::{Append, ArrayPath};
use crate::outage::admin::QueueAdmin;

impl World {
    /// Queues an append to the conversation itself.
    async fn append(&self, key: &str, items: &str) -> Version {
        let issued = self.clock.issue();
        let record =
            Record::put(name(key), issued.version, Json::new(items).unwrap(), issued.shown.plus(HOUR));
        let write = Write::new(record).with_writer(self.file.writer());
        let write = write.with_append(Append::new(ArrayPath::default(), 1_000));
        let enqueued = self.file.enqueue(write, issued.is_provisional, issued.shown, None, |_| {});
        assert_eq!(enqueued.await.unwrap(), Enqueued::Queued { version: issued.version, has_appends: true });
        issued.version
    }

    /// Saves a copy. Without a value, it tells only that the store holds this version.
    async fn save(&self, key: &str, version: Version, json: Option<&str>) {
        let mut record = Record::tombstone(name(key), version);
        record.value = json.map(|json| Json::new(json).unwrap());
        record.expires_at = self.clock.now().plus(HOUR);
        let copy =
            ReplicaRecord { record: record.into(), confirmed_at: self.clock.now(), rank: CopyRank::Used };
        self.save_copy(copy).await;
    }

    /// Returns the value with queued writes, and the base of an update.
    async fn folded(&self, key: &str) -> Option<(String, Option<Version>)> {
        match self.file.fold(&name(key)).await.unwrap() {
            Folded::Known { record, base } => {
                Some((record.value.as_ref().map_or("none", Json::as_str).to_owned(), base))
            }
            Folded::Unknown { .. } => None,
            Folded::Nothing => panic!("nothing is queued"),
        }
    }

    async fn copy(&self, key: &str) -> Option<(String, Version)> {
        let (copy, _) = self.file.lookup_replica(&name(key)).await.unwrap()?;
        Some((copy.value.as_ref().unwrap().as_str().to_owned(), copy.version))
    }
}

async fn world() -> (tempfile::TempDir, World) {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::authoritative()).await;
    (dir, world)
}

#[tokio::test]
async fn file_of_format_2_is_converted_and_takes_appends() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("q.db"), dir.path().join("other.db"));
    rusqlite::Connection::open(&path).unwrap().execute_batch(include_str!("format_2.sql")).unwrap();
    std::fs::copy(&path, &other).unwrap();
    for is_first in [true, false] {
        let world = World::open(&path, Clock::authoritative()).await;
        let rows = world.rows().await;
        assert!(rows.iter().take(3).all(|row| row.write.append.is_none()));
        let update = Condition::IfVersion(Version::min_at(Timestamp(10)));
        assert_eq!((rows[0].write.condition, rows[0].key().as_str()), (update, "copy"));
        assert_eq!(world.file.dead_letters(0, 10).await.unwrap()[0].append, None);
        let append = if is_first { world.append("copy", "[3]").await } else { rows[3].version() };
        assert_eq!(world.folded("copy").await.unwrap().0, "[1,2,3]");
        let row = world.rows().await.pop().unwrap();
        assert_eq!((row.version(), row.write.append.unwrap().max_bytes), (append, 1_000));
        world.file.close().await.unwrap();
    }
    // A file of format 2 that was set aside is read as it is.
    let admin = QueueAdmin::open_for(dir.path().join("new.db"), "here").await.unwrap();
    let report = admin.import_file(&other, false).await.unwrap();
    assert_eq!((report.queued, report.dead_letters, report.unreadable), (3, 1, 0));
    let format = rusqlite::Connection::open(&other).unwrap();
    assert_eq!(format.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0)).unwrap(), 2);
}

#[tokio::test]
async fn value_is_unknown_without_a_certain_beginning() {
    let (_dir, world) = world().await;
    let older = world.clock.issue_version();
    let append = world.append("k", "[2]").await;
    assert_eq!(world.folded("k").await, None, "no copy");
    world.save("k", older, None).await;
    assert_eq!(world.folded("k").await, None, "the copy has no value");
    world.save("k", older, Some("[1]")).await;
    assert_eq!(world.folded("k").await, Some(("[1,2]".into(), Some(older))));
    world.append("k", "[3]").await;
    world.save("k", append.shifted(1), Some("[1,9,2]")).await;
    assert_eq!(world.folded("k").await, None, "the copy may have the first append");
    let issued = world.clock.issue();
    let update = world.update(issued, append.shifted(1), world.file.syncs()).await;
    assert_eq!(update, Enqueued::Conflict { newer: None }, "an update lacks the queued appends");
    world.queue("k", "[7]", None).await;
    world.append("k", "[8]").await;
    assert_eq!(world.folded("k").await.unwrap().0, "[7,8]");
    // The store may have been seen with a newer version than the put.
    world.file.drop_copies(None).await.unwrap();
    assert_eq!(world.folded("k").await, None);
}

#[tokio::test]
async fn answer_merges_the_items_into_the_copy_before() {
    let (_dir, world) = world().await;
    let older = world.clock.issue_version();
    for key in ["follows", "behind", "repeated", "same"] {
        world.save(key, older, Some("[1]")).await;
    }
    let settle = async |key: &str, version: Version, applied: Applied| {
        let verdicts = world.file.settle(vec![(name(key), version, applied)]).await.unwrap();
        verdicts.into_iter().next().unwrap().unwrap()
    };
    let appended = |version: Version, over| Applied::Appended { version, over, length: 2 };
    let first = world.append("follows", "[2]").await;
    assert_eq!(settle("follows", first, appended(first, older)).await, Verdict::Appended(first));
    assert_eq!(world.copy("follows").await, Some(("[1,2]".into(), first)));
    let behind = world.append("behind", "[2]").await;
    let (over, after) = (older.shifted(1), behind.shifted(1));
    assert_eq!(settle("behind", behind, appended(after, over)).await, Verdict::Appended(after));
    let repeated = world.append("repeated", "[2]").await;
    let above = Version::from_raw(repeated.raw() + 1);
    assert_eq!(settle("repeated", repeated, Applied::AppendedBefore(above)).await, Verdict::Appended(above));
    assert_eq!((world.copy("behind").await, world.copy("repeated").await), (None, None));
    let new = world.append("new", "[2]").await;
    assert_eq!(settle("new", new, appended(new, Version::NONE)).await, Verdict::Appended(new));
    assert_eq!(world.copy("new").await, Some(("[2]".into(), new)));
    let same = world.append("same", "[2]").await;
    world.save("same", same, Some("[1,2]")).await;
    assert_eq!(world.copy("same").await, Some(("[1,2]".into(), same)), "a load found the append");
    assert!(world.rows().await.is_empty());
    let usage = world.file.usage();
    assert_eq!((usage.queue, usage.replica.records), (Usage::default(), 5));
    assert!(world.seen.take().iter().all(|seen| seen.ends_with("appended, more false")));
}

#[tokio::test]
async fn provisional_appends_keep_their_place_at_the_sync() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::skewed(-300_000)).await;
    world.queue("k", "[1]", None).await;
    world.append("k", "[2]").await;
    world.append("k", "[3]").await;
    assert_eq!(world.folded("k").await.unwrap().0, "[1,2,3]");
    world.sync().await;
    let rows = world.rows().await;
    assert!(rows.iter().all(|row| !row.is_provisional));
    assert!(rows.windows(2).all(|pair| pair[0].version() < pair[1].version()));
    assert_eq!(world.folded("k").await, Some(("[1,2,3]".into(), Some(rows[0].version()))));
    let store = Arc::new(Memory::new());
    world.replay(&store).await;
    assert_eq!(stored(&store, "k").await.as_deref(), Some("[1,2,3]"));
    assert_eq!(world.copy("k").await.unwrap().0, "[1,2,3]");
}

/// An append that expired in the queue still belongs to a conversation that lives longer.
#[tokio::test]
async fn expired_append_reaches_a_conversation_that_lives() {
    let (_dir, world) = world().await;
    let store = Arc::new(Memory::new());
    let put = Record::put(
        name("k"),
        world.clock.issue_version(),
        Json::new("[1]").unwrap(),
        world.clock.now().plus(HOUR),
    );
    store.apply(&[Write::new(put)]).await.unwrap();
    let issued = world.clock.issue();
    let items = Record::put(name("k"), issued.version, Json::new("[2]").unwrap(), issued.version.at());
    let write = Write::new(items).with_writer(world.file.writer());
    let write = write.with_append(Append::new(ArrayPath::default(), 1_000));
    world.file.enqueue(write, false, issued.shown, None, |_| {}).await.unwrap();
    world.replay(&store).await;
    assert_eq!(stored(&store, "k").await.as_deref(), Some("[1,2]"));
}
