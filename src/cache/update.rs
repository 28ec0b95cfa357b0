//! The update: a compare-and-set loop of read, change and conditional write.

use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::Instrument;

use super::put::{Base, Options, PendingWrite};
use super::read::ReadPolicy;
use super::{Cache, Conversation, Shared, within};
use crate::error::{Error, ErrorKind, Result};
use crate::model::json::{Json, PreservedDigits};
use crate::model::key::Key;
use crate::model::outcome::WriteOutcome;
use crate::resilience::backoff::Backoff;

/// The limit on attempts before an update fails with [`ErrorKind::Conflict`] (I12).
const MAX_ATTEMPTS: usize = 64;
const MIN_PAUSE: Duration = Duration::from_millis(5);
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// An update call of [`Cache::update`]. Await it to run it.
///
/// ```
/// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
/// # use std::time::Duration;
/// let update = cache.update("thread-1", |_: Option<Vec<String>>| Ok(Some(vec!["hello".to_owned()])));
/// let outcome = update.ttl(Duration::from_secs(3600)).user("u1").metadata(&["archived"]).await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "nothing is changed before this is awaited"]
pub struct Update<'a, T, F> {
    cache: Cache,
    key: Result<Key>,
    change: F,
    options: Result<Options>,
    _value: PhantomData<&'a fn() -> T>,
}

impl Cache {
    /// Changes a conversation by a function of its present value.
    ///
    /// `change` gets the present value, or `None` if the conversation does not exist. It returns the next value, or `None` to
    /// remove the conversation. The update calls `change` again after each conflict, so `change` must have no other effect. The
    /// update loses no change of another writer. It also recognises its own change after a lost response.
    ///
    /// A number that `change` leaves alone keeps its digits, even if `T` cannot hold them. An integer beyond 64 bits survives a
    /// `Value`. A field that `T` does not know is not in the next value.
    ///
    /// User and metadata stay unless the update sets them. The time to live starts again.
    ///
    /// In an outage, `change` gets the stale fallback (queue, memory or replica), and the cache queues the next value. If
    /// another daemon has changed the conversation since, the store keeps that change. The queued update then becomes a [dead
    /// letter](Self::dead_letters).
    ///
    /// # Errors
    ///
    /// When awaited: the error that `change` returns. [`ErrorKind::Conflict`] if other writers were faster in all attempts.
    /// [`ErrorKind::Decode`] if the stored JSON is not a `T`. All errors of [`put`](Self::put).
    ///
    /// ```
    /// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
    /// cache
    ///     .update("thread-1", |current: Option<Vec<String>>| {
    ///         let mut messages = current.unwrap_or_default();
    ///         messages.push("hello".to_owned());
    ///         Ok(Some(messages))
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn update<'a, T, F>(&self, key: impl AsRef<str>, change: F) -> Update<'a, T, F>
    where
        T: DeserializeOwned + Serialize + 'a,
        F: FnMut(Option<T>) -> Result<Option<T>> + Send + 'a,
    {
        let (cache, key, options) = (self.clone(), Key::new(key), Ok(Options::default()));
        Update { cache, key, change, options, _value: PhantomData }
    }
}

impl<T, F> Update<'_, T, F> {
    /// Sets the time to live of the next value. See [`Update`] for an example.
    pub fn ttl(self, ttl: Duration) -> Self {
        self.with(|options| options.set_ttl(ttl))
    }

    /// Sets the user of the conversation. [`Cache::list`] finds conversations by their user.
    /// See [`Update`] for an example.
    pub fn user(self, id: impl AsRef<str>) -> Self {
        self.with(|options| options.set_user(id.as_ref()))
    }

    /// Sets the metadata of the conversation, as JSON. See [`Update`] for an example.
    pub fn metadata<M: Serialize + ?Sized>(self, metadata: &M) -> Self {
        self.with(|options| options.set_metadata(metadata))
    }

    fn with(mut self, change: impl FnOnce(&mut Options) -> Result<()>) -> Self {
        self.options = self.options.and_then(|mut options| change(&mut options).map(|()| options));
        self
    }
}

