//! A file that loses its name while it is open: deleted, moved away, replaced.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use threadkeep::{Cache, Durability, ErrorKind};

use crate::log;
use crate::world::{World, directory, drained, held};

const SECOND: Duration = Duration::from_secs(1);

fn beside(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
}

type Loss = fn(&Path);

/// The ways to lose a name that were seen in the field.
const LOSSES: [(&str, Loss); 10] = [
    ("the file is deleted", |path| fs::remove_file(path).unwrap()),
    ("the file is moved away", |path| fs::rename(path, beside(path, ".old")).unwrap()),
    ("the file is moved to another directory", |path| {
        let other = path.parent().unwrap().join("other");
        fs::create_dir(&other).unwrap();
        fs::rename(path, other.join("q.db")).unwrap();
    }),
    ("the file is replaced by an empty one", |path| {
        fs::remove_file(path).unwrap();
        fs::write(path, "").unwrap();
    }),
    ("the file is replaced by its copy", |path| {
        fs::copy(path, beside(path, ".copy")).unwrap();
        fs::rename(beside(path, ".copy"), path).unwrap();
    }),
    ("the directory is deleted", |path| fs::remove_dir_all(path.parent().unwrap()).unwrap()),
    ("the directory is moved away", |path| {
        let directory = path.parent().unwrap();
        fs::rename(directory, beside(directory, ".old")).unwrap();
    }),
    ("the log is deleted", |path| fs::remove_file(beside(path, "-wal")).unwrap()),
    ("the index of the log is deleted", |path| fs::remove_file(beside(path, "-shm")).unwrap()),
    ("the lock is deleted", |path| fs::remove_file(beside(path, ".lock")).unwrap()),
];

