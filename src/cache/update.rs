//! Compare-and-set, as a loop: look, change, write over exactly what was looked at.

use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::Instrument;

use super::write::{Draft, Options};
use super::{Cache, Found};
use crate::backoff::Backoff;
use crate::error::{Error, ErrorKind, Result};
use crate::json::Untouched;
use crate::record::{Durability, Json, Key};

/// How often an update is tried before it gives up with [`ErrorKind::Conflict`].
const ATTEMPTS: usize = 64;
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// An update that is about to be made: await it.
#[must_use = "nothing is changed before this is awaited"]
pub struct Update<'a, T, F> {
    cache: Cache,
    key: Result<Key>,
    change: F,
    options: Result<Options>,
    _value: PhantomData<&'a fn() -> T>,
}

impl Cache {
    /// Changes a thread by what it is: `change` gets the present value (`None` where there is no thread) and returns the
    /// next (`None` to remove it). It is called again where another writer came between, so it should do nothing else.
    /// No change of anybody is lost, also through lost answers: a change that was made is recognised as one's own.
    ///
    /// A number that `change` leaves alone keeps its digits, also where `T` cannot hold them: an integer beyond 64 bits stays
    /// one through `Value`. What else `T` does not know, such as a field, is not in the next value.
    ///
    /// User and metadata stay as they are unless set; the time to live starts anew.
    ///
    /// In an outage, `change` gets what is at hand (queued, in memory, or the last known copy on disk), and the next value
    /// is queued. Where another daemon has changed the thread since, the source of truth keeps that, and the queued update
    /// goes to the [dead letters](Self::dead_letters).
    ///
    /// ```
    /// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
    /// let turn = "hello".to_owned();
    /// cache
    ///     .update("thread-1", |current: Option<Vec<String>>| {
    ///         let mut turns = current.unwrap_or_default();
    ///         turns.push(turn.clone());
    ///         Ok(Some(turns))
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// When awaited: what `change` returns; as for [`put`](Self::put); [`ErrorKind::Conflict`] where others were faster
    /// again and again; [`ErrorKind::Mismatch`] where the stored JSON is not a `T`.
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
    /// How long the thread lives from now on.
    pub fn ttl(self, ttl: Duration) -> Self {
        self.with(|options| options.set_ttl(ttl))
    }

    /// Whose thread it is from now on.
    pub fn user(self, id: impl AsRef<str>) -> Self {
        self.with(|options| options.set_user(id.as_ref()))
    }

    /// What else is to be kept with it from now on, as JSON.
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
    type Output = Result<Durability>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'a>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { cache, key, mut change, options, .. } = self;
        Box::pin(async move {
            let value = |found: Option<&Found>| {
                let current: Option<T> = found.map(Found::decode).transpose()?;
                let untouched = found.zip(current.as_ref());
                let untouched = untouched.and_then(|(found, current)| Untouched::of(found.json(), current));
                let next = change(current)?;
                next.map(|next| cache.0.changed_value(&next, untouched.as_ref())).transpose()
            };
            let key = key?;
            let span = tracing::debug_span!("update", thread = %key);
            update(&cache, &key, &options?, value).instrument(span).await
        })
    }
}

async fn update(
    cache: &Cache,
    key: &Key,
    options: &Options,
    mut change: impl FnMut(Option<&Found>) -> Result<Option<Json>>,
) -> Result<Durability> {
    let inner = &cache.0;
    inner.check_open()?;
    let turn = Arc::new(inner.turns.wait(key).await);
    inner.let_settle(key).await;
    let mut pauses = Backoff::new(FIRST_PAUSE, LAST_PAUSE);
    for attempt in 0..ATTEMPTS {
        let (found, version) = inner.current(key, attempt == 0).await?;
        let value = change(found.as_ref())?;
        if value.is_none() && found.is_none() {
            return Ok(Durability::Stored);
        }
        let options = options.or_those_of(found.as_ref().filter(|_| value.is_some()));
        let draft = Draft { key: key.clone(), value, options, expect: Some(version) };
        match inner.write(draft, Some(Arc::clone(&turn))).await {
            // Superseded, too, means that the change was not made.
            Ok(Durability::Superseded) => {}
            Err(e) if e.kind() == ErrorKind::Conflict && !e.outcome_unknown() => {}
            done => return done,
        }
        tokio::time::sleep(pauses.next().unwrap_or(LAST_PAUSE)).await;
    }
    let message =
        format!("the thread {key} was changed by others during each of {ATTEMPTS} attempts; try again");
    Err(Error::new(ErrorKind::Conflict, message))
}

impl Options {
    /// What is not set stays as it is.
    fn or_those_of(&self, found: Option<&Found>) -> Self {
        let kept = || found.map(|found| Json::trusted(found.metadata()));
        Self {
            ttl: self.ttl,
            user: self.user.clone().or_else(|| found.and_then(Found::user).map(Into::into)),
            metadata: self.metadata.clone().or_else(kept),
        }
    }
}
