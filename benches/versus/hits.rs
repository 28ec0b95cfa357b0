//! Gets of what is in memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::executor::block_on;
use moka::policy::EvictionPolicy;
use threadkeep::Cache;

use crate::sessions::Sessions;
use crate::table::Wanted::AtMost;
use crate::table::{Table, Unit};
use crate::work::{conversation, thread};
use crate::world::{KIB, Scale, World};

const BYTES: u64 = 8 << 30;
/// Prime, so that the turns pass all threads, and none is next to the one before.
const STRIDE: usize = 7919;

type AsItComes = moka::future::Cache<String, Arc<str>>;
type Same = moka::future::Cache<String, Arc<str>, foldhash::fast::RandomState>;

/// The three of which each holds the same threads.
struct Rivals {
    keys: Vec<String>,
    cache: Cache,
    same: Same,
    as_it_comes: AsItComes,
}

impl Rivals {
    async fn new(threads: usize) -> Self {
        let keys: Vec<String> = (0..threads).map(thread).collect();
        let cache = Cache::builder().memory().cache_bytes(BYTES as usize).open().await.unwrap();
        let as_it_comes = AsItComes::new(1 << 30);
        let same = moka::future::Cache::builder()
            .max_capacity(BYTES)
            .weigher(|_: &String, value: &Arc<str>| value.len() as u32)
            .eviction_policy(EvictionPolicy::lru())
            .build_with_hasher(foldhash::fast::RandomState::default());
        for key in &keys {
            let value = conversation(key, KIB);
            let json = serde_json::to_string(&value).unwrap();
            let _ = cache.put(key, &value).await.unwrap();
            same.insert(key.clone(), json.as_str().into()).await;
            as_it_comes.insert(key.clone(), json.into()).await;
        }
        Self { keys, cache, same, as_it_comes }
    }

    fn threadkeep(&self, gets: usize) -> Duration {
        self.each(gets, async |key| assert!(self.cache.get(key).await.unwrap().is_some()))
    }

    fn same(&self, gets: usize) -> Duration {
        self.each(gets, async |key| assert!(self.same.get(key).await.is_some()))
    }

    fn as_it_comes(&self, gets: usize) -> Duration {
        self.each(gets, async |key| assert!(self.as_it_comes.get(key).await.is_some()))
    }

    /// How long one get takes.
    fn each(&self, gets: usize, get: impl AsyncFn(&str)) -> Duration {
        each(&self.keys, gets, get)
    }
}

pub fn each(keys: &[String], gets: usize, get: impl AsyncFn(&str)) -> Duration {
    let began = Instant::now();
    block_on(async {
        for turn in 0..gets {
            get(&keys[turn * STRIDE % keys.len()]).await;
        }
    });
    began.elapsed() / gets as u32
}

const SAME: &str = "moka::future, same hasher and policy";
const AS_IT_COMES: &str = "moka::future as it comes";

pub async fn ten_thousand(world: &World) -> Table {
    const SESSIONS: &str = "tower-sessions, moka before Postgres";
    let threads = world.scale.of(10_000, 500);
    let mut table = Table::new(format!("Hits, {threads} threads of 1 KiB, one task"), Unit::Span);
    let (rivals, sessions) = (Rivals::new(threads).await, Sessions::new(world, threads).await);
    let gets = world.scale.of(200_000, 1_000);
    for _ in 0..world.scale.of(25, 2) {
        table.note_span("threadkeep", rivals.threadkeep(gets));
        table.note_span(SAME, rivals.same(gets));
        table.note_span(AS_IT_COMES, rivals.as_it_comes(gets));
        table.note_span(SESSIONS, sessions.hits(gets / 10));
    }
    table.claim("threadkeep", AtMost(1.15), SAME);
    table.claim("threadkeep", AtMost(1.0), AS_IT_COMES);
    table.claim("threadkeep", AtMost(1.0), SESSIONS);
    table
}

/// How the cost of a hit grows with the number of threads.
pub async fn by_threads(scale: Scale) -> Vec<Table> {
    const WAYS: [&str; 3] = ["threadkeep", SAME, AS_IT_COMES];
    let sizes = [1_000, 10_000, 100_000, scale.of(1_000_000, 100_000)];
    let (gets, rounds) = (scale.of(300_000, 1_000), scale.of(9, 2));
    let (mut tables, mut spans) = (Vec::new(), Vec::new());
    for threads in sizes {
        let mut table = Table::new(format!("Hits, {threads} threads of 1 KiB"), Unit::Span);
        let rivals = Rivals::new(threads).await;
        for _ in 0..rounds {
            let round = [rivals.threadkeep(gets), rivals.same(gets), rivals.as_it_comes(gets)];
            WAYS.iter().zip(round).for_each(|(way, span)| table.note_span(way, span));
            spans.push(round);
        }
        table.compare("threadkeep", SAME);
        table.compare("threadkeep", AS_IT_COMES);
        tables.push(table);
    }
    let title = format!("How much a hit grows from {} to {} threads", sizes[0], sizes[3]);
    let mut growth = Table::new(title, Unit::Times);
    for (few, many) in spans[..rounds].iter().zip(&spans[3 * rounds..]) {
        for (at, way) in WAYS.iter().enumerate() {
            growth.note(way, many[at].as_secs_f64() / few[at].as_secs_f64());
        }
    }
    growth.claim("threadkeep", AtMost(1.0), SAME);
    growth.claim("threadkeep", AtMost(1.0), AS_IT_COMES);
    tables.push(growth);
    tables
}
