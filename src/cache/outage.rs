//! What the cache does with the file beside the source of truth: writes into the queue, reads from queue and replica.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Cache, Found, Inner, OnOutage, Spool};
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Ticket;
use crate::near::Entry;
use crate::record::{Durability, Key, Record};
use crate::spool::{Copy, DeadLetter, Enqueued, Entry as ToQueue, Rank};
use crate::version::{Moment, Stamp, Version};

/// How often a call looks again because the thread changed while it looked. Each look needs a change of its own.
pub(super) const LOOKS: usize = 64;
/// After this long it does not look again.
pub(super) const LOOKING: Duration = Duration::from_secs(15);
/// How long memory may take to show what was changed on disk.
const AGREEMENT: Duration = Duration::from_secs(5);
/// How often a write gets another version because an older one in the queue has a newer one.
const CROSSINGS: usize = 16;
/// When to try again what others were faster with.
const SOON: Duration = Duration::from_secs(1);
/// Dead letters that one call reads.
const PAGE: usize = 1_000;

/// What the queue says of a thread.
pub(super) enum FromQueue {
    /// Nothing.
    Nothing,
    /// There is a write, deletions included, that has not expired by itself.
    Newest(Option<Arc<Entry>>, Version),
    /// There is one, and its time to live is over: others may have renewed the thread since.
    Expired(Version),
}

/// What the disk knows of a thread.
pub(super) enum Known {
    /// This, once.
    Copy(Found),
    /// Nothing that could be handed out.
    Nothing,
    /// The thread changed while it was looked for.
    Changed,
}

impl Inner {
    /// The spool, where a write may go into its queue.
    pub(super) fn queueing(&self) -> Option<&Arc<Spool>> {
        self.spool.as_ref().filter(|_| self.limits.on_outage == OnOutage::Queue)
    }

    /// Puts a write into the queue; it is the thread's newest from then on.
    pub(super) async fn enqueue(
        &self,
        spool: &Spool,
        record: &Arc<Record>,
        mut stamp: Stamp,
        over: Option<Version>,
        ticket: Arc<Ticket>,
        is_sent: bool,
    ) -> Result<Durability> {
        let (mut record, clock) = (Arc::clone(record), self.origin.clock());
        for _ in 0..CROSSINGS {
            // A newer write of this handle, or of another, was seen stored while this one was under way.
            if stamp.blindness.is_none() && ticket.seen(&record.key).is_some_and(|seen| seen > record.version)
            {
                return overtaken_on_its_way(&record.key, over);
            }
            let Stamp { shown: stamped_at, blindness, .. } = stamp;
            let entry = ToQueue { record: Arc::clone(&record), over, is_sent, stamped_at, blindness };
            let (near, marked, ticket) = (Arc::clone(&self.near), Arc::clone(&record), Arc::clone(&ticket));
            let announce = move |enqueued| match enqueued {
                Enqueued::Kept { blindness, queued_at } => {
                    near.enqueued(&marked, &ticket, blindness, queued_at);
                }
                // Memory may not know yet, or may have forgotten.
                Enqueued::Behind(version) => near.overtaken(&marked.key, version),
                Enqueued::Stored => near.overtaken(&marked.key, marked.version),
                _ => {}
            };
            let enqueued = spool.enqueue(entry, announce).await;
            *self.refusal() = enqueued.as_ref().err().cloned();
            return match enqueued? {
                Enqueued::Kept { .. } => Ok(Durability::Queued),
                Enqueued::Stored => Ok(Durability::Stored),
                // Where the two were made at once, that update may yet lose against another daemon: this one must not be
                // lost with it.
                Enqueued::Crossed(other) => {
                    let anew = clock.stamp_after(other);
                    record = record.stamped_anew(anew.version, anew.shown.0 - stamp.shown.0).into();
                    stamp = anew;
                    continue;
                }
                // Not superseded: that would make an update be tried again that may have been stored.
                Enqueued::Conflict => Err(super::write::changed_meanwhile(&record.key)),
                Enqueued::Behind(_) | Enqueued::Overtaken => overtaken_on_its_way(&record.key, over),
            };
        }
        Err(changes_too_fast(&record.key))
    }

