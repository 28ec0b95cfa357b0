//! Failing disk calls: a write is kept or fails as a whole, and the next writes succeed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::ffi;
use threadkeep::testing::Fault as StoreFault;
use threadkeep::{Cache, ErrorKind, WriteOutcome};

use crate::vfs::{Call, Disk, Fault};
use crate::world::{Contents, World, cached_contents, contents, directory, wait_until_drained};

const WRITING_CALLS: &[Call] = &[Call::Write, Call::Sync, Call::Truncate, Call::Delete];
const ALL_CALLS: &[Call] =
    &[Call::Open, Call::Read, Call::Write, Call::Sync, Call::Truncate, Call::Size, Call::Delete, Call::Map];

const SECOND: Duration = Duration::from_secs(1);
/// The number of concurrent scenarios. A scenario mostly waits.
const CONCURRENT: usize = 16;

/// The possible values of each conversation in the file: the last acknowledged write, and each later write that failed.
#[derive(Default)]
struct PossibleValues(BTreeMap<String, Vec<Option<String>>>);

impl PossibleValues {
    fn record(&mut self, key: &str, value: Option<&str>, result: &threadkeep::Result<WriteOutcome>) {
        let value = value.map(|value| format!("\"{value}\""));
        let possible = self.0.entry(key.to_owned()).or_insert_with(|| vec![None]);
        match result {
            Ok(_) => *possible = vec![value],
            Err(_) => possible.push(value),
        }
    }

    /// Asserts that the file holds a possible value of each conversation.
    fn check(&self, found: &Contents, context: &str) {
        for (key, possible) in &self.0 {
            let value = found.get(key).and_then(|(value, _)| value.clone());
            assert!(possible.contains(&value), "{context}: {key} is {value:?}, not one of {possible:?}");
        }
    }
}

/// Writes to a few conversations, and returns the result of each write.
async fn write_some(
    cache: &Cache,
    possible_values: &mut PossibleValues,
    round: usize,
) -> Vec<threadkeep::Result<WriteOutcome>> {
    let mut results = Vec::new();
    for (at, key) in ["a", "b", "a", "c", "a"].into_iter().enumerate() {
        let value = format!("{round}.{at} {}", "x".repeat(1_000));
        let (value, result) = match at {
            4 => (None, cache.remove(key).await),
            _ => (Some(value.as_str()), cache.put(key, value.as_str()).await),
        };
        possible_values.record(key, value, &result);
        results.push(result);
    }
    results
}

fn is_queued_or_names_file(result: &threadkeep::Result<WriteOutcome>, path: &Path) -> bool {
    match result {
        Ok(outcome) => *outcome == WriteOutcome::Queued,
        Err(error) => {
            error.kind() == ErrorKind::LocalStorage && error.to_string().contains(path.to_str().unwrap())
        }
    }
}

