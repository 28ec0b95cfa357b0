//! A source of truth, a directory with one daemon's file, and what is in that file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{Builder, Cache, Durability, Freshness, Guard, Memory};

pub const DEADLINE: Duration = Duration::from_millis(200);
pub const FILE: &str = "q.db";

/// A directory in memory, where there is one: these tests write a lot.
pub fn directory() -> tempfile::TempDir {
    let fast = Path::new("/dev/shm");
    let made = if fast.is_dir() { tempfile::tempdir_in(fast) } else { tempfile::tempdir() };
    made.unwrap()
}

/// A source of truth that outlives the daemons, and the directory of one daemon's file.
pub struct World {
    pub truth: Arc<Memory>,
    pub faults: Faults,
    pub dir: PathBuf,
}

impl World {
    pub fn new(dir: &Path) -> Self {
        let truth = Arc::new(Memory::new());
        let faults = Faulty::new(Arc::clone(&truth)).faults();
        Self { truth, faults, dir: dir.to_owned() }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.join(FILE)
    }

    pub fn builder(&mut self) -> Builder {
        let faulty = Faulty::new(Arc::clone(&self.truth));
        self.faults = faulty.faults();
        let builder = Cache::builder().store(Guard::new(faulty, DEADLINE)).queue(self.path());
        builder.fresh_for(Duration::ZERO).patience(DEADLINE / 2)
    }

    pub async fn open(&mut self) -> threadkeep::Result<Cache> {
        self.builder().open().await
    }

    /// Starts while the source of truth is away.
    pub async fn open_cut_off(&mut self) -> threadkeep::Result<Cache> {
        let builder = self.builder();
        self.faults.always(Fault::Refuse);
        let cache = builder.open().await?;
        cut_off(&cache).await;
        Ok(cache)
    }

    pub async fn away(&self, cache: &Cache) {
        self.faults.always(Fault::Refuse);
        cut_off(cache).await;
    }

    pub async fn back(&self, cache: &Cache) {
        self.faults.heal();
        while !cache.health().is_available() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Asks until the breaker is open.
async fn cut_off(cache: &Cache) {
    for _ in 0..20 {
        if !cache.health().is_available() {
            return;
        }
        let _ = cache.get("nobody has this id").await;
    }
    panic!("the breaker does not open");
}

pub async fn drained(cache: &Cache) {
    for _ in 0..1_500 {
        if cache.health().queue.unwrap().records == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the queue is not drained: {:?}", cache.health());
}

/// What a file holds: of each thread the value (none: a deletion), and whether it waits in the queue.
pub type Held = BTreeMap<String, (Option<String>, bool)>;

/// What a file holds, read past the cache. The file is not opened by anybody else.
pub fn held(path: &Path) -> Held {
    let connection = rusqlite::Connection::open(path).unwrap();
    let is_there = "select count(*) from sqlite_schema where name = 'records'";
    if connection.query_row(is_there, [], |row| row.get::<_, i64>(0)).unwrap() == 0 {
        return Held::new(); // not even the tables were committed
    }
    let mut all = connection.prepare("select key, value, pending from records").unwrap();
    let rows = all.query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))));
    rows.unwrap().collect::<rusqlite::Result<_>>().unwrap()
}

/// What a cache hands out that starts in an outage with these files.
pub async fn shown(dir: &Path, keys: impl Iterator<Item = String>) -> (Held, usize) {
    let cache = World::new(dir).open_cut_off().await.unwrap();
    let mut shown = Held::new();
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
    let left = cache.shutdown(DEADLINE).await.unwrap();
    (shown, left.still_queued)
}

/// One write of a history.
#[derive(Debug, Clone)]
pub struct Step {
    pub key: String,
    /// None: a deletion.
    pub value: Option<String>,
    pub is_queued: bool,
}

impl Step {
    /// The next one of a random history.
    pub fn next(rng: &mut fastrand::Rng, at: usize, size: usize) -> Self {
        let value = format!("{at} {}", "x".repeat(rng.usize(..=size)));
        Self {
            key: format!("k{}", rng.u8(..6)),
            value: (rng.u8(..5) > 0).then_some(value),
            is_queued: rng.u8(..3) > 0,
        }
    }

    pub async fn make(&self, world: &World, cache: &Cache) -> threadkeep::Result<Durability> {
        // What is to be queued is denied, and nothing is replayed.
        world.faults.fail_trials(true);
        if self.is_queued {
            world.faults.poison(&self.key, Fault::Fail(threadkeep::ErrorKind::Denied));
        }
        let result = match &self.value {
            Some(value) => cache.put(&self.key, value).await,
            None => cache.remove(&self.key).await,
        };
        world.faults.antidote();
        result
    }

    pub fn apply(&self, held: &mut Held) {
        let json = self.value.as_ref().map(|value| format!("\"{value}\""));
        held.insert(self.key.clone(), (json, self.is_queued));
    }
}
