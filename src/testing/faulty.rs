//! A store around a store that fails by script or by seed.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::breaker::Breaker;
use crate::error::{Error, ErrorKind, Result};
use crate::record::{Key, Want, Write};
use crate::store::{Applied, Loaded, Page, Recent, Store};
use crate::version::Clock;

/// What happens to one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It passes.
    Pass,
    /// It is not carried out, and fails as an outage.
    Refuse,
    /// It is carried out, and fails as an outage: the answer is lost.
    LoseAnswer,
    /// It is not carried out, and fails with an error of this kind.
    Fail(ErrorKind),
    /// It is carried out after this long.
    Delay(Duration),
    /// It is carried out, and its answer comes after this long.
    DelayAnswer(Duration),
    /// It does not end before the faults are healed; then it fails as an outage.
    Hang,
}

/// A store around a store that fails as its [`Faults`] say.
#[derive(Debug)]
pub struct Faulty<S> {
    store: S,
    faults: Faults,
}

/// What becomes of the calls of a [`Faulty`] store, to be changed from outside.
#[derive(Debug, Clone)]
pub struct Faults {
    plan: Arc<Mutex<Plan>>,
    healed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Plan {
    script: VecDeque<Fault>,
    always: Option<Fault>,
    random: Option<(fastrand::Rng, f64)>,
    /// Writes of these threads meet these, as long as there is no other fault.
    poison: HashMap<String, Fault>,
    fail_trials: bool,
    /// Pages with more threads fail as an outage.
    longest_page: Option<usize>,
    tallies: HashMap<&'static str, Tally>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Tally {
    calls: usize,
    running: usize,
    most: usize,
}

impl<S: Store> Faulty<S> {
    /// A store that passes everything on, until its [`faults`](Self::faults) say otherwise.
    pub fn new(store: S) -> Self {
        Self { store, faults: Faults { plan: Arc::default(), healed: watch::Sender::new(0) } }
    }

    /// What becomes of its calls.
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }

    async fn call<T>(&self, name: &'static str, call: impl Future<Output = Result<T>>) -> Result<T> {
        let fault = self.faults.next();
        self.meet(name, fault, call).await
    }

    async fn meet<T>(
        &self,
        name: &'static str,
        fault: Fault,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let _running = self.faults.begin(name);
        let outage = |what| Err(Error::new(ErrorKind::Unavailable, what));
        match fault {
            Fault::Pass => call.await,
            Fault::Refuse => outage("planned fault: the call is refused"),
            Fault::LoseAnswer => {
                call.await?;
                outage("planned fault: the answer is lost").map_err(Error::with_outcome_unknown)
            }
            Fault::Fail(kind) => Err(Error::new(kind, "planned fault")),
            Fault::Delay(span) => {
                tokio::time::sleep(span).await;
                call.await
            }
            Fault::DelayAnswer(span) => {
                let result = call.await;
                tokio::time::sleep(span).await;
                result
            }
            Fault::Hang => {
                self.faults.healed.subscribe().changed().await.ok();
                outage("planned fault: the call hung")
            }
        }
    }
}

