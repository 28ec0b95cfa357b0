//! An open file that loses its name: deleted, moved or replaced.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use threadkeep::{Cache, ErrorKind, WriteOutcome};

use crate::log;
use crate::world::{World, contents, directory, wait_until_drained};

const SECOND: Duration = Duration::from_secs(1);

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
}

type Loss = fn(&Path);

/// The ways to lose a name that occur in production.
const LOSSES: [(&str, Loss); 10] = [
    ("the file is deleted", |path| fs::remove_file(path).unwrap()),
    ("the file is moved away", |path| fs::rename(path, with_suffix(path, ".old")).unwrap()),
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
        fs::copy(path, with_suffix(path, ".copy")).unwrap();
        fs::rename(with_suffix(path, ".copy"), path).unwrap();
    }),
    ("the directory is deleted", |path| fs::remove_dir_all(path.parent().unwrap()).unwrap()),
    ("the directory is moved away", |path| {
        let directory = path.parent().unwrap();
        fs::rename(directory, with_suffix(directory, ".old")).unwrap();
    }),
    ("the log is deleted", |path| fs::remove_file(with_suffix(path, "-wal")).unwrap()),
    ("the index of the log is deleted", |path| fs::remove_file(with_suffix(path, "-shm")).unwrap()),
    ("the lock is deleted", |path| fs::remove_file(with_suffix(path, ".lock")).unwrap()),
];

