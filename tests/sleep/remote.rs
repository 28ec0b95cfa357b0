//! A cache over a database. Writes right after a clock jump are stored with the correct version and expiry.

use std::time::Duration;

use threadkeep::{Cache, Freshness, WriteOutcome};

use crate::database::{Database, World};
use crate::machine::{Machine, millis, run_on_machine};
use crate::{HOUR, MINUTE, SECOND};

const DAY: Duration = Duration::from_secs(86_400);

/// A change of the clocks.
#[derive(Debug, Clone, Copy)]
enum Jump {
    Sleep(Duration),
    /// The virtual machine pauses, and the database does not.
    Pause(Duration),
    /// All clocks of this machine except the monotonic clock are set. The clock of the database is not set.
    Shift(i64),
    /// The system clock is set. The clock of the database is not set.
    Set(i64),
}

impl Jump {
    fn apply(self, machine: &Machine, database: &Database) {
        match self {
            Self::Sleep(duration) => machine.sleep(duration),
            Self::Pause(duration) => machine.pause(duration),
            Self::Shift(by) => {
                machine.step(by, by);
                database.step_back(by);
            }
            Self::Set(by) => {
                machine.set_clock(by);
                database.step_back(by);
            }
        }
    }
}

fn jumps() -> Vec<Vec<Jump>> {
    let (hours, long) = (millis(8 * HOUR), millis(63 * HOUR));
    vec![
        vec![Jump::Sleep(63 * HOUR)],
        vec![Jump::Sleep(8 * HOUR)],
        vec![Jump::Sleep(5 * MINUTE)],
        vec![Jump::Pause(63 * HOUR)],
        vec![Jump::Pause(8 * HOUR)],
        vec![Jump::Shift(long)],
        vec![Jump::Shift(-hours)],
        vec![Jump::Set(long)],
        vec![Jump::Set(hours)],
        vec![Jump::Set(-hours)],
        vec![Jump::Sleep(8 * HOUR), Jump::Sleep(MINUTE), Jump::Pause(HOUR)],
        vec![Jump::Set(hours), Jump::Set(-hours)],
        vec![Jump::Shift(long), Jump::Shift(-long)],
    ]
}

async fn found(cache: &Cache, key: &str) -> Option<(String, Freshness)> {
    cache.get(key).await.unwrap().map(|found| (found.json().to_owned(), found.freshness()))
}

/// Asserts that a row expires `ttl` from now, and that its version has the present time, by the clock of the database.
fn assert_row(world: &World, key: &str, json: &str, ttl: Duration, jumps: &dyn std::fmt::Debug) {
    let row = world.database.row(key).unwrap_or_else(|| panic!("{jumps:?}: the database has no {key}"));
    assert_eq!(row.value.as_ref().map(|value| value.as_str()), Some(json), "{jumps:?}");
    let (now, tolerance) = (world.database.now(), 30_000);
    let left = row.expires_at.0 - now.0 - millis(ttl);
    assert!(left.abs() < tolerance, "{jumps:?}: {key} lives {left} ms too long");
    let age = now.0 - row.version.at().0;
    assert!(age.abs() < tolerance, "{jumps:?}: the version of {key} is off by {age} ms");
}

/// Runs a test for each sequence of jumps.
async fn for_each_jump(machine: &Machine, test: impl AsyncFn(&Machine, &[Jump])) {
    for jumps in jumps() {
        println!("{jumps:?}");
        test(machine, &jumps).await;
    }
}

#[test]
fn writes_queued_after_a_jump_get_correct_version_and_expiry() {
    run_on_machine("remote::writes_queued_after_a_jump_get_correct_version_and_expiry", async |machine| {
        for_each_jump(&machine, async |machine, jumps| {
            let mut world = World::new();
            let cache = world.open().await;
            // The second outage in the same process has its own clock corrections.
            for _ in 0..2 {
                queue_and_replay(machine, &world, &cache, jumps).await;
            }
        })
        .await;
    });
}

