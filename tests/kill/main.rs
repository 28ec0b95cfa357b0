//! The kill test: the daemon under load on a real stack is killed at random moments in all weathers. In the end every
//! acknowledged turn is in the database, and none is there twice.
//!
//! `KILL_COUNT=500 cargo test --all-features --test kill -- --nocapture` kills more often. A failure prints its seed;
//! `KILL_SEED=…` makes the same kills, weathers and clients again, though not the same races.
//! `KILL_WEATHER=up,hanging` narrows the weathers down.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod chaos;
mod clients;
mod ledger;
mod oracle;
#[path = "../daemon/process.rs"]
mod process;
#[path = "../stack/mod.rs"]
mod stack;

use std::time::{Duration, Instant};

use chaos::{Chaos, Weather};
use clients::World;
use ledger::Counts;
use oracle::{Message, Rows, judge};
use process::Daemon;
use serde_json::Value;
use stack::{Gateway, Server, Stack};

const KILLS: usize = 100;
/// How long a healthy stack may take to get all that is queued.
const REPLAY: Duration = Duration::from_secs(60);

/// What the environment asks for.
struct Plan {
    seed: u64,
    kills: usize,
    weathers: Vec<Weather>,
}

impl Plan {
    fn from_env() -> Self {
        let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
        let weathers = std::env::var("KILL_WEATHER").ok();
        Self {
            seed: number("KILL_SEED").unwrap_or_else(|| fastrand::u64(..)),
            kills: number("KILL_COUNT").map_or(KILLS, |kills| kills as usize),
            weathers: weathers
                .map_or(Weather::ALL.to_vec(), |names| names.split(',').map(Weather::named).collect()),
        }
    }
}

/// A daemon that notices outages fast and soon asks again whether what it has in memory is fresh.
async fn start_daemon(gateway: &Gateway) -> Daemon {
    let (url, key) = (gateway.url(), gateway.keys().secret);
    Daemon::start(&[
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", &url),
        ("SUPABASE_KEY", &key),
        ("SUPABASE_TIMEOUT_SECONDS", "0.5"),
        ("CONVERSATION_PATIENCE_SECONDS", "0.2"),
        ("CONVERSATION_FRESH_SECONDS", "1"),
    ])
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_killed_when_every_acknowledged_turn_is_kept_and_none_is_doubled() {
    let plan = Plan::from_env();
    println!("KILL_SEED={} KILL_COUNT={}", plan.seed, plan.kills);
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    let gateway = stack.gateway().await;
    let daemon = start_daemon(&gateway).await;
    let world = World::new(daemon.clone_client());
    let mut chaos = Chaos::new(world.clone(), &gateway, daemon, plan.seed, &plan.weathers);

    let began = Instant::now();
    let clients = clients::spawn_all(&world, plan.seed);
    chaos.rage(plan.kills).await;
    world.end();
    clients.join_all().await;
    println!("{:.1?}, kills: {:?}\n{}", began.elapsed(), chaos.kills, world.ledger().counts);
    chaos.assert_sound("while it lasted");

    let drained = chaos.wait_until_drained().await;
    println!("the queue was empty after {drained:.1?}");
    // What it answers from now on comes from the database.
    chaos.daemon.kill().await;
    chaos.daemon.restart().await;
    let rows = conversations(stack).await;
    chaos.compare_answers(&rows).await;
    let faults = judge(&world.ledger(), &rows);
    chaos.assert_none("in the end", &faults);
    assert_everything_happened(&plan, &world.ledger().counts);
}

/// What the database holds, without asking anything of ours.
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
    /// Waits until the database has all that the daemon has taken in.
    async fn wait_until_drained(&mut self) -> Duration {
        let began = Instant::now();
        let mut health = Value::Null;
        while began.elapsed() < REPLAY {
            self.daemon.assert_running();
            health = self.daemon.request("GET", "/healthz", None).await.body;
            match (&health["queue"], health["queue"]["records"].as_u64()) {
                // It has no queue, and then must not have said `queued`.
                (Value::Null, _) if self.world.ledger().counts.queued == 0 => return began.elapsed(),
                (queue, Some(0)) if queue["dead_letters"] == 0 => return began.elapsed(),
                (_, Some(0)) => break,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        self.assert_none("after the last kill", &[format!("the queue is not empty: {health}")]);
        unreachable!("it was not");
    }

    /// A daemon that starts anew tells what the database holds, and nothing else.
    async fn compare_answers(&self, rows: &Rows) {
        let known: Vec<String> = self.world.ledger().conversations.keys().cloned().collect();
        for id in known.iter().chain(rows.keys().filter(|id| !known.contains(id))) {
            let told = self.world.read(id).await;
            if told.as_ref() != rows.get(id) {
                self.world
                    .complain(format!("{id}: the daemon tells {told:?}, the database {:?}", rows.get(id)));
            }
        }
    }

    fn assert_sound(&self, when: &str) {
        let complaints = self.world.ledger().complaints.clone();
        self.assert_none(when, &complaints);
    }

    /// Panics with all that helps to find out why.
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
            "{when}, {} faults (the daemon has panicked: {has_panicked}):\n{}\n\nthe daemon's last words:\n{}\n\n\
             what was done:\n{}\n\nreplay with KILL_SEED, printed above",
            faults.len(),
            faults[..faults.len().min(40)].join("\n"),
            lines[lines.len().saturating_sub(60)..].join("\n"),
            self.diary[self.diary.len().saturating_sub(60)..].join("\n"),
        );
    }
}

/// A test in which nothing was queued, say, would prove nothing.
fn assert_everything_happened(plan: &Plan, counts: &Counts) {
    if plan.kills < KILLS || plan.weathers != Weather::ALL {
        return;
    }
    let reads = |kind: &str| counts.reads.get(kind).copied().unwrap_or(0);
    let Counts { stored, queued, unknown, failed, started, deleted, .. } = *counts;
    let happened =
        [stored, queued, unknown, failed, started, deleted, reads("fresh"), reads("queued"), reads("stale")];
    assert!(happened.iter().all(|count| *count > 0), "too little happened: {counts}");
}
