//! A row of the table `records`: a queued write, or a copy.
//!
//! A conversation has at most one row.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::clock_correction::{corrected, corrected_base, is_still_provisional};
use super::writer_state::WriterState;
use crate::model::clock::{Clock, UnsyncedPeriod};
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};

/// The bytes that a row and its index entries cost beside the record.
const ROW_OVERHEAD: usize = 200;

/// The `read_state` of a queued write that the store was seen to supersede.
pub(super) const SUPERSEDED: i64 = 1;
/// The `read_state` of a queued write that the store may have superseded.
pub(super) const UNVERIFIED: i64 = 2;

/// The unsynced period that issued a version, as a column of a query. Null if the version is final.
pub(super) const UNSYNCED_PERIOD: &str = "iif(provisional_skew_ms is null, null, unsynced_period)";

/// Reads [`UNSYNCED_PERIOD`].
pub(super) fn unsynced_period(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<UnsyncedPeriod>> {
    row.get::<_, Option<u32>>(column).map(|number| number.map(UnsyncedPeriod))
}

/// The columns of a row to be written.
pub(super) struct RowWrite<'a> {
    pub(super) record: &'a Record,
    pub(super) seq: i64,
    pub(super) at: Timestamp,
    pub(super) is_queued: bool,
    pub(super) base: Option<Version>,
    pub(super) sent_versions: &'a str,
    pub(super) is_dispatched: bool,
    /// Of a provisional version: the lead of the issuing clock over the system's clock, and the unsynced period.
    pub(super) provisional: Option<(i64, UnsyncedPeriod)>,
    /// [`SUPERSEDED`], [`UNVERIFIED`], or 0.
    pub(super) read_state: i64,
}

/// Writes the row of a conversation in place. A delete and an insert would touch twice the pages.
pub(super) fn upsert_row(connection: &Connection, row: &RowWrite<'_>) -> rusqlite::Result<()> {
    let sql = "insert into records (key, version, value, expires_at, user, metadata, bytes, seq, at, is_queued, base,
                                    sent_versions, dispatched, provisional_skew_ms, read_state, unsynced_period)
               values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)
               on conflict (key) do update set
                   version = ?2, value = ?3, expires_at = ?4, user = ?5, metadata = ?6, bytes = ?7, seq = ?8, at = ?9,
                   is_queued = ?10, base = ?11, sent_versions = ?12, dispatched = ?13, provisional_skew_ms = ?14,
                   read_state = ?15, unsynced_period = ?16";
    let RowWrite { record, seq, at, is_queued, base, sent_versions, is_dispatched, provisional, read_state } =
        row;
    let values = params![
        record.key.as_str(),
        record.version.raw(),
        value_text(record),
        record.expires_at.0,
        record.user,
        record.metadata.as_str(),
        to_i64(row_bytes(record)),
        seq,
        at.0,
        is_queued,
        base.map(Version::raw),
        sent_versions,
        is_dispatched,
        provisional.map(|(skew_ms, _)| skew_ms),
        read_state,
        provisional.map_or(0, |(_, UnsyncedPeriod(number))| number),
    ];
    connection.prepare_cached(sql)?.execute(values).map(drop)
}

/// The row that the file has for a conversation.
pub(super) struct StoredRow {
    /// The version after clock sync.
    pub(super) version: Version,
    /// The version as it was issued. If the clock was unsynced, replay may have sent this one.
    pub(super) issued: Version,
    pub(super) is_queued: bool,
    pub(super) bytes: u64,
    pub(super) base: Option<Version>,
    pub(super) sent_versions: String,
    pub(super) is_dispatched: bool,
    pub(super) is_provisional: bool,
}

impl StoredRow {
    pub(super) fn find(
        connection: &Connection,
        state: &WriterState,
        key: &Key,
        clock: &Clock,
    ) -> rusqlite::Result<Option<Self>> {
        // One number in `meta` marks all rows up to its `seq` as dispatched, so replay rewrites no row.
        let sql = format!(
            "select version, is_queued, bytes, base, sent_versions, dispatched or seq <= ?2, {UNSYNCED_PERIOD}, at
             from records where key = ?1"
        );
        let read = |row: &Row<'_>| {
            let (sent_versions, unsynced): (String, _) = (row.get(4)?, unsynced_period(row, 6)?);
            let issued = Version::from_raw(row.get(0)?);
            Ok(Self {
                version: corrected(issued, unsynced, Timestamp(row.get(7)?), clock),
                issued,
                is_queued: row.get(1)?,
                bytes: row.get::<_, i64>(2)?.unsigned_abs(),
                base: corrected_base(row.get(3)?, &sent_versions, unsynced, clock),
                sent_versions,
                is_dispatched: row.get(5)?,
                is_provisional: is_still_provisional(unsynced, clock),
            })
        };
        connection.prepare_cached(&sql)?.query_row(params![key.as_str(), state.dispatched], read).optional()
    }

    /// Returns base and sent versions of an update that replaces this queued write.
    pub(super) fn inherited_base(&self) -> (Option<Version>, String) {
        match self.base {
            // A put replaces any older version, and so does an update of the put. `Version::NONE` in the list marks that.
            None => (Some(self.version), format!("{}{}", Version::NONE, self.sent())),
            // The store may hold the base of this update, or this update.
            Some(base) => (Some(base), format!("{}{}", self.sent_versions, self.sent())),
        }
    }

    /// The versions under which the store may hold this write, each after a space.
    fn sent(&self) -> String {
        if !self.is_dispatched {
            String::new()
        } else if self.issued == self.version {
            format!(" {}", self.version)
        } else {
            // A direct write was sent under the issued version. Replay sends the corrected one (I8).
            format!(" {} {}", self.version, self.issued)
        }
    }
}

/// Deletes the attempts up to a version that the store holds. Called when no write of the conversation is queued: older
/// attempts cannot reach the store any more, and no queued write can meet them.
pub(super) fn clear_attempts(connection: &Connection, key: &Key, version: Version) -> rusqlite::Result<()> {
    let sql = "delete from attempts where key = ?1 and version <= ?2";
    connection.prepare_cached(sql)?.execute(params![key.as_str(), version.raw()]).map(drop)
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
