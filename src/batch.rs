//! `Batched`: a store around a store that makes few large calls of many small ones.
//!
//! Nothing waits for company: a call goes at once while fewer than [`LANES`] of its kind are under way. What comes while
//! all lanes are taken collects, and the next lane that gets free takes its share of it, as in the group commit of
//! databases (DeWitt et al., "Implementation Techniques for Main Memory Database Systems", 1984). So batches grow with the
//! load and with nothing else. A share is what each lane would have if all that is under way or waits were spread evenly:
//! were all of it taken, one lane would have nearly everything, and the others would go back and forth with crumbs.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;
use tracing::Instrument;

use crate::background;
use crate::breaker::Breaker;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::{Metrics, Operation};
use crate::record::{Key, Want, Write};
use crate::store::{Applied, Loaded, Page, Recent, Store};
use crate::version::Clock;

/// Calls of one kind under way at once: PostgREST's pool has 10 connections, and others use it too.
const LANES: usize = 4;
/// A share is no smaller than this: a few records more cost a call next to nothing.
const LEAST: usize = 16;
/// What one call carries at most, but for a single one that is larger.
const RECORDS: usize = 500;
const BYTES: usize = 1 << 20;
/// So many callers that fail alike show that no record of theirs is at fault.
const SEVERAL: usize = 8;
/// What may wait for a lane. One more is told [`ErrorKind::Busy`].
const MOST_RECORDS: usize = 20_000;
const MOST_BYTES: usize = 64 << 20;

/// Gathers concurrent loads, and concurrent writes, into batches of at most 500 records or 1 MiB, without waiting for any:
/// while at most four calls are under way, each goes at once.
///
/// Each caller gets its own results. A batch that is refused for good is split until only the record that is at fault fails.
/// Where the callers outrun the store, so that 20,000 records or 64 MiB wait, they are told [`ErrorKind::Busy`].
#[derive(Debug)]
pub struct Batched<S> {
    store: Arc<S>,
    loads: Arc<Lanes<S, Loads>>,
    writes: Arc<Lanes<S, Writes>>,
}

impl<S: Store> Batched<S> {
    /// A store that gathers what goes to another one.
    pub fn new(store: S) -> Self {
        let store = Arc::new(store);
        let (loads, writes) = (Lanes::new(Arc::clone(&store)), Lanes::new(Arc::clone(&store)));
        Self { store, loads, writes }
    }
}

/// What is gathered: one operation of the store, for each of many items.
#[async_trait]
trait Errand: Debug + Send + Sync + 'static {
    type Item: Clone + Debug + Send + Sync;
    type Answer: Debug + Send;

    const OPERATION: Operation;

    fn bytes(item: &Self::Item) -> usize;

    async fn send<S: Store>(store: &S, items: &[Self::Item]) -> Result<Vec<Self::Answer>>;
}

#[derive(Debug)]
struct Loads;

#[async_trait]
impl Errand for Loads {
    type Item = Want;
    type Answer = Loaded;

    const OPERATION: Operation = Operation::Load;

    fn bytes(want: &Want) -> usize {
        want.key.as_str().len()
    }

    async fn send<S: Store>(store: &S, wants: &[Want]) -> Result<Vec<Loaded>> {
        store.load(wants).await
    }
}

#[derive(Debug)]
struct Writes;

#[async_trait]
impl Errand for Writes {
    type Item = Write;
    type Answer = Applied;

    const OPERATION: Operation = Operation::Apply;

    fn bytes(write: &Write) -> usize {
        write.record.bytes()
    }

    async fn send<S: Store>(store: &S, writes: &[Write]) -> Result<Vec<Applied>> {
        store.apply(writes).await
    }
}

/// One caller's items, and where its answers go.
#[derive(Debug)]
struct Job<E: Errand> {
    items: Vec<E::Item>,
    bytes: usize,
    answer: oneshot::Sender<Result<Vec<E::Answer>>>,
}

