//! Power cuts: each write that was acknowledged as `Queued` survives (I4), and no write survives in part.

use std::fs;
use std::path::Path;

use threadkeep::WriteOutcome;

use crate::power_cut::{Change, after_power_cut};
use crate::vfs::{Call, Disk, Fault};
use crate::world::{Contents, FILE, Step, World, cached_contents, contents, directory};

/// A sequence of writes, and the number of disk changes at the start and at the acknowledgement of each write.
struct History {
    changes: Vec<Change>,
    /// The expected content of the file after each number of writes.
    states: Vec<Contents>,
    writes: Vec<WriteSpan>,
    /// The number of changes after the open. From then on the lock file names this process.
    opened: usize,
    lock: Vec<u8>,
    main: Vec<u8>,
    wal: Vec<u8>,
}

struct WriteSpan {
    started: usize,
    /// `None` if the write failed.
    acknowledged: Option<usize>,
    is_queued: bool,
}

impl History {
    /// Records `steps` writes. A sync fails during the write with the number `failing`.
    async fn record(seed: u64, steps: usize, size: usize, failing: Option<usize>) -> Self {
        Self::record_until(seed, size, failing, |made, _| made == steps).await
    }

    async fn record_until(
        seed: u64,
        size: usize,
        failing: Option<usize>,
        is_complete: impl Fn(usize, &Disk) -> bool,
    ) -> Self {
        let dir = directory();
        let disk = Disk::watch(dir.path());
        let (mut world, mut rng) = (World::new(dir.path()), fastrand::Rng::with_seed(seed));
        let cache = world.open().await.unwrap();
        let opened = disk.len();
        let (mut state, mut states, mut writes) = (Contents::new(), vec![Contents::new()], Vec::new());
        for at in (0..).take_while(|made| !is_complete(*made, &disk)) {
            let mut step = Step::next(&mut rng, at, size);
            // A conversation with queued writes keeps to the queue.
            step.is_queued |= state.get(&step.key).is_some_and(|(_, is_queued)| *is_queued);
            let fails = failing == Some(at);
            if fails {
                step.is_queued = true;
                disk.fail(Fault { calls: &[Call::Sync], from: 0, times: 1, code: IOERR_FSYNC });
            }
            let started = disk.len();
            let result = step.run(&world, &cache).await;
            let acknowledged = result.is_ok().then(|| disk.len());
            if fails {
                assert_eq!(disk.end_fault(), 1);
            }
            // The failed sync may belong to the replay. Then the write succeeds.
            let is_error = match &result {
                Err(error) => {
                    assert!(fails && error.kind() == threadkeep::ErrorKind::LocalStorage, "{error}");
                    true
                }
                Ok(outcome) => {
                    assert_eq!(*outcome == WriteOutcome::Queued, step.is_queued);
                    false
                }
            };
            let mut next = state.clone();
            step.apply(&mut next);
            states.push(next.clone());
            writes.push(WriteSpan { started, acknowledged, is_queued: step.is_queued });
            if !is_error {
                state = next;
            }
        }
        let changes = disk.changes();
        let read = |suffix: &str| fs::read(dir.path().join(format!("{FILE}{suffix}"))).unwrap();
        Self { changes, states, writes, opened, lock: read(".lock"), main: read(""), wal: read("-wal") }
    }

    /// Asserts that `found` is a possible content of the file after `made` changes, of which `safe` are synced.
    fn check(&self, made: usize, safe: usize, found: &Contents, context: &str) {
        let is_safe = |write: &WriteSpan| write.is_queued && write.acknowledged.is_some_and(|at| at <= safe);
        let min = self.writes.iter().rposition(is_safe).map_or(0, |at| at + 1);
        let max = self.writes.iter().take_while(|write| write.started <= made).count();
        let is_possible = self.states[min..=max].contains(found);
        let brief = |held: &Contents| -> Vec<String> {
            let start = |value: &Option<String>| value.as_ref().map(|v| v[..v.len().min(5)].to_owned());
            held.iter().map(|(key, (value, queued))| format!("{key}:{:?}:{queued}", start(value))).collect()
        };
        assert!(
            is_possible,
            "{context}: {:?} is none of the states {min} to {max}; the last acknowledged state is {:?}",
            brief(found),
            brief(&self.states[min]),
        );
    }

    fn keys(&self) -> impl Iterator<Item = String> + use<> {
        (0..6).map(|at| format!("k{at}"))
    }

    /// Returns the length of the write-ahead log after this number of changes.
    fn wal_len(&self, changes: usize) -> usize {
        let end = |change: &Change| match change {
            Change::Write { file, at, bytes } if file.ends_with("-wal") => at + bytes.len(),
            _ => 0,
        };
        self.changes[..changes].iter().map(end).max().unwrap_or(0)
    }

    /// Reads the content of the file with another write-ahead log. If `ask_cache` is true, a cache must show the same content.
    async fn with_wal(&self, wal: &[u8], dir: &Path, ask_cache: bool) -> Contents {
        let prepare = |dir: &Path| {
            for (suffix, bytes) in [("", &self.main[..]), ("-wal", wal), (".lock", &self.lock)] {
                fs::write(dir.join(format!("{FILE}{suffix}")), bytes).unwrap();
            }
            fs::remove_file(dir.join(format!("{FILE}-shm"))).ok();
        };
        prepare(dir);
        let found = contents(&dir.join(FILE));
        if ask_cache {
            prepare(dir);
            check_cache_agrees(dir, &found, self.keys()).await;
        }
        found
    }
}

