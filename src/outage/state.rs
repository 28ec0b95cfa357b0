//! The writer's knowledge of the outage file.

use rusqlite::Connection;

use super::clock_checkpoint::ClockCheckpoint;
use super::inspect::{FileSummary, summarize};
use super::{Corrected, FileUsage, QueueFigures, Tail, Usage, Verdict};
use crate::model::key::Key;
use crate::model::version::{Timestamp, Version};
use crate::sqlite::file;

/// The first `seq` of copies that no caller has used. These numbers stay negative, so such copies sort before all others.
const FIRST_LISTED_SEQ: i64 = i64::MIN / 2;
/// The name in `meta` of [`WriterState::unverified`].
pub(super) const UNVERIFIED: &str = "unverified";

/// The figures of the file that the writer keeps in memory. The writer reads them again after a transaction that failed.
#[derive(Debug, Default)]
pub(super) struct WriterState {
    /// False after a failed transaction, whose changes the figures may include.
    pub(super) is_known: bool,
    pub(super) usage: FileUsage,
    /// The last `seq` of a used row.
    pub(super) seq: i64,
    /// The last `seq` of a copy that no caller has used.
    listed_seq: i64,
    /// Copies were lost, so the store may hold newer versions than the queued writes up to this `seq`.
    pub(super) unverified: i64,
    /// The first row of the queue. `None` if it is unknown or missing.
    pub(super) oldest: Option<(i64, Timestamp)>,
    /// The changes of the queue by the present job, for the observer.
    pub(super) change: QueueChange,
    pub(super) checkpoint: ClockCheckpoint,
    /// The number of failures after which the writer dropped all copies.
    pub(super) dropped_after: u64,
}

/// The changes of the queue by one job.
#[derive(Debug, Default)]
pub(super) struct QueueChange {
    pub(super) settled: Vec<Settled>,
    pub(super) corrected: Vec<Corrected>,
    /// The number of rows that came or left.
    pub(super) moved: u64,
    pub(super) figures: QueueFigures,
}

/// A queued write that has found its end.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) key: Key,
    pub(super) version: Version,
    pub(super) verdict: Verdict,
    pub(super) left: Option<Tail>,
}

impl WriterState {
    pub(super) fn read(connection: &Connection) -> rusqlite::Result<Self> {
        let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, Option<i64>>(0));
        let FileSummary { queued: queue, dead_letters, conversations: replica, .. } = summarize(connection)?;
        let usage = FileUsage { queue, replica, dead_letters };
        let unverified = file::meta(connection, UNVERIFIED)?.and_then(|seq| seq.parse().ok()).unwrap_or(0);
        let listed = "select max(seq) from records indexed by replica where is_queued = 0 and seq < 0";
        Ok(Self {
            is_known: true,
            usage,
            // A new row must not count as unverified.
            seq: number("select max(seq) from records")?.unwrap_or(0).max(unverified),
            listed_seq: number(listed)?.unwrap_or(FIRST_LISTED_SEQ),
            unverified,
            // A failed transaction may have dropped the invalid copies, so the next one drops them again.
            ..Self::default()
        })
    }

    pub(super) fn next_seq(&mut self) -> i64 {
        self.seq += 1;
        self.seq
    }

    pub(super) fn next_listed_seq(&mut self) -> i64 {
        self.listed_seq += 1;
        self.listed_seq
    }

    pub(super) fn joined_queue(&mut self, seq: i64, queued_at: Timestamp, bytes: u64) {
        self.change.moved += 1;
        if self.usage.queue.records == 0 {
            self.oldest = Some((seq, queued_at));
        }
        self.usage.queue.add(bytes);
    }

    pub(super) fn left_queue(&mut self, seq: i64, bytes: u64) {
        self.change.moved += 1;
        self.usage.queue.sub(bytes);
        self.oldest.take_if(|(oldest, _)| *oldest == seq);
    }

    /// Returns the newest version that the present job has corrected.
    pub(super) fn newest_corrected(&self) -> Version {
        self.change.corrected.iter().map(|corrected| corrected.version).max().unwrap_or(Version::NONE)
    }

    /// Records that copies are lost.
    pub(super) fn lose_copies(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        self.usage.replica = Usage::default();
        self.unverified = self.seq;
        file::set_meta(connection, UNVERIFIED, &self.unverified.to_string())
    }

    /// Ends a job, and returns its changes of the queue.
    pub(super) fn take_change(&mut self, connection: &Connection) -> rusqlite::Result<QueueChange> {
        if self.oldest.is_none() && self.usage.queue.records > 0 {
            let sql = "select seq, at from records where is_queued = 1 order by seq limit 1";
            let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, Timestamp(row.get(1)?)));
            self.oldest = Some(connection.prepare_cached(sql)?.query_row([], read)?);
        }
        let mut change = std::mem::take(&mut self.change);
        let Usage { records: rows, bytes } = self.usage.queue;
        change.figures =
            QueueFigures { rows, bytes, oldest: self.oldest.map(|(_, queued_at)| queued_at), parked: 0 };
        Ok(change)
    }
}
