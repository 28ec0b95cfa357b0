//! The circuit breaker: failsafe's state machine, with what it lacks.
//!
//! failsafe 1.3 decides when to open and close. Added here: a state that can be read, results that know which state
//! they were started in (one from before a transition is ignored), and a half-open state that admits only the probe,
//! never a caller.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use failsafe::{FailurePolicy, Instrument, StateMachine};
use tokio::sync::Notify;

use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;

/// Opens after this many failures on end …
const CONSECUTIVE: usize = 5;
/// … or when half of the last results, at least `WINDOW / 2` of them, are failures.
const WINDOW: usize = 40;
/// What the source of truth may ask for by `Retry-After`.
const SHORTEST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(60);

/// The state of the breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Calls pass.
    Closed = 0,
    /// No call passes.
    Open = 1,
    /// No caller's call passes; the probe is under way.
    HalfOpen = 2,
}

impl State {
    /// Its name, as in the metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// The right to make one call. Its result counts only while the state is the one it was given in.
#[derive(Debug)]
pub(crate) struct Permit {
    epoch: u64,
}

/// Stands between callers and the source of truth: failsafe decides when it opens and closes; its state can be read, and
/// results from before a transition are ignored.
pub struct Breaker {
    machine: StateMachine<Recent, Wire>,
    lamp: Arc<Lamp>,
    /// Somebody wants a probe now.
    wanted: Notify,
    /// Its lock also makes results be settled one at a time.
    why: Mutex<Why>,
}

/// Why it opened, and what callers are told meanwhile: made once, since in an outage each read and write hears it.
struct Why {
    cause: Option<Error>,
    refusal: Error,
}

impl Why {
    fn new(cause: Option<Error>) -> Self {
        let refused = |why: &str| {
            let message = format!("the source of truth is unavailable (circuit breaker open){why}");
            Error::new(ErrorKind::Unavailable, message)
        };
        let refusal = match &cause {
            None => refused("").with_retry_after(SHORTEST_REST),
            Some(cause) => refused(&format!(": {cause}"))
                .with_retry_after(rest(Some(cause)).unwrap_or(SHORTEST_REST))
                .with_source(cause.clone()),
        };
        Self { cause, refusal }
    }
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Breaker").field(&self.state()).finish()
    }
}

impl Breaker {
    pub(crate) fn new() -> Self {
        let lamp = Arc::new(Lamp::new());
        Self {
            machine: StateMachine::new(Recent::default(), Wire(Arc::clone(&lamp))),
            lamp,
            wanted: Notify::new(),
            why: Mutex::new(Why::new(None)),
        }
    }

    /// The present state.
    pub fn state(&self) -> State {
        self.lamp.state()
    }

    /// Whether a call would pass now.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] while it is open or half open: says why it opened, and carries what the source of
    /// truth asked for by `Retry-After`.
    pub fn check(&self) -> Result<()> {
        if self.state() == State::Closed { Ok(()) } else { Err(self.lock().refusal.clone()) }
    }

    /// Asks for the right to make a call.
    pub(crate) fn admit(&self) -> Result<Permit> {
        let epoch = self.lamp.epoch.load(SeqCst);
        self.check().map(|()| Permit { epoch })
    }

    /// Takes note of how a call went.
    pub(crate) fn settle<T>(&self, permit: &Permit, result: &Result<T>) {
        let mut why = self.lock();
        if permit.epoch != self.lamp.epoch.load(SeqCst) {
            return;
        }
        match result {
            Err(e) if e.counts_as_outage() => self.fail(&mut why, e),
            // An answer, but perhaps of a gateway that refuses the key or the body: it says nothing about what is behind.
            Err(e) if e.is_outage() || e.kind() == ErrorKind::Denied => {}
            _ => self.succeed(),
        }
    }

    /// Opens at once: the very first contact failed, so that nothing is known about the other side.
    pub(crate) fn trip(&self, error: &Error) {
        let mut why = self.lock();
        while self.state() == State::Closed {
            self.fail(&mut why, error);
        }
    }

    /// Waits until it is closed.
    pub(crate) async fn closed(&self) {
        loop {
            let changed = self.lamp.changed.notified();
            if self.state() == State::Closed {
                return;
            }
            changed.await;
        }
    }

