//! The backends that use the system clock. Conversations expire by that clock, even if it moves forward and back.

use std::path::Path;
use std::time::Duration;

use threadkeep::{Cache, WriteOutcome};

use crate::machine::run_on_machine;
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
fn local_file_keeps_writes_after_a_sleep_and_a_restart() {
    run_on_machine("local::local_file_keeps_writes_after_a_sleep_and_a_restart", async |machine| {
        for duration in [63 * HOUR, 8 * HOUR, 5 * MINUTE] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("t.db");
            let cache = open(&path).await;
            cache.put("before", &1).await.unwrap();
            machine.sleep(duration);
            assert_eq!(found(&cache, "before").await.is_some(), duration < 24 * HOUR, "{duration:?}");
            assert_eq!(cache.put("after", &2).await.unwrap(), WriteOutcome::Stored);
            assert_eq!(found(&cache, "after").await.as_deref(), Some("2"), "{duration:?}");
            let cache = restart(cache, &path).await;
            assert_eq!(found(&cache, "after").await.as_deref(), Some("2"), "{duration:?}, restarted");
            assert_eq!(
                found(&cache, "before").await.is_some(),
                duration < 24 * HOUR,
                "{duration:?}, restarted"
            );
            machine.sleep(25 * HOUR);
            assert_eq!(found(&cache, "after").await, None, "{duration:?}: the conversation has expired");
        }
    });
}

#[test]
fn local_file_follows_the_system_clock_forward_and_back() {
    run_on_machine("local::local_file_follows_the_system_clock_forward_and_back", async |machine| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("t.db");
        let mut cache = open(&path).await;
        cache.put("hour", &0).ttl(HOUR).await.unwrap();
        machine.set_clock(2 * 3_600_000);
        assert_eq!(found(&cache, "hour").await, None);
        machine.set_clock(-2 * 3_600_000);
        assert_eq!(
            found(&cache, "hour").await.as_deref(),
            Some("0"),
            "the conversation has not expired at this time"
        );
        // A later write always replaces an earlier write, at any time of the clock.
        let mut turn = 0;
        for step in [-3 * 3_600_000, 3_600_000, -1_500, 63 * 3_600_000, -60 * 3_600_000] {
            machine.set_clock(step);
            for _ in 0..2 {
                turn += 1;
                assert_eq!(cache.put("turns", &turn).await.unwrap(), WriteOutcome::Stored, "{step}");
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
fn memory_follows_the_system_clock_forward_and_back() {
    run_on_machine("local::memory_follows_the_system_clock_forward_and_back", async |machine| {
        let cache = Cache::builder().memory().open().await.unwrap();
        cache.put("hour", &0).ttl(HOUR).await.unwrap();
        machine.sleep(2 * HOUR);
        assert_eq!(found(&cache, "hour").await, None);
        for step in [-9 * 3_600_000, 3_600_000, -3_000] {
            machine.set_clock(step);
            cache.put("turns", &step).await.unwrap();
            assert_eq!(found(&cache, "turns").await, Some(step.to_string()));
            cache.evict("turns").unwrap();
            assert_eq!(found(&cache, "turns").await, Some(step.to_string()));
        }
        machine.set_clock(25 * 3_600_000);
        assert_eq!(found(&cache, "turns").await, None);
        let updated = cache.update("counted", |count: Option<u32>| Ok(Some(count.unwrap_or(0) + 1)));
        assert_eq!(updated.ttl(Duration::from_secs(60)).await.unwrap(), WriteOutcome::Volatile);
        machine.set_clock(-3_600_000);
        let updated = cache.update("counted", |count: Option<u32>| Ok(Some(count.unwrap() + 1)));
        assert_eq!(updated.await.unwrap(), WriteOutcome::Volatile);
        assert_eq!(found(&cache, "counted").await.as_deref(), Some("2"));
    });
}
