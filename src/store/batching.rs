//! `BatchingStore`: a wrapper that turns many small calls into few large ones.
//!
//! # Why no batching delay?
//!
//! A call never waits for other calls to fill a batch. It goes at once while fewer than [`MAX_CONCURRENT_CALLS`] calls of its
//! kind are in progress. While all slots are busy, further calls wait in the backlog, and the next free slot takes a share
//! of them. Databases use the same group commit (DeWitt et al., "Implementation Techniques for Main Memory Database
//! Systems", 1984). So the batch size grows with the load alone.
//!
//! # Why a share, and not the whole backlog?
//!
//! A share is an equal part of all records that are in progress or wait. When the first free slot took the whole backlog,
//! the other slots sent small batches: 16 records on average with 256 callers. With equal shares the average is 40.

mod failures;

use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;
use tracing::Instrument;

use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::observe::metrics::{Metrics, StoreOperation};
use crate::resilience::breaker::Breaker;
use crate::resilience::tasks;
use crate::store::{Applied, ListPage, ListRequest, LoadRequest, Loaded, Store, Write};

use failures::{RepeatedFailure, with_outcome};

/// Limits the concurrent calls of one kind. PostgREST's pool has 10 connections, and other clients use it too.
const MAX_CONCURRENT_CALLS: usize = 4;
/// The smallest share. A few more records cost a call next to nothing.
const MIN_SHARE: usize = 16;
/// Limit one batch. A single larger request goes alone.
const MAX_BATCH_RECORDS: usize = 500;
const MAX_BATCH_BYTES: usize = 1 << 20;
/// Limit the backlog. A call above the limit fails with [`ErrorKind::Overloaded`] (I12).
const MAX_WAITING_RECORDS: usize = 20_000;
const MAX_WAITING_BYTES: usize = 64 << 20;

/// Combines concurrent loads, and concurrent writes, into batches of at most 500 records or 1 MiB.
///
/// There is no batching delay: while fewer than four calls are in progress, each call goes at once. Each caller gets its own
/// results. If the store rejects a batch, the wrapper splits it until only the rejected record fails. If 20,000 records or
/// 64 MiB wait, further calls fail with [`ErrorKind::Overloaded`].
#[derive(Debug)]
pub struct BatchingStore<S> {
    store: Arc<S>,
    loads: Arc<Dispatcher<S, Loads>>,
    writes: Arc<Dispatcher<S, Writes>>,
}

impl<S: Store> BatchingStore<S> {
    /// Wraps a store.
    ///
    /// ```
    /// use threadkeep::store::{BatchingStore, Key, LoadRequest, Loaded, Memory, Store, Version};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> threadkeep::Result<()> {
    /// let store = BatchingStore::new(Memory::new());
    /// let found = store.load(&[LoadRequest::new(Key::new("thread-1")?)]).await?;
    /// assert_eq!(found, [Loaded::Absent(Version::NONE)]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(store: S) -> Self {
        let store = Arc::new(store);
        let (loads, writes) = (Dispatcher::new(Arc::clone(&store)), Dispatcher::new(Arc::clone(&store)));
        Self { store, loads, writes }
    }
}

/// An operation of the store that takes many items in one call.
#[async_trait]
trait BatchOp: Debug + Send + Sync + 'static {
    type Item: Clone + Debug + Send + Sync;
    type Answer: Debug + Send;

    const OPERATION: StoreOperation;

    fn bytes(item: &Self::Item) -> usize;

    async fn send<S: Store>(store: &S, items: &[Self::Item]) -> Result<Vec<Self::Answer>>;
}

#[derive(Debug)]
struct Loads;

#[async_trait]
impl BatchOp for Loads {
    type Item = LoadRequest;
    type Answer = Loaded;

    const OPERATION: StoreOperation = StoreOperation::Load;

    fn bytes(request: &LoadRequest) -> usize {
        request.key.as_str().len()
    }

    async fn send<S: Store>(store: &S, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        store.load(requests).await
    }
}

#[derive(Debug)]
struct Writes;

#[async_trait]
impl BatchOp for Writes {
    type Item = Write;
    type Answer = Applied;

    const OPERATION: StoreOperation = StoreOperation::Apply;

    fn bytes(write: &Write) -> usize {
        write.record.bytes()
    }

    async fn send<S: Store>(store: &S, writes: &[Write]) -> Result<Vec<Applied>> {
        store.apply(writes).await
    }
}

/// The items of one caller, and the channel for its answers.
#[derive(Debug)]
struct BatchRequest<E: BatchOp> {
    items: Vec<E::Item>,
    bytes: usize,
    answer: oneshot::Sender<Result<Vec<E::Answer>>>,
}

