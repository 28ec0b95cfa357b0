//! A call to the disk fails, whichever: a write is kept or an error, never half there, and afterwards all works again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::ffi;
use threadkeep::testing::Fault as Away;
use threadkeep::{Cache, Durability, ErrorKind};

use crate::vfs::{Call, Disk, Fault};
use crate::world::{Held, World, directory, drained, held, shown};

const CHANGES: &[Call] = &[Call::Write, Call::Sync, Call::Truncate, Call::Delete];
const ALL: &[Call] =
    &[Call::Open, Call::Read, Call::Write, Call::Sync, Call::Truncate, Call::Size, Call::Delete, Call::Map];

const SECOND: Duration = Duration::from_secs(1);
/// Scenarios under way at once: they wait more than they work.
const AT_ONCE: usize = 16;

/// What may be in the file for each thread: the last write that was acknowledged, and those after it that were errors.
#[derive(Default)]
struct Ledger(BTreeMap<String, Vec<Option<String>>>);

impl Ledger {
    fn note(&mut self, key: &str, value: Option<&str>, result: &threadkeep::Result<Durability>) {
        let value = value.map(|value| format!("\"{value}\""));
        let possible = self.0.entry(key.to_owned()).or_insert_with(|| vec![None]);
        match result {
            Ok(_) => *possible = vec![value],
            Err(_) => possible.push(value),
        }
    }

    /// Compares with what waits in a file.
    fn check(&self, held: &Held, what: &str) {
        for (key, possible) in &self.0 {
            let is = held.get(key).and_then(|(value, _)| value.clone());
            assert!(possible.contains(&is), "{what}: {key} is {is:?}, not one of {possible:?}");
        }
    }
}

/// Queued writes of a few threads; says how each went.
async fn write_some(cache: &Cache, ledger: &mut Ledger, round: usize) -> Vec<threadkeep::Result<Durability>> {
    let mut results = Vec::new();
    for (at, key) in ["a", "b", "a", "c", "a"].into_iter().enumerate() {
        let value = format!("{round}.{at} {}", "x".repeat(1_000));
        let (value, result) = match at {
            4 => (None, cache.remove(key).await),
            _ => (Some(value.as_str()), cache.put(key, value.as_str()).await),
        };
        ledger.note(key, value, &result);
        results.push(result);
    }
    results
}

fn is_told(result: &threadkeep::Result<Durability>, path: &Path) -> bool {
    match result {
        Ok(durability) => *durability == Durability::Queued,
        Err(error) => error.kind() == ErrorKind::Local && error.to_string().contains(path.to_str().unwrap()),
    }
}

