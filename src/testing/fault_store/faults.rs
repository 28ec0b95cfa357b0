//! The plan of faults, and the handle that changes it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::Fault;
use crate::store::{ListRequest, Write};

/// Controls the faults of a [`FaultStore`](super::FaultStore).
///
/// Clones share one plan, so that a test can change it while a cache owns the store.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> threadkeep::Result<()> {
/// use threadkeep::store::{Key, ListRequest, Memory, Record, Store, Version, Write};
/// use threadkeep::testing::{Fault, FaultStore};
///
/// let store = FaultStore::new(Memory::new());
/// let faults = store.faults();
/// faults.script([Fault::Pass, Fault::Refuse]); // for the next two calls
/// assert!(store.probe().await.is_ok() && store.probe().await.is_err());
/// faults.random(7, 1.0); // for each later call, with this probability
/// assert!(store.probe().await.is_err());
/// faults.always(Fault::Refuse);
/// assert!(store.probe().await.unwrap_err().is_outage());
/// faults.clear();
/// store.probe().await?;
/// assert_eq!((faults.calls("probe"), faults.max_concurrent("probe")), (5, 1));
///
/// faults.fail_key("thread-1", Fault::Refuse);
/// let removed = Record::tombstone(Key::new("thread-1")?, Version::from_raw(1 << 21));
/// assert!(store.apply(&[Write::new(removed)]).await.is_err());
/// faults.clear_key_faults();
/// faults.fail_replays(true);
/// assert!(store.apply_once(&[]).await.is_err() && store.apply(&[]).await.is_ok());
/// faults.max_page_size(10);
/// assert!(store.list(&ListRequest::new(11)).await.is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Faults {
    plan: Arc<Mutex<FaultPlan>>,
    /// Counts the clears. A change ends the calls that hang.
    pub(super) cleared: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct FaultPlan {
    script: VecDeque<Fault>,
    always: Option<Fault>,
    random: Option<(fastrand::Rng, f64)>,
    /// Faults for writes of single conversations. Script, `always` and `random` come first.
    fail_key: HashMap<String, Fault>,
    fail_replays: bool,
    /// Lists of more conversations fail as an outage.
    max_page_size: Option<usize>,
    counts: HashMap<&'static str, CallCount>,
}

#[derive(Debug, Default, Clone, Copy)]
struct CallCount {
    calls: usize,
    running: usize,
    max_running: usize,
}

