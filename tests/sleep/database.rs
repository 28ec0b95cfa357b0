//! A database with its own clock, and daemons that learn this clock from the responses.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use async_trait::async_trait;
use threadkeep::store::{
    Applied, Clock, Decision, Json, ListPage, ListRequest, LoadRequest, Loaded, Record, ResilientStore,
    RowState, Store, Timestamp, Write, WriterId, decide,
};
use threadkeep::testing::{FaultStore, Faults};
use threadkeep::{Builder, Cache, Key, Result, Version};

use crate::{MINUTE, SECOND, wait_until};

/// An event in the middle of a call.
type Event = Box<dyn FnOnce() + Send>;

/// Rows, and the milliseconds by which the clock of the database is ahead of the clock of this machine.
#[derive(Default)]
pub struct Database {
    rows: Mutex<BTreeMap<Key, Row>>,
    ahead: AtomicI64,
    at_next_write: Mutex<Option<Event>>,
}

#[derive(Clone)]
struct Row {
    record: Arc<Record>,
    state: RowState,
    writers: BTreeMap<WriterId, Version>,
}

impl Database {
    /// Makes a clock with the time of the database. Each use makes a new clock, because a test may set the clock of the machine.
    fn clock(&self) -> Clock {
        Clock::skewed(self.ahead.load(SeqCst))
    }

    pub fn now(&self) -> Timestamp {
        self.clock().now()
    }

    /// Moves the clock of the database back. If the machine clock has stepped forward as far, the database keeps its time.
    pub fn step_back(&self, by: i64) {
        self.ahead.fetch_sub(by, SeqCst);
    }

    pub fn at_next_write(&self, event: impl FnOnce() + Send + 'static) {
        *self.at_next_write.lock().unwrap() = Some(Box::new(event));
    }

    /// Returns the record of a conversation that has not expired.
    pub fn row(&self, key: &str) -> Option<Arc<Record>> {
        let row = self.rows.lock().unwrap().get(&Key::new(key).unwrap()).cloned();
        row.map(|row| row.record).filter(|record| record.is_live(self.now()))
    }

    /// Writes as another daemon with the correct clock.
    pub fn write_from_another_daemon(&self, key: &str, json: &str) {
        let (clock, value) = (self.clock(), Some(Json::new(json).unwrap()));
        self.row(key).iter().for_each(|record| clock.observe(record.version));
        let expires_at = clock.now().plus(24 * 60 * MINUTE);
        let record = Record {
            key: Key::new(key).unwrap(),
            version: clock.issue_version(),
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
        let (head, held) = (write.head(), rows.get(&write.record.key));
        let mut writers = held.map(|row| row.writers.clone()).unwrap_or_default();
        let last = writers.get(&write.writer).copied().unwrap_or_default();
        let applied = match decide(&head, held.map(|row| &row.state), last, clock.now_for_versions()) {
            Decision::Answer(answer) => answer,
            Decision::Apply(state) => {
                let (record, applied) =
                    write.over(held.map(|row| &*row.record), state.version).expect("an append that fits");
                writers.extend(head.is_counted().then_some((head.writer, head.version)));
                rows.insert(write.record.key.clone(), Row { record, state, writers });
                applied
            }
        };
        drop(rows);
        if let Some(event) = event {
            event();
        }
        applied
    }

    fn look_up(&self, request: &LoadRequest) -> Loaded {
        match self.rows.lock().unwrap().get(&request.key) {
            None => Loaded::Absent(Version::NONE),
            Some(row) if !row.record.is_live(self.now()) => Loaded::Absent(row.record.version),
            Some(row) if request.if_none_match == Some(row.record.version) => Loaded::NotModified,
            Some(row) => Loaded::Found(Arc::clone(&row.record)),
        }
    }
}

/// The connection of one daemon to the database.
#[derive(Clone)]
struct Connection {
    database: Arc<Database>,
    clock: Arc<Clock>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection")
    }
}

impl Connection {
    /// Runs a call. Its response carries the time of the database.
    fn respond<T>(&self, work: impl FnOnce(&Database) -> T) -> Result<T> {
        let (sent, shown) = (Instant::now(), self.database.now());
        let response = work(&self.database);
        self.clock.correct(sent, Instant::now(), shown);
        Ok(response)
    }
}

#[async_trait]
impl Store for Connection {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }
    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.respond(|database| requests.iter().map(|request| database.look_up(request)).collect())
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.respond(|database| writes.iter().map(|write| database.write(write)).collect())
    }
    async fn list(&self, _: &ListRequest) -> Result<ListPage> {
        self.respond(|_| ListPage::new(Vec::new(), true))
    }
    async fn touch(&self, _: &[Key]) -> Result<()> {
        self.respond(|_| ())
    }
    async fn purge(&self, _: usize) -> Result<usize> {
        self.respond(|_| 0)
    }
    async fn probe(&self) -> Result<()> {
        self.respond(|_| ())
    }
}

/// The directory of a daemon, and the database.
pub struct World {
    pub database: Arc<Database>,
    pub faults: Faults,
    directory: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let database = Arc::<Database>::default();
        let connection = Connection { database: Arc::clone(&database), clock: Arc::default() };
        let faults = FaultStore::new(connection).faults();
        Self { database, faults, directory: tempfile::tempdir().unwrap() }
    }

    /// Makes a builder with rare maintenance, so that only the test calls the database.
    fn builder(&mut self) -> Builder {
        let connection = Connection { database: Arc::clone(&self.database), clock: Arc::default() };
        let faulty = FaultStore::new(connection);
        self.faults = faulty.faults();
        let builder = Cache::builder().store(ResilientStore::new(faulty, 5 * SECOND));
        builder
            .queue(self.directory.path().join("q.db"))
            .soft_timeout(10 * SECOND)
            .maintenance_interval(60 * MINUTE)
    }

    /// Opens a cache whose memory and replica keep no conversation.
    pub async fn open_without_copies(&mut self) -> Cache {
        self.builder().cache_max_bytes(0).replica_max_bytes(0).open().await.unwrap()
    }

    pub async fn open(&mut self) -> Cache {
        self.builder().open().await.unwrap()
    }

    pub async fn open_without_queue(&mut self) -> Cache {
        self.builder().without_queue().open().await.unwrap()
    }

    /// Opens a cache during an outage.
    pub async fn open_in_outage(&mut self) -> Cache {
        let builder = self.builder();
        self.faults.always(threadkeep::testing::Fault::Refuse);
        let cache = builder.open().await.unwrap();
        self.start_outage(&cache).await;
        cache
    }

    /// Starts an outage and waits until the breaker is open.
    pub async fn start_outage(&self, cache: &Cache) {
        self.faults.always(threadkeep::testing::Fault::Refuse);
        wait_until("the breaker opens", async || {
            let _ = cache.get("unknown").await;
            !cache.health().is_available()
        })
        .await;
    }

    pub async fn end_outage(&self, cache: &Cache) {
        self.faults.clear();
        wait_until("the queue is drained", async || cache.health().queue.unwrap().records == 0).await;
        assert_eq!(cache.health().queue.unwrap().dead_letters, 0);
    }
}
