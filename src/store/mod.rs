//! The store contract: the trait [`Store`], its values, and the stores and wrappers of this crate.
//!
//! An own store implements [`Store`] and passes [`conformance`](crate::testing::conformance). A store that can have outages
//! goes into a [`ResilientStore`].

mod batching;
mod decide;
pub(crate) mod local;
mod memory;
mod requests;
mod resilient;
pub(crate) mod supabase;

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;

use crate::error::{Error, Result};

pub use crate::model::append::{Append, ArrayPath};
pub use crate::model::clock::Clock;
pub use crate::model::json::Json;
pub use crate::model::key::Key;
pub use crate::model::outcome::Applied;
pub use crate::model::record::Record;
pub use crate::model::version::{MAX_CLOCK_SKEW, MAX_WRITE_AGE, TOMBSTONE_TTL, Timestamp, Version};
pub use crate::model::writer::WriterId;
pub use crate::resilience::breaker::{Breaker, BreakerState};
pub use batching::BatchingStore;
pub use decide::{Condition, Decision, RowState, WriteHead, WriteKind, decide};
pub use local::Local;
pub use memory::Memory;
pub use requests::{Changes, Continuity, Cursor, ListPage, ListRequest, LoadRequest, Loaded, Write};
pub use resilient::ResilientStore;
pub use supabase::Supabase;

