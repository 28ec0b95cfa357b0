//! Dead letters: acknowledged writes that the store will not hold.

use rusqlite::{Connection, Row, params};

use super::DeadLetter;
use super::file::OutageFile;
use super::rows::condition;
use super::state::WriterState;
use crate::error::Result;
use crate::model::key::Key;
use crate::model::version::{Timestamp, Version};
use crate::sqlite::rows::{COLUMNS, append, record};
use crate::sqlite::writer::CommitLevel;

impl OutageFile {
    /// Reads up to `limit` dead letters after the one with the number `after`, oldest first.
    pub(crate) async fn dead_letters(&self, after: i64, limit: usize) -> Result<Vec<DeadLetter>> {
        let read = move |connection: &Connection| {
            let sql = format!("{} where id > ?1 order by id limit ?2", select());
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            connection.prepare(&sql)?.query_map(params![after, limit], read_dead_letter)?.collect()
        };
        self.database.read(read).await
    }

    /// Deletes the dead letters up to the number `last`, and returns their count.
    pub(crate) async fn delete_dead_letters(&self, last: i64) -> Result<usize> {
        let work = move |connection: &Connection, state: &mut WriterState| {
            let deleted = connection.execute("delete from dead_letters where id <= ?1", [last])?;
            // The bytes of the deleted letters are unknown here.
            *state = WriterState::read(connection)?;
            Ok(deleted)
        };
        self.write(CommitLevel::PowerCut, work).await
    }
}

pub(super) fn select() -> String {
    format!("select {COLUMNS}, id, queued_at, died_at, reason, newer, if_version, append from dead_letters")
}

/// Reads a row of [`select`].
pub(super) fn read_dead_letter(row: &Row<'_>) -> rusqlite::Result<DeadLetter> {
    let append = append(row, 12)?;
    Ok(DeadLetter {
        id: row.get(6)?,
        record: record(row)?,
        condition: condition(row.get(11)?, append.as_ref()),
        append,
        queued_at: Timestamp(row.get(7)?),
        died_at: Timestamp(row.get(8)?),
        reason: row.get(9)?,
        newer: row.get::<_, Option<i64>>(10)?.map(Version::from_raw),
    })
}

/// Adds a queued write to the dead letters, and returns the bytes that it counts.
pub(super) fn add_dead_letter(
    connection: &Connection,
    key: &Key,
    version: Version,
    reason: &str,
    newer: Option<Version>,
    now: Timestamp,
) -> rusqlite::Result<u64> {
    // SQLite copies the row, so the value is neither read nor bound again.
    let sql = "insert into dead_letters
                   (key, version, value, expires_at, user, metadata, bytes, if_version, queued_at, died_at, reason, newer, append)
               select key, version, value, expires_at, user, metadata, bytes, if_version, at, ?3, ?4, ?5, append
               from records where key = ?1 and is_queued = 1 and version = ?2 returning bytes";
    let values = params![key.as_str(), version.raw(), now.0, reason, newer.map(Version::raw)];
    connection.prepare_cached(sql)?.query_row(values, |row| row.get::<_, i64>(0)).map(i64::unsigned_abs)
}
