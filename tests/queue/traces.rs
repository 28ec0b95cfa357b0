//! What was deleted leaves no text in the queue's file and its log.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use threadkeep::testing::Fault;
use threadkeep::{Durability, ErrorKind};

use crate::{World, drained};

/// The files that hold this text.
fn files_with(dir: &Path, text: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let holds = |path: &std::path::PathBuf| {
        std::fs::read(path)
            .is_ok_and(|bytes| bytes.windows(text.len()).any(|window| window == text.as_bytes()))
    };
    entries.filter(holds).map(|path| path.display().to_string()).collect()
}

/// Beside a daemon that reads and writes all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_text_leaves_the_queues_file_and_its_log() {
    let mut world = World::new();
    let cache = world.builder().upkeep_every(Duration::from_millis(200)).open().await.unwrap();
    let text = |what: &str, at: usize| format!("secret {what} {at} {}", "x".repeat(at * 200));
    for at in 0..50 {
        let put = cache.put(format!("copy {at}"), &text("copy", at)).await.unwrap();
        assert_eq!(put, Durability::Stored);
    }
    world.away(&cache).await;
    for at in 0..50 {
        let put = cache.put(format!("queued {at}"), &text("queued", at)).await.unwrap();
        assert_eq!(put, Durability::Queued);
    }
    assert_eq!(cache.put("dead", &text("dead", 30)).await.unwrap(), Durability::Queued);
    world.faults.poison("dead", Fault::Fail(ErrorKind::Refused));
    assert!(!files_with(world.dir.path(), "secret").is_empty());
    for at in 0..50 {
        assert_eq!(cache.remove(format!("queued {at}")).await.unwrap(), Durability::Queued);
    }
    world.faults.heal();
    drained(&cache).await;
    let is_over = Arc::new(AtomicBool::new(false));
    let traffic = (0..4).map(|task| {
        let (cache, is_over) = (cache.clone(), Arc::clone(&is_over));
        tokio::spawn(async move {
            while !is_over.load(Relaxed) {
                assert_eq!(
                    cache.put(format!("busy {task}"), &"x".repeat(500)).await.unwrap(),
                    Durability::Stored
                );
                cache.evict(format!("busy {task}")).unwrap();
                cache.get(format!("busy {task}")).await.unwrap();
            }
        })
    });
    let traffic: Vec<_> = traffic.collect();
    for at in 0..50 {
        assert_eq!(cache.remove(format!("copy {at}")).await.unwrap(), Durability::Stored);
    }
    let letters = cache.dead_letters().await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(cache.forget_dead_letters(letters.last().unwrap()).await.unwrap(), letters.len());
    let mut left = Vec::new();
    for _ in 0..300 {
        left = files_with(world.dir.path(), "secret");
        if left.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    is_over.store(true, Relaxed);
    futures::future::join_all(traffic).await.into_iter().for_each(Result::unwrap);
    assert!(left.is_empty(), "{left:?}");
}
