//! A store on another machine. The handle has its own clock; clock sync corrects it by the store's responses.

use std::cell::Cell;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use threadkeep::store::{
    Applied, Breaker, Clock, ListPage, ListRequest, LoadRequest, Loaded, Store, Timestamp, Write,
};
use threadkeep::{Key, Result};

use crate::clocks::{jump_count, true_time};
use crate::store::ModelStore;

tokio::task_local! {
    /// The time of the store during the present call.
    static STORE_TIME: Cell<Timestamp>;
}

/// The server's end of a connection. It notes the time of each answer.
#[derive(Debug)]
pub struct SharedStore(pub Arc<ModelStore>);

impl SharedStore {
    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        STORE_TIME.with(|shown| shown.set(true_time()));
        call.await
    }
}

#[async_trait]
impl Store for SharedStore {
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

/// The results that the handles got for their writes, in order of arrival. Messages of violations show them.
#[derive(Debug, Clone, Default)]
pub struct Journal(Arc<Mutex<Vec<(Key, String)>>>);

impl Journal {
    fn note(&self, handle: usize, write: &Write, result: &str) {
        let Write { record, writer, condition, .. } = write;
        let verb = if write.append.is_some() { "appended" } else { "wrote" };
        let value = record.value.as_ref().map_or("nothing", |json| json.as_str());
        let line = format!(
            "handle {handle}, writer {writer}, {verb} {} {condition:?}: {value:.80} → {result}",
            record.version
        );
        self.0.lock().unwrap().push((record.key.clone(), line));
    }

    pub fn of(&self, key: &str) -> String {
        let lines = self.0.lock().unwrap();
        lines.iter().filter(|(one, _)| one.as_str() == key).map(|(_, line)| format!("  {line}\n")).collect()
    }
}

/// A connection to the store. Faults are injected between this type and [`SharedStore`].
#[derive(Debug)]
pub struct RemoteStore<S> {
    store: S,
    meter: ClockErrorMeter,
    max_error_ms: Arc<AtomicI64>,
    syncs_clock: bool,
    handle: usize,
    journal: Journal,
}

/// Measures the error of a handle's clock.
#[derive(Debug, Clone)]
pub struct ClockErrorMeter {
    clock: Arc<Clock>,
    last_sync: Arc<Mutex<Option<Sync>>>,
}

/// The first answer after the start or after a jump. It must correct the clock soon.
#[derive(Debug, Clone, Copy)]
struct Sync {
    at: Instant,
    /// The number of jumps before the answer.
    jumps: usize,
}

/// The longest time from the answer to the correction of the clock and of the queued writes.
const MAX_SYNC: Duration = Duration::from_millis(500);

impl ClockErrorMeter {
    /// Returns the error of an unsynced clock, and 0 for a synced one.
    pub fn error_ms(&self) -> i64 {
        let last_sync = *self.last_sync.lock().unwrap();
        let is_synced = |sync: Sync| sync.jumps == jump_count() && sync.at.elapsed() > MAX_SYNC;
        if last_sync.is_some_and(is_synced) { 0 } else { self.difference() }
    }

    fn difference(&self) -> i64 {
        (self.clock.now().0 - true_time().0).abs()
    }

    /// Notes an answer to a call that began after this number of jumps. Returns true for the first answer since the last jump.
    fn note_answer(&self, jumps: usize) -> bool {
        let mut last_sync = self.last_sync.lock().unwrap();
        // The clock ignores an answer to a call that spans a jump.
        let is_first = jumps == jump_count() && last_sync.is_none_or(|last| last.jumps != jumps);
        if is_first {
            *last_sync = Some(Sync { at: Instant::now(), jumps });
        }
        is_first
    }
}

impl<S: Store> RemoteStore<S> {
    /// Wraps a store. `max_error_ms` keeps the largest error of a clock after a clock sync.
    pub fn new(store: S, skew_ms: i64, max_error_ms: Arc<AtomicI64>, syncs_clock: bool) -> Self {
        let meter = ClockErrorMeter { clock: Arc::new(Clock::skewed(skew_ms)), last_sync: Arc::default() };
        Self { store, meter, max_error_ms, syncs_clock, handle: 0, journal: Journal::default() }
    }

    /// Records the results of this handle's writes in `journal`.
    pub fn with_journal(self, handle: usize, journal: Journal) -> Self {
        Self { handle, journal, ..self }
    }

    pub fn meter(&self) -> ClockErrorMeter {
        self.meter.clone()
    }

    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        // The clock ignores an answer to a call from before it noticed a jump. So it looks first.
        let jumps = jump_count();
        self.meter.clock.now();
        let sent = Instant::now();
        let timed_call = async { call.await.map(|answer| (answer, STORE_TIME.with(Cell::get))) };
        let (answer, shown) = STORE_TIME.scope(Cell::new(Timestamp(0)), timed_call).await?;
        let received = Instant::now();
        if self.syncs_clock {
            self.meter.clock.correct(sent, received, shown);
        }
        if self.meter.note_answer(jumps) {
            // Clock sync leaves at most one round trip of error, plus rounding. A larger difference is a fault.
            let trip = i64::try_from((received - sent).as_millis()).unwrap_or(i64::MAX);
            self.max_error_ms.fetch_max(self.meter.difference().min(trip + 2), SeqCst);
        }
        Ok(answer)
    }
}

#[async_trait]
impl<S: Store> Store for RemoteStore<S> {
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
            let result = applied.as_ref().map(|applied| applied[at]).map_err(|error| error.to_string());
            self.journal.note(self.handle, write, &format!("{result:?}"));
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