/// Sends the calls of one kind, and keeps their backlog.
#[derive(Debug)]
struct Dispatcher<S, E: BatchOp> {
    store: Arc<S>,
    state: Mutex<DispatchState<E>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct DispatchState<E: BatchOp> {
    busy_slots: usize,
    /// The records in progress in all slots.
    in_flight: usize,
    waiting: VecDeque<BatchRequest<E>>,
    /// The records and bytes in `waiting`.
    records: usize,
    bytes: usize,
}

/// Occupies one slot. On drop, the slot continues with the backlog, even if its caller was cancelled.
struct DispatchSlot<S: Store, E: BatchOp> {
    dispatcher: Arc<Dispatcher<S, E>>,
    /// The records of the current call.
    in_flight: usize,
    /// Whether the slot already runs as a background task. Its drop with a backlog then means that the runtime ends.
    is_continuation: bool,
}

impl<S: Store, E: BatchOp> Drop for DispatchSlot<S, E> {
    fn drop(&mut self) {
        let mut state = self.dispatcher.lock();
        state.in_flight -= self.in_flight;
        if state.waiting.is_empty() {
            state.busy_slots -= 1;
            return;
        }
        drop(state);
        // The busy slot passes on, so that no waiting caller depends on a cancelled one.
        let dispatcher = Arc::clone(&self.dispatcher);
        let next = DispatchSlot { dispatcher, in_flight: 0, is_continuation: true }.work();
        if self.is_continuation {
            tasks::spawn_for_good(next);
        } else {
            tasks::spawn_here(next);
        }
    }
}

/// The way of a call to the store.
enum Dispatch<S: Store, E: BatchOp> {
    /// The call goes alone and at once.
    Immediate(DispatchSlot<S, E>),
    /// The call waits for a slot, and shares a batch.
    Queued(oneshot::Receiver<Result<Vec<E::Answer>>>),
}

impl<S: Store, E: BatchOp> Dispatcher<S, E> {
    fn new(store: Arc<S>) -> Arc<Self> {
        let state =
            DispatchState { busy_slots: 0, in_flight: 0, waiting: VecDeque::new(), records: 0, bytes: 0 };
        Arc::new(Self { store, state: Mutex::new(state), metrics: Metrics::new() })
    }

    fn lock(&self) -> MutexGuard<'_, DispatchState<E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn call(self: &Arc<Self>, items: &[E::Item]) -> Result<Vec<E::Answer>> {
        match self.dispatch(items)? {
            // The bound slot lives as long as the call, and passes on after a cancellation too.
            Dispatch::Immediate(_slot) => self.send(items).await,
            Dispatch::Queued(answer) => answer.await.unwrap_or_else(|_| {
                // The batch may have been sent (I6).
                let message = "the batch task ended before the batch was complete";
                Err(Error::new(ErrorKind::Unavailable, message).with_outcome_unknown())
            }),
        }
    }

    async fn send(&self, items: &[E::Item]) -> Result<Vec<E::Answer>> {
        self.metrics.record_batch_size(E::OPERATION, items.len());
        E::send(&*self.store, items).await
    }

    fn dispatch(self: &Arc<Self>, items: &[E::Item]) -> Result<Dispatch<S, E>> {
        // A busy slot looks at the backlog under this lock before it ends. So no request stays behind.
        let mut state = self.lock();
        if state.busy_slots < MAX_CONCURRENT_CALLS {
            state.busy_slots += 1;
            state.in_flight += items.len();
            return Ok(Dispatch::Immediate(DispatchSlot {
                dispatcher: Arc::clone(self),
                in_flight: items.len(),
                is_continuation: false,
            }));
        }
        let bytes = items.iter().map(E::bytes).sum();
        state.check_room(items.len(), bytes)?;
        let (answer, answered) = oneshot::channel();
        state.push(BatchRequest { items: items.to_vec(), bytes, answer });
        Ok(Dispatch::Queued(answered))
    }
}

impl<E: BatchOp> DispatchState<E> {
    fn check_room(&self, records: usize, bytes: usize) -> Result<()> {
        let fits = self.records + records <= MAX_WAITING_RECORDS && self.bytes + bytes <= MAX_WAITING_BYTES;
        // A request above the limit still gets through if nothing else waits.
        if fits || self.waiting.is_empty() {
            return Ok(());
        }
        let message = format!("{} records with {} bytes wait for the store", self.records, self.bytes);
        let error = Error::new(ErrorKind::Overloaded, message).with_remedy("try again later");
        Err(error.with_retry_after(Duration::from_secs(1)))
    }

    fn push(&mut self, request: BatchRequest<E>) {
        self.records += request.items.len();
        self.bytes += request.bytes;
        self.waiting.push_back(request);
    }

