//! The change feed: one request of each daemon, every two seconds, names the conversations that changed in the store.
//!
//! # Why is an entry validated that no poll names?
//!
//! Let S be the moment at which the task began its history: the first answer had come. An entry counts only if its call began
//! after S. The entry was the newest record at some moment T of that call. Let C be a change of the record after T.
//!
//! * The snapshots of all polls whose answers came before the call began are older than C. So a later poll names C (the contract
//!   of [`Store::changes`]), with the version of C or a newer one.
//! * If the entry is in memory when the task handles that poll, the entry goes.
//! * If the call still runs, its read token is older than the name. So the floor discards its result (I2).
//! * The task moves `polled` only after it has handled all names of the poll.
//!
//! So after the poll that began at P, memory holds no such entry that was outdated at P. This holds for loads, pages of a list
//! or of the warm-up, and own writes alike: each takes its token first, and each answer was true at T. It does not depend on
//! clocks, because only the order of events counts. A jump of the clock ends the freshness of all entries until the next poll.
//! A name of an own write has the version that memory holds, so it drops nothing.
//!
//! An entry from before S needs a load, because no poll names a change between its call and the first snapshot.
//!
//! Queued writes, copies of the replica and absences are not covered: the first two are never fresh, and an absence lives for two
//! seconds. Loads must not go to a read replica of the database, because T may then lie before the call.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::copies::Copies;
use super::memory::weight;
use super::within;
use crate::error::{Error, ErrorKind, Result};
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::observe::metrics::Metrics;
use crate::outage::CopyRank;
use crate::resilience::breaker::BreakerState;
use crate::store::{Continuity, Cursor, LoadRequest, Loaded, Store};

/// The pause until the feed tries again, if the database lacks the function.
const SCHEMA_PAUSE: Duration = Duration::from_secs(60);
/// The names that the task handles between two points at which other tasks of the OS thread run.
const NAMES_PER_TURN: usize = 500;
/// The limit on conversations and bytes of one batch of reloads. Their size before the change tells their bytes.
const MAX_BATCH: usize = 250;
const MAX_BATCH_BYTES: u64 = 4 << 20;
/// The limit on conversations that one poll reloads. Readers load the others.
const MAX_RELOADS: usize = 2_000;

/// The task that follows the changes of the store.
#[derive(Debug)]
pub(super) struct Feed {
    store: Arc<dyn Store>,
    copies: Arc<Copies>,
    metrics: Arc<Metrics>,
    progress: watch::Sender<Option<FeedProgress>>,
    /// The place in the history. `None` before the first answer.
    cursor: Option<Cursor>,
    /// The start of the first request of a poll whose last page has not come yet.
    began: Option<Moment>,
}

/// How far the feed is.
#[derive(Debug, Clone)]
pub(super) struct FeedProgress {
    /// The moment as of which the feed has validated memory. Before the first poll, the start of the feed.
    pub(super) polled: Moment,
    /// The error of the last request, if it failed.
    pub(super) error: Option<Error>,
}

/// A conversation that changed and that callers read lately, with its bytes before the change.
type Reload = (Key, u64);

impl Feed {
    pub(super) fn new(
        store: Arc<dyn Store>,
        copies: Arc<Copies>,
        metrics: Arc<Metrics>,
    ) -> (Self, watch::Receiver<Option<FeedProgress>>) {
        let (progress, receiver) = watch::channel(None);
        (Self { store, copies, metrics, progress, cursor: None, began: None }, receiver)
    }

    /// Polls until the cache is dropped, or until the store says that it has no history.
    ///
    /// Drops `first` after the first poll. In an outage it does so at once.
    pub(super) async fn run(mut self, interval: Duration, first: oneshot::Sender<()>) {
        let mut first = Some(first);
        self.progress.send_replace(Some(FeedProgress { polled: self.copies.clock.moment(), error: None }));
        loop {
            // The breaker finds the end of an outage by its own probe.
            if let Some(breaker) = self.store.breaker() {
                first = first.filter(|_| breaker.state() == BreakerState::Closed);
                breaker.wait_closed().await;
            }
            let next = Instant::now() + interval;
            let polled = self.poll().await;
            if let Some(first) = first.take() {
                // An entry belongs to the history from its next millisecond on.
                tokio::time::sleep(Duration::from_millis(1)).await;
                drop(first);
            }
            match polled {
                // A slow store must not hold up the next poll. Readers load the rest.
                Ok(Some(reloads)) => _ = within(interval, self.reload(reloads)).await,
                Ok(None) => break,
                Err(error) => self.note_failure(error).await,
            }
            tokio::time::sleep_until(next).await;
        }
        self.progress.send_replace(None);
    }

