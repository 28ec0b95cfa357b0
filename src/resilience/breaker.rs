//! The circuit breaker, built on failsafe's state machine.
//!
//! failsafe 1.3 decides when to open and close. This module adds a readable state and ignores results from before a
//! transition. Its half-open state admits only the probe, never a caller.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use failsafe::{FailurePolicy, Instrument, StateMachine};
use tokio::sync::Notify;

use crate::error::{Error, ErrorKind, Result};
use crate::observe::metrics::Metrics;

/// The breaker opens after this many failures in a row …
const MAX_CONSECUTIVE_FAILURES: usize = 5;
/// … or when half of the last results, at least `WINDOW / 2` of them, are failures.
const WINDOW: usize = 40;
/// The bounds of the pause that the store asks for by `Retry-After`.
const MIN_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(60);

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
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// The right to make one call. The result of the call is ignored after a transition of the breaker.
#[derive(Debug)]
pub(crate) struct Permit {
    epoch: u64,
}

/// Stands between callers and the store. failsafe decides when it opens and closes. It ignores results from
/// before a transition.
pub struct Breaker {
    machine: StateMachine<SlidingWindow, StateObserver>,
    shared: Arc<SharedState>,
    /// Wakes the probing task before its pause ends.
    probe_requested: Notify,
    /// The lock also orders results: the breaker records one at a time.
    reason: Mutex<OpenReason>,
}

/// The cause of the last opening, and the error for callers. The breaker builds the error once, because each read and
/// write of an outage returns it.
struct OpenReason {
    cause: Option<Error>,
    rejection: Error,
}

impl OpenReason {
    fn new(cause: Option<Error>) -> Self {
        let refused = |reason: &str| {
            let message = format!("the store is unavailable (circuit breaker open){reason}");
            Error::new(ErrorKind::Unavailable, message)
        };
        let rejection = match &cause {
            None => refused("").with_retry_after(MIN_PAUSE),
            Some(cause) => refused(&format!(": {cause}"))
                .with_retry_after(requested_pause(Some(cause)).unwrap_or(MIN_PAUSE))
                .with_source(cause.clone()),
        };
        Self { cause, rejection }
    }
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Breaker").field(&self.state()).finish()
    }
}

impl Breaker {
    pub(crate) fn new() -> Self {
        let shared = Arc::new(SharedState::new());
        Self {
            machine: StateMachine::new(SlidingWindow::default(), StateObserver(Arc::clone(&shared))),
            shared,
            probe_requested: Notify::new(),
            reason: Mutex::new(OpenReason::new(None)),
        }
    }

    /// Returns the present state.
    ///
    /// ```
    /// use threadkeep::BreakerState;
    /// use threadkeep::store::{Memory, ResilientStore, Store};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let store = ResilientStore::new(Memory::new(), std::time::Duration::from_secs(5));
    /// let breaker = store.breaker().expect("a resilient store has a breaker");
    /// assert_eq!(breaker.state(), BreakerState::Closed);
    /// # }
    /// ```
    pub fn state(&self) -> BreakerState {
        self.shared.state()
    }

    /// Checks if a call would pass now.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] while the breaker is open or half open. The error names the cause of the opening and
    /// carries the pause that the store asked for by `Retry-After`.
    ///
    /// ```
    /// use threadkeep::store::{Memory, ResilientStore, Store};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let store = ResilientStore::new(Memory::new(), std::time::Duration::from_secs(5));
    /// let breaker = store.breaker().expect("a resilient store has a breaker");
    /// assert!(breaker.check().is_ok());
    /// # }
    /// ```
    pub fn check(&self) -> Result<()> {
        // The closed breaker takes no lock.
        if self.state() == BreakerState::Closed { Ok(()) } else { Err(self.lock().rejection.clone()) }
    }

