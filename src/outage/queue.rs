//! The queue: one row for each conversation with writes that the store does not have yet.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::clock_correction::{self, corrected, corrected_base, is_still_provisional};
use super::file::{OutageFile, lock};
use super::row::{SUPERSEDED, UNSYNCED_PERIOD, UNVERIFIED, unsynced_period};
use super::writer_state::WriterState;
use super::{IndexEntry, QueuedRow};
use crate::error::Result;
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::model::version::{Timestamp, Version};
use crate::sqlite::file;
use crate::sqlite::rows::{self, COLUMNS, record, versions};
use crate::sqlite::writer::CommitLevel;

impl OutageFile {
    /// Reads the entries of the queue index.
    pub(super) async fn load_index(&self) -> Result<Vec<IndexEntry>> {
        let copies_are_invalid = self.validity.is_invalid();
        let sql = format!(
            "select key, version, {UNSYNCED_PERIOD}, at, read_state from records where is_queued = 1"
        );
        let read = move |row: &Row<'_>| {
            let read_state: i64 = row.get(4)?;
            Ok(IndexEntry {
                key: rows::key(row)?,
                version: Version::from_raw(row.get(1)?),
                unsynced: unsynced_period(row, 2)?,
                queued_at: Timestamp(row.get(3)?),
                is_superseded: read_state == SUPERSEDED,
                // On a full disk the drop of the copies failed, so the read states are too old (I16).
                is_unverified: copies_are_invalid || read_state == UNVERIFIED,
            })
        };
        self.database.read(move |connection| connection.prepare(&sql)?.query_map([], read)?.collect()).await
    }

    /// Records a write that bypasses the queue, before it is sent (I7). If the process dies before the response, a queued write
    /// of the conversation recognises the version in the store.
    ///
    /// A failure of the disk does not delay the write.
    pub(crate) async fn record_attempt(&self, key: &Key, version: Version, is_put: bool) {
        let key = key.clone();
        let work = move |connection: &Connection, _: &mut WriterState| {
            let sql = "insert or ignore into attempts values (?1, ?2, ?3)";
            connection.prepare_cached(sql)?.execute(params![key.as_str(), version.raw(), is_put])
        };
        // Without a sync, because each direct write waits for this.
        if let Err(error) = self.write(CommitLevel::ProcessCrash, work).await {
            tracing::debug!(%error, "the outage file cannot record an attempt; the write is sent without a record");
        }
    }

    /// Deletes the record of an attempt that certainly failed. A record that stays does no harm.
    pub(crate) async fn delete_attempt(&self, key: &Key, version: Version) {
        let key = key.clone();
        let work = move |connection: &Connection, _: &mut WriterState| {
            let sql = "delete from attempts where key = ?1 and version = ?2";
            connection.prepare_cached(sql)?.execute(params![key.as_str(), version.raw()])
        };
        self.submit(CommitLevel::ProcessCrash, work, |_| {}).await.ok();
    }

    /// Reads the newest write of a conversation. The write is queued, or was completed meanwhile.
    pub(crate) async fn queued(&self, key: &Key) -> Result<Option<QueuedRow>> {
        let (key, clock) = (key.clone(), Arc::clone(&self.clock));
        let dispatched = lock(&self.state).dispatched;
        let read = move |connection: &Connection| {
            let mut find = connection.prepare_cached(&format!("{} where key = ?2", select()))?;
            find.query_row(params![dispatched, key.as_str()], |row| queued_row(row, &clock)).optional()
        };
        self.database.read(read).await
    }

    /// Reads the next batch of [dispatched](Self::mark_dispatched) writes after `after`, in the order of the queue.
    ///
    /// The batch has at most `max_records`, and at most `max_bytes` unless its first write is larger. Provisional writes are
    /// skipped until [`apply_clock_correction`](Self::apply_clock_correction) has corrected them (I8).
    pub(super) async fn next_batch(
        &self,
        after: i64,
        max_records: usize,
        max_bytes: usize,
    ) -> Result<Vec<QueuedRow>> {
        let clock = Arc::clone(&self.clock);
        let dispatched = lock(&self.state).dispatched;
        let read = move |connection: &Connection| {
            // A write that replaces a row after the mark does not count that row as sent (I7).
            let sql = format!(
                "{} where is_queued = 1 and provisional_skew_ms is null and seq > ?2 and seq <= ?1
                 order by seq limit ?3",
                select()
            );
            let mut find = connection.prepare_cached(&sql)?;
            let max_records = i64::try_from(max_records).unwrap_or(i64::MAX);
            let (mut batch, mut bytes) = (Vec::new(), 0);
            let values = params![dispatched, after, max_records];
            for queued in find.query_map(values, |row| queued_row(row, &clock))? {
                let queued = queued?;
                bytes += queued.record.bytes();
                // A record above the limit goes alone. Otherwise it would never be sent.
                if bytes > max_bytes && !batch.is_empty() {
                    break;
                }
                batch.push(queued);
            }
            Ok(batch)
        };
        self.database.read(read).await
    }

    /// Records that replay may send every write that is queued now (I7).
    ///
    /// Replay calls this before it reads the writes. Otherwise a write that replaces one of them meanwhile would not know that
    /// the store may hold the replaced one.
    pub(super) async fn mark_dispatched(&self) -> Result<()> {
        let is_marked = |state: &WriterState| state.is_known && state.dispatched >= state.last_queued;
        // Most rounds of replay find nothing new, and need no sync.
        if is_marked(&lock(&self.state)) {
            return Ok(());
        }
        let work = move |connection: &Connection, state: &mut WriterState| {
            if state.dispatched < state.last_queued {
                state.dispatched = state.last_queued;
                file::set_meta(connection, "dispatched", &state.dispatched.to_string())?;
            }
            Ok(())
        };
        // Synced, because the batch follows: after a power cut the rows must count as dispatched (I7).
        self.write(CommitLevel::PowerCut, work).await
    }

    /// Corrects the provisional writes whose unsynced period has ended.
    pub(super) async fn apply_clock_correction(&self) -> Result<()> {
        let clock = Arc::clone(&self.clock);
        let work = move |connection: &Connection, state: &mut WriterState| {
            clock_correction::apply_clock_correction(connection, state, &clock)
        };
        self.write(CommitLevel::PowerCut, work).await
    }

    /// Gives a queued write another version, because its version is ahead of the store's clock. Returns false if the write is
    /// not queued any more.
    pub(super) async fn assign_version(&self, key: &Key, from: Version, to: Version) -> Result<bool> {
        let (key, moved) = (key.clone(), to.at().0 - from.at().0);
        let work = move |connection: &Connection, state: &mut WriterState| {
            // A request of the old version may still be on its way. The store takes that version once real time has caught up.
            let sql = "update records set version = ?3, expires_at = expires_at + ?4,
                           sent_versions = case when dispatched or seq <= ?5
                                           then sent_versions || ' ' || version else sent_versions end
                       where key = ?1 and version = ?2 and is_queued = 1";
            let values = params![key.as_str(), from.raw(), to.raw(), moved, state.dispatched];
            Ok(connection.execute(sql, values)? == 1)
        };
        self.write(CommitLevel::PowerCut, work).await
    }
}

