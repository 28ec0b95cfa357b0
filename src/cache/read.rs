//! The read path: memory, then one load for all who want it, then what is stale.

use std::sync::Arc;
use std::time::Instant;

use super::{Cache, Call, Found, Inner};
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Ticket;
use crate::metrics::Read;
use crate::near::{Entry, Learnt, News};
use crate::record::{Freshness, Key, Want};
use crate::store::Loaded;
use crate::version::Version;

impl Cache {
    /// The thread with this id, or `None` where the source of truth says that there is none.
    ///
    /// From memory, if the source of truth confirmed it within `fresh_for`; this neither parses nor copies, does no I/O
    /// and takes no lock of ours. Otherwise one load serves all callers. Where the source of truth cannot be asked, a
    /// copy in memory that has not expired is handed out and says how [stale](crate::Freshness::Stale) it is.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] where nothing is known about the thread and the source of truth cannot be asked;
    /// [`ErrorKind::Invalid`] for what cannot be a thread id; also `Busy`, `Denied`, `Schema`, `Local`, `Closed`.
    pub async fn get(&self, key: impl AsRef<str>) -> Result<Option<Found>> {
        let inner = &self.0;
        inner.check_open()?;
        if let Some(entry) = inner.near.fresh(key.as_ref()) {
            inner.metrics.read(Read::Hit);
            return Ok(Some(Found::fresh(entry)));
        }
        let result = inner.get_slowly(&Key::new(key)?).await;
        inner.metrics.read(match &result {
            Ok(Some(found)) if found.freshness() == Freshness::Fresh => Read::Loaded,
            Ok(Some(_)) => Read::Stale,
            Ok(None) => Read::Absent,
            Err(_) => Read::Failed,
        });
        result
    }
}

impl Inner {
    async fn get_slowly(self: &Arc<Self>, key: &Key) -> Result<Option<Found>> {
        let began = Instant::now();
        loop {
            if self.near.absent(key).is_some() {
                return Ok(None);
            }
            if !self.is_reachable()
                && let Some(found) = self.at_hand(key)
            {
                return Ok(Some(found));
            }
            let mut load = match self.check_reachable().and_then(|()| self.load(key)) {
                Ok(load) => load,
                Err(e) => return self.at_hand(key).ok_or(e).map(Some),
            };
            let loaded = tokio::select! {
                biased;
                loaded = load.land() => loaded.and_then(|loaded| loaded),
                Some(found) = self.at_hand_after_patience(key) => return Ok(Some(found)),
            };
            match loaded {
                Ok(Learnt::Present(entry)) => return Ok(Some(Found::fresh(entry.marked()))),
                Ok(Learnt::Absent(_)) => return Ok(None),
                Ok(Learnt::Overtaken) => {}
                // Whatever the error is, it tells nothing about the thread.
                Err(e) => return self.at_hand(key).ok_or(e).map(Some),
            }
            // What overtook it may have been current while this get was under way.
            let is_current =
                |entry: &Arc<Entry>| self.near.is_fresh(entry, Instant::now()) || entry.confirmed >= began;
            if let Some(entry) = self.near.live(key).filter(is_current) {
                return Ok(Some(Found::fresh(entry)));
            }
        }
    }

    /// The copy in memory, if it has not expired: fresh or stale. Looked up when it is handed out, not before, so that
    /// it is no older than what was acknowledged meanwhile.
    fn at_hand(&self, key: &Key) -> Option<Found> {
        let entry = self.near.live(key)?;
        let is_fresh = self.near.is_fresh(&entry, Instant::now());
        Some(if is_fresh { Found::fresh(entry) } else { Found::stale(entry) })
    }

    async fn at_hand_after_patience(&self, key: &Key) -> Option<Found> {
        tokio::time::sleep(self.limits.patience).await;
        self.at_hand(key)
    }

    /// What an update goes out from: the value in memory if that may be trusted, or else the stored one.
    pub(super) async fn current(
        self: &Arc<Self>,
        key: &Key,
        mut may_trust_memory: bool,
    ) -> Result<(Option<Arc<Entry>>, Version)> {
        loop {
            if may_trust_memory && let Some(entry) = self.near.fresh(key.as_str()) {
                let version = entry.record.version;
                return Ok((Some(entry), version));
            }
            if may_trust_memory && let Some(version) = self.near.absent(key) {
                return Ok((None, version));
            }
            self.check_reachable()?;
            match self.load(key)?.land().await?? {
                Learnt::Present(entry) => {
                    let version = entry.record.version;
                    return Ok((Some(entry), version));
                }
                Learnt::Absent(version) => return Ok((None, version)),
                Learnt::Overtaken => may_trust_memory = true,
            }
        }
    }

    fn load(self: &Arc<Self>, key: &Key) -> Result<crate::fill::Joined<Result<Learnt>>> {
        let (inner, wanted) = (Arc::clone(self), key.clone());
        self.flights.join(key, &self.fences, |ticket| async move { inner.fill(&wanted, &ticket).await })
    }

    async fn fill(&self, key: &Key, ticket: &Ticket) -> Result<Learnt> {
        let began = Instant::now();
        let held = self.near.peek(key);
        let known = held.as_ref().map(|held| held.record.version);
        let loaded = self.origin.load(&[Want { key: key.clone(), known }]).await;
        let loaded = self.note(Call::Read, loaded)?.pop();
        let news = match (loaded, held) {
            (Some(Loaded::Found(record)), _) => News::Found(record),
            (Some(Loaded::Same), Some(held)) => News::Found(Arc::clone(&held.record)),
            (Some(Loaded::Absent(version)), _) => News::Absent(version),
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
