//! Builds caches over a store in this process, with the layers that the builder adds.

use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use threadkeep::store::{BatchingStore, Memory, ResilientStore, Store};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{Builder, Cache, WriteOutcome};
use tokio::runtime::Runtime;

use crate::shelf::thread;
use crate::work::{Conversation, by_tasks, conversation};

pub const KIB: usize = 1024;
pub const SIZES: [usize; 3] = [KIB, 16 * KIB, 400_000];
const LIMIT: usize = 8 << 30;

/// Returns a size as it appears in the name of a benchmark.
pub fn size(bytes: usize) -> String {
    if bytes.is_multiple_of(KIB) { format!("{} KiB", bytes / KIB) } else { format!("{} KB", bytes / 1_000) }
}

pub fn value(bytes: usize) -> Conversation {
    conversation("a conversation", bytes)
}

/// Returns `full` with `--bench`, else `quick`. A quick run checks only that the benchmark works.
pub fn scaled(full: usize, quick: usize) -> usize {
    if std::env::args().any(|arg| arg == "--bench") { full } else { quick }
}

pub struct World {
    runtime: Runtime,
    dir: TempDir,
    files: Cell<usize>,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { runtime: Runtime::new().unwrap(), dir, files: 0.into() }
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Returns a new path on a real disk.
    pub fn file(&self) -> PathBuf {
        self.files.set(self.files.get() + 1);
        self.dir.path().join(format!("{}.db", self.files.get()))
    }

    /// Returns a builder with the layers of the Supabase backend, and the faults of the store.
    pub fn builder_for(&self, store: impl Store) -> (Builder, Faults) {
        let _guard = self.runtime.enter();
        let faulty = FaultStore::new(store);
        let faults = faulty.faults();
        let store = BatchingStore::new(ResilientStore::new(faulty, Duration::from_secs(5)));
        (without_limits(Cache::builder().store(store)), faults)
    }

    /// Opens a cache with an empty store and an outage file.
    pub fn with_file(&self) -> Cache {
        self.open(self.builder_for(Memory::new()).0.queue(self.file()))
    }

    pub fn open(&self, builder: Builder) -> Cache {
        self.block_on(builder.open()).unwrap()
    }

    /// Opens a cache, puts `threads` conversations and starts an outage. The breaker is open and no entry is fresh.
    pub fn in_outage(&self, threads: usize) -> Cache {
        let (builder, faults) = self.builder_for(Memory::new());
        let cache = self.open(builder.queue(self.file()).fresh_for(Duration::ZERO));
        self.put_all(&cache, threads, KIB);
        self.start_outage(&cache, &faults);
        cache
    }

    /// Starts an outage and waits until the breaker is open.
    pub fn start_outage(&self, cache: &Cache, faults: &Faults) {
        faults.always(Fault::Refuse);
        while cache.health().is_available() {
            let _ = self.block_on(cache.get("nobody has this id"));
        }
    }

    pub fn put_all(&self, cache: &Cache, threads: usize, bytes: usize) {
        let (cache, value) = (cache.clone(), value(bytes));
        self.run(64, threads, move |at| {
            let (cache, value) = (cache.clone(), value.clone());
            async move { assert_ne!(cache.put(thread(at), &value).await.unwrap(), WriteOutcome::Superseded) }
        });
    }

    /// Runs `count` calls in `tasks` concurrent tasks and returns the total time.
    pub fn run<F: Future<Output = ()> + Send>(
        &self,
        tasks: usize,
        count: usize,
        call: impl Fn(usize) -> F + Clone + Send + 'static,
    ) -> Duration {
        self.block_on(by_tasks(tasks, count, call))
    }
}

/// Raises the limits of memory and file, so that no benchmark reaches them.
pub fn without_limits(builder: Builder) -> Builder {
    builder.cache_max_bytes(LIMIT).queue_max_bytes(LIMIT).replica_max_bytes(LIMIT)
}
