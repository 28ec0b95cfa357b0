//! Reads of the queue, for the cache and for replay.

use std::collections::HashMap;

use rusqlite::{Connection, Row};
use tokio::sync::watch;

use super::file::OutageFile;
use super::rows::{self, first_queued, queued_write};
use super::rules::{QueuedHead, next_to_send};
use super::{QueueFigures, QueueTrust, QueuedKey, QueuedWrite};
use crate::error::Result;
use crate::model::key::Key;
use crate::model::version::Version;
use crate::sqlite;

impl OutageFile {
    /// Returns a receiver of the queue's figures. They change with each commit that changes the queue.
    pub(crate) fn queue(&self) -> watch::Receiver<QueueFigures> {
        self.hooks.figures.subscribe()
    }

    /// Sets the number of parked writes in the figures.
    pub(super) fn set_parked(&self, parked: u64) {
        self.hooks.figures.send_if_modified(|shown| std::mem::replace(&mut shown.parked, parked) != parked);
    }

    /// Lets replay look at the first queued write of a conversation again.
    pub(super) fn unblock(&self, key: Key) {
        self.hooks.unblocked.lock().push(key);
    }

    /// Takes the conversations whose first queued write may be sent now, although replay has perhaps passed it.
    pub(super) fn take_unblocked(&self) -> Vec<Key> {
        std::mem::take(&mut *self.hooks.unblocked.lock())
    }

    /// Whether all queued writes of a conversation are of this daemon part. No own run covers others. If the file cannot be
    /// read, nobody knows.
    pub(crate) async fn has_rows_of_daemon_only(&self, key: &Key, daemon: i64) -> bool {
        let key = key.clone();
        let is_own = move |row: &QueuedHead| row.write.writer.daemon() == daemon;
        let read =
            self.database.read(move |connection| Ok(rows::heads(connection, &key)?.iter().all(is_own)));
        read.await.unwrap_or(false)
    }

    /// Reads the conversations with queued writes, when the file is opened.
    pub(super) async fn queued_keys(&self) -> Result<Vec<QueuedKey>> {
        // On a full disk the drop of the copies failed, so the file does not know of the loss (I16).
        let unverified = if self.validity.is_invalid() { i64::MAX } else { self.state.lock().unverified };
        let read = move |connection: &Connection| {
            let sql = "select key, version, seq, is_provisional, coalesce((
                           select version from records as copy where copy.key = queued.key and copy.is_queued = 0), 0), append is not null
                       from records as queued where is_queued = 1 order by is_provisional, version";
            let queued_key = |row: &Row<'_>| {
                let version = Version::from_raw(row.get(1)?);
                let (seq, is_provisional, stored): (i64, bool, i64) = (row.get(2)?, row.get(3)?, row.get(4)?);
                let trust = match () {
                    () if row.get(5)? => QueueTrust::Append,
                    () if !is_provisional && Version::from_raw(stored) > version => QueueTrust::Superseded,
                    () if seq <= unverified => QueueTrust::Unverified,
                    () => QueueTrust::Newest,
                };
                Ok(QueuedKey { key: sqlite::rows::key(row)?, version, trust })
            };
            let mut newest = HashMap::new();
            // The newest write of a conversation comes last.
            for queued in connection.prepare(sql)?.query_map([], queued_key)? {
                let mut queued = queued?;
                if newest
                    .get(&queued.key)
                    .is_some_and(|before: &QueuedKey| before.trust == QueueTrust::Append)
                {
                    queued.trust = QueueTrust::Append;
                }
                newest.insert(queued.key.clone(), queued);
            }
            Ok(newest.into_values().collect())
        };
        self.database.read(read).await
    }

    /// Reads the next batch of replay after `after`, in the order of the queue: the first write of each conversation.
    ///
    /// The batch has at most `max_records`, and at most `max_bytes` unless its first write is larger. Provisional writes are
    /// skipped until clock sync has corrected them (I8).
    pub(super) async fn next_batch(
        &self,
        after: i64,
        max_records: usize,
        max_bytes: usize,
    ) -> Result<Vec<QueuedWrite>> {
        let is_first = "and is_provisional = 0 and not exists (
            select 1 from records as earlier
            where earlier.is_queued = 1 and earlier.key = row.key and earlier.version < row.version
                and earlier.is_provisional = 0)";
        self.read_queue(is_first, after, max_records, max_bytes).await
    }

    /// Reads the queued writes after the one numbered `after`, in their order. The page is as large as a
    /// [batch](Self::next_batch).
    pub(super) async fn page(
        &self,
        after: i64,
        max_records: usize,
        max_bytes: usize,
    ) -> Result<Vec<QueuedWrite>> {
        self.read_queue("", after, max_records, max_bytes).await
    }

    async fn read_queue(
        &self,
        filter: &'static str,
        after: i64,
        max_records: usize,
        max_bytes: usize,
    ) -> Result<Vec<QueuedWrite>> {
        let max_records = i64::try_from(max_records).unwrap_or(i64::MAX);
        let read = move |connection: &Connection| {
            let sql = format!(
                "{} as row where is_queued = 1 and seq > ?1 {filter} order by seq limit ?2",
                rows::select()
            );
            let mut find = connection.prepare_cached(&sql)?;
            let (mut page, mut bytes) = (Vec::new(), 0);
            for queued in find.query_map([after, max_records], queued_write)? {
                let queued = queued?;
                bytes += queued.write.record.bytes();
                // A record above the limit goes alone. Otherwise it would never be sent.
                if bytes > max_bytes && !page.is_empty() {
                    break;
                }
                page.push(queued);
            }
            Ok(page)
        };
        self.database.read(read).await
    }

    /// Reads the first queued write of each of these conversations, unless it is provisional.
    pub(super) async fn first_of(&self, keys: Vec<Key>) -> Result<Vec<QueuedWrite>> {
        let read = move |connection: &Connection| {
            let first = keys.iter().filter_map(|key| first_queued(connection, key).transpose());
            let may_go = |row: &QueuedWrite| next_to_send(&[row.head()]).is_some();
            first.filter(|row| row.as_ref().map_or(true, may_go)).collect()
        };
        self.database.read(read).await
    }
}
