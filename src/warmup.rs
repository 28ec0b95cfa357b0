//! Warm-up: the newest live threads come into memory before anybody asks for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::backoff::Backoff;
use crate::error::{Error, Result};
use crate::fence::{Fences, Ticket};
#[cfg(feature = "sqlite")]
use crate::local::spool::Spool;
use crate::near::{Near, weight};
use crate::record::{Key, Record};
#[cfg(not(feature = "sqlite"))]
use crate::spool::without::Spool;
use crate::spool::{Copy, Rank};
use crate::store::{Page, Portion, Recent, Store};
use crate::version::{Moment, Version};

/// Threads in one call, of which there is one at a time: live traffic has the other places at the source of truth.
const PAGE: usize = 500;
/// The pauses while the source of truth cannot be asked, though no breaker says so.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// How often a long warm-up says how far it is.
const REPORT: Duration = Duration::from_secs(5);

/// How far the warm-up is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WarmUp {
    /// Threads that it has brought into memory: from the source of truth, or in an outage from the local disk.
    pub threads: usize,
    /// Whether it is over, or there is none.
    pub is_done: bool,
    /// Whether they came from the local disk, because the source of truth was away. They come from there as soon as it is
    /// back.
    pub is_from_disk: bool,
}

/// What brings threads into memory.
#[derive(Debug)]
pub(crate) struct Stove {
    pub(crate) origin: Arc<dyn Store>,
    pub(crate) spool: Option<Arc<Spool>>,
    pub(crate) near: Arc<Near>,
    pub(crate) fences: Fences,
    /// How many threads at most.
    pub(crate) most: usize,
    /// How many bytes in memory at most, what is there already included.
    pub(crate) most_bytes: u64,
    pub(crate) progress: watch::Sender<WarmUp>,
}

impl Stove {
    /// Brings in the newest threads, once. In an outage they come from the disk first, so that whoever waits for the
    /// warm-up does not wait for its end.
    pub(crate) async fn run(self) {
        if self.most > 0
            && let Err(error) = self.heat().await
        {
            tracing::warn!(%error, "the warm-up was given up: threads come into memory when they are read");
        }
        self.progress.send_modify(|progress| progress.is_done = true);
    }

    async fn heat(&self) -> Result<()> {
        let began = Instant::now();
        let mut portion = Portion::new(PAGE);
        let first = match self.fetch_some(&mut portion, self.most, None).await {
            Err(error) if is_to_be_waited_out(&error) => {
                self.take_copies().await?;
                self.progress.send_modify(|progress| progress.is_done = true);
                self.tell("from the local disk", began);
                self.fetch_patiently(&mut portion, self.most, None).await?
            }
            first => first?,
        };
        self.take_stored(portion, first).await?;
        self.tell("from the source of truth", began);
        Ok(())
    }

    fn tell(&self, whence: &str, began: Instant) {
        let threads = self.progress.borrow().threads;
        tracing::info!(threads, took = ?began.elapsed(), "threads came into memory {whence}");
    }

    /// The first of these records, as many as there is room for.
    fn that_fit(&self, records: Vec<Record>) -> Vec<Arc<Record>> {
        let mut bytes = self.near.size().1;
        let fits = |record: &Record| {
            // One that is there takes no more room than it has.
            bytes += if self.near.peek(&record.key).is_some() { 0 } else { weight(record) };
            bytes <= self.most_bytes
        };
        records.into_iter().take_while(fits).map(Arc::new).collect()
    }

    /// Page by page, the newest first; while one is taken in, the next is under way.
    async fn take_stored(&self, mut portion: Portion, mut next: Fetched) -> Result<()> {
        let (mut threads, mut told) = (0, Instant::now());
        loop {
            let Fetched { recent, ticket, began } = next;
            let last = recent.records.last().map(|record| (record.version, record.key.clone()));
            let received = recent.records.len();
            let records = self.that_fit(recent.records);
            threads += records.len();
            let is_last =
                recent.is_last || records.len() < received || threads >= self.most || last.is_none();
            let take_in = self.take_in(records, &ticket, began);
            if is_last {
                take_in.await;
                self.advance(threads, false);
                return Ok(());
            }
            let left = self.most.saturating_sub(threads);
            let ((), fetched) = tokio::join!(take_in, self.fetch_patiently(&mut portion, left, last));
            self.advance(threads, false);
            if told.elapsed() >= REPORT {
                tracing::info!(threads, of = self.most, "threads come into memory");
                told = Instant::now();
            }
            next = fetched?;
        }
    }

