//! Saving and evicting copies, in a transaction of the writer.

use rusqlite::{Connection, OptionalExtension, params};

use crate::model::clock::Clock;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::outage::complete::complete;
use crate::outage::row::{
    RowWrite, SUPERSEDED, StoredRow, UNVERIFIED, clear_attempts, row_bytes, upsert_row,
};
use crate::outage::writer_state::WriterState;
use crate::outage::{CopyRank, ReplayOutcome, ReplicaRecord, Usage};

/// Drops all copies, because some may be older than acknowledged writes.
///
/// A queued write may be older, too, because the file could not record that the store superseded it. So the queued writes
/// become unverified.
pub(super) fn drop_copies(connection: &Connection, state: &mut WriterState) -> rusqlite::Result<()> {
    connection.execute("delete from records where is_queued = 0", [])?;
    connection.execute("update records set read_state = ?1 where read_state = 0", [UNVERIFIED])?;
    state.usage.replica = Usage::default();
    Ok(())
}

/// Saves a copy under its rank. Returns the version of the queued write that the copy completed.
///
/// A copy that no caller has used gets a negative `seq`, and so is evicted before all used ones.
pub(super) fn save_ranked(
    connection: &Connection,
    state: &mut WriterState,
    copy: &ReplicaRecord,
    clock: &Clock,
) -> rusqlite::Result<Option<Version>> {
    if copy.rank == CopyRank::Used {
        return save_copy(connection, state, copy, clock);
    }
    let ReplicaRecord { record, confirmed_at, .. } = copy;
    let key = record.key.as_str();
    let sql = "select version, seq from records where key = ?1 and is_queued = 0 and value is not null";
    let row = connection.prepare_cached(sql)?.query_row([key], |row| Ok((row.get(0)?, row.get(1)?)));
    let row: Option<(i64, i64)> = row.optional()?;
    // The file has this very record, so only its rank and age change.
    let is_same = row.is_some_and(|(version, _)| version == record.version.raw());
    let completed = if is_same { None } else { save_copy(connection, state, copy, clock)? };
    if completed.is_some() {
        // The record is a write of this daemon, and so in use.
        return Ok(completed);
    }
    let seq = match (copy.rank, row) {
        // A listing keeps the rank. It neither makes a copy used nor takes that rank away.
        (CopyRank::Listed, Some((_, seq))) => seq,
        (CopyRank::Listed, None) => state.next_listed_seq(),
        // The copy is used already.
        (_, Some((_, seq))) if is_same && seq > 0 => return Ok(None),
        _ => state.next_seq(),
    };
    // The file may have a later confirmation already.
    let sql = "update records set seq = ?2, at = max(at, ?3) where key = ?1 and is_queued = 0";
    connection.prepare_cached(sql)?.execute(params![key, seq, confirmed_at.0])?;
    Ok(None)
}

/// The decision about a copy.
enum CopyDecision {
    /// The file has the same or a newer record.
    Ignore,
    /// The copy becomes the row. It replaces an older copy.
    Insert,
    /// The copy becomes the row. It replaces a queued write, which is complete.
    ReplaceQueued,
    /// The queued write is complete and becomes the copy, with its value.
    CompleteQueued,
    /// The queued write stays for replay, and reads skip it.
    SupersedeQueued,
    /// The row was deleted in the store. The copy loses its value and keeps its version.
    ClearValue,
}

/// Compares a record of the store with the row of its conversation. `replaces_older` tells that the record is a put of this
/// daemon that bypassed the queue.
fn decide(record: &Record, row: Option<&StoredRow>, replaces_older: bool) -> CopyDecision {
    let (is_tombstone, is_unknown) = (record.value.is_none(), record.version == Version::NONE);
    match row {
        // A conversation that never existed needs no row.
        None if is_unknown => CopyDecision::Ignore,
        None => CopyDecision::Insert,
        Some(row) if row.is_queued => {
            if row.version == record.version {
                // A tombstone of this version has lost its value by expiry, and the queued write has the value.
                if is_tombstone { CopyDecision::CompleteQueued } else { CopyDecision::ReplaceQueued }
            } else if row.version > record.version {
                // The store has not got the queued write yet.
                CopyDecision::Ignore
            } else if replaces_older {
                // A later put of the same daemon makes the queued write void, without a dead letter.
                CopyDecision::ReplaceQueued
            } else {
                // Replay still sends the write, because only the store can say that it is a dead letter (I10).
                CopyDecision::SupersedeQueued
            }
        }
        // Only time can make this version absent.
        Some(row) if row.version == record.version && is_tombstone => CopyDecision::Ignore,
        Some(row) if row.version <= record.version => CopyDecision::Insert,
        Some(_) if is_tombstone && is_unknown => CopyDecision::ClearValue,
        Some(_) => CopyDecision::Ignore,
    }
}

