//! Outage files that are corrupt, foreign, readable by other users, or read-only.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use threadkeep::{ErrorKind, WriteOutcome};

use crate::log;
use crate::mount::Mount;
use crate::world::{FILE, World, directory};

const SECOND: Duration = Duration::from_secs(1);
const WRITES: u64 = 30;

/// Reads the files of a directory without the index of the write-ahead log. Each start rebuilds that index.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let files = entries.map(|path| (name(&path), fs::read(&path).unwrap()));
    files.filter(|(name, _)| !name.ends_with("-shm")).collect()
}

fn write_files(dir: &Path, files: &BTreeMap<String, Vec<u8>>) {
    files.iter().for_each(|(name, bytes)| fs::write(dir.join(name), bytes).unwrap());
}

/// Returns the files of a daemon with copies in the replica and writes in the queue.
///
/// The daemon ends normally, or it is killed after a second start.
async fn daemon_files(is_killed: bool) -> BTreeMap<String, Vec<u8>> {
    let dir = directory();
    let mut world = World::new(dir.path());
    let cache = world.open().await.unwrap();
    for at in 0..100 {
        let value = format!("{at} {}", "a copy ".repeat(50));
        assert_eq!(cache.put(format!("c{at}"), &value).await.unwrap(), WriteOutcome::Stored);
    }
    world.start_outage(&cache).await;
    for at in 0..WRITES {
        let value = format!("{at} {}", "some text ".repeat(300));
        assert_eq!(cache.put(format!("t{at}"), &value).await.unwrap(), WriteOutcome::Queued);
    }
    cache.shutdown(SECOND).await.unwrap();
    if is_killed {
        let cache = world.open_in_outage().await.unwrap();
        cache.put("t0", "once more").await.unwrap();
        return files(dir.path());
    }
    let files_before = files(dir.path());
    assert_eq!(files_before.keys().collect::<Vec<_>>(), [FILE, "q.db.lock"]);
    files_before
}

/// Opens a cache on these files, and returns the outcome.
///
/// `quarantined`: the cache renamed the files, kept all bytes and logged an error. `rejected`: the open failed and left the
/// files unchanged. `read`: the cache read the files.
async fn open_on(files_before: &BTreeMap<String, Vec<u8>>, context: &str) -> &'static str {
    let dir = directory();
    write_files(dir.path(), files_before);
    let mut world = World::new(dir.path());
    let cache = match world.open_in_outage().await {
        Ok(cache) => cache,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::LocalStorage, "{context}: {error}");
            assert!(error.to_string().contains(FILE), "{context}: {error}");
            let (before, after) = (files_before.get("q.db-wal"), files(dir.path()));
            assert_eq!(after.get(FILE), files_before.get(FILE), "{context}: {error}");
            let log = after.get("q.db-wal").filter(|log| !log.is_empty());
            assert_eq!(log, before, "{context}: {error}");
            return "rejected";
        }
    };
    let after = files(dir.path());
    let Some(quarantined) = after.get("q.db.corrupt-1") else {
        // If the write-ahead log has all pages, the pages in the file do not matter.
        let is_whole = cache.health().queue.unwrap().records == WRITES;
        assert!(is_whole || !files_before.contains_key("q.db-wal"), "{context}: a queued write is lost");
        return "read";
    };
    assert_eq!(Some(quarantined), files_before.get(FILE), "{context}: the quarantined file has all bytes");
    let (before, after) = (files_before.get("q.db-wal"), after.get("q.db.corrupt-1-wal"));
    assert_eq!(after.map_or(0, Vec::len), before.map_or(0, Vec::len), "{context}");
    assert!(after == before || before.is_none(), "{context}: the quarantined log has all bytes");
    let lines = log::about(dir.path());
    let is_error = |line: &String| line.contains("ERROR") && line.contains("the outage file is corrupt");
    assert!(lines.iter().any(is_error), "{context}: {lines:?}");
    assert_eq!(cache.health().queue.unwrap().records, 0, "{context}");
    assert_eq!(cache.put("t0", "anew").await.unwrap(), WriteOutcome::Queued, "{context}");
    cache.shutdown(SECOND).await.unwrap();
    let cache = world.open_in_outage().await.unwrap();
    assert_eq!(cache.get("t0").await.unwrap().unwrap().json(), "\"anew\"", "{context}");
    assert!(!dir.path().join("q.db.corrupt-2").exists(), "{context}");
    "quarantined"
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn corrupt_file_is_quarantined_complete_with_an_error_line() {
    log::listen();
    for is_killed in [false, true] {
        let files_before = daemon_files(is_killed).await;
        let len = files_before[FILE].len();
        type Damage = fn(&mut Vec<u8>);
        let damages: [(&str, Damage); 5] = [
            ("the header is zeroed", |file| file[..100].fill(0)),
            ("the pages are random", |file| file[4_096..].fill_with(|| fastrand::u8(..))),
            ("the first page is random", |file| file[100..4_096].fill_with(|| fastrand::u8(..))),
            ("the file is text", |file| *file = b"this is no database ".repeat(1_000)),
            ("the file is empty", Vec::clear),
        ];
        for (context, damage) in damages {
            let mut files_before = files_before.clone();
            damage(files_before.get_mut(FILE).unwrap());
            let outcome = open_on(&files_before, context).await;
            assert!(
                outcome == "quarantined" || outcome == "read" && is_killed,
                "{context}, killed {is_killed}, {len} bytes: {outcome}"
            );
        }
    }
    let whole = daemon_files(false).await;
    for (context, from) in [("the end is missing", 0.9), ("the second half is missing", 0.5)] {
        let mut files_before = whole.clone();
        let file = files_before.get_mut(FILE).unwrap();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        file.truncate((file.len() as f64 * from) as usize);
        assert_eq!(open_on(&files_before, context).await, "quarantined", "{context}");
    }
    let mut files_before = whole.clone();
    let file = files_before.get_mut(FILE).unwrap();
    let copy = file.windows(6).rposition(|window| window == b"a copy").unwrap() / 4_096 * 4_096;
    file[copy..copy + 4_096].fill_with(|| fastrand::u8(..));
    assert_eq!(open_on(&files_before, "a page of copies is random").await, "quarantined");
    let mut files_before = whole.clone();
    let file = files_before.get_mut(FILE).unwrap();
    let text = file.windows(9).rposition(|window| window == b"some text").unwrap();
    file[text] = 0xff;
    assert_eq!(open_on(&files_before, "a text is not UTF-8").await, "quarantined");
    assert_eq!(open_on(&whole, "the file is whole").await, "read");
}

