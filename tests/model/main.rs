//! Random schedules of puts, removes, updates and gets by two handles that share a store.
//!
//! The schedules include outages, up to 20 restarts with and without an outage file, evictions, and clocks that are wrong or
//! jump. Another client writes and deletes by plain SQL. An operator restores, copies and deletes outage files. An oracle
//! compares the acknowledged writes with the results of the reads and with the final documents.
//!
//! A seed decides the operations and the faults. Real time decides the order of concurrent calls, and the clock of the
//! process jumps at random, so a failed seed may need a few runs to fail again. The first command replays a seed, the second
//! command runs longer, and the third command hunts one planted bug:
//!
//! ```sh
//! MODEL_SEED=… MODEL_REPEAT=20 cargo test --all-features --test model -- --nocapture schedule_in_memory
//! MODEL_OPERATIONS=1000000 cargo test --release --all-features --test model -- --nocapture schedule_in_memory
//! MODEL_BUG=KeepsRunOverUpsert cargo test --all-features --test model -- --nocapture oracle_notices
//! ```
//!
//! `MODEL_BUG` without `oracle_notices` runs the worlds of a bug without the bug.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[macro_use]
#[path = "../stack/mod.rs"]
mod stack;

mod clocks;
mod daemon;
mod files;
mod history;
mod oracle;
mod plan;
mod planted;
mod queue;
mod remote;
mod run;
mod store;
mod supabase;
mod world;

use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;

use history::{History, OpKind, Outcome};
use plan::Plan;
use planted::Bug;
use stack::Server;
use supabase::Database;
use world::{InMemory, World};

const OPERATIONS: usize = 12_000;
const OPERATIONS_PER_WORLD: usize = 1_000;
const MAX_CONCURRENT_WORLDS: usize = 10;
const WORLDS_ON_POSTGRESQL: u64 = 4;
const OPERATIONS_PER_POSTGRESQL_WORLD: usize = 300;

fn env_number(name: &str) -> Option<usize> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Returns the planted bug `MODEL_BUG`. Its worlds are the only ones then; the schedules have the worlds without the bug.
fn focus() -> Option<Bug> {
    let name = std::env::var("MODEL_BUG").ok()?;
    Some(Bug::ALL.into_iter().find(|bug| format!("{bug:?}") == name).unwrap())
}

/// Returns `MODEL_SEED`, `MODEL_REPEAT` times, or else new seeds.
fn seeds() -> Vec<u64> {
    if let Some(seed) = env_number("MODEL_SEED") {
        return vec![seed as u64; env_number("MODEL_REPEAT").unwrap_or(1)];
    }
    let first = fastrand::u64(..1 << 40);
    let worlds = env_number("MODEL_OPERATIONS").unwrap_or(OPERATIONS).div_ceil(OPERATIONS_PER_WORLD);
    println!("seeds {first} to {}", first + worlds as u64 - 1);
    (first..).take(worlds).collect()
}

/// Runs one world. Returns its history.
///
/// # Errors
/// The first violation, with the seed and the settings.
async fn try_seed(
    seed: u64,
    operations: usize,
    focus: Option<Bug>,
    world: Arc<dyn World>,
) -> Result<History, String> {
    clocks::start_jumps();
    let plan = Plan::new(seed, operations, |settings| {
        focus.iter().for_each(|bug| bug.focus(settings));
        settings.has_operator &= world.takes_copied_files();
    });
    let history = run::run(&plan, Arc::clone(&world)).await;
    let outcome = history.and_then(|history| match oracle::violation(&history) {
        Some((key, violation)) => {
            Err(violation + &key.map_or_else(String::new, |key| world.journal(&world.thread_id(key))))
        }
        None => Ok(history),
    });
    outcome.map_err(|message| format!("MODEL_SEED={seed}: {message}\n  {:?}", plan.settings))
}

#[derive(Debug, Default)]
struct Tally {
    worlds: usize,
    operations: usize,
    stored: usize,
    superseded: usize,
    queued: usize,
    failed: usize,
    unknown: usize,
    reads: usize,
    failed_reads: usize,
    dead_letters: usize,
}

