//! Eight daemon processes append to hot conversations and update them, on one real stack, during network faults and kills. At the
//! end each acknowledged write is in the database exactly once, in the order of its daemon.
//!
//! `DAEMONS_APPENDS=20000 cargo test --all-features --test daemons -- --nocapture` makes more appends, and a quarter as many updates.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod daemon;
mod judge;
mod log;
#[path = "../kill/network.rs"]
mod network;
#[path = "../stack/mod.rs"]
mod stack;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use daemon::{Document, Orders};
use fastrand::Rng;
use judge::{Counts, judge};
use log::Line;
use network::NetworkState;
use stack::{Gateway, Server, Stack};
use tokio::process::Child;

const DAEMONS: usize = 8;
const CONVERSATIONS: usize = 50;
const DEFAULT_APPENDS: usize = 2_000;
/// The limit for the replay of all queues on a healthy stack.
const MAX_REPLAY_TIME: Duration = Duration::from_secs(300);

fn key(conversation: usize) -> String {
    format!("hot-{conversation}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the test below runs it in separate processes"]
async fn daemon_process() {
    daemon::end_with_parent();
    let orders = std::env::var("DAEMON_ORDERS").unwrap();
    daemon::run(serde_json::from_str(&orders).unwrap()).await;
}

/// A daemon with its present process.
struct Running {
    orders: Orders,
    child: Child,
}

impl Running {
    fn start(orders: Orders) -> Self {
        Self { child: daemon::spawn(&orders, "daemon_process"), orders }
    }

    /// Kills the process and starts the next one, unless the daemon has finished its share.
    async fn kill(&mut self) -> bool {
        self.assert_well();
        if self.has_finished() {
            return false;
        }
        self.child.kill().await.unwrap();
        self.child = daemon::spawn(&self.orders, "daemon_process");
        true
    }

    fn has_finished(&self) -> bool {
        Line::read_all(&self.orders.directory).contains(&Line::Finished)
    }

    fn assert_well(&mut self) {
        let status = self.child.try_wait().unwrap();
        let is_well = status.is_none_or(|status| status.success());
        assert!(is_well, "daemon {} ended: {}", self.orders.number, self.output());
    }

    async fn wait(&mut self) {
        // A wait would close it, and so end the daemon.
        let _stdin = self.child.stdin.take();
        let ended = tokio::time::timeout(MAX_REPLAY_TIME, self.child.wait()).await;
        assert!(ended.is_ok(), "daemon {} does not empty its queue: {}", self.orders.number, self.output());
        self.assert_well();
    }

    fn output(&self) -> String {
        std::fs::read_to_string(self.orders.directory.join("output")).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_of_eight_killed_daemons_are_all_kept_once_in_order() {
    let appends = std::env::var("DAEMONS_APPENDS").map_or(DEFAULT_APPENDS, |text| text.parse().unwrap());
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    let (gateway, directory) = (stack.gateway().await, tempfile::tempdir().unwrap());
    let orders = |number: usize| {
        let directory = directory.path().join(number.to_string());
        std::fs::create_dir(&directory).unwrap();
        let (url, secret, appends) = (gateway.url(), gateway.keys().secret, appends.div_ceil(DAEMONS));
        Orders { number, directory, url, secret, appends, updates: appends.div_ceil(4) }
    };
    let mut daemons: Vec<Running> = (0..DAEMONS).map(|number| Running::start(orders(number))).collect();
    let started = Instant::now();
    let kills = disturb(&gateway, &mut daemons).await;
    let (disturbed, drain_started) = (started.elapsed(), Instant::now());
    for daemon in &mut daemons {
        daemon.wait().await;
    }
    let drained = drain_started.elapsed();
    let logs: Vec<Vec<Line>> =
        daemons.iter().map(|daemon| Line::read_all(&daemon.orders.directory)).collect();
    let (faults, counts) = judge(&logs, &documents(stack).await);
    let Counts { stored, queued, refused, dead } = counts;
    println!("{kills} kills in {disturbed:.1?}, then the queues were empty after {drained:.1?}");
    println!("writes: {stored} stored, {queued} queued, {refused} refused; {dead} dead letters of updates");
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults[..faults.len().min(40)].join("\n"));
    assert!(kills > 0 && queued > 0 && stored > 0, "the test has shown too little");
}

/// Changes the network and kills daemons until all have finished. Returns the number of kills.
async fn disturb(gateway: &Gateway, daemons: &mut [Running]) -> usize {
    let (mut rng, mut kills) = (Rng::new(), 0);
    while !daemons.iter().all(Running::has_finished) {
        let outage = NetworkState::ALL[rng.usize(..NetworkState::ALL.len())];
        for state in [NetworkState::Up, outage] {
            gateway.forget();
            state.apply(gateway, rng.fork()).await;
            for _ in 0..rng.usize(1..4) {
                tokio::time::sleep(Duration::from_millis(rng.u64(100..600))).await;
                kills += usize::from(daemons[rng.usize(..DAEMONS)].kill().await);
            }
        }
    }
    gateway.forget();
    NetworkState::Up.apply(gateway, rng).await;
    kills
}

/// Reads the conversations with plain SQL, without the library.
async fn documents(stack: &Stack) -> BTreeMap<String, Document> {
    let query =
        "select thread_id, conversation_data::text from conversation_threads where thread_id like 'hot-%'";
    let rows = stack.sql().await.query(query, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), serde_json::from_str(row.get(1)).unwrap())).collect()
}