/// Saves a copy. Returns the version of the queued write that the copy completed.
fn save_copy(
    connection: &Connection,
    state: &mut WriterState,
    copy: &ReplicaRecord,
    clock: &Clock,
) -> rusqlite::Result<Option<Version>> {
    let record = &copy.record;
    let key = record.key.as_str();
    let row = StoredRow::find(connection, state, &record.key, clock)?;
    let queued = row.as_ref().filter(|row| row.is_queued);
    if queued.is_none() {
        // No queued write is left to meet an older attempt.
        clear_attempts(connection, &record.key, record.version)?;
    }
    // The attempt tells a put of this daemon from a write of another one. Another daemon's write completes no
    // queued write (I10).
    let replaces_older = copy.is_own
        || queued.is_some_and(|row| row.version < record.version) && is_recorded_put(connection, record)?;
    match (decide(record, row.as_ref(), replaces_older), row) {
        (CopyDecision::Insert, row) => {
            if let Some(row) = row {
                state.usage.replica.sub(row.bytes);
            }
            insert_copy(connection, state, copy)?;
            Ok(None)
        }
        (CopyDecision::ReplaceQueued, Some(row)) => {
            state.usage.queue.sub(row.bytes);
            insert_copy(connection, state, copy)?;
            clear_attempts(connection, &record.key, record.version)?;
            Ok(Some(row.version))
        }
        (CopyDecision::CompleteQueued, Some(row)) => {
            let outcome = ReplayOutcome::Stored;
            let is_complete = complete(connection, state, &record.key, row.version, &outcome, clock)?;
            Ok(is_complete.then_some(row.version))
        }
        (CopyDecision::SupersedeQueued, _) => {
            let sql = "update records set read_state = ?2 where key = ?1";
            connection.prepare_cached(sql)?.execute(params![key, SUPERSEDED])?;
            Ok(None)
        }
        (CopyDecision::ClearValue, _) => {
            connection.prepare_cached("update records set value = null where key = ?1")?.execute([key])?;
            Ok(None)
        }
        _ => Ok(None),
    }
}

fn insert_copy(
    connection: &Connection,
    state: &mut WriterState,
    copy: &ReplicaRecord,
) -> rusqlite::Result<()> {
    let row = RowWrite {
        record: &copy.record,
        seq: state.next_seq(),
        at: copy.confirmed_at,
        is_queued: false,
        base: None,
        sent_versions: "",
        is_dispatched: false,
        provisional: None,
        read_state: 0,
    };
    upsert_row(connection, &row)?;
    state.usage.replica.add(row_bytes(&copy.record));
    Ok(())
}

/// Whether this daemon has put the record without the queue.
fn is_recorded_put(connection: &Connection, record: &Record) -> rusqlite::Result<bool> {
    let sql = "select 1 from attempts where key = ?1 and version = ?2 and is_put";
    connection.prepare_cached(sql)?.exists(params![record.key.as_str(), record.version.raw()])
}

/// Evicts copies beyond the limit: first the copies that no caller has used, then the oldest ones. Queued writes stay.
pub(in crate::outage) fn evict(
    connection: &Connection,
    state: &mut WriterState,
    limit: u64,
) -> rusqlite::Result<()> {
    let sql = "delete from records
               where rowid = (select rowid from records where is_queued = 0 order by seq limit 1)
               returning bytes";
    while state.usage.replica.bytes > limit {
        let evicted = connection.prepare_cached(sql)?.query_row([], |row| row.get::<_, i64>(0)).optional()?;
        match evicted {
            Some(bytes) => state.usage.replica.sub(bytes.unsigned_abs()),
            // No copy is left, so the count is wrong. Without the reset the loop would not end (I12).
            None => state.usage.replica = Usage::default(),
        }
    }
    Ok(())
}
