//! A store around a store that fails by script or by seed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::breaker::Breaker;
use crate::error::{Error, ErrorKind, Result};
use crate::record::{Key, Record, Want, Write};
use crate::store::{Applied, Loaded, Page, Store};
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
    calls: usize,
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

    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let outage = |what| Err(Error::new(ErrorKind::Unavailable, what));
        match self.faults.next() {
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

    /// All pass again, and those that hang end.
    pub fn heal(&self) {
        let mut plan = self.plan();
        *plan = Plan { calls: plan.calls, ..Plan::default() };
        drop(plan);
        self.healed.send_modify(|count| *count += 1);
    }

    /// How many calls came so far.
    pub fn calls(&self) -> usize {
        self.plan().calls
    }

    fn next(&self) -> Fault {
        let mut plan = self.plan();
        plan.calls += 1;
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

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
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

    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        self.call(self.store.load(wants)).await
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.call(self.store.apply(writes)).await
    }

    async fn recent(&self, page: &Page) -> Result<Vec<Record>> {
        self.call(self.store.recent(page)).await
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
