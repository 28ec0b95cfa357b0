//! The lock on the outage file: one process at a time.

use std::io::{BufRead, BufReader, Read, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use threadkeep::ErrorKind;

use crate::world::{World, directory};

/// Starts another process that holds the file open.
fn start_holder(dir: &Path) -> (Child, impl Iterator<Item = String>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "processes::hold_the_file", "--ignored", "--nocapture"])
        .env("DISK_HOLD", dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.ends_with("the file is open")));
    (child, lines)
}

#[tokio::test]
#[ignore = "the tests below run it in a separate process"]
async fn hold_the_file() {
    let dir = std::env::var_os("DISK_HOLD").unwrap();
    let cache = World::new(Path::new(&dir)).open_in_outage().await.unwrap();
    cache.put("held", &1).await.unwrap();
    println!("the file is open");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
    cache.shutdown(Duration::from_secs(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_timeout_names_the_process_and_the_file() {
    let dir = directory();
    let (mut child, _lines) = start_holder(dir.path());
    let (mut world, started) = (World::new(dir.path()), Instant::now());
    let error = world.open_in_outage().await.unwrap_err();
    let waited = started.elapsed();
    assert!(waited > Duration::from_secs(4) && waited < Duration::from_secs(15), "{waited:?}");
    assert_eq!(error.kind(), ErrorKind::Locked);
    let (text, path) = (error.to_string(), world.path());
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    assert!(text.contains(&format!("process {};", child.id())), "{text}");
    child.kill().unwrap();
    child.wait().unwrap();
    let cache = world.open_in_outage().await.unwrap();
    assert_eq!(cache.get("held").await.unwrap().unwrap().json(), "1");
    let error = world.open_in_outage().await.unwrap_err();
    assert!(error.remedy().unwrap().contains("call `shutdown`"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_is_acquired_after_the_holder_ends_or_is_killed() {
    for is_killed in [false, true] {
        let dir = directory();
        let (mut child, _lines) = start_holder(dir.path());
        let path = dir.path().to_owned();
        let second = tokio::spawn(async move { World::new(&path).open_in_outage().await });
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!second.is_finished(), "the second process waits for the lock");
        if is_killed {
            child.kill().unwrap();
        } else {
            drop(child.stdin.take());
        }
        let ended = child.wait().unwrap();
        assert_eq!(ended.success(), !is_killed);
        let started = Instant::now();
        let cache = second.await.unwrap().unwrap();
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
        assert_eq!(cache.get("held").await.unwrap().unwrap().json(), "1");
    }
}