    /// Waits until it is open.
    pub(crate) async fn opened(&self) {
        loop {
            let changed = self.lamp.changed.notified();
            if self.state() == State::Open {
                return;
            }
            changed.await;
        }
    }

    /// Has the other side probed now, unless it asked to be left alone, and says whether it is back.
    pub(crate) async fn ask(&self) -> bool {
        let before = self.lamp.epoch.load(SeqCst);
        match self.state() {
            State::Closed => return true,
            State::Open if self.rest().is_some() => return false,
            _ => {}
        }
        self.wanted.notify_one();
        loop {
            let changed = self.lamp.changed.notified();
            match self.state() {
                State::Closed => return true,
                State::Open if self.lamp.epoch.load(SeqCst) > before => return false,
                _ => changed.await,
            }
        }
    }

    /// Waits until somebody wants to know whether the other side is back.
    pub(crate) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Why it opened last.
    pub fn cause(&self) -> Option<Error> {
        self.lock().cause.clone()
    }

    /// How long the other side asked to be left alone when it last failed.
    pub(crate) fn rest(&self) -> Option<Duration> {
        rest(self.lock().cause.as_ref())
    }

    /// Begins a probe: the state is half open until it ends. `None` if the breaker opened at this very moment: the pause
    /// between probes is the probing task's, and failsafe's own is zero, but it ends only when failsafe's clock moves.
    pub(crate) fn begin_probe(&self) -> Option<Permit> {
        let _one_at_a_time = self.lock();
        if self.machine.is_call_permitted() {
            return Some(Permit { epoch: self.lamp.epoch.load(SeqCst) });
        }
        // The next probe must not wait for its turn.
        self.wanted.notify_one();
        None
    }

    /// Ends a probe: any timely answer closes the breaker, also one that denies; an outage opens it again.
    pub(crate) fn end_probe(&self, permit: &Permit, result: &Result<()>) {
        match result {
            Err(e) if !e.counts_as_outage() => self.settle(permit, &Ok(())),
            _ => self.settle(permit, result),
        }
    }

    fn fail(&self, why: &mut Why, error: &Error) {
        let before = self.state();
        *why = Why::new(Some(error.clone()));
        self.machine.on_error();
        if before == State::Closed && self.state() == State::Open {
            tracing::warn!(cause = %error, "circuit breaker opened: the source of truth is unavailable");
        }
    }

