//! The file of the backend `local`: what it survives, and whom it refuses.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::path::Path;
use std::time::Duration;

use threadkeep::{Cache, Durability, ErrorKind, Local, Store as _};

async fn open(path: &Path) -> threadkeep::Result<Cache> {
    Cache::builder().local(path).open().await
}

/// Runs SQL on a file that nobody has open.
fn sql(path: &Path, statement: &str) {
    rusqlite::Connection::open(path).unwrap().execute_batch(statement).unwrap();
}

#[tokio::test]
async fn what_was_written_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let cache = open(&path).await.unwrap();
    let puts = (0..500).map(|at| cache.put(format!("t{at}"), &at).user("u").into_future());
    for put in futures::future::join_all(puts).await {
        assert_eq!(put.unwrap(), Durability::Stored);
    }
    let _ = cache.remove("t0").await.unwrap();
    drop(cache);
    let cache = open(&path).await.unwrap();
    assert!(cache.get("t0").await.unwrap().is_none());
    for at in 1..500 {
        assert_eq!(cache.get(format!("t{at}")).await.unwrap().unwrap().json(), at.to_string());
    }
    assert_eq!(cache.list("u").limit(1_000).await.unwrap().len(), 499);
}

#[tokio::test]
async fn a_file_of_another_program_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (tables, marked, text) = (dir.path().join("a.db"), dir.path().join("b.db"), dir.path().join("c.db"));
    sql(&tables, "create table theirs (x); insert into theirs values (1)");
    sql(&marked, "pragma application_id = 99");
    std::fs::write(&text, "this is no database, and long enough to look like one ".repeat(20)).unwrap();
    for path in [&tables, &marked, &text] {
        let before = std::fs::read(path).unwrap();
        let error = open(path).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Local);
        assert!(error.to_string().contains(path.file_name().unwrap().to_str().unwrap()), "{error}");
        assert_eq!(std::fs::read(path).unwrap(), before, "{error}");
    }
    sql(
        &dir.path().join("d.db"),
        "pragma application_id = 1953000304; pragma user_version = 2; create table t (x)",
    );
    let error = open(&dir.path().join("d.db")).await.unwrap_err();
    assert!(error.to_string().contains("format 2"), "{error}");
}

#[tokio::test]
async fn places_where_no_file_can_be_are_named_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().to_owned(), dir.path().join("no/such/dir.db"), "/proc/t.db".into()] {
        let error = open(&path).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Local);
        assert!(error.to_string().contains("CONVERSATION_LOCAL_PATH"), "{error}");
    }
}

#[tokio::test]
async fn one_process_has_the_file_by_whatever_name_and_a_second_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, link) = (dir.path().join("t.db"), dir.path().join("link.db"));
    let first = Local::open(&path).await.unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let second = tokio::spawn(Local::open(link.clone()));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!second.is_finished(), "it waits");
    drop(first);
    let second = second.await.unwrap().unwrap();
    let error = Local::open(&path).await.unwrap_err();
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    drop(second);
}

/// One start with a clock that was two days ahead: nothing expires by it, and nothing is locked by it.
#[tokio::test]
async fn a_version_from_the_future_neither_expires_nor_locks_threads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let cache = open(&path).await.unwrap();
    let _ = cache.put("ahead", &1).await.unwrap();
    let _ = cache.put("other", &1).await.unwrap();
    drop(cache);
    sql(
        &path,
        "update threads set version = version + (172800000 << 21), accepted = version where key = 'ahead'",
    );
    sql(&path, "update threads set accepted = version where key = 'ahead'");
    let cache = open(&path).await.unwrap();
    assert!(cache.get("other").await.unwrap().is_some());
    for (at, key) in ["ahead", "other", "ahead"].into_iter().enumerate() {
        assert_eq!(cache.put(key, &at).await.unwrap(), Durability::Stored);
        assert_eq!(cache.get(key).await.unwrap().unwrap().json(), at.to_string());
    }
}

