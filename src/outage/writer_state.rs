//! The writer's knowledge of the outage file.

use rusqlite::Connection;

use super::clock_checkpoint::ClockCheckpoint;
use super::{FileUsage, Usage};
use crate::sqlite::file;

/// The first `seq` of copies that no caller has used. These numbers stay negative, so such copies sort before all others.
const FIRST_LISTED_SEQ: i64 = i64::MIN / 2;

/// The figures of the file that the writer keeps in memory. The writer reads them again after a transaction that failed.
#[derive(Debug, Default)]
pub(super) struct WriterState {
    /// False after a failed transaction, whose changes the figures may include.
    pub(super) is_known: bool,
    pub(super) usage: FileUsage,
    /// The last `seq` of a used row.
    seq: i64,
    /// The last `seq` of a copy that no caller has used.
    listed_seq: i64,
    /// The `seq` of the newest queued write.
    pub(super) last_queued: i64,
    /// Replay may have sent queued writes up to this `seq`.
    pub(super) dispatched: i64,
    pub(super) checkpoint: ClockCheckpoint,
    /// The number of failures after which the writer dropped all copies.
    pub(super) dropped_after: u64,
}

impl WriterState {
    pub(super) fn read(connection: &Connection) -> rusqlite::Result<Self> {
        let usage = |sql: &str| {
            connection.query_row(sql, [], |row| {
                let (records, bytes): (i64, i64) = (row.get(0)?, row.get(1)?);
                let usage = Usage { records: records.unsigned_abs(), bytes: bytes.unsigned_abs() };
                Ok((usage, row.get::<_, i64>(2)?))
            })
        };
        // The indexes have `bytes`, so that the sums need no scan of the values.
        let usage_by = |index: &str, is_queued: u8| {
            usage(&format!(
                "select count(*), coalesce(sum(bytes), 0), coalesce(max(seq), 0) from records indexed by {index}
                 where is_queued = {is_queued}"
            ))
        };
        let (queue, last_queued) = usage_by("queue", 1)?;
        let (replica, last_copy) = usage_by("replica", 0)?;
        let (dead_letters, _) = usage("select count(*), coalesce(sum(bytes), 0), 0 from dead_letters")?;
        let dispatched = dispatched(connection)?;
        let listed = "select max(seq) from records indexed by replica where is_queued = 0 and seq < 0";
        let listed_seq = connection.query_row(listed, [], |row| row.get::<_, Option<i64>>(0))?;
        Ok(Self {
            is_known: true,
            usage: FileUsage { queue, replica, dead_letters },
            // A new queued write must not get a `seq` that counts as dispatched.
            seq: last_queued.max(last_copy).max(dispatched),
            listed_seq: listed_seq.unwrap_or(FIRST_LISTED_SEQ),
            last_queued,
            dispatched,
            // A failed transaction may have dropped the invalid copies, so the next one drops them again.
            ..Self::default()
        })
    }

    pub(super) fn next_seq(&mut self) -> i64 {
        self.seq += 1;
        self.seq
    }

    /// The next `seq` of a queued write.
    pub(super) fn next_queued_seq(&mut self) -> i64 {
        self.last_queued = self.next_seq();
        self.last_queued
    }

    pub(super) fn next_listed_seq(&mut self) -> i64 {
        self.listed_seq += 1;
        self.listed_seq
    }
}

/// Reads the `seq` up to which replay may have sent queued writes.
pub(super) fn dispatched(connection: &Connection) -> rusqlite::Result<i64> {
    Ok(file::meta(connection, "dispatched")?.and_then(|seq| seq.parse().ok()).unwrap_or(0))
}