    /// What the queue says of a thread: from memory, or else from disk.
    pub(super) async fn ask_queue(&self, key: &Key) -> Result<FromQueue> {
        let Some(spool) = &self.spool else { return Ok(FromQueue::Nothing) };
        let deadline = Instant::now() + AGREEMENT;
        for _ in 0..LOOKS {
            let Some(version) = self.pending.current(key) else { return Ok(FromQueue::Nothing) };
            if let Some(entry) = self.near.queued(key) {
                return Ok(self.judge(entry, version));
            }
            let queued = spool.queued(key).await?;
            if queued.as_ref().is_some_and(|queued| !queued.is_waiting && queued.record.version == version) {
                // It was stored just now.
                queued.iter().for_each(|queued| self.near.stored(&queued.record, Moment::now(), false));
                continue;
            }
            if let Some(queued) = queued.filter(|queued| queued.record.version == version) {
                if queued.record.value.is_none() {
                    return Ok(FromQueue::Newest(None, version));
                }
                let entry = self.near.recall_queued(&queued.record, queued.blindness);
                return Ok(self.judge(entry, version));
            }
            // It is being replaced or settled: the mark in memory follows.
            tokio::select! {
                () = self.pending.wait_until(|pending| pending.current(key) != Some(version)) => {}
                () = tokio::time::sleep_until(deadline.into()) => break,
            }
        }
        let message = format!("what the file and memory say of the queued write of the thread {key} differs");
        tracing::error!("a queued write cannot be read: {message}");
        Err(Error::new(ErrorKind::Busy, message).with_retry_after(SOON))
    }

    fn judge(&self, entry: Arc<Entry>, version: Version) -> FromQueue {
        match entry.record.is_live(self.origin.clock().now()) {
            true => FromQueue::Newest(Some(entry), version),
            false => FromQueue::Expired(version),
        }
    }

    /// The last known copy on disk, if it has not expired.
    pub(super) async fn last_known(&self, key: &Key) -> Known {
        let Some(spool) = &self.spool else { return Known::Nothing };
        let ticket = self.fences.begin();
        let known = spool.last_known(key).await;
        let known = known.inspect_err(|error| tracing::warn!(%error, "the last known copies cannot be read"));
        let Ok(Some((record, confirmed_at))) = known else { return Known::Nothing };
        let now = self.origin.clock().now();
        if !record.is_live(now) {
            return Known::Nothing;
        }
        match self.near.recall(&ticket, record, now.since(confirmed_at), true) {
            Some(entry) if entry.record.is_live(now) => Known::Copy(self.as_it_is(entry)),
            Some(_) => Known::Nothing,
            None => Known::Changed,
        }
    }

    /// What is in memory, for want of anything better.
    pub(super) fn as_it_is(&self, entry: Arc<Entry>) -> Found {
        let is_fresh = self.near.is_fresh(&entry, Moment::now());
        if is_fresh { Found::fresh(entry) } else { Found::stale(entry) }
    }

    /// Keeps copies of what a call that began at `began` with `ticket` saw the source of truth hold, before anybody hears of it.
    /// What was overtaken on its way is not kept: the row of what overtook it may have made room for others already.
    pub(super) async fn keep(
        &self,
        records: impl IntoIterator<Item = Arc<Record>>,
        ticket: &Ticket,
        began: Moment,
        rank: Rank,
    ) {
        let is_news = |record: &Arc<Record>| !ticket.is_overtaken(&record.key, record.version);
        self.keep_all(records.into_iter().filter(is_news), began, rank).await;
    }

    /// Has the file keep what came by a listing and was read since as what is used.
    pub(super) async fn keep_read(&self) {
        let read = self.near.take_first_reads();
        if let Some(spool) = &self.spool {
            let near = Arc::clone(&self.near);
            spool.keep(read, move |settled| near.settled(settled)).await;
        }
    }

    async fn keep_all(&self, records: impl Iterator<Item = Arc<Record>>, began: Moment, rank: Rank) {
        let Some(spool) = &self.spool else { return };
        let confirmed_at = self.origin.clock().at(began);
        let copies = records.map(|record| Copy { record, confirmed_at, is_own: false, rank });
        let near = Arc::clone(&self.near);
        spool.keep(copies.collect(), move |settled| near.settled(settled)).await;
    }

    /// The source of truth was seen to hold this version, which is not at hand: what is older is read no more, neither from
    /// memory nor from the disk.
    pub(super) async fn overtaken(&self, key: &Key, version: Version) {
        let deletion = Arc::new(Record::deletion(key.clone(), version));
        self.keep_all(std::iter::once(deletion), Moment::now(), Rank::Used).await;
        self.near.overtaken(key, version);
    }

    /// Keeps a write of this handle that the source of truth has taken. One that does not go on from what was there takes
    /// the place of an older one in the queue.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`]: it came too late for the file, so that who starts next in an outage would not find it.
    pub(super) async fn keep_own(&self, record: &Arc<Record>, over: Option<Version>) -> Result<()> {
        let Some(spool) = &self.spool else { return Ok(()) };
        let confirmed_at = self.origin.clock().now();
        let copy =
            Copy { record: Arc::clone(record), confirmed_at, is_own: over.is_none(), rank: Rank::Used };
        let too_late = |_| {
            let message = format!("the cache was shut down while it wrote the thread {}", record.key);
            Error::new(ErrorKind::Closed, message).with_outcome_unknown()
        };
        let near = Arc::clone(&self.near);
        spool.keep_own(copy, move |settled| near.settled(settled)).await.map_err(too_late)
    }

