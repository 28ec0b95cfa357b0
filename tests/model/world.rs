//! Where records live in a world, what can happen on the way there, and what really is there.

use std::fmt::Debug;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{Batched, Builder, Cache, ErrorKind, Guard, Loaded, Memory, Result, Store};

use crate::plan::{HANDLES, Trouble};
use crate::planted::{Bug, Planted};
use crate::remote::{Journal, Meter, Remote, Shared};

/// How long one call may take. Troubles are longer and shorter than this.
const DEADLINE: Duration = Duration::from_millis(200);

#[async_trait]
pub trait World: Debug + Send + Sync {
    /// A daemon's way to the source of truth, by a clock that starts this much off. Made anew for each life.
    async fn builder(&self, handle: usize, skew_ms: i64) -> Result<Builder>;

    /// From now on, this happens to the handle's calls.
    async fn trouble(&self, handle: usize, trouble: Trouble);

    /// Nothing happens any more.
    async fn heal(&self, handle: usize);

    /// The id of a thread.
    fn name(&self, key: usize) -> String {
        format!("thread {key}")
    }

    /// The document that the source of truth has, asked for directly.
    async fn truth(&self, key: &str) -> Option<String>;

    /// How far the clock of a handle and its cache may be off at this moment.
    fn off_ms(&self, handle: usize, cache: &Cache) -> i64;

    /// How far a clock that has had an answer was off at worst.
    fn worst_ms(&self) -> i64;

    /// What the handles heard of their writes to a thread, where that is known.
    fn journal(&self, _key: &str) -> String {
        String::new()
    }

    /// What is wrong with the calls that were made, if anything.
    fn complaint(&self) -> Option<String> {
        None
    }
}

/// One store in memory, and for each handle a line to it that can be cut.
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
    /// Those of each life, the present one last: what hung in an earlier one is let go, too.
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
        let faulty = Faulty::new(store);
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
        let guard = Guard::new(remote, DEADLINE);
        guard.connect().await?;
        Ok(Cache::builder().store(Batched::new(Planted::above(self.bug, guard))))
    }

    async fn trouble(&self, handle: usize, trouble: Trouble) {
        let line = &self.lines[handle];
        *line.trouble.lock().unwrap() = Some(trouble);
        line.faults.lock().unwrap().last().iter().for_each(|faults| apply(faults, trouble));
    }

    async fn heal(&self, handle: usize) {
        let line = &self.lines[handle];
        *line.trouble.lock().unwrap() = None;
        line.faults.lock().unwrap().iter().for_each(Faults::heal);
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
        let most = |line: &Line| line.faults.lock().unwrap().iter().map(|f| f.most_at_once("probe")).max();
        let most = self.lines.iter().filter_map(most).max();
        most.filter(|most| *most > 1).map(|most| format!("{most} probes at once"))
    }
}

fn apply(faults: &Faults, trouble: Trouble) {
    match trouble {
        Trouble::Refuse => faults.always(Fault::Refuse),
        Trouble::LoseAnswers => faults.always(Fault::LoseAnswer),
        Trouble::Deny => faults.always(Fault::Fail(ErrorKind::Denied)),
        Trouble::Slow(span) => faults.always(Fault::Delay(span)),
        Trouble::SlowAnswers(span) => faults.always(Fault::DelayAnswer(span)),
        Trouble::Hang => faults.always(Fault::Hang),
        Trouble::Flaky(rate) => faults.random(fastrand::u64(..), rate),
        Trouble::Blips(count) => faults.script(std::iter::repeat_n(Fault::LoseAnswer, count)),
        // What begins as one kind of outage may go on as another.
        Trouble::Other(number) => {
            let kinds = [Fault::LoseAnswer, Fault::DelayAnswer(DEADLINE * 2), Fault::Delay(DEADLINE / 2)];
            faults.script([kinds[number % 3], Fault::Pass, kinds[number / 3 % 3]]);
            faults.always(if number & 32 == 0 { Fault::Refuse } else { Fault::Hang });
        }
    }
}
