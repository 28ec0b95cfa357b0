//! Kills the daemon repeatedly while the network changes state.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::clients::World;
use crate::network::NetworkState;
use crate::process::Daemon;
use crate::stack::Gateway;

pub struct Chaos<'a> {
    pub world: Arc<World>,
    pub gateway: &'a Gateway,
    pub daemon: Daemon,
    rng: Rng,
    states: Vec<NetworkState>,
    /// The rest of the shuffled states. Each state occurs before the next shuffle.
    upcoming: Vec<NetworkState>,
    current: NetworkState,
    pub kills: BTreeMap<NetworkState, usize>,
    /// The actions of the test, for the failure report.
    pub steps: Vec<String>,
}

impl<'a> Chaos<'a> {
    /// Creates the generator from a seed. `Up` occurs as often as all other states together.
    pub fn new(
        world: Arc<World>,
        gateway: &'a Gateway,
        daemon: Daemon,
        seed: u64,
        states: &[NetworkState],
    ) -> Self {
        let outages = states.iter().filter(|state| **state != NetworkState::Up).count();
        let ups = if states.contains(&NetworkState::Up) { outages.max(1) } else { 0 };
        let states = std::iter::repeat_n(NetworkState::Up, ups)
            .chain(states.iter().copied().filter(|state| *state != NetworkState::Up))
            .collect();
        Self {
            world,
            gateway,
            daemon,
            rng: Rng::with_seed(seed),
            states,
            upcoming: Vec::new(),
            current: NetworkState::Up,
            kills: BTreeMap::new(),
            steps: Vec::new(),
        }
    }

    /// Kills the daemon `kills` times, or until the first violation. Leaves the daemon running and the network up.
    pub async fn kill_repeatedly(&mut self, kills: usize) {
        for _ in 0..kills {
            let lifetime = self.let_run().await;
            self.kill(lifetime).await;
            if !self.world.ledger().violations.is_empty() {
                break;
            }
        }
        self.daemon.wait_until_ready().await;
        self.change_network(NetworkState::Up).await;
    }

    /// Lets the daemon run for up to 0.4 s. One run in four continues through a network change, long enough for breaker and replay.
    async fn let_run(&mut self) -> String {
        let first = self.wait(400).await;
        if self.rng.u32(0..4) > 0 {
            return format!("{first:?} into {:?}", self.current);
        }
        let before = self.current;
        let next = self.next_state();
        self.change_network(next).await;
        let second = self.wait(2_000).await;
        format!("{first:?} into {before:?} and {second:?} into {next:?}")
    }

    async fn wait(&mut self, max_ms: u64) -> Duration {
        let wait = Duration::from_millis(self.rng.u64(0..=max_ms));
        tokio::time::sleep(wait).await;
        wait
    }

    /// Kills the daemon and starts it again. The network changes before or after the start. The test does not wait for
    /// one start in six, so the next kill can interrupt that start.
    async fn kill(&mut self, lifetime: String) {
        self.daemon.assert_running();
        self.daemon.kill().await;
        *self.kills.entry(self.current).or_default() += 1;
        let count = self.world.kills.fetch_add(1, SeqCst) + 1;
        let before = self.current;
        let next = self.next_state();
        let changes_before = self.rng.bool();
        let is_awaited = self.rng.u32(0..6) > 0;
        if changes_before {
            self.change_network(next).await;
        }
        let started = Instant::now();
        self.daemon.start_again();
        if is_awaited {
            self.daemon.wait_until_ready().await;
        }
        let ready = started.elapsed();
        if !changes_before {
            self.change_network(next).await;
        }
        let start = if changes_before { next } else { before };
        self.steps.push(format!(
            "kill {count} {lifetime}, start in {start:?} ({}), then {next:?}",
            if is_awaited { format!("ready after {ready:?}") } else { "not waited for".to_owned() }
        ));
    }

    fn next_state(&mut self) -> NetworkState {
        if self.upcoming.is_empty() {
            self.upcoming.clone_from(&self.states);
            self.rng.shuffle(&mut self.upcoming);
        }
        self.upcoming.pop().unwrap()
    }

    async fn change_network(&mut self, state: NetworkState) {
        self.gateway.forget();
        state.apply(self.gateway, self.rng.fork()).await;
        self.current = state;
    }
}
