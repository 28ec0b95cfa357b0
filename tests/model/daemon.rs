//! One handle through its lives. A life ends by shutdown or crash, and the next life opens the same file.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use threadkeep::{Cache, ErrorKind, Result};
use tokio::sync::watch;

use crate::clocks::jumps_since;
use crate::files::Files;
use crate::history::{
    Claim, Document, Drift, Moment, Op, OpKind, Outcome, Reading, Recorder, WriteKind, WriteOp,
};
use crate::plan::{Action, REGISTERS, Restart, Settings, Step};
use crate::queue;
use crate::world::World;

#[derive(Debug)]
pub struct Daemon {
    index: usize,
    world: Arc<dyn World>,
    recorder: Arc<Recorder>,
    settings: Settings,
    files: Arc<Files>,
    slot: watch::Sender<Slot>,
    lives: std::sync::atomic::AtomicU32,
    openings_ms: Mutex<Vec<i64>>,
    /// True if the clock was off by less than the tolerance of clock correction, but not right, in an unsynced period.
    was_within_tolerance: AtomicBool,
}

#[derive(Debug, Clone)]
enum Slot {
    Closed,
    Open(Life),
    /// Opening the cache failed with this message.
    Failed(String),
}

/// An open cache.
#[derive(Debug, Clone)]
struct Life {
    cache: Cache,
    number: u32,
    /// Turns true when the cache crashes, so that running operations stop.
    crashed: watch::Sender<bool>,
}

impl Daemon {
    pub async fn start(
        index: usize,
        world: Arc<dyn World>,
        recorder: Arc<Recorder>,
        settings: &Settings,
        files: Arc<Files>,
    ) -> Self {
        let daemon = Self {
            index,
            world,
            recorder,
            settings: settings.clone(),
            files,
            slot: watch::Sender::new(Slot::Closed),
            lives: 0.into(),
            openings_ms: Mutex::default(),
            was_within_tolerance: false.into(),
        };
        daemon.open().await;
        daemon
    }

    /// Opens the cache. Retries while the store rejects the key at the first contact.
    async fn open(&self) {
        let cache = loop {
            match self.try_open().await {
                Ok(cache) => break cache,
                Err(e) if e.kind() == ErrorKind::Unauthorized => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(e) => {
                    self.slot.send_replace(Slot::Failed(format!("the cache cannot be opened: {e:?}")));
                    return;
                }
            }
        };
        self.clock_error_ms(&cache);
        let number = self.lives.fetch_add(1, SeqCst);
        self.slot.send_replace(Slot::Open(Life { cache, number, crashed: watch::Sender::new(false) }));
    }

    async fn try_open(&self) -> Result<Cache> {
        let builder = self.world.builder(self.index, self.settings.skews[self.index]).await?;
        let builder = builder
            .fresh_for(self.settings.fresh_for)
            .soft_timeout(self.settings.soft_timeout)
            .cache_max_bytes(self.settings.cache_bytes)
            .maintenance_interval(Duration::from_millis(500));
        match self.has_file() {
            true => queue::with_queue(builder, &self.files.path(self.index), &self.settings).open().await,
            false => builder.without_queue().open().await,
        }
    }

    fn has_file(&self) -> bool {
        self.settings.has_file[self.index]
    }

    /// Returns the present error of the clock.
    fn clock_error_ms(&self, cache: &Cache) -> i64 {
        let error_ms = self.world.clock_error_ms(self.index, cache);
        if (100..2_500).contains(&error_ms) {
            self.was_within_tolerance.store(true, SeqCst);
        }
        error_ms
    }

    /// Ends this life and begins the next.
    pub async fn restart(&self, restart: Restart) {
        let Slot::Open(life) = self.slot.send_replace(Slot::Closed) else { return };
        if let Some(deadline) = restart.shutdown {
            life.cache.shutdown(deadline).await.unwrap();
        }
        life.crashed.send_replace(true);
        drop(life);
        if self.has_file() {
            let (files, recorder) = (Arc::clone(&self.files), Arc::clone(&self.recorder));
            let change = move || files.restart(restart.handle, restart, &recorder);
            tokio::task::spawn_blocking(change).await.unwrap();
            self.openings_ms.lock().unwrap().push(self.recorder.now().ms);
        }
        self.open().await;
    }

    /// Shuts the cache down and asserts that no operation is unfinished.
    pub async fn shut_down(&self) {
        if let Slot::Open(life) = self.slot.send_replace(Slot::Closed) {
            let left = life.cache.shutdown(Duration::from_secs(20)).await.unwrap();
            assert_eq!(
                left.unfinished, 0,
                "handle {} has unfinished operations after its recovery: {left:?}",
                self.index
            );
        }
    }

    pub fn openings_ms(&self) -> Vec<i64> {
        self.openings_ms.lock().unwrap().clone()
    }

    pub fn was_within_tolerance(&self) -> bool {
        self.was_within_tolerance.load(SeqCst)
    }

    /// Returns the cache if it is open.
    ///
    /// # Errors
    /// The message of the failed opening.
    pub fn cache(&self) -> Result<Option<Cache>, String> {
        match &*self.slot.borrow() {
            Slot::Open(life) => Ok(Some(life.cache.clone())),
            Slot::Closed => Ok(None),
            Slot::Failed(why) => Err(format!("handle {}: {why}", self.index)),
        }
    }

