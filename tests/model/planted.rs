//! Bugs that the oracle must notice, planted between a cache and the store.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::store::{
    Applied, Breaker, Clock, Condition, ListPage, ListRequest, LoadRequest, Loaded, Record, Store, Write,
    WriterId,
};
use threadkeep::{Error, ErrorKind, Key, Result, Version};

use crate::clocks::true_time;
use crate::plan::{Settings, UseOfKeys};

/// A planted bug. The number in its comment is the promise that the bug breaks.
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
    /// 4: the store does not recognise a repeated write whose response was lost.
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
    /// 1: a condition does not hold over a run of own writes, so a daemon that is alone conflicts with itself.
    ForgetsOwnRuns,
    /// 4: the write of another daemon does not end a run.
    KeepsRunOverOthers,
    /// 4: the store does not remember the counted writes of each writer, so it applies a repeated update again.
    ForgetsCountedWrites,
    /// 1: the store forgets `base_version`, so a stored put counts as superseded.
    ForgetsBaseVersions,
    /// 4: a removed conversation leaves no tombstone.
    ForgetsTombstones,
    /// 4: an upsert by plain SQL gets no version.
    KeepsVersionOfUpsert,
    /// 4: an upsert by plain SQL does not end the run of the last daemon.
    KeepsRunOverUpsert,
    /// 4: a delete by plain SQL leaves no tombstone.
    ForgetsPlainDeletes,
    /// 4: all daemons have one daemon part of the writer id.
    SharesOneDaemonPart,
    /// 4: a copied or restored outage file keeps its daemon part.
    KeepsDaemonPartOfCopies,
    /// 4: a write gets a new version when it is sent again.
    RenewsSentVersions,
    /// 1: the store does not note appends, so it applies a repeated append again.
    ForgetsAppends,
    /// 4: the store adds an append to a newer put.
    AppendsToNewerPuts,
}

impl Bug {
    pub const ALL: [Self; 24] = [
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
        Self::ForgetsOwnRuns,
        Self::KeepsRunOverOthers,
        Self::ForgetsCountedWrites,
        Self::ForgetsBaseVersions,
        Self::ForgetsTombstones,
        Self::KeepsVersionOfUpsert,
        Self::KeepsRunOverUpsert,
        Self::ForgetsPlainDeletes,
        Self::SharesOneDaemonPart,
        Self::KeepsDaemonPartOfCopies,
        Self::RenewsSentVersions,
        Self::ForgetsAppends,
        Self::AppendsToNewerPuts,
    ];

    /// Changes the settings of a world so that the bug soon does harm. An unknown bug needs more worlds.
    pub fn focus(self, settings: &mut Settings) {
        settings.has_operator = self == Self::KeepsDaemonPartOfCopies;
        match self {
            Self::KeepsVersionOfUpsert
            | Self::KeepsRunOverUpsert
            | Self::ForgetsPlainDeletes
            | Self::AppendsToNewerPuts => {
                settings.use_of_keys = UseOfKeys::SharedWithSql;
            }
            Self::ForgetsOwnRuns | Self::KeepsDaemonPartOfCopies => {
                settings.use_of_keys = UseOfKeys::Alone;
                (settings.is_restless, settings.has_file) = (true, [true, true]);
            }
            Self::KeepsRunOverOthers | Self::SharesOneDaemonPart | Self::RenewsSentVersions => {
                (settings.use_of_keys, settings.has_file) = (UseOfKeys::Shared, [true, true]);
            }
            Self::SkipsClockSync => settings.skews = [300_000, -300_000],
            _ => {}
        }
    }

    /// Returns true for a bug above the resilient store, as in the cache, and false for a bug below, as in the database.
    fn is_above(self) -> bool {
        matches!(self, Self::ReportsOutageAsAbsence | Self::RenewsSentVersions)
    }
}

/// A store with at most one planted bug.
#[derive(Debug)]
pub struct BuggyStore<S> {
    store: S,
    bug: Option<Bug>,
    handle: usize,
    calls: AtomicUsize,
    /// The last two stored records of each conversation.
    past: Mutex<HashMap<Key, [Option<Arc<Record>>; 2]>>,
    /// The versions of all writes that were sent.
    sent: Mutex<HashSet<Version>>,
}

impl<S: Store> BuggyStore<S> {
    pub fn above(bug: Option<Bug>, handle: usize, store: S) -> Self {
        Self::new(bug.filter(|bug| bug.is_above()), handle, store)
    }

    pub fn below(bug: Option<Bug>, handle: usize, store: S) -> Self {
        Self::new(bug.filter(|bug| !bug.is_above()), handle, store)
    }

    fn new(bug: Option<Bug>, handle: usize, store: S) -> Self {
        Self { store, bug, handle, calls: 0.into(), past: Mutex::default(), sent: Mutex::default() }
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
                    let expires_at = true_time().plus(Duration::from_secs(60));
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
            Some(Bug::SkipsComparison) => write.condition = Condition::Any,
            Some(Bug::ExpiresLate) => self.move_expiry(&mut write, |at, span| at.plus(span)),
            Some(Bug::ExpiresEarly) => self.move_expiry(&mut write, |at, span| at.minus(span)),
            Some(Bug::SharesOneDaemonPart) => write.writer = with_daemon_part(write.writer, 1),
            Some(Bug::KeepsDaemonPartOfCopies) => {
                write.writer = with_daemon_part(write.writer, self.handle as i64 + 1);
            }
            Some(Bug::RenewsSentVersions) if self.was_sent(&write) => {
                let now = Version::min_at(true_time());
                write = with_version(&write, now.max(write.record.version));
            }
            _ => {}
        }
        let is_repeated = self.is_last(&write);
        let applied = self.apply_one(&write).await?;
        match (self.bug, applied) {
            (Some(Bug::LetsLateWritesWin), Applied::Superseded(held)) => {
                self.apply_one(&with_version(&write, Version::from_raw(held.raw() + 1))).await
            }
            (Some(Bug::ForgetsOwnWrites), Applied::Stored) if is_repeated => {
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

    /// Returns true if the write was sent before.
    fn was_sent(&self, write: &Write) -> bool {
        !self.sent.lock().unwrap().insert(write.record.version)
    }

    /// Returns true if the write was the last one that the store accepted for its conversation.
    fn is_last(&self, write: &Write) -> bool {
        let past = self.past.lock().unwrap();
        let last = past.get(&write.record.key).and_then(|[last, _]| last.as_ref());
        last.is_some_and(|last| last.version == write.record.version)
    }

    fn move_expiry(
        &self,
        write: &mut Write,
        by: impl Fn(threadkeep::store::Timestamp, Duration) -> threadkeep::store::Timestamp,
    ) {
        let is_brief = write.record.expires_at < true_time().plus(Duration::from_secs(60));
        if is_brief && write.record.value.is_some() {
            let expires_at = by(write.record.expires_at, Duration::from_millis(700));
            write.record = Arc::new(Record { expires_at, ..Record::clone(&write.record) });
        }
    }
}

/// Returns the writer with another daemon part, and its own part for the opening of the file.
fn with_daemon_part(writer: WriterId, daemon: i64) -> WriterId {
    const OPENING_BITS: u32 = 24;
    WriterId::from_raw(daemon << OPENING_BITS | writer.raw() & ((1 << OPENING_BITS) - 1))
}

fn with_version(write: &Write, version: Version) -> Write {
    let mut write = write.clone();
    write.record = Arc::new(Record { version, ..Record::clone(&write.record) });
    write
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