#[tokio::test]
async fn an_expired_thread_leaves_only_its_version_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let cache = open(&path).await.unwrap();
    let _ = cache.put("t", "a secret").ttl(Duration::from_millis(1)).user("u").await.unwrap();
    drop(cache);
    tokio::time::sleep(Duration::from_millis(5)).await;
    let local = Local::open(&path).await.unwrap();
    local.purge(100).await.unwrap();
    drop(local);
    assert!(!String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains("a secret"));
}

/// The files in the directory that hold this text.
fn files_with(dir: &Path, text: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let holds = |path: &std::path::PathBuf| {
        std::fs::read(path)
            .is_ok_and(|bytes| bytes.windows(text.len()).any(|window| window == text.as_bytes()))
    };
    entries.filter(holds).map(|path| path.display().to_string()).collect()
}

async fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..3_000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("waited in vain: {what}");
}

#[tokio::test]
async fn deleted_text_leaves_file_and_log_with_the_next_maintenance() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let cache = Cache::builder().local(&path).upkeep_every(Duration::from_millis(100)).open().await.unwrap();
    let ways = ["removed", "replaced", "expired"];
    for at in 0..100 {
        for way in ways {
            let text = format!("secret {way} {at} {}", "x".repeat(at * 100));
            let put = cache.put(format!("{way} {at}"), &text).user(format!("user {way}"));
            let life = Duration::from_secs(if way == "expired" { 1 } else { 3_600 });
            assert_eq!(put.ttl(life).await.unwrap(), Durability::Stored);
        }
    }
    assert!(!files_with(dir.path(), "secret").is_empty());
    for at in 0..100 {
        assert_eq!(cache.remove(format!("removed {at}")).await.unwrap(), Durability::Stored);
        assert_eq!(cache.put(format!("replaced {at}"), "harmless").await.unwrap(), Durability::Stored);
    }
    for way in ways {
        let text = format!("secret {way}");
        wait_until(&text, || files_with(dir.path(), &text).is_empty()).await;
    }
}

/// As where an application does all its own work on tokio's blocking pool.
#[test]
fn full_blocking_pool_holds_up_no_call() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (end, goes_on) = std::sync::mpsc::channel::<()>();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let calls = async move {
        let busy = tokio::task::spawn_blocking(move || goes_on.recv());
        let cache = open(&path).await.unwrap();
        assert_eq!(cache.put("t", &1).user("u").await.unwrap(), Durability::Stored);
        cache.evict("t").unwrap();
        assert_eq!(cache.get("t").await.unwrap().unwrap().json(), "1");
        cache.evict("t").unwrap();
        assert_eq!(cache.list("u").await.unwrap().len(), 1);
        let _ = cache.update("t", |value: Option<u8>| Ok(value.map(|value| value + 1))).await.unwrap();
        cache.shutdown(Duration::from_secs(60)).await.unwrap();
        drop(cache);
        let local = Local::open(&path).await.unwrap();
        local.probe().await.unwrap();
        assert!(!busy.is_finished());
    };
    let in_time = async { tokio::time::timeout(Duration::from_secs(60), calls).await };
    let ended = runtime.block_on(in_time);
    end.send(()).ok();
    ended.expect("no call waits for the application's work");
}

#[cfg(unix)]
#[tokio::test]
async fn paths_that_are_not_utf8_have_their_own_files_beside_them() {
    use std::os::unix::ffi::OsStrExt as _;
    let dir = tempfile::tempdir().unwrap();
    let name = |bytes: &[u8]| dir.path().join(std::ffi::OsStr::from_bytes(bytes));
    let (one, two) = (open(&name(b"t\xff.db")).await.unwrap(), open(&name(b"t\xfe.db")).await.unwrap());
    for cache in [&one, &two] {
        assert_eq!(cache.put("t", &1).await.unwrap(), Durability::Stored);
    }
    for suffix in [&b""[..], b"-wal", b"-shm", b".lock"] {
        for first in [&b"t\xff.db"[..], b"t\xfe.db"] {
            use std::os::unix::fs::PermissionsExt as _;
            let path = name(&[first, suffix].concat());
            let mode =
                std::fs::metadata(&path).unwrap_or_else(|e| panic!("{path:?}: {e}")).permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{path:?}");
        }
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 8, "and nothing else");
}