    /// Polls all pages. Returns the conversations to load again, or `None` if the store has no history.
    ///
    /// After a failure, the next poll continues behind the last page.
    async fn poll(&mut self) -> Result<Option<Vec<Reload>>> {
        let mut reloads = Vec::new();
        loop {
            // The snapshot of the answer is newer than this moment.
            let asked = self.copies.clock.moment();
            let Some(page) = self.store.changes(self.cursor.as_ref()).await? else { return Ok(None) };
            let began = self.began.filter(|_| page.continuity == Continuity::Unbroken).unwrap_or(asked);
            match page.continuity {
                Continuity::Unbroken => self.handle(&page.changed, &mut reloads).await,
                Continuity::Begun if !self.copies.are_of_other_history(page.history.as_ref()).await => {
                    self.begin()
                }
                Continuity::Begun | Continuity::Restored => self.restart(page.history).await,
            }
            (self.cursor, self.began) = (Some(page.cursor), Some(began));
            if page.is_last {
                self.began = None;
                self.copies.memory.validate_unnamed(began);
                self.progress.send_replace(Some(FeedProgress { polled: began, error: None }));
                return Ok(Some(reloads));
            }
        }
    }

    /// Begins a history. If there was one before, its changes since the last poll have no names: a cursor can be too old, or one
    /// transaction can have changed too many rows. So memory starts anew, too. The replica answers in an outage only.
    fn begin(&self) {
        if self.cursor.is_some() {
            self.copies.memory.forget_history();
        }
        self.copies.memory.begin_history();
    }

    /// Drops the older values of the named conversations.
    async fn handle(&self, changed: &[(Key, Version)], reloads: &mut Vec<Reload>) {
        self.metrics.feed_changes.increment(changed.len() as u64);
        for names in changed.chunks(NAMES_PER_TURN) {
            for (key, version) in names {
                let Some(older) = self.copies.memory.named(key, *version) else { continue };
                self.metrics.feed_invalidations.increment(1);
                if older.is_accessed() && reloads.len() < MAX_RELOADS {
                    reloads.push((key.clone(), weight(older.record())));
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Begins a new history, and drops what belongs to the one before.
    async fn restart(&self, history: Option<Arc<str>>) {
        self.metrics.feed_restores.increment(1);
        tracing::warn!(
            "the change feed found another history: the database was restored or replaced; memory and replica drop their copies, \
             and queued writes stay"
        );
        self.copies.forget_history(history).await;
        self.copies.memory.begin_history();
    }

    /// Loads conversations again, in batches. A batch has one conversation or more, so the loop ends (I12).
    async fn reload(&self, mut reloads: Vec<Reload>) {
        while !reloads.is_empty() {
            let mut bytes = 0;
            let mut fits = |(_, size): &Reload| {
                bytes += size;
                bytes <= MAX_BATCH_BYTES
            };
            let count = reloads.iter().take(MAX_BATCH).take_while(|reload| fits(reload)).count().max(1);
            let batch: Vec<Key> = reloads.drain(..count).map(|(key, _)| key).collect();
            if let Err(error) = self.load(batch).await {
                return tracing::debug!(%error, "the change feed loads no more conversations; their readers do");
            }
        }
    }

    async fn load(&self, keys: Vec<Key>) -> Result<()> {
        let requests: Vec<LoadRequest> = keys.iter().cloned().map(LoadRequest::new).collect();
        let loaded = self.copies.observe(&self.copies.begin(), self.store.load(&requests)).await?;
        let records = loaded.map(|answers| {
            let record = |(key, answer): (Key, Loaded)| match answer {
                Loaded::Found(record) => Some(record),
                Loaded::Absent(version) => Some(Record::tombstone(key, version).into()),
                Loaded::NotModified => None,
            };
            keys.into_iter().zip(answers).filter_map(record).collect::<Vec<Arc<Record>>>()
        });
        self.metrics.feed_reloads.increment(records.value.len() as u64);
        self.copies.admit_all(self.copies.persist(records, CopyRank::Used).await);
        Ok(())
    }

    /// Reports the first failure in a row, and waits longer for a missing migration.
    async fn note_failure(&mut self, error: Error) {
        let is_first = self.progress.borrow().as_ref().is_none_or(|progress| progress.error.is_none());
        if is_first && !error.is_outage() {
            tracing::warn!(%error, "the change feed cannot read the changes; conversations are fresh for the freshness period only");
        }
        let kind = error.kind();
        self.progress.send_modify(|progress| {
            if let Some(progress) = progress {
                progress.error = Some(error);
            }
        });
        match kind {
            ErrorKind::SchemaOutdated => tokio::time::sleep(SCHEMA_PAUSE).await,
            // The store does not know its cursor. A new history begins.
            ErrorKind::Rejected | ErrorKind::Invalid => {
                self.began = None;
                if self.cursor.take().is_some() {
                    self.copies.memory.forget_history();
                }
            }
            _ => {}
        }
    }
}