/// The calls of one kind: those under way, and those that wait.
#[derive(Debug)]
struct Lanes<S, E: Errand> {
    store: Arc<S>,
    state: Mutex<State<E>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct State<E: Errand> {
    taken: usize,
    /// Records under way in all lanes.
    sent: usize,
    waiting: VecDeque<Job<E>>,
    /// Records and bytes that wait.
    records: usize,
    bytes: usize,
}

/// A lane with so many records under way. It is taken until this is dropped; then it goes on with what waits, also where its
/// holder was given up.
struct Lane<S: Store, E: Errand> {
    lanes: Arc<Lanes<S, E>>,
    sent: usize,
    /// Whether it has gone on already. If it is dropped then, its runtime ends.
    has_gone_on: bool,
}

impl<S: Store, E: Errand> Drop for Lane<S, E> {
    fn drop(&mut self) {
        let mut state = self.lanes.lock();
        state.sent -= self.sent;
        if state.waiting.is_empty() {
            state.taken -= 1;
            return;
        }
        drop(state);
        let next = Lane { lanes: Arc::clone(&self.lanes), sent: 0, has_gone_on: true }.work();
        match self.has_gone_on {
            true => background::spawn_for_good(next),
            false => background::spawn_here(next),
        };
    }
}

/// How a call gets to the store.
enum Way<S: Store, E: Errand> {
    /// By itself, at once.
    Free(Lane<S, E>),
    /// With others, later.
    Wait(oneshot::Receiver<Result<Vec<E::Answer>>>),
}

impl<S: Store, E: Errand> Lanes<S, E> {
    fn new(store: Arc<S>) -> Arc<Self> {
        let state = State { taken: 0, sent: 0, waiting: VecDeque::new(), records: 0, bytes: 0 };
        Arc::new(Self { store, state: Mutex::new(state), metrics: Metrics::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State<E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn call(self: &Arc<Self>, items: &[E::Item]) -> Result<Vec<E::Answer>> {
        match self.way(items)? {
            Way::Free(_lane) => self.send(items).await,
            Way::Wait(answer) => answer.await.unwrap_or_else(|_| {
                let message = "the batch was given up: the runtime ends, or a bug";
                Err(Error::new(ErrorKind::Unavailable, message).with_outcome_unknown())
            }),
        }
    }

    async fn send(&self, items: &[E::Item]) -> Result<Vec<E::Answer>> {
        self.metrics.gathered(E::OPERATION, items.len());
        E::send(&*self.store, items).await
    }

    fn way(self: &Arc<Self>, items: &[E::Item]) -> Result<Way<S, E>> {
        let mut state = self.lock();
        if state.taken < LANES {
            (state.taken, state.sent) = (state.taken + 1, state.sent + items.len());
            return Ok(Way::Free(Lane { lanes: Arc::clone(self), sent: items.len(), has_gone_on: false }));
        }
        let bytes = items.iter().map(E::bytes).sum();
        state.check_room(items.len(), bytes)?;
        let (answer, answered) = oneshot::channel();
        state.push(Job { items: items.to_vec(), bytes, answer });
        Ok(Way::Wait(answered))
    }
}

impl<E: Errand> State<E> {
    fn check_room(&self, records: usize, bytes: usize) -> Result<()> {
        let fits = self.records + records <= MOST_RECORDS && self.bytes + bytes <= MOST_BYTES;
        if fits || self.waiting.is_empty() {
            return Ok(());
        }
        let message =
            format!("{} records with {} bytes wait for the store; try again later", self.records, self.bytes);
        Err(Error::new(ErrorKind::Busy, message).with_retry_after(Duration::from_secs(1)))
    }

    fn push(&mut self, job: Job<E>) {
        self.records += job.items.len();
        self.bytes += job.bytes;
        self.waiting.push_back(job);
    }

    /// What goes together into the next call, without those whose callers have gone.
    fn take(&mut self) -> Vec<Job<E>> {
        let share = (self.sent + self.records).div_ceil(LANES).clamp(LEAST, RECORDS);
        let (mut batch, mut records, mut bytes) = (Vec::new(), 0, 0);
        while let Some(next) = self.waiting.front() {
            let is_over = records + next.items.len() > share || bytes + next.bytes > BYTES;
            if is_over && !batch.is_empty() {
                break;
            }
            let Some(job) = self.waiting.pop_front() else { break };
            self.records -= job.items.len();
            self.bytes -= job.bytes;
            if !job.answer.is_closed() {
                (records, bytes) = (records + job.items.len(), bytes + job.bytes);
                batch.push(job);
            }
        }
        self.sent += records;
        batch
    }
}

impl<S: Store, E: Errand> Lane<S, E> {
    /// Sends what waits, until nothing does.
    async fn work(mut self) {
        loop {
            let batch = {
                let mut state = self.lanes.lock();
                state.sent -= self.sent;
                state.take()
            };
            self.sent = batch.iter().map(|job| job.items.len()).sum();
            if batch.is_empty() {
                return;
            }
            let span = tracing::debug_span!("batch", callers = batch.len());
            self.send(batch).instrument(span).await;
        }
    }

    /// Sends a batch. One that fails for perhaps a single record is sent in halves, in their order. If several callers in a
    /// row fail with the same error, and it is no verdict on their records, the others get it unsent.
    async fn send(&self, batch: Vec<Job<E>>) {
        let (mut batches, mut alike) = (vec![(batch, false)], Alike::default());
        // What a half says of itself does not tell what became of the whole.
        while let Some((mut batch, was_unknown)) = batches.pop() {
            if let Some(error) = alike.common(was_unknown) {
                refuse(batch, &error);
                continue;
            }
            let items: Vec<E::Item> = batch.iter().flat_map(|job| job.items.iter().cloned()).collect();
            match self.lanes.send(&items).await {
                Ok(answers) => {
                    alike = Alike::default();
                    give(batch, answers);
                }
                Err(error) if batch.len() > 1 && error.may_be_of_one() => {
                    let later = batch.split_off(batch.len() / 2);
                    let is_unknown = was_unknown || error.outcome_unknown();
                    batches.extend([(later, is_unknown), (batch, is_unknown)]);
                }
                Err(error) => {
                    alike.note(&error);
                    refuse(batch, &with(error, was_unknown));
                }
            }
        }
    }
}

/// Callers of one batch who failed alone, one after the other, with the same error.
#[derive(Default)]
struct Alike {
    last: Option<Error>,
    count: usize,
}

impl Alike {
    fn note(&mut self, error: &Error) {
        let is_same = |last: &Error| (last.kind(), last.code()) == (error.kind(), error.code());
        self.count = if self.last.as_ref().is_some_and(is_same) { self.count + 1 } else { 1 };
        self.last = Some(error.clone());
    }

    fn common(&self, was_unknown: bool) -> Option<Error> {
        let is_verdict = |error: &Error| {
            matches!(error.kind(), ErrorKind::Refused | ErrorKind::Invalid | ErrorKind::Busy)
                && error.may_be_of_one()
        };
        let common = self.last.clone().filter(|error| self.count >= SEVERAL && !is_verdict(error));
        common.map(|error| with(error, was_unknown))
    }
}

fn with(error: Error, was_unknown: bool) -> Error {
    if was_unknown { error.with_outcome_unknown() } else { error }
}

fn refuse<E: Errand>(batch: Vec<Job<E>>, error: &Error) {
    batch.into_iter().for_each(|job| _ = job.answer.send(Err(error.clone())));
}

/// Gives each caller its own; where the store gave too few, those without learn it.
fn give<E: Errand>(batch: Vec<Job<E>>, answers: Vec<E::Answer>) {
    let mut answers = answers.into_iter();
    for job in batch {
        let own: Vec<E::Answer> = answers.by_ref().take(job.items.len()).collect();
        job.answer.send(Ok(own)).ok();
    }
}

#[async_trait]
impl<S: Store> Store for Batched<S> {
    fn clock(&self) -> &Arc<Clock> {
        self.store.clock()
    }
    fn breaker(&self) -> Option<&Breaker> {
        self.store.breaker()
    }
    fn fault(&self) -> Option<Error> {
        self.store.fault()
    }
    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        self.loads.call(wants).await.map_err(Error::of_read)
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.writes.call(writes).await
    }
    /// Not gathered: what is tried may be at fault, and comes in batches already.
    async fn apply_on_trial(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.store.apply_on_trial(writes).await
    }
    async fn recent(&self, page: &Page) -> Result<Recent> {
        self.store.recent(page).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.store.touch(keys).await
    }
    async fn purge(&self, most: usize) -> Result<usize> {
        self.store.purge(most).await
    }
    async fn probe(&self) -> Result<()> {
        self.store.probe().await
    }
}
