//! Caches as the builder composes them, over a store in this process.

use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{Batched, Builder, Cache, Durability, Guard, Memory, Store};
use tokio::runtime::Runtime;

use crate::shelf::thread;
use crate::work::{Conversation, by_tasks, conversation};

pub const KIB: usize = 1024;
pub const SIZES: [usize; 3] = [KIB, 16 * KIB, 400_000];
const PLENTY: usize = 8 << 30;

/// A value's size as names have it.
pub fn size(bytes: usize) -> String {
    if bytes.is_multiple_of(KIB) { format!("{} KiB", bytes / KIB) } else { format!("{} KB", bytes / 1_000) }
}

pub fn value(bytes: usize) -> Conversation {
    conversation("a conversation", bytes)
}

/// That it runs at all is all that a quick run shows.
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

    /// A file of its own, on a real disk.
    pub fn file(&self) -> PathBuf {
        self.files.set(self.files.get() + 1);
        self.dir.path().join(format!("{}.db", self.files.get()))
    }

    /// What stands before a store as before Supabase, with a line that can be cut.
    pub fn before(&self, store: impl Store) -> (Builder, Faults) {
        let _guard = self.runtime.enter();
        let faulty = Faulty::new(store);
        let faults = faulty.faults();
        let store = Batched::new(Guard::new(faulty, Duration::from_secs(5)));
        (roomy(Cache::builder().store(store)), faults)
    }

    /// An empty store, and the file for queue and last known copies.
    pub fn with_file(&self) -> Cache {
        self.open(self.before(Memory::new()).0.queue(self.file()))
    }

    pub fn open(&self, builder: Builder) -> Cache {
        self.block_on(builder.open()).unwrap()
    }

    /// A cache whose source of truth is away, and which knows it, once it has been given so many threads; none is fresh.
    pub fn cut_off(&self, threads: usize) -> Cache {
        let (builder, faults) = self.before(Memory::new());
        let cache = self.open(builder.queue(self.file()).fresh_for(Duration::ZERO));
        self.put_all(&cache, threads, KIB);
        self.cut(&cache, &faults);
        cache
    }

    pub fn cut(&self, cache: &Cache, faults: &Faults) {
        faults.always(Fault::Refuse);
        while cache.health().is_available() {
            let _ = self.block_on(cache.get("nobody has this id"));
        }
    }

    pub fn put_all(&self, cache: &Cache, threads: usize, bytes: usize) {
        let (cache, value) = (cache.clone(), value(bytes));
        self.run(64, threads, move |at| {
            let (cache, value) = (cache.clone(), value.clone());
            async move { assert_ne!(cache.put(thread(at), &value).await.unwrap(), Durability::Superseded) }
        });
    }

    /// So many calls by so many tasks at once.
    pub fn run<F: Future<Output = ()> + Send>(
        &self,
        tasks: usize,
        count: usize,
        call: impl Fn(usize) -> F + Clone + Send + 'static,
    ) -> Duration {
        self.block_on(by_tasks(tasks, count, call))
    }
}

/// No bound of memory or file is met here.
pub fn roomy(builder: Builder) -> Builder {
    builder.cache_bytes(PLENTY).queue_bytes(PLENTY).replica_bytes(PLENTY)
}
