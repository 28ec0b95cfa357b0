//! The warm-up loads the newest live conversations into memory before a caller wants them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::copies::{Copies, Observed};
use super::memory::{Admission, weight};
use super::page_size::PageSizer;
use crate::error::{Error, Result};
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::outage::CopyRank;
use crate::resilience::backoff::Backoff;
use crate::store::{ListPage, ListRequest, Store};

/// The limit on conversations of one call. The warm-up makes one call at a time, so that live traffic has the other places.
const MAX_PAGE: usize = 500;
/// The pauses between attempts if the store fails while its breaker is closed.
const MIN_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// The interval of the progress log of a long warm-up.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// The progress of the warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WarmupProgress {
    /// The number of conversations that the warm-up has loaded, from the store or in an outage from the local disk.
    pub conversations: usize,
    /// How far the warm-up is.
    pub state: WarmupState,
}

/// How far the warm-up is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WarmupState {
    /// The warm-up loads conversations.
    #[default]
    Running,
    /// The conversations came from the local disk, because of an outage. After the outage, the warm-up loads them from the
    /// store.
    FromDisk,
    /// The warm-up has ended, or the backend has none.
    Done,
}

/// The task that loads conversations into memory.
#[derive(Debug)]
pub(super) struct Warmer {
    pub(super) store: Arc<dyn Store>,
    pub(super) copies: Arc<Copies>,
    /// The limit on conversations.
    pub(super) max_count: usize,
    /// The limit on bytes in memory, the present entries included.
    pub(super) max_bytes: u64,
    pub(super) progress: watch::Sender<WarmupProgress>,
    /// Ends after the first poll of the change feed, or in an outage. A conversation from before the poll needs a load of its own.
    pub(super) feed_began: oneshot::Receiver<()>,
}

impl Warmer {
    /// Runs the warm-up once.
    ///
    /// In an outage it first loads the replica, so that a caller of [`Cache::warm`](crate::Cache::warm) does not wait for the
    /// end of the outage.
    pub(super) async fn run(mut self) {
        if self.max_count > 0 {
            (&mut self.feed_began).await.ok();
            if let Err(error) = self.warm().await {
                tracing::warn!(%error, "warm-up failed; conversations enter memory when they are read");
                if self.progress.borrow().state == WarmupState::FromDisk {
                    return;
                }
            }
        }
        self.progress.send_modify(|progress| progress.state = WarmupState::Done);
    }

    /// Loads from the store, or in an outage first from the replica.
    async fn warm(&self) -> Result<()> {
        let started_at = Instant::now();
        let mut page_size = PageSizer::new(MAX_PAGE);
        let first = match self.fetch_page(&mut page_size, self.max_count, None).await {
            Err(error) if is_transient(&error) => {
                self.load_from_replica().await?;
                // Callers of `warm` continue here. The load from the store follows in the background.
                self.progress.send_modify(|progress| progress.state = WarmupState::FromDisk);
                self.log_loaded("the local disk", started_at);
                self.fetch_with_retry(&mut page_size, self.max_count, None).await?
            }
            first => first?,
        };
        self.load_from_store(page_size, first).await?;
        self.log_loaded("the store", started_at);
        Ok(())
    }

    fn log_loaded(&self, source: &str, started_at: Instant) {
        let conversations = self.progress.borrow().conversations;
        tracing::info!(conversations, took = ?started_at.elapsed(), "warm-up loaded conversations from {source}");
    }

    /// Keeps the first items, as many as memory has room for. `record` returns the record of an item.
    fn take_while_fits<T>(&self, items: Vec<T>, record: impl Fn(&T) -> &Record) -> Vec<T> {
        let mut bytes = self.copies.memory.size().1;
        let fits = |item: &T| {
            let record = record(item);
            // A record that memory holds already takes no more room.
            let is_held = self.copies.memory.view(&record.key).entry.is_some();
            bytes += if is_held { 0 } else { weight(record) };
            bytes <= self.max_bytes
        };
        items.into_iter().take_while(fits).collect()
    }

