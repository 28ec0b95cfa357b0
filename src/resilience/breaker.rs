//! The circuit breaker, built on failsafe's state machine.
//!
//! failsafe 1.3 has the three states and the transitions between them. Its half-open state admits every caller, its results
//! carry no identity, nobody can read its state, and its success-rate policy misses bursts. So this file adds:
//!
//! - a sliding window of results, and a rule for a store that hangs ([`Breaker::watch_silence`])
//! - one probe task, which alone closes the breaker (I11)
//! - the list of calls in progress, so that a result from before a transition does not count (I18)
//!
//! The `watch` holds all state that changes. Its lock is the only one here, and each transition wakes the waiting tasks.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::time::Duration;

use failsafe::{FailurePolicy, Instrument, StateMachine};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::observe::metrics::{Metrics, STATES};
use crate::resilience::backoff::Backoff;

/// The breaker opens after this many failures in a row, or when this many calls hang …
const MAX_FAILURES: usize = 5;
/// … or when half of the last results, at least `WINDOW / 2` of them, are failures.
const WINDOW: u32 = 40;
/// A store that answers no call for this long may hang.
const MAX_SILENCE: Duration = Duration::from_millis(1_500);
/// The bounds of the pause that the store asks for by `Retry-After`.
const MIN_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Limit the wait between two probes. It grows from the first value to the second during a long outage.
const MIN_PROBE_INTERVAL: Duration = Duration::from_millis(500);
const MAX_PROBE_INTERVAL: Duration = Duration::from_secs(30);

/// The state of the breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls pass.
    Closed = 0,
    /// No call passes.
    Open = 1,
    /// No caller's call passes; the probe is under way.
    HalfOpen = 2,
}

impl BreakerState {
    /// Returns the name of this state, as in the metric labels.
    ///
    /// ```
    /// assert_eq!(threadkeep::BreakerState::HalfOpen.as_str(), "half_open");
    /// ```
    pub fn as_str(self) -> &'static str {
        STATES[self as usize]
    }
}

/// Stands between callers and the store. It stops the calls to a store that fails or hangs.
///
/// ```
/// # fn example(breaker: &threadkeep::store::Breaker) {
/// assert_eq!(breaker.state(), threadkeep::BreakerState::Closed);
/// assert!(breaker.check().is_ok() && breaker.cause().is_none());
/// # }
/// ```
pub struct Breaker {
    shared: watch::Sender<BreakerCore>,
    /// The state as failsafe announces it. A read takes no lock, because each read of the cache in an outage asks.
    state: Arc<AtomicU8>,
    /// Wakes the probe task before its pause ends.
    probe_requested: Notify,
    metrics: Metrics,
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Breaker").field(&self.state()).finish()
    }
}

/// The right to make one call. Its drop is the end of the call.
#[derive(Debug)]
pub(crate) struct Permit<'a> {
    breaker: &'a Breaker,
    id: u64,
    slow_at: Instant,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.breaker.change(|shared| _ = shared.calls.remove(&self.id));
    }
}

impl Breaker {
    /// Creates a closed breaker. A call counts as slow after `soft_timeout`.
    pub(crate) fn new(soft_timeout: Duration) -> Self {
        let (state, metrics) = (Arc::<AtomicU8>::default(), Metrics::new());
        metrics.breaker(BreakerState::Closed as u8);
        let machine = StateMachine::new(SlidingWindow::default(), Announced(Arc::clone(&state)));
        let calls = BTreeMap::new();
        let shared = BreakerCore { machine, soft_timeout, outage: None, calls, last_id: 0, heard_at: None };
        Self { shared: watch::Sender::new(shared), state, probe_requested: Notify::new(), metrics }
    }

    pub(crate) fn set_soft_timeout(&self, soft_timeout: Duration) {
        self.change(|shared| shared.soft_timeout = soft_timeout);
    }

    /// Returns the present state. See [`Breaker`] for an example.
    pub fn state(&self) -> BreakerState {
        match self.state.load(SeqCst) {
            0 => BreakerState::Closed,
            1 => BreakerState::Open,
            _ => BreakerState::HalfOpen,
        }
    }

    /// Checks if a call would pass now.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] while the breaker is open or half open. The error names the cause of the opening and
    /// carries the pause that the store asked for by `Retry-After`. See [`Breaker`] for an example.
    pub fn check(&self) -> Result<()> {
        if self.state() == BreakerState::Closed {
            return Ok(());
        }
        self.shared.borrow().outage.as_ref().map_or(Ok(()), |outage| Err(outage.rejection.clone()))
    }

    /// Returns the cause of the present outage. The closed breaker has none. See [`Breaker`] for an example.
    pub fn cause(&self) -> Option<Error> {
        self.shared.borrow().outage.as_ref().map(|outage| outage.cause.clone())
    }

