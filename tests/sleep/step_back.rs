//! The clock of the database is set back while a daemon runs, or between two processes. A write is stored, waits, or is
//! `Superseded`. It is never taken for a repeated one.

use std::time::Duration;

use threadkeep::WriteOutcome;
use threadkeep::testing::Fault;

use crate::SECOND;
use crate::database::World;

const STEPS_MS: [i64; 3] = [5_000, 60_000, 3_600_000];

/// Asserts that a stored write is in the database, or that the caller has learnt of the newer one, or that the write waits.
fn assert_honest(world: &World, key: &str, outcome: WriteOutcome, json: Option<&str>) {
    let row = world.database.row(key);
    let held = row.as_ref().map(|record| record.value.as_ref().unwrap().as_str());
    let is_kept = outcome == WriteOutcome::Stored && held == json;
    let is_told = matches!(outcome, WriteOutcome::Superseded | WriteOutcome::Queued);
    assert!(is_kept || is_told, "{key}: {outcome:?}, but the row is {held:?}");
}

#[tokio::test]
async fn write_after_an_evicted_one_is_kept_or_superseded() {
    for step in STEPS_MS {
        let mut world = World::new();
        let cache = world.open_without_copies().await;
        world.database.write_from_another_daemon("appended", "[1]");
        cache.put("put", &1).await.unwrap();
        cache.append("appended", &[2]).await.unwrap();
        world.database.step_back(step);
        // Any answer tells the daemon the new time.
        cache.get("other").await.unwrap();
        let outcome = cache.put("put", &2).await.unwrap();
        assert_honest(&world, "put", outcome, Some("2"));
        let outcome = cache.append("appended", &[3]).await.unwrap().outcome;
        assert_honest(&world, "appended", outcome, Some("[1,2,3]"));
        assert_eq!(cache.put("other", &1).await.unwrap(), WriteOutcome::Stored);
    }
}

#[tokio::test]
async fn put_after_a_remove_is_kept_or_superseded() {
    let mut world = World::new();
    let cache = world.open().await;
    cache.put("t", &1).await.unwrap();
    cache.remove("t").await.unwrap();
    // Memory forgets an absence after two seconds.
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    world.database.step_back(60_000);
    cache.get("other").await.unwrap();
    let outcome = cache.put("t", &2).await.unwrap();
    assert_honest(&world, "t", outcome, Some("2"));
}

#[tokio::test]
async fn put_after_a_lost_answer_is_kept_or_superseded() {
    let mut world = World::new();
    let cache = world.open_without_queue().await;
    cache.put("t", &1).await.unwrap();
    world.faults.script([Fault::DropResponse, Fault::DropResponse]);
    assert!(cache.put("t", &2).await.unwrap_err().outcome_unknown());
    world.database.step_back(60_000);
    cache.get("other").await.unwrap();
    let outcome = cache.put("t", &3).await.unwrap();
    assert_honest(&world, "t", outcome, Some("3"));
}

#[tokio::test]
async fn write_after_a_restart_is_kept_or_superseded() {
    for step in STEPS_MS {
        let mut world = World::new();
        let cache = world.open().await;
        cache.put("put", &1).await.unwrap();
        cache.put("removed", &1).await.unwrap();
        cache.shutdown(SECOND).await.unwrap();
        // The second restart finds the mark of the first process.
        for value in ["2", "3"] {
            world.database.step_back(step);
            let cache = world.open().await;
            let outcome = cache.put("put", &serde_json::json!(value)).await.unwrap();
            assert_honest(&world, "put", outcome, Some(&format!("\"{value}\"")));
            let outcome = cache.remove("removed").await.unwrap();
            assert_honest(&world, "removed", outcome, None);
            cache.shutdown(SECOND).await.unwrap();
        }
    }
}

/// Replay, and no live write, has stored the newest versions.
#[tokio::test]
async fn write_after_a_replayed_one_is_kept_or_superseded() {
    for restarts in [false, true] {
        let mut world = World::new();
        let mut cache = world.open_without_copies().await;
        if restarts {
            cache.put("live", &1).await.unwrap();
        }
        // The mark stays at the live write.
        world.database.step_back(-60_000);
        cache.get("other").await.unwrap();
        world.start_outage(&cache).await;
        assert_eq!(cache.put("put", &1).await.unwrap(), WriteOutcome::Queued);
        assert_eq!(cache.append("appended", &[1]).await.unwrap().outcome, WriteOutcome::Queued);
        world.end_outage(&cache).await;
        if restarts {
            cache.shutdown(SECOND).await.unwrap();
        }
        world.database.step_back(60_000);
        if restarts {
            cache = world.open_without_copies().await;
        }
        cache.get("other").await.unwrap();
        let outcome = cache.put("put", &2).await.unwrap();
        assert_honest(&world, "put", outcome, Some("2"));
        let outcome = cache.append("appended", &[2]).await.unwrap().outcome;
        assert_honest(&world, "appended", outcome, Some("[1,2]"));
    }
}

#[tokio::test]
async fn writes_queued_before_and_after_it_are_kept() {
    for step in [3_000, 5_000] {
        let mut world = World::new();
        let cache = world.open().await;
        cache.put("p", &1).await.unwrap();
        cache.put("a", &[1]).await.unwrap();
        world.start_outage(&cache).await;
        assert_eq!(cache.put("p", &2).await.unwrap(), WriteOutcome::Queued);
        cache.append("a", &[2]).await.unwrap();
        cache
            .update("a", |held: Option<Vec<i32>>| Ok(Some([held.unwrap(), vec![3]].concat())))
            .await
            .unwrap();
        world.database.step_back(step);
        cache.append("a", &[4]).await.unwrap();
        world.end_outage(&cache).await;
        for (key, json) in [("p", "2"), ("a", "[1,2,3,4]")] {
            assert_eq!(world.database.row(key).unwrap().value.as_ref().unwrap().as_str(), json, "{step}");
        }
    }
}
