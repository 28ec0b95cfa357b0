//! One handle through its lives. A life ends by shutdown or crash, and the next life opens the same file.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use threadkeep::{Cache, ErrorKind, Result};
use tokio::sync::watch;

use crate::history::{Act, Claim, Document, Moment, Op, Outcome, Reading, Recorder, What, Write};
use crate::plan::{Does, REGISTERS, Settings, Step};
use crate::queue;
use crate::world::World;

#[derive(Debug)]
pub struct Daemon {
    index: usize,
    world: Arc<dyn World>,
    recorder: Arc<Recorder>,
    settings: Settings,
    file: PathBuf,
    seat: watch::Sender<Seat>,
    lives: std::sync::atomic::AtomicU32,
    /// True if a life began with a wrong clock before the first clock sync.
    began_blind: AtomicBool,
}

#[derive(Debug, Clone)]
enum Seat {
    Empty,
    Taken(Life),
    /// Opening the cache failed with this message.
    Broken(String),
}

/// An open cache.
#[derive(Debug, Clone)]
struct Life {
    cache: Cache,
    number: u32,
    /// Turns true when the cache crashes, so that running operations stop.
    over: watch::Sender<bool>,
}

impl Daemon {
    pub async fn start(
        index: usize,
        world: Arc<dyn World>,
        recorder: Arc<Recorder>,
        settings: &Settings,
        file: PathBuf,
    ) -> Self {
        let daemon = Self {
            index,
            world,
            recorder,
            settings: settings.clone(),
            file,
            seat: watch::Sender::new(Seat::Empty),
            lives: 0.into(),
            began_blind: false.into(),
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
                    self.seat.send_replace(Seat::Broken(format!("it cannot be opened: {e:?}")));
                    return;
                }
            }
        };
        if self.world.off_ms(self.index, &cache) > 100 {
            self.began_blind.store(true, SeqCst);
        }
        let number = self.lives.fetch_add(1, SeqCst);
        self.seat.send_replace(Seat::Taken(Life { cache, number, over: watch::Sender::new(false) }));
    }

    async fn try_open(&self) -> Result<Cache> {
        let builder = self.world.builder(self.index, self.settings.skews[self.index]).await?;
        let builder = builder
            .fresh_for(self.settings.fresh_for)
            .soft_timeout(self.settings.patience)
            .cache_max_bytes(self.settings.cache_bytes)
            .maintenance_interval(Duration::from_millis(500));
        queue::with_queue(builder, &self.file, &self.settings).open().await
    }

    /// Ends this life and begins the next. `shutdown` limits the shutdown; `None` means a crash.
    pub async fn restart(&self, shutdown: Option<Duration>) {
        let Seat::Taken(life) = self.seat.send_replace(Seat::Empty) else { return };
        if let Some(deadline) = shutdown {
            life.cache.shutdown(deadline).await.unwrap();
        }
        life.over.send_replace(true);
        let reboots = life.number % 2 == 0;
        drop(life);
        if reboots {
            queue::forget_the_clock(&self.file);
        }
        self.open().await;
    }

    /// Shuts the cache down and asserts that no operation is unfinished.
    pub async fn shut_down(&self) {
        if let Seat::Taken(life) = self.seat.send_replace(Seat::Empty) {
            let left = life.cache.shutdown(Duration::from_secs(20)).await.unwrap();
            assert_eq!(left.unfinished, 0, "healed, but handle {} is not done: {left:?}", self.index);
        }
    }

    pub fn began_blind(&self) -> bool {
        self.began_blind.load(SeqCst)
    }

    /// Returns the cache if it is open.
    ///
    /// # Errors
    /// The message of the failed opening.
    pub fn cache(&self) -> Result<Option<Cache>, String> {
        match &*self.seat.borrow() {
            Seat::Taken(life) => Ok(Some(life.cache.clone())),
            Seat::Empty => Ok(None),
            Seat::Broken(why) => Err(format!("handle {}: {why}", self.index)),
        }
    }

    /// Runs one step and records the operation in the history.
    pub async fn step(&self, step: &Step) {
        let seat = self
            .seat
            .subscribe()
            .wait_for(|seat| !matches!(seat, Seat::Empty))
            .await
            .map(|seat| seat.clone());
        let Ok(Seat::Taken(Life { cache, number, over })) = seat else { return };
        let mut over = over.subscribe();
        let mut pending = RunningOp::begin(self, &cache, number, step);
        let given_up = async {
            match step.gives_up_after {
                Some(span) => tokio::time::sleep(span).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = pending.carry_out(step) => {}
            () = given_up => {}
            _ = over.wait_for(|over| *over) => {}
        }
    }
}

