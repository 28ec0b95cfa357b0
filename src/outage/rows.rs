//! The rows of the table `records`: queued writes, and copies.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::QueuedWrite;
use super::rules::QueuedHead;
use super::state::WriterState;
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};
use crate::model::writer::WriterId;
use crate::sqlite::rows::{COLUMNS, append, append_text, record};
use crate::store::{Append, Condition, Write, WriteHead, WriteKind};

/// The bytes that a row and its index entries cost beside the record.
const ROW_OVERHEAD: usize = 200;

/// The order of the queued writes of a conversation. A provisional write is newer than one with a final version, whatever the
/// numbers say, because its process has seen no answer since.
const KEY_ORDER: &str = "order by is_provisional, version";

/// Inserts a row. `queued` is none for a copy.
pub(super) fn insert(
    connection: &Connection,
    seq: i64,
    record: &Record,
    at: Timestamp,
    queued: Option<&QueuedWrite>,
) -> rusqlite::Result<()> {
    let sql = "insert into records (seq, key, is_queued, version, expires_at, at, bytes, writer, if_version, is_provisional,
                                    user, metadata, value, append)
               values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)";
    let append = append_text(queued.and_then(|queued| queued.write.append.as_ref()))?;
    let values = params![
        seq,
        record.key.as_str(),
        queued.is_some(),
        record.version.raw(),
        record.expires_at.0,
        at.0,
        to_i64(row_bytes(record)),
        queued.map_or(0, |queued| queued.write.writer.raw()),
        queued.and_then(|queued| if_version(queued.write.condition)),
        queued.is_some_and(|queued| queued.is_provisional),
        record.user,
        record.metadata.as_str(),
        value_text(record),
        append,
    ];
    connection.prepare_cached(sql)?.execute(values).map(drop)
}

/// Overwrites a copy with another record of its conversation.
pub(super) fn overwrite_copy(
    connection: &Connection,
    seq: i64,
    record: &Record,
    at: Timestamp,
) -> rusqlite::Result<()> {
    let sql = "update records set version = ?2, expires_at = ?3, at = ?4, bytes = ?5, user = ?6, metadata = ?7, value = ?8
               where seq = ?1";
    let values = params![
        seq,
        record.version.raw(),
        record.expires_at.0,
        at.0,
        to_i64(row_bytes(record)),
        record.user,
        record.metadata.as_str(),
        value_text(record),
    ];
    connection.prepare_cached(sql)?.execute(values).map(drop)
}

/// Adds a write to the queue.
pub(super) fn insert_queued(
    connection: &Connection,
    state: &mut WriterState,
    queued: &QueuedWrite,
) -> rusqlite::Result<()> {
    let (seq, record) = (state.next_seq(), &queued.write.record);
    insert(connection, seq, record, queued.queued_at, Some(queued))?;
    state.joined_queue(seq, queued.queued_at, row_bytes(record));
    Ok(())
}

/// Adds a write to the queue in place of the queued writes with these versions.
pub(super) fn replace_queued(
    connection: &Connection,
    state: &mut WriterState,
    replaced: &[Version],
    queued: &QueuedWrite,
) -> rusqlite::Result<()> {
    for version in replaced {
        delete_queued(connection, state, queued.key(), *version)?;
    }
    insert_queued(connection, state, queued)
}

/// Selects the columns of [`queued_write`].
pub(super) fn select() -> String {
    format!("select {COLUMNS}, seq, writer, if_version, at, is_provisional, append from records")
}

/// Reads a row of [`select`].
pub(super) fn queued_write(row: &Row<'_>) -> rusqlite::Result<QueuedWrite> {
    let mut write = Write::new(record(row)?).with_writer(WriterId::from_raw(row.get(7)?));
    write.append = append(row, 11)?;
    write.condition = condition(row.get(8)?, write.append.as_ref());
    let (queued_at, is_provisional) = (Timestamp(row.get(9)?), row.get(10)?);
    Ok(QueuedWrite { seq: row.get(6)?, write, queued_at, is_provisional })
}

/// Reads the queued writes of a conversation without their values, in order.
pub(super) fn heads(connection: &Connection, key: &Key) -> rusqlite::Result<Vec<QueuedHead>> {
    let sql = format!(
        "select version, writer, if_version, is_provisional, value is null, expires_at, append from records
         where key = ?1 and is_queued = 1 {KEY_ORDER}"
    );
    let head = |row: &Row<'_>| {
        let (append, is_tombstone) = (append(row, 6)?, row.get(4)?);
        let write = WriteHead {
            condition: condition(row.get(2)?, append.as_ref()),
            kind: match append {
                Some(_) => WriteKind::Append,
                None if is_tombstone => WriteKind::Remove,
                None => WriteKind::Put,
            },
            version: Version::from_raw(row.get(0)?),
            writer: WriterId::from_raw(row.get(1)?),
            expires_at: Timestamp(row.get(5)?),
        };
        Ok(QueuedHead { write, is_provisional: row.get(3)? })
    };
    connection.prepare_cached(&sql)?.query_map([key.as_str()], head)?.collect()
}

