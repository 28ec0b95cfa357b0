//! Random interleavings of slow fills, joined fills, puts, removes and evictions, one seed each.
//!
//! Every call of the store stops twice, before it is carried out and before its answer is delivered, and a seeded
//! schedule decides who goes on. The oracle knows only when each operation began and ended and what it returned.
//! A failing seed is printed; `INTERLEAVING_SEED=… cargo test --all-features --test interleavings` replays it.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{
    Applied, Breaker, Cache, Clock, Durability, Json, Key, Loaded, Memory, Page, Record, Result, Store, Want,
    Write,
};
use tokio::sync::oneshot;

const INTERLEAVINGS: u64 = 12_000;
const OPERATIONS: usize = 14;

/// Where calls stop until the schedule lets them go on.
#[derive(Debug, Clone, Default)]
struct Gates(Arc<Mutex<Vec<oneshot::Sender<()>>>>);

impl Gates {
    async fn stop(&self) {
        let (open, opened) = oneshot::channel();
        self.0.lock().unwrap().push(open);
        opened.await.ok();
    }

    fn waiting(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn open(&self, at: usize) {
        self.0.lock().unwrap().swap_remove(at).send(()).ok();
    }
}

/// A store whose calls stop at the gates, before and after.
#[derive(Debug)]
struct Gated<S> {
    store: S,
    gates: Gates,
}

impl<S> Gated<S> {
    async fn call<T>(&self, call: impl Future<Output = T>) -> T {
        self.gates.stop().await;
        let result = call.await;
        self.gates.stop().await;
        result
    }
}

#[async_trait]
impl<S: Store> Store for Gated<S> {
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
        self.store.touch(keys).await
    }
    async fn purge(&self, most: usize) -> Result<usize> {
        self.store.purge(most).await
    }
    async fn probe(&self) -> Result<()> {
        self.store.probe().await
    }
}

/// What is put to the test.
#[async_trait]
trait Subject: Send + Sync + 'static {
    async fn get(&self, key: &str) -> Result<Option<u64>>;
    async fn put(&self, key: &str, value: u64) -> Result<Durability>;
    async fn remove(&self, key: &str) -> Result<Durability>;
    async fn list(&self, key: &str) -> Result<Option<Option<u64>>>;
    fn evict(&self, key: &str);
}

#[async_trait]
impl Subject for Cache {
    async fn get(&self, key: &str) -> Result<Option<u64>> {
        Cache::get(self, key).await?.map(|found| found.decode()).transpose()
    }
    async fn put(&self, key: &str, value: u64) -> Result<Durability> {
        Cache::put(self, key, &value).user(key).await
    }
    async fn remove(&self, key: &str) -> Result<Durability> {
        Cache::remove(self, key).await
    }
    async fn list(&self, key: &str) -> Result<Option<Option<u64>>> {
        let listed = Cache::list(self, key).await?;
        Ok(Some(listed.first().map(|found| found.decode()).transpose()?))
    }
    fn evict(&self, key: &str) {
        Cache::evict(self, key).unwrap();
    }
}

/// What one would write without threadkeep: a moka cache that loads on a miss.
struct Plain {
    cache: moka::future::Cache<String, Option<u64>>,
    store: Arc<dyn Store>,
}

impl Plain {
    async fn write(&self, key: &str, value: Option<u64>) -> Result<Durability> {
        let stamp = self.store.clock().stamp();
        let record = Record {
            key: Key::new(key)?,
            version: stamp.version,
            value: value.map(|value| Json::of(&value)).transpose()?,
            expires_at: self.store.clock().now().plus(Duration::from_secs(60)),
            user: None,
            metadata: Json::default(),
        };
        self.store.apply(&[record.into()]).await.map(|_| Durability::Stored)
    }
}

