//! The file of the `local` backend: restarts, foreign files, locks, and deleted text.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::path::Path;
use std::time::Duration;

use threadkeep::store::{Local, Store as _};
use threadkeep::{Cache, ErrorKind, WriteOutcome};

async fn open(path: &Path) -> threadkeep::Result<Cache> {
    Cache::builder().local(path).open().await
}

/// Runs SQL on a file that no cache has open.
fn sql(path: &Path, statement: &str) {
    rusqlite::Connection::open(path).unwrap().execute_batch(statement).unwrap();
}

#[tokio::test]
async fn local_writes_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let cache = open(&path).await.unwrap();
    let puts = (0..500).map(|at| cache.put(format!("t{at}"), &at).user("u").into_future());
    for put in futures::future::join_all(puts).await {
        assert_eq!(put.unwrap(), WriteOutcome::Stored);
    }
    cache.remove("t0").await.unwrap();
    drop(cache);
    let cache = open(&path).await.unwrap();
    assert!(cache.get("t0").await.unwrap().is_none());
    for at in 1..500 {
        assert_eq!(cache.get(format!("t{at}")).await.unwrap().unwrap().json(), at.to_string());
    }
    assert_eq!(cache.list("u").limit(1_000).await.unwrap().len(), 499);
}

#[tokio::test]
async fn local_foreign_file_is_rejected_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let (tables, marked, text) = (dir.path().join("a.db"), dir.path().join("b.db"), dir.path().join("c.db"));
    sql(&tables, "create table theirs (x); insert into theirs values (1)");
    sql(&marked, "pragma application_id = 99");
    std::fs::write(&text, "this is no database, and long enough to look like one ".repeat(20)).unwrap();
    for path in [&tables, &marked, &text] {
        let before = std::fs::read(path).unwrap();
        let error = open(path).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LocalStorage);
        assert!(error.to_string().contains(path.file_name().unwrap().to_str().unwrap()), "{error}");
        assert_eq!(std::fs::read(path).unwrap(), before, "{error}");
    }
    sql(
        &dir.path().join("d.db"),
        "pragma application_id = 1953000304; pragma user_version = 4; create table t (x)",
    );
    let error = open(&dir.path().join("d.db")).await.unwrap_err();
    assert!(error.to_string().contains("format 4"), "{error}");
}

#[tokio::test]
async fn local_impossible_path_is_named_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().to_owned(), dir.path().join("no/such/dir.db"), "/proc/t.db".into()] {
        let error = open(&path).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LocalStorage);
        assert!(error.to_string().contains("CONVERSATION_LOCAL_PATH"), "{error}");
    }
}

#[tokio::test]
async fn local_second_open_waits_even_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (path, link) = (dir.path().join("t.db"), dir.path().join("link.db"));
    let first = Local::open(&path).await.unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let second = tokio::spawn(Local::open(link.clone()));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!second.is_finished(), "the second open waits for the lock");
    drop(first);
    let second = second.await.unwrap().unwrap();
    let error = Local::open(&path).await.unwrap_err();
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    drop(second);
}

/// One process wrote with a clock that was two days ahead. No conversation expires early, and no later write is blocked.
#[tokio::test]
async fn local_future_version_neither_expires_nor_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let cache = open(&path).await.unwrap();
    cache.put("ahead", &1).await.unwrap();
    cache.put("other", &1).await.unwrap();
    drop(cache);
    sql(&path, "update conversations set version = version + (172800000 << 21) where key = 'ahead'");
    let cache = open(&path).await.unwrap();
    assert!(cache.get("other").await.unwrap().is_some());
    for (at, key) in ["ahead", "other", "ahead"].into_iter().enumerate() {
        assert_eq!(cache.put(key, &at).await.unwrap(), WriteOutcome::Stored);
        assert_eq!(cache.get(key).await.unwrap().unwrap().json(), at.to_string());
    }
}

#[tokio::test]
async fn local_expired_text_leaves_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let cache = open(&path).await.unwrap();
    cache.put("t", "a secret").ttl(Duration::from_millis(1)).user("u").await.unwrap();
    drop(cache);
    tokio::time::sleep(Duration::from_millis(5)).await;
    let local = Local::open(&path).await.unwrap();
    local.purge(100).await.unwrap();
    drop(local);
    assert!(!String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains("a secret"));
}

/// Lists the files in `dir` that contain `text`.
fn files_with(dir: &Path, text: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let holds = |path: &std::path::PathBuf| {
        std::fs::read(path)
            .is_ok_and(|bytes| bytes.windows(text.len()).any(|window| window == text.as_bytes()))
    };
    entries.filter(holds).map(|path| path.display().to_string()).collect()
}