    /// Asks for the right to make a call. The call counts as slow after the soft timeout and `allowance`.
    pub(crate) fn try_acquire(&self, allowance: Duration) -> Result<Permit<'_>> {
        let now = Instant::now();
        // No call has the id 0.
        let (mut allowed, mut permit) = (Ok(()), Permit { breaker: self, id: 0, slow_at: now });
        self.change(|shared| {
            if let Some(outage) = &shared.outage {
                allowed = Err(outage.rejection.clone());
                return;
            }
            // An idle store is not silent.
            shared.heard_at = shared.heard_at.map(|at| if shared.calls.is_empty() { now } else { at });
            shared.last_id += 1;
            (permit.id, permit.slow_at) = (shared.last_id, now + shared.soft_timeout + allowance);
            shared.calls.insert(permit.id, permit.slow_at);
        });
        allowed.map(|()| permit)
    }

    /// Records the result of a call. A call that began before a transition does not count (I18).
    pub(crate) fn record<T>(&self, permit: &Permit<'_>, result: &Result<T>) {
        self.change(|shared| match result {
            _ if !shared.calls.contains_key(&permit.id) => {}
            Err(e) if e.counts_as_outage() => shared.fail(1, e),
            // A gateway may have sent this answer, so the answer proves nothing about the store.
            Err(e) if e.is_outage() || e.kind() == ErrorKind::Unauthorized => {}
            _ => {
                shared.machine.on_success();
                shared.heard_at = Some(Instant::now()).filter(|now| *now <= permit.slow_at);
            }
        });
    }

    /// Runs beside a call, and never returns. It opens the breaker if the store seems to hang: no call succeeded for
    /// [`MAX_SILENCE`], and [`MAX_FAILURES`] calls are slow.
    ///
    /// Only a store that was prompt before can be silent. A slow success, or a probe that passes while calls hang, shows
    /// that the store works. So this rule does not open the breaker again before a call succeeds in time.
    pub(crate) async fn watch_silence(&self, permit: &Permit<'_>) -> Infallible {
        let mut next = permit.slow_at;
        loop {
            tokio::time::sleep_until(next).await;
            let now = Instant::now();
            next = now + MAX_SILENCE;
            self.change(|shared| match shared.heard_at.map(|at| at + MAX_SILENCE) {
                Some(silent_at) if now < silent_at => next = silent_at,
                Some(_) if shared.calls.values().filter(|at| **at <= now).count() >= MAX_FAILURES => {
                    let reason = format!("no call succeeded for {MAX_SILENCE:.1?}, and {MAX_FAILURES} wait");
                    shared.fail(MAX_FAILURES, &Error::new(ErrorKind::Unavailable, reason));
                }
                _ => {}
            });
        }
    }

    /// Opens the breaker at once. Callers use it when the first contact with the store fails.
    pub(crate) fn trip(&self, error: &Error) {
        self.change(|shared| shared.fail(MAX_FAILURES, error));
    }

    pub(crate) async fn wait_closed(&self) {
        self.shared.subscribe().wait_for(|_| self.state() == BreakerState::Closed).await.ok();
    }

    pub(crate) async fn wait_open(&self) {
        self.shared.subscribe().wait_for(|_| self.state() != BreakerState::Closed).await.ok();
    }

    /// Requests a probe now and returns true if the store is back. A pause by `Retry-After` prevents the probe.
    pub(crate) async fn probe_now(&self) -> bool {
        let mut transitions = self.shared.subscribe();
        match self.state() {
            BreakerState::Closed => return true,
            BreakerState::Open if self.requested_pause().is_some() => return false,
            _ => self.probe_requested.notify_one(),
        }
        while self.state() != BreakerState::Closed {
            transitions.changed().await.ok();
            if self.state() == BreakerState::Open {
                return false;
            }
        }
        true
    }

    /// Probes the store while it does not answer, without end. The probe task of a store runs this.
    pub(crate) async fn keep_probing<F: Future<Output = Result<()>>>(&self, probe: impl Fn() -> F) {
        loop {
            self.wait_open().await;
            let mut pauses = Backoff::new(MIN_PROBE_INTERVAL, MAX_PROBE_INTERVAL);
            while self.state() != BreakerState::Closed {
                // A longer pause by `Retry-After` wins. `None` is less than each pause.
                let pause = pauses.next().max(self.requested_pause()).unwrap_or(MAX_PROBE_INTERVAL);
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.probe_requested.notified() => {}
                }
                self.probe_once(probe()).await;
            }
        }
    }

    /// Turns the open breaker half open for one probe (I11). Any timely answer closes it, also a denial.
    async fn probe_once(&self, probe: impl Future<Output = Result<()>>) {
        self.change(|shared| _ = shared.machine.is_call_permitted());
        // failsafe refuses if its clock stands still since the opening. The next probe comes after the next pause.
        if self.state() == BreakerState::HalfOpen {
            let result = probe.await;
            self.change(|shared| match result {
                Err(e) if e.counts_as_outage() => shared.fail(1, &e),
                _ => shared.machine.on_success(),
            });
        }
    }

    /// Returns the pause that the store asked for with its last failure.
    fn requested_pause(&self) -> Option<Duration> {
        self.cause()?.retry_after().map(|asked| asked.clamp(MIN_PAUSE, MAX_PAUSE))
    }

    /// Changes the shared state, and announces the transition that this made.
    fn change(&self, change: impl FnOnce(&mut BreakerCore)) {
        let mut left = None;
        self.shared.send_if_modified(|shared| {
            let before = self.state();
            change(shared);
            let after = self.state();
            // A few failures make no outage.
            shared.outage = shared.outage.take().filter(|_| after != BreakerState::Closed);
            if before != after {
                // Only calls that begin from now on count (I18).
                shared.calls.clear();
                shared.heard_at = None;
                self.metrics.transition(after as u8);
                left = Some((before, shared.outage.as_ref().map(|outage| outage.cause.clone())));
            }
            before != after
        });
        // The log is written without the lock, because a subscriber may ask for the health of the cache.
        match left {
            Some((_, None)) => tracing::info!("circuit breaker closed: the store is back"),
            Some((BreakerState::Closed, Some(cause))) => {
                tracing::warn!(%cause, "circuit breaker opened: the store is unavailable");
            }
            _ => {}
        }
    }
}