/// A running operation. A write that is dropped before its end has an unknown outcome.
struct RunningOp<'a> {
    daemon: &'a Daemon,
    cache: Cache,
    op: Option<Op>,
}

impl<'a> RunningOp<'a> {
    fn begin(daemon: &'a Daemon, cache: &Cache, life: u32, step: &Step) -> Self {
        let write = |what| {
            let ttl_ms = i64::try_from(step.ttl.as_millis()).unwrap();
            Act::Write(Write { id: daemon.recorder.id(), what, ttl_ms, outcome: Outcome::Unknown })
        };
        let act = match step.what {
            Does::Put => Some(write(What::Put)),
            Does::Remove => Some(write(What::Remove)),
            Does::Update if step.key < REGISTERS => Some(write(What::Replace)),
            Does::Update => Some(write(What::Append)),
            Does::Get => Some(Act::Read(Err(ErrorKind::Closed))),
            Does::Evict => None,
        };
        let off_ms = daemon.world.off_ms(daemon.index, cache);
        let op = act.map(|act| Op {
            handle: daemon.index,
            life,
            key: step.key,
            begin: daemon.recorder.now(),
            end: None,
            off_ms,
            act,
        });
        Self { daemon, cache: cache.clone(), op }
    }

    async fn carry_out(&mut self, step: &Step) {
        let (cache, key) = (&self.cache, self.daemon.world.name(step.key));
        let Some(act) = self.op.as_ref().map(|op| op.act.clone()) else {
            return cache.evict(key).unwrap();
        };
        let act = match act {
            Act::Read(_) => Act::Read(read(cache, &key).await),
            Act::Write(write) => {
                let outcome = outcome(carry_out(cache, &key, step, &write).await);
                Act::Write(Write { outcome, ..write })
            }
        };
        let end = self.daemon.recorder.now();
        self.finish(act, Some(end));
    }

    fn finish(&mut self, act: Act, end: Option<Moment>) {
        if let Some(mut op) = self.op.take() {
            (op.act, op.end) = (act, end);
            op.off_ms = op.off_ms.max(self.daemon.world.off_ms(op.handle, &self.cache));
            self.daemon.recorder.push(op);
        }
    }
}

impl Drop for RunningOp<'_> {
    fn drop(&mut self) {
        match self.op.as_ref().map(|op| op.act.clone()) {
            Some(act @ Act::Write(_)) => self.finish(act, None),
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

async fn carry_out(cache: &Cache, key: &str, step: &Step, write: &Write) -> Result<threadkeep::WriteOutcome> {
    let (id, pad) = (write.id, "x".repeat(step.pad));
    match write.what {
        What::Put => cache.put(key, &Document { ids: vec![id], pad }).ttl(step.ttl).await,
        What::Remove => cache.remove(key).await,
        What::Replace => {
            let replace = |_: Option<Document>| Ok(Some(Document { ids: vec![id], pad: pad.clone() }));
            cache.update(key, replace).ttl(step.ttl).await
        }
        What::Append => {
            let append = |now: Option<Document>| {
                let mut next = now.unwrap_or_default();
                next.ids.push(id);
                Ok(Some(next))
            };
            cache.update(key, append).ttl(step.ttl).await
        }
    }
}

fn outcome(result: Result<threadkeep::WriteOutcome>) -> Outcome {
    match result {
        Ok(durability) => queue::outcome(durability),
        Err(e) if e.outcome_unknown() => Outcome::Unknown,
        Err(e) => Outcome::Failed(e.kind()),
    }
}
