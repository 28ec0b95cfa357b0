//! Bugs that the oracle has to notice, planted into the way between a cache and the store.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::store::{
    Applied, Breaker, Clock, ListPage, ListRequest, LoadRequest, Loaded, Record, Store, Write,
};
use threadkeep::{Error, ErrorKind, Key, Result, Version};

/// What is wrong, and which promise of DESIGN (section 2) it breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// 1: some acknowledged writes are not stored.
    ForgetsSomeWrites,
    /// 1: some writes are refused for good, and stored all the same.
    StoresWhatItRefuses,
    /// 3: an outage reads as absence.
    CallsAnOutageAbsence,
    /// 4: a late write replaces a newer one.
    LetsLateWritesWin,
    /// 4: compare-and-set does not compare.
    DoesNotCompare,
    /// 4: a write that comes again, since its answer was lost, is taken for another one.
    DoesNotKnowItsOwnWrites,
    /// 5: some loads show the version before.
    ShowsThePast,
    /// 6: what is stored expires later than it should.
    ExpiresLate,
    /// 6: what is stored expires earlier than it should.
    ExpiresEarly,
    /// 6: a load brings back what has expired or was deleted.
    RevivesTheDead,
    /// 6: a clock that is wrong stays wrong.
    NeverCorrectsItsClock,
}

impl Bug {
    pub const ALL: [Self; 11] = [
        Self::ForgetsSomeWrites,
        Self::StoresWhatItRefuses,
        Self::CallsAnOutageAbsence,
        Self::LetsLateWritesWin,
        Self::DoesNotCompare,
        Self::DoesNotKnowItsOwnWrites,
        Self::ShowsThePast,
        Self::ExpiresLate,
        Self::ExpiresEarly,
        Self::RevivesTheDead,
        Self::NeverCorrectsItsClock,
    ];

    /// Whether it is a bug of what stands above the guard, like the cache, or of what stands below, like the database.
    fn is_above(self) -> bool {
        matches!(self, Self::CallsAnOutageAbsence)
    }
}

/// A store with a bug, or without.
#[derive(Debug)]
pub struct Planted<S> {
    store: S,
    bug: Option<Bug>,
    calls: AtomicUsize,
    /// Of each thread, the last two records that were stored.
    past: Mutex<HashMap<Key, [Option<Arc<Record>>; 2]>>,
}

impl<S: Store> Planted<S> {
    pub fn above(bug: Option<Bug>, store: S) -> Self {
        Self::new(bug.filter(|bug| bug.is_above()), store)
    }

    pub fn below(bug: Option<Bug>, store: S) -> Self {
        Self::new(bug.filter(|bug| !bug.is_above()), store)
    }

    fn new(bug: Option<Bug>, store: S) -> Self {
        Self { store, bug, calls: 0.into(), past: Mutex::default() }
    }

    /// Every so many calls.
    fn now_and_then(&self, period: usize) -> bool {
        self.calls.fetch_add(1, SeqCst) % period == period - 1
    }

    fn loaded(&self, want: &LoadRequest, loaded: Loaded) -> Loaded {
        let [last, before] = self.past.lock().unwrap().get(&want.key).cloned().unwrap_or_default();
        let with_value = |record: &Arc<Record>| record.value.is_some();
        match (self.bug, loaded) {
            (Some(Bug::ShowsThePast), Loaded::Found(now)) if self.now_and_then(10) => {
                Loaded::Found(before.filter(with_value).unwrap_or(now))
            }
            (Some(Bug::RevivesTheDead), Loaded::Absent(version)) if self.now_and_then(10) => {
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
            Some(Bug::ForgetsSomeWrites) if self.now_and_then(15) => return Ok(Applied::Stored),
            Some(Bug::DoesNotCompare) => write.if_version = None,
            Some(Bug::ExpiresLate) => self.move_expiry(&mut write, |at, span| at.plus(span)),
            Some(Bug::ExpiresEarly) => self.move_expiry(&mut write, |at, span| at.minus(span)),
            _ => {}
        }
        let applied = self.one(&write).await?;
        match (self.bug, applied) {
            (Some(Bug::LetsLateWritesWin), Applied::Superseded(held)) => {
                self.clock().observe(held);
                self.one(&self.with_version(&write)).await
            }
            (Some(Bug::DoesNotKnowItsOwnWrites), Applied::Stored) if write.is_retry => {
                Ok(Applied::Conflict(write.record.version))
            }
            (Some(Bug::StoresWhatItRefuses), Applied::Stored) if self.now_and_then(40) => {
                Err(Error::new(ErrorKind::Overloaded, "planted: it is busy"))
            }
            (_, applied) => Ok(applied),
        }
    }

    async fn one(&self, write: &Write) -> Result<Applied> {
        let applied = self.store.apply(std::slice::from_ref(write)).await?.remove(0);
        if applied == Applied::Stored {
            let mut past = self.past.lock().unwrap();
            let [last, before] = past.entry(write.record.key.clone()).or_default();
            *before = last.replace(Arc::clone(&write.record));
        }
        Ok(applied)
    }

    fn with_version(&self, write: &Write) -> Write {
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
impl<S: Store> Store for Planted<S> {
    fn clock(&self) -> &Arc<Clock> {
        self.store.clock()
    }
    fn breaker(&self) -> Option<&Breaker> {
        self.store.breaker()
    }
    async fn load(&self, wants: &[LoadRequest]) -> Result<Vec<Loaded>> {
        match self.store.load(wants).await {
            Ok(all) => Ok(wants.iter().zip(all).map(|(want, one)| self.loaded(want, one)).collect()),
            Err(e) if e.is_outage() && self.bug == Some(Bug::CallsAnOutageAbsence) => {
                Ok(wants.iter().map(|_| Loaded::Absent(Version::NONE)).collect())
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
