//! Clock sync: the one transition from provisional to final versions (I8).
//!
//! A version is provisional if the clock was unsynced when it issued the version. The next answer of the store tells the error
//! of the clock, and stays pending. One task holds back all writes to the queue, corrects the provisional rows in one transaction, and tells
//! memory. Only then the clock counts as synced. No other code knows provisional time.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

use rusqlite::{Connection, OptionalExtension, Row, params};
use tokio::sync::RwLockReadGuard;

use super::Corrected;
use super::clock_checkpoint::{lead_over_provisional, save_provisional};
use super::file::OutageFile;
use super::rows::{copy_version, heads};
use super::rules::{self, QueuedHead};
use super::state::WriterState;
use crate::error::Result;
use crate::model::clock::{Clock, Correction};
use crate::model::key::Key;
use crate::model::version::{Timestamp, Version};
use crate::sqlite;
use crate::sqlite::writer::CommitLevel;
use crate::store::Condition;

impl OutageFile {
    /// Returns the number of clock syncs that changed queued writes, and of eras. A base that was read before the next one may be
    /// outdated.
    pub(crate) fn syncs(&self) -> u64 {
        self.syncs.load(Acquire) + u64::from(self.clock.era())
    }

    /// Holds back the clock sync, which changes queued versions. A caller holds it from the issue of a version to the commit of its
    /// row. So a version that follows a provisional one is provisional, too, and no such row comes behind the sync.
    pub(crate) async fn hold_clock_sync(&self) -> RwLockReadGuard<'_, ()> {
        self.sync_gate.read().await
    }

    /// Ends each unsynced period of the clock, until the task is aborted.
    ///
    /// The period goes on while the file cannot take the correction. So the rows of a file have the time of one clock at most.
    pub(crate) async fn run_clock_sync(self: Arc<Self>) {
        let mut has_failed = false;
        loop {
            self.clock.answered().await;
            let _gate = self.sync_gate.write().await;
            // A jump during the wait makes the answer worthless, and the clock ignores it.
            let Some((correction, now)) = self.clock.pending_with_time() else { continue };
            let corrected = self.correct_provisional(correction, now).await;
            let had_failed = std::mem::replace(&mut has_failed, corrected.is_err());
            match corrected {
                Ok(newest) => {
                    if newest > Version::NONE {
                        // After memory has the new versions, so a read from now on finds them. Before the end of the sync, so
                        // no write goes to the store with an older base.
                        self.syncs.fetch_add(1, Release);
                    }
                    // Versions of this process must be above the queued ones.
                    self.clock.finish_sync(correction, newest);
                }
                Err(error) => {
                    self.clock.discard_answer();
                    if !had_failed {
                        tracing::warn!(%error, "the outage file cannot correct its provisional writes; writes wait for a working disk");
                    }
                }
            }
        }
    }

    /// Corrects all provisional rows, and returns the newest of the final versions. `now` is the corrected time.
    async fn correct_provisional(&self, correction: Correction, now: Timestamp) -> Result<Version> {
        let sql = "select exists (select 1 from records where is_provisional = 1)";
        let has_rows = self.database.read(move |connection| connection.query_row(sql, [], |row| row.get(0)));
        // Without such rows, a failing disk does not hold up the writes to a store that works.
        if !has_rows.await? {
            return Ok(Version::NONE);
        }
        let floor = self.clock.last_final();
        let work = move |connection: &Connection, state: &mut WriterState| {
            correct_all(connection, state, correction, floor, now)
        };
        self.write(CommitLevel::PowerCut, work).await
    }
}

/// Corrects all provisional rows, and returns the newest of the final versions. `floor` is the last final version of the era, and
/// `now` the corrected time.
pub(super) fn correct_all(
    connection: &Connection,
    state: &mut WriterState,
    correction: Correction,
    floor: Version,
    now: Timestamp,
) -> rusqlite::Result<Version> {
    let sql = "select distinct key from records where is_provisional = 1";
    // Collected first, because the updates below change the rows of this query.
    let keys = connection.prepare_cached(sql)?.query_map([], sqlite::rows::key)?.collect::<Vec<_>>();
    for key in keys {
        correct_key(connection, state, &key?, correction, floor, now)?;
    }
    Ok(state.newest_corrected())
}

