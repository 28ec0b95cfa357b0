//! Random schedules of puts, removes, updates and gets by two handles that share a store, under outages,
//! restarts, evictions and clocks that are wrong; a model of what was acknowledged judges what they saw and what is left.
//!
//! A seed decides what is done and what goes wrong; which call overtakes which is up to real time, so a seed that failed
//! may need a few runs to fail again. The first replays a seed, the second is a longer run:
//!
//! ```sh
//! MODEL_SEED=… MODEL_REPEAT=20 cargo test --all-features --test model -- --nocapture no_schedule
//! MODEL_OPERATIONS=1000000 cargo test --release --all-features --test model -- --nocapture no_schedule
//! ```
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[macro_use]
#[path = "../stack/mod.rs"]
mod stack;

mod daemon;
mod history;
mod oracle;
mod plan;
mod planted;
mod queue;
mod remote;
mod run;
mod supabase;
mod world;

use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt;

use history::{Act, History, Outcome};
use plan::Plan;
use planted::Bug;
use stack::Server;
use supabase::Database;
use world::{InMemory, World};

const OPERATIONS: usize = 20_000;
/// Operations in one world, and worlds at once.
const OF_A_WORLD: usize = 1_000;
const AT_ONCE: usize = 10;
const WORLDS_ON_POSTGRESQL: u64 = 4;
const OF_A_WORLD_ON_POSTGRESQL: usize = 300;

fn setting(name: &str) -> Option<usize> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// The seeds to try: one that is asked for, again and again, or new ones.
fn seeds() -> Vec<u64> {
    if let Some(seed) = setting("MODEL_SEED") {
        return vec![seed as u64; setting("MODEL_REPEAT").unwrap_or(1)];
    }
    let first = fastrand::u64(..1 << 40);
    let worlds = setting("MODEL_OPERATIONS").unwrap_or(OPERATIONS).div_ceil(OF_A_WORLD);
    println!("seeds {first} to {}", first + worlds as u64 - 1);
    (first..).take(worlds).collect()
}

/// One world: its history, or what is wrong with it.
async fn try_seed(seed: u64, operations: usize, world: Arc<dyn World>) -> Result<History, String> {
    let plan = Plan::new(seed, operations);
    let history = run::run(&plan, Arc::clone(&world)).await;
    let outcome = history.and_then(|history| match oracle::violation(&history) {
        Some((key, violation)) => {
            Err(violation + &key.map_or_else(String::new, |key| world.journal(&world.name(key))))
        }
        None => Ok(history),
    });
    outcome.map_err(|what| format!("MODEL_SEED={seed}: {what}\n  {:?}", plan.settings))
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
    refused_reads: usize,
    dead_letters: usize,
}

impl Tally {
    fn add(&mut self, history: &History) {
        self.worlds += 1;
        self.operations += history.ops.len();
        self.dead_letters += history.dead.len();
        for op in &history.ops {
            *match &op.act {
                Act::Read(Ok(_)) => &mut self.reads,
                Act::Read(Err(_)) => &mut self.refused_reads,
                Act::Write(write) => match write.outcome {
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
async fn no_schedule_breaks_a_promise() {
    let worlds = seeds().into_iter().map(|seed| try_seed(seed, OF_A_WORLD, Arc::new(InMemory::new(None))));
    judge(worlds).await;
}

/// Runs worlds side by side; says what happened, and fails where something was wrong.
async fn judge<W>(worlds: impl Iterator<Item = W>)
where
    W: Future<Output = Result<History, String>> + Send + 'static,
{
    let began = Instant::now();
    let mut worlds = futures::stream::iter(worlds.map(tokio::spawn)).buffer_unordered(AT_ONCE);
    let (mut tally, mut violations) = (Tally::default(), Vec::new());
    while let Some(history) = worlds.next().await {
        match history.unwrap() {
            Ok(history) => tally.add(&history),
            Err(violation) => violations.push(violation),
        }
    }
    println!("{tally:?} in {:.1?}", began.elapsed());
    assert!(violations.is_empty(), "{} worlds: {}", violations.len(), violations.join("\n\n"));
}

/// Some schedules on real PostgreSQL, through the gateways of two daemons.
async fn nor_does_one_on_postgresql(server: Server) {
    let first = setting("MODEL_SEED").map_or_else(|| fastrand::u64(..1 << 40), |seed| seed as u64);
    println!("seeds {first} to {} on {server:?}", first + WORLDS_ON_POSTGRESQL - 1);
    let worlds = (first..).take(WORLDS_ON_POSTGRESQL as usize).map(|seed| async move {
        let world = Database::new(server, Plan::new(seed, 0).settings.skews).await;
        try_seed(seed, OF_A_WORLD_ON_POSTGRESQL, Arc::new(world)).await
    });
    judge(worlds).await;
}

on_each_server!(nor_does_one_on_postgresql);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_planted_bug_is_noticed() {
    // Each hunt ends with the first that notices; how soon that is depends on how busy the machine is.
    const WORLDS: u64 = 80;
    let hunts = Bug::ALL.map(|bug| async move {
        for seed in 0..WORLDS {
            let world = Arc::new(InMemory::new(Some(bug)));
            if let Err(what) = tokio::spawn(try_seed(seed, 500, world)).await.unwrap() {
                return (bug, Some((seed, what.lines().next().unwrap_or_default().to_owned())));
            }
        }
        (bug, None)
    });
    let found: Vec<_> = futures::stream::iter(hunts).buffer_unordered(AT_ONCE).collect().await;
    found.iter().for_each(|(bug, found)| println!("{bug:?}: {found:?}"));
    let missed: Vec<_> = found.iter().filter(|(_, found)| found.is_none()).map(|(bug, _)| bug).collect();
    assert!(missed.is_empty(), "not noticed in {WORLDS} worlds each: {missed:?}");
}