    /// Loads page by page, newest first. While one page enters memory, the next is in flight.
    async fn load_from_store(&self, mut page_size: PageSizer, mut next: Observed<ListPage>) -> Result<()> {
        let (mut conversations, mut logged_at) = (0, Instant::now());
        loop {
            let (received, mut is_last) = (next.value.records.len(), next.value.is_last);
            let last = next.value.records.last().map(|record| (record.version, record.key.clone()));
            let page = next.map(|page| self.take_while_fits(page.records, |record| record));
            let page = page.map(|records| records.into_iter().map(Arc::new).collect::<Vec<_>>());
            conversations += page.value.len();
            // If memory had no room for the whole page, older pages do not fit either.
            is_last |= page.value.len() < received || conversations >= self.max_count || last.is_none();
            let admit = self.admit(page);
            if is_last {
                admit.await;
                self.advance(conversations);
                return Ok(());
            }
            let left = self.max_count.saturating_sub(conversations);
            let ((), fetched) = tokio::join!(admit, self.fetch_with_retry(&mut page_size, left, last));
            self.advance(conversations);
            if logged_at.elapsed() >= PROGRESS_INTERVAL {
                tracing::info!(conversations, of = self.max_count, "warm-up is loading conversations");
                logged_at = Instant::now();
            }
            next = fetched?;
        }
    }

    /// Requests a page, and halves it until the store delivers it in time.
    async fn fetch_page(
        &self,
        page_size: &mut PageSizer,
        left: usize,
        after: After,
    ) -> Result<Observed<ListPage>> {
        let request = |limit| {
            let page = ListRequest { user: None, limit, after: after.clone() };
            async move { self.copies.observe(&self.copies.begin(), self.store.list(&page)).await }
        };
        page_size.fetch(&*self.store, left, request).await
    }

    /// Requests a page as [`fetch_page`](Self::fetch_page) does, and retries it until the outage ends.
    async fn fetch_with_retry(
        &self,
        page_size: &mut PageSizer,
        left: usize,
        after: After,
    ) -> Result<Observed<ListPage>> {
        let mut pauses = Backoff::new(MIN_PAUSE, MAX_PAUSE);
        loop {
            // The breaker finds the end of the outage by its own probe. A request before that fails at once.
            if let Some(breaker) = self.store.breaker() {
                breaker.wait_closed().await;
            }
            match self.fetch_page(page_size, left, after.clone()).await {
                Err(error) if is_transient(&error) => {
                    // The wait that the store asks for is the minimum. The backoff may be longer.
                    tokio::time::sleep(pauses.next().max(error.retry_after()).unwrap_or(MAX_PAUSE)).await;
                }
                done => return done,
            }
        }
    }

    /// Hands a page to the outage file and then to memory (I3).
    async fn admit(&self, page: Observed<Vec<Arc<Record>>>) {
        // Copies that a caller has read are promoted first, so that this page does not displace them.
        self.copies.save_first_reads().await;
        let page = self.copies.persist(page, CopyRank::Listed).await;
        // The oldest enter first, so that memory evicts them first.
        self.copies.admit_listed(&page, page.value().iter().rev());
    }

    /// Loads the copies that were written last.
    async fn load_from_replica(&self) -> Result<()> {
        let Some(file) = &self.copies.file else { return Ok(()) };
        let (mut conversations, mut before_row, mut has_room) = (0, i64::MAX, true);
        while conversations < self.max_count && has_room {
            // The token is older than the read of the file, so a change during the read shows (I2).
            let call = self.copies.begin();
            let copies = file.copies(before_row, MAX_PAGE.min(self.max_count - conversations)).await?;
            let Some((last, ..)) = copies.last() else { break };
            before_row = *last;
            let now = self.copies.clock.now();
            let live: Vec<_> = copies.into_iter().filter(|(_, record, _)| record.is_live(now)).collect();
            let count = live.len();
            let fitting = self.take_while_fits(live, |(_, record, _)| record);
            has_room = fitting.len() == count;
            let admitted = self.copies.memory.drive_listed(fitting, |(_, record, confirmed_at), wish| {
                self.copies.admit_copy(&call, record, now.since(confirmed_at), wish)
            });
            conversations += admitted.iter().filter(|one| matches!(one, Admission::Cached(_))).count();
            self.advance(conversations);
        }
        Ok(())
    }

    /// Publishes the progress.
    fn advance(&self, conversations: usize) {
        self.progress.send_modify(|progress| progress.conversations = conversations);
    }
}

/// Returns true if a retry can succeed: after an outage, or when the store has room again.
fn is_transient(error: &Error) -> bool {
    error.is_outage() || error.retry_after().is_some()
}

/// The start of a page: it begins after this conversation.
type After = Option<(Version, Key)>;
