//! `Guard`: a store around a store that keeps an outage cheap. Retry once (breaker (deadline (call))).

use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};
use tokio::task::AbortHandle;
use tracing::Instrument;

use crate::background;
use crate::backoff::Backoff;
use crate::breaker::{Breaker, State};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::{Metrics, Operation};
use crate::record::{Key, Want, Write};
use crate::store::{Applied, Loaded, Page, Recent, Store};
use crate::version::Clock;

/// Calls in flight at most: PostgREST's pool has 10 connections, and others use it too.
const IN_FLIGHT: usize = 8;
/// What each MiB adds to the deadline of a call, and how many bytes can add to it: those of one request or answer.
const MIB: Duration = Duration::from_secs(1);
const MOST_BYTES: usize = 16 << 20;
/// The pause before the one retry is drawn from up to this. The queue of callers is the real retry.
const PAUSE: Duration = Duration::from_millis(100);
/// The first contact is tried so often if the key is refused or the migrations seem to be missing: a gateway and PostgREST
/// may disagree for a moment about the time, or about a schema that was just changed.
const CONTACTS: usize = 4;
const FIRST_CONTACT_PAUSE: Duration = Duration::from_millis(500);
const LAST_CONTACT_PAUSE: Duration = Duration::from_secs(2);
/// How long until the clock of the breaker has moved for sure.
const TICK: Duration = Duration::from_millis(1);
/// Probes wait up to this at first, and up to the second in a long outage.
const FIRST_PROBE: Duration = Duration::from_millis(500);
const LAST_PROBE: Duration = Duration::from_secs(30);

/// Gives each call of a store a deadline, one retry, a limit on calls in flight, and a circuit breaker.
///
/// While the breaker is open no call passes; one background task probes the store, with full jitter growing to 30 s,
/// whether or not there is traffic, and its success closes the breaker. Dropping the guard ends the task.
#[derive(Debug)]
pub struct Guard<S> {
    shared: Arc<Shared<S>>,
    prober: AbortHandle,
}

#[derive(Debug)]
struct Shared<S> {
    store: S,
    breaker: Breaker,
    slots: Semaphore,
    /// One probe at a time, whoever asks.
    probing: Mutex<()>,
    deadline: Duration,
    metrics: Metrics,
}

impl<S> Drop for Guard<S> {
    fn drop(&mut self) {
        self.prober.abort();
    }
}

impl<S: Store> Guard<S> {
    /// Guards a store; `deadline` is for a small call. Each MiB that is written adds a second, up to 16; what is read may
    /// be large, and gets these 16 always. So a store that can be slow to begin should notice that itself, as
    /// [`Supabase`](crate::Supabase) does.
    /// The probe runs on a runtime of this process's own, whatever becomes of the caller's.
    pub fn new(store: S, deadline: Duration) -> Self {
        let (breaker, slots) = (Breaker::new(), Semaphore::new(IN_FLIGHT));
        let shared = Arc::new(Shared {
            store,
            breaker,
            slots,
            probing: Mutex::default(),
            deadline,
            metrics: Metrics::new(),
        });
        let prober = background::spawn_for_good(probe_while_open(Arc::clone(&shared))).abort_handle();
        Self { shared, prober }
    }

    /// Makes the first contact, so that the store's clock is known before anything is written. In an outage the breaker
    /// opens, and that first contact is the background task's. A refused key and missing migrations are asked about again
    /// for some seconds. A store that answers reads and refuses writes is no error: writes are queued.
    ///
    /// # Errors
    /// [`Denied`](ErrorKind::Denied) and [`Schema`](ErrorKind::Schema): a wrong key, missing migrations.
    pub async fn connect(&self) -> Result<()> {
        self.first_contact().await.map(drop)
    }

