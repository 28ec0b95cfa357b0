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

use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tracing::Instrument;

use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::observe::metrics::{Metrics, StoreOperation};
use crate::resilience::breaker::Breaker;
use crate::resilience::tasks;
use crate::store::{Applied, Changes, Cursor, ListPage, ListRequest, LoadRequest, Loaded, Store, Write};

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
/// After this many equal failures in a row, the cause is not a record, and the rest of the batch is not sent.
const MAX_EQUAL_FAILURES: usize = 8;

/// Combines concurrent loads, and concurrent writes, into batches of at most 500 records or 1 MiB.
///
/// There is no batching delay: while fewer than four calls are in progress, each call goes at once. Each caller gets its own
/// results. If the store rejects a batch, the wrapper splits it until only the rejected record fails. If 20,000 records or
/// 64 MiB wait, further calls fail with [`ErrorKind::Overloaded`].
#[derive(Debug)]
pub struct BatchingStore<S> {
    store: Arc<S>,
    loads: Arc<Dispatcher<S, LoadRequest>>,
    writes: Arc<Dispatcher<S, Write>>,
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
        Self { loads: Dispatcher::new(&store), writes: Dispatcher::new(&store), store }
    }
}

/// A request that travels in batches.
trait BatchItem: Clone + Debug + Send + Sync + 'static {
    const OPERATION: StoreOperation;
    type Answer: Debug + Send + 'static;

    fn bytes(&self) -> usize;

    /// Calls the operation of the store.
    fn call<S: Store>(store: &S, items: &[Self]) -> impl Future<Output = Result<Vec<Self::Answer>>> + Send;
}

impl BatchItem for LoadRequest {
    const OPERATION: StoreOperation = StoreOperation::Load;
    type Answer = Loaded;

    fn bytes(&self) -> usize {
        self.key.as_str().len()
    }

    async fn call<S: Store>(store: &S, items: &[Self]) -> Result<Vec<Loaded>> {
        store.load(items).await
    }
}

impl BatchItem for Write {
    const OPERATION: StoreOperation = StoreOperation::Apply;
    type Answer = Applied;

    fn bytes(&self) -> usize {
        self.record.bytes()
    }

    async fn call<S: Store>(store: &S, items: &[Self]) -> Result<Vec<Applied>> {
        store.apply(items).await
    }
}

/// Sends the calls of one kind, and keeps their backlog.
#[derive(Debug)]
struct Dispatcher<S, I: BatchItem> {
    store: Arc<S>,
    state: Mutex<DispatchState<I>>,
    metrics: Metrics,
}

#[derive(Debug)]
struct DispatchState<I: BatchItem> {
    busy_slots: usize,
    /// The records in progress in all slots.
    in_flight: usize,
    waiting: VecDeque<BatchRequest<I>>,
    /// The records and bytes in `waiting`.
    records: usize,
    bytes: usize,
}

/// The items of one caller, and the channel for its answers.
#[derive(Debug)]
struct BatchRequest<I: BatchItem> {
    items: Vec<I>,
    bytes: usize,
    answer: oneshot::Sender<Result<Vec<I::Answer>>>,
}

/// Occupies one slot. On drop, the slot continues with the backlog, even if its caller was cancelled.
struct DispatchSlot<S: Store, I: BatchItem> {
    dispatcher: Arc<Dispatcher<S, I>>,
    in_flight: usize,
    owner: SlotOwner,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotOwner {
    Caller,
    /// A background task. If its slot drops with a backlog, the task's runtime ends.
    Task,
}

impl<S: Store, I: BatchItem> Drop for DispatchSlot<S, I> {
    fn drop(&mut self) {
        let mut state = self.dispatcher.state.lock();
        state.in_flight -= self.in_flight;
        if state.waiting.is_empty() {
            state.busy_slots -= 1;
            return;
        }
        drop(state);
        // The busy slot passes on, so that no waiting caller depends on a cancelled one.
        let dispatcher = Arc::clone(&self.dispatcher);
        let next = DispatchSlot { dispatcher, in_flight: 0, owner: SlotOwner::Task }.work();
        match self.owner {
            SlotOwner::Caller => tasks::spawn(next),
            SlotOwner::Task => tasks::spawn_for_good(next),
        };
    }
}

impl<S: Store, I: BatchItem> Dispatcher<S, I> {
    fn new(store: &Arc<S>) -> Arc<Self> {
        let state =
            DispatchState { busy_slots: 0, in_flight: 0, waiting: VecDeque::new(), records: 0, bytes: 0 };
        Arc::new(Self { store: Arc::clone(store), state: Mutex::new(state), metrics: Metrics::new() })
    }