    /// Asks for the right to make a call.
    pub(crate) fn try_acquire(&self) -> Result<Permit> {
        // The epoch is read before the state. A transition in between makes the permit stale (I18).
        let epoch = self.shared.epoch.load(SeqCst);
        self.check().map(|()| Permit { epoch })
    }

    /// Records the result of a call.
    pub(crate) fn record<T>(&self, permit: &Permit, result: &Result<T>) {
        // Each transition holds this lock, so none comes between the check and the record (I18).
        let mut reason = self.lock();
        if permit.epoch != self.shared.epoch.load(SeqCst) {
            return;
        }
        match result {
            Err(e) if e.counts_as_outage() => self.fail(&mut reason, e),
            // A gateway may have sent this answer, so the answer proves nothing about the store.
            Err(e) if e.is_outage() || e.kind() == ErrorKind::Unauthorized => {}
            _ => self.succeed(),
        }
    }

    /// Opens the breaker at once. Callers use it when the first contact with the store fails.
    pub(crate) fn trip(&self, error: &Error) {
        let mut reason = self.lock();
        // A row of failures opens it, so the loop ends (I12).
        while self.state() == BreakerState::Closed {
            self.fail(&mut reason, error);
        }
    }

    /// Waits until it is closed.
    pub(crate) async fn wait_closed(&self) {
        loop {
            // The future exists before the state is read, so it sees each later transition.
            let changed = self.shared.changed.notified();
            if self.state() == BreakerState::Closed {
                return;
            }
            changed.await;
        }
    }

    /// Waits until it is open.
    pub(crate) async fn wait_open(&self) {
        loop {
            let changed = self.shared.changed.notified();
            if self.state() == BreakerState::Open {
                return;
            }
            changed.await;
        }
    }

    /// Requests a probe now and returns true if the store is back. A pause by `Retry-After` prevents the probe.
    pub(crate) async fn probe_now(&self) -> bool {
        let before = self.shared.epoch.load(SeqCst);
        match self.state() {
            BreakerState::Closed => return true,
            BreakerState::Open if self.requested_pause().is_some() => return false,
            _ => {}
        }
        self.probe_requested.notify_one();
        loop {
            let changed = self.shared.changed.notified();
            match self.state() {
                BreakerState::Closed => return true,
                BreakerState::Open if self.shared.epoch.load(SeqCst) > before => return false,
                _ => changed.await,
            }
        }
    }

    /// Waits until a caller requests a probe.
    pub(crate) async fn probe_requested(&self) {
        self.probe_requested.notified().await;
    }

    /// Returns the cause of the last opening.
    ///
    /// ```
    /// use threadkeep::store::{Memory, ResilientStore, Store};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let store = ResilientStore::new(Memory::new(), std::time::Duration::from_secs(5));
    /// let breaker = store.breaker().expect("a resilient store has a breaker");
    /// assert!(breaker.cause().is_none());
    /// # }
    /// ```
    pub fn cause(&self) -> Option<Error> {
        self.lock().cause.clone()
    }

    /// Returns the pause that the store asked for with its last failure.
    pub(crate) fn requested_pause(&self) -> Option<Duration> {
        requested_pause(self.lock().cause.as_ref())
    }

    /// Begins a probe; the state is half open until the probe ends. Returns `None` if the breaker opened at this moment.
    /// The probing task keeps the pause between probes. failsafe's own pause is zero, but ends only when its clock moves.
    pub(crate) fn begin_probe(&self) -> Option<Permit> {
        let _one_at_a_time = self.lock();
        // This call turns failsafe half open. Only a probe makes it, so no caller passes (I11).
        if self.machine.is_call_permitted() {
            return Some(Permit { epoch: self.shared.epoch.load(SeqCst) });
        }
        // The next probe must not wait for its turn.
        self.probe_requested.notify_one();
        None
    }

    /// Ends a probe. Any timely answer closes the breaker, also a denial; an outage opens it again.
    pub(crate) fn end_probe(&self, permit: &Permit, result: &Result<()>) {
        match result {
            Err(e) if !e.counts_as_outage() => self.record(permit, &Ok(())),
            _ => self.record(permit, result),
        }
    }

