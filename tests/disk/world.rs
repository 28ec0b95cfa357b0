//! A store, the directory of one daemon, and the content of its outage file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{Builder, Cache, Freshness, WriteOutcome};

/// The store never hangs in these tests, so a busy machine alone could reach it.
pub const DEADLINE: Duration = Duration::from_secs(10);
pub const FILE: &str = "q.db";

/// Makes a temporary directory, in memory if the machine has /dev/shm, because these tests write much.
pub fn directory() -> tempfile::TempDir {
    let fast = Path::new("/dev/shm");
    let made = if fast.is_dir() { tempfile::tempdir_in(fast) } else { tempfile::tempdir() };
    made.unwrap()
}

/// A store that outlives the daemons, and the directory with the outage file of one daemon.
pub struct World {
    pub store: Arc<Memory>,
    pub faults: Faults,
    pub dir: PathBuf,
}

impl World {
    pub fn new(dir: &Path) -> Self {
        let store = Arc::new(Memory::new());
        let faults = FaultStore::new(Arc::clone(&store)).faults();
        Self { store, faults, dir: dir.to_owned() }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.join(FILE)
    }

    pub fn builder(&mut self) -> Builder {
        let faulty = FaultStore::new(Arc::clone(&self.store));
        self.faults = faulty.faults();
        let builder = Cache::builder().store(ResilientStore::new(faulty, DEADLINE)).queue(self.path());
        builder.fresh_for(Duration::ZERO).soft_timeout(DEADLINE / 2)
    }

    pub async fn open(&mut self) -> threadkeep::Result<Cache> {
        self.builder().open().await
    }

    /// Opens a cache during an outage.
    pub async fn open_in_outage(&mut self) -> threadkeep::Result<Cache> {
        let builder = self.builder();
        self.faults.always(Fault::Refuse);
        let cache = builder.open().await?;
        wait_until_open(&cache).await;
        Ok(cache)
    }

    pub async fn start_outage(&self, cache: &Cache) {
        self.faults.always(Fault::Refuse);
        wait_until_open(cache).await;
    }

    pub async fn end_outage(&self, cache: &Cache) {
        self.faults.clear();
        while !cache.health().is_available() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Sends gets until the breaker opens.
async fn wait_until_open(cache: &Cache) {
    for _ in 0..20 {
        if !cache.health().is_available() {
            return;
        }
        let _ = cache.get("unknown").await;
    }
    panic!("the breaker does not open");
}

pub async fn wait_until_drained(cache: &Cache) {
    for _ in 0..1_500 {
        if cache.health().queue.unwrap().records == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the queue is not drained: {:?}", cache.health());
}

/// The content of an outage file: the value of each conversation (`None` for a tombstone), and whether its write is queued.
pub type Contents = BTreeMap<String, (Option<String>, bool)>;

/// Reads the content of a file with SQL. No cache may have the file open.
pub fn contents(path: &Path) -> Contents {
    let connection = rusqlite::Connection::open(path).unwrap();
    let is_there = "select count(*) from sqlite_schema where name = 'records'";
    if connection.query_row(is_there, [], |row| row.get::<_, i64>(0)).unwrap() == 0 {
        return Contents::new(); // the file has no tables yet
    }
    let mut select =
        connection.prepare("select key, value, is_queued from records order by is_queued, version").unwrap();
    let rows = select.query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))));
    rows.unwrap().collect::<rusqlite::Result<_>>().unwrap()
}

/// Opens a cache in an outage, and returns the result of each get and the number of queued writes.
pub async fn cached_contents(dir: &Path, keys: impl Iterator<Item = String>) -> (Contents, usize) {
    let cache = World::new(dir).open_in_outage().await.unwrap();
    let mut shown = Contents::new();
    for key in keys {
        match cache.get(&key).await {
            Ok(Some(found)) => {
                let is_queued = found.freshness() == Freshness::Queued;
                shown.insert(key, (Some(found.json().to_owned()), is_queued));
            }
            Ok(None) => _ = shown.insert(key, (None, true)),
            Err(e) => assert!(e.is_outage(), "{e}"),
        }
    }
    let left = cache.shutdown(Duration::from_millis(200)).await.unwrap();
    (shown, left.still_queued)
}

/// One write of a history.
#[derive(Debug, Clone)]
pub struct Step {
    pub key: String,
    /// `None` is a remove.
    pub value: Option<String>,
    pub is_queued: bool,
}

impl Step {
    /// Makes the next step of a random history.
    pub fn next(rng: &mut fastrand::Rng, at: usize, size: usize) -> Self {
        let value = format!("{at} {}", "x".repeat(rng.usize(..=size)));
        Self {
            key: format!("k{}", rng.u8(..6)),
            value: (rng.u8(..5) > 0).then_some(value),
            is_queued: rng.u8(..3) > 0,
        }
    }

    pub async fn run(&self, world: &World, cache: &Cache) -> threadkeep::Result<WriteOutcome> {
        // The store rejects the key of a write that must be queued. Replays fail.
        world.faults.fail_replays(true);
        if self.is_queued {
            world.faults.fail_key(&self.key, Fault::Fail(threadkeep::ErrorKind::Unauthorized));
        }
        let result = match &self.value {
            Some(value) => cache.put(&self.key, value).await,
            None => cache.remove(&self.key).await,
        };
        world.faults.clear_key_faults();
        result
    }

    pub fn apply(&self, contents: &mut Contents) {
        let json = self.value.as_ref().map(|value| format!("\"{value}\""));
        contents.insert(self.key.clone(), (json, self.is_queued));
    }
}