async fn wait_until(event: &str, condition: impl Fn() -> bool) {
    for _ in 0..3_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("timed out: {event}");
}

#[tokio::test]
async fn local_maintenance_erases_deleted_text_from_file_and_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let cache =
        Cache::builder().local(&path).maintenance_interval(Duration::from_millis(100)).open().await.unwrap();
    let fates = ["removed", "replaced", "expired"];
    for at in 0..100 {
        for fate in fates {
            let text = format!("secret {fate} {at} {}", "x".repeat(at * 100));
            let put = cache.put(format!("{fate} {at}"), &text).user(format!("user {fate}"));
            let ttl = Duration::from_secs(if fate == "expired" { 1 } else { 3_600 });
            assert_eq!(put.ttl(ttl).await.unwrap(), WriteOutcome::Stored);
        }
    }
    assert!(!files_with(dir.path(), "secret").is_empty());
    for at in 0..100 {
        assert_eq!(cache.remove(format!("removed {at}")).await.unwrap(), WriteOutcome::Stored);
        assert_eq!(cache.put(format!("replaced {at}"), "harmless").await.unwrap(), WriteOutcome::Stored);
    }
    for fate in fates {
        let text = format!("secret {fate}");
        wait_until(&text, || files_with(dir.path(), &text).is_empty()).await;
    }
}

/// An application may fill the blocking pool of tokio with its own work.
#[test]
fn local_calls_finish_with_a_full_blocking_pool() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let calls = async move {
        let busy = tokio::task::spawn_blocking(move || released.recv());
        let cache = open(&path).await.unwrap();
        assert_eq!(cache.put("t", &1).user("u").await.unwrap(), WriteOutcome::Stored);
        cache.evict("t").unwrap();
        assert_eq!(cache.get("t").await.unwrap().unwrap().json(), "1");
        cache.evict("t").unwrap();
        assert_eq!(cache.list("u").await.unwrap().len(), 1);
        cache.update("t", |value: Option<u8>| Ok(value.map(|value| value + 1))).await.unwrap();
        cache.shutdown(Duration::from_secs(60)).await.unwrap();
        drop(cache);
        let local = Local::open(&path).await.unwrap();
        local.probe().await.unwrap();
        assert!(!busy.is_finished());
    };
    let in_time = async { tokio::time::timeout(Duration::from_secs(60), calls).await };
    let ended = runtime.block_on(in_time);
    release.send(()).ok();
    ended.expect("a call waited for the blocking work of the application");
}

#[cfg(unix)]
#[tokio::test]
async fn local_non_utf8_paths_have_separate_files() {
    use std::os::unix::ffi::OsStrExt as _;
    let dir = tempfile::tempdir().unwrap();
    let name = |bytes: &[u8]| dir.path().join(std::ffi::OsStr::from_bytes(bytes));
    let (one, two) = (open(&name(b"t\xff.db")).await.unwrap(), open(&name(b"t\xfe.db")).await.unwrap());
    for cache in [&one, &two] {
        assert_eq!(cache.put("t", &1).await.unwrap(), WriteOutcome::Stored);
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
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 8, "the directory holds no other file");
}

/// The tables of a file of the present format before the writers, and of the first building.
fn former_file(path: &Path, (meta, role, table): (&str, &str, &str), rows: &str) {
    let schema = format!(
        "begin;
         create table {table} (key text not null primary key, version integer not null, value text, expires_at integer not null,
             user text, metadata text not null, accepted text not null, created_at integer not null,
             accessed_at integer not null) strict;
         create index {table}_by_version on {table} (version, key);
         create index {table}_by_user on {table} (user, version, key) where user is not null;
         create index {table}_by_expiry on {table} (expires_at) where value is not null;
         create table {meta} (name text not null primary key, value text not null) strict;
         insert into {meta} values ('role', '{role}');
         pragma application_id = 1953000304; pragma user_version = 1;
         insert into {table} values {rows};
         commit;"
    );
    sql(path, "pragma auto_vacuum = incremental; pragma journal_mode = wal;");
    sql(path, &schema);
}

const FORMER: [(&str, &str, &str); 2] = [("meta", "local", "conversations"), ("about", "truth", "threads")];

