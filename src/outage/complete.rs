//! Completion of queued writes: removal from the queue once their end is known.

use std::sync::Arc;

use rusqlite::{Connection, params};

use super::dead_letters::add_dead_letter;
use super::file::OutageFile;
use super::row::{StoredRow, clear_attempts};
use super::writer_state::WriterState;
use super::{ReplayOutcome, replica};
use crate::error::Result;
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::model::version::Version;
use crate::sqlite::rows::versions;
use crate::sqlite::writer::CommitLevel;

impl OutageFile {
    /// Completes writes by key and version. Returns for each write whether it was the queued one.
    pub(crate) async fn complete(&self, writes: Vec<(Key, Version, ReplayOutcome)>) -> Result<Vec<bool>> {
        let (clock, limit) = (Arc::clone(&self.clock), self.limits.replica);
        let work = move |connection: &Connection, state: &mut WriterState| {
            let completed = writes
                .iter()
                .map(|(key, version, outcome)| complete(connection, state, key, *version, outcome, &clock))
                .collect();
            // Stored writes became copies, so the replica may exceed its limit.
            replica::evict(connection, state, limit)?;
            completed
        };
        self.write(CommitLevel::ProcessCrash, work).await
    }
}

/// Completes a queued write. Returns false if the queue holds another version of the conversation, or none.
pub(super) fn complete(
    connection: &Connection,
    state: &mut WriterState,
    key: &Key,
    version: Version,
    outcome: &ReplayOutcome,
    clock: &Clock,
) -> rusqlite::Result<bool> {
    let row = StoredRow::find(connection, state, key, clock)?.filter(|row| row.is_queued);
    // A load or a list may have completed the write during the call.
    let Some(row) = row else { return Ok(false) };
    if row.version != version {
        // A newer write has replaced the row during the call, and stays queued. Only a stored write may be its base.
        if matches!(outcome, ReplayOutcome::Stored) {
            advance_base(connection, key, &row, version)?;
        }
        return Ok(false);
    }
    state.usage.queue.sub(row.bytes);
    match outcome {
        ReplayOutcome::Stored => turn_into_copy(connection, state, key, &row, clock)?,
        // The store holds a newer write, so this value must not become a copy (I16).
        ReplayOutcome::Replaced(_) => delete_row(connection, key)?,
        ReplayOutcome::DeadLettered(reason) => {
            // The dead letter comes first, because it copies the value from the row.
            let bytes = add_dead_letter(connection, key, version, reason, clock.now())?;
            delete_row(connection, key)?;
            state.usage.dead_letters.add(bytes);
        }
    }
    Ok(true)
}

/// Makes `stored` the base of a queued update that includes it. An update of a later put has a higher base, and stays.
fn advance_base(
    connection: &Connection,
    key: &Key,
    row: &StoredRow,
    stored: Version,
) -> rusqlite::Result<()> {
    if row.version <= stored || row.base.is_none_or(|base| base > stored) {
        return Ok(());
    }
    // The store holds `stored`, and no older version can come back (I9).
    let later = versions(&row.sent_versions).filter(|version| *version > stored);
    let sent_versions: String = later.map(|version| format!(" {version}")).collect();
    let sql = "update records set base = ?2, sent_versions = ?3 where key = ?1";
    connection.prepare_cached(sql)?.execute(params![key.as_str(), stored.raw(), sent_versions]).map(drop)
}

/// Turns a queued write that the store holds into a copy.
fn turn_into_copy(
    connection: &Connection,
    state: &mut WriterState,
    key: &Key,
    row: &StoredRow,
    clock: &Clock,
) -> rusqlite::Result<()> {
    clear_attempts(connection, key, row.version)?;
    // The row may still have the provisional version. The store has the corrected one.
    let sql = "update records set is_queued = 0, at = ?2, base = null, sent_versions = '', dispatched = 0,
                   provisional_skew_ms = null, version = ?3
               where key = ?1";
    let values = params![key.as_str(), clock.now().0, row.version.raw()];
    connection.prepare_cached(sql)?.execute(values)?;
    state.usage.replica.add(row.bytes);
    // The store was or may have been seen with a newer version, so this copy is not the last known one (I16).
    let sql = "delete from records where key = ?1 and read_state <> 0";
    if connection.prepare_cached(sql)?.execute([key.as_str()])? > 0 {
        state.usage.replica.sub(row.bytes);
    }
    Ok(())
}

fn delete_row(connection: &Connection, key: &Key) -> rusqlite::Result<()> {
    connection.prepare_cached("delete from records where key = ?1")?.execute([key.as_str()]).map(drop)
}
