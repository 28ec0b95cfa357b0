//! The power is cut: what was acknowledged as queued is there afterwards, and nothing is half there.

use std::fs;
use std::path::Path;

use threadkeep::Durability;

use crate::vfs::{Call, Change, Disk, Fault, after_power_cut};
use crate::world::{FILE, Held, Step, World, directory, held, shown};

/// Writes, one after another, and what the disk had seen when each began and was acknowledged.
struct History {
    changes: Vec<Change>,
    /// What the file may hold after so many of them.
    states: Vec<Held>,
    moments: Vec<Moment>,
    /// How many there were when the file had been opened, and the lock beside it says so.
    opened: usize,
    lock: Vec<u8>,
    main: Vec<u8>,
    wal: Vec<u8>,
}

struct Moment {
    began: usize,
    /// None: it was an error.
    acknowledged: Option<usize>,
    is_queued: bool,
}

impl History {
    /// `failing`: of that write a sync fails.
    async fn record(seed: u64, steps: usize, size: usize, failing: Option<usize>) -> Self {
        Self::record_until(seed, size, failing, |made, _| made == steps).await
    }

    async fn record_until(
        seed: u64,
        size: usize,
        failing: Option<usize>,
        is_enough: impl Fn(usize, &Disk) -> bool,
    ) -> Self {
        let dir = directory();
        let disk = Disk::watch(dir.path());
        let (mut world, mut rng) = (World::new(dir.path()), fastrand::Rng::with_seed(seed));
        let cache = world.open().await.unwrap();
        let opened = disk.len();
        let (mut state, mut states, mut moments) = (Held::new(), vec![Held::new()], Vec::new());
        for at in (0..).take_while(|made| !is_enough(*made, &disk)) {
            let mut step = Step::next(&mut rng, at, size);
            let fails = failing == Some(at);
            if fails {
                step.is_queued = true;
                disk.fail(Fault { calls: &[Call::Sync], from: 0, times: 1, code: IOERR_FSYNC });
            }
            let began = disk.len();
            let result = step.make(&world, &cache).await;
            let acknowledged = result.is_ok().then(|| disk.len());
            if fails {
                assert_eq!(disk.mend(), 1);
            }
            // The sync that failed may have been one of the replay's.
            let is_error = match &result {
                Err(error) => {
                    assert!(fails && error.kind() == threadkeep::ErrorKind::Local, "{error}");
                    true
                }
                Ok(durability) => {
                    assert_eq!(*durability == Durability::Queued, step.is_queued);
                    false
                }
            };
            let mut next = state.clone();
            step.apply(&mut next);
            states.push(next.clone());
            moments.push(Moment { began, acknowledged, is_queued: step.is_queued });
            if !is_error {
                state = next;
            }
        }
        let changes = disk.changes();
        let read = |suffix: &str| fs::read(dir.path().join(format!("{FILE}{suffix}"))).unwrap();
        Self { changes, states, moments, opened, lock: read(".lock"), main: read(""), wal: read("-wal") }
    }

    /// Whether the file may hold this, when so many changes had been made and so many of them had to be on disk.
    fn check(&self, made: usize, safe: usize, holds: &Held, what: &str) {
        let is_safe = |moment: &Moment| moment.is_queued && moment.acknowledged.is_some_and(|at| at <= safe);
        let least = self.moments.iter().rposition(is_safe).map_or(0, |at| at + 1);
        let most = self.moments.iter().take_while(|moment| moment.began <= made).count();
        let is_one = self.states[least..=most].contains(holds);
        let brief = |held: &Held| -> Vec<String> {
            let start = |value: &Option<String>| value.as_ref().map(|v| v[..v.len().min(5)].to_owned());
            held.iter().map(|(key, (value, queued))| format!("{key}:{:?}:{queued}", start(value))).collect()
        };
        assert!(
            is_one,
            "{what}: {:?} is none of the states {least} to {most}; {:?} was acknowledged last",
            brief(holds),
            brief(&self.states[least]),
        );
    }

    fn keys(&self) -> impl Iterator<Item = String> + use<> {
        (0..6).map(|at| format!("k{at}"))
    }

    /// How long the write-ahead log was when so many changes had been made.
    fn wal_len(&self, changes: usize) -> usize {
        let end = |change: &Change| match change {
            Change::Write { file, at, bytes } if file.ends_with("-wal") => at + bytes.len(),
            _ => 0,
        };
        self.changes[..changes].iter().map(end).max().unwrap_or(0)
    }

    /// What the file holds with another log, as SQL says; and, where asked for, as a cache says that starts with it.
    async fn with_wal(&self, wal: &[u8], dir: &Path, ask_cache: bool) -> Held {
        let prepare = |dir: &Path| {
            for (suffix, bytes) in [("", &self.main[..]), ("-wal", wal), (".lock", &self.lock)] {
                fs::write(dir.join(format!("{FILE}{suffix}")), bytes).unwrap();
            }
            fs::remove_file(dir.join(format!("{FILE}-shm"))).ok();
        };
        prepare(dir);
        let holds = held(&dir.join(FILE));
        if ask_cache {
            prepare(dir);
            agree(dir, &holds, self.keys()).await;
        }
        holds
    }
}