#[async_trait]
impl Subject for Plain {
    async fn get(&self, key: &str) -> Result<Option<u64>> {
        let load = async {
            let loaded = self.store.load(&[Key::new(key)?.into()]).await?;
            Result::Ok(match &loaded[0] {
                Loaded::Found(record) => record.value.as_ref().map(|json| json.as_str().parse().unwrap()),
                _ => None,
            })
        };
        self.cache.try_get_with(key.to_owned(), load).await.map_err(|e: Arc<threadkeep::Error>| (*e).clone())
    }
    async fn put(&self, key: &str, value: u64) -> Result<Durability> {
        let done = self.write(key, Some(value)).await?;
        self.cache.insert(key.to_owned(), Some(value)).await;
        Ok(done)
    }
    async fn remove(&self, key: &str) -> Result<Durability> {
        let done = self.write(key, None).await?;
        self.cache.invalidate(key).await;
        Ok(done)
    }
    async fn list(&self, _: &str) -> Result<Option<Option<u64>>> {
        Ok(None)
    }
    fn evict(&self, key: &str) {
        futures::executor::block_on(self.cache.invalidate(key));
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    Read(Option<u64>),
    Wrote(Option<u64>),
}

/// An operation and the moments between which it took place; a write of unknown outcome never ended.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: u64,
    end: u64,
    event: Event,
}

#[derive(Debug, Default)]
struct History {
    clock: AtomicU64,
    spans: Mutex<Vec<Span>>,
}

impl History {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst) + 1
    }

    fn read(&self, start: u64, value: Option<u64>) {
        self.push(start, self.tick(), Event::Read(value));
    }

    fn wrote(&self, start: u64, value: Option<u64>, result: &Result<Durability>) {
        let end = match result {
            Ok(Durability::Stored) => self.tick(),
            Err(e) if e.outcome_unknown() => u64::MAX,
            // It took no effect: nothing to check, and the value must not be seen.
            _ => return,
        };
        self.push(start, end, Event::Wrote(value));
    }

    fn push(&self, start: u64, end: u64, event: Event) {
        self.spans.lock().unwrap().push(Span { start, end, event });
    }

    /// What is wrong with it, if anything.
    fn violation(&self) -> Option<String> {
        let spans = self.spans.lock().unwrap();
        let mut writes = vec![Span { start: 0, end: 0, event: Event::Wrote(None) }];
        writes.extend(spans.iter().filter(|span| matches!(span.event, Event::Wrote(_))));
        let reads: Vec<(&Span, Vec<&Span>)> = spans
            .iter()
            .filter_map(|span| match span.event {
                Event::Read(value) => {
                    let is_source =
                        |write: &&Span| write.event == Event::Wrote(value) && write.start < span.end;
                    Some((span, writes.iter().filter(is_source).collect()))
                }
                Event::Wrote(_) => None,
            })
            .collect();
        for (read, sources) in &reads {
            let is_overwritten =
                |source: &Span| writes.iter().any(|write| source.end < write.start && write.end < read.start);
            if sources.iter().all(|source| is_overwritten(source)) {
                return Some(format!("stale read {read:?} after an acknowledged write, in {writes:?}"));
            }
        }
        for (earlier, seen) in &reads {
            for (later, sources) in reads.iter().filter(|(later, _)| earlier.end < later.start) {
                let went_back = |source: &Span| seen.iter().all(|seen| source.end < seen.start);
                if sources.iter().all(|source| went_back(source)) {
                    return Some(format!("{later:?} goes back behind {earlier:?}, in {writes:?}"));
                }
            }
        }
        None
    }
}

