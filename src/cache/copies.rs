//! The order of every answer of the store: the outage file first, then memory (I1, I3).
//!
//! Types hold the order. A [`Call`] takes its read token and its time before it asks the store (I2), and only a call makes an
//! [`Observed`] answer. Only this file turns an answer into a [`Persisted`] one, and memory admits nothing else.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::active::ReadToken;
use super::key_state::Event;
use super::memory::{Admission, MemoryCache, Wish};
use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::outage::file::OutageFile;
use crate::outage::{CopyRank, ReplicaRecord};

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

impl<T> Observed<T> {
    pub(super) fn map<U>(self, change: impl FnOnce(T) -> U) -> Observed<U> {
        Observed { call: self.call, value: change(self.value) }
    }
}

impl Copies {
    /// Takes the read token and the time of a call (I2).
    pub(super) fn begin(&self) -> Arc<Call> {
        // The token comes first. A change between the two only makes the result stale.
        let token = self.memory.token();
        Arc::new(Call { token, at: self.clock.moment() })
    }

    /// Runs the request of a call. If its answer syncs the clock, it counts after the correction of the queue (I8).
    pub(super) async fn observe<T>(
        &self,
        call: &Arc<Call>,
        request: impl Future<Output = Result<T>>,
    ) -> Result<Observed<T>> {
        let value = request.await?;
        if !self.clock.is_synced() && self.clock.pending().is_some() {
            super::within(MAX_SYNC_WAIT, self.clock.synced()).await;
        }
        Ok(Observed { call: Arc::clone(call), value })
    }

    /// Saves copies of records that the store holds. They are in the order newest first.
    pub(super) async fn persist<T: AsRef<[Arc<Record>]>>(
        &self,
        Observed { call, value }: Observed<T>,
        rank: CopyRank,
    ) -> Persisted<T> {
        // The replica may have dropped the row of a newer version, so stale records are not saved.
        let is_current = |record: &&Arc<Record>| call.token.floor(&record.key).possible <= record.version;
        // The oldest come first, because the replica drops the copies that were written first.
        self.save(value.as_ref().iter().rev().filter(is_current).cloned(), call.at, rank).await;
        Persisted { call, value }
    }

    /// Notes that the store still holds a record of memory.
    pub(super) async fn confirm(
        &self,
        Observed { call, value }: Observed<Arc<Record>>,
    ) -> Persisted<[Arc<Record>; 1]> {
        if let Some(file) = &self.file {
            file.confirm(&value.key, value.version, self.clock.at(call.at)).await;
        }
        Persisted { call, value: [value] }
    }

    /// Saves the copy of a write of this handle that the store has taken.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`] if the outage file is closed. The next start in an outage would not find the write, so the call
    /// does not acknowledge it.
    pub(super) async fn persist_own(
        &self,
        Observed { call, value }: Observed<Arc<Record>>,
    ) -> Result<Persisted<[Arc<Record>; 1]>> {
        if let Some(file) = &self.file {
            let copy = self.copy(Arc::clone(&value), self.clock.moment(), CopyRank::Used);
            let saved = file.save_own_copy(copy).await;
            saved.map_err(|_| {
                let message =
                    format!("the cache was shut down during the write of conversation {}", value.key);
                Error::new(ErrorKind::Closed, message).with_key(value.key.as_str()).with_outcome_unknown()
            })?;
        }
        Ok(Persisted { call, value: [value] })
    }

    /// Admits the answer of a load or of a write.
    pub(super) fn admit(
        &self,
        Persisted { call, value: [record] }: Persisted<[Arc<Record>; 1]>,
    ) -> Admission {
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
    pub(super) async fn supersede(&self, key: &Key, version: Version) {
        let tombstone = Arc::new(Record::tombstone(key.clone(), version));
        // The file comes before memory: after an eviction, no older copy may come back (I16).
        self.save([tombstone], self.clock.moment(), CopyRank::Used).await;
        self.clock.observe(version);
        self.memory.tell(key, Event::Newer(version));
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