/// The flipped bit may be in a value. No queued write is lost without a log line, and no call panics.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_with_one_flipped_bit_is_never_changed() {
    log::listen();
    let (seed, files_before) = (fastrand::u64(..), daemon_files(false).await);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let len = files_before[FILE].len();
    let positions: Vec<usize> = (0..100).chain((0..60).map(|_| rng.usize(100..len))).collect();
    let mut outcomes = BTreeMap::<&str, usize>::new();
    for chunk in positions.chunks(16) {
        let starts = chunk.iter().map(|position| {
            let (mut files_before, bit) = (files_before.clone(), rng.u8(..8));
            files_before.get_mut(FILE).unwrap()[*position] ^= 1 << bit;
            async move { open_on(&files_before, &format!("bit {bit} of byte {position}")).await }
        });
        for outcome in futures::future::join_all(starts).await {
            *outcomes.entry(outcome).or_default() += 1;
        }
    }
    println!("{outcomes:?}");
    assert!(outcomes["quarantined"] > 10, "{outcomes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_file_is_rejected_unchanged_each_time() {
    log::listen();
    let dir = directory();
    let sql = |name: &str, text: &str| {
        let connection = rusqlite::Connection::open(dir.path().join(name)).unwrap();
        connection.execute_batch(text).unwrap();
        connection
    };
    drop(sql("tables.db", "create table theirs (x); insert into theirs values (1)"));
    drop(sql("marked.db", "pragma application_id = 99; create table theirs (x)"));
    drop(sql("log.db", "pragma journal_mode = wal; create table theirs (x)"));
    // The open connection keeps a write-ahead log.
    let _theirs = sql("busy.db", "pragma journal_mode = wal; create table theirs (x)");
    fs::write(dir.path().join("text.db"), "foreign notes\n".repeat(100)).unwrap();
    fs::write(dir.path().join("short.db"), "notes").unwrap();
    let before = files(dir.path());
    for round in 0..3 {
        for name in ["tables.db", "marked.db", "log.db", "busy.db", "text.db", "short.db"] {
            let path = dir.path().join(name);
            let mut world = World::new(dir.path());
            let error = world.builder().queue(&path).open().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::LocalStorage, "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "round {round}: {error}");
        }
    }
    let mut after = files(dir.path());
    for name in ["marked", "text", "short"] {
        assert!(
            !after.contains_key(&format!("{name}.db.lock")),
            "the cache rejects {name} before it locks the file"
        );
    }
    after.retain(|name, bytes| !(name.ends_with(".lock") || name == "log.db-wal" && bytes.is_empty()));
    assert!(after == before, "{:?} and {:?}", after.keys(), before.keys());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outage_files_are_readable_by_the_owner_only() {
    let dir = directory();
    for _ in 0..2 {
        let cache = World::new(dir.path()).open_in_outage().await.unwrap();
        cache.put("k", &1).await.unwrap();
        for suffix in ["", "-wal", "-shm", ".lock"] {
            let path = dir.path().join(format!("{FILE}{suffix}"));
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", path.display());
        }
        // A backup may restore the files with wider permissions.
        let widen = |suffix| {
            let path = dir.path().join(format!("{FILE}{suffix}"));
            fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        };
        ["", "-wal", "-shm", ".lock"].into_iter().for_each(widen);
        let copy = files(dir.path());
        cache.shutdown(SECOND).await.unwrap();
        write_files(dir.path(), &copy);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_only_directory_fails_open_with_a_remedy() {
    let mount = Mount::tmpfs("4m");
    mount.remount("ro");
    let error = World::new(mount.path()).open().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LocalStorage);
    let text = error.to_string();
    assert!(
        text.contains(FILE) && text.contains("writable") && text.contains("CONVERSATION_QUEUE_PATH"),
        "{text}"
    );
    mount.remount("rw");
    let cache = World::new(mount.path()).open_in_outage().await.unwrap();
    cache.put("k", &1).await.unwrap();
    cache.shutdown(SECOND).await.unwrap();
    let before = files(mount.path());
    mount.remount("ro");
    let error = World::new(mount.path()).open().await.unwrap_err();
    assert!(error.to_string().contains("writable"), "{error}");
    assert_eq!(files(mount.path()), before);
}
