//! The clock checkpoint: the time that the store's clock showed at a moment since the boot of this machine.
//!
//! A process that restarts in an outage continues from the checkpoint. Its system's clock may be wrong, or may have been set
//! meanwhile, but the uptime counts on. The uptime does not count the time that a virtual machine was paused, and the system's
//! clock does. So the longer of the two times counts, as for a [`Moment`].

use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;

use crate::model::clock::{Clock, not_passed};
use crate::model::moment::{Moment, system_millis};
use crate::model::version::{MAX_CLOCK_SKEW, Timestamp, millis};
use crate::sqlite::file;

/// The minimum time between two checkpoints. A checkpoint joins a transaction that writes anyway.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(60);
const NAME: &str = "clock_checkpoint";

/// The clocks of this machine.
struct MachineTime {
    boot: String,
    /// The milliseconds since the boot, including sleep.
    uptime: i64,
    /// The time that the system's clock shows.
    system: i64,
}

impl MachineTime {
    /// Returns `None` on a system without `/proc`.
    fn now() -> Option<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
        let seconds: f64 = uptime.split_whitespace().next()?.parse().ok()?;
        let boot = boot.trim().to_owned();
        Some(Self { boot, uptime: (seconds * 1_000.0) as i64, system: system_millis() })
    }
}

/// The moment of the last checkpoint.
#[derive(Debug, Default)]
pub(super) struct ClockCheckpoint(Option<Moment>);

impl ClockCheckpoint {
    /// Saves the time of a synced clock, if a checkpoint is due.
    pub(super) fn save(&mut self, connection: &Connection, clock: &Clock) -> rusqlite::Result<()> {
        let now = clock.moment();
        let is_due = self.0.is_none_or(|saved| !now.is_within(CHECKPOINT_INTERVAL, saved));
        let Some(shown) = clock.known_now().filter(|_| is_due) else { return Ok(()) };
        // Set even without `/proc`, so that each transaction does not try again.
        self.0 = Some(now);
        let Some(MachineTime { boot, uptime, system }) = MachineTime::now() else { return Ok(()) };
        file::set_meta(connection, NAME, &format!("{boot} {uptime} {} {system}", shown.0))
    }
}

/// Sets the clock from a checkpoint of this boot.
pub(super) fn resume(connection: &Connection, clock: &Arc<Clock>) -> rusqlite::Result<()> {
    let checkpoint = file::meta(connection, NAME)?;
    if let Some(now) = checkpoint.and_then(|checkpoint| store_time(&checkpoint, &MachineTime::now()?)) {
        clock.resume(now);
    }
    Ok(())
}

/// Returns the time that the store's clock shows now, according to a checkpoint. `None` if the checkpoint is of another boot.
fn store_time(checkpoint: &str, now: &MachineTime) -> Option<Timestamp> {
    let mut parts = checkpoint.split(' ');
    let is_of_this_boot = parts.next()? == now.boot;
    let mut number = || parts.next()?.parse::<i64>().ok();
    let (uptime, shown, system) = (number()?, number()?, number()?);
    let elapsed = now.uptime - uptime;
    // Within the tolerance the uptime is the better measure, because nobody can set it.
    let paused = now.system - system - elapsed;
    let paused = if paused > millis(MAX_CLOCK_SKEW) { paused } else { 0 };
    let shown = shown.saturating_add(elapsed + paused);
    // An uptime that goes back belongs to another machine.
    (is_of_this_boot && elapsed >= 0).then_some(Timestamp(shown - not_passed(shown, now.system, paused)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn store_time_counts_on_within_its_boot_only() {
        let at = |boot: &str, uptime, system| {
            store_time("b 1000 50000 7000", &MachineTime { boot: boot.to_owned(), uptime, system })
        };
        assert_eq!(at("b", 1_700, 7_700), Some(Timestamp(50_700)));
        assert_eq!(at("b", 1_700, 7_000 - 3_600_000), Some(Timestamp(50_700)), "the clock was set back");
        assert_eq!(
            at("b", 1_700, 7_700 + 3_600_000),
            Some(Timestamp(3_650_700)),
            "the machine was paused for an hour"
        );
        assert_eq!(at("b", 1_700, 51_000), Some(Timestamp(50_700)), "the clock was corrected");
        assert_eq!(at("b", 900, 7_700), None, "an uptime that goes back belongs to another machine");
        assert_eq!(at("another", 1_700, 7_700), None);
        let garbage = MachineTime { boot: "garbage".into(), uptime: 1, system: 1 };
        assert_eq!(store_time("garbage", &garbage), None);
    }
}
