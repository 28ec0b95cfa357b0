//! `ResilientStore`: a wrapper that keeps an outage cheap.
//!
//! From the outside to the inside: one retry, the concurrency limit, the breaker, the deadline, the call.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};
use tokio::task::AbortHandle;
use tracing::Instrument;

use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::observe::metrics::{Metrics, StoreOperation};
use crate::resilience::backoff::Backoff;
use crate::resilience::breaker::Breaker;
use crate::resilience::tasks;
use crate::store::{Applied, Changes, Cursor, ListPage, ListRequest, LoadRequest, Loaded, Store, Write};

/// Limits the calls in progress. PostgREST's pool has 10 connections, and other clients use it too.
const MAX_CONCURRENT_CALLS: usize = 8;
/// The limit on the transfer time of a call: a second for each MiB of the largest request or response.
const MAX_TRANSFER: Duration = Duration::from_secs(16);
/// The maximum of the random pause before the only retry. The queue, or the caller, retries later.
const RETRY_BACKOFF: Duration = Duration::from_millis(100);
/// Limits the attempts of the first contact if the key is rejected or the migrations seem to be missing.
///
/// A gateway and PostgREST can disagree for a moment about the time, or about a schema that was just changed.
const MAX_CONTACT_ATTEMPTS: usize = 4;
const MIN_CONTACT_PAUSE: Duration = Duration::from_millis(500);
const MAX_CONTACT_PAUSE: Duration = Duration::from_secs(2);

/// Gives each call of a store a deadline, one retry, a concurrency limit, and a circuit breaker.
///
/// The breaker opens after five failures in a row, or if half of the last calls failed. It also opens if five calls exceed the
/// soft timeout of the cache and no call succeeded for 1.5 s. While it is open, no call passes. A background task probes the
/// store with full jitter of up to 30 s, even without traffic. A successful probe closes the breaker. Dropping this value ends
/// the task.
#[derive(Debug)]
pub struct ResilientStore<S> {
    shared: Arc<ResilientCore<S>>,
    prober: AbortHandle,
}

#[derive(Debug)]
struct ResilientCore<S> {
    store: S,
    breaker: Breaker,
    concurrency: Semaphore,
    /// Held during a probe: only one probe runs at a time (I11).
    probing: Mutex<()>,
    deadline: Duration,
    metrics: Metrics,
}

impl<S> Drop for ResilientStore<S> {
    fn drop(&mut self) {
        self.prober.abort();
    }
}

impl<S: Store> ResilientStore<S> {
    /// Wraps a store, and starts the probe task. `deadline` limits a small call.
    ///
    /// Each written MiB adds a second, up to 16 seconds. A read always gets the 16 seconds, because the size of its response is
    /// unknown. So a store with a slow network should detect a stalled response itself, as
    /// [`Supabase`](crate::store::Supabase) does. The probe task runs on threadkeep's own runtime, so it survives the end of
    /// the caller's runtime.
    ///
    /// ```
    /// use std::time::Duration;
    /// use threadkeep::store::{BreakerState, Memory, ResilientStore, Store};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> threadkeep::Result<()> {
    /// let store = ResilientStore::new(Memory::new(), Duration::from_secs(5));
    /// store.connect().await?;
    /// assert!(store.breaker().is_some_and(|breaker| breaker.state() == BreakerState::Closed));
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(store: S, deadline: Duration) -> Self {
        let shared = Arc::new(ResilientCore {
            store,
            // A cache tells the breaker its soft timeout. Without one, no call is slow before its deadline.
            breaker: Breaker::new(deadline),
            concurrency: Semaphore::new(MAX_CONCURRENT_CALLS),
            probing: Mutex::default(),
            deadline,
            metrics: Metrics::new(),
        });
        let core = Arc::clone(&shared);
        let probing = async move { core.breaker.keep_probing(|| core.probe_alone()).await };
        let prober = tasks::spawn_for_good(probing).abort_handle();
        Self { shared, prober }
    }

    /// Makes the first contact, so that the store's clock is known before the first write.
    ///
    /// In an outage the call succeeds and opens the breaker, and the probe task makes the first contact later. A rejected key
    /// and missing migrations are retried for some seconds. If the store answers reads but takes no writes, the call succeeds:
    /// a cache queues its writes. See [`new`](Self::new) for an example.
    ///
    /// # Errors
    /// - [`Unauthorized`](ErrorKind::Unauthorized): the store rejects the credentials.
    /// - [`SchemaOutdated`](ErrorKind::SchemaOutdated): the database lacks the migrations.
    /// - Any other error of the store that is no outage.
    pub async fn connect(&self) -> Result<()> {
        self.first_contact().await.map(drop)
    }

