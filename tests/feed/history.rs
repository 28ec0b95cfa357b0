//! A store in memory with a history, whose calls a test can delay and whose contents it can replace.

use std::collections::HashMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use threadkeep::store::{
    Applied, Changes, Clock, Continuity, Cursor, ListPage, ListRequest, LoadRequest, Loaded, Memory, Record,
    Store, Version, Write,
};
use threadkeep::{Error, ErrorKind, Key, Result};
use tokio::sync::Semaphore;

/// Keeps records in [`Memory`], and the keys of all writes in their order.
#[derive(Debug)]
pub struct History {
    state: Mutex<State>,
    clock: Arc<Clock>,
    /// Each poll takes a permit before it executes.
    pub polls: Semaphore,
    /// The polls that have arrived. The arrival of one shows that the answer of the one before was handled.
    pub arrived: AtomicUsize,
    /// Whether a poll waits for a permit.
    pub waits: AtomicBool,
    pub loads: AtomicUsize,
    /// Each load takes a permit after it has executed.
    pub answers: Semaphore,
    /// Each write takes a permit after it has executed.
    pub acknowledgements: Semaphore,
    /// The longest random delay of a call, before and after its execution.
    pub delay: Mutex<Duration>,
}

#[derive(Debug)]
struct State {
    records: Arc<Memory>,
    log: Vec<Key>,
    commits: Vec<(Instant, Key, Version)>,
    identity: u64,
    max_page: usize,
    failure: Option<ErrorKind>,
    has_history: bool,
    /// The versions of all records when a poll executed, by the number of the poll.
    snapshots: Vec<HashMap<Key, Version>>,
}

impl Default for History {
    fn default() -> Self {
        let records = Arc::new(Memory::new());
        let clock = Arc::clone(records.clock());
        let state = State {
            records,
            log: Vec::new(),
            commits: Vec::new(),
            identity: 0,
            max_page: usize::MAX,
            failure: None,
            has_history: true,
            snapshots: Vec::new(),
        };
        Self {
            state: Mutex::new(state),
            clock,
            polls: Semaphore::new(Semaphore::MAX_PERMITS),
            arrived: AtomicUsize::new(0),
            waits: AtomicBool::new(false),
            loads: AtomicUsize::new(0),
            answers: Semaphore::new(Semaphore::MAX_PERMITS),
            acknowledgements: Semaphore::new(Semaphore::MAX_PERMITS),
            delay: Mutex::default(),
        }
    }
}

impl History {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Replaces the records by those of another database.
    pub fn restore(&self, records: Arc<Memory>) {
        let mut state = self.state();
        state.records = records;
        state.log.clear();
        state.identity += 1;
    }

    pub fn fail_polls(&self, failure: Option<ErrorKind>) {
        self.state().failure = failure;
    }

    pub fn lose_history(&self) {
        self.state().has_history = false;
    }

    pub fn limit_pages(&self, max_page: usize) {
        self.state().max_page = max_page;
    }

    /// Returns the version of a conversation at the execution of a poll.
    pub fn version_at(&self, poll: usize, key: &Key) -> Option<Version> {
        self.state().snapshots.get(poll)?.get(key).copied()
    }

    /// Returns the newest version of a conversation that was committed before a time.
    pub fn newest_before(&self, at: Instant, key: &Key) -> Option<Version> {
        let state = self.state();
        let commits = state.commits.iter().filter(|(committed, of, _)| *committed < at && of == key);
        commits.map(|(_, _, version)| *version).max()
    }

    /// Returns the number of polls whose answers the cache has handled.
    pub fn handled(&self) -> usize {
        self.arrived.load(SeqCst).saturating_sub(1)
    }

    fn note(&self, writes: &[Write], applied: &[Applied]) {
        let mut state = self.state();
        for (write, _) in writes.iter().zip(applied).filter(|(_, verdict)| **verdict == Applied::Stored) {
            let Record { key, version, .. } = &*write.record;
            state.log.push(key.clone());
            state.commits.push((Instant::now(), key.clone(), *version));
        }
    }

    /// Waits for a random time. A load takes longest, so that polls and writes overtake it.
    async fn wait(&self, factor: u32) {
        let longest = factor * *self.delay.lock().unwrap();
        if !longest.is_zero() && fastrand::bool() {
            tokio::time::sleep(longest.mul_f64(fastrand::f64())).await;
        }
    }
}

/// Returns the present version of a conversation.
async fn version(records: &Memory, key: &Key) -> Result<Version> {
    let loaded = records.load(&[LoadRequest::new(key.clone())]).await?;
    Ok(match &loaded[0] {
        Loaded::Found(record) => record.version,
        Loaded::Absent(version) => *version,
        Loaded::NotModified => unreachable!(),
    })
}

#[async_trait]
impl Store for History {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.loads.fetch_add(1, SeqCst);
        self.wait(6).await;
        let records = Arc::clone(&self.state().records);
        let loaded = records.load(requests).await;
        self.answers.acquire().await.unwrap().forget();
        self.wait(6).await;
        loaded
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.wait(1).await;
        let records = Arc::clone(&self.state().records);
        let applied = records.apply(writes).await?;
        self.note(writes, &applied);
        self.acknowledgements.acquire().await.unwrap().forget();
        self.wait(1).await;
        Ok(applied)
    }

    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        let records = Arc::clone(&self.state().records);
        records.list(page).await
    }

    async fn touch(&self, _: &[Key]) -> Result<()> {
        Ok(())
    }

    async fn purge(&self, _: usize) -> Result<usize> {
        Ok(0)
    }

    async fn changes(&self, since: Option<&Cursor>) -> Result<Option<Changes>> {
        self.arrived.fetch_add(1, SeqCst);
        self.waits.store(true, SeqCst);
        self.polls.acquire().await.unwrap().forget();
        self.waits.store(false, SeqCst);
        self.wait(1).await;
        let (records, keys, place, identity, is_last) = {
            let state = self.state();
            if let Some(kind) = state.failure {
                return Err(Error::new(kind, "planned fault of a poll"));
            }
            if !state.has_history {
                return Ok(None);
            }
            let from = since.map_or(state.log.len(), |cursor| {
                let (identity, place) = cursor.as_str().split_once(':').unwrap();
                if identity == state.identity.to_string() { place.parse().unwrap() } else { usize::MAX }
            });
            let log = state.log.get(from..).unwrap_or_default();
            let keys = log[..log.len().min(state.max_page)].to_vec();
            let place = if from == usize::MAX { state.log.len() } else { from + keys.len() };
            let continuity = match (since, from) {
                (None, _) => Continuity::Begun,
                (_, usize::MAX) => Continuity::Restored,
                _ => Continuity::Unbroken,
            };
            (Arc::clone(&state.records), keys, place, (state.identity, continuity), place == state.log.len())
        };
        let mut changed = Vec::new();
        for key in keys {
            changed.push((key.clone(), version(&records, &key).await?));
        }
        // Taken without an await since the names: the test has one OS thread.
        let mut snapshot = HashMap::new();
        let page = records.list(&ListRequest::new(1_000)).await?;
        snapshot.extend(page.records.into_iter().map(|record| (record.key, record.version)));
        self.state().snapshots.push(snapshot);
        self.wait(1).await;
        let cursor = Cursor::new(format!("{}:{place}", identity.0));
        Ok(Some(Changes::new(cursor, changed, identity.1, is_last)))
    }

    async fn probe(&self) -> Result<()> {
        Ok(())
    }
}
