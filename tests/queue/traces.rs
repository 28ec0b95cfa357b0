//! Deleted text disappears from the outage file and its write-ahead log.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use threadkeep::testing::Fault;
use threadkeep::{ErrorKind, WriteOutcome};

use crate::{World, wait_until_drained};

/// Lists the files in `dir` that contain `text`.
fn files_with(dir: &Path, text: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let holds = |path: &std::path::PathBuf| {
        std::fs::read(path)
            .is_ok_and(|bytes| bytes.windows(text.len()).any(|window| window == text.as_bytes()))
    };
    entries.filter(holds).map(|path| path.display().to_string()).collect()
}

/// The daemon reads and writes during the maintenance.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn maintenance_erases_deleted_text_from_outage_file_and_log() {
    let mut world = World::new();
    let cache = world.builder().maintenance_interval(Duration::from_millis(200)).open().await.unwrap();
    let text = |kind: &str, at: usize| format!("secret {kind} {at} {}", "x".repeat(at * 200));
    for at in 0..50 {
        let put = cache.put(format!("copy {at}"), &text("copy", at)).await.unwrap();
        assert_eq!(put, WriteOutcome::Stored);
    }
    world.start_outage(&cache).await;
    for at in 0..50 {
        let put = cache.put(format!("queued {at}"), &text("queued", at)).await.unwrap();
        assert_eq!(put, WriteOutcome::Queued);
    }
    assert_eq!(cache.put("dead", &text("dead", 30)).await.unwrap(), WriteOutcome::Queued);
    world.faults.fail_key("dead", Fault::Fail(ErrorKind::Rejected));
    assert!(!files_with(world.dir.path(), "secret").is_empty());
    for at in 0..50 {
        assert_eq!(cache.remove(format!("queued {at}")).await.unwrap(), WriteOutcome::Queued);
    }
    world.faults.clear();
    wait_until_drained(&cache).await;
    let is_stopped = Arc::new(AtomicBool::new(false));
    let traffic = (0..4).map(|task| {
        let (cache, is_stopped) = (cache.clone(), Arc::clone(&is_stopped));
        tokio::spawn(async move {
            while !is_stopped.load(Relaxed) {
                assert_eq!(
                    cache.put(format!("busy {task}"), &"x".repeat(500)).await.unwrap(),
                    WriteOutcome::Stored
                );
                cache.evict(format!("busy {task}")).unwrap();
                cache.get(format!("busy {task}")).await.unwrap();
            }
        })
    });
    let traffic: Vec<_> = traffic.collect();
    for at in 0..50 {
        assert_eq!(cache.remove(format!("copy {at}")).await.unwrap(), WriteOutcome::Stored);
    }
    let letters = cache.dead_letters().await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(cache.delete_dead_letters(letters.last().unwrap()).await.unwrap(), letters.len());
    let mut left = Vec::new();
    for _ in 0..300 {
        left = files_with(world.dir.path(), "secret");
        if left.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    is_stopped.store(true, Relaxed);
    futures::future::join_all(traffic).await.into_iter().for_each(Result::unwrap);
    assert!(left.is_empty(), "{left:?}");
}