const IOERR_FSYNC: i32 = rusqlite::ffi::SQLITE_IOERR_FSYNC;

/// Asserts that a cache that starts with these files in an outage accepts them and returns their content.
async fn check_cache_agrees(dir: &Path, found: &Contents, keys: impl Iterator<Item = String>) {
    let (shown, queued) = cached_contents(dir, keys).await;
    let readable =
        |(_, (value, is_queued)): &(&String, &(Option<String>, bool))| *is_queued || value.is_some();
    let expected: Contents =
        found.iter().filter(readable).map(|(key, held)| (key.clone(), held.clone())).collect();
    assert_eq!(shown, expected);
    assert_eq!(queued, found.values().filter(|(_, is_queued)| *is_queued).count());
    let names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_str().unwrap().contains("corrupt")), "{names:?}");
}

fn is_every_byte() -> bool {
    std::env::var_os("DISK_EVERY_BYTE").is_some()
}

/// Chooses the positions of the cuts. All positions (`DISK_EVERY_BYTE=1`) take minutes.
fn positions(rng: &mut fastrand::Rng, len: usize) -> Vec<usize> {
    if is_every_byte() {
        return (0..=len).collect();
    }
    // The log has a header of 32 bytes. Each frame has a header of 24 bytes and a page.
    let ends = (0..).map(|frame| 32 + frame * (24 + 4096)).take_while(|end| *end <= len);
    let near = ends.flat_map(|end| [end - 2, end - 1, end, end + 1, end + 8, end + 23, end + 24, end + 25]);
    let mut positions: Vec<usize> = (0..=32).chain(near).chain((0..500).map(|_| rng.usize(..=len))).collect();
    positions.retain(|position| *position <= len);
    positions.sort_unstable();
    positions.dedup();
    positions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_cut_or_corrupt_at_any_byte_keeps_earlier_writes() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let (steps, size, ask_every) = if is_every_byte() { (12, 600, 2_000) } else { (24, 6_000, 40) };
    let history = History::record(seed, steps, size, None).await;
    let (dir, mut rng) = (directory(), fastrand::Rng::with_seed(seed));
    let len = history.wal.len();
    let safe = |upto: usize| {
        let is_within = |changes: &usize| history.wal_len(*changes) <= upto;
        let acknowledged = history.writes.iter().filter_map(|write| write.acknowledged);
        acknowledged.filter(is_within).max().unwrap_or(0)
    };
    let positions = positions(&mut rng, len);
    println!("{} of {len} bytes", positions.len());
    for (count, cut) in positions.into_iter().enumerate() {
        let found = history.with_wal(&history.wal[..cut], dir.path(), count % ask_every == 0).await;
        history.check(usize::MAX, safe(cut), &found, &format!("cut at {cut} of {len}"));
    }
    for turn in 0..300 {
        let from = rng.usize(..len);
        let mut wal = history.wal.clone();
        let damage = match turn % 3 {
            0 => {
                wal[from] ^= 1 << rng.u8(..8);
                "one bit flipped"
            }
            1 => {
                wal[from..].fill_with(|| rng.u8(..));
                "random bytes"
            }
            _ => {
                wal[from..].fill(0);
                "zeroes"
            }
        };
        let found = history.with_wal(&wal, dir.path(), turn % 20 == 0).await;
        history.check(usize::MAX, safe(from), &found, &format!("{damage} from {from} of {len}"));
    }
}

/// Cuts the power at random moments of a history.
async fn cut_power(history: &History, seed: u64, cuts: usize) {
    let mut rng = fastrand::Rng::with_seed(seed);
    for count in 0..cuts {
        let made = rng.usize(..=history.changes.len());
        let dir = directory();
        for (name, bytes) in after_power_cut(&history.changes[..made], &mut rng) {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        if made >= history.opened {
            fs::write(dir.path().join(format!("{FILE}.lock")), &history.lock).unwrap();
        }
        let found = contents(&dir.path().join(FILE));
        history.check(made, made, &found, &format!("seed {seed}, power cut after {made} changes"));
        if count % 10 == 0 {
            check_cache_agrees(dir.path(), &found, history.keys()).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_cut_loses_no_acknowledged_write() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    cut_power(&History::record(seed, 40, 6_000, None).await, seed, 400).await;
}

/// Large values make SQLite checkpoint and restart the write-ahead log during the history. The OS thread of the checkpoints
/// decides their number.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_cut_during_checkpoint_loses_no_acknowledged_write() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let has_checkpoints = |made: usize, disk: &Disk| {
        let checkpoints = disk.syncs_of(FILE);
        assert!(made < 1_000, "timed out: the log had only {checkpoints} checkpoints");
        made >= 70 && checkpoints > 2
    };
    let history = History::record_until(seed, 400_000, None, has_checkpoints).await;
    cut_power(&history, seed, 100).await;
}

/// Data from before a failed sync may never reach the disk, even if the next sync succeeds. A later acknowledged write must
/// not depend on that data (I15).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_cut_after_a_failed_sync_loses_no_later_write() {
    for turn in 0..6 {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let history = History::record(seed, 16, 6_000, Some(4 + turn)).await;
        cut_power(&history, seed, 60).await;
    }
}
