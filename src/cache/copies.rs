//! The order of every answer of the store: the outage file first, then memory (I1, I3).
//!
//! Types hold the order. A [`Call`] takes its read token and its time before it asks the store (I2), and only a call makes an
//! [`Observed`] answer. Only this file turns an answer into a [`Persisted`] one, and memory admits nothing else.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::active::ReadToken;
use super::key_state::{Event, Origin};
use super::memory::{Admission, MemoryCache, Wish};
use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::outage::file::OutageFile;
use crate::outage::{CopyRank, ReplicaRecord};
use crate::store::{Applied, Write};

/// The limit on the wait until the outage file has corrected its provisional writes (I12).
const MAX_SYNC_WAIT: Duration = Duration::from_secs(5);

/// Memory and outage file: the copies of this process, and its queue.
#[derive(Debug)]
pub(super) struct Copies {
    pub(super) memory: Arc<MemoryCache>,
    /// The outage file, if the backend has one.
    pub(super) file: Option<Arc<OutageFile>>,
    pub(super) clock: Arc<Clock>,
}

/// A call to the store or to the replica, from its start to the admission of its answer.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) token: ReadToken,
    /// The start. The answer was true at this moment or later.
    pub(super) at: Moment,
}

/// An answer of the store that the outage file does not have yet.
#[derive(Debug)]
pub(super) struct Observed<T> {
    call: Arc<Call>,
    pub(super) value: T,
}

/// An answer that the outage file has got, or a copy that it gave. Without an outage file, any answer.
#[derive(Debug)]
pub(super) struct Persisted<T> {
    call: Arc<Call>,
    value: T,
}

impl Call {
    /// Whether no newer version became known during the call. The replica may have dropped the row of that version, so stale
    /// records are not saved.
    fn is_current(&self, record: &Record) -> bool {
        self.token.floor(&record.key).possible <= record.version
    }
}

impl<T> Observed<T> {
    pub(super) fn map<U>(self, change: impl FnOnce(T) -> U) -> Observed<U> {
        Observed { call: self.call, value: change(self.value) }
    }
}

impl Copies {
    /// Takes the read token and the time of a call (I2).
    pub(super) fn begin(&self) -> Arc<Call> {
        // The token comes first. A change between the two only makes the result stale.
        let token = self.memory.keys.token();
        Arc::new(Call { token, at: self.clock.moment() })
    }

    /// Runs the request of a call. If its answer syncs the clock, it counts after the correction of the queue (I8).
    pub(super) async fn observe<T>(
        &self,
        call: &Arc<Call>,
        request: impl Future<Output = Result<T>>,
    ) -> Result<Observed<T>> {
        let value = request.await?;
        if !self.clock.is_synced() {
            super::within(MAX_SYNC_WAIT, self.clock.settled()).await;
        }
        Ok(Observed { call: Arc::clone(call), value })
    }

    /// Saves copies of records that the store holds. They are in the order newest first.
    pub(super) async fn persist<T: AsRef<[Arc<Record>]>>(
        &self,
        Observed { call, value }: Observed<T>,
        rank: CopyRank,
    ) -> Persisted<T> {
        // The oldest come first, because the replica drops the copies that were written first.
        let current = value.as_ref().iter().rev().filter(|record| call.is_current(record));
        self.save(current.cloned(), call.at, rank).await;
        Persisted { call, value }
    }

    /// Notes that the store still holds a record of memory.
    pub(super) async fn confirm(
        &self,
        Observed { call, value }: Observed<Arc<Record>>,
    ) -> Persisted<[Arc<Record>; 1]> {
        if let Some(file) = self.file.as_ref().filter(|_| call.is_current(&value)) {
            file.confirm(self.copy(Arc::clone(&value), call.at, CopyRank::Read)).await;
        }
        Persisted { call, value: [value] }
    }

    /// Hands a record of this handle that the store has now, by its answer, to the outage file, and then to memory (I1).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`] if the outage file is closed. The next start in an outage would not find the write, so the call
    /// does not acknowledge it.
    pub(super) async fn keep_own(
        &self,
        Observed { call, .. }: &Observed<Applied>,
        own: Arc<Record>,
    ) -> Result<()> {
        // The restored store may not have the write.
        if !call.token.is_expired() {
            self.save_own(Arc::clone(&own)).await?;
        }
        self.see(call, own);
        Ok(())
    }

    /// Returns the conversation after an append, if memory or replica hold the one before.
    pub(super) async fn follow(&self, write: &Write, applied: &Applied) -> Option<Arc<Record>> {
        let Applied::Appended { version, over, .. } = *applied else { return None };
        let held = match over {
            Version::NONE => None,
            over => Some(self.held(&write.record.key, over).await?),
        };
        // Another result shows that the store understands the append in another way.
        write.over(held.as_deref(), version).ok().filter(|(_, own)| own == applied).map(|(record, _)| record)
    }

    /// Returns the record of this version from memory or from the replica.
    async fn held(&self, key: &Key, version: Version) -> Option<Arc<Record>> {
        let entry = self.memory.view(key).entry.filter(|entry| entry.origin() != Origin::Queue);
        let in_memory = entry.map(|entry| Arc::clone(entry.record())).filter(|held| held.version == version);
        if in_memory.is_some() {
            return in_memory;
        }
        let copy = self.file.as_ref()?.lookup_replica(key).await.ok()??;
        Some(copy.0).filter(|held| held.version == version)
    }