    /// As [`connect`](Self::connect); returns why the store takes no writes, if it answers and takes none.
    pub(crate) async fn first_contact(&self) -> Result<Option<Error>> {
        let mut pauses = Backoff::new(FIRST_CONTACT_PAUSE, LAST_CONTACT_PAUSE);
        for left in (0..CONTACTS).rev() {
            match self.shared.ask().await {
                Ok(()) => break,
                Err(e) if e.counts_as_outage() => {
                    self.shared.breaker.trip(&e);
                    break;
                }
                Err(e) if e.is_outage() => return Ok(Some(e)),
                Err(e) if left == 0 => {
                    return self.reads().await.map(|()| Some(e.clone().of_all_writes())).map_err(|_| e);
                }
                Err(error) => {
                    let pause = pauses.next().unwrap_or(LAST_CONTACT_PAUSE);
                    tracing::debug!(%error, ?pause, "the first contact was refused");
                    tokio::time::sleep(pause).await;
                }
            }
        }
        Ok(None)
    }

    /// Whether the store answers reads.
    async fn reads(&self) -> Result<()> {
        let nobody = Want::from(Key::new("threadkeep probe")?);
        let load = self.shared.store.load(std::slice::from_ref(&nobody));
        self.shared.timed(Operation::Load, self.shared.deadline, load).await.map(drop)
    }

    async fn call<T, F: Future<Output = Result<T>>>(
        &self,
        operation: Operation,
        bytes: usize,
        call: impl Fn(bool) -> F,
    ) -> Result<T> {
        let deadline = self.shared.deadline_for(bytes);
        let lost = match self.shared.attempt(operation, deadline, || call(false)).await {
            Err(e) if e.counts_as_outage() && e.retry_after().is_none() => e,
            other => return other,
        };
        tokio::time::sleep(Backoff::new(PAUSE, PAUSE).next().unwrap_or(PAUSE)).await;
        match self.shared.attempt(operation, deadline, || call(lost.outcome_unknown())).await {
            // What the second attempt says of itself does not tell what became of the first.
            Err(e) if lost.outcome_unknown() => Err(e.with_outcome_unknown()),
            other => other,
        }
    }

    async fn read<T, F: Future<Output = Result<T>>>(
        &self,
        operation: Operation,
        call: impl Fn() -> F,
    ) -> Result<T> {
        // How large an answer will be is not known before.
        let bytes = if matches!(operation, Operation::Load | Operation::Recent) { MOST_BYTES } else { 0 };
        self.call(operation, bytes, |_| call()).await.map_err(Error::of_read)
    }
}

impl<S: Store> Shared<S> {
    /// What a call that moves so many bytes gets.
    fn deadline_for(&self, bytes: usize) -> Duration {
        self.deadline.saturating_add(MIB.mul_f64(bytes.min(MOST_BYTES) as f64 / f64::from(1 << 20)))
    }

    async fn attempt<T, F: Future<Output = Result<T>>>(
        &self,
        operation: Operation,
        deadline: Duration,
        call: impl FnOnce() -> F,
    ) -> Result<T> {
        let _slot = self.slot().await?;
        let permit = self.breaker.admit()?;
        let result = self.timed(operation, deadline, call()).await;
        self.breaker.settle(&permit, &result);
        result
    }

