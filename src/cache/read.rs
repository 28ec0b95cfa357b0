//! The read path: memory, then one load for all who want it, then what is stale.

use std::sync::Arc;
use std::time::Instant;

use tracing::Instrument;

use super::outage::{FromQueue, Known, LOOKING, LOOKS, changes_too_fast, is_to_be_queued};
use super::{Cache, Call, Found, Inner};
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Ticket;
use crate::metrics::Read;
use crate::near::{Entry, Learnt, News};
use crate::record::{Freshness, Key, Record, Want};
use crate::spool::Rank;
use crate::store::Loaded;
use crate::version::{Moment, Version};

impl Cache {
    /// The thread with this id, or `None` where the source of truth says that there is none.
    ///
    /// From memory, if the source of truth confirmed it within `fresh_for`; this neither parses nor copies, allocates nothing,
    /// does no I/O and takes no lock of ours. Where a write of this daemon waits in the queue, that is the answer, for which a
    /// short one is taken. Otherwise one load serves all callers. Where the source of truth cannot be asked, a copy in memory or
    /// on the local disk that has not expired is handed out and says how [stale](crate::Freshness::Stale) it is.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] where nothing is known about the thread and the source of truth cannot be asked;
    /// [`ErrorKind::Invalid`] for what cannot be a thread id; also `Busy`, `Denied`, `Schema`, `Local`, `Closed`.
    pub async fn get(&self, key: impl AsRef<str>) -> Result<Option<Found>> {
        let inner = &self.0;
        inner.check_open()?;
        if let Some((entry, freshness)) = inner.near.hit(key.as_ref(), || !inner.is_reachable()) {
            inner.metrics.read(match freshness {
                Freshness::Fresh => Read::Hit,
                Freshness::Queued => Read::Queued,
                Freshness::Stale { .. } => Read::Stale,
            });
            return Ok(Some(Found::new(entry, freshness)));
        }
        let key = Key::new(key)?;
        let span = tracing::debug_span!("get", thread = %key);
        let result = inner.get_slowly(&key).instrument(span).await;
        inner.metrics.read(match &result {
            Ok(Some(found)) if found.freshness() == Freshness::Fresh => Read::Loaded,
            Ok(Some(found)) if found.freshness() == Freshness::Queued => Read::Queued,
            Ok(Some(_)) => Read::Stale,
            Ok(None) => Read::Absent,
            Err(_) => Read::Failed,
        });
        result
    }
}

impl Inner {
    async fn get_slowly(self: &Arc<Self>, key: &Key) -> Result<Option<Found>> {
        let (began, start) = (Moment::now(), Instant::now());
        // Each turn of the loop takes a load, and a change during it.
        for _ in (0..LOOKS).take_while(|_| start.elapsed() < LOOKING) {
            if self.near.absent(key).is_some() {
                return Ok(None);
            }
            if let FromQueue::Newest(entry, _) = self.ask_queue(key).await? {
                return Ok(entry.map(Found::queued));
            }
            // Another load may have landed since memory was asked.
            if let Some(entry) = self.near.fresh(key.as_str()) {
                return Ok(Some(Found::fresh(entry)));
            }
            let mut load = match self.check_reachable().and_then(|()| self.load(key)) {
                Ok(load) => load,
                Err(e) => return self.at_hand(key).await.map(|(found, _)| found).ok_or(e),
            };
            let loaded = tokio::select! {
                biased;
                loaded = load.land() => loaded.and_then(|loaded| loaded),
                Some((found, _)) = self.at_hand_after_patience(key) => return Ok(found),
            };
            match loaded {
                // It has expired on its way: whether somebody renewed it, only the source of truth knows.
                Ok(Learnt::Present(entry)) if !self.is_live(&entry) => {}
                // Joined, but begun so long before this get that it may be older than what `Fresh` means: once more.
                Ok(Learnt::Present(_)) if !self.near.is_recent(load.began, began) => {}
                Ok(Learnt::Absent(_)) if !self.near.is_recent_absence(load.began, began) => {}
                Ok(Learnt::Present(entry)) => return Ok(Some(Found::fresh(entry.marked()))),
                Ok(Learnt::Absent(_)) => return Ok(None),
                Ok(Learnt::Overtaken) => {}
                // The newest there is waits in the queue. Where its time is over, so is that of what it replaces.
                Ok(Learnt::Behind) => match self.ask_queue(key).await? {
                    FromQueue::Newest(entry, _) => return Ok(entry.map(Found::queued)),
                    FromQueue::Expired(_) => return Ok(None),
                    FromQueue::Nothing => continue,
                },
                // Whatever the error is, it tells nothing about the thread.
                Err(e) => return self.at_hand(key).await.map(|(found, _)| found).ok_or(e),
            }
            // What overtook it may have been current while this get was under way.
            let is_current =
                |entry: &Arc<Entry>| self.near.is_fresh(entry, Moment::now()) || entry.confirmed >= began;
            if let Some(entry) = self.near.live(key).filter(is_current) {
                return Ok(Some(Found::fresh(entry)));
            }
        }
        self.at_hand(key).await.map(|(found, _)| found).ok_or_else(|| changes_too_fast(key))
    }