impl Faults {
    /// The next calls meet these, in order.
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        self.plan().script.extend(faults);
    }

    /// Every call beyond the script meets this.
    pub fn always(&self, fault: Fault) {
        self.plan().always = Some(fault);
    }

    /// Every call beyond the script meets, at this rate (0 to 1), a refusal or a lost answer, drawn by this seed.
    pub fn random(&self, seed: u64, rate: f64) {
        self.plan().random = Some((fastrand::Rng::with_seed(seed), rate));
    }

    /// Every write of this thread, alone or with others, meets this where no other fault is planned; also after
    /// [`heal`](Self::heal).
    pub fn poison(&self, key: impl Into<String>, fault: Fault) {
        self.plan().poison.insert(key.into(), fault);
    }

    /// No thread is poisoned any more, and the calls that hang end.
    pub fn antidote(&self) {
        self.plan().poison.clear();
        self.healed.send_modify(|count| *count += 1);
    }

    /// Whether what comes [on trial](crate::Store::apply_on_trial), which is how queued writes are replayed, fails as an
    /// outage; also after [`heal`](Self::heal).
    pub fn fail_trials(&self, fail: bool) {
        self.plan().fail_trials = fail;
    }

    /// A page of more threads than this fails as an outage, as one does that takes too long; also after [`heal`](Self::heal).
    pub fn longest_page(&self, threads: usize) {
        self.plan().longest_page = Some(threads);
    }

    /// All pass again, but for what is poisoned, and those that hang end.
    pub fn heal(&self) {
        let mut plan = self.plan();
        let Plan { tallies, poison, fail_trials, longest_page, .. } = std::mem::take(&mut *plan);
        *plan = Plan { tallies, poison, fail_trials, longest_page, ..Plan::default() };
        drop(plan);
        self.healed.send_modify(|count| *count += 1);
    }

    /// How many calls of an operation came so far: `load`, `apply`, `recent`, `touch`, `purge` or `probe`.
    pub fn calls(&self, operation: &str) -> usize {
        self.plan().tallies.get(operation).map_or(0, |tally| tally.calls)
    }

    /// How many calls of an operation were under way at once, at most.
    pub fn most_at_once(&self, operation: &str) -> usize {
        self.plan().tallies.get(operation).map_or(0, |tally| tally.most)
    }

    fn begin(&self, operation: &'static str) -> Running {
        let mut plan = self.plan();
        let tally = plan.tallies.entry(operation).or_default();
        tally.calls += 1;
        tally.running += 1;
        tally.most = tally.most.max(tally.running);
        Running { faults: self.clone(), operation }
    }

    fn next(&self) -> Fault {
        let mut plan = self.plan();
        if let Some(fault) = plan.script.pop_front().or_else(|| plan.always) {
            return fault;
        }
        let Some((rng, rate)) = &mut plan.random else { return Fault::Pass };
        match (rng.f64() < *rate, rng.bool()) {
            (false, _) => Fault::Pass,
            (true, false) => Fault::Refuse,
            (true, true) => Fault::LoseAnswer,
        }
    }

    fn next_for(&self, writes: &[Write], on_trial: bool) -> Fault {
        let fault = self.next();
        let plan = self.plan();
        if fault != Fault::Pass {
            return fault;
        }
        if on_trial && plan.fail_trials {
            return Fault::Refuse;
        }
        let poison = writes.iter().find_map(|write| plan.poison.get(write.record.key.as_str()));
        poison.copied().unwrap_or(Fault::Pass)
    }

    fn next_for_page(&self, page: &Page) -> Fault {
        let fault = self.next();
        let is_too_long = self.plan().longest_page.is_some_and(|longest| page.most > longest);
        if fault == Fault::Pass && is_too_long { Fault::Refuse } else { fault }
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call is under way until this is dropped.
struct Running {
    faults: Faults,
    operation: &'static str,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(tally) = self.faults.plan().tallies.get_mut(self.operation) {
            tally.running -= 1;
        }
    }
}

#[async_trait]
impl<S: Store> Store for Faulty<S> {
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
        self.call("load", self.store.load(wants)).await
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.meet("apply", self.faults.next_for(writes, false), self.store.apply(writes)).await
    }

    async fn apply_on_trial(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.meet("apply", self.faults.next_for(writes, true), self.store.apply_on_trial(writes)).await
    }

    async fn recent(&self, page: &Page) -> Result<Recent> {
        let fault = self.faults.next_for_page(page);
        self.meet("recent", fault, self.store.recent(page)).await
    }

    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.call("touch", self.store.touch(keys)).await
    }

    async fn purge(&self, most: usize) -> Result<usize> {
        self.call("purge", self.store.purge(most)).await
    }

    async fn probe(&self) -> Result<()> {
        self.call("probe", self.store.probe()).await
    }
}
