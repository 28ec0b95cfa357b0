//! Measures gets that miss memory, on the real stack.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use threadkeep::{Cache, Freshness};

use crate::rest::load_body;
use crate::table::Goal::{AtLeast, AtMost};
use crate::table::{Table, Unit};
use crate::work::{Conversation, by_tasks, per_second, thread};
use crate::world::{KIB, World};
use crate::writes::{CONVERSATIONS, TASKS};

const BATCH: usize = TASKS / 4;

/// Reads as a daemon does: gets the conversation and decodes its JSON.
async fn get(cache: &Cache, key: &str) {
    let found = cache.get(key).await.unwrap().unwrap();
    assert_eq!(found.freshness(), Freshness::Fresh);
    assert_eq!(found.decode::<Conversation>().unwrap().len(), 4);
}

pub async fn cold(world: &World) -> Table {
    const BARE: &str = "bare reqwest, prebuilt batches of 64";
    const GET: &str = "one GET per key";
    let threads = world.scale.of(CONVERSATIONS, 500);
    let mut table = Table::new(format!("Cold gets of 1 KiB, {threads} keys, {TASKS} tasks"), Unit::Rate);
    world.seed(threads, KIB).await;
    let keys: Vec<String> = (0..threads).map(thread).collect();
    let bodies: Arc<[String]> = keys.chunks(BATCH).map(load_body).collect();
    for _ in 0..world.scale.rounds {
        let cache = world.builder().open().await.unwrap();
        let cold = cache.clone();
        let load = move |at| {
            let cache = cold.clone();
            async move { get(&cache, &thread(at)).await }
        };
        table.note("threadkeep", per_second(threads, by_tasks(TASKS, threads, load).await));
        cache.shutdown(Duration::from_secs(60)).await.unwrap();

        let span = world.rest.call_all("threadkeep_load", &bodies).await;
        table.note(BARE, per_second(threads, span));

        let rest = world.rest.clone();
        let select = move |at| {
            let rest = rest.clone();
            async move { assert_eq!(rest.select(&thread(at)).await.len(), 4) }
        };
        table.note(GET, per_second(threads, by_tasks(TASKS, threads, select).await));
    }
    table.claim("threadkeep", AtLeast(0.8), BARE);
    table.claim("threadkeep", AtLeast(6.0), GET);
    table
}

/// Counts the loads of 1,000 concurrent callers of one key.
pub async fn one_key(world: &World) -> Table {
    const CALLERS: usize = 1_000;
    let mut table = Table::new(format!("One cold key, {CALLERS} tasks at once"), Unit::Count);
    world.seed(1, KIB).await;
    let mut max_loads = 0;
    for _ in 0..world.scale.rounds {
        let (builder, faults) = world.builder_with_faults();
        let cache = builder.open().await.unwrap();
        let (callers, begun) = (cache.clone(), Arc::new(AtomicUsize::new(0)));
        let load = move |_| {
            let (cache, begun) = (callers.clone(), Arc::clone(&begun));
            async move {
                begun.fetch_add(1, Relaxed);
                get(&cache, &thread(0)).await;
            }
        };
        by_tasks(CALLERS, CALLERS, load).await;
        max_loads = max_loads.max(faults.calls("load"));
        cache.shutdown(Duration::from_secs(60)).await.unwrap();
    }
    table.note("most loads in a round", max_loads as f64);
    table.note("keys", 1.0);
    table.claim("most loads in a round", AtMost(1.0), "keys");
    table
}

/// Measures the warm-up, against a bare fetch of the same pages.
pub async fn warmup(world: &World) -> Table {
    const BARE: &str = "bare reqwest, the same pages";
    let threads = world.scale.of(100_000, 1_000);
    let mut table =
        Table::new(format!("Warm-up of {threads} conversations of 1 KiB, local file on"), Unit::Rate);
    world.seed(threads, KIB).await;
    for _ in 0..world.scale.rounds {
        let began = Instant::now();
        let cache = world.builder().warmup_limit(threads).open().await.unwrap();
        let warm = cache.warm().await.unwrap();
        table.note("threadkeep", per_second(warm.conversations, began.elapsed()));
        assert_eq!(warm.conversations, threads);
        cache.shutdown(Duration::from_secs(60)).await.unwrap();
        table.note(BARE, per_second(threads, pages(world, threads).await));
    }
    table.claim("threadkeep", AtLeast(0.7), BARE);
    table
}

/// Fetches the pages of the list and returns the time of the requests.
async fn pages(world: &World, threads: usize) -> Duration {
    #[derive(serde::Deserialize)]
    struct Response<'a> {
        #[serde(borrow)]
        rows: Vec<Row<'a>>,
    }
    #[derive(serde::Deserialize)]
    struct Row<'a> {
        key: &'a str,
        version: &'a str,
    }
    const PAGE: usize = 500;
    let (mut waited, mut after) = (Duration::ZERO, String::new());
    for _ in 0..threads.div_ceil(PAGE) {
        let body = format!(r#"{{"request":{{"limit":{PAGE}{after}}}}}"#);
        let began = Instant::now();
        let response = world.rest.call("threadkeep_list", body).await;
        waited += began.elapsed();
        let response: Response<'_> = serde_json::from_slice(&response).unwrap();
        let Row { key, version } = response.rows.last().unwrap();
        after = format!(r#","after_version":"{version}","after_key":"{key}""#);
    }
    waited
}
