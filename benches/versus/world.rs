//! The stack that all compete on, and caches in front of it as the builder makes them.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;
use threadkeep::testing::{Faults, Faulty};
use threadkeep::{Batched, Builder, Cache, Clock, Guard, Supabase};

use crate::rest::{Rest, apply_body};
use crate::stack::{Server, Stack, jwt};
use crate::work::thread;

/// As the builder has it.
const DEADLINE: Duration = Duration::from_millis(5_250);
const SEEDING: usize = 250;
pub const KIB: usize = 1024;

/// How much is measured.
#[derive(Clone, Copy)]
pub struct Scale {
    pub rounds: usize,
    pub is_quick: bool,
}

impl Scale {
    /// That it runs at all is all that a quick run shows.
    pub fn of(self, full: usize, quick: usize) -> usize {
        if self.is_quick { quick } else { full }
    }

    pub fn span(self, full: Duration) -> Duration {
        if self.is_quick { full / 20 } else { full }
    }
}

/// Keeps this process, and what it starts from now on, on one part of the machine's cores. One core is shared.
fn stay_on(part: usize, parts: usize) {
    static CORES: OnceLock<usize> = OnceLock::new();
    let cores = CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
    let (first, last) = (cores * part / parts, (cores * (part + 1) / parts).max(1) - 1);
    let (list, process) = (format!("{first}-{}", last.max(first)), std::process::id().to_string());
    let pin =
        || Command::new("taskset").args(["--all-tasks", "--cpu-list", "--pid", &list, &process]).output();
    let mut done = None;
    // A thread that ends while taskset goes through them makes it fail.
    for _ in 0..10 {
        let output = pin().unwrap_or_else(|error| panic!("taskset (of util-linux) does not run: {error}"));
        let is_done = output.status.success();
        done = Some(output);
        if is_done {
            break;
        }
    }
    let is_done = done.as_ref().is_some_and(|done| done.status.success());
    assert!(*cores == 1 || is_done, "{done:?}");
}

pub struct World {
    pub stack: Stack,
    pub rest: Rest,
    pub scale: Scale,
    url: String,
    token: String,
    dir: TempDir,
    files: std::cell::Cell<usize>,
}

impl World {
    pub fn start(scale: Scale) -> Self {
        let stack = tokio::task::block_in_place(|| {
            stay_on(0, 2);
            Stack::start_synced(Server::Postrust)
        });
        let (url, token) = (stack.server_url(), jwt("service_role"));
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let rest = Rest::new(&url, &token);
        Self { stack, rest, scale, url, token, dir, files: 0.into() }
    }

    /// In reality, the database is another machine, and what a client computes takes nothing from it: the two have one half of
    /// the cores each. Where the database has nothing to do, a client has all.
    pub fn share_cores(&self, is_by_itself: bool) {
        tokio::task::block_in_place(|| if is_by_itself { stay_on(0, 1) } else { stay_on(1, 2) });
    }

    /// A file of its own, on a real disk.
    pub fn file(&self) -> PathBuf {
        self.files.set(self.files.get() + 1);
        self.dir.path().join(format!("{}.db", self.files.get()))
    }

    /// What `Cache::builder().supabase(…)` makes, but that the server is spoken to without a gateway.
    pub fn builder(&self) -> Builder {
        self.cut_builder().0
    }

    /// The same with a line that can be cut.
    pub fn cut_builder(&self) -> (Builder, Faults) {
        let faulty = Faulty::new(Supabase::of_postgrest(&self.url, &self.token).unwrap());
        let faults = faulty.faults();
        let builder = Cache::builder().store(Batched::new(Guard::new(faulty, DEADLINE)));
        (builder.queue(self.file()).queue_bytes(4 << 30).cache_bytes(4 << 30).replica_bytes(4 << 30), faults)
    }

    /// Sees to it that these threads are stored, by way of nobody who is measured.
    pub async fn seed(&self, threads: usize, bytes: usize) {
        let clock = Clock::new();
        let bodies: Vec<String> = (0..threads)
            .step_by(SEEDING)
            .map(|first| {
                let some = first..(first + SEEDING).min(threads);
                apply_body(&clock, some.map(|at| (thread(at), bytes)))
            })
            .collect();
        self.rest.call_all("threadkeep_apply", &bodies.into()).await;
    }
}