/// One interleaving: what is wrong with it, if anything.
async fn interleave(subject: &Arc<dyn Subject>, gates: &Gates, faults: &Faults, seed: u64) -> Option<String> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (history, key) = (Arc::new(History::default()), format!("thread {seed}"));
    let mut running = tokio::task::JoinSet::new();
    let mut left = OPERATIONS;
    while left > 0 || !running.is_empty() {
        if left > 0 && (gates.waiting() == 0 || rng.u8(..3) == 0) {
            left -= 1;
            if rng.u8(..8) == 0 {
                faults.script([if rng.bool() { Fault::LoseAnswer } else { Fault::Refuse }]);
            }
            let (subject, history, key) = (Arc::clone(subject), Arc::clone(&history), key.clone());
            let (kind, value, gives_up) = (rng.u8(..12), left as u64, rng.u8(..6) == 0);
            let operation = async move { operate(&*subject, &history, &key, kind, value).await };
            let task = running.spawn(operation);
            if gives_up {
                let delay = rng.usize(..6);
                tokio::spawn(async move {
                    for _ in 0..delay {
                        tokio::task::yield_now().await;
                    }
                    task.abort();
                });
            }
        } else if gates.waiting() > 0 {
            gates.open(rng.usize(..gates.waiting()));
        }
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
        while running.try_join_next().is_some() {}
    }
    // Work that was abandoned is completed, too.
    while gates.waiting() > 0 {
        gates.open(0);
        tokio::task::yield_now().await;
    }
    faults.heal();
    history.violation()
}

/// One operation, noted in the history. One that is given up halfway is noted as a write of unknown outcome.
async fn operate(subject: &dyn Subject, history: &History, key: &str, kind: u8, value: u64) {
    struct GivenUp<'a>(&'a History, u64, Option<Option<u64>>);
    impl Drop for GivenUp<'_> {
        fn drop(&mut self) {
            if let Some(value) = self.2 {
                self.0.push(self.1, u64::MAX, Event::Wrote(value));
            }
        }
    }
    let start = history.tick();
    let write = match kind {
        0..=3 => Some(Some(value)),
        4 => Some(None),
        _ => None,
    };
    let mut given_up = GivenUp(history, start, write);
    match write {
        Some(value) => {
            let result = match value {
                Some(value) => subject.put(key, value).await,
                None => subject.remove(key).await,
            };
            given_up.2 = None;
            history.wrote(start, value, &result);
        }
        None if kind < 7 => subject.evict(key),
        None if kind == 7 => {
            if let Ok(Some(value)) = subject.list(key).await {
                history.read(start, value);
            }
        }
        None => {
            if let Ok(value) = subject.get(key).await {
                history.read(start, value);
            }
        }
    }
}

fn store(gates: &Gates) -> (Gated<Faulty<Memory>>, Faults) {
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    (Gated { store: faulty, gates: gates.clone() }, faults)
}

fn seeds() -> std::ops::Range<u64> {
    let first = match std::env::var("INTERLEAVING_SEED") {
        Ok(seed) => return seed.parse().map(|seed| seed..seed + 1).unwrap(),
        Err(_) => fastrand::u64(..1 << 48),
    };
    println!("seeds {first} to {}", first + INTERLEAVINGS - 1);
    first..first + INTERLEAVINGS
}

#[tokio::test]
async fn no_interleaving_shows_a_stale_read_or_a_resurrection() {
    let gates = Gates::default();
    // With nothing ever fresh, each read loads; with all fresh, memory answers.
    let mut subjects = Vec::new();
    for fresh_for in [0, 3600] {
        let (store, faults) = store(&gates);
        let cache = Cache::builder().store(store).fresh_for(Duration::from_secs(fresh_for));
        let cache = cache.patience(Duration::from_secs(60)).open().await.unwrap();
        subjects.push((Arc::new(cache) as Arc<dyn Subject>, faults));
    }
    for seed in seeds() {
        let (subject, faults) = &subjects[seed as usize % 2];
        if let Some(violation) = interleave(subject, &gates, faults, seed).await {
            panic!("INTERLEAVING_SEED={seed}: {violation}");
        }
    }
}

#[tokio::test]
async fn the_same_harness_finds_a_plain_cache_wanting() {
    let gates = Gates::default();
    let (store, faults) = store(&gates);
    let plain = Plain { cache: moka::future::Cache::new(10_000), store: Arc::new(store) };
    let subject: Arc<dyn Subject> = Arc::new(plain);
    let mut found = 0;
    for seed in 0..2_000 {
        found += usize::from(interleave(&subject, &gates, &faults, seed).await.is_some());
    }
    println!("{found} of 2000 interleavings are wrong with a plain moka cache");
    assert!(found > 0);
}