/// Reads the first queued write of a conversation.
pub(super) fn first_queued(connection: &Connection, key: &Key) -> rusqlite::Result<Option<QueuedWrite>> {
    let sql = format!("{} where key = ?1 and is_queued = 1 {KEY_ORDER} limit 1", select());
    connection.prepare_cached(&sql)?.query_row([key.as_str()], queued_write).optional()
}

/// Reads the queued writes of a conversation from the one at this place on, in order.
pub(super) fn queued_from(
    connection: &Connection,
    key: &Key,
    place: usize,
) -> rusqlite::Result<Vec<QueuedWrite>> {
    let sql = format!("{} where key = ?1 and is_queued = 1 {KEY_ORDER} limit -1 offset ?2", select());
    let place = i64::try_from(place).unwrap_or(i64::MAX);
    connection.prepare_cached(&sql)?.query_map(params![key.as_str(), place], queued_write)?.collect()
}

/// Reads the queued write with this version.
pub(super) fn queued_write_of(
    connection: &Connection,
    key: &Key,
    version: Version,
) -> rusqlite::Result<QueuedWrite> {
    let sql = format!("{} where key = ?1 and is_queued = 1 and version = ?2", select());
    connection.prepare_cached(&sql)?.query_row(params![key.as_str(), version.raw()], queued_write)
}

/// Deletes a queued write.
pub(super) fn delete_queued(
    connection: &Connection,
    state: &mut WriterState,
    key: &Key,
    version: Version,
) -> rusqlite::Result<()> {
    let sql = "delete from records where key = ?1 and is_queued = 1 and version = ?2 returning seq, bytes";
    let mut delete = connection.prepare_cached(sql)?;
    let deleted =
        delete.query_map(params![key.as_str(), version.raw()], |row| Ok((row.get(0)?, row.get(1)?)))?;
    for row in deleted {
        let (seq, bytes): (i64, i64) = row?;
        state.left_queue(seq, bytes.unsigned_abs());
    }
    Ok(())
}

/// Deletes the copy of a conversation.
pub(super) fn delete_copy(
    connection: &Connection,
    state: &mut WriterState,
    key: &Key,
) -> rusqlite::Result<()> {
    let sql = "delete from records where key = ?1 and is_queued = 0 returning bytes";
    let deleted = connection.prepare_cached(sql)?.query_row([key.as_str()], |row| row.get::<_, i64>(0));
    if let Some(bytes) = deleted.optional()? {
        state.usage.replica.sub(bytes.unsigned_abs());
    }
    Ok(())
}

/// Reads the copy of a conversation.
pub(super) fn copy(connection: &Connection, key: &Key) -> rusqlite::Result<Option<Record>> {
    let sql = format!("select {COLUMNS} from records where key = ?1 and is_queued = 0");
    connection.prepare_cached(&sql)?.query_row([key.as_str()], record).optional()
}

/// Returns the version of the copy of a conversation, or [`Version::NONE`].
pub(super) fn copy_version(connection: &Connection, key: &Key) -> rusqlite::Result<Version> {
    let sql = "select version from records where key = ?1 and is_queued = 0";
    let found = connection.prepare_cached(sql)?.query_row([key.as_str()], |row| row.get(0)).optional()?;
    Ok(found.map_or(Version::NONE, Version::from_raw))
}

/// The column `if_version` of a condition.
pub(super) fn if_version(condition: Condition) -> Option<i64> {
    match condition {
        Condition::IfVersion(base) => Some(base.raw()),
        Condition::Any | Condition::IfPresent => None,
    }
}

/// Returns the condition of a write with this base, or of an append.
pub(super) fn condition(if_version: Option<i64>, append: Option<&Append>) -> Condition {
    match (if_version, append) {
        (_, Some(append)) if append.only_if_present => Condition::IfPresent,
        (Some(base), None) => Condition::IfVersion(Version::from_raw(base)),
        _ => Condition::Any,
    }
}

/// The bytes that a record counts against the limits.
pub(super) fn row_bytes(record: &Record) -> u64 {
    (record.bytes() + ROW_OVERHEAD) as u64
}

pub(super) fn to_i64(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

pub(super) fn value_text(record: &Record) -> Option<&str> {
    record.value.as_ref().map(Json::as_str)
}
