//! Measures puts on the real stack.

use std::time::Duration;

use threadkeep::store::Clock;
use threadkeep::{Cache, WriteOutcome};

use crate::pgbench;
use crate::rest::{Bodies, Rest, apply_body};
use crate::table::Goal::{AtLeast, AtMost};
use crate::table::{Table, Unit};
use crate::work::{
    Conversation, at_a_rate, by_tasks, conversation, cpu_time_of, one_by_one, per_second, percentile, thread,
};
use crate::world::{KIB, World};

pub const TASKS: usize = 256;
pub const CONVERSATIONS: usize = 10_000;
/// Four concurrent batches share the writes of 256 tasks.
const BATCH: usize = TASKS / 4;

pub async fn put(cache: &Cache, key: &str, value: &Conversation) {
    assert_eq!(cache.put(key, value).await.unwrap(), WriteOutcome::Stored);
}

/// Returns the key of a write. All alternatives write the same conversations repeatedly.
fn key(at: usize) -> String {
    thread(at % CONVERSATIONS)
}

pub async fn by_256_tasks(world: &World) -> Table {
    const BARE: &str = "bare reqwest, prebuilt batches of 64";
    const OLD: &str = "the same batches, functions of revision 2";
    const POST: &str = "one POST per write";
    const PGBENCH: &str = "pgbench, prepared upserts, 16 clients";
    let mut table = Table::new(format!("Puts of 1 KiB, {TASKS} tasks, local file on"), Unit::Rate);
    let cache = world.builder().open().await.unwrap();
    let value = conversation("a conversation", KIB);
    let (many, few) = (world.scale.of(30_000, 500), world.scale.of(6_000, 500));
    let old = world.rest_of_revision_2();
    for _ in 0..world.scale.rounds {
        table.note("threadkeep", per_second(many, puts(&cache, many, &value).await));

        let (count, bodies) = prebuilt(many);
        for (name, rest) in [(BARE, &world.rest), (OLD, &old.1)] {
            table.note(name, per_second(count, rest.call_all("threadkeep_apply", &bodies).await));
        }

        let (rest, one) = (world.rest.clone(), value.clone());
        let post = move |at| {
            let (rest, value) = (rest.clone(), one.clone());
            async move { rest.upsert(&key(at), &value).await }
        };
        table.note(POST, per_second(few, by_tasks(TASKS, few, post).await));

        let span = world.scale.span(Duration::from_secs(3));
        table.note(PGBENCH, pgbench::upserts(world, CONVERSATIONS, &value, span));
    }
    table.claim("threadkeep", AtLeast(0.8), BARE);
    table.claim("threadkeep", AtLeast(1.2), OLD);
    table.claim(BARE, AtLeast(1.4), OLD);
    table.claim("threadkeep", AtLeast(5.0), POST);
    table.claim("threadkeep", AtLeast(2.5), PGBENCH);
    cache.shutdown(Duration::from_secs(60)).await.unwrap();
    table
}

/// Builds the bodies of at least `count` puts. Returns the number of puts in them, too.
fn prebuilt(count: usize) -> (usize, Bodies) {
    let clock = Clock::new();
    let batch = |first| apply_body(&clock, (first..first + BATCH).map(|at| (key(at), KIB)));
    let bodies: Vec<String> = (0..count).step_by(BATCH).map(batch).collect();
    (bodies.len() * BATCH, bodies.into())
}

/// Measures the CPU time of this process, which is the client. Other load of the machine changes it little.
pub async fn cpu_time(world: &World) -> Table {
    const BARE: &str = "bare reqwest, prebuilt batches of 64";
    let mut table = Table::new("CPU time of the client for a put of 1 KiB, 256 tasks", Unit::Span);
    let cache = world.builder().open().await.unwrap();
    let (value, many) = (conversation("a conversation", KIB), world.scale.of(30_000, 500));
    puts(&cache, many, &value).await;
    for _ in 0..world.scale.rounds {
        let took = cpu_time_of(puts(&cache, many, &value)).await;
        table.note_span("threadkeep", took / u32::try_from(many).unwrap());
        let (count, bodies) = prebuilt(many);
        let took = cpu_time_of(world.rest.call_all("threadkeep_apply", &bodies)).await;
        table.note_span(BARE, took / u32::try_from(count).unwrap());
    }
    table.compare("threadkeep", BARE);
    cache.shutdown(Duration::from_secs(60)).await.unwrap();
    table
}

/// Runs puts in [`TASKS`] concurrent tasks and returns the total time.
pub async fn puts(cache: &Cache, count: usize, value: &Conversation) -> Duration {
    let (cache, value) = (cache.clone(), value.clone());
    let put_one = move |at| {
        let (cache, value) = (cache.clone(), value.clone());
        async move { put(&cache, &key(at), &value).await }
    };
    by_tasks(TASKS, count, put_one).await
}

pub async fn at_equal_rate(world: &World) -> Table {
    let mut table = Table::new("Puts of 1 KiB, 1,000 started each second", Unit::Span);
    let cache = world.builder().open().await.unwrap();
    let value = conversation("a conversation", KIB);
    let span = world.scale.span(Duration::from_secs(4));
    for _ in 0..world.scale.rounds {
        let threadkeep = at_a_rate(1_000, span, |at| {
            let (cache, value) = (cache.clone(), value.clone());
            async move { put(&cache, &key(at), &value).await }
        });
        let threadkeep = threadkeep.await;
        let post = at_a_rate(1_000, span, |at| {
            let (rest, value) = (world.rest.clone(), value.clone());
            async move { rest.upsert(&key(at), &value).await }
        });
        let post = post.await;
        for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
            table.note_span(&format!("threadkeep, {name}"), percentile(&threadkeep, share));
            table.note_span(&format!("one POST per write, {name}"), percentile(&post, share));
        }
    }
    for name in ["p50", "p99"] {
        table.claim(&format!("threadkeep, {name}"), AtMost(1.0), &format!("one POST per write, {name}"));
    }
    cache.shutdown(Duration::from_secs(60)).await.unwrap();
    table
}

/// Measures puts of one task, one after the other.
pub async fn alone(world: &World) -> Table {
    const POST: &str = "one POST of the same function";
    let mut table = Table::new("A lone put of 1 KiB", Unit::Span);
    let cache = world.builder().open().await.unwrap();
    let (value, count) = (conversation("a conversation", KIB), world.scale.of(1_000, 20));
    for _ in 0..world.scale.rounds {
        table
            .note_span("threadkeep", one_by_one(count, async |at| put(&cache, &key(at), &value).await).await);
        table.note_span(POST, one_by_one(count, posts(&world.rest, KIB)).await);
    }
    table.claim("threadkeep", AtMost(1.25), POST);
    cache.shutdown(Duration::from_secs(60)).await.unwrap();
    table
}

/// Calls the function `threadkeep_apply` with one record each time.
pub fn posts(rest: &Rest, bytes: usize) -> impl AsyncFnMut(usize) {
    let clock = Clock::new();
    async move |at| {
        let body = apply_body(&clock, std::iter::once((key(at), bytes)));
        rest.call("threadkeep_apply", body).await;
    }
}