    async fn fetch(&self, page: &Page) -> Result<Fetched> {
        let (ticket, began) = (self.fences.begin(), Moment::now());
        let recent = self.origin.recent(page).await?;
        Ok(Fetched { recent, ticket, began })
    }

    /// A page of as many threads as come in time.
    async fn fetch_some(&self, portion: &mut Portion, left: usize, after: After) -> Result<Fetched> {
        let mut page = Page { user: None, most: portion.of(left), after };
        loop {
            match self.fetch(&page).await {
                // Until a page of one does not come either.
                Err(error) if portion.shrink(&*self.origin, page.most, &error).await => {
                    page.most = portion.of(left);
                }
                fetched => {
                    portion.grow_after(&fetched);
                    return fetched;
                }
            }
        }
    }

    /// As [`fetch_some`](Self::fetch_some); waits out an outage.
    async fn fetch_patiently(&self, portion: &mut Portion, left: usize, after: After) -> Result<Fetched> {
        let mut pauses = Backoff::new(FIRST_PAUSE, LAST_PAUSE);
        loop {
            if let Some(breaker) = self.origin.breaker() {
                breaker.closed().await;
            }
            match self.fetch_some(portion, left, after.clone()).await {
                Err(error) if is_to_be_waited_out(&error) => {
                    tokio::time::sleep(pauses.next().max(error.retry_after()).unwrap_or(LAST_PAUSE)).await;
                }
                done => return done,
            }
        }
    }

    /// The file comes before memory, as ever.
    async fn take_in(&self, records: Vec<Arc<Record>>, ticket: &Ticket, began: Moment) {
        if let Some(spool) = &self.spool {
            let near = Arc::clone(&self.near);
            spool.keep(self.near.take_first_reads(), move |settled| near.settled(settled)).await;
            let confirmed_at = self.origin.clock().at(began);
            let copy = |record: &Arc<Record>| {
                let record = Arc::clone(record);
                Copy { record, confirmed_at, is_own: false, rank: Rank::Listed }
            };
            let is_news = |record: &&Arc<Record>| !ticket.is_overtaken(&record.key, record.version);
            let near = Arc::clone(&self.near);
            let settled = move |settled| near.settled(settled);
            spool.keep(records.iter().rev().filter(is_news).map(copy).collect(), settled).await;
        }
        // The oldest first, so that memory, where it runs short, parts with that first.
        let records: Vec<_> = records.into_iter().rev().collect();
        self.near.learn_listed(&records, ticket, began);
    }

    /// The copies that were written last.
    async fn take_copies(&self) -> Result<()> {
        let Some(spool) = &self.spool else { return Ok(()) };
        let (mut threads, mut before, mut has_room) = (0, i64::MAX, true);
        while threads < self.most && has_room {
            let ticket = self.fences.begin();
            let copies = spool.copies(before, PAGE.min(self.most - threads)).await?;
            let Some((last, ..)) = copies.last() else { break };
            before = *last;
            let (now, mut bytes) = (self.origin.clock().now(), self.near.size().1);
            for (_, record, confirmed_at) in copies.into_iter().filter(|(_, record, _)| record.is_live(now)) {
                bytes += weight(&record);
                has_room = bytes <= self.most_bytes;
                if !has_room {
                    break;
                }
                let recalled = self.near.recall(&ticket, record, now.since(confirmed_at), false);
                threads += usize::from(recalled.is_some());
            }
            self.advance(threads, true);
        }
        Ok(())
    }

    fn advance(&self, threads: usize, is_from_disk: bool) {
        self.progress.send_modify(|progress| {
            *progress = WarmUp { threads, is_from_disk, ..*progress };
        });
    }
}

/// An outage, or that there is no room for one more call.
fn is_to_be_waited_out(error: &Error) -> bool {
    error.is_outage() || error.retry_after().is_some()
}

/// The thread after which a page begins.
type After = Option<(Version, Key)>;

/// A page, and since when it may have been overtaken.
struct Fetched {
    recent: Recent,
    ticket: Ticket,
    began: Moment,
}
