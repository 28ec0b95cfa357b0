//! Checkpoints of the clock: the time that it showed at a moment since the boot of this machine.
//!
//! A process that restarts in an outage continues from the checkpoint of the synced clock. Its system's clock may be wrong, or
//! may have been set meanwhile, but the uptime counts on. The uptime does not count the time that a virtual machine was paused, and the system's
//! clock does. So the longer of the two times counts, as for a [`Moment`].
//!
//! A second checkpoint is of the clock that issued the provisional rows. It brings them in line with the clock of the next process.

use std::time::Duration;

use rusqlite::Connection;

use crate::model::clock::{Clock, not_passed};
use crate::model::moment::{Moment, system_millis, uptime_millis};
use crate::model::version::{MAX_CLOCK_SKEW, Timestamp, millis};
use crate::sqlite::file;

/// The minimum time between two checkpoints. A checkpoint joins a transaction that writes anyway.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(60);
/// A smaller lead is none.
const MIN_LEAD_MS: i64 = 20;
const SYNCED: &str = "clock_checkpoint";
const PROVISIONAL: &str = "provisional_clock";

/// The clocks of this machine.
pub(super) struct MachineTime {
    pub(super) boot: String,
    /// The milliseconds since the boot, including sleep.
    uptime: i64,
    /// The time that the system's clock shows.
    system: i64,
}

impl MachineTime {
    /// Returns `None` on a system without `/proc`.
    pub(super) fn now() -> Option<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(Self { boot: boot.trim().to_owned(), uptime: uptime_millis()?, system: system_millis() })
    }

    fn checkpoint(&self, shown: Timestamp) -> String {
        format!("{} {} {} {}", self.boot, self.uptime, shown.0, self.system)
    }
}

/// The interval of the checkpoints of an unsynced clock.
const PROVISIONAL_INTERVAL: Duration = Duration::from_secs(1);

/// The moments of the last checkpoints.
#[derive(Debug, Default)]
pub(super) struct ClockCheckpoint {
    synced: Option<Moment>,
    provisional: Option<Moment>,
}

impl ClockCheckpoint {
    /// Saves the time of a synced clock, if a checkpoint is due.
    pub(super) fn save(&mut self, connection: &Connection, clock: &Clock) -> rusqlite::Result<()> {
        let now = clock.moment();
        if self.synced.is_some_and(|saved| now.is_within(CHECKPOINT_INTERVAL, saved)) {
            return Ok(());
        }
        let Some(shown) = clock.known_now() else { return Ok(()) };
        // Set even without `/proc`, so that each transaction does not try again.
        self.synced = Some(now);
        let Some(machine) = MachineTime::now() else { return Ok(()) };
        file::set_meta(connection, SYNCED, &machine.checkpoint(shown))
    }

    /// Saves the time of the clock that issues provisional rows. The transaction has such a row.
    pub(super) fn save_provisional(
        &mut self,
        connection: &Connection,
        clock: &Clock,
    ) -> rusqlite::Result<()> {
        let now = clock.moment();
        if self.provisional.is_some_and(|saved| now.is_within(PROVISIONAL_INTERVAL, saved)) {
            return Ok(());
        }
        self.provisional = Some(now);
        save_provisional(connection, clock)
    }
}

/// Sets the clock from a checkpoint of this boot.
pub(super) fn resume(connection: &Connection, clock: &Clock) -> rusqlite::Result<()> {
    let checkpoint = file::meta(connection, SYNCED)?;
    if let Some(now) = checkpoint.and_then(|checkpoint| store_time(&checkpoint, &MachineTime::now()?)) {
        clock.resume(now);
    }
    Ok(())
}

/// Saves the time of the clock that issues provisional rows.
pub(super) fn save_provisional(connection: &Connection, clock: &Clock) -> rusqlite::Result<()> {
    let system = system_millis();
    let unknown = || MachineTime { boot: "unknown".into(), uptime: 0, system };
    let machine = MachineTime::now().unwrap_or_else(unknown);
    file::set_meta(connection, PROVISIONAL, &machine.checkpoint(clock.now()))
}

/// Returns the lead, in milliseconds, of a clock over the clock that issued the provisional rows.
pub(super) fn lead_over_provisional(connection: &Connection, clock: &Clock) -> rusqlite::Result<i64> {
    // Rows of an import or of an earlier format come from the system's clock.
    let Some(checkpoint) = file::meta(connection, PROVISIONAL)? else { return Ok(clock.offset()) };
    let same_boot = MachineTime::now().and_then(|now| store_time(&checkpoint, &now));
    // After a boot, the system's clock tells how much time has passed.
    let by_system = || {
        parse(&checkpoint).map(|(at, shown)| Timestamp(shown.0.saturating_add(system_millis() - at.system)))
    };
    let shown = same_boot.or_else(by_system);
    let lead = shown.map_or(0, |shown| clock.now().0.saturating_sub(shown.0));
    // The clocks are not read at one moment.
    Ok(if lead.abs() < MIN_LEAD_MS { 0 } else { lead })
}

/// Reads a checkpoint: the clocks of the machine, and the time that the clock showed.
fn parse(checkpoint: &str) -> Option<(MachineTime, Timestamp)> {
    let (boot, numbers) = checkpoint.split_once(' ')?;
    let mut numbers = numbers.split(' ').map_while(|number| number.parse().ok());
    let (uptime, shown, system) = (numbers.next()?, numbers.next()?, numbers.next()?);
    Some((MachineTime { boot: boot.to_owned(), uptime, system }, Timestamp(shown)))
}

/// Returns the time that the clock of a checkpoint shows now. `None` if the checkpoint is of another boot.
fn store_time(checkpoint: &str, now: &MachineTime) -> Option<Timestamp> {
    let (at, shown) = parse(checkpoint)?;
    let elapsed = now.uptime - at.uptime;
    // Within the tolerance the uptime is the better measure, because nobody can set it.
    let paused = now.system - at.system - elapsed;
    let paused = if paused > millis(MAX_CLOCK_SKEW) { paused } else { 0 };
    let shown = shown.0.saturating_add(elapsed + paused);
    // An uptime that goes back belongs to another machine.
    (at.boot == now.boot && elapsed >= 0).then_some(Timestamp(shown - not_passed(shown, now.system, paused)))
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
