//! Kills the daemon repeatedly while the network changes state.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::clients::World;
use crate::process::Daemon;
use crate::stack::{Fault, Gateway};

/// The state of the network between the daemon and the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NetworkState {
    Up,
    /// Each call takes up to 0.4 s. The daemon's timeout is 0.5 s.
    Slow,
    Refusing,
    Hanging,
    Resetting,
    /// The database executes writes, and the gateway loses most of their responses.
    Losing,
    /// Alternates between `Up` and an outage every 20 to 120 ms.
    Flapping,
}

impl NetworkState {
    pub const ALL: [Self; 7] =
        [Self::Up, Self::Slow, Self::Refusing, Self::Hanging, Self::Resetting, Self::Losing, Self::Flapping];

    pub fn named(name: &str) -> Self {
        let has_name = |state: &Self| format!("{state:?}").to_lowercase() == name;
        Self::ALL.into_iter().find(has_name).unwrap_or_else(|| panic!("unknown network state {name:?}"))
    }

    /// Applies the state to the gateway. Hanging requests continue, or fail if the gateway closes.
    async fn apply(self, gateway: &Gateway, mut rng: Rng) {
        let started = Instant::now();
        let period = rng.u128(20..120);
        match self {
            Self::Up => gateway.always(Fault::Pass),
            Self::Slow => gateway.rule(move |_| Fault::Slow(Duration::from_millis(rng.u64(0..400)))),
            Self::Hanging => gateway.always(Fault::Hang),
            Self::Resetting => gateway.always(Fault::Reset),
            Self::Losing => {
                gateway.rule(move |seen| lossy_fault(seen.path.contains("threadkeep_apply"), &mut rng))
            }
            Self::Flapping => gateway.rule(move |_| match started.elapsed().as_millis() / period % 2 {
                0 => Fault::Pass,
                _ => Fault::html(522),
            }),
            Self::Refusing => return gateway.refuse().await,
        }
        gateway.release();
        gateway.accept().await;
    }
}

fn lossy_fault(is_write: bool, rng: &mut Rng) -> Fault {
    match rng.u32(0..4) {
        0 if is_write => Fault::DropResponse,
        1 if is_write => Fault::Truncate,
        2 if is_write => Fault::HangAfter,
        _ => Fault::Pass,
    }
}

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
