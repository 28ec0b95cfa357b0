//! Measures gets of conversations in memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::executor::block_on;
use moka::policy::EvictionPolicy;
use threadkeep::Cache;

use crate::sessions::Sessions;
use crate::table::Goal::AtMost;
use crate::table::{Table, Unit};
use crate::work::{conversation, thread};
use crate::world::{KIB, Scale, World};

const BYTES: u64 = 8 << 30;
/// Step between two gets: a prime, so that the gets visit all conversations and never two neighbours in a row.
const STRIDE: usize = 7919;

type DefaultMoka = moka::future::Cache<String, Arc<str>>;
type TunedMoka = moka::future::Cache<String, Arc<str>, foldhash::fast::RandomState>;

/// Three caches with the same conversations.
struct Competitors {
    keys: Vec<String>,
    cache: Cache,
    tuned_moka: TunedMoka,
    default_moka: DefaultMoka,
}

impl Competitors {
    async fn new(threads: usize) -> Self {
        let keys: Vec<String> = (0..threads).map(thread).collect();
        let cache = Cache::builder().memory().cache_max_bytes(BYTES as usize).open().await.unwrap();
        let default_moka = DefaultMoka::new(1 << 30);
        let tuned_moka = moka::future::Cache::builder()
            .max_capacity(BYTES)
            .weigher(|_: &String, value: &Arc<str>| value.len() as u32)
            .eviction_policy(EvictionPolicy::lru())
            .build_with_hasher(foldhash::fast::RandomState::default());
        for key in &keys {
            let value = conversation(key, KIB);
            let json = serde_json::to_string(&value).unwrap();
            cache.put(key, &value).await.unwrap();
            tuned_moka.insert(key.clone(), json.as_str().into()).await;
            default_moka.insert(key.clone(), json.into()).await;
        }
        Self { keys, cache, tuned_moka, default_moka }
    }

    fn threadkeep(&self, gets: usize) -> Duration {
        self.each(gets, async |key| assert!(self.cache.get(key).await.unwrap().is_some()))
    }

    fn tuned_moka(&self, gets: usize) -> Duration {
        self.each(gets, async |key| assert!(self.tuned_moka.get(key).await.is_some()))
    }

    fn default_moka(&self, gets: usize) -> Duration {
        self.each(gets, async |key| assert!(self.default_moka.get(key).await.is_some()))
    }

    fn each(&self, gets: usize, get: impl AsyncFn(&str)) -> Duration {
        each(&self.keys, gets, get)
    }
}

/// Measures the mean time of one get.
pub fn each(keys: &[String], gets: usize, get: impl AsyncFn(&str)) -> Duration {
    let began = Instant::now();
    block_on(async {
        for turn in 0..gets {
            get(&keys[turn * STRIDE % keys.len()]).await;
        }
    });
    began.elapsed() / gets as u32
}

const TUNED_MOKA: &str = "moka::future, same hasher and policy";
const DEFAULT_MOKA: &str = "moka::future, default settings";

pub async fn of_10_000(world: &World) -> Table {
    const SESSIONS: &str = "tower-sessions, moka in front of Postgres";
    let threads = world.scale.of(10_000, 500);
    let mut table = Table::new(format!("Hits, {threads} conversations of 1 KiB, one task"), Unit::Span);
    let (competitors, sessions) = (Competitors::new(threads).await, Sessions::new(world, threads).await);
    let gets = world.scale.of(200_000, 1_000);
    for _ in 0..world.scale.of(25, 2) {
        table.note_span("threadkeep", competitors.threadkeep(gets));
        table.note_span(TUNED_MOKA, competitors.tuned_moka(gets));
        table.note_span(DEFAULT_MOKA, competitors.default_moka(gets));
        table.note_span(SESSIONS, sessions.hits(gets / 10));
    }
    table.claim("threadkeep", AtMost(1.15), TUNED_MOKA);
    table.claim("threadkeep", AtMost(1.0), DEFAULT_MOKA);
    table.claim("threadkeep", AtMost(1.0), SESSIONS);
    table
}

/// Measures the growth of a hit's cost with the number of conversations.
pub async fn by_threads(scale: Scale) -> Vec<Table> {
    const WAYS: [&str; 3] = ["threadkeep", TUNED_MOKA, DEFAULT_MOKA];
    let sizes = [1_000, 10_000, 100_000, scale.of(1_000_000, 100_000)];
    let (gets, rounds) = (scale.of(300_000, 1_000), scale.of(9, 2));
    let (mut tables, mut spans) = (Vec::new(), Vec::new());
    for threads in sizes {
        let mut table = Table::new(format!("Hits, {threads} conversations of 1 KiB"), Unit::Span);
        let competitors = Competitors::new(threads).await;
        for _ in 0..rounds {
            let round =
                [competitors.threadkeep(gets), competitors.tuned_moka(gets), competitors.default_moka(gets)];
            WAYS.iter().zip(round).for_each(|(way, span)| table.note_span(way, span));
            spans.push(round);
        }
        table.compare("threadkeep", TUNED_MOKA);
        table.compare("threadkeep", DEFAULT_MOKA);
        tables.push(table);
    }
    let title = format!("Growth of a hit from {} to {} conversations", sizes[0], sizes[3]);
    let mut growth = Table::new(title, Unit::Times);
    for (few, many) in spans[..rounds].iter().zip(&spans[3 * rounds..]) {
        for (at, way) in WAYS.iter().enumerate() {
            growth.note(way, many[at].as_secs_f64() / few[at].as_secs_f64());
        }
    }
    growth.claim("threadkeep", AtMost(1.0), TUNED_MOKA);
    growth.claim("threadkeep", AtMost(1.0), DEFAULT_MOKA);
    tables.push(growth);
    tables
}
