//! The correction of provisional versions (I8).
//!
//! A version is provisional if the clock was unsynced when it issued the version. The next answer of the store ends the
//! unsynced period and tells how far off the clock was. Versions, bases, expiries and queueing times move by that much.

use rusqlite::{Connection, params};

use super::writer_state::WriterState;
use crate::model::clock::{Clock, UnsyncedPeriod};
use crate::model::version::{Timestamp, Version};
use crate::sqlite::rows::versions;

/// Returns the version that a correct clock would have issued, as far as is known.
pub(super) fn corrected(
    version: Version,
    unsynced: Option<UnsyncedPeriod>,
    issued_at: Timestamp,
    clock: &Clock,
) -> Version {
    // While the period lasts, the issued version is the best guess.
    let moved = unsynced.and_then(|unsynced| clock.moved(unsynced));
    version.clock_corrected(moved.unwrap_or(0), issued_at)
}

/// Returns the corrected base of an update. Only the base of an update of a queued put came from the same clock as the update.
/// Every other base is a version that the store has shown, which is final.
pub(super) fn corrected_base(
    base: Option<i64>,
    sent_versions: &str,
    unsynced: Option<UnsyncedPeriod>,
    clock: &Clock,
) -> Option<Version> {
    let follows_a_put = versions(sent_versions).any(|version| version == Version::NONE);
    let moved = unsynced.filter(|_| follows_a_put).and_then(|unsynced| clock.moved(unsynced));
    base.map(|base| Version::from_raw(base).shifted(moved.unwrap_or(0)))
}

/// Whether the correction of a version is still unknown.
pub(super) fn is_still_provisional(unsynced: Option<UnsyncedPeriod>, clock: &Clock) -> bool {
    unsynced.is_some_and(|unsynced| clock.moved(unsynced).is_none())
}

/// Corrects the queued writes of all unsynced periods that have ended.
pub(super) fn apply_clock_correction(
    connection: &Connection,
    state: &WriterState,
    clock: &Clock,
) -> rusqlite::Result<()> {
    let sql = "select distinct unsynced_period from records
               where is_queued = 1 and provisional_skew_ms is not null";
    // Collected first, because the updates below change the rows of this query.
    let periods = connection.prepare_cached(sql)?.query_map([], |row| row.get(0))?.collect::<Vec<_>>();
    for period in periods {
        let number: u32 = period?;
        let period = UnsyncedPeriod(number);
        let (Some(moved), Some(exact)) = (clock.moved(period), clock.exact_correction_ms(period)) else {
            // This period still lasts, so its writes stay provisional.
            continue;
        };
        // Versions ignore a correction within the tolerance; expiries and times do not (I17). A dispatched write keeps its
        // old version in the list, because the store may hold it under that version. The SQL says the same as `corrected`.
        let sql = "update records set
                       base = case when ' ' || sent_versions || ' ' like '% 0 %' then base + (?1 << 21) else base end,
                       sent_versions = case when ?1 <> 0 and (dispatched or seq <= ?2)
                                       then sent_versions || ' ' || version else sent_versions end,
                       version = version
                           + ((case when ?1 = 0 then 0 else ?1 - max((version >> 21) - at, 0) end) << 21),
                       expires_at = expires_at + ?3, at = at + ?3, provisional_skew_ms = null
                   where is_queued = 1 and provisional_skew_ms is not null and unsynced_period = ?4";
        connection.execute(sql, params![moved, state.dispatched, exact, number])?;
    }
    Ok(())
}

/// Shifts the provisional versions of an earlier process to the clock of this process, so that one correction fits all of them.
/// The two clocks may lead the system's clock by different amounts.
pub(super) fn shift_provisional(connection: &Connection, clock: &Clock) -> rusqlite::Result<()> {
    // SQLite computes every right side from the old row, so the order of the columns does not matter.
    let sql = "update records set
                   version = version + ((?1 - provisional_skew_ms) << 21),
                   expires_at = expires_at + ?1 - provisional_skew_ms,
                   provisional_skew_ms = ?1,
                   base = case when ' ' || sent_versions || ' ' like '% 0 %'
                          then base + ((?1 - provisional_skew_ms) << 21) else base end,
                   unsynced_period = ?2
               where is_queued = 1 and provisional_skew_ms is not null
                   and (provisional_skew_ms <> ?1 or unsynced_period <> ?2)";
    connection.execute(sql, [clock.ahead_of_system(), clock.last_unsynced_period().0.into()]).map(drop)
}
