//! Over a database: what is written right after a jump of the clocks is stored as it was meant.

use std::time::Duration;

use threadkeep::{Cache, Durability, Freshness};

use crate::database::{Database, World};
use crate::machine::{Machine, millis, on_a_machine};
use crate::{HOUR, MINUTE, SECOND};

const DAY: Duration = Duration::from_secs(86_400);

/// What happens to the clocks.
#[derive(Debug, Clone, Copy)]
enum Jump {
    Sleep(Duration),
    /// Of a virtual machine, while the database goes on.
    Pause(Duration),
    /// Every clock of this machine but the monotonic one is set, and the database's is not.
    Shift(i64),
    /// The system's clock is set, and the database's is not.
    Set(i64),
}

impl Jump {
    fn happens(self, machine: &Machine, database: &Database) {
        match self {
            Self::Sleep(span) => machine.sleeps(span),
            Self::Pause(span) => machine.is_paused(span),
            Self::Shift(by) => {
                machine.step(by, by);
                database.stays_behind(by);
            }
            Self::Set(by) => {
                machine.is_set(by);
                database.stays_behind(by);
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

/// The row lives for so long from now on, by the database's clock, and its version is of now.
fn assert_row(world: &World, key: &str, json: &str, life: Duration, of: &dyn std::fmt::Debug) {
    let row = world.database.row(key).unwrap_or_else(|| panic!("{of:?}: there is no {key}"));
    assert_eq!(row.value.as_ref().map(|value| value.as_str()), Some(json), "{of:?}");
    let (now, tolerance) = (world.database.now(), 30_000);
    let left = row.expires_at.0 - now.0 - millis(life);
    assert!(left.abs() < tolerance, "{of:?}: {key} lives {left} ms too long");
    let age = now.0 - row.version.at().0;
    assert!(age.abs() < tolerance, "{of:?}: the version of {key} is off by {age} ms");
}

/// For each kind of jumps, in worlds of their own.
async fn for_each(machine: &Machine, test: impl AsyncFn(&Machine, &[Jump])) {
    for jumps in jumps() {
        println!("{jumps:?}");
        test(machine, &jumps).await;
    }
}

#[test]
fn what_is_queued_after_a_jump_is_replayed_with_its_right_version_and_expiry() {
    on_a_machine(
        "remote::what_is_queued_after_a_jump_is_replayed_with_its_right_version_and_expiry",
        async |machine| {
            for_each(&machine, async |machine, jumps| {
                let mut world = World::new();
                let cache = world.open().await;
                // Once more in the same process: each outage has its own corrections.
                for _ in 0..2 {
                    queue_and_replay(machine, &world, &cache, jumps).await;
                }
            })
            .await;
        },
    );
}

async fn queue_and_replay(machine: &Machine, world: &World, cache: &Cache, jumps: &[Jump]) {
    assert_eq!(cache.put("kept", &0).ttl(30 * DAY).await.unwrap(), Durability::Stored, "{jumps:?}");
    world.is_cut_off(cache).await;
    assert_eq!(cache.put("early", &0).ttl(30 * DAY).await.unwrap(), Durability::Queued);
    for (at, jump) in jumps.iter().enumerate() {
        jump.happens(machine, &world.database);
        let key = format!("late {at}");
        assert_eq!(cache.put(&key, &at).await.unwrap(), Durability::Queued);
        assert_eq!(found(cache, &key).await, Some((at.to_string(), Freshness::Queued)));
    }
    // Another daemon is faster, and its clock is right.
    world.database.is_written("contested", "1");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(cache.put("contested", &2).await.unwrap(), Durability::Queued);
    let change = |_: Option<u32>| Ok(Some(7));
    assert_eq!(cache.update("kept", change).ttl(30 * DAY).await.unwrap(), Durability::Queued);
    world.is_healed(cache).await;
    let last = jumps.len() - 1;
    assert_row(world, &format!("late {last}"), &last.to_string(), DAY, &jumps);
    assert_row(world, "kept", "7", 30 * DAY, &jumps);
    assert_row(world, "contested", "2", DAY, &jumps);
    assert_eq!(found(cache, "early").await.unwrap().0, "0", "{jumps:?}");
}

/// The answer that comes first is that to the write itself.
#[test]
fn a_lone_write_after_a_jump_is_stored_as_it_was_meant() {
    on_a_machine("remote::a_lone_write_after_a_jump_is_stored_as_it_was_meant", async |machine| {
        for_each(&machine, async |machine, jumps| {
            let mut world = World::new();
            let cache = world.open().await;
            let _ = cache.put("t", &0).await.unwrap();
            jumps.iter().for_each(|jump| jump.happens(machine, &world.database));
            // Another daemon is faster by a moment.
            world.database.is_written("t", "1");
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!(cache.put("t", &2).await.unwrap(), Durability::Stored, "{jumps:?}");
            assert_row(&world, "t", "2", DAY, &jumps);
            assert_eq!(found(&cache, "t").await, Some(("2".into(), Freshness::Fresh)), "{jumps:?}");
        })
        .await;
    });
}

#[test]
fn nothing_is_fresh_that_was_confirmed_before_a_jump() {
    on_a_machine("remote::nothing_is_fresh_that_was_confirmed_before_a_jump", async |machine| {
        for_each(&machine, async |machine, jumps| {
            let mut world = World::new();
            let cache = world.open().await;
            let _ = cache.put("t", &0).ttl(30 * DAY).await.unwrap();
            let _ = cache.put("other", &0).ttl(30 * DAY).await.unwrap();
            assert_eq!(cache.get("absent").await.unwrap().map(|found| found.version()), None);
            for jump in jumps {
                jump.happens(machine, &world.database);
                // Steps there and back between two looks are no jump: no time has passed.
                let _ = cache.get("a look").await.unwrap();
            }
            for key in ["t", "absent"] {
                world.database.is_written(key, "1");
                assert_eq!(found(&cache, key).await, Some(("1".into(), Freshness::Fresh)), "{jumps:?}");
            }
            // An answer has come, but not about this one.
            world.is_cut_off(&cache).await;
            let (json, freshness) = found(&cache, "other").await.unwrap();
            let Freshness::Stale { age } = freshness else { panic!("{jumps:?}: {json} is {freshness:?}") };
            if let [Jump::Sleep(span) | Jump::Pause(span)] = jumps {
                assert!(age >= *span && age < *span + 10 * MINUTE, "{jumps:?}: {age:?}");
            }
        })
        .await;
    });
}

/// Sent before the jump, answered after it.
#[test]
fn a_jump_in_the_midst_of_a_write_costs_nothing() {
    on_a_machine("remote::a_jump_in_the_midst_of_a_write_costs_nothing", async |machine| {
        for_each(&machine, async |machine, jumps| {
            let mut world = World::new();
            let cache = world.open().await;
            let _ = cache.put("t", &0).await.unwrap();
            let (steps, database) = (jumps.to_vec(), std::sync::Arc::clone(&world.database));
            let clocks = machine.again();
            world.database.at_next_write(move || {
                steps.iter().for_each(|jump| jump.happens(&clocks, &database));
            });
            assert_eq!(cache.put("t", &1).ttl(30 * DAY).await.unwrap(), Durability::Stored, "{jumps:?}");
            assert_eq!(world.database.row("t").unwrap().value.as_ref().unwrap().as_str(), "1");
            assert_eq!(cache.put("u", &2).await.unwrap(), Durability::Stored, "{jumps:?}");
            assert_row(&world, "u", "2", DAY, &jumps);
            assert_eq!(found(&cache, "t").await.unwrap().0, "1", "{jumps:?}");
            // Now the answer is lost, too.
            let (steps, database) = (jumps.to_vec(), std::sync::Arc::clone(&world.database));
            let (clocks, faults) = (machine.again(), world.faults.clone());
            world.faults.always(threadkeep::testing::Fault::LoseAnswer);
            world.database.at_next_write(move || {
                steps.iter().for_each(|jump| jump.happens(&clocks, &database));
                faults.always(threadkeep::testing::Fault::Refuse);
            });
            assert_eq!(cache.put("v", &3).await.unwrap(), Durability::Queued, "{jumps:?}");
            world.is_healed(&cache).await;
            assert_row(&world, "v", "3", DAY, &jumps);
        })
        .await;
    });
}

#[test]
fn a_restart_in_an_outage_after_a_jump_keeps_what_was_queued() {
    on_a_machine("remote::a_restart_in_an_outage_after_a_jump_keeps_what_was_queued", async |machine| {
        for_each(&machine, async |machine, jumps| {
            let mut world = World::new();
            let cache = world.open().await;
            let _ = cache.put("copy", &0).ttl(30 * DAY).await.unwrap();
            world.is_cut_off(&cache).await;
            jumps.iter().for_each(|jump| jump.happens(machine, &world.database));
            assert_eq!(cache.put("t", &1).await.unwrap(), Durability::Queued);
            cache.shutdown(30 * SECOND).await.unwrap();
            let cache = world.open_cut_off().await;
            assert_eq!(found(&cache, "t").await, Some(("1".into(), Freshness::Queued)), "{jumps:?}");
            if let [Jump::Sleep(span) | Jump::Pause(span)] = jumps {
                let (_, freshness) = found(&cache, "copy").await.unwrap();
                let is_as_old = |age: Duration| age >= *span && age < *span + 10 * MINUTE;
                let is_right = matches!(freshness, Freshness::Stale { age } if is_as_old(age));
                assert!(is_right, "{jumps:?}: {freshness:?}");
            }
            world.is_healed(&cache).await;
            assert_row(&world, "t", "1", DAY, &jumps);
        })
        .await;
    });
}
