//! Puts and removes: the calls of a caller, before they become writes.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::Instrument;

use crate::cache::{Cache, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::model::append::Append;
use crate::model::json::{Json, PreservedDigits};
use crate::model::key::{Key, user};
use crate::model::outcome::WriteOutcome;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};

/// The limit on a time to live. A longer one is a mistake.
const MAX_TTL: Duration = Duration::from_secs(100 * 366 * 86_400);

/// The future of a call. A caller can spawn it.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = Result<T>> + Send>>;

/// The options of a write.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Options {
    pub(super) ttl: Option<Duration>,
    pub(super) user: Option<Arc<str>>,
    pub(super) metadata: Option<Json>,
}

/// A write before it has a version.
#[derive(Debug)]
pub(super) struct PendingWrite {
    pub(super) key: Key,
    pub(super) value: Option<Json>,
    pub(super) options: Options,
    pub(super) base: Option<Base>,
    /// The target, if the value has the items of an append.
    pub(super) append: Option<Append>,
}

/// The value that an update goes on from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Base {
    pub(super) version: Version,
    /// The number of clock syncs before the read. A later one may have given a queued write another version.
    pub(super) syncs: u64,
}

/// A put call of [`Cache::put`]. Await it, or spawn its [`IntoFuture`].
///
/// ```
/// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
/// # use std::time::Duration;
/// let put = cache.put("thread-1", "hello");
/// let outcome = put.ttl(Duration::from_secs(3600)).user("u1").metadata(&["archived"]).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "nothing is written before this is awaited"]
pub struct Put {
    cache: Cache,
    pending_write: Result<PendingWrite>,
}

/// A remove call of [`Cache::remove`]. Await it, or spawn its [`IntoFuture`].
///
/// ```
/// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
/// let outcome = cache.remove("thread-1").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "nothing is removed before this is awaited"]
pub struct Remove {
    cache: Cache,
    pending_write: Result<PendingWrite>,
}

impl Cache {
    /// Stores a conversation under a thread id, and replaces the present one.
    ///
    /// The value is any type that serde can write as JSON. A `&RawValue` is stored as it is.
    /// [`Conversation::json`](super::Conversation::json) describes the effect of `jsonb` on the text. Without options, the
    /// conversation gets the default time to live, no user, and the metadata `{}`.
    ///
    /// The call returns as soon as the store, or in an outage the local disk, keeps the write. If the caller goes, the cache
    /// completes the write.
    ///
    /// # Errors
    ///
    /// When awaited:
    ///
    /// * [`ErrorKind::Invalid`] if the store cannot hold the key, value, user, metadata or time to live.
    ///   JSON has no infinite floats.
    /// * [`ErrorKind::QueueFull`] in an outage if the queue is at its limit.
    /// * [`ErrorKind::Unavailable`] in an outage without a queue.
    /// * [`ErrorKind::Overloaded`] if too many bytes of writes are in flight.
    /// * [`ErrorKind::Unauthorized`], [`ErrorKind::SchemaOutdated`] or [`ErrorKind::Rejected`] if the store
    ///   refuses the write.
    /// * [`ErrorKind::LocalStorage`] if the disk fails.
    /// * [`ErrorKind::Closed`] after a shutdown.
    ///
    /// If [`outcome_unknown`](Error::outcome_unknown) is true, the store may hold the write nevertheless. Memory then holds no
    /// value of the conversation.
    ///
    /// ```
    /// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
    /// use std::time::Duration;
    /// use threadkeep::WriteOutcome;
    ///
    /// let put = cache.put("thread-1", &["hello"]).ttl(Duration::from_secs(3600)).user("u1");
    /// match put.await? {
    ///     WriteOutcome::Queued => println!("an outage: the local disk keeps the write"),
    ///     outcome => println!("{outcome:?}"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn put<T: Serialize + ?Sized>(&self, key: impl AsRef<str>, value: &T) -> Put {
        let pending_write =
            Key::new(key).and_then(|key| Ok(PendingWrite::new(key, Some(self.0.serialize_value(value)?))));
        Put { cache: self.clone(), pending_write }
    }

    /// Removes a conversation. A conversation that does not exist is no error.
    ///
    /// # Errors
    ///
    /// When awaited: the errors of [`put`](Self::put).
    ///
    /// ```
    /// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
    /// let outcome = cache.remove("thread-1").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn remove(&self, key: impl AsRef<str>) -> Remove {
        Remove { cache: self.clone(), pending_write: Key::new(key).map(|key| PendingWrite::new(key, None)) }
    }
}