    fn fail(&self, reason: &mut OpenReason, error: &Error) {
        let before = self.state();
        // A caller that sees the open state waits for the lock, so it gets the new reason.
        *reason = OpenReason::new(Some(error.clone()));
        self.machine.on_error();
        if before == BreakerState::Closed && self.state() == BreakerState::Open {
            tracing::warn!(cause = %error, "circuit breaker opened: the store is unavailable");
        }
    }

    fn succeed(&self) {
        let before = self.state();
        self.machine.on_success();
        if before != BreakerState::Closed && self.state() == BreakerState::Closed {
            tracing::info!("circuit breaker closed: the store is back");
        }
    }

    fn lock(&self) -> MutexGuard<'_, OpenReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn requested_pause(cause: Option<&Error>) -> Option<Duration> {
    cause.and_then(Error::retry_after).map(|asked| asked.clamp(MIN_PAUSE, MAX_PAUSE))
}

/// The readable state of the breaker, as failsafe announces it.
struct SharedState {
    state: AtomicU8,
    /// Counts the transitions.
    epoch: AtomicU64,
    changed: Notify,
    metrics: Metrics,
}

impl SharedState {
    fn new() -> Self {
        let shared = Self {
            state: AtomicU8::new(0),
            epoch: AtomicU64::new(0),
            changed: Notify::new(),
            metrics: Metrics::new(),
        };
        shared.metrics.breaker(BreakerState::Closed as u8);
        shared
    }

    fn state(&self) -> BreakerState {
        match self.state.load(SeqCst) {
            0 => BreakerState::Closed,
            1 => BreakerState::Open,
            _ => BreakerState::HalfOpen,
        }
    }

    fn set(&self, to: BreakerState) {
        // failsafe also announces its initial state, which is no transition.
        if self.state() == to {
            return;
        }
        self.state.store(to as u8, SeqCst);
        self.epoch.fetch_add(1, SeqCst);
        self.metrics.transition(to as u8);
        self.changed.notify_waiters();
    }
}

/// Wraps the `Arc`, because the orphan rule forbids the trait on a foreign type.
struct StateObserver(Arc<SharedState>);

impl Instrument for StateObserver {
    fn on_call_rejected(&self) {}

    fn on_open(&self) {
        self.0.set(BreakerState::Open);
    }

    fn on_half_open(&self) {
        self.0.set(BreakerState::HalfOpen);
    }

    fn on_closed(&self) {
        self.0.set(BreakerState::Closed);
    }
}

/// Decides when to open by a sliding window of results. failsafe's own success-rate policy cannot trip in its first
/// window and misses bursts.
#[derive(Debug, Default)]
struct SlidingWindow {
    failures: VecDeque<bool>,
    consecutive_failures: usize,
}

impl SlidingWindow {
    fn push(&mut self, failed: bool) {
        self.consecutive_failures = if failed { self.consecutive_failures + 1 } else { 0 };
        self.failures.push_back(failed);
        if self.failures.len() > WINDOW {
            self.failures.pop_front();
        }
    }

    fn is_bad(&self) -> bool {
        let failed = self.failures.iter().filter(|failed| **failed).count();
        let half_failed = self.failures.len() >= WINDOW / 2 && failed * 2 >= self.failures.len();
        self.consecutive_failures >= MAX_CONSECUTIVE_FAILURES || half_failed
    }
}

impl FailurePolicy for SlidingWindow {
    fn record_success(&mut self) {
        self.push(false);
    }

    fn mark_dead_on_failure(&mut self) -> Option<Duration> {
        self.push(true);
        // The probing task keeps the pause: failsafe's own backoffs panic below one second.
        self.is_bad().then_some(Duration::ZERO)
    }

    fn revived(&mut self) {
        // Failures from before the outage must not open the breaker again.
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests;