/// Waits until the health shows the fault of the file, and prints the delay.
async fn wait_until_noticed(cache: &Cache, loss: &str) {
    let started = Instant::now();
    loop {
        let health = cache.health();
        let queue_fault = health.queue.as_ref().and_then(|queue| queue.fault.clone());
        if let Some(fault) =
            health.cause.filter(|cause| cause.kind() == ErrorKind::LocalStorage).or(queue_fault)
        {
            let (delay, text) = (started.elapsed(), fault.to_string());
            println!("{loss}: noticed after {delay:?}: {text}");
            assert!(text.contains("restart the daemon") && text.contains("/proc/"), "{loss}: {text}");
            return;
        }
        assert!(started.elapsed() < 30 * SECOND, "{loss}: timed out, the health shows no fault");
        tokio::time::sleep(SECOND / 100).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nameless_outage_file_is_noticed_and_fails_puts() {
    log::listen();
    for (loss, lose) in LOSSES {
        let parent = directory();
        let dir = parent.path().join("daemon");
        fs::create_dir(&dir).unwrap();
        let mut world = World::new(&dir);
        let cache = world.open_in_outage().await.unwrap();
        assert_eq!(cache.put("before", &1).await.unwrap(), WriteOutcome::Queued, "{loss}");
        lose(&world.path());
        wait_until_noticed(&cache, loss).await;
        let error = cache.put("after", &2).await.expect_err(loss);
        assert_eq!(error.kind(), ErrorKind::LocalStorage, "{loss}: {error}");
        assert_eq!(cache.health().can_write().unwrap_err().kind(), ErrorKind::LocalStorage, "{loss}");
        let lines = log::about(&dir);
        let is_error = |line: &String| line.contains("ERROR") && line.contains("HAS LOST ITS NAME");
        assert!(lines.iter().any(is_error), "{loss}: {lines:?}");
        // A get returns the earlier queued write. After the outage, replay stores that write.
        assert_eq!(cache.get("before").await.unwrap().unwrap().json(), "1", "{loss}");
        world.end_outage(&cache).await;
        wait_until_drained(&cache).await;
        assert_eq!(cache.put("after", &2).await.unwrap(), WriteOutcome::Stored, "{loss}");
        assert_eq!(cache.get("before").await.unwrap().unwrap().json(), "1", "{loss}");
        cache.shutdown(SECOND).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nameless_outage_file_is_noticed_without_traffic() {
    for (loss, lose) in LOSSES {
        let parent = directory();
        let dir = parent.path().join("daemon");
        fs::create_dir(&dir).unwrap();
        let mut world = World::new(&dir);
        let cache = world.open().await.unwrap();
        assert_eq!(cache.put("before", &1).await.unwrap(), WriteOutcome::Stored, "{loss}");
        lose(&world.path());
        wait_until_noticed(&cache, loss).await;
        assert!(cache.health().is_available(), "{loss}: the store is available");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nameless_local_file_is_noticed_and_fails_writes() {
    for (loss, lose) in LOSSES {
        let parent = directory();
        let dir = parent.path().join("daemon");
        fs::create_dir(&dir).unwrap();
        let path = dir.join("q.db");
        let cache = Cache::builder().local(&path).open().await.unwrap();
        assert_eq!(cache.put("before", &1).await.unwrap(), WriteOutcome::Stored, "{loss}");
        lose(&path);
        wait_until_noticed(&cache, loss).await;
        let error = cache.put("after", &2).await.expect_err(loss);
        assert_eq!(error.kind(), ErrorKind::LocalStorage, "{loss}: {error}");
        let error = cache.update("before", |_: Option<u8>| Ok(Some(2))).await.expect_err(loss);
        assert_eq!(error.kind(), ErrorKind::LocalStorage, "{loss}: {error}");
        assert_eq!(cache.remove("before").await.expect_err(loss).kind(), ErrorKind::LocalStorage, "{loss}");
        assert!(!cache.health().is_available(), "{loss}");
        assert_eq!(cache.get("before").await.unwrap().unwrap().json(), "1", "{loss}");
        assert!(cache.get("after").await.unwrap().is_none(), "{loss}: the failed put leaves no value");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_local_file_is_replaced_at_the_next_start() {
    let dir = directory();
    let path = dir.path().join("q.db");
    let cache = Cache::builder().local(&path).open().await.unwrap();
    assert_eq!(cache.put("before", &1).await.unwrap(), WriteOutcome::Stored);
    fs::remove_file(&path).unwrap();
    assert_eq!(
        cache.put("after", &2).await.expect_err("the first put after the deletion fails").kind(),
        ErrorKind::LocalStorage
    );
    wait_until_noticed(&cache, "deleted").await;
    cache.shutdown(SECOND).await.unwrap();
    drop(cache);
    fs::rename(with_suffix(&path, "-wal"), with_suffix(&path, "-wal.old")).unwrap();
    let cache = Cache::builder().local(&path).open().await.unwrap();
    assert!(cache.get("before").await.unwrap().is_none());
    assert_eq!(cache.put("after", &2).await.unwrap(), WriteOutcome::Stored);
}

/// The next start would open another file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changed_link_to_the_local_file_is_noticed() {
    let dir = directory();
    let (one, other, link) = (dir.path().join("one"), dir.path().join("other"), dir.path().join("link"));
    fs::create_dir(&one).unwrap();
    fs::create_dir(&other).unwrap();
    std::os::unix::fs::symlink(&one, &link).unwrap();
    let cache = Cache::builder().local(link.join("q.db")).open().await.unwrap();
    assert_eq!(cache.put("before", &1).await.unwrap(), WriteOutcome::Stored);
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&other, &link).unwrap();
    wait_until_noticed(&cache, "the link names another file").await;
    assert_eq!(cache.put("after", &2).await.unwrap_err().kind(), ErrorKind::LocalStorage);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_with_restored_name_accepts_writes_again() {
    let dir = directory();
    let mut world = World::new(dir.path());
    let cache = world.open_in_outage().await.unwrap();
    assert_eq!(cache.put("before", &1).await.unwrap(), WriteOutcome::Queued);
    fs::rename(world.path(), with_suffix(&world.path(), ".old")).unwrap();
    wait_until_noticed(&cache, "moved").await;
    fs::rename(with_suffix(&world.path(), ".old"), world.path()).unwrap();
    let started = Instant::now();
    while cache.health().queue.unwrap().fault.is_some() {
        assert!(started.elapsed() < 30 * SECOND, "{:?}", cache.health());
        tokio::time::sleep(SECOND / 100).await;
    }
    assert_eq!(cache.put("after", &2).await.unwrap(), WriteOutcome::Queued);
    cache.shutdown(SECOND).await.unwrap();
    assert_eq!(contents(&world.path()).len(), 2);
}

/// After `kill -9`, only the files at the path remain.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queued_writes_survive_the_loss_of_the_log_and_a_kill() {
    for suffix in ["-wal", "-shm"] {
        let dir = directory();
        let mut world = World::new(dir.path());
        let cache = world.open_in_outage().await.unwrap();
        for at in 0..50 {
            assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap(), WriteOutcome::Queued);
        }
        fs::remove_file(with_suffix(&world.path(), suffix)).unwrap();
        wait_until_noticed(&cache, suffix).await;
        let copy = directory();
        let (copied, started) = (copy.path().join("q.db"), Instant::now());
        loop {
            fs::copy(world.path(), &copied).unwrap();
            fs::copy(with_suffix(&world.path(), "-wal"), with_suffix(&copied, "-wal")).ok();
            if contents(&copied).len() == 50 {
                break;
            }
            assert!(started.elapsed() < 30 * SECOND, "{suffix}: {} of 50", contents(&copied).len());
            tokio::time::sleep(SECOND / 10).await;
        }
    }
}

/// OPERATIONS.md describes this copy. The process still has the file open, and nothing writes to it.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_local_file_can_be_copied_from_proc() {
    let dir = directory();
    let path = dir.path().join("q.db");
    let cache = Cache::builder().local(&path).open().await.unwrap();
    for at in 0..50 {
        assert_eq!(cache.put(format!("t{at}"), &at).await.unwrap(), WriteOutcome::Stored);
    }
    for suffix in ["", "-wal", "-shm"] {
        fs::remove_file(with_suffix(&path, suffix)).unwrap();
    }
    wait_until_noticed(&cache, "deleted").await;
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

/// When SQLite closes a file, it deletes the write-ahead log by its name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nameless_file_close_keeps_the_files_of_its_successor() {
    let dir = directory();
    let path = dir.path().join("q.db");
    let first = Cache::builder().local(&path).open().await.unwrap();
    assert_eq!(first.put("of the first", &1).await.unwrap(), WriteOutcome::Stored);
    for suffix in ["", "-wal", "-shm", ".lock"] {
        fs::remove_file(with_suffix(&path, suffix)).unwrap();
    }
    let second = Cache::builder().local(&path).open().await.unwrap();
    assert_eq!(second.put("of the second", &2).await.unwrap(), WriteOutcome::Stored);
    first.shutdown(SECOND).await.unwrap();
    drop(first);
    assert!(with_suffix(&path, "-wal").exists(), "the log of the second cache exists");
    assert_eq!(second.put("of the second", &3).await.unwrap(), WriteOutcome::Stored);
    second.shutdown(SECOND).await.unwrap();
    drop(second);
    let second = Cache::builder().local(&path).open().await.unwrap();
    assert_eq!(second.get("of the second").await.unwrap().unwrap().json(), "3");
    assert!(second.get("of the first").await.unwrap().is_none());
}
