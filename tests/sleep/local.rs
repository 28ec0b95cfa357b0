//! The backends whose clock is the system's: what they acknowledge expires by it, forward and back.

use std::path::Path;
use std::time::Duration;

use threadkeep::{Cache, Durability};

use crate::machine::on_a_machine;
use crate::{HOUR, MINUTE, SECOND};

async fn open(path: &Path) -> Cache {
    Cache::builder().local(path).ttl(24 * HOUR).open().await.unwrap()
}

async fn found(cache: &Cache, key: &str) -> Option<String> {
    cache.get(key).await.unwrap().map(|found| found.json().to_owned())
}

/// Closes the file and opens it again, as a restart does.
async fn restart(cache: Cache, path: &Path) -> Cache {
    cache.shutdown(30 * SECOND).await.unwrap();
    drop(cache);
    open(path).await
}

#[test]
fn local_keeps_what_it_stored_after_a_sleep_over_a_restart() {
    on_a_machine("local::local_keeps_what_it_stored_after_a_sleep_over_a_restart", async |machine| {
        for span in [63 * HOUR, 8 * HOUR, 5 * MINUTE] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("t.db");
            let cache = open(&path).await;
            let _ = cache.put("before", &1).await.unwrap();
            machine.sleeps(span);
            assert_eq!(found(&cache, "before").await.is_some(), span < 24 * HOUR, "{span:?}");
            assert_eq!(cache.put("after", &2).await.unwrap(), Durability::Stored);
            assert_eq!(found(&cache, "after").await.as_deref(), Some("2"), "{span:?}");
            let cache = restart(cache, &path).await;
            assert_eq!(found(&cache, "after").await.as_deref(), Some("2"), "{span:?}, restarted");
            assert_eq!(found(&cache, "before").await.is_some(), span < 24 * HOUR, "{span:?}, restarted");
            machine.sleeps(25 * HOUR);
            assert_eq!(found(&cache, "after").await, None, "{span:?}: it has expired");
        }
    });
}

#[test]
fn local_follows_the_systems_clock_forward_and_back() {
    on_a_machine("local::local_follows_the_systems_clock_forward_and_back", async |machine| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.db");
        let mut cache = open(&path).await;
        let _ = cache.put("hour", &0).ttl(HOUR).await.unwrap();
        machine.is_set(2 * 3_600_000);
        assert_eq!(found(&cache, "hour").await, None);
        machine.is_set(-2 * 3_600_000);
        assert_eq!(found(&cache, "hour").await.as_deref(), Some("0"), "its hour is not over");
        // A later write never loses against an earlier one, whatever the clock shows.
        let mut turn = 0;
        for step in [-3 * 3_600_000, 3_600_000, -1_500, 63 * 3_600_000, -60 * 3_600_000] {
            machine.is_set(step);
            for _ in 0..2 {
                turn += 1;
                assert_eq!(cache.put("turns", &turn).await.unwrap(), Durability::Stored, "{step}");
                assert_eq!(found(&cache, "turns").await, Some(turn.to_string()), "{step}");
                cache = restart(cache, &path).await;
                assert_eq!(found(&cache, "turns").await, Some(turn.to_string()), "{step}, restarted");
            }
            let left = cache.get("turns").await.unwrap().unwrap().expires_at() - chrono::Utc::now();
            assert!((left.num_minutes() - 24 * 60).abs() <= 1, "{step}: {left}");
        }
    });
}

#[test]
fn memory_follows_the_systems_clock_forward_and_back() {
    on_a_machine("local::memory_follows_the_systems_clock_forward_and_back", async |machine| {
        let cache = Cache::builder().memory().open().await.unwrap();
        let _ = cache.put("hour", &0).ttl(HOUR).await.unwrap();
        machine.sleeps(2 * HOUR);
        assert_eq!(found(&cache, "hour").await, None);
        for step in [-9 * 3_600_000, 3_600_000, -3_000] {
            machine.is_set(step);
            let _ = cache.put("turns", &step).await.unwrap();
            assert_eq!(found(&cache, "turns").await, Some(step.to_string()));
            cache.evict("turns").unwrap();
            assert_eq!(found(&cache, "turns").await, Some(step.to_string()));
        }
        machine.is_set(25 * 3_600_000);
        assert_eq!(found(&cache, "turns").await, None);
        let updated = cache.update("counted", |count: Option<u32>| Ok(Some(count.unwrap_or(0) + 1)));
        assert_eq!(updated.ttl(Duration::from_secs(60)).await.unwrap(), Durability::Stored);
        machine.is_set(-3_600_000);
        let updated = cache.update("counted", |count: Option<u32>| Ok(Some(count.unwrap() + 1)));
        assert_eq!(updated.await.unwrap(), Durability::Stored);
        assert_eq!(found(&cache, "counted").await.as_deref(), Some("2"));
    });
}
