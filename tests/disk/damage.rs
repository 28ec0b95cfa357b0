//! Files that are damaged, somebody else's, readable by others, or that nobody may write.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use threadkeep::{Durability, ErrorKind};

use crate::log;
use crate::mount::Mount;
use crate::world::{FILE, World, directory};

const SECOND: Duration = Duration::from_secs(1);
const WRITES: u64 = 30;

/// The files in a directory, but for the index of the log, which is made anew with each start.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let files = entries.map(|path| (name(&path), fs::read(&path).unwrap()));
    files.filter(|(name, _)| !name.ends_with("-shm")).collect()
}

fn lay(dir: &Path, files: &BTreeMap<String, Vec<u8>>) {
    files.iter().for_each(|(name, bytes)| fs::write(dir.join(name), bytes).unwrap());
}

/// The files of a daemon that has kept some copies and queued some writes: as it leaves them when it ends, or when it is
/// killed after a second start.
async fn left_behind(is_killed: bool) -> BTreeMap<String, Vec<u8>> {
    let dir = directory();
    let mut world = World::new(dir.path());
    let cache = world.open().await.unwrap();
    for at in 0..100 {
        let value = format!("{at} {}", "a copy ".repeat(50));
        assert_eq!(cache.put(format!("c{at}"), &value).await.unwrap(), Durability::Stored);
    }
    world.away(&cache).await;
    for at in 0..WRITES {
        let value = format!("{at} {}", "some text ".repeat(300));
        assert_eq!(cache.put(format!("t{at}"), &value).await.unwrap(), Durability::Queued);
    }
    cache.shutdown(SECOND).await.unwrap();
    if is_killed {
        let cache = world.open_cut_off().await.unwrap();
        let _ = cache.put("t0", "once more").await.unwrap();
        return files(dir.path());
    }
    let left = files(dir.path());
    assert_eq!(left.keys().collect::<Vec<_>>(), [FILE, "q.db.lock"]);
    left
}

/// What becomes of damaged files: set aside with all their bytes and said loudly, or refused as they are, or read.
async fn start_on(left: &BTreeMap<String, Vec<u8>>, what: &str) -> &'static str {
    let dir = directory();
    lay(dir.path(), left);
    let mut world = World::new(dir.path());
    let cache = match world.open_cut_off().await {
        Ok(cache) => cache,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Local, "{what}: {error}");
            assert!(error.to_string().contains(FILE), "{what}: {error}");
            let (before, after) = (left.get("q.db-wal"), files(dir.path()));
            assert_eq!(after.get(FILE), left.get(FILE), "{what}: {error}");
            let log = after.get("q.db-wal").filter(|log| !log.is_empty());
            assert_eq!(log, before, "{what}: {error}");
            return "refused";
        }
    };
    let after = files(dir.path());
    let Some(aside) = after.get("q.db.damaged-1") else {
        // As long as the log has all pages, it does not matter what the file says in their place.
        let is_whole = cache.health().queue.unwrap().records == WRITES;
        assert!(is_whole || !left.contains_key("q.db-wal"), "{what}: something is lost");
        return "read";
    };
    assert_eq!(Some(aside), left.get(FILE), "{what}: all its bytes");
    let (before, after) = (left.get("q.db-wal"), after.get("q.db.damaged-1-wal"));
    assert_eq!(after.map_or(0, Vec::len), before.map_or(0, Vec::len), "{what}");
    assert!(after == before || before.is_none(), "{what}: those of its log, too");
    let said = log::about(dir.path());
    let is_loud = |line: &String| line.contains("ERROR") && line.contains("THE QUEUE FILE IS DAMAGED");
    assert!(said.iter().any(is_loud), "{what}: {said:?}");
    assert_eq!(cache.health().queue.unwrap().records, 0, "{what}");
    assert_eq!(cache.put("t0", "anew").await.unwrap(), Durability::Queued, "{what}");
    cache.shutdown(SECOND).await.unwrap();
    let cache = world.open_cut_off().await.unwrap();
    assert_eq!(cache.get("t0").await.unwrap().unwrap().json(), "\"anew\"", "{what}");
    assert!(!dir.path().join("q.db.damaged-2").exists(), "{what}");
    "set aside"
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_file_is_set_aside_with_all_its_bytes_and_said_loudly() {
    log::listen();
    for is_killed in [false, true] {
        let left = left_behind(is_killed).await;
        let len = left[FILE].len();
        type Damage = fn(&mut Vec<u8>);
        let all: [(&str, Damage); 5] = [
            ("the header is gone", |file| file[..100].fill(0)),
            ("pages are rubbish", |file| file[4_096..].fill_with(|| fastrand::u8(..))),
            ("the first page is rubbish", |file| file[100..4_096].fill_with(|| fastrand::u8(..))),
            ("it is text", |file| *file = b"this is no database ".repeat(1_000)),
            ("it is empty", Vec::clear),
        ];
        for (what, damage) in all {
            let mut left = left.clone();
            damage(left.get_mut(FILE).unwrap());
            let outcome = start_on(&left, what).await;
            assert!(
                outcome == "set aside" || outcome == "read" && is_killed,
                "{what}, killed {is_killed}, {len} bytes: {outcome}"
            );
        }
    }
    let whole = left_behind(false).await;
    for (what, from) in [("the end", 0.9), ("the second half", 0.5)] {
        let mut left = whole.clone();
        let file = left.get_mut(FILE).unwrap();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        file.truncate((file.len() as f64 * from) as usize);
        assert_eq!(start_on(&left, what).await, "set aside", "{what} is gone");
    }
    let mut left = whole.clone();
    let file = left.get_mut(FILE).unwrap();
    let copy = file.windows(6).rposition(|window| window == b"a copy").unwrap() / 4_096 * 4_096;
    file[copy..copy + 4_096].fill_with(|| fastrand::u8(..));
    assert_eq!(start_on(&left, "a page of copies is rubbish").await, "set aside");
    let mut left = whole.clone();
    let file = left.get_mut(FILE).unwrap();
    let text = file.windows(9).rposition(|window| window == b"some text").unwrap();
    file[text] = 0xff;
    assert_eq!(start_on(&left, "a text is none").await, "set aside");
    assert_eq!(start_on(&whole, "nothing is damaged").await, "read");
}