impl Faults {
    /// Plans one fault for each of the next calls, in order. See [`Faults`] for an example.
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        self.plan.lock().script.extend(faults);
    }

    /// Plans a fault for every call after the script. See [`Faults`] for an example.
    pub fn always(&self, fault: Fault) {
        self.plan.lock().always = Some(fault);
    }

    /// Plans random faults at `rate` (0 to 1) for the calls after the script.
    ///
    /// Half of the faults are [`Fault::Refuse`], half are [`Fault::DropResponse`]. One seed gives one sequence of faults.
    /// See [`Faults`] for an example.
    pub fn random(&self, seed: u64, rate: f64) {
        self.plan.lock().random = Some((fastrand::Rng::with_seed(seed), rate));
    }

    /// Plans a fault for every batch with a write of this conversation.
    ///
    /// Script, `always` and `random` come first. The fault outlives [`clear`](Self::clear).
    /// See [`Faults`] for an example.
    pub fn fail_key(&self, key: impl Into<String>, fault: Fault) {
        self.plan.lock().fail_key.insert(key.into(), fault);
    }

    /// Removes the faults of [`fail_key`](Self::fail_key) and ends the calls that hang. See [`Faults`] for an example.
    pub fn clear_key_faults(&self) {
        self.plan.lock().fail_key.clear();
        self.cleared.send_modify(|count| *count += 1);
    }

    /// Sets whether [`apply_once`](crate::store::Store::apply_once) fails as an outage.
    ///
    /// Replay sends queued writes with this call. The fault outlives [`clear`](Self::clear).
    /// See [`Faults`] for an example.
    pub fn fail_replays(&self, fail: bool) {
        self.plan.lock().fail_replays = fail;
    }

    /// Plans an outage for every list of more conversations than this.
    ///
    /// The fault imitates a page that exceeds the server's time limit. The fault outlives [`clear`](Self::clear).
    /// See [`Faults`] for an example.
    pub fn max_page_size(&self, conversations: usize) {
        self.plan.lock().max_page_size = Some(conversations);
    }

    /// Clears script, `always` and `random`, and ends the calls that hang.
    ///
    /// The faults of [`fail_key`](Self::fail_key), [`fail_replays`](Self::fail_replays) and
    /// [`max_page_size`](Self::max_page_size) stay, and so do the counts. See [`Faults`] for an example.
    pub fn clear(&self) {
        let mut plan = self.plan.lock();
        plan.script.clear();
        (plan.always, plan.random) = (None, None);
        drop(plan);
        self.cleared.send_modify(|count| *count += 1);
    }

    /// Returns the number of calls of an operation so far.
    ///
    /// The operations are `load`, `apply`, `list`, `touch`, `purge` and `probe`. Failed calls count, too.
    /// See [`Faults`] for an example.
    pub fn calls(&self, operation: &str) -> usize {
        self.plan.lock().counts.get(operation).map_or(0, |count| count.calls)
    }

    /// Returns the largest number of concurrent calls of an operation. See [`Faults`] for an example.
    pub fn max_concurrent(&self, operation: &str) -> usize {
        self.plan.lock().counts.get(operation).map_or(0, |count| count.max_running)
    }

    /// Counts a call as running until the guard is dropped.
    pub(super) fn begin(&self, operation: &'static str) -> RunningCall {
        let mut plan = self.plan.lock();
        let count = plan.counts.entry(operation).or_default();
        count.calls += 1;
        count.running += 1;
        count.max_running = count.max_running.max(count.running);
        RunningCall { faults: self.clone(), operation }
    }

    /// Draws the fault of a call: from the script, then `always`, then `random`.
    pub(super) fn next(&self) -> Fault {
        let mut plan = self.plan.lock();
        if let Some(fault) = plan.script.pop_front().or_else(|| plan.always) {
            return fault;
        }
        let Some((rng, rate)) = &mut plan.random else { return Fault::Pass };
        match (rng.f64() < *rate, rng.bool()) {
            (false, _) => Fault::Pass,
            (true, false) => Fault::Refuse,
            (true, true) => Fault::DropResponse,
        }
    }

    pub(super) fn next_for_writes(&self, writes: &[Write], is_replay: bool) -> Fault {
        let fault = self.next();
        let plan = self.plan.lock();
        if fault != Fault::Pass {
            return fault;
        }
        if is_replay && plan.fail_replays {
            return Fault::Refuse;
        }
        let key_fault = writes.iter().find_map(|write| plan.fail_key.get(write.record.key.as_str()));
        key_fault.copied().unwrap_or(Fault::Pass)
    }

    pub(super) fn next_for_page(&self, page: &ListRequest) -> Fault {
        let fault = self.next();
        let is_too_large = self.plan.lock().max_page_size.is_some_and(|max| page.limit > max);
        if fault == Fault::Pass && is_too_large { Fault::Refuse } else { fault }
    }

    pub(super) fn none() -> Self {
        Self { plan: Arc::default(), cleared: watch::Sender::new(0) }
    }
}

/// Guard of a running call; dropping it ends the count.
pub(super) struct RunningCall {
    faults: Faults,
    operation: &'static str,
}

impl Drop for RunningCall {
    fn drop(&mut self) {
        if let Some(count) = self.faults.plan.lock().counts.get_mut(self.operation) {
            count.running -= 1;
        }
    }
}
