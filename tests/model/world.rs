//! A world: the store, the faults between store and handles, and direct access to the stored records.

use std::fmt::Debug;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::store::{BatchingStore, Loaded, Memory, ResilientStore, Store};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{Builder, Cache, ErrorKind, Result};

use crate::plan::{HANDLES, Trouble};
use crate::planted::{Bug, Planted};
use crate::remote::{Journal, Meter, Remote, Shared};

/// The deadline of one store call. Some faults are longer, others shorter.
const DEADLINE: Duration = Duration::from_millis(200);

#[async_trait]
pub trait World: Debug + Send + Sync {
    /// Returns a builder whose clock starts `skew_ms` off. Each life gets its own.
    async fn builder(&self, handle: usize, skew_ms: i64) -> Result<Builder>;

    /// Applies this fault to the following calls of the handle.
    async fn trouble(&self, handle: usize, trouble: Trouble);

    /// Ends all faults of the handle.
    async fn clear(&self, handle: usize);

    /// Returns the thread id of a key.
    fn name(&self, key: usize) -> String {
        format!("thread {key}")
    }

    /// Loads the document from the store directly, without faults.
    async fn truth(&self, key: &str) -> Option<String>;

    /// Returns the largest possible error of the handle's clock now.
    fn off_ms(&self, handle: usize, cache: &Cache) -> i64;

    /// Returns the largest error of a clock after its clock sync.
    fn worst_ms(&self) -> i64;

    /// Returns the answers that the handles got for their writes, if the world records them.
    fn journal(&self, _key: &str) -> String {
        String::new()
    }

    /// Returns a description of the first invalid call, if any.
    fn complaint(&self) -> Option<String> {
        None
    }
}

/// One store in memory, with a faulty connection for each handle.
#[derive(Debug)]
pub struct InMemory {
    truth: Arc<Memory>,
    lines: [Line; HANDLES],
    worst: Arc<AtomicI64>,
    bug: Option<Bug>,
    journal: Journal,
}

#[derive(Debug, Default)]
struct Line {
    /// The faults of each life, the present life last. `clear` also releases the hung calls of earlier lives.
    faults: Mutex<Vec<Faults>>,
    trouble: Mutex<Option<Trouble>>,
    meter: Mutex<Option<Meter>>,
}

impl InMemory {
    pub fn new(bug: Option<Bug>) -> Self {
        Self {
            truth: Arc::default(),
            lines: Default::default(),
            worst: Arc::default(),
            bug,
            journal: Journal::default(),
        }
    }
}

#[async_trait]
impl World for InMemory {
    async fn builder(&self, handle: usize, skew_ms: i64) -> Result<Builder> {
        let line = &self.lines[handle];
        let store = Planted::below(self.bug, Shared(Arc::clone(&self.truth)));
        let faulty = FaultStore::new(store);
        let faults = faulty.faults();
        if let Some(trouble) = *line.trouble.lock().unwrap() {
            apply(&faults, trouble);
        }
        line.faults.lock().unwrap().push(faults);
        let corrects = self.bug != Some(Bug::NeverCorrectsItsClock);
        let remote =
            Remote::new(faulty, Arc::clone(self.truth.clock()), skew_ms, Arc::clone(&self.worst), corrects);
        *line.meter.lock().unwrap() = Some(remote.meter());
        let remote = remote.noting(handle, self.journal.clone());
        let guard = ResilientStore::new(remote, DEADLINE);
        guard.connect().await?;
        Ok(Cache::builder().store(BatchingStore::new(Planted::above(self.bug, guard))))
    }

    async fn trouble(&self, handle: usize, trouble: Trouble) {
        let line = &self.lines[handle];
        *line.trouble.lock().unwrap() = Some(trouble);
        line.faults.lock().unwrap().last().iter().for_each(|faults| apply(faults, trouble));
    }

    async fn clear(&self, handle: usize) {
        let line = &self.lines[handle];
        *line.trouble.lock().unwrap() = None;
        line.faults.lock().unwrap().iter().for_each(Faults::clear);
    }

    async fn truth(&self, key: &str) -> Option<String> {
        let want = threadkeep::Key::new(key).unwrap().into();
        match self.truth.load(&[want]).await.unwrap().remove(0) {
            Loaded::Found(record) => record.value.as_ref().map(|json| json.as_str().to_owned()),
            _ => None,
        }
    }

    fn off_ms(&self, handle: usize, _: &Cache) -> i64 {
        self.lines[handle].meter.lock().unwrap().as_ref().map_or(0, |meter| meter.off_ms())
    }

    fn worst_ms(&self) -> i64 {
        self.worst.load(SeqCst)
    }

    fn journal(&self, key: &str) -> String {
        self.journal.of(key)
    }

    fn complaint(&self) -> Option<String> {
        let most = |line: &Line| line.faults.lock().unwrap().iter().map(|f| f.max_concurrent("probe")).max();
        let most = self.lines.iter().filter_map(most).max();
        most.filter(|most| *most > 1).map(|most| format!("{most} probes at once"))
    }
}

fn apply(faults: &Faults, trouble: Trouble) {
    match trouble {
        Trouble::Refuse => faults.always(Fault::Refuse),
        Trouble::LoseAnswers => faults.always(Fault::DropResponse),
        Trouble::Deny => faults.always(Fault::Fail(ErrorKind::Unauthorized)),
        Trouble::Slow(span) => faults.always(Fault::Delay(span)),
        Trouble::SlowAnswers(span) => faults.always(Fault::DelayResponse(span)),
        Trouble::Hang => faults.always(Fault::Hang),
        Trouble::Flaky(rate) => faults.random(fastrand::u64(..), rate),
        Trouble::Blips(count) => faults.script(std::iter::repeat_n(Fault::DropResponse, count)),
        // One kind of outage may turn into another.
        Trouble::Other(number) => {
            let kinds = [Fault::DropResponse, Fault::DelayResponse(DEADLINE * 2), Fault::Delay(DEADLINE / 2)];
            faults.script([kinds[number % 3], Fault::Pass, kinds[number / 3 % 3]]);
            faults.always(if number & 32 == 0 { Fault::Refuse } else { Fault::Hang });
        }
    }
}
