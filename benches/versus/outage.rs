//! Measures reads and writes during an outage, and the replay after it.

use std::time::{Duration, Instant};

use rusqlite::OpenFlags;
use threadkeep::testing::{Fault, Faults};
use threadkeep::{Cache, Freshness, WriteOutcome};

use crate::hits::each;
use crate::table::Goal::{AtLeast, AtMost};
use crate::table::{Table, Unit};
use crate::work::{
    Conversation, at_a_rate, by_tasks, conversation, one_by_one, per_second, percentile, thread,
};
use crate::world::{KIB, World};
use crate::writes::{CONVERSATIONS, put, puts};

/// Starts an outage and waits until the breaker is open.
pub async fn start_outage(cache: &Cache, faults: &Faults) {
    faults.always(Fault::Refuse);
    while cache.health().is_available() {
        let _ = cache.get("nobody has this id").await;
    }
}

/// Queues `count` puts in `tasks` concurrent tasks and returns the total time.
pub async fn queue(
    cache: &Cache,
    tasks: usize,
    count: usize,
    threads: usize,
    value: &Conversation,
) -> Duration {
    let (cache, value) = (cache.clone(), value.clone());
    let put = move |at: usize| {
        let (cache, value) = (cache.clone(), value.clone());
        async move { assert_eq!(cache.put(thread(at % threads), &value).await.unwrap(), WriteOutcome::Queued) }
    };
    by_tasks(tasks, count, put).await
}

pub async fn hits(world: &World) -> Table {
    let threads = world.scale.of(10_000, 500);
    let mut table = Table::new(format!("Hits in an outage, {threads} conversations of 1 KiB"), Unit::Span);
    world.seed(threads, KIB).await;
    let keys: Vec<String> = (0..threads).map(thread).collect();
    let value = conversation("a conversation", KIB);
    let (builder, _) = world.builder_with_faults();
    let healthy = builder.fresh_for(Duration::from_secs(86_400)).open().await.unwrap();
    let mut caches = vec![(healthy, "fresh", None)];
    for name in ["stale, breaker open", "queued, breaker open"] {
        let (builder, faults) = world.builder_with_faults();
        caches.push((builder.fresh_for(Duration::ZERO).open().await.unwrap(), name, Some(faults)));
    }
    for (cache, name, faults) in &caches {
        for key in &keys {
            cache.get(key).await.unwrap().unwrap();
        }
        if let Some(faults) = faults {
            start_outage(cache, faults).await;
        }
        if name.starts_with("queued") {
            queue(cache, 64, threads, threads, &value).await;
        }
    }
    let gets = world.scale.of(100_000, 1_000);
    for _ in 0..world.scale.of(25, 2) {
        for (cache, name, _) in &caches {
            let span = each(&keys, gets, async |key| {
                let freshness = cache.get(key).await.unwrap().unwrap().freshness();
                assert_eq!(freshness == Freshness::Fresh, *name == "fresh");
                assert_eq!(freshness == Freshness::Queued, name.starts_with("queued"));
            });
            table.note_span(name, span);
        }
    }
    table.claim("stale, breaker open", AtMost(1.1), "fresh");
    table.compare("queued, breaker open", "fresh");
    table
}

pub async fn queued_puts(world: &World) -> Table {
    const SYNCED: &str = "one synced SQLite commit per write";
    const ALONE: &str = "threadkeep, 1 task";
    const MANY: &str = "threadkeep, 64 tasks";
    let mut table = Table::new("Puts of 1 KiB with the breaker open", Unit::Rate);
    let (builder, faults) = world.builder_with_faults();
    let cache = builder.open().await.unwrap();
    start_outage(&cache, &faults).await;
    let raw = rusqlite::Connection::open(world.file()).unwrap();
    raw.execute_batch(
        "pragma journal_mode = wal; pragma synchronous = full; create table t (key text primary key, value text)",
    )
    .unwrap();
    let mut insert = raw.prepare("insert or replace into t values (?1, ?2)").unwrap();
    let value = conversation("a conversation", KIB);
    let (few, many) = (world.scale.of(3_000, 50), world.scale.of(40_000, 200));
    for _ in 0..world.scale.rounds {
        let began = Instant::now();
        for at in 0..few {
            let json = serde_json::to_string(&value).unwrap();
            insert.execute((thread(at % 1_000), json)).unwrap();
        }
        table.note(SYNCED, per_second(few, began.elapsed()));
        table.note(ALONE, per_second(few, queue(&cache, 1, few, 1_000, &value).await));
        table.note(MANY, per_second(many, queue(&cache, 64, many, 1_000, &value).await));
    }
    table.claim(MANY, AtLeast(8.0), SYNCED);
    table.compare(ALONE, SYNCED);
    table
}