    /// As [`connect`](Self::connect). Returns the reason if the store answers but takes no writes.
    pub(crate) async fn first_contact(&self) -> Result<Option<Error>> {
        let mut pauses = Backoff::new(MIN_CONTACT_PAUSE, MAX_CONTACT_PAUSE);
        for remaining in (0..MAX_CONTACT_ATTEMPTS).rev() {
            match self.shared.send_probe().await {
                Ok(()) => break,
                Err(e) if e.counts_as_outage() => {
                    self.shared.breaker.trip(&e);
                    break;
                }
                // The store answers and rejects writes only, so the breaker stays closed.
                Err(e) if e.is_outage() => return Ok(Some(e)),
                Err(e) if remaining == 0 => {
                    // The probe writes. If a plain load succeeds, only writes are rejected.
                    return self
                        .check_reads()
                        .await
                        .map(|()| Some(e.clone().into_write_outage()))
                        .map_err(|_| e);
                }
                Err(error) => {
                    let pause = pauses.next().unwrap_or(MAX_CONTACT_PAUSE);
                    tracing::debug!(%error, ?pause, "first contact with the store failed; retrying");
                    tokio::time::sleep(pause).await;
                }
            }
        }
        Ok(None)
    }

    /// Checks that the store answers a load.
    async fn check_reads(&self) -> Result<()> {
        let absent = LoadRequest::from(Key::new("threadkeep probe")?);
        let load = self.shared.store.load(std::slice::from_ref(&absent));
        self.shared.call_with_deadline(StoreOperation::Load, Duration::ZERO, load).await.map(drop)
    }

    /// Calls the store, and retries once after an outage error.
    async fn call<T, F: Future<Output = Result<T>>>(
        &self,
        operation: StoreOperation,
        transfer: Duration,
        call: impl Fn() -> F,
    ) -> Result<T> {
        let first_error = match self.shared.attempt(operation, transfer, &call).await {
            // A store that names a pause gets no retry before its end.
            Err(e) if e.counts_as_outage() && e.retry_after().is_none() => e,
            other => return other,
        };
        tokio::time::sleep(Backoff::new(RETRY_BACKOFF, RETRY_BACKOFF).next().unwrap_or(RETRY_BACKOFF)).await;
        match self.shared.attempt(operation, transfer, &call).await {
            // The second error does not tell whether the first attempt was stored (I6).
            Err(e) if first_error.outcome_unknown() => Err(e.with_outcome_unknown()),
            other => other,
        }
    }

    async fn read<T, F: Future<Output = Result<T>>>(
        &self,
        operation: StoreOperation,
        call: impl Fn() -> F,
    ) -> Result<T> {
        // The size of the response is not known in advance.
        let transfer = match operation {
            StoreOperation::Load | StoreOperation::List => MAX_TRANSFER,
            _ => Duration::ZERO,
        };
        self.call(operation, transfer, call).await.map_err(Error::without_outcome)
    }
}

impl<S: Store> ResilientCore<S> {
    async fn attempt<T, F: Future<Output = Result<T>>>(
        &self,
        operation: StoreOperation,
        transfer: Duration,
        call: impl FnOnce() -> F,
    ) -> Result<T> {
        // The slot comes first: a permit that waited for a slot would count an old breaker state (I18).
        let _slot = self.acquire_slot().await?;
        let allowance = match operation {
            // Most loads are small, so a load that takes long counts as slow.
            StoreOperation::Load => Duration::ZERO,
            _ => transfer,
        };
        let permit = self.breaker.try_acquire(allowance)?;
        let result = tokio::select! {
            biased;
            result = self.call_with_deadline(operation, transfer, call()) => result,
            never = self.breaker.watch_silence(&permit) => match never {},
        };
        self.breaker.record(&permit, &result);
        result
    }

