//! One process has the file at a time.

use std::io::{BufRead, BufReader, Read, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use threadkeep::ErrorKind;

use crate::world::{World, directory};

/// Another process that has the file open.
fn holder(dir: &Path) -> (Child, impl Iterator<Item = String>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "processes::hold_the_file", "--ignored", "--nocapture"])
        .env("DISK_HOLD", dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.ends_with("it is held")));
    (child, lines)
}

#[tokio::test]
#[ignore = "runs as a process of its own under the tests below"]
async fn hold_the_file() {
    let dir = std::env::var_os("DISK_HOLD").unwrap();
    let cache = World::new(Path::new(&dir)).open_cut_off().await.unwrap();
    let _ = cache.put("held", &1).await.unwrap();
    println!("it is held");
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
    cache.shutdown(Duration::from_secs(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_waits_and_then_hears_which_process_has_which_file() {
    let dir = directory();
    let (mut child, _lines) = holder(dir.path());
    let (mut world, began) = (World::new(dir.path()), Instant::now());
    let error = world.open_cut_off().await.unwrap_err();
    let waited = began.elapsed();
    assert!(waited > Duration::from_secs(4) && waited < Duration::from_secs(15), "{waited:?}");
    assert_eq!(error.kind(), ErrorKind::InUse);
    let (text, path) = (error.to_string(), world.path());
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    assert!(text.contains(&format!("process {};", child.id())), "{text}");
    child.kill().unwrap();
    child.wait().unwrap();
    let cache = world.open_cut_off().await.unwrap();
    assert_eq!(cache.get("held").await.unwrap().unwrap().json(), "1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_goes_on_as_soon_as_the_first_has_ended_or_was_killed() {
    for is_killed in [false, true] {
        let dir = directory();
        let (mut child, _lines) = holder(dir.path());
        let path = dir.path().to_owned();
        let second = tokio::spawn(async move { World::new(&path).open_cut_off().await });
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!second.is_finished(), "it waits");
        if is_killed {
            child.kill().unwrap();
        } else {
            drop(child.stdin.take());
        }
        let ended = child.wait().unwrap();
        assert_eq!(ended.success(), !is_killed);
        let began = Instant::now();
        let cache = second.await.unwrap().unwrap();
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
        assert_eq!(cache.get("held").await.unwrap().unwrap().json(), "1");
    }
}