/// Reads what a conversion must keep.
fn contents(path: &Path) -> Vec<String> {
    let file = rusqlite::Connection::open(path).unwrap();
    let sql = "select concat_ws('|', key, version, coalesce(value, 'none'), expires_at, coalesce(user, 'none'), metadata,
                                base_version, last_writer, run_began, created_at, accessed_at) from conversations order by key";
    let mut query = file.prepare(sql).unwrap();
    query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
}

#[tokio::test]
async fn local_former_file_is_converted_without_loss() {
    let now = threadkeep::store::Clock::new().now();
    let version = threadkeep::store::Version::min_at(now).raw();
    let later = now.0 + 3_600_000;
    let rows = format!(
        "('live', {version}, '[1]', {later}, 'u1', '{{\"a\":1}}', '{version}', 5, 6),
         ('gone', {version}, null, {now}, null, '{{}}', '{version} 7', 5, 6),
         ('old', 8, '\"expired\"', 9, null, '{{}}', '8', 5, 6)",
        now = now.0
    );
    for former in FORMER {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.db");
        former_file(&path, former, &rows);
        drop(Local::open(&path).await.unwrap());
        let expected = [
            format!("gone|{version}|none|{}|none|{{}}|{version}|0|0|5|6", now.0),
            format!("live|{version}|[1]|{later}|u1|{{\"a\":1}}|{version}|0|0|5|6"),
            "old|8|\"expired\"|9|none|{}|8|0|0|5|6".to_owned(),
        ];
        assert_eq!(contents(&path), expected, "{former:?}");
        let cache = open(&path).await.unwrap();
        assert_eq!(cache.get("live").await.unwrap().unwrap().json(), "[1]");
        assert!(cache.get("gone").await.unwrap().is_none());
        assert_eq!(cache.list("u1").await.unwrap().len(), 1);
        for key in ["live", "gone", "old"] {
            let append = |value: Option<Vec<u8>>| Ok(Some([value.unwrap_or_default(), vec![2]].concat()));
            assert_eq!(cache.update(key, append).await.unwrap(), WriteOutcome::Stored);
        }
        assert_eq!(cache.get("live").await.unwrap().unwrap().json(), "[1,2]");
        drop(cache);
        let new = dir.path().join("new.db");
        drop(Local::open(&new).await.unwrap());
        assert_eq!(schema(&path), schema(&new), "a converted file has the schema of a new one");
    }
}

fn schema(path: &Path) -> Vec<String> {
    let file = rusqlite::Connection::open(path).unwrap();
    let mut query =
        file.prepare("select coalesce(sql, name) from sqlite_schema order by type, name").unwrap();
    let texts = query.query_map([], |row| row.get::<_, String>(0)).unwrap();
    texts.map(|text| text.unwrap().replace('"', "")).collect()
}

#[tokio::test]
async fn local_failed_conversion_leaves_the_file_as_it_was() {
    for (meta, role, table) in FORMER {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.db");
        former_file(&path, (meta, role, table), "('t', 8, '[1]', 9, null, '{}', '8', 5, 6)");
        // A table in the way fails the conversion after its first statements.
        sql(&path, "create table writers (x)");
        let before = schema(&path);
        open(&path).await.unwrap_err();
        assert_eq!(schema(&path), before);
        sql(&path, "drop table writers");
        drop(Local::open(&path).await.unwrap());
        assert_eq!(contents(&path), ["t|8|[1]|9|none|{}|8|0|0|5|6"]);
    }
}

#[tokio::test]
async fn local_former_outage_file_is_rejected_unchanged() {
    for (meta, table) in [("meta", "records"), ("about", "records")] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.db");
        former_file(&path, (meta, "queue", table), "('t', 8, '[1]', 9, null, '{}', '8', 5, 6)");
        let before = schema(&path);
        let error = open(&path).await.unwrap_err();
        assert!(error.to_string().contains("outage file of the backend `supabase`"), "{error}");
        assert_eq!(schema(&path), before);
    }
}

#[tokio::test]
async fn local_purge_forgets_old_notes_of_writers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.db");
    let cache = open(&path).await.unwrap();
    for key in ["old", "young"] {
        cache.update(key, |_: Option<u8>| Ok(Some(1))).await.unwrap();
    }
    drop(cache);
    // 8 days are 691,200,000 ms.
    sql(&path, "update writers set version = version - (691300000 << 21) where key = 'old'");
    Local::open(&path).await.unwrap().purge(100).await.unwrap();
    let file = rusqlite::Connection::open(&path).unwrap();
    let left = file.query_row("select group_concat(key) from writers", [], |row| row.get::<_, String>(0));
    assert_eq!(left.unwrap(), "young");
}