    /// Saves a copy of a write of this handle, and waits for the commit. So a process that starts after a crash knows the write.
    async fn save_own(&self, record: Arc<Record>) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let copy = self.copy(Arc::clone(&record), self.clock.moment(), CopyRank::Used);
        let Ok(saved) = file.submit_copies(vec![copy]).await else {
            let key = &record.key;
            let message = format!("the cache was shut down during the write of conversation {key}");
            return Err(Error::new(ErrorKind::Closed, message).with_key(key.as_str()).with_outcome_unknown());
        };
        // A failed commit makes all copies invalid, so the write needs none.
        saved.await.ok();
        Ok(())
    }

    /// Admits the answer of a load or of a write.
    pub(super) fn admit(
        &self,
        Persisted { call, value: [record] }: Persisted<[Arc<Record>; 1]>,
    ) -> Admission {
        self.see(&call, record)
    }

    /// Admits the answer of a load of many conversations that callers read lately.
    pub(super) fn admit_all(&self, Persisted { call, value: records }: Persisted<Vec<Arc<Record>>>) {
        for record in records {
            self.see(&call, record);
        }
    }

    fn see(&self, call: &Call, record: Arc<Record>) -> Admission {
        self.clock.observe(record.version);
        let key = record.key.clone();
        self.memory.drive(&key, Some(&call.token), call.at, Event::Seen(record), Wish::Caller)
    }

    /// Admits a page of a list or of the warm-up, in this order.
    pub(super) fn admit_listed<'a>(
        &self,
        page: &'a Persisted<Vec<Arc<Record>>>,
        order: impl IntoIterator<Item = &'a Arc<Record>>,
    ) -> Vec<Admission> {
        let Call { token, at } = &*page.call;
        self.memory.drive_listed(order, |record, wish| {
            self.clock.observe(record.version);
            self.memory.drive(&record.key, Some(token), *at, Event::Seen(Arc::clone(record)), wish)
        })
    }

    /// Reads the last known copy of a conversation from the replica. Returns `None` if it has no live copy.
    pub(super) async fn read_copy(&self, key: &Key) -> Option<Admission> {
        let file = self.file.as_ref()?;
        // The token is older than the read of the file, so a change during the read shows (I2).
        let call = self.begin();
        let copy = file.lookup_replica(key).await.inspect_err(|error| {
            tracing::warn!(%error, "cannot read the replica; a read in an outage was answered without it");
        });
        let (record, confirmed_at) = copy.ok().flatten()?;
        let now = self.clock.now();
        record.is_live(now).then(|| self.admit_copy(&call, record, now.since(confirmed_at), Wish::Caller))
    }

    /// Admits a copy that the replica gave after the start of `call`.
    pub(super) fn admit_copy(
        &self,
        call: &Call,
        record: Arc<Record>,
        age: Duration,
        wish: Wish<'_>,
    ) -> Admission {
        let (key, at) = (record.key.clone(), self.clock.moment().minus(age));
        self.memory.drive(&key, Some(&call.token), at, Event::Copy(record), wish)
    }

    /// Invalidates everything older than `version` in the outage file and in memory. The store was seen to hold this version,
    /// but its value is unknown.
    ///
    /// # Errors
    /// [`Closed`](ErrorKind::Closed) if the file is closed. The next process may still have the older copy, so the caller must not
    /// learn of the newer version.
    pub(super) async fn supersede(&self, key: &Key, version: Version) -> Result<()> {
        let tombstone = Arc::new(Record::tombstone(key.clone(), version));
        // The file comes before memory: after an eviction, no older copy may come back (I16).
        let saved = self.save_own(tombstone).await;
        self.clock.observe(version);
        self.memory.tell(key, Event::Newer(version));
        saved
    }

    /// Drops everything but queued writes, because the store was restored. No result of a call that is under way comes back.
    pub(super) async fn forget_history(&self, history: Option<Arc<str>>) {
        self.memory.forget_history();
        if let Some(file) = &self.file {
            file.forget_copies(history).await;
        }
    }

    /// Whether the copies in the outage file are of another database: it was restored while no process had the file open.
    pub(super) async fn are_of_other_history(&self, history: Option<&Arc<str>>) -> bool {
        let (Some(file), Some(history)) = (&self.file, history) else { return false };
        file.has_other_history(Arc::clone(history)).await
    }

    /// Promotes the copies of listed conversations that callers have read since the last call. So a list does not displace
    /// them.
    pub(super) async fn save_first_reads(&self) {
        let copies = self.memory.drain_first_reads();
        if let Some(file) = &self.file {
            file.save_copies(copies).await;
        }
    }

    async fn save(&self, records: impl IntoIterator<Item = Arc<Record>>, at: Moment, rank: CopyRank) {
        if let Some(file) = &self.file {
            file.save_copies(records.into_iter().map(|record| self.copy(record, at, rank)).collect()).await;
        }
    }

    fn copy(&self, record: Arc<Record>, at: Moment, rank: CopyRank) -> ReplicaRecord {
        ReplicaRecord { record, confirmed_at: self.clock.at(at), rank }
    }
}

impl<T> Persisted<T> {
    pub(super) fn value(&self) -> &T {
        &self.value
    }
}
