//! Bugs that the oracle must notice, planted between a cache and the store.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::store::{
    Applied, Breaker, Clock, ListPage, ListRequest, LoadRequest, Loaded, Record, Store, Write,
};
use threadkeep::{Error, ErrorKind, Key, Result, Version};

/// A planted bug, with the promise of DESIGN (section 2) that the bug breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// 1: the store loses some acknowledged writes.
    LosesAcknowledgedWrites,
    /// 1: the store rejects some writes, but stores them.
    StoresRejectedWrites,
    /// 3: an outage reads as absence.
    ReportsOutageAsAbsence,
    /// 4: a late write replaces a newer one.
    LetsLateWritesWin,
    /// 4: compare-and-set does not compare.
    SkipsComparison,
    /// 4: the store does not recognise the retry of a write whose response was lost.
    ForgetsOwnWrites,
    /// 5: some loads return the previous version.
    LoadsPreviousVersion,
    /// 6: records expire too late.
    ExpiresLate,
    /// 6: records expire too early.
    ExpiresEarly,
    /// 6: some loads return expired or deleted records.
    RevivesDeletedRecords,
    /// 6: clock sync does not correct a wrong clock.
    SkipsClockSync,
}

impl Bug {
    pub const ALL: [Self; 11] = [
        Self::LosesAcknowledgedWrites,
        Self::StoresRejectedWrites,
        Self::ReportsOutageAsAbsence,
        Self::LetsLateWritesWin,
        Self::SkipsComparison,
        Self::ForgetsOwnWrites,
        Self::LoadsPreviousVersion,
        Self::ExpiresLate,
        Self::ExpiresEarly,
        Self::RevivesDeletedRecords,
        Self::SkipsClockSync,
    ];

    /// Returns true for a bug above the resilient store, as in the cache, and false for a bug below, as in the database.
    fn is_above(self) -> bool {
        matches!(self, Self::ReportsOutageAsAbsence)
    }
}

/// A store with at most one planted bug.
#[derive(Debug)]
pub struct BuggyStore<S> {
    store: S,
    bug: Option<Bug>,
    calls: AtomicUsize,
    /// The last two stored records of each conversation.
    past: Mutex<HashMap<Key, [Option<Arc<Record>>; 2]>>,
}

impl<S: Store> BuggyStore<S> {
    pub fn above(bug: Option<Bug>, store: S) -> Self {
        Self::new(bug.filter(|bug| bug.is_above()), store)
    }

    pub fn below(bug: Option<Bug>, store: S) -> Self {
        Self::new(bug.filter(|bug| !bug.is_above()), store)
    }

    fn new(bug: Option<Bug>, store: S) -> Self {
        Self { store, bug, calls: 0.into(), past: Mutex::default() }
    }

    /// Returns true once in `period` calls.
    fn is_turn(&self, period: usize) -> bool {
        self.calls.fetch_add(1, SeqCst) % period == period - 1
    }

    fn alter_loaded(&self, request: &LoadRequest, loaded: Loaded) -> Loaded {
        let [last, before] = self.past.lock().unwrap().get(&request.key).cloned().unwrap_or_default();
        let with_value = |record: &Arc<Record>| record.value.is_some();
        match (self.bug, loaded) {
            (Some(Bug::LoadsPreviousVersion), Loaded::Found(now)) if self.is_turn(10) => {
                Loaded::Found(before.filter(with_value).unwrap_or(now))
            }
            (Some(Bug::RevivesDeletedRecords), Loaded::Absent(version)) if self.is_turn(10) => {
                let dead = [last, before].into_iter().flatten().find(with_value);
                dead.map_or(Loaded::Absent(version), |dead| {
                    let expires_at = self.clock().now().plus(Duration::from_secs(60));
                    Loaded::Found(Arc::new(Record { expires_at, version, ..Record::clone(&dead) }))
                })
            }
            (_, loaded) => loaded,
        }
    }

    async fn write(&self, write: &Write) -> Result<Applied> {
        let mut write = write.clone();
        match self.bug {
            Some(Bug::LosesAcknowledgedWrites) if self.is_turn(15) => return Ok(Applied::Stored),
            Some(Bug::SkipsComparison) => write.if_version = None,
            Some(Bug::ExpiresLate) => self.move_expiry(&mut write, |at, span| at.plus(span)),
            Some(Bug::ExpiresEarly) => self.move_expiry(&mut write, |at, span| at.minus(span)),
            _ => {}
        }
        let applied = self.apply_one(&write).await?;
        match (self.bug, applied) {
            (Some(Bug::LetsLateWritesWin), Applied::Superseded(held)) => {
                self.clock().observe(held);
                self.apply_one(&self.with_new_version(&write)).await
            }
            (Some(Bug::ForgetsOwnWrites), Applied::Stored) if write.is_retry => {
                Ok(Applied::Conflict(write.record.version))
            }
            (Some(Bug::StoresRejectedWrites), Applied::Stored) if self.is_turn(40) => {
                Err(Error::new(ErrorKind::Overloaded, "planted: the store is busy"))
            }
            (_, applied) => Ok(applied),
        }
    }

    async fn apply_one(&self, write: &Write) -> Result<Applied> {
        let applied = self.store.apply(std::slice::from_ref(write)).await?.remove(0);
        if applied == Applied::Stored {
            let mut past = self.past.lock().unwrap();
            let [last, before] = past.entry(write.record.key.clone()).or_default();
            *before = last.replace(Arc::clone(&write.record));
        }
        Ok(applied)
    }

    fn with_new_version(&self, write: &Write) -> Write {
        let version: Version = self.clock().issue_version();
        let mut write = write.clone();
        write.record = Arc::new(Record { version, ..Record::clone(&write.record) });
        write
    }

    fn move_expiry(
        &self,
        write: &mut Write,
        by: impl Fn(threadkeep::store::Timestamp, Duration) -> threadkeep::store::Timestamp,
    ) {
        let is_brief = write.record.expires_at < self.clock().now().plus(Duration::from_secs(60));
        if is_brief && write.record.value.is_some() {
            let expires_at = by(write.record.expires_at, Duration::from_millis(700));
            write.record = Arc::new(Record { expires_at, ..Record::clone(&write.record) });
        }
    }
}

#[async_trait]
impl<S: Store> Store for BuggyStore<S> {
    fn clock(&self) -> &Arc<Clock> {
        self.store.clock()
    }
    fn breaker(&self) -> Option<&Breaker> {
        self.store.breaker()
    }
    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        match self.store.load(requests).await {
            Ok(all) => {
                Ok(requests.iter().zip(all).map(|(request, one)| self.alter_loaded(request, one)).collect())
            }
            Err(e) if e.is_outage() && self.bug == Some(Bug::ReportsOutageAsAbsence) => {
                Ok(requests.iter().map(|_| Loaded::Absent(Version::NONE)).collect())
            }
            Err(e) => Err(e),
        }
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        if self.bug.is_none() {
            return self.store.apply(writes).await;
        }
        let mut all = Vec::new();
        for write in writes {
            all.push(self.write(write).await?);
        }
        Ok(all)
    }
    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        self.store.list(page).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.store.touch(keys).await
    }
    async fn purge(&self, most: usize) -> Result<usize> {
        self.store.purge(most).await
    }
    async fn probe(&self) -> Result<()> {
        self.store.probe().await
    }
}
