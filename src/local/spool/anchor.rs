//! The anchor: what the clock of the source of truth showed at a moment since this machine was booted. A process that is
//! started again in an outage goes on from there: its system's clock may be wrong, or have been set meanwhile, but the time
//! since the boot counts on. It does not count the time that a virtual machine was paused, which the system's clock knows:
//! the longer of both times counts, as it does for a [`Moment`].

use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;

use crate::local::file;
use crate::version::{Clock, Moment, TOLERANCE, Timestamp, millis, not_passed, system_millis};

/// How often it is noted anew, in a transaction that writes something else anyway.
const PERIOD: Duration = Duration::from_secs(60);
const NAME: &str = "anchor";

/// This machine since its boot.
struct SinceBoot {
    boot: String,
    /// For how long it runs, the time that it slept included.
    uptime: i64,
    /// What the system's clock shows.
    system: i64,
}

/// `None` where the system does not tell.
fn since_boot() -> Option<SinceBoot> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let seconds: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let boot = boot.trim().to_owned();
    Some(SinceBoot { boot, uptime: (seconds * 1_000.0) as i64, system: system_millis() })
}

/// When the anchor was noted last.
#[derive(Debug, Default)]
pub(super) struct Anchor(Option<Moment>);

impl Anchor {
    /// Notes what the clock shows, once it has been put right.
    pub(super) fn note(&mut self, connection: &Connection, clock: &Clock) -> rusqlite::Result<()> {
        let now = clock.moment();
        let is_due = self.0.is_none_or(|noted| !now.is_within(PERIOD, noted));
        let Some(shown) = clock.known_now().filter(|_| is_due) else { return Ok(()) };
        self.0 = Some(now);
        let Some(SinceBoot { boot, uptime, system }) = since_boot() else { return Ok(()) };
        let sql = "insert into about values (?1, ?2) on conflict (name) do update set value = ?2";
        connection
            .prepare_cached(sql)?
            .execute([NAME, &format!("{boot} {uptime} {} {system}", shown.0)])
            .map(drop)
    }
}

/// Lets the clock go on from the anchor, if that is of the present boot.
pub(super) fn resume(connection: &Connection, clock: &Arc<Clock>) -> rusqlite::Result<()> {
    let anchor = file::about(connection, NAME)?;
    if let Some(shown) = anchor.and_then(|anchor| shown(&anchor, since_boot()?)) {
        clock.resume(shown);
    }
    Ok(())
}

/// What an anchor says that the clock shows at this moment of this boot.
fn shown(anchor: &str, now: SinceBoot) -> Option<Timestamp> {
    let mut parts = anchor.split(' ');
    let is_of_this_boot = parts.next()? == now.boot;
    let mut number = || parts.next()?.parse::<i64>().ok();
    let (uptime, shown, system) = (number()?, number()?, number()?);
    let elapsed = now.uptime - uptime;
    // Within the tolerance the time since the boot is the better one: nobody sets it.
    let missed = now.system - system - elapsed;
    let missed = if missed > millis(TOLERANCE) { missed } else { 0 };
    let shown = shown.saturating_add(elapsed + missed);
    (is_of_this_boot && elapsed >= 0).then_some(Timestamp(shown - not_passed(shown, now.system, missed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_anchor_counts_on_within_its_boot_only() {
        let at = |boot: &str, uptime, system| {
            shown("b 1000 50000 7000", SinceBoot { boot: boot.to_owned(), uptime, system })
        };
        assert_eq!(at("b", 1_700, 7_700), Some(Timestamp(50_700)));
        assert_eq!(at("b", 1_700, 7_000 - 3_600_000), Some(Timestamp(50_700)), "the clock was set back");
        assert_eq!(
            at("b", 1_700, 7_700 + 3_600_000),
            Some(Timestamp(3_650_700)),
            "it was paused for an hour"
        );
        assert_eq!(at("b", 1_700, 51_000), Some(Timestamp(50_700)), "the clock was put right");
        assert_eq!(at("b", 900, 7_700), None, "an uptime that goes back is of another machine");
        assert_eq!(at("another", 1_700, 7_700), None);
        assert_eq!(shown("garbage", SinceBoot { boot: "garbage".into(), uptime: 1, system: 1 }), None);
    }
}