/// Measures gets that only the replica can answer.
pub async fn cold_gets(world: &World) -> Table {
    const POINT: &str = "a point read of the same file";
    let threads = world.scale.of(CONVERSATIONS, 200);
    let mut table =
        Table::new(format!("Cold gets with the breaker open, {threads} conversations of 1 KiB"), Unit::Span);
    world.seed(threads, KIB).await;
    let file = world.file();
    let cache = world.builder().queue(&file).open().await.unwrap();
    for at in 0..threads {
        cache.get(thread(at)).await.unwrap().unwrap();
    }
    cache.shutdown(Duration::from_secs(60)).await.unwrap();
    drop(cache);
    for _ in 0..world.scale.rounds {
        let (builder, faults) = world.builder_with_faults();
        let cache = builder.queue(&file).open().await.unwrap();
        start_outage(&cache, &faults).await;
        let get = async |at| {
            let found = cache.get(thread(at * 7919 % threads)).await.unwrap().unwrap();
            assert!(matches!(found.freshness(), Freshness::Stale { .. }));
        };
        table.note_span("threadkeep", one_by_one(threads, get).await);
        cache.shutdown(Duration::from_secs(1)).await.unwrap();

        let raw = rusqlite::Connection::open_with_flags(&file, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
        let mut select =
            raw.prepare("select version, value, expires_at from records where key = ?1").unwrap();
        let read = async |at: usize| {
            let key = thread(at * 7919 % threads);
            let row = |row: &rusqlite::Row<'_>| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?, row.get::<_, i64>(2)?))
            };
            select.query_row([key], row).unwrap();
        };
        table.note_span(POINT, one_by_one(threads, read).await);
    }
    table.claim("threadkeep", AtMost(3.0), POINT);
    table
}

/// Measures the replay of a queue, and live puts during the replay.
pub async fn replay(world: &World) -> Vec<Table> {
    const PUTS: &str = "puts, 256 tasks";
    const REPLAY: &str = "replay, under live puts";
    let records = world.scale.of(100_000, 2_000);
    let mut rates = Table::new(format!("Replay of {records} records of 1 KiB"), Unit::Rate);
    let mut live = Table::new("Live puts of 1 KiB during the replay, 100 a second, p99", Unit::Span);
    let value = conversation("a conversation", KIB);
    for _ in 0..world.scale.rounds {
        let (builder, faults) = world.builder_with_faults();
        let cache = builder.open().await.unwrap();
        let many = world.scale.of(30_000, 500);
        rates.note(PUTS, per_second(many, puts(&cache, many, &value).await));
        let put_live = |at: usize| {
            let (cache, value) = (cache.clone(), value.clone());
            async move { put(&cache, &format!("live-{:04}", at % 1_000), &value).await }
        };
        let span = world.scale.span(Duration::from_secs(4));
        live.note_span("without replay", percentile(&at_a_rate(100, span, put_live).await, 0.99));

        start_outage(&cache, &faults).await;
        queue(&cache, 256, records, records, &value).await;
        faults.clear();
        while !cache.health().is_available() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let queued = || cache.health().queue.unwrap().records as usize;
        // The replay may have begun during the wait, so the rate counts the records from here.
        let (began, at_first) = (Instant::now(), queued());
        let drained = async {
            while queued() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            began.elapsed()
        };
        let live_puts = async {
            let mut spans = Vec::new();
            while queued() > 0 {
                spans.extend(at_a_rate(100, Duration::from_millis(200), put_live).await);
            }
            spans.sort_unstable();
            percentile(&spans, 0.99)
        };
        let (drained, p99) = tokio::join!(drained, live_puts);
        rates.note(REPLAY, per_second(at_first, drained));
        live.note_span("during the replay", p99);
        cache.shutdown(Duration::from_secs(60)).await.unwrap();
    }
    rates.claim(REPLAY, AtLeast(0.7), PUTS);
    live.claim("during the replay", AtMost(2.0), "without replay");
    vec![rates, live]
}