/// Runs a scenario with the fault at the first call, then at the second call, and so on, until no call fails.
async fn at_each_call(
    calls: &'static [Call],
    times: usize,
    code: i32,
    scenario: impl AsyncFn(Arc<Disk>, &Path, Fault) -> usize,
) {
    for first in (0..).step_by(CONCURRENT) {
        let run = async |from| {
            let dir = directory();
            let disk = Disk::watch(dir.path());
            scenario(disk, dir.path(), Fault { calls, from, times, code }).await
        };
        let failed_calls = futures::future::join_all((first..first + CONCURRENT).map(run)).await;
        if let Some(last) = failed_calls.iter().position(|failed_calls| *failed_calls == 0) {
            assert!(first + last > 3, "the scenario makes too few calls");
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_error_during_a_put_keeps_or_fails_that_put_only() {
    for code in [ffi::SQLITE_IOERR_WRITE, ffi::SQLITE_FULL, ffi::SQLITE_IOERR_FSYNC] {
        at_each_call(WRITING_CALLS, 1, code, async |disk, dir, fault| {
            let context = format!("{fault:?}");
            let mut world = World::new(dir);
            let cache = world.open_in_outage().await.unwrap();
            let mut possible_values = PossibleValues::default();
            write_some(&cache, &mut possible_values, 0).await;
            disk.fail(fault);
            let results = write_some(&cache, &mut possible_values, 1).await;
            let failed_calls = disk.end_fault();
            let errors = results.iter().filter(|result| result.is_err()).count();
            assert!(
                results.iter().all(|result| is_queued_or_names_file(result, dir)),
                "{context}: {results:?}"
            );
            assert!(errors <= failed_calls, "{context}: {results:?}");
            for (key, possible) in &possible_values.0 {
                let found = cache.get(key).await.unwrap().map(|found| found.json().to_owned());
                assert_eq!(found, possible[0], "{context}: {key} has the last acknowledged value");
            }
            // A kill would leave the file in this state.
            let copy = directory();
            for name in ["q.db", "q.db-wal"] {
                std::fs::copy(dir.join(name), copy.path().join(name)).unwrap();
            }
            possible_values.check(&contents(&copy.path().join("q.db")), &context);
            let results = write_some(&cache, &mut possible_values, 2).await;
            assert!(results.iter().all(Result::is_ok), "{context}: {results:?}");
            drop(cache);
            let (shown, _) = cached_contents(dir, ["a", "b", "c"].map(str::to_owned).into_iter()).await;
            possible_values.check(&shown, &context);
            failed_calls
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_error_at_any_call_keeps_acknowledged_writes() {
    at_each_call(ALL_CALLS, 1, ffi::SQLITE_IOERR, async |disk, dir, fault| {
        let context = format!("{fault:?}");
        let mut possible_values = PossibleValues::default();
        disk.fail(fault);
        let mut world = World::new(dir);
        match world.open_in_outage().await {
            Ok(cache) => {
                let results = write_some(&cache, &mut possible_values, 0).await;
                let errors = results.iter().filter(|result| result.is_err()).count();
                assert!(
                    results.iter().all(|result| is_queued_or_names_file(result, dir)),
                    "{context}: {results:?}"
                );
                assert!(errors <= 1, "{context}: {results:?}");
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::LocalStorage, "{context}: {error}");
                assert!(error.to_string().contains("q.db"), "{context}: {error}");
            }
        }
        let failed_calls = disk.end_fault();
        let cache = world.open_in_outage().await.unwrap();
        let results = write_some(&cache, &mut possible_values, 1).await;
        assert!(results.iter().all(Result::is_ok), "{context}: {results:?}");
        cache.shutdown(SECOND).await.unwrap();
        possible_values.check(&contents(&dir.join("q.db")), &context);
        failed_calls
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_error_that_persists_fails_each_put_with_its_cause() {
    for (code, cause) in [(ffi::SQLITE_FULL, "the disk is full"), (ffi::SQLITE_READONLY, "writable")] {
        at_each_call(WRITING_CALLS, usize::MAX, code, async |disk, dir, fault| {
            let context = format!("{fault:?}");
            let mut world = World::new(dir);
            let cache = world.open_in_outage().await.unwrap();
            let mut possible_values = PossibleValues::default();
            disk.fail(fault);
            let results = write_some(&cache, &mut possible_values, 0).await;
            let first = results.iter().position(Result::is_err).unwrap_or(results.len());
            assert!(results[first..].iter().all(Result::is_err), "{context}: {results:?}");
            for error in results.iter().filter_map(|result| result.as_ref().err()) {
                let text = error.to_string();
                assert!(text.contains("q.db") && text.contains(cause), "{context}: {text}");
            }
            let failed_calls = disk.end_fault();
            let results = write_some(&cache, &mut possible_values, 1).await;
            assert!(results.iter().all(Result::is_ok), "{context}: {results:?}");
            cache.shutdown(SECOND).await.unwrap();
            possible_values.check(&contents(&dir.join("q.db")), &context);
            failed_calls
        })
        .await;
    }
}

/// One value is so large that SQLite writes it before the commit and fails. The other writes of the group get the same error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_fails_each_write_of_a_group_with_its_cause() {
    at_each_call(&[Call::Write], usize::MAX, ffi::SQLITE_FULL, async |disk, dir, fault| {
        let cache = World::new(dir).open_in_outage().await.unwrap();
        let large = "x".repeat(3 << 20);
        disk.fail(Fault { from: fault.from * 151, ..fault });
        let puts =
            ["a", "b", "c", "d"].map(|key| cache.put(key, if key == "b" { large.as_str() } else { "small" }));
        let results = futures::future::join_all(puts.map(IntoFuture::into_future)).await;
        for error in results.into_iter().filter_map(Result::err) {
            let text = error.to_string();
            assert!(text.contains("q.db") && text.contains("the disk is full"), "{text}");
        }
        let failed_calls = disk.end_fault();
        assert_eq!(cache.put("b", large.as_str()).await.unwrap(), WriteOutcome::Queued);
        failed_calls
    })
    .await;
}

/// Replay stores all queued writes in spite of a disk error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_error_during_replay_loses_no_queued_write() {
    at_each_call(WRITING_CALLS, 1, ffi::SQLITE_IOERR_WRITE, async |disk, dir, fault| {
        let mut world = World::new(dir);
        let cache = world.open().await.unwrap();
        world.start_outage(&cache).await;
        let mut possible_values = PossibleValues::default();
        write_some(&cache, &mut possible_values, 0).await;
        disk.fail(fault);
        world.end_outage(&cache).await;
        wait_until_drained(&cache).await;
        let failed_calls = disk.end_fault();
        for (key, possible) in &possible_values.0 {
            cache.evict(key).unwrap();
            let found = cache.get(key).await.unwrap().map(|found| found.json().to_owned());
            assert_eq!(found, possible[0], "{key}");
        }
        assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
        failed_calls
    })
    .await;
}

/// The store is available and the disk fails. The put is stored, and no later get returns an older copy (I16).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_error_on_a_copy_fails_no_put_and_shows_no_older_copy() {
    for (times, restarts) in [(1, false), (1, true), (usize::MAX, true)] {
        at_each_call(WRITING_CALLS, times, ffi::SQLITE_FULL, async |disk, dir, fault| {
            let context = format!("{fault:?}, restart: {restarts}");
            let mut world = World::new(dir);
            let mut cache = world.open().await.unwrap();
            for key in ["a", "b", "c"] {
                assert_eq!(cache.put(key, "1").await.unwrap(), WriteOutcome::Stored);
            }
            // A later get must also not return the older write in the queue.
            world.faults.fail_replays(true);
            world.faults.fail_key("queued", StoreFault::Fail(ErrorKind::Unauthorized));
            assert_eq!(cache.put("queued", "1").await.unwrap(), WriteOutcome::Queued);
            world.faults.clear_key_faults();
            disk.fail(fault);
            for key in ["a", "queued", "b"] {
                let outcome = cache.put(key, "2").await.unwrap();
                // If the fault is over, the queue takes the write.
                let may_queue = key == "queued" && outcome == WriteOutcome::Queued;
                assert!(may_queue || outcome == WriteOutcome::Stored, "{context}: {key}: {outcome:?}");
            }
            let failed_calls = disk.end_fault();
            world.start_outage(&cache).await;
            if restarts {
                drop(cache);
                cache = world.open_in_outage().await.unwrap();
            }
            for (key, newest) in [("a", "\"2\""), ("b", "\"2\""), ("c", "\"1\""), ("queued", "\"2\"")] {
                cache.evict(key).unwrap();
                match cache.get(key).await {
                    Ok(found) => assert_eq!(found.unwrap().json(), newest, "{context}: {key}"),
                    Err(error) => assert!(failed_calls > 0 && error.is_outage(), "{context}: {key}: {error}"),
                }
            }
            // The replica saves new copies again.
            world.end_outage(&cache).await;
            assert_eq!(cache.put("a", "3").await.unwrap(), WriteOutcome::Stored);
            assert_eq!(cache.get("queued").await.unwrap().unwrap().json(), "\"2\"", "{context}");
            world.start_outage(&cache).await;
            cache.evict("a").unwrap();
            assert_eq!(cache.get("a").await.unwrap().unwrap().json(), "\"3\"", "{context}");
            // The next restart must not return the older write either.
            drop(cache);
            let cache = world.open_in_outage().await.unwrap();
            if let Ok(found) = cache.get("queued").await {
                assert_eq!(found.unwrap().json(), "\"2\"", "{context}");
            }
            failed_calls
        })
        .await;
    }
}

/// No write to the disk succeeds, before and after the restart. The cache must start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_after_restart_shows_no_older_copy() {
    let dir = directory();
    let disk = Disk::watch(dir.path());
    let mut world = World::new(dir.path());
    let cache = world.open().await.unwrap();
    assert_eq!(cache.put("k", "1").await.unwrap(), WriteOutcome::Stored);
    disk.fail(Fault { calls: &[Call::Write], from: 0, times: usize::MAX, code: ffi::SQLITE_FULL });
    assert_eq!(cache.put("k", "2").await.unwrap(), WriteOutcome::Stored);
    drop(cache);
    for is_mended in [false, true] {
        if is_mended {
            assert!(disk.end_fault() > 0);
        }
        let cache = world.open_in_outage().await.unwrap();
        assert!(cache.get("k").await.unwrap_err().is_outage(), "mended: {is_mended}");
        world.end_outage(&cache).await;
        assert_eq!(cache.get("k").await.unwrap().unwrap().json(), "\"2\"");
        assert_eq!(cache.put("other", "1").await.unwrap(), WriteOutcome::Stored);
        drop(cache);
    }
}

/// A put in an outage waits for two syncs at most, its own sync included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn put_in_outage_waits_for_two_syncs_even_in_a_checkpoint() {
    let dir = directory();
    let disk = Disk::watch(dir.path());
    let cache = World::new(dir.path()).open_in_outage().await.unwrap();
    let value = "x".repeat(100_000);
    // The first put also creates the write-ahead log.
    for at in 0..10 {
        let before = disk.syncs();
        cache.put(format!("{at}"), &value).await.unwrap();
        let syncs = disk.syncs() - before;
        assert!((1..=2).contains(&syncs), "put {at} took {syncs} syncs");
    }
    // A large log starts a checkpoint. The test blocks its writes to the file.
    let block = disk.block_writes("q.db");
    for at in 0.. {
        assert!(at < 200, "no checkpoint starts");
        cache.put(format!("{at}"), &value).await.unwrap();
        if disk.is_blocking() {
            break;
        }
    }
    for at in 0..20 {
        let before = disk.syncs();
        let put = tokio::time::timeout(
            10 * SECOND,
            cache.put(format!("{at}"), "during the checkpoint").into_future(),
        )
        .await;
        assert_eq!(put.expect("the put waits for the checkpoint").unwrap(), WriteOutcome::Queued);
        let syncs = disk.syncs() - before;
        assert!((1..=2).contains(&syncs), "put {at} took {syncs} syncs");
    }
    drop(block);
    // Concurrent puts share their syncs.
    let before = disk.syncs();
    let puts = (0..200).map(|at| cache.put(format!("{at}"), "together").into_future());
    futures::future::join_all(puts).await.into_iter().for_each(|put| _ = put.unwrap());
    let syncs = disk.syncs() - before;
    assert!(syncs <= 40, "{syncs} syncs for 200 concurrent puts");
}

/// The commit of a queued update fails after its last write, so the update is in the file although its caller got an error. The
/// next process replays the update below the newer put, and no reader sees the update after the put.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn update_whose_commit_failed_stays_below_a_newer_put() {
    let dir = directory();
    let disk = Disk::watch(dir.path());
    let mut world = World::new(dir.path());
    let cache = world.open().await.unwrap();
    assert_eq!(cache.put("k", "1").await.unwrap(), WriteOutcome::Stored);
    // No commit overwrites the row of the failed one, because each recovery needs a sync.
    disk.fail(Fault { calls: &[Call::Sync], from: 0, times: usize::MAX, code: ffi::SQLITE_IOERR_FSYNC });
    let refused = |_: Option<String>| {
        world.faults.script([StoreFault::Fail(ErrorKind::Unauthorized)]);
        Ok(Some("2".to_owned()))
    };
    let error = cache.update("k", refused).await.unwrap_err();
    assert!(error.kind() == ErrorKind::LocalStorage && error.outcome_unknown(), "{error:?}");
    assert_eq!(cache.put("k", "3").await.unwrap(), WriteOutcome::Stored);
    cache.shutdown(Duration::ZERO).await.unwrap();
    disk.end_fault();
    assert_eq!(contents(&world.path())["k"], (Some("\"2\"".to_owned()), true), "the update is in the file");
    let cache = world.open_in_outage().await.unwrap();
    assert!(cache.get("k").await.unwrap_err().is_outage(), "the put is not in the file");
    world.end_outage(&cache).await;
    wait_until_drained(&cache).await;
    assert_eq!(cache.get("k").await.unwrap().unwrap().json(), "\"3\"");
    assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
}
