//! The file of the backend `local`: what it survives, and whom it refuses.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used)]

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