impl Tally {
    fn add(&mut self, history: &History) {
        self.worlds += 1;
        self.operations += history.ops.len();
        self.dead_letters += history.dead_letters.len();
        for op in &history.ops {
            *match &op.kind {
                OpKind::Read(Ok(_)) => &mut self.reads,
                OpKind::Read(Err(_)) => &mut self.failed_reads,
                OpKind::Write(write) => match write.outcome {
                    Outcome::Stored => &mut self.stored,
                    Outcome::Superseded => &mut self.superseded,
                    Outcome::Queued => &mut self.queued,
                    Outcome::Failed(_) => &mut self.failed,
                    Outcome::Unknown => &mut self.unknown,
                },
            } += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn schedule_in_memory_keeps_every_promise() {
    let focus = focus();
    let worlds = seeds()
        .into_iter()
        .map(|seed| try_seed(seed, OPERATIONS_PER_WORLD, focus, Arc::new(InMemory::new(None))));
    run_worlds(worlds).await;
}

/// Runs worlds concurrently, prints their tally and fails on any violation.
async fn run_worlds<W>(worlds: impl Iterator<Item = W>)
where
    W: Future<Output = Result<History, String>> + Send + 'static,
{
    let began = Instant::now();
    let mut worlds = futures::stream::iter(worlds.map(tokio::spawn)).buffer_unordered(MAX_CONCURRENT_WORLDS);
    let (mut tally, mut violations) = (Tally::default(), Vec::new());
    while let Some(history) = worlds.next().await {
        match history.unwrap() {
            Ok(history) => tally.add(&history),
            Err(violation) => violations.push(violation),
        }
    }
    println!("{tally:?} in {:.1?}", began.elapsed());
    assert!(
        violations.is_empty(),
        "{} worlds with a violation: {}",
        violations.len(),
        violations.join("\n\n")
    );
}

/// Runs some schedules on real PostgreSQL, through the gateways of two daemons.
async fn schedule_on_postgresql_keeps_every_promise(server: Server) {
    let first = env_number("MODEL_SEED").map_or_else(|| fastrand::u64(..1 << 40), |seed| seed as u64);
    println!("seeds {first} to {} on {server:?}", first + WORLDS_ON_POSTGRESQL - 1);
    let worlds = (first..).take(WORLDS_ON_POSTGRESQL as usize).map(|seed| async move {
        let world = Database::new(server, Plan::new(seed, 0, |_| {}).settings.skews).await;
        try_seed(seed, OPERATIONS_PER_POSTGRESQL_WORLD, None, Arc::new(world)).await
    });
    run_worlds(worlds).await;
}

on_each_server!(schedule_on_postgresql_keeps_every_promise);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oracle_notices_every_planted_bug() {
    // Each hunt ends at the first violation. The number of worlds until then depends on the load of the machine.
    const MAX_WORLDS: u64 = 1_000;
    let bugs = focus().map_or(Bug::ALL.to_vec(), |bug| vec![bug]);
    let hunts = bugs.into_iter().map(|bug| async move {
        for seed in 0..MAX_WORLDS {
            let world = Arc::new(InMemory::new(Some(bug)));
            // A document that cannot be decoded ends the world by a panic. That is noticed, too.
            let outcome = tokio::spawn(try_seed(seed, 500, Some(bug), world)).await;
            let outcome = outcome.unwrap_or_else(|panic| Err(format!("panic: {panic}")));
            // A queue that does not empty says nothing about the oracle.
            if let Some(message) = outcome.err().filter(|message| !message.contains("no recovery")) {
                println!("{bug:?}: {}", message.lines().next().unwrap_or_default());
                return (bug, true);
            }
        }
        (bug, false)
    });
    let found: Vec<_> = futures::stream::iter(hunts).buffer_unordered(MAX_CONCURRENT_WORLDS).collect().await;
    let missed: Vec<_> = found.iter().filter(|(_, is_found)| !is_found).map(|(bug, _)| bug).collect();
    assert!(missed.is_empty(), "the oracle noticed no violation in {MAX_WORLDS} worlds each: {missed:?}");
}
