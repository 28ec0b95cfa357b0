//! The anchor: what the clock of the source of truth showed at a moment since this machine was booted. A process that is
//! started again in an outage goes on from there: its system's clock may be wrong, or have been set meanwhile, but the time
//! since the boot counts on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::local::file;
use crate::version::{Clock, Timestamp};

/// How often it is noted anew, in a transaction that writes something else anyway.
const PERIOD: Duration = Duration::from_secs(60);
const NAME: &str = "anchor";

/// This machine since its boot, and for how long, the time that it slept included; `None` where the system does not tell.
fn since_boot() -> Option<(String, i64)> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let seconds: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    Some((boot.trim().to_owned(), (seconds * 1_000.0) as i64))
}

/// When the anchor was noted last.
#[derive(Debug, Default)]
pub(super) struct Anchor(Option<Instant>);

impl Anchor {
    /// Notes what the clock shows, once it has been put right.
    pub(super) fn note(&mut self, connection: &Connection, clock: &Clock) -> rusqlite::Result<()> {
        let is_due = self.0.is_none_or(|noted| noted.elapsed() >= PERIOD);
        if !is_due || clock.moved().is_none() {
            return Ok(());
        }
        self.0 = Some(Instant::now());
        let Some((boot, uptime)) = since_boot() else { return Ok(()) };
        let sql = "insert into about values (?1, ?2) on conflict (name) do update set value = ?2";
        connection
            .prepare_cached(sql)?
            .execute([NAME, &format!("{boot} {uptime} {}", clock.now().0)])
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
fn shown(anchor: &str, (boot, uptime): (String, i64)) -> Option<Timestamp> {
    let mut parts = anchor.split(' ');
    let is_of_this_boot = parts.next()? == boot;
    let (then, shown): (i64, i64) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    (is_of_this_boot && then <= uptime).then_some(Timestamp(shown.saturating_add(uptime - then)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_anchor_counts_on_within_its_boot_only() {
        let at = |boot: &str, uptime| shown("b 1000 50000", (boot.to_owned(), uptime));
        assert_eq!(at("b", 1_700), Some(Timestamp(50_700)));
        assert_eq!(at("b", 900), None, "an uptime that goes back is of another machine");
        assert_eq!(at("another", 1_700), None);
        assert_eq!(shown("garbage", ("garbage".into(), 1)), None);
    }
}
