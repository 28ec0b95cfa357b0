//! Saving and evicting copies, in a transaction of the writer.

use std::cmp::Ordering;

use rusqlite::{Connection, OptionalExtension, params};

use crate::model::version::{Timestamp, Version};
use crate::outage::rows::{delete_copy, insert, row_bytes};
use crate::outage::settle::settle_row;
use crate::outage::state::WriterState;
use crate::outage::{CopyRank, ReplicaRecord};
use crate::store::Applied;

/// Drops all copies, because some may be older than acknowledged writes.
///
/// A queued write may be older, too, because the file could not keep the newer copy. So the queued writes become unverified.
pub(super) fn drop_copies(connection: &Connection, state: &mut WriterState) -> rusqlite::Result<()> {
    connection.execute("delete from records where is_queued = 0", [])?;
    state.lose_copies(connection)
}

/// Saves a copy. It settles a queued write of the same version.
///
/// A newer copy stands beside a queued write. Reads skip that write, and replay still sends it, because only the store can say
/// that it is a dead letter (I10). A copy that no caller has used gets a negative `seq`, and so is evicted before all used ones.
pub(super) fn save(
    connection: &Connection,
    state: &mut WriterState,
    copy: &ReplicaRecord,
    now: Timestamp,
) -> rusqlite::Result<()> {
    let record = &copy.record;
    let key = record.key.as_str();
    let stored = Ok(Applied::Stored);
    if settle_row(connection, state, &record.key, record.version, &stored, now)?.is_some() {
        return Ok(());
    }
    let sql = "select seq, version, value is null from records where key = ?1 and is_queued = 0";
    let held = connection.prepare_cached(sql)?.query_row([key], |row| {
        Ok((row.get::<_, i64>(0)?, Version::from_raw(row.get(1)?), row.get::<_, bool>(2)?))
    });
    let Some((seq, version, held_is_tombstone)) = held.optional()? else {
        // A conversation that never existed needs no row.
        let is_known = record.version != Version::NONE;
        return if is_known { insert_copy(connection, state, copy, None) } else { Ok(()) };
    };
    match version.cmp(&record.version) {
        Ordering::Less => insert_copy(connection, state, copy, Some(seq)),
        // Only time can make this version absent.
        Ordering::Equal if record.value.is_none() => Ok(()),
        Ordering::Equal if held_is_tombstone => insert_copy(connection, state, copy, Some(seq)),
        Ordering::Equal => renew(connection, state, copy, seq),
        // The row was deleted in the store. The copy loses its value and keeps its version.
        Ordering::Greater if record.version == Version::NONE => {
            let sql = "update records set value = null where seq = ?1";
            connection.prepare_cached(sql)?.execute([seq]).map(drop)
        }
        Ordering::Greater => Ok(()),
    }
}

/// Changes rank and age of a copy that the file has.
fn renew(
    connection: &Connection,
    state: &mut WriterState,
    copy: &ReplicaRecord,
    held: i64,
) -> rusqlite::Result<()> {
    let seq = match copy.rank {
        CopyRank::Used => state.next_seq(),
        CopyRank::Read if held < 0 => state.next_seq(),
        // A listing neither makes a copy used nor takes that rank away.
        CopyRank::Read | CopyRank::Listed => held,
    };
    // The file may have a later confirmation already.
    let sql = "update records set seq = ?2, at = max(at, ?3) where seq = ?1";
    connection.prepare_cached(sql)?.execute(params![held, seq, copy.confirmed_at.0]).map(drop)
}

/// Replaces the copy of a conversation. `held` is the `seq` of the copy before.
fn insert_copy(
    connection: &Connection,
    state: &mut WriterState,
    copy: &ReplicaRecord,
    held: Option<i64>,
) -> rusqlite::Result<()> {
    let ReplicaRecord { record, confirmed_at, rank } = copy;
    if held.is_some() {
        delete_copy(connection, state, &record.key)?;
    }
    let seq = match (rank, held) {
        (CopyRank::Listed, Some(held)) => held,
        (CopyRank::Listed, None) => state.next_listed_seq(),
        _ => state.next_seq(),
    };
    insert(connection, seq, record, *confirmed_at, None)?;
    state.usage.replica.add(row_bytes(record));
    Ok(())
}

/// Evicts copies beyond the limit: first the copies that no caller has used, then the oldest ones.
///
/// Queued writes stay. So does the copy of a conversation with a queued write: it tells whether the store has moved on.
pub(in crate::outage) fn evict(
    connection: &Connection,
    state: &mut WriterState,
    limit: u64,
) -> rusqlite::Result<()> {
    let sql = "delete from records where seq = (
                   select seq from records as copy where is_queued = 0 and not exists (
                       select 1 from records as queued where queued.key = copy.key and queued.is_queued = 1)
                   order by seq limit 1)
               returning bytes";
    while state.usage.replica.bytes > limit {
        let evicted = connection.prepare_cached(sql)?.query_row([], |row| row.get::<_, i64>(0)).optional()?;
        match evicted {
            Some(bytes) => state.usage.replica.sub(bytes.unsigned_abs()),
            // Only copies that must stay are left. The queue's limit bounds them (I12).
            None => return Ok(()),
        }
    }
    Ok(())
}
