//! The write path: the source of truth first, then memory, then the acknowledgement.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tracing::Instrument;

use super::outage::is_to_be_queued;
use super::turns::Turn;
use super::{Cache, Inner, Spool};
use crate::background;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Ticket;
use crate::json::Untouched;
use crate::metrics::Wrote;
use crate::near::News;
use crate::pending::Passing;
use crate::record::{Durability, Json, Key, Record, Write, user};
use crate::store::Applied;
use crate::version::{Moment, Stamp, TOLERANCE, Timestamp, Version};

/// The unit in which writes under way are counted.
pub(super) const KIB: usize = 1024;
/// How often a write is stamped anew because the clock turned out wrong.
const STAMPS: usize = 4;
/// A time to live beyond this is a mistake.
const LONGEST_TTL: Duration = Duration::from_secs(100 * 366 * 86_400);

/// A future that can be spawned.
pub type Sending<T> = Pin<Box<dyn Future<Output = Result<T>> + Send>>;

/// What beside the value a write may say.
#[derive(Debug, Clone, Default)]
pub(super) struct Options {
    pub(super) ttl: Option<Duration>,
    pub(super) user: Option<Arc<str>>,
    pub(super) metadata: Option<Json>,
}

/// What is to be written, before it has a version.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) key: Key,
    pub(super) value: Option<Json>,
    pub(super) options: Options,
    pub(super) expect: Option<Version>,
}

/// A put that is about to be sent: await it, or spawn its [`IntoFuture`].
#[derive(Debug)]
#[must_use = "nothing is written before this is awaited"]
pub struct Put {
    cache: Cache,
    draft: Result<Draft>,
}

/// A remove that is about to be sent: await it, or spawn its [`IntoFuture`].
#[derive(Debug)]
#[must_use = "nothing is removed before this is awaited"]
pub struct Remove {
    cache: Cache,
    draft: Result<Draft>,
}

impl Cache {
    /// Stores a conversation under a thread id, whatever was there before.
    ///
    /// The value is anything that serde can write as JSON (a `&RawValue` goes as it is). It reads back as its type, if serde_json
    /// reads what that type writes. A float that is not finite is refused, since JSON has none. [`Found::json`](super::Found::json)
    /// says what `jsonb` does to the text. Time to live, user and metadata
    /// can be added before the put is awaited; without them it is the default, nobody, and `{}`.
    ///
    /// # Errors
    /// When awaited: [`ErrorKind::Invalid`] for a key, value, user, metadata or time to live that cannot be stored;
    /// [`ErrorKind::QueueFull`] in an outage where the queue is at its bound, or, without a queue,
    /// [`ErrorKind::Unavailable`]; [`outcome_unknown`](Error::outcome_unknown) tells whether it may be stored all the same;
    /// also `Busy`, `Denied`, `Refused`, `Schema`, `Local`, `Closed`. After an error, memory holds what it held, or, where
    /// the outcome is unknown, nothing of this thread.
    pub fn put<T: Serialize + ?Sized>(&self, key: impl AsRef<str>, value: &T) -> Put {
        let draft = Key::new(key).and_then(|key| Ok((key, self.0.value(value)?)));
        let draft = draft.map(|(key, value)| Draft::new(key, Some(value)));
        Put { cache: self.clone(), draft }
    }

    /// Deletes a thread; there need not be one.
    ///
    /// # Errors
    /// When awaited: as for [`put`](Self::put).
    pub fn remove(&self, key: impl AsRef<str>) -> Remove {
        Remove { cache: self.clone(), draft: Key::new(key).map(|key| Draft::new(key, None)) }
    }
}

impl Put {
    /// How long the thread lives from now on.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.draft = self.draft.and_then(|draft| draft.with(|options| options.set_ttl(ttl)));
        self
    }

    /// Whose thread it is.
    pub fn user(mut self, id: impl AsRef<str>) -> Self {
        self.draft = self.draft.and_then(|draft| draft.with(|options| options.set_user(id.as_ref())));
        self
    }

    /// What else is to be kept with it, as JSON.
    pub fn metadata<T: Serialize + ?Sized>(mut self, metadata: &T) -> Self {
        self.draft = self.draft.and_then(|draft| draft.with(|options| options.set_metadata(metadata)));
        self
    }
}