    /// A place among the calls in flight. A store that is slow, but not so slow that it opens the breaker, must not
    /// make callers queue for ever.
    async fn slot(&self) -> Result<SemaphorePermit<'_>> {
        let patience = self.deadline;
        tokio::select! {
            // A place that is free is taken, however late this task comes to look.
            biased;
            slot = self.slots.acquire() => slot.map_err(|_| Error::new(ErrorKind::Closed, "the guard is closed")),
            () = tokio::time::sleep(patience) => {
                let message = format!("{IN_FLIGHT} calls have been in flight for {patience:.1?}; try again later");
                Err(Error::new(ErrorKind::Busy, message).with_retry_after(patience))
            }
        }
    }

    /// The deadline sits inside the breaker: a call that is dropped from outside would count as nothing.
    #[allow(clippy::disallowed_methods, reason = "the one place where calls get their deadline")]
    async fn timed<T>(
        &self,
        operation: Operation,
        deadline: Duration,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        // A jump of this machine's clocks is noticed before the call, not by its answer, which would say nothing then.
        self.store.clock().moment();
        let start = Instant::now();
        let span = tracing::debug_span!("origin", operation = operation.as_str());
        let result = tokio::time::timeout(deadline, call.instrument(span)).await.unwrap_or_else(|_| {
            let message = format!("the source of truth did not answer within {deadline:.1?}");
            Err(Error::new(ErrorKind::Unavailable, message).with_outcome_unknown())
        });
        self.metrics.called(operation, start.elapsed(), result.as_ref().err());
        result
    }

    /// Probes the store. A probe writes no record that could be at fault: its refusal is one of all writes.
    async fn ask(&self) -> Result<()> {
        self.timed(Operation::Probe, self.deadline, probe_writes(&self.store)).await
    }

    async fn probe(self: &Arc<Self>) {
        let _one = self.probing.lock().await;
        let Some(permit) = self.breaker.begin_probe() else {
            return tokio::time::sleep(TICK).await;
        };
        let shared = Arc::clone(self);
        // In a task of its own: a store that panics must not end the probing.
        let probe = async move { shared.ask().await };
        let panicked = |e| Err(Error::new(ErrorKind::Unavailable, "the probe panicked").with_source(e));
        let result = tokio::spawn(probe).await.unwrap_or_else(panicked);
        self.breaker.end_probe(&permit, &result);
    }
}

async fn probe_writes<S: Store>(store: &S) -> Result<()> {
    store.probe().await.map_err(|error| match error.kind() {
        ErrorKind::Refused | ErrorKind::Invalid => error.of_all_writes(),
        ErrorKind::Busy | ErrorKind::Unavailable if error.may_be_of_one() => error.of_all_writes(),
        _ => error,
    })
}

async fn probe_while_open<S: Store>(shared: Arc<Shared<S>>) {
    loop {
        shared.breaker.opened().await;
        let mut waits = Backoff::new(FIRST_PROBE, LAST_PROBE);
        while shared.breaker.state() != State::Closed {
            let wait = waits.next().max(shared.breaker.rest()).unwrap_or(LAST_PROBE);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = shared.breaker.wanted() => {}
            }
            shared.probe().await;
        }
    }
}

#[async_trait]
impl<S: Store> Store for Guard<S> {
    fn clock(&self) -> &Arc<Clock> {
        self.shared.store.clock()
    }

    fn breaker(&self) -> Option<&Breaker> {
        Some(&self.shared.breaker)
    }

    fn fault(&self) -> Option<Error> {
        self.shared.store.fault()
    }

    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        self.read(Operation::Load, || self.shared.store.load(wants)).await
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let bytes = writes.iter().map(|write| write.record.bytes()).sum();
        let call = async |again: bool| {
            if !again {
                return self.shared.store.apply(writes).await;
            }
            let writes: Vec<Write> = writes.iter().map(|write| Write { again, ..write.clone() }).collect();
            self.shared.store.apply(&writes).await
        };
        self.call(Operation::Apply, bytes, call).await
    }

    async fn apply_on_trial(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let bytes = writes.iter().map(|write| write.record.bytes()).sum();
        let _slot = self.shared.slot().await?;
        self.shared.breaker.check()?;
        self.shared
            .timed(
                Operation::Apply,
                self.shared.deadline_for(bytes),
                self.shared.store.apply_on_trial(writes),
            )
            .await
    }

    async fn recent(&self, page: &Page) -> Result<Recent> {
        self.read(Operation::Recent, || self.shared.store.recent(page)).await
    }

    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.read(Operation::Touch, || self.shared.store.touch(keys)).await
    }

    async fn purge(&self, most: usize) -> Result<usize> {
        self.read(Operation::Purge, || self.shared.store.purge(most)).await
    }

    async fn probe(&self) -> Result<()> {
        let _one = self.shared.probing.lock().await;
        self.read(Operation::Probe, || probe_writes(&self.shared.store)).await
    }
}