    /// Runs one step and records the operation in the history.
    pub async fn step(&self, step: &Step) {
        let slot = self
            .slot
            .subscribe()
            .wait_for(|slot| !matches!(slot, Slot::Closed))
            .await
            .map(|slot| slot.clone());
        let Ok(Slot::Open(Life { cache, number, crashed })) = slot else { return };
        let mut crashed = crashed.subscribe();
        let mut pending = RunningOp::begin(self, &cache, number, step);
        let abandoned = async {
            match step.abandon_after {
                Some(span) => tokio::time::sleep(span).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = pending.run(step) => {}
            () = abandoned => {}
            _ = crashed.wait_for(|crashed| *crashed) => {}
        }
    }
}

/// A running operation. A write that is dropped before its end has an unknown outcome.
struct RunningOp<'a> {
    daemon: &'a Daemon,
    cache: Cache,
    op: Option<Op>,
    began: Instant,
}

impl<'a> RunningOp<'a> {
    fn begin(daemon: &'a Daemon, cache: &Cache, life: u32, step: &Step) -> Self {
        let write = |kind| {
            let ttl_ms = i64::try_from(step.ttl.as_millis()).unwrap();
            OpKind::Write(WriteOp { id: daemon.recorder.id(), kind, ttl_ms, outcome: Outcome::Unknown })
        };
        let kind = match step.action {
            Action::Put => Some(write(WriteKind::Put)),
            Action::Remove => Some(write(WriteKind::Remove)),
            Action::Update if step.key < REGISTERS => Some(write(WriteKind::Replace)),
            Action::Update => Some(write(WriteKind::Append)),
            Action::Append => Some(write(WriteKind::Add)),
            Action::Get => Some(OpKind::Read(Err(ErrorKind::Closed))),
            Action::Evict => None,
        };
        let (began, off_ms) = (Instant::now(), daemon.clock_error_ms(cache));
        let op = kind.map(|kind| Op {
            handle: daemon.index,
            life,
            key: step.key,
            begin: daemon.recorder.now(),
            end: None,
            off_ms,
            drift: Drift::default(),
            kind,
        });
        Self { daemon, cache: cache.clone(), op, began }
    }

    async fn run(&mut self, step: &Step) {
        let (cache, key) = (&self.cache, self.daemon.world.thread_id(step.key));
        let Some(kind) = self.op.as_ref().map(|op| op.kind.clone()) else {
            return cache.evict(key).unwrap();
        };
        let kind = match kind {
            OpKind::Read(_) => OpKind::Read(read(cache, &key).await),
            OpKind::Write(write) => {
                let outcome = outcome(apply(cache, &key, step, &write).await);
                OpKind::Write(WriteOp { outcome, ..write })
            }
        };
        let end = self.daemon.recorder.now();
        self.finish(kind, Some(end));
    }

    fn finish(&mut self, kind: OpKind, end: Option<Moment>) {
        if let Some(mut op) = self.op.take() {
            (op.kind, op.end) = (kind, end);
            // A jump and its correction may both lie inside the operation.
            let jumped_ms: i64 = jumps_since(self.began).iter().map(|(_, by_ms)| by_ms.abs()).sum();
            op.off_ms = op.off_ms.max(self.daemon.clock_error_ms(&self.cache)).max(jumped_ms);
            self.daemon.recorder.push(op);
        }
    }
}

impl Drop for RunningOp<'_> {
    fn drop(&mut self) {
        match self.op.as_ref().map(|op| op.kind.clone()) {
            Some(kind @ OpKind::Write(_)) => self.finish(kind, None),
            _ => self.op = None,
        }
    }
}

async fn read(cache: &Cache, key: &str) -> Result<Reading, ErrorKind> {
    match cache.get(key).await {
        Ok(None) => Ok(Reading { seen: None, claim: Claim::Absent }),
        Ok(Some(found)) => {
            let document: Document = found.decode().unwrap();
            Ok(Reading { seen: Some(document.ids), claim: queue::claim(&found) })
        }
        Err(e) => Err(e.kind()),
    }
}

async fn apply(cache: &Cache, key: &str, step: &Step, write: &WriteOp) -> Result<threadkeep::WriteOutcome> {
    let (id, pad) = (write.id, "x".repeat(step.pad));
    match write.kind {
        WriteKind::Put => cache.put(key, &Document { ids: vec![id], pad }).ttl(step.ttl).await,
        WriteKind::Remove => cache.remove(key).await,
        WriteKind::Replace => {
            let replace = |_: Option<Document>| Ok(Some(Document { ids: vec![id], pad: pad.clone() }));
            cache.update(key, replace).ttl(step.ttl).await
        }
        WriteKind::Append => {
            let append = |now: Option<Document>| {
                let mut next = now.unwrap_or_default();
                next.ids.push(id);
                Ok(Some(next))
            };
            cache.update(key, append).ttl(step.ttl).await
        }
        WriteKind::Add => {
            let appended = cache.append(key, &[id]).at("ids").ttl(step.ttl).await;
            appended.map(|appended| appended.outcome)
        }
    }
}

fn outcome(result: Result<threadkeep::WriteOutcome>) -> Outcome {
    match result {
        Ok(outcome) => queue::outcome(outcome),
        Err(e) if e.outcome_unknown() => Outcome::Unknown,
        Err(e) => Outcome::Failed(e.kind()),
    }
}
