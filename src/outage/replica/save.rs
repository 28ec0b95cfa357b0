//! Saving and evicting copies, in a transaction of the writer.

use std::cmp::Ordering;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

use crate::model::version::{Timestamp, Version};
use crate::outage::rows::{insert, overwrite_copy, row_bytes};
use crate::outage::settle::settle_row;
use crate::outage::state::WriterState;
use crate::outage::{CopyRank, ReplicaRecord, Verdict};
use crate::store::Applied;

/// No call to the store takes as long as this.
const MAX_CALL: Duration = Duration::from_secs(60);

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
    limit: u64,
) -> rusqlite::Result<()> {
    let record = &copy.record;
    let key = record.key.as_str();
    // In health, the queue is empty, and its index need not be read. A settled write is the copy now, but the row of an append has only
    // the items.
    if state.usage.queue.records > 0
        && settle_row(connection, state, &record.key, record.version, &Ok(Applied::Stored), now)?
            == Some(Verdict::Stored)
    {
        return Ok(());
    }
    let sql = "select seq, version, bytes, value is null, at from records where key = ?1 and is_queued = 0";
    let held = connection.prepare_cached(sql)?.query_row([key], |row| {
        let held = HeldCopy { seq: row.get(0)?, bytes: row.get::<_, i64>(2)?.unsigned_abs() };
        Ok((held, Version::from_raw(row.get(1)?), row.get::<_, bool>(3)?, Timestamp(row.get(4)?)))
    });
    let Some((held, version, held_is_tombstone, held_at)) = held.optional()? else {
        return put_copy(connection, state, copy, None, limit);
    };
    match version.cmp(&record.version) {
        Ordering::Less => put_copy(connection, state, copy, Some(held), limit),
        // Only time can make this version absent.
        Ordering::Equal if record.value.is_none() => Ok(()),
        Ordering::Equal if held_is_tombstone => put_copy(connection, state, copy, Some(held), limit),
        Ordering::Equal => renew(connection, state, copy, held.seq),
        // This call began after the end of the one that brought the newer version. So the database was restored, and is right.
        Ordering::Greater if copy.confirmed_at > held_at.plus(MAX_CALL) => {
            put_copy(connection, state, copy, Some(held), limit)
        }
        // The row was deleted in the store. The copy loses its value and keeps its version.
        Ordering::Greater if record.version == Version::NONE => {
            let sql = "update records set value = null where seq = ?1";
            connection.prepare_cached(sql)?.execute([held.seq]).map(drop)
        }
        Ordering::Greater => Ok(()),
    }
}

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

/// The copy that the file has of a conversation.
#[derive(Clone, Copy)]
struct HeldCopy {
    seq: i64,
    bytes: u64,
}

/// Adds the copy of a conversation, or replaces the one that the file has.
///
/// A copy whose place in the order of eviction stays is overwritten, which changes one row and no index of the keys. While the
/// replica is at most half full, no eviction is near, so each copy keeps its place. From then on, each use renews it.
fn put_copy(
    connection: &Connection,
    state: &mut WriterState,
    copy: &ReplicaRecord,
    held: Option<HeldCopy>,
    limit: u64,
) -> rusqlite::Result<()> {
    let ReplicaRecord { record, confirmed_at, rank } = copy;
    let is_listed = *rank == CopyRank::Listed;
    // A conversation that never existed needs no row.
    let is_needed = record.version != Version::NONE;
    if let Some(held) = held {
        let keeps_place = is_listed || (held.seq > 0 && state.usage.replica.bytes <= limit / 2);
        state.usage.replica.sub(held.bytes);
        if is_needed && keeps_place {
            state.usage.replica.add(row_bytes(record));
            return overwrite_copy(connection, held.seq, record, *confirmed_at);
        }
        // Without `returning`, for which SQLite would build a table in memory.
        connection.prepare_cached("delete from records where seq = ?1")?.execute([held.seq])?;
    }
    if !is_needed {
        return Ok(());
    }
    let seq = if is_listed { state.next_listed_seq() } else { state.next_seq() };
    state.usage.replica.add(row_bytes(record));
    insert(connection, seq, record, *confirmed_at, None)
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