/// All state of the breaker that changes, under the lock of the `watch`.
struct BreakerCore {
    machine: StateMachine<SlidingWindow, Announced>,
    soft_timeout: Duration,
    /// The outage, unless the breaker is closed.
    outage: Option<Outage>,
    /// The calls since the last transition that are in progress. For each, the time from which it counts as slow.
    calls: BTreeMap<u64, Instant>,
    last_id: u64,
    /// The last success, or the first call after an idle time. `None` after a slow success, or before the first success.
    heard_at: Option<Instant>,
}

impl BreakerCore {
    /// Records failures. [`MAX_FAILURES`] in a row open the breaker.
    fn fail(&mut self, count: usize, cause: &Error) {
        for _ in 0..count {
            self.machine.on_error();
        }
        self.outage = Some(Outage::new(cause));
    }
}

/// An outage as its last failure shows it.
struct Outage {
    cause: Error,
    /// The error for callers. It is built once, because each read and write of an outage returns it.
    rejection: Error,
}

impl Outage {
    fn new(cause: &Error) -> Self {
        let pause = cause.retry_after().unwrap_or(MIN_PAUSE).clamp(MIN_PAUSE, MAX_PAUSE);
        let message = format!("the store is unavailable (circuit breaker open): {cause}");
        let rejection = Error::new(ErrorKind::Unavailable, message).with_retry_after(pause);
        Self { cause: cause.clone(), rejection: rejection.with_source(cause.clone()) }
    }
}

/// Keeps the state that failsafe announces. The orphan rule forbids the trait on a bare `Arc`.
struct Announced(Arc<AtomicU8>);

impl Instrument for Announced {
    fn on_call_rejected(&self) {}

    fn on_open(&self) {
        self.0.store(BreakerState::Open as u8, SeqCst);
    }

    fn on_half_open(&self) {
        self.0.store(BreakerState::HalfOpen as u8, SeqCst);
    }

    fn on_closed(&self) {
        self.0.store(BreakerState::Closed as u8, SeqCst);
    }
}

/// The last results, one bit each: 1 is a failure, and the lowest bit is the newest result.
#[derive(Debug, Default)]
struct SlidingWindow {
    results: u64,
    length: u32,
}

impl SlidingWindow {
    fn push(&mut self, failure: u64) {
        self.results = (self.results << 1 | failure) & ((1 << WINDOW) - 1);
        self.length = WINDOW.min(self.length + 1);
    }
}

impl FailurePolicy for SlidingWindow {
    fn record_success(&mut self) {
        self.push(0);
    }

    fn mark_dead_on_failure(&mut self) -> Option<Duration> {
        self.push(1);
        let is_row = self.results.trailing_ones() as usize >= MAX_FAILURES;
        let is_half = self.length >= WINDOW / 2 && self.results.count_ones() * 2 >= self.length;
        // The probe task keeps the pause: failsafe's own backoffs panic below one second.
        (is_row || is_half).then_some(Duration::ZERO)
    }

    fn revived(&mut self) {
        // Failures from before the outage must not open the breaker again.
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests;