/// Gives the provisional writes of a conversation their final versions and times.
fn correct_key(
    connection: &Connection,
    state: &mut WriterState,
    key: &Key,
    Correction(millis): Correction,
    floor: Version,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let rows = without_lead(connection, key, heads(connection, key)?)?;
    let floor = copy_version(connection, key)?.max(floor);
    let sql = "select seq, version, expires_at + ?2 from records
               where key = ?1 and is_queued = 1 and is_provisional = 1 order by version";
    let read =
        |row: &Row<'_>| Ok((row.get::<_, i64>(0)?, Version::from_raw(row.get(1)?), Timestamp(row.get(2)?)));
    let mut find = connection.prepare_cached(sql)?;
    let provisional = find.query_map(params![key.as_str(), millis], read)?;
    let provisional = provisional.collect::<rusqlite::Result<Vec<_>>>()?;
    let corrected = rules::corrected(&rows, millis, floor, now);
    // Provisional rows are the last ones of a conversation.
    let corrected = corrected.iter().skip(rows.len() - provisional.len());
    for ((seq, from, expires_at), write) in provisional.into_iter().zip(corrected) {
        let sql = "update records set version = ?2, if_version = ?3, expires_at = ?4, at = at + ?5, is_provisional = 0
                   where seq = ?1";
        let base = super::rows::if_version(write.condition);
        let values = params![seq, write.version.raw(), base, expires_at.0, millis];
        connection.prepare_cached(sql)?.execute(values)?;
        let version = write.version;
        state.change.corrected.push(Corrected { key: key.clone(), from, version, expires_at });
    }
    state.oldest = None;
    Ok(())
}

/// Returns the rows with the versions that the clock would have issued without the versions that it had observed.
///
/// Observed versions may have pushed a provisional version ahead of its clock. A correct clock would not have that lead.
fn without_lead(
    connection: &Connection,
    key: &Key,
    mut rows: Vec<QueuedHead>,
) -> rusqlite::Result<Vec<QueuedHead>> {
    let sql = "select version, max((version >> 21) - at, 0) from records
               where key = ?1 and is_queued = 1 and is_provisional = 1";
    let lead = |row: &Row<'_>| Ok((Version::from_raw(row.get(0)?), row.get::<_, i64>(1)?));
    let mut find = connection.prepare_cached(sql)?;
    let leads = find.query_map([key.as_str()], lead)?.collect::<rusqlite::Result<Vec<_>>>()?;
    let reduced = |version: Version| {
        let lead = leads.iter().find(|(pushed, _)| *pushed == version);
        lead.map_or(version, |(_, lead)| version.shifted(-lead))
    };
    for row in rows.iter_mut().filter(|row| row.is_provisional) {
        row.write.version = reduced(row.write.version);
        if let Condition::IfVersion(base) = row.write.condition {
            row.write.condition = Condition::IfVersion(reduced(base));
        }
    }
    Ok(rows)
}

/// Brings the provisional writes of an earlier process in line with the clock of this process, so that one correction fits all
/// of them.
pub(super) fn shift_provisional(connection: &Connection, clock: &Clock) -> rusqlite::Result<()> {
    // SQLite computes every right side from the old row. A base that is a provisional version moves with it.
    let sql = "update records set
                   version = version + (?2 << 21), expires_at = expires_at + ?1, at = at + ?1,
                   if_version = if_version + case when exists (
                       select 1 from records as base where base.key = records.key and base.is_provisional = 1
                           and base.version in (records.if_version, records.if_version + (?2 << 21))) then ?2 << 21 else 0 end
               where is_provisional = 1";
    let lead = lead_over_provisional(connection, clock)?;
    // A version that observed versions have pushed ahead of the slow clock is not pushed further. The versions of this process
    // would follow it, and its final ones would be ahead of the store's clock.
    let pushed = "select max((version >> 21) - at, 0) from records where is_provisional = 1 order by version desc limit 1";
    let pushed = connection.query_row(pushed, [], |row| row.get::<_, i64>(0)).optional()?.unwrap_or(0);
    let moved = if lead > 0 { (lead - pushed).max(0) } else { lead };
    if connection.execute(sql, [lead, moved])? > 0 {
        save_provisional(connection, clock)?;
    }
    let newest = |is_provisional: bool| {
        let sql = "select max(version) from records where is_queued = 1 and is_provisional = ?1";
        let newest = connection.query_row(sql, [is_provisional], |row| row.get::<_, Option<i64>>(0))?;
        Ok::<_, rusqlite::Error>(Version::from_raw(newest.unwrap_or(0)))
    };
    // Only observed: a row of another conversation that is far ahead must not push the others there.
    clock.observe(newest(false)?);
    clock.observe(newest(true)?);
    Ok(())
}