    fn succeed(&self) {
        let before = self.state();
        self.machine.on_success();
        if before != State::Closed && self.state() == State::Closed {
            tracing::info!("circuit breaker closed: the source of truth is back");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Why> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rest(cause: Option<&Error>) -> Option<Duration> {
    cause.and_then(Error::retry_after).map(|asked| asked.clamp(SHORTEST_REST, LONGEST_REST))
}

/// The state as failsafe announces it, for everybody to read.
struct Lamp {
    state: AtomicU8,
    /// Counts the transitions.
    epoch: AtomicU64,
    changed: Notify,
    metrics: Metrics,
}

impl Lamp {
    fn new() -> Self {
        let lamp = Self {
            state: AtomicU8::new(0),
            epoch: AtomicU64::new(0),
            changed: Notify::new(),
            metrics: Metrics::new(),
        };
        lamp.metrics.breaker(State::Closed as u8);
        lamp
    }

    fn state(&self) -> State {
        match self.state.load(SeqCst) {
            0 => State::Closed,
            1 => State::Open,
            _ => State::HalfOpen,
        }
    }

    fn turn(&self, to: State) {
        if self.state() == to {
            return;
        }
        self.state.store(to as u8, SeqCst);
        self.epoch.fetch_add(1, SeqCst);
        self.metrics.transition(to as u8);
        self.changed.notify_waiters();
    }
}

/// The orphan rule wants a type of our own around the `Arc`.
struct Wire(Arc<Lamp>);

impl Instrument for Wire {
    fn on_call_rejected(&self) {}

    fn on_open(&self) {
        self.0.turn(State::Open);
    }

    fn on_half_open(&self) {
        self.0.turn(State::HalfOpen);
    }

    fn on_closed(&self) {
        self.0.turn(State::Closed);
    }
}

/// When to open: a count-based sliding window. failsafe's own success-rate policy cannot trip in its first window and
/// misses bursts.
#[derive(Debug, Default)]
struct Recent {
    failures: VecDeque<bool>,
    on_end: usize,
}

impl Recent {
    fn push(&mut self, failed: bool) {
        self.on_end = if failed { self.on_end + 1 } else { 0 };
        self.failures.push_back(failed);
        if self.failures.len() > WINDOW {
            self.failures.pop_front();
        }
    }

    fn is_bad(&self) -> bool {
        let failed = self.failures.iter().filter(|failed| **failed).count();
        let half_failed = self.failures.len() >= WINDOW / 2 && failed * 2 >= self.failures.len();
        self.on_end >= CONSECUTIVE || half_failed
    }
}

impl FailurePolicy for Recent {
    fn record_success(&mut self) {
        self.push(false);
    }

    fn mark_dead_on_failure(&mut self) -> Option<Duration> {
        self.push(true);
        self.is_bad().then_some(Duration::ZERO)
    }

    fn revived(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outage() -> Result<()> {
        Err(Error::new(ErrorKind::Unavailable, "no answer"))
    }

    fn settle(breaker: &Breaker, result: &Result<()>) {
        let permit = breaker.admit().unwrap();
        breaker.settle(&permit, result);
    }

    fn open() -> Breaker {
        let breaker = Breaker::new();
        (0..CONSECUTIVE).for_each(|_| settle(&breaker, &outage()));
        assert_eq!(breaker.state(), State::Open);
        breaker
    }

    /// Begins a probe once failsafe's clock has moved.
    fn begin(breaker: &Breaker) -> Permit {
        (0..1_000_000).find_map(|_| breaker.begin_probe()).unwrap()
    }

    #[test]
    fn opens_on_failures_on_end_but_not_on_other_answers() {
        let breaker = Breaker::new();
        for kind in [ErrorKind::Denied, ErrorKind::Refused, ErrorKind::Schema] {
            (0..100).for_each(|_| settle(&breaker, &Err(Error::new(kind, "an answer"))));
        }
        assert_eq!(breaker.state(), State::Closed);
        (0..CONSECUTIVE - 1).for_each(|_| settle(&breaker, &outage()));
        assert_eq!(breaker.state(), State::Closed);
        settle(&breaker, &outage());
        let error = breaker.admit().unwrap_err();
        assert!(error.is_outage() && error.to_string().contains("no answer"), "{error}");
    }

    #[test]
    fn opens_when_half_of_the_calls_fail() {
        let breaker = Breaker::new();
        for _ in 0..WINDOW / 4 {
            settle(&breaker, &Ok(()));
            settle(&breaker, &outage());
        }
        assert_eq!(breaker.state(), State::Open);
    }

    #[test]
    fn results_from_before_a_transition_are_ignored() {
        let breaker = Breaker::new();
        let (late_success, late_failure) = (breaker.admit().unwrap(), breaker.admit().unwrap());
        breaker.trip(&outage().unwrap_err());
        breaker.settle(&late_success, &Ok(()));
        assert_eq!(breaker.state(), State::Open);
        let probe = begin(&breaker);
        assert_eq!(breaker.state(), State::HalfOpen);
        assert!(breaker.admit().is_err(), "half open admits no caller");
        breaker.settle(&late_success, &Ok(()));
        assert_eq!(breaker.state(), State::HalfOpen);
        breaker.end_probe(&probe, &Ok(()));
        assert_eq!(breaker.state(), State::Closed);
        (0..100).for_each(|_| breaker.settle(&late_failure, &outage()));
        assert_eq!(breaker.state(), State::Closed);
    }

    #[test]
    fn a_probe_that_fails_opens_it_again_and_one_that_is_denied_closes_it() {
        let breaker = open();
        let probe = begin(&breaker);
        breaker.end_probe(&probe, &outage());
        assert_eq!(breaker.state(), State::Open);
        let probe = begin(&breaker);
        breaker.end_probe(&probe, &Err(Error::new(ErrorKind::Denied, "wrong key")));
        assert_eq!(breaker.state(), State::Closed);
    }

    #[test]
    fn the_rest_asked_for_is_clamped() {
        for (asked, given) in [(0, 1), (7, 7), (900, 60)] {
            let breaker = Breaker::new();
            breaker.trip(&outage().unwrap_err().with_retry_after(Duration::from_secs(asked)));
            assert_eq!(breaker.rest(), Some(Duration::from_secs(given)));
            assert_eq!(breaker.check().unwrap_err().retry_after(), Some(Duration::from_secs(given)));
        }
    }
}
