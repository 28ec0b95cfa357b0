//! The replica: last known copies of the store's records, for the time when the store cannot answer.

mod save;
mod validity;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use rusqlite::{Connection, Params, Row};
use tokio::sync::oneshot;

use super::ReplicaRecord;
use super::file::OutageFile;
use super::state::WriterState;
use crate::error::Result;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::Timestamp;
use crate::sqlite::file;
use crate::sqlite::rows::{COLUMNS, record};
use crate::sqlite::writer::CommitLevel;

pub(super) use save::evict;
use save::{drop_copies, save};
pub(super) use validity::{InFlightBytes, ReplicaValidity};

/// The bytes of uncommitted copies up to which a caller does not wait for the commit of its copies.
const MAX_ASYNC_BYTES: usize = 8 << 20;

/// The name in `meta` of the identity of the database that the copies are of.
const HISTORY: &str = "history";

/// The number of a copy, the copy, and the time at which the store confirmed it.
pub(crate) type ReplicaCopy = (i64, Arc<Record>, Timestamp);

impl OutageFile {
    /// Saves copies of records that the store returned. A tombstone tells that the conversation is absent, so that no older copy
    /// answers for it.
    ///
    /// Later calls of this handle find the copies (I3). The commit may follow some milliseconds after this returns. If the file
    /// cannot be written, the replica hands out no copy until the writer has dropped all of them. Some may be older than an
    /// acknowledged write.
    ///
    /// A copy settles a queued write of its version, which the store turns out to hold.
    pub(crate) async fn save_copies(&self, copies: Vec<ReplicaRecord>) {
        if copies.is_empty() {
            return;
        }
        // A caller that has read these records must not learn later that an older write was queued before. So the copies wait
        // for the writes on their way into the queue (I16).
        if let Ok(saved) = self.submit_copies(copies).await
            && (self.copies_in_flight.load(SeqCst) > MAX_ASYNC_BYTES
                || self.writes_in_flight.load(SeqCst) > 0)
        {
            saved.await.ok();
        }
    }

    /// Submits copies to the writer, as [`save_copies`](Self::save_copies) does. The receiver gets its result after the commit. A
    /// failed commit makes all copies invalid.
    ///
    /// # Errors
    /// [`Closed`](crate::ErrorKind::Closed) if the file is closed. The next process does not find the copies then.
    pub(crate) async fn submit_copies(
        &self,
        copies: Vec<ReplicaRecord>,
    ) -> Result<oneshot::Receiver<Result<u64>>> {
        let (limit, clock) = (self.limits.replica, Arc::clone(&self.clock));
        // Counted before the submission, so that `flush_copies` cannot miss these copies.
        let bytes = copies.iter().map(|copy| copy.record.bytes()).sum();
        let in_flight = InFlightBytes::new(&self.copies_in_flight, bytes);
        let validity = Arc::clone(&self.validity);
        let work = move |connection: &Connection, state: &mut WriterState| {
            let failures = validity.failures();
            // The writer drops the copies once for each failure. A later transaction may run before `on_commit` restores the
            // validity, and must keep the copies that this one saves.
            if validity.is_invalid() && state.dropped_after < failures {
                drop_copies(connection, state)?;
                state.dropped_after = failures;
            }
            for copy in &copies {
                save(connection, state, copy, clock.now(), limit)?;
            }
            evict(connection, state, limit)?;
            Ok(failures)
        };
        let validity = Arc::clone(&self.validity);
        let on_commit = move |saved: &Result<u64>| {
            match saved {
                Ok(failures) => validity.restore(*failures),
                Err(error) => validity.record_failure(error),
            }
            // After the validity, because a reader that no longer waits must see the failure (I16).
            drop(in_flight);
        };
        self.submit(CommitLevel::ProcessCrash, work, on_commit).await
    }

