//! The write path: the source of truth first, then memory, then the acknowledgement.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::{Cache, Inner};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Wrote;
use crate::near::News;
use crate::record::{Durability, Json, Key, Record, Write, user};
use crate::store::Applied;
use crate::version::Version;

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
    /// The value is anything that serde can write as JSON (a `&RawValue` goes as it is). Time to live, user and metadata
    /// can be added before the put is awaited; without them it is the default, nobody, and `{}`.
    ///
    /// # Errors
    /// When awaited: [`ErrorKind::Invalid`] for a key, value, user, metadata or time to live that cannot be stored;
    /// [`ErrorKind::Unavailable`] in an outage, and then [`outcome_unknown`](Error::outcome_unknown) tells whether it may
    /// be stored all the same; also `Busy`, `Denied`, `Refused`, `Schema`, `Local`, `Closed`. After an error, memory
    /// holds what it held, or, where the outcome is unknown, nothing of this thread.
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
        Box::pin(async move { self.cache.0.write(self.draft?).await })
    }
}

impl IntoFuture for Remove {
    type Output = Result<Durability>;
    type IntoFuture = Sending<Durability>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.cache.0.write(self.draft?).await })
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
}

impl Inner {
    /// The JSON of a value, if it is not too large.
    pub(super) fn value<T: Serialize + ?Sized>(&self, value: &T) -> Result<Json> {
        let json = Json::of(value)?;
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

    /// Writes, in a task of its own so that it is completed also when the caller goes.
    pub(super) async fn write(self: &Arc<Self>, draft: Draft) -> Result<Durability> {
        let result = self.try_write(draft).await;
        self.metrics.wrote(match &result {
            Ok(Durability::Stored) => Wrote::Stored,
            Ok(Durability::Superseded) => Wrote::Superseded,
            Err(_) => Wrote::Failed,
        });
        result
    }

    async fn try_write(self: &Arc<Self>, draft: Draft) -> Result<Durability> {
        self.check_open()?;
        if let Some(metadata) = &draft.options.metadata {
            self.check_size("the metadata", metadata)?;
        }
        self.check_reachable()?;
        let room = self.room(&draft).await?;
        let (inner, writing) = (Arc::clone(self), Writing::begin(&self.writing));
        let work = tokio::spawn(async move {
            let result = inner.carry_out(draft).await;
            drop((room, writing));
            result
        });
        work.await.unwrap_or_else(|e| {
            let message = "the write was given up: the runtime ends, or a bug";
            Err(Error::new(ErrorKind::Unavailable, message).with_outcome_unknown().with_source(e))
        })
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

    async fn carry_out(&self, draft: Draft) -> Result<Durability> {
        let (key, began) = (&draft.key, Instant::now());
        let clock = self.origin.clock();
        for _ in 0..STAMPS {
            let ticket = self.fences.begin();
            let stamp = clock.stamp();
            // Life runs from the moment of the put, by the clock as it is known now.
            let ttl = draft.options.ttl.unwrap_or(self.limits.ttl);
            let record = Arc::new(Record {
                key: key.clone(),
                version: stamp.version,
                value: draft.value.clone(),
                expires_at: clock.at(began).plus(ttl),
                user: draft.options.user.clone(),
                metadata: draft.options.metadata.clone().unwrap_or_default(),
            });
            let write = Write { record: Arc::clone(&record), expect: draft.expect, again: false };
            let applied = match self.origin.apply(&[write]).await {
                Ok(applied) => applied.first().copied(),
                Err(e) => {
                    if e.outcome_unknown() {
                        self.near.doubt(key, stamp.version);
                    }
                    return Err(e);
                }
            };
            match applied {
                Some(Applied::Stored) => {
                    self.near.learn(key, &ticket, began, News::from(record));
                    return Ok(Durability::Stored);
                }
                // The answer has put the clock right: what a wrong clock stamped neither wins nor loses.
                Some(Applied::Superseded(_) | Applied::TooOld | Applied::Ahead)
                    if clock.misjudged(&stamp) => {}
                // The clock has moved past a version that another daemon gave: wait for real time to catch up.
                Some(Applied::Ahead) => tokio::time::sleep(Duration::from_millis(50)).await,
                Some(Applied::Superseded(version)) => {
                    self.near.doubt(key, version);
                    return Ok(Durability::Superseded);
                }
                Some(Applied::Conflict(version)) => {
                    self.near.doubt(key, version);
                    return Err(Error::new(
                        ErrorKind::Conflict,
                        format!("the thread {key} was changed meanwhile"),
                    ));
                }
                Some(Applied::Forgotten(version)) => {
                    self.near.doubt(key, version);
                    let message =
                        format!("an answer was lost, and the thread {key} has changed too often since");
                    return Err(Error::new(ErrorKind::Unavailable, message).with_outcome_unknown());
                }
                Some(Applied::TooOld) | None => break,
            }
        }
        let message =
            format!("the store does not accept the version given to the thread {key}; check its clock");
        Err(Error::new(ErrorKind::Refused, message))
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