const IOERR_FSYNC: i32 = rusqlite::ffi::SQLITE_IOERR_FSYNC;

/// A cache that starts with these files in an outage takes them as they are, and hands out what they hold.
async fn agree(dir: &Path, holds: &Held, keys: impl Iterator<Item = String>) {
    let (shown, queued) = shown(dir, keys).await;
    let readable =
        |(_, (value, is_queued)): &(&String, &(Option<String>, bool))| *is_queued || value.is_some();
    let expected: Held =
        holds.iter().filter(readable).map(|(key, held)| (key.clone(), held.clone())).collect();
    assert_eq!(shown, expected);
    assert_eq!(queued, holds.values().filter(|(_, is_queued)| *is_queued).count());
    let names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_str().unwrap().contains("damaged")), "{names:?}");
}

fn is_every_byte() -> bool {
    std::env::var_os("DISK_EVERY_BYTE").is_some()
}

/// Every byte takes minutes; `DISK_EVERY_BYTE=1` tries them all.
fn places(rng: &mut fastrand::Rng, len: usize) -> Vec<usize> {
    if is_every_byte() {
        return (0..=len).collect();
    }
    // A header of 32 bytes; then frames, each a header of 24 bytes and a page.
    let ends = (0..).map(|frame| 32 + frame * (24 + 4096)).take_while(|end| *end <= len);
    let near = ends.flat_map(|end| [end - 2, end - 1, end, end + 1, end + 8, end + 23, end + 24, end + 25]);
    let mut places: Vec<usize> = (0..=32).chain(near).chain((0..500).map(|_| rng.usize(..=len))).collect();
    places.retain(|place| *place <= len);
    places.sort_unstable();
    places.dedup();
    places
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_ends_anywhere_or_in_rubbish_holds_what_was_acknowledged_before() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let (steps, size, ask_every) = if is_every_byte() { (12, 600, 2_000) } else { (24, 6_000, 40) };
    let history = History::record(seed, steps, size, None).await;
    let (dir, mut rng) = (directory(), fastrand::Rng::with_seed(seed));
    let len = history.wal.len();
    let safe = |upto: usize| {
        let is_within = |changes: &usize| history.wal_len(*changes) <= upto;
        let acknowledged = history.moments.iter().filter_map(|moment| moment.acknowledged);
        acknowledged.filter(is_within).max().unwrap_or(0)
    };
    let places = places(&mut rng, len);
    println!("{} of {len} bytes", places.len());
    for (count, cut) in places.into_iter().enumerate() {
        let holds = history.with_wal(&history.wal[..cut], dir.path(), count % ask_every == 0).await;
        history.check(usize::MAX, safe(cut), &holds, &format!("cut at {cut} of {len}"));
    }
    for turn in 0..300 {
        let from = rng.usize(..len);
        let mut wal = history.wal.clone();
        let what = match turn % 3 {
            0 => {
                wal[from] ^= 1 << rng.u8(..8);
                "one bit flipped"
            }
            1 => {
                wal[from..].fill_with(|| rng.u8(..));
                "rubbish"
            }
            _ => {
                wal[from..].fill(0);
                "zeroes"
            }
        };
        let holds = history.with_wal(&wal, dir.path(), turn % 20 == 0).await;
        history.check(usize::MAX, safe(from), &holds, &format!("{what} from {from} of {len}"));
    }
}

/// Cuts the power at many moments of a history.
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
        let holds = held(&dir.path().join(FILE));
        history.check(made, made, &holds, &format!("seed {seed}, power cut after {made} changes"));
        if count % 10 == 0 {
            agree(dir.path(), &holds, history.keys()).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_at_any_moment_loses_nothing_that_was_acknowledged() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    cut_power(&History::record(seed, 40, 6_000, None).await, seed, 400).await;
}

/// Large values, so that the log is copied into the file and begun anew meanwhile; how often after so many writes is up to
/// the thread that copies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_while_the_log_is_copied_into_the_file_loses_nothing_either() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let is_copied = |made: usize, disk: &Disk| {
        let copies = disk.syncs_of(FILE);
        assert!(made < 1_000, "the log was copied only {copies} times");
        made >= 70 && copies > 2
    };
    let history = History::record_until(seed, 400_000, None, is_copied).await;
    cut_power(&history, seed, 100).await;
}

/// What was written before a sync that failed may never reach the disk, also where the next one succeeds: what is
/// acknowledged afterwards must not build on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_after_a_sync_that_failed_survives_a_power_cut() {
    for turn in 0..6 {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let history = History::record(seed, 16, 6_000, Some(4 + turn)).await;
        cut_power(&history, seed, 60).await;
    }
}