impl Put {
    /// Sets the time to live, from this call on. The default is the setting `CONVERSATION_TIMEOUT_HOURS`.
    /// See [`Put`] for an example.
    pub fn ttl(self, ttl: Duration) -> Self {
        self.with(|options| options.set_ttl(ttl))
    }

    /// Sets the user of the conversation. [`Cache::list`] finds conversations by their user.
    /// See [`Put`] for an example.
    pub fn user(self, id: impl AsRef<str>) -> Self {
        self.with(|options| options.set_user(id.as_ref()))
    }

    /// Sets the metadata of the conversation, as JSON. See [`Put`] for an example.
    pub fn metadata<T: Serialize + ?Sized>(self, metadata: &T) -> Self {
        self.with(|options| options.set_metadata(metadata))
    }

    /// Changes the options. The first failure is the result of the put.
    fn with(mut self, change: impl FnOnce(&mut Options) -> Result<()>) -> Self {
        self.pending_write =
            self.pending_write.and_then(|mut write| change(&mut write.options).map(|()| write));
        self
    }
}

impl IntoFuture for Put {
    type Output = Result<WriteOutcome>;
    type IntoFuture = BoxFuture<WriteOutcome>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let pending_write = self.pending_write?;
            let span = tracing::debug_span!("put", thread_id = %pending_write.key);
            self.cache.0.write(pending_write, None).instrument(span).await
        })
    }
}

impl IntoFuture for Remove {
    type Output = Result<WriteOutcome>;
    type IntoFuture = BoxFuture<WriteOutcome>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let pending_write = self.pending_write?;
            let span = tracing::debug_span!("remove", thread_id = %pending_write.key);
            self.cache.0.write(pending_write, None).instrument(span).await
        })
    }
}

impl Options {
    pub(super) fn set_ttl(&mut self, ttl: Duration) -> Result<()> {
        if ttl < Duration::from_millis(1) || ttl > MAX_TTL {
            let message = format!("a time to live cannot be {ttl:?}");
            return Err(Error::new(ErrorKind::Invalid, message).with_remedy("use 1 ms to 100 years"));
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

impl PendingWrite {
    fn new(key: Key, value: Option<Json>) -> Self {
        Self { key, value, options: Options::default(), base: None, append: None }
    }

    /// Creates the record. The time to live starts at the call; a tombstone expires at once.
    pub(super) fn record(&self, version: Version, called_at: Timestamp, ttl: Duration) -> Record {
        let ttl = self.options.ttl.unwrap_or(ttl);
        Record {
            key: self.key.clone(),
            version,
            value: self.value.clone(),
            expires_at: if self.value.is_some() { called_at.plus(ttl) } else { called_at },
            user: self.options.user.clone(),
            metadata: self.options.metadata.clone().unwrap_or_default(),
        }
    }
}

impl Shared {
    /// Serializes a value, and checks its size.
    pub(super) fn serialize_value<T: Serialize + ?Sized>(&self, value: &T) -> Result<Json> {
        let json = Json::of(value)?;
        self.check_size("the value", &json)?;
        Ok(json)
    }

    /// Serializes a changed value, and restores the digits of the numbers that the change left alone.
    pub(super) fn changed_value<T: Serialize + DeserializeOwned>(
        &self,
        value: &T,
        preserved: Option<&PreservedDigits<'_>>,
    ) -> Result<Json> {
        let json = Json::of(value)?;
        let restored = preserved.and_then(|preserved| preserved.restore::<T>(json.as_str()));
        let json = restored.and_then(|text| Json::new(text).ok()).unwrap_or(json);
        self.check_size("the value", &json)?;
        Ok(json)
    }

    /// Checks the size of a value or of metadata against the limit.
    pub(super) fn check_size(&self, subject: &str, json: &Json) -> Result<()> {
        let (len, max_bytes) = (json.len(), self.limits.value_bytes);
        if len <= max_bytes {
            return Ok(());
        }
        let message = format!("{subject} has {len} bytes, and the limit is {max_bytes}");
        Err(Error::new(ErrorKind::Invalid, message).with_remedy("raise CONVERSATION_MAX_VALUE_BYTES"))
    }
}