    /// Takes the next batch from the backlog. Drops requests of cancelled callers.
    fn next_batch(&mut self) -> Vec<BatchRequest<E>> {
        let share = (self.in_flight + self.records)
            .div_ceil(MAX_CONCURRENT_CALLS)
            .clamp(MIN_SHARE, MAX_BATCH_RECORDS);
        let (mut batch, mut records, mut bytes) = (Vec::new(), 0, 0);
        while let Some(next) = self.waiting.front() {
            let exceeds = records + next.items.len() > share || bytes + next.bytes > MAX_BATCH_BYTES;
            // A request above the share goes alone, so the backlog always shrinks (I12).
            if exceeds && !batch.is_empty() {
                break;
            }
            let Some(request) = self.waiting.pop_front() else { break };
            self.records -= request.items.len();
            self.bytes -= request.bytes;
            // A cancelled caller has sent nothing yet, so its request can go.
            if !request.answer.is_closed() {
                records += request.items.len();
                bytes += request.bytes;
                batch.push(request);
            }
        }
        self.in_flight += records;
        batch
    }
}

impl<S: Store, E: BatchOp> DispatchSlot<S, E> {
    /// Sends batches until the backlog is empty.
    async fn work(mut self) {
        loop {
            let batch = {
                let mut state = self.dispatcher.lock();
                state.in_flight -= self.in_flight;
                state.next_batch()
            };
            // No await comes since the lock, so a drop returns exactly these records.
            self.in_flight = batch.iter().map(|request| request.items.len()).sum();
            // The drop looks at the backlog again. A request may have come since.
            if batch.is_empty() {
                return;
            }
            let span = tracing::debug_span!("batch", callers = batch.len());
            self.send(batch).instrument(span).await;
        }
    }

    /// Sends a batch, and isolates a failing record.
    ///
    /// If a single record may have caused a failure, both halves are sent in their order. If several callers in a row fail
    /// alone with the same error, the error is not about their records. The remaining callers get it without a request, so
    /// that an outage costs few calls (I12).
    async fn send(&self, batch: Vec<BatchRequest<E>>) {
        let (mut batches, mut repeated) = (vec![(batch, false)], RepeatedFailure::default());
        // The result of a half does not tell whether the whole batch was stored before.
        while let Some((mut batch, was_unknown)) = batches.pop() {
            if let Some(error) = repeated.common(was_unknown) {
                fail_all(batch, &error);
                continue;
            }
            let items: Vec<E::Item> =
                batch.iter().flat_map(|request| request.items.iter().cloned()).collect();
            match self.dispatcher.send(&items).await {
                Ok(answers) => {
                    repeated = RepeatedFailure::default();
                    distribute(batch, answers);
                }
                Err(error) if batch.len() > 1 && error.may_affect_one_record() => {
                    let later = batch.split_off(batch.len() / 2);
                    let is_unknown = was_unknown || error.outcome_unknown();
                    // The first half is pushed last, so that it is sent first.
                    batches.extend([(later, is_unknown), (batch, is_unknown)]);
                }
                Err(error) => {
                    repeated.note(&error);
                    fail_all(batch, &with_outcome(error, was_unknown));
                }
            }
        }
    }
}

fn fail_all<E: BatchOp>(batch: Vec<BatchRequest<E>>, error: &Error) {
    for request in batch {
        request.answer.send(Err(error.clone())).ok();
    }
}

/// Sends each caller its own answers. If the store returned too few, the last callers get fewer than they asked for.
fn distribute<E: BatchOp>(batch: Vec<BatchRequest<E>>, answers: Vec<E::Answer>) {
    let mut answers = answers.into_iter();
    for request in batch {
        let own: Vec<E::Answer> = answers.by_ref().take(request.items.len()).collect();
        request.answer.send(Ok(own)).ok();
    }
}

#[async_trait]
impl<S: Store> Store for BatchingStore<S> {
    fn clock(&self) -> &Arc<Clock> {
        self.store.clock()
    }
    fn breaker(&self) -> Option<&Breaker> {
        self.store.breaker()
    }
    fn fault(&self) -> Option<Error> {
        self.store.fault()
    }
    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.loads.call(requests).await.map_err(Error::without_outcome)
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.writes.call(writes).await
    }
    /// Bypasses the batches: such writes come in batches already, and one of them may cause a failure.
    async fn apply_once(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.store.apply_once(writes).await
    }
    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        self.store.list(page).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.store.touch(keys).await
    }
    async fn purge(&self, limit: usize) -> Result<usize> {
        self.store.purge(limit).await
    }
    async fn probe(&self) -> Result<()> {
        self.store.probe().await
    }
}