impl IntoFuture for Put {
    type Output = Result<Durability>;
    type IntoFuture = Sending<Durability>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let draft = self.draft?;
            let span = tracing::debug_span!("put", thread = %draft.key);
            self.cache.0.write(draft, None).instrument(span).await
        })
    }
}

impl IntoFuture for Remove {
    type Output = Result<Durability>;
    type IntoFuture = Sending<Durability>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let draft = self.draft?;
            let span = tracing::debug_span!("remove", thread = %draft.key);
            self.cache.0.write(draft, None).instrument(span).await
        })
    }
}

impl Options {
    pub(super) fn set_ttl(&mut self, ttl: Duration) -> Result<()> {
        if ttl < Duration::from_millis(1) || ttl > LONGEST_TTL {
            let message = format!("a time to live of {ttl:?} is not possible; from 1 ms to 100 years is");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        self.ttl = Some(ttl);
        Ok(())
    }

    pub(super) fn set_user(&mut self, id: &str) -> Result<()> {
        self.user = Some(user(id)?);
        Ok(())
    }

    pub(super) fn set_metadata<T: Serialize + ?Sized>(&mut self, metadata: &T) -> Result<()> {
        self.metadata = Some(Json::of(metadata)?);
        Ok(())
    }
}

impl Draft {
    fn new(key: Key, value: Option<Json>) -> Self {
        Self { key, value, options: Options::default(), expect: None }
    }

    fn with(mut self, change: impl FnOnce(&mut Options) -> Result<()>) -> Result<Self> {
        change(&mut self.options)?;
        Ok(self)
    }

    /// The record of this draft: its life runs from the moment of the put, that of a deletion ends there.
    fn record(&self, version: Version, put_at: Timestamp, ttl: Duration) -> Record {
        let ttl = self.options.ttl.unwrap_or(ttl);
        Record {
            key: self.key.clone(),
            version,
            value: self.value.clone(),
            expires_at: if self.value.is_some() { put_at.plus(ttl) } else { put_at },
            user: self.options.user.clone(),
            metadata: self.options.metadata.clone().unwrap_or_default(),
        }
    }
}

impl Inner {
    /// The JSON of a value, if it is not too large.
    pub(super) fn value<T: Serialize + ?Sized>(&self, value: &T) -> Result<Json> {
        let json = Json::of(value)?;
        self.check_size("the value", &json)?;
        Ok(json)
    }

    /// The same after a change, with the digits of the numbers that it left alone.
    pub(super) fn changed_value<T: Serialize + DeserializeOwned>(
        &self,
        value: &T,
        untouched: Option<&Untouched<'_>>,
    ) -> Result<Json> {
        let json = Json::of(value)?;
        let restored = untouched.and_then(|untouched| untouched.restore::<T>(json.as_str()));
        let json = restored.and_then(|text| Json::new(text).ok()).unwrap_or(json);
        self.check_size("the value", &json)?;
        Ok(json)
    }

    fn check_size(&self, what: &str, json: &Json) -> Result<()> {
        let (len, most) = (json.len(), self.limits.value_bytes);
        if len <= most {
            return Ok(());
        }
        let message = format!("{what} has {len} bytes; at most {most} are possible (CONVERSATION_MAX_BYTES)");
        Err(Error::new(ErrorKind::Invalid, message))
    }

    /// Writes, and counts how it ended. An update keeps its turn until the outcome is known, also when its caller goes.
    pub(super) async fn write(self: &Arc<Self>, draft: Draft, turn: Option<Arc<Turn>>) -> Result<Durability> {
        let result = self.try_write(draft, turn).await;
        self.metrics.wrote(match &result {
            Ok(Durability::Stored) => Wrote::Stored,
            Ok(Durability::Superseded) => Wrote::Superseded,
            Ok(Durability::Queued) => Wrote::Queued,
            Err(_) => Wrote::Failed,
        });
        result
    }