    /// Waits until the writer has committed the submitted copies.
    pub(super) async fn flush_copies(&self) -> Result<()> {
        if self.copies_in_flight.load(SeqCst) == 0 {
            return Ok(());
        }
        // The writer runs jobs in order, so an empty job ends after all submitted copies.
        self.write(CommitLevel::ProcessCrash, |_, _| Ok(())).await
    }

    /// Records that the store still holds a record of memory. A failure makes no copy invalid: at most, the copy looks older.
    pub(crate) async fn confirm(&self, copy: ReplicaRecord) {
        let (limit, clock) = (self.limits.replica, Arc::clone(&self.clock));
        let work = move |connection: &Connection, state: &mut WriterState| {
            save(connection, state, &copy, clock.now(), limit)?;
            evict(connection, state, limit)
        };
        if let Err(error) = self.write(CommitLevel::ProcessCrash, work).await {
            tracing::debug!(%error, "the replica cannot record that a copy was confirmed; the copy looks older");
        }
    }

    /// Returns the last known copy of a conversation.
    pub(crate) async fn lookup_replica(&self, key: &Key) -> Result<Option<(Arc<Record>, Timestamp)>> {
        let mut found = self.read_copies("key = ?1", [key.as_str().to_owned()]).await?;
        Ok(found.pop().map(|(_, record, confirmed_at)| (record, confirmed_at)))
    }

    /// Returns up to `limit` copies before the number `before`, newest first.
    pub(crate) async fn copies(&self, before: i64, limit: usize) -> Result<Vec<ReplicaCopy>> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.read_copies("seq < ?1 order by seq desc limit ?2", [before, limit]).await
    }

    /// Reads copies with a value, after all copies that were submitted before.
    async fn read_copies(
        &self,
        filter: &'static str,
        values: impl Params + Send + 'static,
    ) -> Result<Vec<ReplicaCopy>> {
        if self.validity.is_invalid() {
            return Ok(Vec::new());
        }
        self.flush_copies().await?;
        let read = move |connection: &Connection| {
            let sql = format!(
                "select {COLUMNS}, seq, at from records where is_queued = 0 and value is not null and {filter}"
            );
            let copy = |row: &Row<'_>| Ok((row.get(6)?, Arc::new(record(row)?), Timestamp(row.get(7)?)));
            connection.prepare_cached(&sql)?.query_map(values, copy)?.collect()
        };
        let copies = self.database.read(read).await?;
        // A copy may have failed during the read.
        Ok(if self.validity.is_invalid() { Vec::new() } else { copies })
    }

    /// Drops all copies. The next ones are of the database `history`, if the store has an identity.
    pub(super) async fn drop_copies(&self, history: Option<Arc<str>>) -> Result<()> {
        // Read before the drop, because a later failure must keep the copies invalid.
        let failures = self.validity.failures();
        let work = move |connection: &Connection, state: &mut WriterState| {
            drop_copies(connection, state)?;
            history.iter().try_for_each(|history| file::set_meta(connection, HISTORY, history))
        };
        self.write(CommitLevel::PowerCut, work).await?;
        self.validity.restore(failures);
        Ok(())
    }

    /// Drops all copies, because the store was restored. If the file cannot be written, the replica hands out no copy.
    pub(crate) async fn forget_copies(&self, history: Option<Arc<str>>) {
        if let Err(error) = self.drop_copies(history).await {
            self.validity.record_failure(&error);
        }
    }

    /// Whether the copies are of another database than `history`. A file without an identity takes this one.
    pub(crate) async fn has_other_history(&self, history: Arc<str>) -> bool {
        let work = move |connection: &Connection, _: &mut WriterState| {
            let saved = file::meta(connection, HISTORY)?;
            if saved.is_none() {
                file::set_meta(connection, HISTORY, &history)?;
            }
            Ok(saved.is_some_and(|saved| *saved != *history))
        };
        // A failing disk raises its own alert, and the next start compares again.
        self.write(CommitLevel::ProcessCrash, work).await.unwrap_or(false)
    }
}
