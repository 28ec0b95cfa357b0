//! The states of the network between a daemon and the database.

use std::time::{Duration, Instant};

use fastrand::Rng;

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

    #[allow(dead_code, reason = "tests/daemons takes all states")]
    pub fn named(name: &str) -> Self {
        let has_name = |state: &Self| format!("{state:?}").to_lowercase() == name;
        Self::ALL.into_iter().find(has_name).unwrap_or_else(|| panic!("unknown network state {name:?}"))
    }

    /// Applies the state to the gateway. Hanging requests continue, or fail if the gateway closes.
    pub async fn apply(self, gateway: &Gateway, mut rng: Rng) {
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