    /// An attempt that took longer than its caller waited has put a queued write into the source of truth after all.
    pub(super) async fn stored_late(&self, spool: &Spool, record: &Arc<Record>, began: Moment) {
        let settled = vec![(record.key.clone(), record.version, crate::spool::Fate::Stored)];
        match spool.settle(settled).await {
            Ok(_) => self.near.stored(record, began, true),
            Err(error) => tracing::debug!(%error, "a write that was stored late stays in the queue for now"),
        }
    }

    /// Waits a little until the queue has let go of a thread, so that an update can go on from what is stored.
    pub(super) async fn let_settle(&self, key: &Key) {
        if self.pending.contains(key) && self.is_reachable() {
            tokio::select! {
                () = self.pending.wait_until(|pending| !pending.contains(key)) => {}
                () = tokio::time::sleep(self.limits.patience) => {}
            }
        }
    }

    /// Waits until the queue is empty or the source of truth is away; asks it, where nobody knows.
    pub(super) async fn drain(&self) {
        let away = async {
            match self.origin.breaker() {
                Some(breaker) => breaker.opened().await,
                None => std::future::pending().await,
            }
        };
        let is_back = match self.origin.breaker() {
            Some(breaker) if self.pending.len() > 0 => breaker.ask().await,
            _ => self.is_reachable(),
        };
        if is_back {
            tokio::select! {
                () = self.pending.wait_until(|pending| pending.len() == 0) => {}
                () = away => {}
            }
        }
    }

    /// Ends the replay, and lets others open the file.
    pub(super) async fn close_spool(&self) {
        self.replay.iter().for_each(tokio::task::AbortHandle::abort);
        self.warming.abort();
        if let Some(spool) = &self.spool
            && let Err(error) = spool.close().await
        {
            tracing::warn!(%error, "the queue's file could not be closed");
        }
    }
}

/// A look at the dead letters that is about to be taken: await it.
#[derive(Debug)]
#[must_use = "nothing is read before this is awaited"]
pub struct DeadLetters {
    cache: Cache,
    after: i64,
}

impl Cache {
    /// Acknowledged writes that the source of truth turned out not to take, oldest first: superseded by another daemon,
    /// refused, or too old. They are kept until [forgotten](Self::forget_dead_letters).
    ///
    /// # Errors
    /// When awaited: [`ErrorKind::Local`] where the file cannot be read; [`ErrorKind::Closed`].
    pub fn dead_letters(&self) -> DeadLetters {
        DeadLetters { cache: self.clone(), after: 0 }
    }

    /// Forgets the dead letters up to this one; says how many there were.
    ///
    /// # Errors
    /// [`ErrorKind::Local`] where the file cannot be written; [`ErrorKind::Closed`].
    pub async fn forget_dead_letters(&self, last: &DeadLetter) -> Result<usize> {
        self.0.check_open()?;
        match &self.0.spool {
            Some(spool) => {
                let forgotten = spool.forget_dead_letters(last.id).await?;
                // They took room in the queue.
                *self.0.refusal() = None;
                Ok(forgotten)
            }
            None => Ok(0),
        }
    }
}

impl DeadLetters {
    /// Those that come after this one; a call reads a thousand.
    pub fn after(mut self, last: &DeadLetter) -> Self {
        self.after = last.id;
        self
    }
}

impl IntoFuture for DeadLetters {
    type Output = Result<Vec<DeadLetter>>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            self.cache.0.check_open()?;
            match &self.cache.0.spool {
                Some(spool) => spool.dead_letters(self.after, PAGE).await,
                None => Ok(Vec::new()),
            }
        })
    }
}

/// Why a call gave up that looked again and again.
pub(super) fn changes_too_fast(key: &Key) -> Error {
    let message = format!("the thread {key} changed again and again while it was looked at; try again later");
    Error::new(ErrorKind::Busy, message).with_retry_after(SOON)
}

/// What becomes of a write when something newer is stored before it could be queued.
fn overtaken_on_its_way(key: &Key, over: Option<Version>) -> Result<Durability> {
    match over {
        Some(_) => Err(super::write::changed_meanwhile(key)),
        None => Ok(Durability::Superseded),
    }
}

/// Whether a write that failed so may go into the queue: the failure says nothing about the record. The source of truth
/// could not be asked, refuses the key, or lacks the migrations.
pub(super) fn is_to_be_queued(error: &Error) -> bool {
    error.is_outage() || matches!(error.kind(), ErrorKind::Denied | ErrorKind::Schema)
}
