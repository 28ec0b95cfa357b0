//! The kill test kills the daemon at random moments, under load, on a real stack, in all network states. At the end the
//! database contains every acknowledged turn exactly once.
//!
//! `KILL_COUNT=500 cargo test --all-features --test kill -- --nocapture` kills more often. The test prints its seed.
//! `KILL_SEED=…` repeats the kills, network states and clients, but not the races. `KILL_NETWORK=up,hanging` selects
//! network states.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod chaos;
mod clients;
mod ledger;
mod network;
mod oracle;
#[path = "../daemon/process.rs"]
mod process;
#[path = "../stack/mod.rs"]
mod stack;

use std::time::{Duration, Instant};

use chaos::Chaos;
use clients::World;
use ledger::Counts;
use network::NetworkState;
use oracle::{Message, Rows, judge};
use process::Daemon;
use serde_json::Value;
use stack::{Gateway, Server, Stack};

const DEFAULT_KILLS: usize = 100;
/// The limit for the replay of the whole queue on a healthy stack.
const MAX_REPLAY_TIME: Duration = Duration::from_secs(60);

/// The parameters of the test, from the environment.
struct Plan {
    seed: u64,
    kills: usize,
    states: Vec<NetworkState>,
}

impl Plan {
    fn from_env() -> Self {
        let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
        let states = std::env::var("KILL_NETWORK").ok();
        Self {
            seed: number("KILL_SEED").unwrap_or_else(|| fastrand::u64(..)),
            kills: number("KILL_COUNT").map_or(DEFAULT_KILLS, |kills| kills as usize),
            states: states.map_or(NetworkState::ALL.to_vec(), |names| {
                names.split(',').map(NetworkState::named).collect()
            }),
        }
    }
}

/// Starts a daemon with a short timeout, so that it detects outages fast, and a short freshness time.
async fn start_daemon(gateway: &Gateway) -> Daemon {
    let (url, key) = (gateway.url(), gateway.keys().secret);
    Daemon::start(&[
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", &url),
        ("SUPABASE_KEY", &key),
        ("SUPABASE_TIMEOUT_SECONDS", "0.5"),
        ("CONVERSATION_SOFT_TIMEOUT_SECONDS", "0.2"),
        ("CONVERSATION_FRESH_SECONDS", "1"),
    ])
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemon_killed_anytime_keeps_each_acknowledged_turn_once() {
    let plan = Plan::from_env();
    println!("KILL_SEED={} KILL_COUNT={}", plan.seed, plan.kills);
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    let gateway = stack.gateway().await;
    let daemon = start_daemon(&gateway).await;
    let world = World::new(daemon.clone_client());
    let mut chaos = Chaos::new(world.clone(), &gateway, daemon, plan.seed, &plan.states);

    let started = Instant::now();
    let clients = clients::spawn_all(&world, plan.seed);
    chaos.kill_repeatedly(plan.kills).await;
    world.stop();
    clients.join_all().await;
    println!("{:.1?}, kills: {:?}\n{}", started.elapsed(), chaos.kills, world.ledger().counts);
    chaos.assert_no_violation("during the test");

    let drained = chaos.wait_until_drained().await;
    println!("the queue was empty after {drained:.1?}");
    // After the restart the daemon answers from the database: the queue is empty.
    chaos.daemon.kill().await;
    chaos.daemon.restart().await;
    let rows = conversations(stack).await;
    chaos.compare_answers(&rows).await;
    let faults = judge(&world.ledger(), &rows);
    chaos.assert_none("at the end", &faults);
    assert_every_outcome_occurred(&plan, &world.ledger().counts);
}

/// Reads the conversations with plain SQL, without the library.
async fn conversations(stack: &Stack) -> Rows {
    let query = "select thread_id, conversation_data::text from conversation_threads
                 where expires_at > now() and conversation_data <> 'null'";
    let rows = stack.sql().await.query(query, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), messages(row.get(1)))).collect()
}

fn messages(json: &str) -> Vec<Message> {
    let mut value: Value = serde_json::from_str(json).unwrap();
    serde_json::from_value(value["messages"].take()).unwrap_or_else(|error| panic!("{error} in {json}"))
}

impl Chaos<'_> {
    /// Waits until replay has sent the whole queue to the database.
    async fn wait_until_drained(&mut self) -> Duration {
        let started = Instant::now();
        let mut health = Value::Null;
        while started.elapsed() < MAX_REPLAY_TIME {
            self.daemon.assert_running();
            health = self.daemon.request("GET", "/healthz", None).await.body;
            match (&health["queue"], health["queue"]["records"].as_u64()) {
                // A daemon without a queue must not answer `queued`.
                (Value::Null, _) if self.world.ledger().counts.queued == 0 => return started.elapsed(),
                (queue, Some(0)) if queue["dead_letters"] == 0 => return started.elapsed(),
                (_, Some(0)) => break,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        self.assert_none("after the last kill", &[format!("the queue is not empty: {health}")]);
        unreachable!("assert_none panics");
    }

    /// Checks that a restarted daemon returns exactly the contents of the database.
    async fn compare_answers(&self, rows: &Rows) {
        let known: Vec<String> = self.world.ledger().conversations.keys().cloned().collect();
        for id in known.iter().chain(rows.keys().filter(|id| !known.contains(id))) {
            let answer = self.world.read(id).await;
            if answer.as_ref() != rows.get(id) {
                self.world
                    .report(format!("{id}: the daemon returns {answer:?}, the database {:?}", rows.get(id)));
            }
        }
    }

    fn assert_no_violation(&self, when: &str) {
        let violations = self.world.ledger().violations.clone();
        self.assert_none(when, &violations);
    }

    /// Panics with the faults, the end of the log and the last steps, unless there is no fault.
    fn assert_none(&self, when: &str, faults: &[String]) {
        let log = self.daemon.log();
        let has_panicked = log.contains("panicked at");
        if faults.is_empty() && !has_panicked {
            return;
        }
        if let Some(path) = std::env::var_os("KILL_LOG") {
            std::fs::write(path, &log).unwrap();
        }
        let lines: Vec<&str> = log.lines().collect();
        panic!(
            "{when}, {} faults (the daemon has panicked: {has_panicked}):\n{}\n\nthe end of the daemon's log:\n{}\n\n\
             the last steps:\n{}\n\nrepeat with KILL_SEED, printed above",
            faults.len(),
            faults[..faults.len().min(40)].join("\n"),
            lines[lines.len().saturating_sub(60)..].join("\n"),
            self.steps[self.steps.len().saturating_sub(60)..].join("\n"),
        );
    }
}

/// Checks that every outcome occurred. A run without queued writes, for example, proves nothing.
fn assert_every_outcome_occurred(plan: &Plan, counts: &Counts) {
    if plan.kills < DEFAULT_KILLS || plan.states != NetworkState::ALL {
        return;
    }
    let reads = |kind: &str| counts.reads.get(kind).copied().unwrap_or(0);
    let Counts { stored, queued, unknown, failed, started, deleted, .. } = *counts;
    let occurred =
        [stored, queued, unknown, failed, started, deleted, reads("fresh"), reads("queued"), reads("stale")];
    assert!(occurred.iter().all(|count| *count > 0), "an outcome did not occur: {counts}");
}