    /// Writes in a task of its own, so that it is completed also when the caller goes.
    async fn try_write(self: &Arc<Self>, draft: Draft, turn: Option<Arc<Turn>>) -> Result<Durability> {
        // Counted before the look, so that a shutdown either sees this write or is seen by it.
        let writing = Writing::begin(&self.writing);
        self.check_open()?;
        if let Some(metadata) = &draft.options.metadata {
            self.check_size("the metadata", metadata)?;
        }
        if self.queueing().is_none() {
            self.check_reachable()?;
        }
        let room = self.room(&draft).await?;
        let (inner, key) = (Arc::clone(self), draft.key.clone());
        let (answer, answered) = oneshot::channel();
        let answer = Answer { answer, _turn: turn };
        let work = async move {
            inner.carry_out(draft, answer).await;
            drop((room, writing));
        };
        let work = background::spawn(work.in_current_span());
        match answered.await {
            Ok(result) => result,
            Err(_) => {
                let cause = work.await.err();
                self.near.doubt(&key, self.origin.clock().stamp().version);
                let message = "the write was given up: the runtime ends, or a bug";
                let error = Error::new(ErrorKind::Unavailable, message).with_outcome_unknown();
                Err(cause.map_or(error.clone(), |cause| error.with_source(cause)))
            }
        }
    }

    /// Room for one more write; abandoned writes take room until they are done.
    async fn room(&self, draft: &Draft) -> Result<OwnedSemaphorePermit> {
        let value = draft.value.as_ref().map_or(0, Json::len);
        let metadata = draft.options.metadata.as_ref().map_or(0, Json::len);
        let most = self.limits.in_flight_bytes / KIB;
        let kib = u32::try_from((1 + (value + metadata) / KIB).min(most)).unwrap_or(u32::MAX);
        tokio::select! {
            room = Arc::clone(&self.room).acquire_many_owned(kib) => room.map_err(|_| super::closed()),
            () = tokio::time::sleep(self.limits.patience) => {
                let message = format!("{most} KiB of writes are under way; try again later");
                Err(Error::new(ErrorKind::Busy, message).with_retry_after(self.limits.patience))
            }
        }
    }

    /// Writes into the source of truth or, where that cannot be done soon enough, into the queue.
    async fn carry_out(&self, draft: Draft, answer: Answer) {
        let Some(spool) = self.queueing() else {
            return answer.give(self.write_through(draft, &Attempt::default()).await);
        };
        // An update of what waits in the queue goes on from there, so it can only wait there, too.
        let goes_on = draft.expect.is_some() && draft.expect == self.pending.current(&draft.key);
        if self.is_reachable() && !goes_on {
            return self.write_with_patience(spool, draft, answer).await;
        }
        let (clock, ticket) = (self.origin.clock(), Arc::new(self.fences.begin()));
        let stamp = clock.stamp();
        let record = draft.record(stamp.version, stamp.shown, self.limits.ttl).into();
        answer.give(self.enqueue(spool, &record, stamp, draft.expect, ticket, false).await);
    }

    /// Tries the source of truth for as long as a caller waits; then queues the write, while the attempt goes on behind.
    async fn write_with_patience(&self, spool: &Spool, draft: Draft, answer: Answer) {
        // Taken before it is stamped, and held until it is marked as queued.
        let ticket = Arc::new(self.fences.begin());
        let attempt = Attempt::default();
        let mut writing = std::pin::pin!(self.write_through(draft, &attempt));
        tokio::select! {
            biased;
            result = &mut writing => return answer.give(match result {
                Err(e) if is_to_be_queued(&e) => self.queue_after(spool, &attempt, ticket, &e).await,
                result => result,
            }),
            () = tokio::time::sleep(self.limits.patience) => {}
        }
        let Some((record, over, stamp)) = self.latest(&attempt) else { return answer.give(writing.await) };
        let refused = match self.enqueue(spool, &record, stamp, over, ticket, true).await {
            Ok(durability) => {
                attempt.is_queued.store(true, Relaxed);
                answer.give(Ok(durability));
                // What it ends with, memory and the queue know.
                return drop(writing.await);
            }
            Err(refused) => refused,
        };
        answer.give(match writing.await {
            Err(e) if is_to_be_queued(&e) => Err(not_queued(refused, &e)),
            result => result,
        });
    }

    /// The record of an attempt as it is to be queued: stamped anew if the clock was put right meanwhile, or has jumped.
    fn latest(&self, attempt: &Attempt) -> Option<(Arc<Record>, Option<Version>, Stamp)> {
        let (record, over, stamp, began) = attempt.latest()?;
        let clock = self.origin.clock();
        if stamp.is_joined_to(clock.moment()) && !clock.misjudged(&stamp) {
            return Some((record, over, stamp));
        }
        let anew = clock.stamp();
        let later = anew.shown_at(began).0 - stamp.shown_at(began).0;
        Some((record.stamped_anew(anew.version, later).into(), over, anew))
    }