    /// What was written while the source of truth could not be asked; else the copy in memory, or else the last known
    /// one on disk, if it has not expired. Looked up when it is handed out, not before, so that it is no older than what
    /// was acknowledged meanwhile. No thread where a deletion waits in the queue. With the version that it had when it was
    /// looked up, as an update goes on from it.
    async fn at_hand(&self, key: &Key) -> Option<(Option<Found>, Version)> {
        let in_memory = || self.near.live(key).map(|entry| versioned(self.as_it_is(entry)));
        for _ in 0..LOOKS {
            match self.ask_queue(key).await {
                Ok(FromQueue::Newest(entry, version)) => return Some((entry.map(Found::queued), version)),
                Ok(FromQueue::Nothing) => {}
                Ok(FromQueue::Expired(_)) | Err(_) => return None,
            }
            if let Some(found) = in_memory() {
                return Some(found);
            }
            match self.last_known(key).await {
                Known::Copy(found) => return Some(versioned(found)),
                // Something may have come into memory meanwhile.
                Known::Nothing => return in_memory(),
                Known::Changed => {}
            }
        }
        None
    }

    async fn at_hand_after_patience(&self, key: &Key) -> Option<(Option<Found>, Version)> {
        tokio::time::sleep(self.limits.patience).await;
        self.at_hand(key).await
    }

    /// What an update goes on from: memory if that may be trusted, what waits in the queue, what is stored, or, where that
    /// cannot be known and the update may be queued, what is at hand.
    pub(super) async fn current(
        self: &Arc<Self>,
        key: &Key,
        mut may_trust_memory: bool,
    ) -> Result<(Option<Found>, Version)> {
        let began = Instant::now();
        for _ in (0..LOOKS).take_while(|_| began.elapsed() < LOOKING) {
            if may_trust_memory && let Some(entry) = self.near.fresh(key.as_str()) {
                return Ok(versioned(Found::fresh(entry)));
            }
            if may_trust_memory && let Some(version) = self.near.absent(key) {
                return Ok((None, version));
            }
            if let FromQueue::Newest(entry, version) = self.ask_queue(key).await? {
                return Ok((entry.map(Found::queued), version));
            }
            let loaded = match self.check_reachable().and_then(|()| self.load(key)) {
                Ok(mut load) => tokio::select! {
                    biased;
                    loaded = load.land() => loaded.and_then(|loaded| loaded),
                    Some(found) = self.at_hand_after_patience(key), if self.queueing().is_some() => {
                        return Ok(found);
                    }
                },
                Err(e) => Err(e),
            };
            match loaded {
                Ok(Learnt::Present(entry)) if !self.is_live(&entry) => {}
                Ok(Learnt::Present(entry)) => return Ok(versioned(Found::fresh(entry))),
                Ok(Learnt::Absent(version)) => return Ok((None, version)),
                Ok(Learnt::Overtaken) => may_trust_memory = true,
                Ok(Learnt::Behind) => {
                    if let FromQueue::Expired(version) = self.ask_queue(key).await? {
                        return Ok((None, version));
                    }
                }
                Err(e) if self.queueing().is_some() && is_to_be_queued(&e) => {
                    return self.at_hand(key).await.ok_or(e);
                }
                Err(e) => return Err(e),
            }
        }
        Err(changes_too_fast(key))
    }

    /// Whether it has not expired while it was on its way.
    pub(super) fn is_live(&self, entry: &Entry) -> bool {
        entry.record.is_live(self.origin.clock().now())
    }

    fn load(self: &Arc<Self>, key: &Key) -> Result<crate::fill::Joined<Result<Learnt>>> {
        let (inner, wanted) = (Arc::clone(self), key.clone());
        self.flights.join(key, &self.fences, |ticket| async move { inner.fill(&wanted, &ticket).await })
    }

    async fn fill(&self, key: &Key, ticket: &Ticket) -> Result<Learnt> {
        let began = Moment::now();
        let held = self.near.peek(key);
        let known = held.as_ref().map(|held| held.record.version);
        let loaded = self.origin.load(&[Want { key: key.clone(), known }]).await;
        let loaded = self.note(Call::Read, loaded)?.pop();
        // The file is given it before memory is: whoever asks the file for what was read once finds it there.
        let news = match (loaded, held) {
            (Some(Loaded::Found(record)), _) => {
                self.keep([Arc::clone(&record)], ticket, began, Rank::Used).await;
                News::Found(record)
            }
            (Some(Loaded::Same), Some(held)) => {
                if let Some(spool) = &self.spool {
                    spool.confirm(key, held.record.version, self.origin.clock().at(began)).await;
                }
                News::Found(Arc::clone(&held.record))
            }
            (Some(Loaded::Absent(version)), _) => {
                self.keep([Arc::new(Record::deletion(key.clone(), version))], ticket, began, Rank::Used)
                    .await;
                News::Absent(version)
            }
            (None | Some(Loaded::Same), _) => {
                return Err(Error::new(
                    ErrorKind::Schema,
                    format!("the store gave no answer for the thread {key}"),
                ));
            }
        };
        let learnt = self.near.learn(key, ticket, began, news);
        if matches!(learnt, Learnt::Overtaken) {
            self.metrics.discarded_fills.increment(1);
        }
        Ok(learnt)
    }
}

fn versioned(found: Found) -> (Option<Found>, Version) {
    let version = found.version();
    (Some(found), version)
}