impl<'a, T, F> IntoFuture for Update<'a, T, F>
where
    T: DeserializeOwned + Serialize + 'a,
    F: FnMut(Option<T>) -> Result<Option<T>> + Send + 'a,
{
    type Output = Result<WriteOutcome>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { cache, key, mut change, options, .. } = self;
        Box::pin(async move {
            let value = |found: Option<&Conversation>| {
                let current: Option<T> = found.map(Conversation::decode).transpose()?;
                let preserved = found.zip(current.as_ref());
                let preserved =
                    preserved.and_then(|(found, current)| PreservedDigits::of(found.json(), current));
                let next = change(current)?;
                next.map(|next| cache.0.changed_value(&next, preserved.as_ref())).transpose()
            };
            let key = key?;
            let span = tracing::debug_span!("update", thread_id = %key);
            update(&cache, &key, &options?, value).instrument(span).await
        })
    }
}

/// Runs the loop under the key lock. `change` returns the next value, or `None` to remove the conversation.
async fn update(
    cache: &Cache,
    key: &Key,
    options: &Options,
    mut change: impl FnMut(Option<&Conversation>) -> Result<Option<Json>>,
) -> Result<WriteOutcome> {
    let shared = &cache.0;
    shared.check_not_shut_down()?;
    // Each write shares the guard, so the lock outlives a cancelled caller until the outcome is known (C1).
    let key_lock = Arc::new(shared.key_locks.hold_alone(key).await?);
    // An update of a queued write can only be queued. After this wait it may go to the store.
    shared.wait_for_queue(key).await;
    let (mut policy, mut backoff) = (ReadPolicy::Update, Backoff::new(MIN_PAUSE, MAX_PAUSE));
    for _ in 0..MAX_ATTEMPTS {
        let syncs = shared.clock_syncs();
        let (found, version) = shared.read(key, policy).await?;
        policy = ReadPolicy::UpdateAgain;
        let value = change(found.as_ref())?;
        if value.is_none() && found.is_none() {
            // The absence may be the one of a queued remove, which the store does not have yet.
            let is_queued = shared.copies.memory.keys.is_queued(key);
            return Ok(if is_queued { WriteOutcome::Queued } else { shared.stored });
        }
        // A tombstone keeps neither user nor metadata.
        let options = options.or_from(found.as_ref().filter(|_| value.is_some()));
        let base = Some(Base { version, syncs });
        let pending_write = PendingWrite { key: key.clone(), value, options, base, append: None };
        match shared.write(pending_write, Some(Arc::clone(&key_lock))).await {
            // `Superseded` also means that the store did not take the change.
            Ok(WriteOutcome::Superseded) => {}
            // A conflict of unknown outcome ends the update: the store may hold the change, and a retry could apply it twice.
            Err(e) if e.kind() == ErrorKind::Conflict && !e.outcome_unknown() => {}
            done => return done,
        }
        tokio::time::sleep(backoff.next().unwrap_or(MAX_PAUSE)).await;
    }
    let message = format!("other writers changed conversation {key} during each of {MAX_ATTEMPTS} attempts");
    Err(Error::new(ErrorKind::Conflict, message).with_remedy("retry the update").with_key(key.as_str()))
}

impl Shared {
    /// Waits until the queue has no write of a conversation, at most for the soft timeout. In an outage, the wait is pointless.
    pub(super) async fn wait_for_queue(&self, key: &Key) {
        let Some(file) = self.copies.file.as_ref().filter(|_| self.is_breaker_closed()) else { return };
        // Subscribed before the first look, so that no change in between is missed.
        let mut changes = file.queue();
        let is_settled =
            async { while self.copies.memory.keys.is_queued(key) && changes.changed().await.is_ok() {} };
        within(self.limits.soft_timeout, is_settled).await;
    }
}

impl Options {
    /// Returns these options, completed by those of the present record.
    fn or_from(&self, found: Option<&Conversation>) -> Self {
        let metadata = || found.map(|found| Json::trusted(found.metadata()));
        Self {
            ttl: self.ttl,
            user: self.user.clone().or_else(|| found.and_then(Conversation::user).map(Into::into)),
            metadata: self.metadata.clone().or_else(metadata),
        }
    }
}
