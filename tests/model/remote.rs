//! A store as seen from another machine: by a clock of one's own, which its answers correct.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use async_trait::async_trait;
use threadkeep::store::{
    Applied, Breaker, Clock, ListPage, ListRequest, LoadRequest, Loaded, Memory, Store, Timestamp, Write,
};
use threadkeep::{Key, Result};

tokio::task_local! {
    /// What the clock of the store showed when it carried out the present call.
    static SHOWN: Cell<Timestamp>;
}

/// The one store that all handles of a world share.
#[derive(Debug)]
pub struct Shared(pub Arc<Memory>);

impl Shared {
    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        SHOWN.with(|shown| shown.set(self.0.clock().now()));
        call.await
    }
}

#[async_trait]
impl Store for Shared {
    fn clock(&self) -> &Arc<Clock> {
        self.0.clock()
    }
    async fn load(&self, wants: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.call(self.0.load(wants)).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.call(self.0.apply(writes)).await
    }
    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        self.call(self.0.list(page)).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.call(self.0.touch(keys)).await
    }
    async fn purge(&self, most: usize) -> Result<usize> {
        self.call(self.0.purge(most)).await
    }
    async fn probe(&self) -> Result<()> {
        self.call(self.0.probe()).await
    }
}

/// What each handle heard of its writes, in the order in which it heard it: for people.
#[derive(Debug, Clone, Default)]
pub struct Journal(Arc<Mutex<Vec<(Key, String)>>>);

impl Journal {
    fn note(&self, handle: usize, write: &Write, verdict: &str) {
        let Write { record, if_version, is_retry, .. } = write;
        let over = if_version.map_or_else(String::new, |version| format!(" over {version}"));
        let again = if *is_retry { " again" } else { "" };
        let value = record.value.as_ref().map_or("nothing", |json| json.as_str());
        let line = format!("handle {handle} wrote {}{over}{again}: {value:.80} → {verdict}", record.version);
        self.0.lock().unwrap().push((record.key.clone(), line));
    }

    pub fn of(&self, key: &str) -> String {
        let lines = self.0.lock().unwrap();
        lines.iter().filter(|(one, _)| one.as_str() == key).map(|(_, line)| format!("  {line}\n")).collect()
    }
}

/// A line to the store. Faults are to happen between this and [`Shared`].
#[derive(Debug)]
pub struct Remote<S> {
    store: S,
    meter: Meter,
    worst: Arc<AtomicI64>,
    corrects: bool,
    handle: usize,
    journal: Journal,
}

/// How far a clock is off.
#[derive(Debug, Clone)]
pub struct Meter {
    clock: Arc<Clock>,
    truth: Arc<Clock>,
    /// Whether there was an answer to put it right by.
    was_told: Arc<AtomicBool>,
}

impl Meter {
    /// By how much it may be off: nothing is known of the time before there was an answer.
    pub fn off_ms(&self) -> i64 {
        if self.was_told.load(SeqCst) { 0 } else { self.difference() }
    }

    fn difference(&self) -> i64 {
        (self.clock.now().0 - self.truth.now().0).abs()
    }
}

impl<S: Store> Remote<S> {
    /// `worst` keeps by how much a clock was off after its first answer.
    pub fn new(store: S, truth: Arc<Clock>, skew_ms: i64, worst: Arc<AtomicI64>, corrects: bool) -> Self {
        let meter = Meter { clock: Arc::new(Clock::skewed(skew_ms)), truth, was_told: Arc::default() };
        Self { store, meter, worst, corrects, handle: 0, journal: Journal::default() }
    }

    /// Writes down what this handle hears of its writes.
    pub fn noting(self, handle: usize, journal: Journal) -> Self {
        Self { handle, journal, ..self }
    }

    pub fn meter(&self) -> Meter {
        self.meter.clone()
    }

    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let sent = Instant::now();
        let heard = async { call.await.map(|answer| (answer, SHOWN.with(Cell::get))) };
        let (answer, shown) = SHOWN.scope(Cell::new(Timestamp(0)), heard).await?;
        let received = Instant::now();
        if self.corrects {
            self.meter.clock.correct(sent, received, shown);
        }
        if !self.meter.was_told.swap(true, SeqCst) {
            // Neither clocks nor answers explain more than this.
            let trip = i64::try_from((received - sent).as_millis()).unwrap_or(i64::MAX);
            self.worst.fetch_max(self.meter.difference().min(trip + 2), SeqCst);
        }
        Ok(answer)
    }
}

#[async_trait]
impl<S: Store> Store for Remote<S> {
    fn clock(&self) -> &Arc<Clock> {
        &self.meter.clock
    }
    fn breaker(&self) -> Option<&Breaker> {
        self.store.breaker()
    }
    async fn load(&self, wants: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.call(self.store.load(wants)).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let applied = self.call(self.store.apply(writes)).await;
        for (at, write) in writes.iter().enumerate() {
            let verdict = applied.as_ref().map(|applied| applied[at]).map_err(|error| error.to_string());
            self.journal.note(self.handle, write, &format!("{verdict:?}"));
        }
        applied
    }
    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        self.call(self.store.list(page)).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.call(self.store.touch(keys)).await
    }
    async fn purge(&self, most: usize) -> Result<usize> {
        self.call(self.store.purge(most)).await
    }
    async fn probe(&self) -> Result<()> {
        self.call(self.store.probe()).await
    }
}
