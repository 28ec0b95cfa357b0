//! Dead letters: acknowledged writes that the source of truth will never hold.

use rusqlite::{Connection, Row, params};

use super::{COLUMNS, Spool, State, Survives, record};
use crate::error::Result;
use crate::record::Key;
use crate::spool::{DeadLetter, Reason};
use crate::version::{Timestamp, Version};

impl Spool {
    /// Dead letters after the one numbered `after`, in the order in which they died.
    pub(crate) async fn dead_letters(&self, after: i64, most: usize) -> Result<Vec<DeadLetter>> {
        let read = move |connection: &Connection| {
            let sql = format!(
                "select {COLUMNS}, id, queued_at, died_at, reason, newer from dead_letters where id > ?1
                 order by id limit ?2"
            );
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            connection.prepare(&sql)?.query_map(params![after, most], letter)?.collect()
        };
        self.database.read(read).await
    }

    /// Forgets the dead letters up to the one numbered `last`; says how many there were.
    pub(crate) async fn forget_dead_letters(&self, last: i64) -> Result<usize> {
        let work = move |connection: &Connection, state: &mut State| {
            let forgotten = connection.execute("delete from dead_letters where id <= ?1", [last])?;
            *state = State::read(connection)?;
            Ok(forgotten)
        };
        self.write(Survives::PowerCut, work).await
    }
}

/// A row with [`COLUMNS`], number, times, reason, and what it lost against.
pub(super) fn letter(row: &Row<'_>) -> rusqlite::Result<DeadLetter> {
    Ok(DeadLetter {
        id: row.get(6)?,
        record: record(row)?,
        queued_at: Timestamp(row.get(7)?),
        died_at: Timestamp(row.get(8)?),
        reason: row.get(9)?,
        newer: row.get::<_, Option<i64>>(10)?.map(Version::from_raw),
    })
}

/// Copies a queued write to the dead letters, and says what it counts.
pub(super) fn bury(
    connection: &Connection,
    key: &Key,
    version: Version,
    reason: &Reason,
    now: Timestamp,
) -> rusqlite::Result<u64> {
    let sql = "insert into dead_letters
                   (key, version, value, expires_at, user, metadata, bytes, queued_at, died_at, reason, newer)
               select key, ?2, value, expires_at, user, metadata, bytes, at, ?3, ?4, ?5 from records where key = ?1
               returning bytes";
    let newer = reason.newer.map(Version::raw);
    let bury = params![key.as_str(), version.raw(), now.0, reason.text, newer];
    connection.prepare_cached(sql)?.query_row(bury, |row| row.get::<_, i64>(0)).map(i64::unsigned_abs)
}