    /// Queues a write that the source of truth could not take.
    async fn queue_after(
        &self,
        spool: &Spool,
        attempt: &Attempt,
        ticket: Arc<Ticket>,
        failure: &Error,
    ) -> Result<Durability> {
        let Some((record, over, stamp)) = self.latest(attempt) else { return Err(failure.clone()) };
        let queued = self.enqueue(spool, &record, stamp, over, ticket, failure.outcome_unknown()).await;
        queued.map_err(|refused| not_queued(refused, failure))
    }

    /// Writes into the source of truth, and into memory what that says.
    async fn write_through(&self, mut draft: Draft, attempt: &Attempt) -> Result<Durability> {
        let clock = self.origin.clock();
        let began = clock.moment();
        let mut is_stored = false;
        for left in (0..STAMPS).rev() {
            // What waits in the queue must not be sent under another version.
            if attempt.is_queued.load(Relaxed) {
                return Ok(Durability::Queued);
            }
            let ticket = self.fences.begin();
            let stamp = clock.stamp();
            let record = Arc::new(draft.record(stamp.version, stamp.shown_at(began), self.limits.ttl));
            attempt.note(&record, draft.expect, stamp, began);
            attempt.passes(self.pending.passing_by(&draft.key, stamp.version));
            let spool = self.queueing();
            if let Some(spool) = spool {
                spool.attempting(&draft.key, stamp.version, draft.expect.is_none()).await;
            }
            let applied = self.apply(&record, draft.expect).await;
            if let Some(spool) = spool
                && applied.as_ref().is_err_and(|e| !e.outcome_unknown())
            {
                spool.attempt_failed(&draft.key, stamp.version).await;
            }
            let applied = applied.map_err(|e| if is_stored { e.with_outcome_unknown() } else { e })?;
            // The answer may have shown that the clock was wrong. What it stamped must neither win nor lose by that,
            // nor expire at the wrong time: it is stamped anew.
            let is_misjudged = clock.misjudged(&stamp);
            if attempt.is_queued.load(Relaxed) {
                return self.settle_queued(&record, began, applied, is_misjudged).await;
            }
            match applied {
                Applied::Stored if is_misjudged && left > 0 => {
                    is_stored = true;
                    self.near.doubt(&draft.key, stamp.version);
                    // Whoever has gone on from it meanwhile must not be overwritten.
                    draft.expect = Some(stamp.version);
                }
                Applied::Superseded(version) | Applied::Conflict(version) if is_stored => {
                    // The change was made, and somebody has gone on from it.
                    self.overtaken(&draft.key, version).await;
                    return Ok(Durability::Stored);
                }
                Applied::Superseded(_) | Applied::TooOld if is_misjudged => {}
                Applied::Ahead => {
                    // A little ahead, as where the clock has moved past a version that was: real time catches up. More
                    // than that comes from a clock that this answer has put right.
                    let excess = stamp.version.at().since(clock.now_for_versions().plus(TOLERANCE));
                    if excess <= TOLERANCE {
                        tokio::time::sleep(excess + Duration::from_millis(50)).await;
                    }
                }
                applied => return self.settle(&record, draft.expect, &ticket, began, applied).await,
            }
        }
        let message =
            format!("the store's clock and this one's differ too much to write the thread {}", draft.key);
        let error = Error::new(ErrorKind::Unavailable, message).with_retry_after(TOLERANCE);
        Err(if is_stored { error.with_outcome_unknown() } else { error })
    }

    async fn apply(&self, record: &Arc<Record>, expect: Option<Version>) -> Result<Applied> {
        let write = Write { record: Arc::clone(record), expect, again: false };
        let applied = self.origin.apply(&[write]).await;
        self.trouble.wrote(applied.as_deref());
        let applied = match applied {
            Ok(applied) => applied.first().copied(),
            Err(e) => {
                if e.outcome_unknown() {
                    self.near.doubt(&record.key, record.version);
                }
                // Without a queue, each caller hears of his own record.
                let may_be_common = e.may_be_of_one() && self.queueing().is_some();
                let common = may_be_common.then(|| self.trouble.is_common(&record.key, &e));
                return Err(common.flatten().unwrap_or(e));
            }
        };
        let message = || format!("the store gave no answer for the thread {}", record.key);
        applied.ok_or_else(|| Error::new(ErrorKind::Schema, message()).with_outcome_unknown())
    }

