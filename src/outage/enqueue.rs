//! Queueing of a write. The rules stand in [`rules`]; this module carries them out in one transaction of the writer.

use std::sync::Arc;

use rusqlite::Connection;

use super::file::{OutageFile, queue_full};
use super::replica::InFlightBytes;
use super::rows::{copy_version, heads, replace_queued, row_bytes};
use super::rules::{self, Placement, QueuedHead};
use super::state::WriterState;
use super::{Enqueued, QueuedWrite};
use crate::error::Result;
use crate::model::version::{Timestamp, Version};
use crate::sqlite::writer::{CommitLevel, closed};
use crate::store::{Condition, Write};

impl OutageFile {
    /// Queues a write. The write is synced to disk when this returns `Queued` (I4).
    ///
    /// The writer calls `on_commit` before any caller learns of a later transaction. So a verdict about this write finds the
    /// write in memory. If the version is provisional, the caller [holds the clock sync](Self::hold_clock_sync) since the issue.
    ///
    /// `read_after` is the number of [clock syncs](Self::syncs) when the caller read the base of an update that was not sent. Such
    /// an update gets `Conflict` if the base is outdated. Later it would only become a dead letter. One that was sent keeps its
    /// place in the queue, because the store may hold it.
    ///
    /// # Errors
    /// [`QueueFull`](crate::ErrorKind::QueueFull) if the write does not fit. [`LocalStorage`](crate::ErrorKind::LocalStorage)
    /// if the file cannot be written.
    pub(crate) async fn enqueue(
        &self,
        write: Write,
        is_provisional: bool,
        queued_at: Timestamp,
        read_after: Option<u64>,
        on_commit: impl FnOnce(&Enqueued) + Send + 'static,
    ) -> Result<Enqueued> {
        // From here on, saved copies wait for this commit. Otherwise a reader of a newer version could learn of
        // this older write afterwards (I16).
        let in_flight = InFlightBytes::new(&self.writes_in_flight, write.record.bytes());
        if read_after.is_some_and(|syncs| syncs != self.syncs()) {
            return Ok(Enqueued::Conflict { newer: None });
        }
        let (limit, clock) = (self.limits.queue, Arc::clone(&self.clock));
        let queued = QueuedWrite { seq: 0, write, queued_at, is_provisional };
        let work = move |connection: &Connection, state: &mut WriterState| {
            let enqueued = enqueue(connection, state, queued.clone(), limit, read_after.is_some())?;
            if is_provisional {
                state.checkpoint.save_provisional(connection, &clock)?;
            }
            Ok(enqueued)
        };
        let on_commit = |enqueued: &Result<Option<Enqueued>>| {
            if let Ok(Some(enqueued)) = enqueued {
                on_commit(enqueued);
            }
            // Last, because a copy that no longer waits must find the write in memory.
            drop(in_flight);
        };
        let receiver = self.submit(CommitLevel::Acknowledged, work, on_commit).await?;
        let enqueued = receiver.await.map_err(|_| closed())?;
        if enqueued.is_err() {
            // The failed transaction counted the write in the figures.
            self.reload_state().await.ok();
        }
        enqueued?.ok_or_else(|| queue_full(self.path(), self.limits, self.usage()))
    }
}

/// Queues a write. Returns `None` if the write does not fit.
fn enqueue(
    connection: &Connection,
    state: &mut WriterState,
    mut queued: QueuedWrite,
    limit: u64,
    is_unsent_update: bool,
) -> rusqlite::Result<Option<Enqueued>> {
    let (key, version) = (&queued.write.record.key, queued.version());
    let stored = copy_version(connection, key)?;
    let rows = heads(connection, key)?;
    // An update must not go on from a value without the queued appends.
    let is_incomplete = || {
        rows.iter().any(|row| row.is_append())
            && (rules::must_update_wait(&rows, queued.write.writer)
                || rules::fold_start(&rows, stored, true).is_none())
    };
    if is_unsent_update && is_incomplete() {
        return Ok(Some(Enqueued::Conflict { newer: None }));
    }
    // The value is that of a queued update, with the base of that one (C3).
    let is_behind_update = |row: &QueuedHead| {
        row.write.condition == queued.write.condition && (row.is_provisional || row.write.version > stored)
    };
    let is_inherited = rows.iter().any(is_behind_update);
    if let Condition::IfVersion(base) = queued.write.condition {
        if let Some(at) = rows.iter().position(|row| row.write.version == base) {
            // The value is that row's, and not the newer one of the store.
            if !rows[at].is_provisional && base < stored {
                return Ok(Some(Enqueued::Conflict { newer: Some(stored) }));
            }
            let base = rules::base_for_update(&rows[..=at], stored, queued.write.writer);
            queued.write.condition = Condition::IfVersion(base);
        } else if is_unsent_update && stored > base && !is_inherited {
            return Ok(Some(Enqueued::Conflict { newer: Some(stored) }));
        }
    }
    if stored == version {
        // A load found this write in the store before the response of the write arrived.
        return Ok(Some(Enqueued::Superseded(stored)));
    }
    let replaced = match rules::place(&rows, &queued.head(), stored) {
        Placement::Covered => return Ok(Some(Enqueued::Covered)),
        Placement::Superseded(newer) => return Ok(Some(Enqueued::Superseded(newer))),
        Placement::Insert { replaced } => replaced,
    };
    // Decided before any change, because `None` commits the transaction, too.
    let freed = queued_bytes(connection, &queued, &replaced)?;
    let taken = state.usage.queue.bytes.saturating_sub(freed) + state.usage.dead_letters.bytes;
    if taken + row_bytes(&queued.write.record) > limit {
        return Ok(None);
    }
    replace_queued(connection, state, &replaced, &queued)?;
    let stays = |row: &&QueuedHead| !replaced.contains(&row.write.version);
    let has_appends = queued.write.append.is_some() || rows.iter().filter(stays).any(QueuedHead::is_append);
    Ok(Some(Enqueued::Queued { version, has_appends }))
}

/// Returns the bytes of the rows that a write replaces.
fn queued_bytes(
    connection: &Connection,
    queued: &QueuedWrite,
    replaced: &[Version],
) -> rusqlite::Result<u64> {
    let sql = "select bytes from records where key = ?1 and is_queued = 1 and version = ?2";
    let mut bytes = connection.prepare_cached(sql)?;
    replaced.iter().try_fold(0, |sum, version| {
        let bytes: i64 = bytes.query_row((queued.key().as_str(), version.raw()), |row| row.get(0))?;
        Ok(sum + bytes.unsigned_abs())
    })
}