    /// Waits for a slot under the concurrency limit, at most one deadline long (I12).
    ///
    /// A slow store may stay below the threshold of the breaker. Its callers must not wait forever. If the breaker opens, the
    /// wait ends at once.
    async fn acquire_slot(&self) -> Result<SemaphorePermit<'_>> {
        let limit = self.deadline;
        tokio::select! {
            // A free slot wins over an elapsed timer, however late this task is polled.
            biased;
            slot = self.concurrency.acquire() => {
                return slot.map_err(|_| Error::new(ErrorKind::Closed, "the store is closed"));
            }
            () = self.breaker.wait_open() => self.breaker.check()?,
            () = tokio::time::sleep(limit) => {}
        }
        let message = format!(
            "no slot for a store call within {limit:.1?}: {MAX_CONCURRENT_CALLS} calls are in progress"
        );
        Err(Error::new(ErrorKind::Overloaded, message).with_remedy("try again later").with_retry_after(limit))
    }

    /// Runs a call under its deadline, and counts it in the metrics.
    ///
    /// The deadline is inside the breaker. A call that is cancelled from outside the breaker would not count as a failure.
    #[allow(clippy::disallowed_methods, reason = "the one place where calls get their deadline")]
    async fn call_with_deadline<T>(
        &self,
        operation: StoreOperation,
        transfer: Duration,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let deadline = self.deadline.saturating_add(transfer);
        // Detects a jump of the machine's clock before the call. A jump during the call makes its response useless for clock sync.
        self.store.clock().moment();
        let start = Instant::now();
        let span = tracing::debug_span!("store", operation = operation.as_str());
        let result = tokio::time::timeout(deadline, call.instrument(span)).await.unwrap_or_else(|_| {
            let message = format!("the store did not answer within {deadline:.1?}");
            Err(Error::new(ErrorKind::Unavailable, message).with_outcome_unknown())
        });
        self.metrics.called(operation, start.elapsed(), result.as_ref().err());
        result
    }

    /// Probes the store once.
    async fn send_probe(&self) -> Result<()> {
        self.call_with_deadline(StoreOperation::Probe, Duration::ZERO, probe_writes(&self.store)).await
    }

    /// Probes the store for the half-open breaker (I11). A panic of the store does not end the probe task.
    async fn probe_alone(self: &Arc<Self>) -> Result<()> {
        let _guard = self.probing.lock().await;
        let shared = Arc::clone(self);
        let panicked =
            |e| Err(Error::new(ErrorKind::Unavailable, "the probe of the store panicked").with_source(e));
        tokio::spawn(async move { shared.send_probe().await }).await.unwrap_or_else(panicked)
    }
}

/// Returns the time that the transfer of these writes may take.
fn transfer_time(writes: &[Write]) -> Duration {
    let bytes: usize = writes.iter().map(|write| write.record.bytes()).sum();
    Duration::from_secs_f64(bytes as f64 / f64::from(1 << 20)).min(MAX_TRANSFER)
}

/// Probes the store, and reports a rejected probe as an outage of all writes: no record can be at fault in a probe.
async fn probe_writes<S: Store>(store: &S) -> Result<()> {
    store.probe().await.map_err(|error| match error.kind() {
        ErrorKind::Rejected | ErrorKind::Invalid => error.into_write_outage(),
        ErrorKind::Overloaded | ErrorKind::Unavailable if error.may_affect_one_record() => {
            error.into_write_outage()
        }
        _ => error,
    })
}

#[async_trait]
impl<S: Store> Store for ResilientStore<S> {
    fn clock(&self) -> &Arc<Clock> {
        self.shared.store.clock()
    }

    fn breaker(&self) -> Option<&Breaker> {
        Some(&self.shared.breaker)
    }

    fn fault(&self) -> Option<Error> {
        self.shared.store.fault()
    }

    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.read(StoreOperation::Load, || self.shared.store.load(requests)).await
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.call(StoreOperation::Apply, transfer_time(writes), || self.shared.store.apply(writes)).await
    }

    async fn apply_once(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let _slot = self.shared.acquire_slot().await?;
        // No permit: a batch of replay does not count in the breaker.
        self.shared.breaker.check()?;
        let call = self.shared.store.apply_once(writes);
        self.shared.call_with_deadline(StoreOperation::Apply, transfer_time(writes), call).await
    }

    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        self.read(StoreOperation::List, || self.shared.store.list(page)).await
    }

    async fn changes(&self, since: Option<&Cursor>) -> Result<Option<Changes>> {
        self.read(StoreOperation::Changes, || self.shared.store.changes(since)).await
    }

    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.read(StoreOperation::Touch, || self.shared.store.touch(keys)).await
    }

    async fn purge(&self, limit: usize) -> Result<usize> {
        self.read(StoreOperation::Purge, || self.shared.store.purge(limit)).await
    }

    async fn probe(&self) -> Result<()> {
        // The probe task may run a probe now (I11).
        let _guard = self.shared.probing.lock().await;
        self.read(StoreOperation::Probe, || probe_writes(&self.shared.store)).await
    }
}