    /// What the store's verdict means for memory and for the caller.
    async fn settle(
        &self,
        record: &Arc<Record>,
        expect: Option<Version>,
        ticket: &Ticket,
        began: Moment,
        applied: Applied,
    ) -> Result<Durability> {
        let key = &record.key;
        if let Some(version) = newer(applied) {
            self.overtaken(key, version).await;
        }
        let error = |kind, what: &str| Err(Error::new(kind, format!("the thread {key} {what}")));
        match applied {
            Applied::Stored => {
                // The file comes before memory: what has been read once must not be older there.
                self.keep_own(record, expect).await?;
                self.near.learn(key, ticket, began, News::from(Arc::clone(record)));
                Ok(Durability::Stored)
            }
            Applied::Superseded(_) => Ok(Durability::Superseded),
            Applied::Conflict(_) => Err(changed_meanwhile(key)),
            Applied::Forgotten(_) => {
                error(ErrorKind::Unavailable, "has changed too often since an answer was lost")
                    .map_err(Error::with_outcome_unknown)
            }
            Applied::TooOld | Applied::Ahead => {
                error(ErrorKind::Refused, "cannot take a version given by this clock")
            }
        }
    }

    /// What the verdict means for a write that has been queued meanwhile: replay has the last word, but for what is
    /// stored as it is.
    async fn settle_queued(
        &self,
        record: &Arc<Record>,
        began: Moment,
        applied: Applied,
        is_misjudged: bool,
    ) -> Result<Durability> {
        if let Some(version) = newer(applied) {
            self.overtaken(&record.key, version).await;
        }
        if applied == Applied::Stored
            && !is_misjudged
            && let Some(spool) = &self.spool
        {
            self.stored_late(spool, record, began).await;
        }
        Ok(Durability::Queued)
    }
}

/// The version that a write lost against.
fn newer(applied: Applied) -> Option<Version> {
    match applied {
        Applied::Superseded(version) | Applied::Conflict(version) | Applied::Forgotten(version) => {
            Some(version)
        }
        Applied::Stored | Applied::Ahead | Applied::TooOld => None,
    }
}

/// Why a write could not be queued either that the source of truth could not take: that failure says whether it may be there.
fn not_queued(refused: Error, failure: &Error) -> Error {
    if !failure.outcome_unknown() {
        return refused;
    }
    let text = format!("{refused}; it was sent, though, and may be stored all the same");
    refused.saying(text).with_outcome_unknown()
}

pub(super) fn changed_meanwhile(key: &Key) -> Error {
    Error::new(ErrorKind::Conflict, format!("the thread {key} was changed by another writer meanwhile"))
}

/// What was sent last, the version that it goes on from, its stamp, and when its life began.
type Latest = (Arc<Record>, Option<Version>, Stamp, Moment);

/// An attempt to write into the source of truth, as far as it has come.
#[derive(Debug, Default)]
struct Attempt {
    latest: Mutex<Option<Latest>>,
    passing: Mutex<Vec<Passing>>,
    /// Whether its caller waits no more, because the write is in the queue.
    is_queued: AtomicBool,
}

impl Attempt {
    fn note(&self, record: &Arc<Record>, over: Option<Version>, stamp: Stamp, began: Moment) {
        *self.lock() = Some((Arc::clone(record), over, stamp, began));
    }

    /// Keeps the note that this is under way for as long as this attempt is looked at.
    fn passes(&self, passing: Passing) {
        self.passing.lock().unwrap_or_else(PoisonError::into_inner).push(passing);
    }

    /// The record as it was stamped last, and the version that it goes on from.
    fn latest(&self) -> Option<Latest> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Latest>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the outcome of a write goes; with it ends the turn of an update.
struct Answer {
    answer: oneshot::Sender<Result<Durability>>,
    _turn: Option<Arc<Turn>>,
}

impl Answer {
    fn give(self, result: Result<Durability>) {
        self.answer.send(result).ok();
    }
}

/// Counts a write that is under way.
struct Writing(watch::Sender<usize>);

impl Writing {
    fn begin(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}
