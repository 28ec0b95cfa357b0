//! Queueing of a write.
//!
//! [`decide`] compares the write with the row of its conversation. [`enqueue`] carries the decision out, in one transaction of
//! the writer.

use std::sync::Arc;

use rusqlite::Connection;

use super::clock_correction::{apply_clock_correction, corrected, is_still_provisional};
use super::dead_letters::add_dead_letter;
use super::file::{OutageFile, queue_full};
use super::row::{RowWrite, StoredRow, row_bytes, upsert_row};
use super::writer_state::WriterState;
use super::{DeadLetterReason, EnqueueOutcome, FileUsage, NewQueuedWrite};
use crate::error::Result;
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{MAX_CLOCK_SKEW, Version};
use crate::sqlite::rows::versions;
use crate::sqlite::writer::{CommitLevel, closed};

impl OutageFile {
    /// Queues a write. The write is synced to disk when this returns `Queued` (I4).
    ///
    /// The writer calls `on_commit` before any caller learns of a later transaction. So a completion of this write finds the
    /// write in the index.
    ///
    /// # Errors
    /// [`QueueFull`](crate::ErrorKind::QueueFull) if the write does not fit. [`LocalStorage`](crate::ErrorKind::LocalStorage)
    /// if the file cannot be written.
    pub(crate) async fn enqueue(
        &self,
        write: NewQueuedWrite,
        on_commit: impl FnOnce(EnqueueOutcome) + Send + 'static,
    ) -> Result<EnqueueOutcome> {
        let (limit, clock) = (self.limits.queue, Arc::clone(&self.clock));
        // From here on, saved copies wait for this commit. Otherwise a reader of a newer version could learn of
        // this older write afterwards (I16).
        let in_flight = self.writes_in_flight.begin(write.record.bytes());
        let work = move |connection: &Connection, state: &mut WriterState| {
            enqueue(connection, state, &write, &clock, limit)
        };
        let on_commit = |outcome: &Result<Option<EnqueueOutcome>>| {
            if let Ok(Some(outcome)) = outcome {
                on_commit(*outcome);
            }
            // Last, because a copy that no longer waits must find the write in the index.
            drop(in_flight);
        };
        let receiver = self.submit(CommitLevel::Acknowledged, work, on_commit).await?;
        let outcome = receiver.await.map_err(|_| closed())?;
        if outcome.is_err() {
            // The failed transaction counted the write in the figures.
            self.reload_state().await.ok();
        }
        outcome?.ok_or_else(|| queue_full(self.path(), self.limits, self.usage()))
    }
}

/// The decision about a write to be queued.
enum EnqueueDecision {
    /// The write is not queued.
    Answer(EnqueueOutcome),
    /// The write replaces the row.
    Insert { base: Option<Version>, sent_versions: String },
    /// The write replaces the row, a queued write that the store superseded by this version.
    Supersede(Version),
}

/// Compares a write with the row of its conversation. `version` is the write's version after clock sync, if the clock has
/// synced. Otherwise the version `is_provisional`.
fn decide(
    write: &NewQueuedWrite,
    version: Version,
    is_provisional: bool,
    row: Option<&StoredRow>,
) -> EnqueueDecision {
    let answer = EnqueueDecision::Answer;
    let insert = |base, sent_versions| EnqueueDecision::Insert { base, sent_versions };
    let Some(row) = row else { return insert(write.base, String::new()) };
    // A provisional version cannot be compared with a final one. But the write is the newer of the two: an unsynced process has
    // seen no answer since. If its clock lags within the tolerance, clock sync will not raise the version. So the write needs
    // a version above the row's.
    let lead = row.version.at().since(write.issued_at);
    if is_provisional && !row.is_provisional && row.version > version && lead <= MAX_CLOCK_SKEW {
        return answer(EnqueueOutcome::Reordered(row.version));
    }
    match write.base {
        Some(base) if row.is_queued => {
            if row.version == base {
                // The update replaces the row, but the store may have got the row's write already (I7).
                let (base, sent_versions) = row.inherited_base();
                return insert(base, sent_versions);
            }
            // The update has not read the queued write, so it would undo that write.
            if is_provisional || row.version > base {
                return answer(EnqueueOutcome::Conflict);
            }
            // The store held `base` when the caller read it, so the queued write has lost.
            return EnqueueDecision::Supersede(base);
        }
        _ if !row.is_queued && row.version == write.record.version => {
            // A load found this write in the store before the response of the write arrived.
            return answer(EnqueueOutcome::AlreadyStored);
        }
        // The store has moved on, so the queued update would only become a dead letter.
        Some(base) if row.version > base => {
            return answer(EnqueueOutcome::SupersededInStore(row.version));
        }
        // A queued update may still lose against another daemon. A put that is older must not be lost with it.
        None if row.is_queued
            && row.base.is_some()
            && row.is_provisional == is_provisional
            && row.version > version =>
        {
            return answer(EnqueueOutcome::Reordered(row.version));
        }
        _ => {}
    }
    let is_comparable = row.is_provisional || !is_provisional;
    if row.version <= version || !is_comparable {
        return insert(write.base, String::new());
    }
    answer(if row.is_queued {
        EnqueueOutcome::SupersededInQueue
    } else {
        EnqueueOutcome::SupersededInStore(row.version)
    })
}

