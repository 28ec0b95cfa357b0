//! Starts the shared stack, and builds caches in front of it.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;
use threadkeep::store::{BatchingStore, Clock, ResilientStore, Supabase};
use threadkeep::testing::{FaultStore, Faults};
use threadkeep::{Builder, Cache};

use crate::rest::{Rest, apply_body};
use crate::stack::{Server, Stack, jwt};
use crate::work::thread;

/// Deadline of a call, the same as in the builder.
const DEADLINE: Duration = Duration::from_millis(5_250);
const SEED_BATCH: usize = 250;
pub const KIB: usize = 1024;

/// The amount of work: full or quick.
#[derive(Clone, Copy)]
pub struct Scale {
    pub rounds: usize,
    pub is_quick: bool,
}

impl Scale {
    /// Returns `quick` in a quick run, else `full`. A quick run checks only that the benchmark works.
    pub fn of(self, full: usize, quick: usize) -> usize {
        if self.is_quick { quick } else { full }
    }

    pub fn span(self, full: Duration) -> Duration {
        if self.is_quick { full / 20 } else { full }
    }
}

/// Pins this process and its future children to one part of the cores. A machine with one core shares it.
fn pin_to_cores(part: usize, parts: usize) {
    static CORES: OnceLock<usize> = OnceLock::new();
    let cores = CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
    let (first, last) = (cores * part / parts, (cores * (part + 1) / parts).max(1) - 1);
    let (list, process) = (format!("{first}-{}", last.max(first)), std::process::id().to_string());
    let pin =
        || Command::new("taskset").args(["--all-tasks", "--cpu-list", "--pid", &list, &process]).output();
    let mut last_output = None;
    // taskset fails if an OS thread ends while taskset iterates over the threads. So the pin is repeated.
    for _ in 0..10 {
        let output = pin().unwrap_or_else(|error| panic!("cannot run taskset (package util-linux): {error}"));
        let is_done = output.status.success();
        last_output = Some(output);
        if is_done {
            break;
        }
    }
    let is_done = last_output.as_ref().is_some_and(|output| output.status.success());
    assert!(*cores == 1 || is_done, "{last_output:?}");
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
            pin_to_cores(0, 2);
            Stack::start_synced(Server::Postrust)
        });
        let (url, token) = (stack.server_url(), jwt("service_role"));
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let rest = Rest::new(&url, &token);
        Self { stack, rest, scale, url, token, dir, files: 0.into() }
    }

    /// Starts a second stack, with the functions of revision 2. The measured client must not have its cores yet.
    pub fn rest_of_revision_2(&self) -> (Stack, Rest) {
        let stack = tokio::task::block_in_place(|| {
            pin_to_cores(0, 2);
            Stack::start_synced_at_revision_2(Server::Postrust)
        });
        self.share_cores(false);
        let rest = Rest::new(&stack.server_url(), &self.token);
        (stack, rest)
    }

    /// Gives the client its cores: one half, or all if the stack is idle.
    ///
    /// In reality the database is another machine, and the client takes no CPU time from it.
    pub fn share_cores(&self, is_stack_idle: bool) {
        tokio::task::block_in_place(|| if is_stack_idle { pin_to_cores(0, 1) } else { pin_to_cores(1, 2) });
    }

    /// Returns a new path on a real disk.
    pub fn file(&self) -> PathBuf {
        self.files.set(self.files.get() + 1);
        self.dir.path().join(format!("{}.db", self.files.get()))
    }

    /// Returns a builder like `Cache::builder().supabase(…)`, but without a gateway in front of the server.
    pub fn builder(&self) -> Builder {
        self.builder_with_faults().0
    }

    /// Returns the same builder, and the faults of its store.
    pub fn builder_with_faults(&self) -> (Builder, Faults) {
        let faulty = FaultStore::new(Supabase::of_postgrest(&self.url, &self.token).unwrap());
        let faults = faulty.faults();
        let builder = Cache::builder().store(BatchingStore::new(ResilientStore::new(faulty, DEADLINE)));
        (
            builder
                .queue(self.file())
                .queue_max_bytes(4 << 30)
                .cache_max_bytes(4 << 30)
                .replica_max_bytes(4 << 30),
            faults,
        )
    }

    /// Stores conversations with bare requests, before a measurement.
    pub async fn seed(&self, threads: usize, bytes: usize) {
        let clock = Clock::new();
        let bodies: Vec<String> = (0..threads)
            .step_by(SEED_BATCH)
            .map(|first| {
                let some = first..(first + SEED_BATCH).min(threads);
                apply_body(&clock, some.map(|at| (thread(at), bytes)))
            })
            .collect();
        self.rest.call_all("threadkeep_apply", &bodies.into()).await;
    }
}