/// Runs a scenario with the fault at the first call, the second, and so on, as long as one is hit.
async fn at_each_call(
    calls: &'static [Call],
    times: usize,
    code: i32,
    scenario: impl AsyncFn(Arc<Disk>, &Path, Fault) -> usize,
) {
    for first in (0..).step_by(AT_ONCE) {
        let run = async |from| {
            let dir = directory();
            let disk = Disk::watch(dir.path());
            scenario(disk, dir.path(), Fault { calls, from, times, code }).await
        };
        let hits = futures::future::join_all((first..first + AT_ONCE).map(run)).await;
        if let Some(last) = hits.iter().position(|hits| *hits == 0) {
            assert!(first + last > 3, "the scenario meets hardly any call");
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queued_write_whose_disk_fails_once_is_kept_or_an_error_and_the_next_ones_work() {
    for code in [ffi::SQLITE_IOERR_WRITE, ffi::SQLITE_FULL, ffi::SQLITE_IOERR_FSYNC] {
        at_each_call(CHANGES, 1, code, async |disk, dir, fault| {
            let what = format!("{fault:?}");
            let mut world = World::new(dir);
            let cache = world.open_cut_off().await.unwrap();
            let mut ledger = Ledger::default();
            write_some(&cache, &mut ledger, 0).await;
            disk.fail(fault);
            let results = write_some(&cache, &mut ledger, 1).await;
            let hit = disk.mend();
            let errors = results.iter().filter(|result| result.is_err()).count();
            assert!(results.iter().all(|result| is_told(result, dir)), "{what}: {results:?}");
            assert!(errors <= hit, "{what}: {results:?}");
            for (key, possible) in &ledger.0 {
                let found = cache.get(key).await.unwrap().map(|found| found.json().to_owned());
                assert_eq!(found, possible[0], "{what}: {key} reads as what was acknowledged last");
            }
            // As after a kill: the file as it is now.
            let copy = directory();
            for name in ["q.db", "q.db-wal"] {
                std::fs::copy(dir.join(name), copy.path().join(name)).unwrap();
            }
            ledger.check(&held(&copy.path().join("q.db")), &what);
            let results = write_some(&cache, &mut ledger, 2).await;
            assert!(results.iter().all(Result::is_ok), "{what}: {results:?}");
            drop(cache);
            let (shown, _) = shown(dir, ["a", "b", "c"].map(str::to_owned).into_iter()).await;
            ledger.check(&shown, &what);
            hit
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_call_fails_from_the_start_on_the_file_opens_afterwards_and_holds_what_was_acknowledged() {
    at_each_call(ALL, 1, ffi::SQLITE_IOERR, async |disk, dir, fault| {
        let what = format!("{fault:?}");
        let mut ledger = Ledger::default();
        disk.fail(fault);
        let mut world = World::new(dir);
        match world.open_cut_off().await {
            Ok(cache) => {
                let results = write_some(&cache, &mut ledger, 0).await;
                let errors = results.iter().filter(|result| result.is_err()).count();
                assert!(results.iter().all(|result| is_told(result, dir)), "{what}: {results:?}");
                assert!(errors <= 1, "{what}: {results:?}");
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Local, "{what}: {error}");
                assert!(error.to_string().contains("q.db"), "{what}: {error}");
            }
        }
        let hit = disk.mend();
        let cache = world.open_cut_off().await.unwrap();
        let results = write_some(&cache, &mut ledger, 1).await;
        assert!(results.iter().all(Result::is_ok), "{what}: {results:?}");
        cache.shutdown(SECOND).await.unwrap();
        ledger.check(&held(&dir.join("q.db")), &what);
        hit
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_for_good_is_an_error_to_each_writer_and_what_was_acknowledged_stays() {
    for (code, says) in [(ffi::SQLITE_FULL, "the disk is full"), (ffi::SQLITE_READONLY, "writable")] {
        at_each_call(CHANGES, usize::MAX, code, async |disk, dir, fault| {
            let what = format!("{fault:?}");
            let mut world = World::new(dir);
            let cache = world.open_cut_off().await.unwrap();
            let mut ledger = Ledger::default();
            disk.fail(fault);
            let results = write_some(&cache, &mut ledger, 0).await;
            let first = results.iter().position(Result::is_err).unwrap_or(results.len());
            assert!(results[first..].iter().all(Result::is_err), "{what}: {results:?}");
            for error in results.iter().filter_map(|result| result.as_ref().err()) {
                let text = error.to_string();
                assert!(text.contains("q.db") && text.contains(says), "{what}: {text}");
            }
            let hit = disk.mend();
            let results = write_some(&cache, &mut ledger, 1).await;
            assert!(results.iter().all(Result::is_ok), "{what}: {results:?}");
            cache.shutdown(SECOND).await.unwrap();
            ledger.check(&held(&dir.join("q.db")), &what);
            hit
        })
        .await;
    }
}

/// One is so large that it goes to the disk before the commit, and fails there: the others hear why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_writes_of_a_group_hear_that_the_disk_is_full() {
    at_each_call(&[Call::Write], usize::MAX, ffi::SQLITE_FULL, async |disk, dir, fault| {
        let cache = World::new(dir).open_cut_off().await.unwrap();
        let large = "x".repeat(3 << 20);
        disk.fail(Fault { from: fault.from * 151, ..fault });
        let puts =
            ["a", "b", "c", "d"].map(|key| cache.put(key, if key == "b" { large.as_str() } else { "small" }));
        let results = futures::future::join_all(puts.map(IntoFuture::into_future)).await;
        for error in results.into_iter().filter_map(Result::err) {
            let text = error.to_string();
            assert!(text.contains("q.db") && text.contains("the disk is full"), "{text}");
        }
        let hit = disk.mend();
        assert_eq!(cache.put("b", large.as_str()).await.unwrap(), Durability::Queued);
        hit
    })
    .await;
}

/// The queue is drained through a disk that fails: what it holds reaches the source of truth all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_whose_disk_fails_once_goes_on_and_loses_nothing() {
    at_each_call(CHANGES, 1, ffi::SQLITE_IOERR_WRITE, async |disk, dir, fault| {
        let mut world = World::new(dir);
        let cache = world.open().await.unwrap();
        world.away(&cache).await;
        let mut ledger = Ledger::default();
        write_some(&cache, &mut ledger, 0).await;
        disk.fail(fault);
        world.back(&cache).await;
        drained(&cache).await;
        let hit = disk.mend();
        for (key, possible) in &ledger.0 {
            cache.evict(key).unwrap();
            let found = cache.get(key).await.unwrap().map(|found| found.json().to_owned());
            assert_eq!(found, possible[0], "{key}");
        }
        assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
        hit
    })
    .await;
}

/// The source of truth is well, the disk is not: a put is stored all the same, and no older copy is handed out later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_cannot_be_written_fails_no_put_and_leaves_no_older_one_to_be_read() {
    for (times, restarts) in [(1, false), (1, true), (usize::MAX, true)] {
        at_each_call(CHANGES, times, ffi::SQLITE_FULL, async |disk, dir, fault| {
            let what = format!("{fault:?}, restart: {restarts}");
            let mut world = World::new(dir);
            let mut cache = world.open().await.unwrap();
            for key in ["a", "b", "c"] {
                assert_eq!(cache.put(key, "1").await.unwrap(), Durability::Stored);
            }
            // One that waits in the queue is not to be read for newer, either.
            world.faults.fail_trials(true);
            world.faults.poison("queued", Away::Fail(ErrorKind::Denied));
            assert_eq!(cache.put("queued", "1").await.unwrap(), Durability::Queued);
            world.faults.antidote();
            disk.fail(fault);
            for key in ["a", "queued", "b"] {
                assert_eq!(cache.put(key, "2").await.unwrap(), Durability::Stored, "{what}");
            }
            let hit = disk.mend();
            world.away(&cache).await;
            if restarts {
                drop(cache);
                cache = world.open_cut_off().await.unwrap();
            }
            for (key, newest) in [("a", "\"2\""), ("b", "\"2\""), ("c", "\"1\""), ("queued", "\"2\"")] {
                cache.evict(key).unwrap();
                match cache.get(key).await {
                    Ok(found) => assert_eq!(found.unwrap().json(), newest, "{what}: {key}"),
                    Err(error) => assert!(hit > 0 && error.is_outage(), "{what}: {key}: {error}"),
                }
            }
            // It knows again what it learns.
            world.back(&cache).await;
            assert_eq!(cache.put("a", "3").await.unwrap(), Durability::Stored);
            assert_eq!(cache.get("queued").await.unwrap().unwrap().json(), "\"2\"", "{what}");
            world.away(&cache).await;
            cache.evict("a").unwrap();
            assert_eq!(cache.get("a").await.unwrap().unwrap().json(), "\"3\"", "{what}");
            // Also not once more is started.
            drop(cache);
            let cache = world.open_cut_off().await.unwrap();
            if let Ok(found) = cache.get("queued").await {
                assert_eq!(found.unwrap().json(), "\"2\"", "{what}");
            }
            hit
        })
        .await;
    }
}

/// Nothing can be written, from before the restart until after it: the cache starts all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_on_a_disk_that_is_still_full_hands_out_nothing_old() {
    let dir = directory();
    let disk = Disk::watch(dir.path());
    let mut world = World::new(dir.path());
    let cache = world.open().await.unwrap();
    assert_eq!(cache.put("k", "1").await.unwrap(), Durability::Stored);
    disk.fail(Fault { calls: &[Call::Write], from: 0, times: usize::MAX, code: ffi::SQLITE_FULL });
    assert_eq!(cache.put("k", "2").await.unwrap(), Durability::Stored);
    drop(cache);
    for is_mended in [false, true] {
        if is_mended {
            assert!(disk.mend() > 0);
        }
        let cache = world.open_cut_off().await.unwrap();
        assert!(cache.get("k").await.unwrap_err().is_outage(), "mended: {is_mended}");
        world.back(&cache).await;
        assert_eq!(cache.get("k").await.unwrap().unwrap().json(), "\"2\"");
        assert_eq!(cache.put("other", "1").await.unwrap(), Durability::Stored);
        drop(cache);
    }
}

/// Whether a put in an outage waits for more than two syncs, its own included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_in_an_outage_returns_within_two_syncs_also_while_the_log_is_copied() {
    let dir = directory();
    let disk = Disk::watch(dir.path());
    let cache = World::new(dir.path()).open_cut_off().await.unwrap();
    let value = "x".repeat(100_000);
    // The first time, the log itself is begun.
    for at in 0..10 {
        let before = disk.syncs();
        let _ = cache.put(format!("{at}"), &value).await.unwrap();
        let syncs = disk.syncs() - before;
        assert!((1..=2).contains(&syncs), "put {at} took {syncs} syncs");
    }
    // The log is copied as soon as it is large; the copy is held up while it writes into the file.
    let hold = disk.hold_writes("q.db");
    for at in 0.. {
        assert!(at < 200, "the log is not copied");
        let _ = cache.put(format!("{at}"), &value).await.unwrap();
        if disk.is_holding() {
            break;
        }
    }
    for at in 0..20 {
        let before = disk.syncs();
        let put = tokio::time::timeout(10 * SECOND, cache.put(format!("{at}"), "beside").into_future()).await;
        assert_eq!(put.expect("it waits for the copy").unwrap(), Durability::Queued);
        let syncs = disk.syncs() - before;
        assert!((1..=2).contains(&syncs), "put {at} took {syncs} syncs");
    }
    drop(hold);
    // Together they take no more than each alone.
    let before = disk.syncs();
    let puts = (0..200).map(|at| cache.put(format!("{at}"), "together").into_future());
    futures::future::join_all(puts).await.into_iter().for_each(|put| _ = put.unwrap());
    let syncs = disk.syncs() - before;
    assert!(syncs <= 40, "{syncs} syncs for 200 puts at once");
}