/// Keeps the records of conversations: a database, a file, memory, or a wrapper of a store.
///
/// The suite [`testing::conformance`](crate::testing::conformance) checks this contract:
///
/// * **`apply` is idempotent.** A repeated write of a daemon is `Stored` again and changes nothing, also after later writes.
/// * **`apply` keeps the newest record.** A record replaces only older records, so the order of calls does not matter.
/// * **A condition holds exactly**, or over an unbroken run of the same daemon's own writes. [`decide`] has the rules.
/// * **`load` sees each applied record at once.**
/// * **The store's clock decides** about expiry. The store rejects versions over 2 s ahead of its clock or 7 days behind it.
/// * **A tombstone stays for 8 days.** It outlives each late write that the store still accepts.
/// * **An error without [`outcome_unknown`](crate::Error::outcome_unknown) means that nothing changed.**
///
/// ```
/// use threadkeep::store::{Applied, Key, ListRequest, LoadRequest, Loaded, Memory, Record, Store, Write};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> threadkeep::Result<()> {
/// let store = Memory::new();
/// store.probe().await?;
/// let key = Key::new("thread-1")?;
/// let deleted = Record::tombstone(key.clone(), store.clock().issue_version());
/// let version = deleted.version;
/// assert_eq!(store.apply(&[Write::new(deleted)]).await?, [Applied::Stored]);
/// assert_eq!(store.load(&[LoadRequest::new(key.clone())]).await?, [Loaded::Absent(version)]);
///
/// let page = store.list(&ListRequest::new(100)).await?;
/// assert!(page.records.is_empty() && page.is_last);
/// store.touch(&[key]).await?;
/// assert!(store.changes(None).await?.is_none());
/// assert_eq!(store.purge(100).await?, 0);
/// assert!(store.fault().is_none() && store.apply_once(&[]).await?.is_empty());
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait Store: Debug + Send + Sync + 'static {
    /// Returns this process's estimate of the store's clock.
    ///
    /// The clock issues the versions of new writes. See [`Store`] for an example.
    fn clock(&self) -> &Arc<Clock>;

    /// Returns the breaker of this store, if it has one.
    ///
    /// A wrapper forwards the call, so that the cache sees the breaker of an inner [`ResilientStore`]. See
    /// [`ResilientStore::new`] for an example.
    fn breaker(&self) -> Option<&Breaker> {
        None
    }

    /// Returns the known fault of the store, without a request.
    ///
    /// For example, [`Local`] reports the deletion of its file. See [`Store`] for an example.
    fn fault(&self) -> Option<Error> {
        None
    }

    /// Loads the newest record of each key, in the order of the requests.
    ///
    /// An absent record is a result, not an error. See [`Store`] for an example.
    ///
    /// # Errors
    /// - [`Unavailable`](crate::ErrorKind::Unavailable): the store does not answer.
    /// - [`Unauthorized`](crate::ErrorKind::Unauthorized): the store rejects the credentials.
    /// - [`SchemaOutdated`](crate::ErrorKind::SchemaOutdated): the database lacks the migrations.
    /// - [`LocalStorage`](crate::ErrorKind::LocalStorage): a local store cannot read its file.
    /// - [`Overloaded`](crate::ErrorKind::Overloaded): too many calls are in progress.
    /// - [`Closed`](crate::ErrorKind::Closed): the store was closed.
    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>>;

    /// Applies each write for which [`decide`] says so.
    ///
    /// The results have the order of the writes. The store applies several writes of one key in their order. See [`Store`] for
    /// an example.
    ///
    /// # Errors
    /// As [`load`](Self::load). In addition, [`Rejected`](crate::ErrorKind::Rejected): the store cannot keep a record of this
    /// call.
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>>;

    /// Applies writes that may themselves cause the failure: one attempt, without an effect on the [breaker](Self::breaker).
    ///
    /// Replay uses this call to find the rejected record of a batch. The default forwards to [`apply`](Self::apply).
    /// See [`Store`] for an example.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    async fn apply_once(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.apply(writes).await
    }

    /// Lists live records, newest first.
    ///
    /// A page may hold fewer records than the limit, but it is empty only if no record is left. Only
    /// [`ListPage::is_last`] marks the end. See [`Store`] for an example.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    async fn list(&self, page: &ListRequest) -> Result<ListPage>;

    /// Records an access to conversations. Changes neither version nor expiry. See [`Store`] for an example.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    async fn touch(&self, keys: &[Key]) -> Result<()>;

    /// Deletes up to `limit` records whose expiry and version are both older than 8 days.
    ///
    /// A younger tombstone must stay, because it outlives late writes (I13). The call also clears the values of expired
    /// records, and forgets noted versions of writers that are older than 8 days. Returns the number of records that it
    /// deleted or cleared. [`Supabase`] keeps the values of expired records until it deletes the records.
    /// See [`Store`] for an example.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    async fn purge(&self, limit: usize) -> Result<usize>;

    /// Names the conversations that changed since a cursor. Without a cursor, returns the present one.
    ///
    /// A write that was committed after the request that returned `since` is in a page. A change may be named twice. Returns `None`
    /// if the store has no history, for example because only one process uses it. See [`Store`] for an example.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    async fn changes(&self, since: Option<&Cursor>) -> Result<Option<Changes>> {
        let _ = since;
        Ok(None)
    }

    /// Checks that the store answers and takes writes, as cheaply as possible.
    ///
    /// Some stores can answer reads while they take no writes. The probe of such a store has to write, and may roll that
    /// write back. See [`Store`] for an example.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    async fn probe(&self) -> Result<()>;
}

/// Shares a store between several owners.
#[async_trait]
impl<S: Store + ?Sized> Store for Arc<S> {
    fn clock(&self) -> &Arc<Clock> {
        (**self).clock()
    }
    fn breaker(&self) -> Option<&Breaker> {
        (**self).breaker()
    }
    fn fault(&self) -> Option<Error> {
        (**self).fault()
    }
    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        (**self).load(requests).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        (**self).apply(writes).await
    }
    async fn apply_once(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        (**self).apply_once(writes).await
    }
    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        (**self).list(page).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        (**self).touch(keys).await
    }
    async fn purge(&self, limit: usize) -> Result<usize> {
        (**self).purge(limit).await
    }
    async fn changes(&self, since: Option<&Cursor>) -> Result<Option<Changes>> {
        (**self).changes(since).await
    }
    async fn probe(&self) -> Result<()> {
        (**self).probe().await
    }
}
