//! A database with a clock of its own, and daemons that know of it what its answers say.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use async_trait::async_trait;
use threadkeep::testing::{Faults, Faulty};
use threadkeep::{
    Applied, Builder, Cache, Clock, Guard, Json, Key, Loaded, Page, Recent, Record, Result, Store, Timestamp,
    Version, Want, Write, judge,
};

use crate::{MINUTE, SECOND, until};

/// What is to happen in the midst of a call.
type Event = Box<dyn FnOnce() + Send>;

/// Rows, and how far the database's clock is ahead of this machine's.
#[derive(Default)]
pub struct Database {
    rows: Mutex<BTreeMap<Key, Row>>,
    ahead: AtomicI64,
    at_next_write: Mutex<Option<Event>>,
}

#[derive(Clone)]
struct Row {
    record: Arc<Record>,
    accepted: Vec<Version>,
}

impl Database {
    /// A clock that shows what the database's does; made anew for each look, for the machine's may have been set.
    fn clock(&self) -> Clock {
        Clock::skewed(self.ahead.load(SeqCst))
    }

    pub fn now(&self) -> Timestamp {
        self.clock().now()
    }

    /// This machine's clock was set, and the database's was not.
    pub fn stays_behind(&self, by: i64) {
        self.ahead.fetch_sub(by, SeqCst);
    }

    pub fn at_next_write(&self, event: impl FnOnce() + Send + 'static) {
        *self.at_next_write.lock().unwrap() = Some(Box::new(event));
    }

    /// What it holds of a thread that has not expired.
    pub fn row(&self, key: &str) -> Option<Arc<Record>> {
        let row = self.rows.lock().unwrap().get(&Key::new(key).unwrap()).cloned();
        row.map(|row| row.record).filter(|record| record.is_live(self.now()))
    }

    /// Another daemon, whose clock is right, writes.
    pub fn is_written(&self, key: &str, json: &str) {
        let (clock, value) = (self.clock(), Some(Json::new(json).unwrap()));
        self.row(key).iter().for_each(|held| clock.observe(held.version));
        let expires_at = clock.now().plus(24 * 60 * MINUTE);
        let record = Record {
            key: Key::new(key).unwrap(),
            version: clock.stamp().version,
            value,
            expires_at,
            user: None,
            metadata: Json::default(),
        };
        assert_eq!(self.write(&record.into()), Applied::Stored);
    }

    fn write(&self, write: &Write) -> Applied {
        let event = self.at_next_write.lock().unwrap().take();
        let clock = self.clock();
        let mut rows = self.rows.lock().unwrap();
        let mut accepted = rows.get(&write.record.key).map(|row| row.accepted.clone()).unwrap_or_default();
        let verdict = judge(write, &accepted, &clock);
        if verdict.is_none() {
            accepted.insert(0, write.record.version);
            let row = Row { record: Arc::clone(&write.record), accepted };
            rows.insert(write.record.key.clone(), row);
        }
        drop(rows);
        if let Some(event) = event {
            event();
        }
        verdict.unwrap_or(Applied::Stored)
    }

    fn look_up(&self, want: &Want) -> Loaded {
        match self.rows.lock().unwrap().get(&want.key) {
            None => Loaded::Absent(Version::NONE),
            Some(row) if !row.record.is_live(self.now()) => Loaded::Absent(row.record.version),
            Some(row) if want.known == Some(row.record.version) => Loaded::Same,
            Some(row) => Loaded::Found(Arc::clone(&row.record)),
        }
    }
}

/// The way to the database of one daemon.
#[derive(Clone)]
struct Line {
    database: Arc<Database>,
    clock: Arc<Clock>,
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Line")
    }
}

impl Line {
    /// The answer says what time it was when it was given.
    fn answer<T>(&self, work: impl FnOnce(&Database) -> T) -> Result<T> {
        let (sent, shown) = (Instant::now(), self.database.now());
        let answer = work(&self.database);
        self.clock.correct(sent, Instant::now(), shown);
        Ok(answer)
    }
}

#[async_trait]
impl Store for Line {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }
    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        self.answer(|database| wants.iter().map(|want| database.look_up(want)).collect())
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.answer(|database| writes.iter().map(|write| database.write(write)).collect())
    }
    async fn recent(&self, _: &Page) -> Result<Recent> {
        self.answer(|_| Recent { records: Vec::new(), is_last: true })
    }
    async fn touch(&self, _: &[Key]) -> Result<()> {
        self.answer(|_| ())
    }
    async fn purge(&self, _: usize) -> Result<usize> {
        self.answer(|_| 0)
    }
    async fn probe(&self) -> Result<()> {
        self.answer(|_| ())
    }
}

/// A daemon's directory, and the database.
pub struct World {
    pub database: Arc<Database>,
    pub faults: Faults,
    directory: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let database = Arc::<Database>::default();
        let line = Line { database: Arc::clone(&database), clock: Arc::default() };
        let faults = Faulty::new(line).faults();
        Self { database, faults, directory: tempfile::tempdir().unwrap() }
    }

    /// No chores, so that what is asked is what the test asks.
    fn builder(&mut self) -> Builder {
        let line = Line { database: Arc::clone(&self.database), clock: Arc::default() };
        let faulty = Faulty::new(line);
        self.faults = faulty.faults();
        let builder = Cache::builder().store(Guard::new(faulty, 5 * SECOND));
        builder.queue(self.directory.path().join("q.db")).patience(10 * SECOND).upkeep_every(60 * MINUTE)
    }

    pub async fn open(&mut self) -> Cache {
        self.builder().open().await.unwrap()
    }

    /// Starts while the database cannot be asked.
    pub async fn open_cut_off(&mut self) -> Cache {
        let builder = self.builder();
        self.faults.always(threadkeep::testing::Fault::Refuse);
        let cache = builder.open().await.unwrap();
        self.is_cut_off(&cache).await;
        cache
    }

    /// The database cannot be asked any more, and the breaker is open.
    pub async fn is_cut_off(&self, cache: &Cache) {
        self.faults.always(threadkeep::testing::Fault::Refuse);
        until("the breaker opens", async || {
            let _ = cache.get("nobody has this id").await;
            !cache.health().is_available()
        })
        .await;
    }

    pub async fn is_healed(&self, cache: &Cache) {
        self.faults.heal();
        until("the queue is drained", async || cache.health().queue.unwrap().records == 0).await;
        assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
    }
}