async fn queue_and_replay(machine: &Machine, world: &World, cache: &Cache, jumps: &[Jump]) {
    assert_eq!(cache.put("kept", &0).ttl(30 * DAY).await.unwrap(), WriteOutcome::Stored, "{jumps:?}");
    world.start_outage(cache).await;
    assert_eq!(cache.put("early", &0).ttl(30 * DAY).await.unwrap(), WriteOutcome::Queued);
    for (at, jump) in jumps.iter().enumerate() {
        jump.apply(machine, &world.database);
        let key = format!("late {at}");
        assert_eq!(cache.put(&key, &at).await.unwrap(), WriteOutcome::Queued);
        assert_eq!(found(cache, &key).await, Some((at.to_string(), Freshness::Queued)));
    }
    // Another daemon with the correct clock writes first.
    world.database.write_from_another_daemon("contested", "1");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(cache.put("contested", &2).await.unwrap(), WriteOutcome::Queued);
    let change = |_: Option<u32>| Ok(Some(7));
    assert_eq!(cache.update("kept", change).ttl(30 * DAY).await.unwrap(), WriteOutcome::Queued);
    world.end_outage(cache).await;
    let last = jumps.len() - 1;
    assert_row(world, &format!("late {last}"), &last.to_string(), DAY, &jumps);
    assert_row(world, "kept", "7", 30 * DAY, &jumps);
    assert_row(world, "contested", "2", DAY, &jumps);
    assert_eq!(found(cache, "early").await.unwrap().0, "0", "{jumps:?}");
}

/// The first response after the jump is the response to the write.
#[test]
fn single_put_after_a_jump_gets_correct_version_and_expiry() {
    run_on_machine("remote::single_put_after_a_jump_gets_correct_version_and_expiry", async |machine| {
        for_each_jump(&machine, async |machine, jumps| {
            let mut world = World::new();
            let cache = world.open().await;
            cache.put("t", &0).await.unwrap();
            jumps.iter().for_each(|jump| jump.apply(machine, &world.database));
            // Another daemon writes shortly before.
            world.database.write_from_another_daemon("t", "1");
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(cache.put("t", &2).await.unwrap(), WriteOutcome::Stored, "{jumps:?}");
            assert_row(&world, "t", "2", DAY, &jumps);
            assert_eq!(found(&cache, "t").await, Some(("2".into(), Freshness::Fresh)), "{jumps:?}");
        })
        .await;
    });
}

#[test]
fn value_validated_before_a_jump_is_not_fresh() {
    run_on_machine("remote::value_validated_before_a_jump_is_not_fresh", async |machine| {
        for_each_jump(&machine, async |machine, jumps| {
            let mut world = World::new();
            let cache = world.open().await;
            cache.put("t", &0).ttl(30 * DAY).await.unwrap();
            cache.put("other", &0).ttl(30 * DAY).await.unwrap();
            assert_eq!(cache.get("absent").await.unwrap().map(|found| found.version()), None);
            for jump in jumps {
                jump.apply(machine, &world.database);
                // Without a call between two opposite steps, the cache sees no jump.
                let _ = cache.get("a call").await.unwrap();
            }
            for key in ["t", "absent"] {
                world.database.write_from_another_daemon(key, "1");
                assert_eq!(found(&cache, key).await, Some(("1".into(), Freshness::Fresh)), "{jumps:?}");
            }
            // The database has answered, but not about this conversation.
            world.start_outage(&cache).await;
            let (json, freshness) = found(&cache, "other").await.unwrap();
            let Freshness::Stale { age } = freshness else { panic!("{jumps:?}: {json} is {freshness:?}") };
            if let [Jump::Sleep(duration) | Jump::Pause(duration)] = jumps {
                assert!(age >= *duration && age < *duration + 10 * MINUTE, "{jumps:?}: {age:?}");
            }
        })
        .await;
    });
}