/// Selects the columns of [`queued_row`]. The attempts are read here and not copied into the row, because an attempt may be
/// younger than the row.
fn select() -> String {
    let attempts = |condition: &str| {
        format!(
            "coalesce((select group_concat(version, ' ') from attempts where key = records.key {condition}), '')"
        )
    };
    let (all, puts) = (attempts(""), attempts("and is_put"));
    format!(
        "select {COLUMNS}, base, sent_versions, dispatched or seq <= ?1, seq, {UNSYNCED_PERIOD}, is_queued, at, {all}, {puts}
         from records"
    )
}

fn queued_row(row: &Row<'_>, clock: &Clock) -> rusqlite::Result<QueuedRow> {
    let mut record = record(row)?;
    let (sent_versions, unsynced): (String, _) = (row.get(7)?, unsynced_period(row, 10)?);
    if let Some(moved) = unsynced.and_then(|unsynced| clock.exact_correction_ms(unsynced)) {
        // A version ignores a correction within the tolerance. An expiry does not (I17).
        record.version = corrected(record.version, unsynced, Timestamp(row.get(12)?), clock);
        record.expires_at = Timestamp(record.expires_at.0.saturating_add(moved));
    }
    let (attempts, puts): (String, String) = (row.get(13)?, row.get(14)?);
    let is_newer = |version: &Version| *version > record.version;
    let replaced_by = versions(&sent_versions).chain(versions(&puts)).filter(is_newer).collect();
    Ok(QueuedRow {
        base: corrected_base(row.get(6)?, &sent_versions, unsynced, clock),
        unsynced: unsynced.filter(|unsynced| is_still_provisional(Some(*unsynced), clock)),
        sent_versions: versions(&sent_versions).chain(versions(&attempts)).collect(),
        replaced_by,
        record: record.into(),
        is_dispatched: row.get(8)?,
        seq: row.get(9)?,
        is_queued: row.get(11)?,
    })
}
