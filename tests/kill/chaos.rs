//! Kills the daemon again and again, in all weathers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::clients::World;
use crate::process::Daemon;
use crate::stack::{Fault, Gateway};

/// What the way to the database is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weather {
    Up,
    /// Everything takes up to 0.4 s, which is near the daemon's deadline.
    Slow,
    Refusing,
    Hanging,
    Resetting,
    /// Writes are carried out, and most answers to them lost.
    Losing,
    /// Up and down every few milliseconds.
    Flapping,
}

impl Weather {
    pub const ALL: [Self; 7] =
        [Self::Up, Self::Slow, Self::Refusing, Self::Hanging, Self::Resetting, Self::Losing, Self::Flapping];

    pub fn named(name: &str) -> Self {
        let is_meant = |weather: &Self| format!("{weather:?}").to_lowercase() == name;
        Self::ALL.into_iter().find(is_meant).unwrap_or_else(|| panic!("there is no weather {name:?}"))
    }

    /// Begins it; what hung before goes on, or is lost where the gateway closes.
    async fn begin(self, gateway: &Gateway, mut rng: Rng) {
        let began = Instant::now();
        let period = rng.u128(20..120);
        match self {
            Self::Up => gateway.always(Fault::Pass),
            Self::Slow => gateway.rule(move |_| Fault::Slow(Duration::from_millis(rng.u64(0..400)))),
            Self::Hanging => gateway.always(Fault::Hang),
            Self::Resetting => gateway.always(Fault::Reset),
            Self::Losing => gateway.rule(move |seen| lose(seen.path.contains("threadkeep_apply"), &mut rng)),
            Self::Flapping => gateway.rule(move |_| match began.elapsed().as_millis() / period % 2 {
                0 => Fault::Pass,
                _ => Fault::html(522),
            }),
            Self::Refusing => return gateway.refuse().await,
        }
        gateway.release();
        gateway.accept().await;
    }
}

fn lose(is_write: bool, rng: &mut Rng) -> Fault {
    match rng.u32(0..4) {
        0 if is_write => Fault::LoseAnswer,
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
    weathers: Vec<Weather>,
    /// What is to come before the weathers are shuffled again, so that none is forgotten.
    coming: Vec<Weather>,
    present: Weather,
    pub kills: BTreeMap<Weather, usize>,
    /// What was done, for whom it fails.
    pub diary: Vec<String>,
}

impl<'a> Chaos<'a> {
    /// A chaos on a seed. The weather is fine as often as it is bad.
    pub fn new(
        world: Arc<World>,
        gateway: &'a Gateway,
        daemon: Daemon,
        seed: u64,
        weathers: &[Weather],
    ) -> Self {
        let bad = weathers.iter().filter(|weather| **weather != Weather::Up).count();
        let fine = if weathers.contains(&Weather::Up) { bad.max(1) } else { 0 };
        let weathers = std::iter::repeat_n(Weather::Up, fine)
            .chain(weathers.iter().copied().filter(|weather| *weather != Weather::Up))
            .collect();
        Self {
            world,
            gateway,
            daemon,
            rng: Rng::with_seed(seed),
            weathers,
            coming: Vec::new(),
            present: Weather::Up,
            kills: BTreeMap::new(),
            diary: Vec::new(),
        }
    }

    /// So many kills, unless something goes wrong before; the daemon runs in the end, and the weather is fine.
    pub async fn rage(&mut self, kills: usize) {
        for _ in 0..kills {
            let lived = self.let_live().await;
            self.kill(lived).await;
            if !self.world.ledger().complaints.is_empty() {
                break;
            }
        }
        self.daemon.wait_until_ready().await;
        self.begin(Weather::Up).await;
    }

    /// Most lives are short; one in four sees the weather change, and is long enough for breaker and replay.
    async fn let_live(&mut self) -> String {
        let first = self.wait(400).await;
        if self.rng.u32(0..4) > 0 {
            return format!("{first:?} into {:?}", self.present);
        }
        let (before, next) = (self.present, self.next_weather());
        self.begin(next).await;
        let second = self.wait(2_000).await;
        format!("{first:?} into {before:?} and {second:?} into {next:?}")
    }

    async fn wait(&mut self, most: u64) -> Duration {
        let wait = Duration::from_millis(self.rng.u64(0..=most));
        tokio::time::sleep(wait).await;
        wait
    }

    /// Kills it and starts it again; the weather changes before or after the start, and one start in six is not
    /// waited for, so that starting is interrupted as well.
    async fn kill(&mut self, lived: String) {
        self.daemon.assert_running();
        self.daemon.kill().await;
        *self.kills.entry(self.present).or_default() += 1;
        let count = self.world.kills.fetch_add(1, SeqCst) + 1;
        let (before, next) = (self.present, self.next_weather());
        let (changes_before, is_awaited) = (self.rng.bool(), self.rng.u32(0..6) > 0);
        if changes_before {
            self.begin(next).await;
        }
        let started = Instant::now();
        self.daemon.start_again();
        if is_awaited {
            self.daemon.wait_until_ready().await;
        }
        let ready = started.elapsed();
        if !changes_before {
            self.begin(next).await;
        }
        let start = if changes_before { next } else { before };
        self.diary.push(format!(
            "kill {count} {lived}, start in {start:?} ({}), then {next:?}",
            if is_awaited { format!("ready after {ready:?}") } else { "not waited for".to_owned() }
        ));
    }

    fn next_weather(&mut self) -> Weather {
        if self.coming.is_empty() {
            self.coming.clone_from(&self.weathers);
            self.rng.shuffle(&mut self.coming);
        }
        self.coming.pop().unwrap()
    }

    async fn begin(&mut self, weather: Weather) {
        self.gateway.forget();
        weather.begin(self.gateway, self.rng.fork()).await;
        self.present = weather;
    }
}
