//! A world: the store, the faults between store and handles, and direct access to the stored records.

use std::fmt::Debug;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::store::{BatchingStore, Key, ResilientStore};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{Builder, Cache, ErrorKind, Result};

use crate::plan::{HANDLES, LinkFault};
use crate::planted::{Bug, BuggyStore};
use crate::remote::{ClockErrorMeter, Journal, RemoteStore, SharedStore};
use crate::store::{ModelStore, Plain};

/// The deadline of one store call. Some faults are longer, others shorter.
const DEADLINE: Duration = Duration::from_millis(200);

#[async_trait]
pub trait World: Debug + Send + Sync {
    /// Returns a builder whose clock starts `skew_ms` off. Each life gets its own.
    async fn builder(&self, handle: usize, skew_ms: i64) -> Result<Builder>;

    /// Applies this fault to the following calls of the handle.
    async fn inject(&self, handle: usize, fault: LinkFault);

    /// Ends all faults of the handle.
    async fn clear(&self, handle: usize);

    /// Returns the thread id of a key.
    fn thread_id(&self, key: usize) -> String {
        format!("thread {key}")
    }

    /// Executes plain SQL without faults. Returns true if it changed or inserted a live row.
    async fn execute(&self, key: &str, plain: &Plain) -> bool;

    /// Loads the document from the store directly, without faults.
    async fn stored_document(&self, key: &str) -> Option<String>;

    /// Returns the largest possible error of the handle's clock now.
    fn clock_error_ms(&self, handle: usize, cache: &Cache) -> i64;

    /// Returns the largest error of a clock after its clock sync.
    fn max_clock_error_ms(&self) -> i64;

    /// Returns the answers that the handles got for their writes, if the world records them.
    fn journal(&self, _key: &str) -> String {
        String::new()
    }

    /// Whether a handle opens a copy of the other one's file. Each handle of a real project has an address of its own, and a file
    /// belongs to one address.
    fn takes_copied_files(&self) -> bool {
        true
    }

    /// Returns a description of the first invalid call, if any.
    fn invalid_call(&self) -> Option<String> {
        None
    }
}

/// One store in memory, with a faulty connection for each handle.
#[derive(Debug)]
pub struct InMemory {
    store: Arc<ModelStore>,
    links: [FaultyLink; HANDLES],
    max_error_ms: Arc<AtomicI64>,
    bug: Option<Bug>,
    journal: Journal,
}

#[derive(Debug, Default)]
struct FaultyLink {
    /// The faults of each life, the present life last. `clear` also releases the hung calls of earlier lives.
    faults: Mutex<Vec<Faults>>,
    fault: Mutex<Option<LinkFault>>,
    meter: Mutex<Option<ClockErrorMeter>>,
}

impl InMemory {
    pub fn new(bug: Option<Bug>) -> Self {
        Self {
            store: ModelStore::new(bug).into(),
            links: Default::default(),
            max_error_ms: Arc::default(),
            bug,
            journal: Journal::default(),
        }
    }
}

#[async_trait]
impl World for InMemory {
    async fn builder(&self, handle: usize, skew_ms: i64) -> Result<Builder> {
        let link = &self.links[handle];
        let store = BuggyStore::below(self.bug, handle, SharedStore(Arc::clone(&self.store)));
        let faulty = FaultStore::new(store);
        let faults = faulty.faults();
        if let Some(fault) = *link.fault.lock().unwrap() {
            apply(&faults, fault);
        }
        link.faults.lock().unwrap().push(faults);
        let syncs_clock = self.bug != Some(Bug::SkipsClockSync);
        let remote = RemoteStore::new(faulty, skew_ms, Arc::clone(&self.max_error_ms), syncs_clock);
        *link.meter.lock().unwrap() = Some(remote.meter());
        let remote = remote.with_journal(handle, self.journal.clone());
        let guard = ResilientStore::new(remote, DEADLINE);
        guard.connect().await?;
        Ok(Cache::builder().store(BatchingStore::new(BuggyStore::above(self.bug, handle, guard))))
    }

    async fn inject(&self, handle: usize, fault: LinkFault) {
        let link = &self.links[handle];
        *link.fault.lock().unwrap() = Some(fault);
        link.faults.lock().unwrap().last().iter().for_each(|faults| apply(faults, fault));
    }

    async fn clear(&self, handle: usize) {
        let link = &self.links[handle];
        *link.fault.lock().unwrap() = None;
        link.faults.lock().unwrap().iter().for_each(Faults::clear);
    }

    async fn execute(&self, key: &str, plain: &Plain) -> bool {
        self.store.execute(&Key::new(key).unwrap(), plain)
    }

    async fn stored_document(&self, key: &str) -> Option<String> {
        let record = self.store.live(&Key::new(key).unwrap());
        record.and_then(|record| record.value.as_ref().map(|json| json.as_str().to_owned()))
    }

    fn clock_error_ms(&self, handle: usize, _: &Cache) -> i64 {
        self.links[handle].meter.lock().unwrap().as_ref().map_or(0, |meter| meter.error_ms())
    }

    fn max_clock_error_ms(&self) -> i64 {
        self.max_error_ms.load(SeqCst)
    }

    fn journal(&self, key: &str) -> String {
        self.journal.of(key)
    }

    fn invalid_call(&self) -> Option<String> {
        let most =
            |link: &FaultyLink| link.faults.lock().unwrap().iter().map(|f| f.max_concurrent("probe")).max();
        let most = self.links.iter().filter_map(most).max();
        most.filter(|most| *most > 1).map(|most| format!("{most} probes at once"))
    }
}

fn apply(faults: &Faults, fault: LinkFault) {
    match fault {
        LinkFault::Refuse => faults.always(Fault::Refuse),
        LinkFault::LoseResponses => faults.always(Fault::DropResponse),
        LinkFault::Deny => faults.always(Fault::Fail(ErrorKind::Unauthorized)),
        LinkFault::Slow(span) => faults.always(Fault::Delay(span)),
        LinkFault::SlowResponses(span) => faults.always(Fault::DelayResponse(span)),
        LinkFault::Hang => faults.always(Fault::Hang),
        LinkFault::Flaky(rate) => faults.random(fastrand::u64(..), rate),
        LinkFault::Blips(count) => faults.script(std::iter::repeat_n(Fault::DropResponse, count)),
        // One kind of outage may turn into another.
        LinkFault::Other(number) => {
            let kinds = [Fault::DropResponse, Fault::DelayResponse(DEADLINE * 2), Fault::Delay(DEADLINE / 2)];
            faults.script([kinds[number % 3], Fault::Pass, kinds[number / 3 % 3]]);
            faults.always(if number & 32 == 0 { Fault::Refuse } else { Fault::Hang });
        }
    }
}