/// The write is sent before the jump, and its response comes after the jump.
#[test]
fn jump_during_a_put_loses_no_write() {
    run_on_machine("remote::jump_during_a_put_loses_no_write", async |machine| {
        for_each_jump(&machine, async |machine, jumps| {
            let mut world = World::new();
            let cache = world.open().await;
            cache.put("t", &0).await.unwrap();
            let (steps, database) = (jumps.to_vec(), std::sync::Arc::clone(&world.database));
            let clocks = machine.handle();
            world.database.at_next_write(move || {
                steps.iter().for_each(|jump| jump.apply(&clocks, &database));
            });
            assert_eq!(cache.put("t", &1).ttl(30 * DAY).await.unwrap(), WriteOutcome::Stored, "{jumps:?}");
            assert_eq!(world.database.row("t").unwrap().value.as_ref().unwrap().as_str(), "1");
            assert_eq!(cache.put("u", &2).await.unwrap(), WriteOutcome::Stored, "{jumps:?}");
            assert_row(&world, "u", "2", DAY, &jumps);
            assert_eq!(found(&cache, "t").await.unwrap().0, "1", "{jumps:?}");
            // Now the response is lost as well.
            let (steps, database) = (jumps.to_vec(), std::sync::Arc::clone(&world.database));
            let (clocks, faults) = (machine.handle(), world.faults.clone());
            world.faults.always(threadkeep::testing::Fault::DropResponse);
            world.database.at_next_write(move || {
                steps.iter().for_each(|jump| jump.apply(&clocks, &database));
                faults.always(threadkeep::testing::Fault::Refuse);
            });
            assert_eq!(cache.put("v", &3).ttl(30 * DAY).await.unwrap(), WriteOutcome::Queued, "{jumps:?}");
            world.end_outage(&cache).await;
            // A sent write keeps its version and expiry, from before the jump (C7).
            assert_eq!(world.database.row("v").unwrap().value.as_ref().unwrap().as_str(), "3", "{jumps:?}");
        })
        .await;
    });
}

#[test]
fn restart_in_outage_after_a_jump_keeps_queued_writes() {
    run_on_machine("remote::restart_in_outage_after_a_jump_keeps_queued_writes", async |machine| {
        for_each_jump(&machine, async |machine, jumps| {
            let mut world = World::new();
            let cache = world.open().await;
            cache.put("copy", &0).ttl(30 * DAY).await.unwrap();
            world.start_outage(&cache).await;
            jumps.iter().for_each(|jump| jump.apply(machine, &world.database));
            assert_eq!(cache.put("t", &1).await.unwrap(), WriteOutcome::Queued);
            cache.shutdown(30 * SECOND).await.unwrap();
            let cache = world.open_in_outage().await;
            assert_eq!(found(&cache, "t").await, Some(("1".into(), Freshness::Queued)), "{jumps:?}");
            if let [Jump::Sleep(duration) | Jump::Pause(duration)] = jumps {
                let (_, freshness) = found(&cache, "copy").await.unwrap();
                let is_as_old = |age: Duration| age >= *duration && age < *duration + 10 * MINUTE;
                let is_right = matches!(freshness, Freshness::Stale { age } if is_as_old(age));
                assert!(is_right, "{jumps:?}: {freshness:?}");
            }
            world.end_outage(&cache).await;
            assert_row(&world, "t", "1", DAY, &jumps);
        })
        .await;
    });
}

/// The store takes a counted write at a lower version for a repeated one.
#[test]
fn append_after_the_database_clock_was_set_back_is_kept() {
    run_on_machine("remote::append_after_the_database_clock_was_set_back_is_kept", async |machine| {
        for (jump, wait) in [(None, SECOND), (None, HOUR), (Some(Jump::Set(millis(8 * HOUR))), HOUR)] {
            let mut world = World::new();
            let cache = world.open_without_copies().await;
            cache.put("put", &1).await.unwrap();
            cache.append("list", &[1]).await.unwrap();
            world.database.step_back(millis(wait));
            if let Some(jump) = jump {
                jump.apply(&machine, &world.database);
            }
            for item in [2, 3] {
                cache.append("list", &[item]).await.unwrap();
            }
            cache.put("other", &1).await.unwrap();
            world.database.step_back(-millis(wait));
            // Replay of this process may wait for a minute. The next process begins at once.
            cache.shutdown(SECOND).await.unwrap();
            let cache = world.open().await;
            world.end_outage(&cache).await;
            for (key, json) in [("list", "[1,2,3]"), ("put", "1"), ("other", "1")] {
                let row = world.database.row(key).unwrap();
                let json_of_row = row.value.as_ref().unwrap().as_str();
                assert_eq!(json_of_row, json, "{jump:?}, set back by {wait:?}");
            }
        }
    });
}