/// Queues a write. Returns `None` if the write does not fit.
fn enqueue(
    connection: &Connection,
    state: &mut WriterState,
    write: &NewQueuedWrite,
    clock: &Clock,
    limit: u64,
) -> rusqlite::Result<Option<EnqueueOutcome>> {
    let NewQueuedWrite { record, issued_at, unsynced, .. } = write;
    let row = StoredRow::find(connection, state, &record.key, clock)?;
    let version = corrected(record.version, *unsynced, *issued_at, clock);
    // Read once: the clock may sync at any moment, and decision and correction must agree.
    let is_provisional = is_still_provisional(*unsynced, clock);
    let decision = decide(write, version, is_provisional, row.as_ref());
    let replaced = row.as_ref().filter(|row| row.is_queued);
    // Decided before any change, because `None` commits the transaction, too.
    let fits = fits(state.usage, &decision, replaced, record, limit);
    let (base, mut sent_versions) = match (decision, replaced) {
        (EnqueueDecision::Answer(outcome), _) => return Ok(Some(outcome)),
        _ if !fits => return Ok(None),
        (EnqueueDecision::Insert { base, sent_versions }, _) => (base, sent_versions),
        (EnqueueDecision::Supersede(newer), replaced) => {
            if let Some(row) = replaced {
                supersede(connection, state, &record.key, row.version, newer, clock)?;
            }
            (write.base, String::new())
        }
    };
    // A put replaces every older version, so it needs no list.
    if base.is_some() {
        add_attempts(connection, &record.key, &mut sent_versions)?;
    }
    let new_row = RowWrite {
        record,
        seq: state.next_queued_seq(),
        at: *issued_at,
        is_queued: true,
        base,
        sent_versions: &sent_versions,
        is_dispatched: write.is_dispatched,
        // The next process needs the lead to bring the version in line with its own clock.
        provisional: unsynced.map(|unsynced| (clock.ahead_of_system(), unsynced)),
        read_state: 0,
    };
    upsert_row(connection, &new_row)?;
    match row {
        Some(row) if row.is_queued => state.usage.queue.sub(row.bytes),
        Some(row) => state.usage.replica.sub(row.bytes),
        None => {}
    }
    state.usage.queue.add(row_bytes(record));
    if unsynced.is_some() && !is_provisional {
        // The store answered after the version was issued. Replay corrects the queue once for each period, and may have
        // done so already. It would then skip this row (I8).
        apply_clock_correction(connection, state, clock)?;
    }
    Ok(Some(EnqueueOutcome::Queued { unsynced: *unsynced, queued_at: *issued_at }))
}

/// Whether a write fits into the limit, to which queued writes and dead letters count.
fn fits(
    usage: FileUsage,
    decision: &EnqueueDecision,
    replaced: Option<&StoredRow>,
    record: &Record,
    limit: u64,
) -> bool {
    let freed = match (decision, replaced) {
        (EnqueueDecision::Insert { .. }, Some(row)) => row.bytes,
        // A superseded row becomes a dead letter, which counts as much.
        _ => 0,
    };
    let taken = usage.queue.bytes.saturating_sub(freed) + usage.dead_letters.bytes;
    taken + row_bytes(record) <= limit
}

/// Makes a dead letter of the queued write that the store superseded by `newer`.
fn supersede(
    connection: &Connection,
    state: &mut WriterState,
    key: &Key,
    version: Version,
    newer: Version,
    clock: &Clock,
) -> rusqlite::Result<()> {
    let reason = DeadLetterReason { text: "superseded".into(), newer: Some(newer) };
    let bytes = add_dead_letter(connection, key, version, &reason, clock.now())?;
    state.usage.dead_letters.add(bytes);
    Ok(())
}

/// Adds the attempts of a conversation to the versions that an update may find in the store (I7).
fn add_attempts(connection: &Connection, key: &Key, sent_versions: &mut String) -> rusqlite::Result<()> {
    let mut attempts = connection.prepare_cached("select version from attempts where key = ?1")?;
    for attempt in attempts.query_map([key.as_str()], |row| row.get::<_, i64>(0))? {
        let attempt = Version::from_raw(attempt?);
        if !versions(sent_versions).any(|version| version == attempt) {
            *sent_versions = format!("{sent_versions} {attempt}");
        }
    }
    Ok(())
}