/// Where one bit is wrong, that may be a bit of a value; but nothing is lost silently, and nothing panics.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_with_a_wrong_bit_is_read_or_set_aside_or_refused_but_never_changed() {
    log::listen();
    let (seed, left) = (fastrand::u64(..), left_behind(false).await);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let len = left[FILE].len();
    let places: Vec<usize> = (0..100).chain((0..60).map(|_| rng.usize(100..len))).collect();
    let mut outcomes = BTreeMap::<&str, usize>::new();
    for some in places.chunks(16) {
        let starts = some.iter().map(|place| {
            let (mut left, bit) = (left.clone(), rng.u8(..8));
            left.get_mut(FILE).unwrap()[*place] ^= 1 << bit;
            async move { start_on(&left, &format!("bit {bit} of byte {place}")).await }
        });
        for outcome in futures::future::join_all(starts).await {
            *outcomes.entry(outcome).or_default() += 1;
        }
    }
    println!("{outcomes:?}");
    assert!(outcomes["set aside"] > 10, "{outcomes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_somebody_else_is_refused_again_and_again_and_left_as_it_is() {
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
    // Somebody works with it, so that it has a log.
    let _theirs = sql("busy.db", "pragma journal_mode = wal; create table theirs (x)");
    fs::write(dir.path().join("text.db"), "somebody's notes\n".repeat(100)).unwrap();
    fs::write(dir.path().join("short.db"), "notes").unwrap();
    let before = files(dir.path());
    for round in 0..3 {
        for name in ["tables.db", "marked.db", "log.db", "busy.db", "text.db", "short.db"] {
            let path = dir.path().join(name);
            let mut world = World::new(dir.path());
            let error = world.builder().queue(&path).open().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Local, "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "round {round}: {error}");
        }
    }
    let mut after = files(dir.path());
    for name in ["marked", "text", "short"] {
        assert!(!after.contains_key(&format!("{name}.db.lock")), "SQLite was not even asked about {name}");
    }
    after.retain(|name, bytes| !(name.ends_with(".lock") || name == "log.db-wal" && bytes.is_empty()));
    assert!(after == before, "{:?} and {:?}", after.keys(), before.keys());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_owner_can_read_the_file_and_what_lies_beside_it_whoever_put_it_there() {
    let dir = directory();
    for _ in 0..2 {
        let cache = World::new(dir.path()).open_cut_off().await.unwrap();
        let _ = cache.put("k", &1).await.unwrap();
        for suffix in ["", "-wal", "-shm", ".lock"] {
            let path = dir.path().join(format!("{FILE}{suffix}"));
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", path.display());
        }
        // As from a backup.
        let open_all = |suffix| {
            let path = dir.path().join(format!("{FILE}{suffix}"));
            fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        };
        ["", "-wal", "-shm", ".lock"].into_iter().for_each(open_all);
        let copy = files(dir.path());
        cache.shutdown(SECOND).await.unwrap();
        lay(dir.path(), &copy);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_cannot_be_written_is_an_error_that_says_what_to_do() {
    let mount = Mount::tmpfs("4m");
    mount.remount("ro");
    let error = World::new(mount.path()).open().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Local);
    let text = error.to_string();
    assert!(
        text.contains(FILE) && text.contains("writable") && text.contains("CONVERSATION_QUEUE_PATH"),
        "{text}"
    );
    mount.remount("rw");
    let cache = World::new(mount.path()).open_cut_off().await.unwrap();
    let _ = cache.put("k", &1).await.unwrap();
    cache.shutdown(SECOND).await.unwrap();
    let before = files(mount.path());
    mount.remount("ro");
    let error = World::new(mount.path()).open().await.unwrap_err();
    assert!(error.to_string().contains("writable"), "{error}");
    assert_eq!(files(mount.path()), before);
}