/// Waits for the health to say that the file is at fault, and prints how long that took.
async fn noticed(cache: &Cache, what: &str) {
    let began = Instant::now();
    loop {
        let health = cache.health();
        let of_queue = health.queue.as_ref().and_then(|queue| queue.fault.clone());
        if let Some(fault) = health.cause.filter(|cause| cause.kind() == ErrorKind::Local).or(of_queue) {
            let (took, text) = (began.elapsed(), fault.to_string());
            println!("{what}: noticed after {took:?}: {text}");
            assert!(text.contains("restart the daemon") && text.contains("/proc/"), "{what}: {text}");
            return;
        }
        assert!(began.elapsed() < 30 * SECOND, "{what}: nobody noticed");
        tokio::time::sleep(SECOND / 100).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queue_without_name_is_noticed_and_acknowledges_nothing() {
    log::listen();
    for (what, lose) in LOSSES {
        let parent = directory();
        let dir = parent.path().join("daemon");
        fs::create_dir(&dir).unwrap();
        let mut world = World::new(&dir);
        let cache = world.open_cut_off().await.unwrap();
        assert_eq!(cache.put("before", &1).await.unwrap(), Durability::Queued, "{what}");
        lose(&world.path());
        noticed(&cache, what).await;
        let error = cache.put("after", &2).await.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Local, "{what}: {error}");
        assert_eq!(cache.health().can_write().unwrap_err().kind(), ErrorKind::Local, "{what}");
        let said = log::about(&dir);
        let is_loud = |line: &String| line.contains("ERROR") && line.contains("HAS LOST ITS NAME");
        assert!(said.iter().any(is_loud), "{what}: {said:?}");
        // What was acknowledged before is read, and reaches the store when that is back.
        assert_eq!(cache.get("before").await.unwrap().unwrap().json(), "1", "{what}");
        world.back(&cache).await;
        drained(&cache).await;
        assert_eq!(cache.put("after", &2).await.unwrap(), Durability::Stored, "{what}");
        assert_eq!(cache.get("before").await.unwrap().unwrap().json(), "1", "{what}");
        cache.shutdown(SECOND).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queue_without_name_is_noticed_without_traffic() {
    for (what, lose) in LOSSES {
        let parent = directory();
        let dir = parent.path().join("daemon");
        fs::create_dir(&dir).unwrap();
        let mut world = World::new(&dir);
        let cache = world.open().await.unwrap();
        assert_eq!(cache.put("before", &1).await.unwrap(), Durability::Stored, "{what}");
        lose(&world.path());
        noticed(&cache, what).await;
        assert!(cache.health().is_available(), "{what}: the store is well");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_file_without_name_is_noticed_and_acknowledges_nothing() {
    for (what, lose) in LOSSES {
        let parent = directory();
        let dir = parent.path().join("daemon");
        fs::create_dir(&dir).unwrap();
        let path = dir.join("q.db");
        let cache = Cache::builder().local(&path).open().await.unwrap();
        assert_eq!(cache.put("before", &1).await.unwrap(), Durability::Stored, "{what}");
        lose(&path);
        noticed(&cache, what).await;
        let error = cache.put("after", &2).await.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Local, "{what}: {error}");
        let error = cache.update("before", |_: Option<u8>| Ok(Some(2))).await.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Local, "{what}: {error}");
        assert_eq!(cache.remove("before").await.expect_err(what).kind(), ErrorKind::Local, "{what}");
        assert!(!cache.health().is_available(), "{what}");
        assert_eq!(cache.get("before").await.unwrap().unwrap().json(), "1", "{what}");
        assert!(cache.get("after").await.unwrap().is_none(), "{what}: an error leaves nothing behind");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemon_whose_file_was_deleted_begins_a_new_one_when_it_is_restarted() {
    let dir = directory();
    let path = dir.path().join("q.db");
    let cache = Cache::builder().local(&path).open().await.unwrap();
    assert_eq!(cache.put("before", &1).await.unwrap(), Durability::Stored);
    fs::remove_file(&path).unwrap();
    assert_eq!(cache.put("after", &2).await.expect_err("at once").kind(), ErrorKind::Local);
    noticed(&cache, "deleted").await;
    cache.shutdown(SECOND).await.unwrap();
    drop(cache);
    fs::rename(beside(&path, "-wal"), beside(&path, "-wal.old")).unwrap();
    let cache = Cache::builder().local(&path).open().await.unwrap();
    assert!(cache.get("before").await.unwrap().is_none());
    assert_eq!(cache.put("after", &2).await.unwrap(), Durability::Stored);
}

/// The next start would find another file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn link_that_leads_to_another_file_is_noticed() {
    let dir = directory();
    let (one, other, link) = (dir.path().join("one"), dir.path().join("other"), dir.path().join("link"));
    fs::create_dir(&one).unwrap();
    fs::create_dir(&other).unwrap();
    std::os::unix::fs::symlink(&one, &link).unwrap();
    let cache = Cache::builder().local(link.join("q.db")).open().await.unwrap();
    assert_eq!(cache.put("before", &1).await.unwrap(), Durability::Stored);
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&other, &link).unwrap();
    noticed(&cache, "the link leads elsewhere").await;
    assert_eq!(cache.put("after", &2).await.unwrap_err().kind(), ErrorKind::Local);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_that_gets_its_name_back_takes_writes_again() {
    let dir = directory();
    let mut world = World::new(dir.path());
    let cache = world.open_cut_off().await.unwrap();
    assert_eq!(cache.put("before", &1).await.unwrap(), Durability::Queued);
    fs::rename(world.path(), beside(&world.path(), ".old")).unwrap();
    noticed(&cache, "moved away").await;
    fs::rename(beside(&world.path(), ".old"), world.path()).unwrap();
    let began = Instant::now();
    while cache.health().queue.unwrap().fault.is_some() {
        assert!(began.elapsed() < 30 * SECOND, "{:?}", cache.health());
        tokio::time::sleep(SECOND / 100).await;
    }
    assert_eq!(cache.put("after", &2).await.unwrap(), Durability::Queued);
    cache.shutdown(SECOND).await.unwrap();
    assert_eq!(held(&world.path()).len(), 2);
}

/// As after `kill -9`: only what lies at the path counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queued_writes_survive_the_loss_of_the_log_and_a_kill() {
    for suffix in ["-wal", "-shm"] {
        let dir = directory();
        let mut world = World::new(dir.path());
        let cache = world.open_cut_off().await.unwrap();
        for at in 0..50 {
            assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap(), Durability::Queued);
        }
        fs::remove_file(beside(&world.path(), suffix)).unwrap();
        noticed(&cache, suffix).await;
        let copy = directory();
        let (copied, began) = (copy.path().join("q.db"), Instant::now());
        loop {
            fs::copy(world.path(), &copied).unwrap();
            fs::copy(beside(&world.path(), "-wal"), beside(&copied, "-wal")).ok();
            if held(&copied).len() == 50 {
                break;
            }
            assert!(began.elapsed() < 30 * SECOND, "{suffix}: {} of 50", held(&copied).len());
            tokio::time::sleep(SECOND / 10).await;
        }
    }
}

/// OPERATIONS.md says how: the process still has the file, and nobody writes into it.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_local_file_can_be_copied_out_of_the_process() {
    let dir = directory();
    let path = dir.path().join("q.db");
    let cache = Cache::builder().local(&path).open().await.unwrap();
    for at in 0..50 {
        assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap(), Durability::Stored);
    }
    for suffix in ["", "-wal", "-shm"] {
        fs::remove_file(beside(&path, suffix)).unwrap();
    }
    noticed(&cache, "deleted").await;
    let saved = directory();
    for open in fs::read_dir("/proc/self/fd").unwrap().map(|open| open.unwrap().path()) {
        let Ok(name) = fs::read_link(&open) else { continue };
        let Some(name) = name.to_str().and_then(|name| name.strip_suffix(" (deleted)")) else { continue };
        let Ok(name) = Path::new(name).strip_prefix(dir.path()) else { continue };
        if !name.to_str().unwrap().ends_with("-shm") {
            fs::copy(&open, saved.path().join(name)).unwrap();
        }
    }
    cache.shutdown(SECOND).await.unwrap();
    let cache = Cache::builder().local(saved.path().join("q.db")).open().await.unwrap();
    for at in 0..50 {
        assert_eq!(cache.get(format!("t{at}")).await.unwrap().unwrap().json(), at.to_string());
    }
}

/// SQLite deletes the log by its name when it closes a file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn end_of_a_nameless_file_leaves_the_files_of_its_successor_alone() {
    let dir = directory();
    let path = dir.path().join("q.db");
    let first = Cache::builder().local(&path).open().await.unwrap();
    assert_eq!(first.put("of the first", &1).await.unwrap(), Durability::Stored);
    for suffix in ["", "-wal", "-shm", ".lock"] {
        fs::remove_file(beside(&path, suffix)).unwrap();
    }
    let second = Cache::builder().local(&path).open().await.unwrap();
    assert_eq!(second.put("of the second", &2).await.unwrap(), Durability::Stored);
    first.shutdown(SECOND).await.unwrap();
    drop(first);
    assert!(beside(&path, "-wal").exists(), "the log of the second is there");
    assert_eq!(second.put("of the second", &3).await.unwrap(), Durability::Stored);
    second.shutdown(SECOND).await.unwrap();
    drop(second);
    let second = Cache::builder().local(&path).open().await.unwrap();
    assert_eq!(second.get("of the second").await.unwrap().unwrap().json(), "3");
    assert!(second.get("of the first").await.unwrap().is_none());
}