    async fn call(self: &Arc<Self>, items: &[I]) -> Result<Vec<I::Answer>> {
        let (answer, answered) = oneshot::channel();
        let slot = {
            // A busy slot looks at the backlog under this lock before it ends. So no request stays behind.
            let mut state = self.state.lock();
            if state.busy_slots < MAX_CONCURRENT_CALLS {
                state.busy_slots += 1;
                state.in_flight += items.len();
                let (dispatcher, in_flight) = (Arc::clone(self), items.len());
                Some(DispatchSlot { dispatcher, in_flight, owner: SlotOwner::Caller })
            } else {
                state.queue(items, items.iter().map(I::bytes).sum(), answer)?;
                None
            }
        };
        // The bound slot lives as long as the call, and passes on after a cancellation too.
        if let Some(_slot) = slot {
            return self.send(items).await;
        }
        answered.await.unwrap_or_else(|_| {
            // The batch may have been sent (I6).
            let message = "the batch task ended before the batch was complete";
            Err(Error::new(ErrorKind::Unavailable, message).with_outcome_unknown())
        })
    }

    async fn send(&self, items: &[I]) -> Result<Vec<I::Answer>> {
        self.metrics.record_batch_size(I::OPERATION, items.len());
        I::call(&*self.store, items).await
    }
}

impl<I: BatchItem> DispatchState<I> {
    /// Adds a request to the backlog, if it has room.
    fn queue(
        &mut self,
        items: &[I],
        bytes: usize,
        answer: oneshot::Sender<Result<Vec<I::Answer>>>,
    ) -> Result<()> {
        let records = self.records + items.len();
        let fits = records <= MAX_WAITING_RECORDS && self.bytes + bytes <= MAX_WAITING_BYTES;
        // A request above the limit still gets through if nothing else waits.
        if fits || self.waiting.is_empty() {
            self.records = records;
            self.bytes += bytes;
            self.waiting.push_back(BatchRequest { items: items.to_vec(), bytes, answer });
            return Ok(());
        }
        let message = format!("{} records with {} bytes wait for the store", self.records, self.bytes);
        let error = Error::new(ErrorKind::Overloaded, message).with_remedy("try again later");
        Err(error.with_retry_after(Duration::from_secs(1)))
    }

    /// Takes the next batch from the backlog. Drops requests of cancelled callers.
    fn next_batch(&mut self) -> Vec<BatchRequest<I>> {
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

impl<S: Store, I: BatchItem> DispatchSlot<S, I> {
    /// Sends batches until the backlog is empty.
    async fn work(mut self) {
        loop {
            let batch = {
                let mut state = self.dispatcher.state.lock();
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
    async fn send(&self, batch: Vec<BatchRequest<I>>) {
        let (mut batches, mut repeated) = (vec![(batch, false)], RepeatedFailure::default());
        // The result of a half does not tell whether the whole batch was stored before.
        while let Some((mut batch, was_unknown)) = batches.pop() {
            let fail_all = |batch: Vec<BatchRequest<I>>, error: Error| {
                let error = if was_unknown { error.with_outcome_unknown() } else { error };
                for request in batch {
                    request.answer.send(Err(error.clone())).ok();
                }
            };
            if let Some(error) = repeated.common() {
                fail_all(batch, error.clone());
                continue;
            }
            let items: Vec<I> = batch.iter().flat_map(|request| request.items.iter().cloned()).collect();
            match self.dispatcher.send(&items).await {
                Ok(answers) => {
                    repeated = RepeatedFailure::default();
                    // If the store returned too few, the last callers get fewer than they asked for.
                    let mut answers = answers.into_iter();
                    for request in batch {
                        let own = answers.by_ref().take(request.items.len()).collect();
                        request.answer.send(Ok(own)).ok();
                    }
                }
                Err(error) if batch.len() > 1 && error.may_affect_one_record() => {
                    let later = batch.split_off(batch.len() / 2);
                    let is_unknown = was_unknown || error.outcome_unknown();
                    // The first half is pushed last, so that it is sent first.
                    batches.extend([(later, is_unknown), (batch, is_unknown)]);
                }
                Err(error) => {
                    repeated.note(&error);
                    fail_all(batch, error);
                }
            }
        }
    }
}

/// Counts callers of one batch that failed alone, in a row, with the same error.
#[derive(Default)]
struct RepeatedFailure {
    last: Option<Error>,
    count: usize,
}

impl RepeatedFailure {
    fn note(&mut self, error: &Error) {
        let is_same = |last: &Error| (last.kind(), last.code()) == (error.kind(), error.code());
        self.count = if self.last.as_ref().is_some_and(is_same) { self.count + 1 } else { 1 };
        self.last = Some(error.clone());
    }

    /// Returns the error of the remaining callers, if the failures have a common cause.
    ///
    /// A verdict about single records is no common cause, however often it repeats.
    fn common(&self) -> Option<&Error> {
        let is_verdict = |error: &Error| {
            matches!(error.kind(), ErrorKind::Rejected | ErrorKind::Invalid | ErrorKind::Overloaded)
                && error.may_affect_one_record()
        };
        self.last.as_ref().filter(|error| self.count >= MAX_EQUAL_FAILURES && !is_verdict(error))
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
    async fn changes(&self, since: Option<&Cursor>) -> Result<Option<Changes>> {
        self.store.changes(since).await
    }
    async fn probe(&self) -> Result<()> {
        self.store.probe().await
    }
}
