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
use super::{DeadLetterReason, EnqueueOutcome, NewQueuedWrite};
use crate::error::Result;
use crate::model::clock::Clock;
use crate::model::key::Key;
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
        let in_flight = self.writes_in_flight.begin(write.record.bytes());
        let work = move |connection: &Connection, state: &mut WriterState| {
            enqueue(connection, state, &write, &clock, limit)
        };
        let on_commit = |outcome: &Result<Option<EnqueueOutcome>>| {
            if let Ok(Some(outcome)) = outcome {
                on_commit(*outcome);
            }
            drop(in_flight);
        };
        let receiver = self.submit(CommitLevel::Acknowledged, work, on_commit).await?;
        let outcome = receiver.await.map_err(|_| closed())?;
        if outcome.is_err() {
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

/// Compares a write with the row of its conversation. `version` is the write's version after clock sync.
fn decide(
    write: &NewQueuedWrite,
    version: Version,
    row: Option<&StoredRow>,
    clock: &Clock,
) -> EnqueueDecision {
    let answer = EnqueueDecision::Answer;
    let insert = |base, sent_versions| EnqueueDecision::Insert { base, sent_versions };
    let Some(row) = row else { return insert(write.base, String::new()) };
    let is_provisional = is_still_provisional(write.unsynced, clock);
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
                let (base, sent_versions) = row.inherited_base();
                return insert(base, sent_versions);
            }
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
    let decision = decide(write, version, row.as_ref(), clock);
    let replaced = row.as_ref().filter(|row| row.is_queued);
    // A superseded row becomes a dead letter, which counts as much.
    let freed = match decision {
        EnqueueDecision::Insert { .. } => replaced.map_or(0, |row| row.bytes),
        _ => 0,
    };
    let taken = state.usage.queue.bytes.saturating_sub(freed) + state.usage.dead_letters.bytes;
    let fits = taken + row_bytes(record) <= limit;
    let (base, mut sent_versions) = match (decision, replaced) {
        (EnqueueDecision::Answer(outcome), _) => return Ok(Some(outcome)),
        _ if !fits => return Ok(None),
        (EnqueueDecision::Insert { base, sent_versions }, _) => (base, sent_versions),
        (EnqueueDecision::Supersede(newer), replaced) => {
            if let Some(row) = replaced {
                let reason = DeadLetterReason { text: "superseded".into(), newer: Some(newer) };
                let now = clock.now();
                let bytes = add_dead_letter(connection, &record.key, row.version, &reason, now)?;
                state.usage.dead_letters.add(bytes);
            }
            (write.base, String::new())
        }
    };
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
    if unsynced.is_some() && !is_still_provisional(*unsynced, clock) {
        // The store answered after the version was issued.
        apply_clock_correction(connection, state, clock)?;
    }
    Ok(Some(EnqueueOutcome::Queued { unsynced: *unsynced, queued_at: *issued_at }))
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
