//! The list of a user's conversations, newest first.

use std::future::IntoFuture;
use std::sync::Arc;

use super::copies::Observed;
use super::memory::Admission;
use super::page_size::PageSizer;
use super::put::BoxFuture;
use super::{Access, Cache, Conversation};
use crate::error::{Error, ErrorKind, Result};
use crate::model::key::{Key, user};
use crate::model::outcome::Freshness;
use crate::model::version::Version;
use crate::outage::CopyRank;
use crate::resilience::tasks;
use crate::store::{ListPage, ListRequest};

const DEFAULT_LIMIT: usize = 100;
/// The limit on conversations of one call to the store.
const MAX_PAGE: usize = 500;

/// A list call of [`Cache::list`]. Await it to run it.
///
/// ```
/// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
/// let first = cache.list("u1").limit(20).await?;
/// if let Some(last) = first.last() {
///     let second = cache.list("u1").limit(20).after(last).await?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "nothing is listed before this is awaited"]
pub struct List {
    cache: Cache,
    user: Result<Arc<str>>,
    limit: usize,
    after: Option<(Version, Key)>,
}

impl Cache {
    /// Lists the live conversations of a user, newest first, from the store.
    ///
    /// Without a limit, it returns the first 100. The conversations enter memory only while half of memory is free. So a list
    /// call evicts no conversation in use. See [`List`] for an example.
    ///
    /// # Errors
    ///
    /// When awaited: [`Invalid`](crate::ErrorKind::Invalid) if `user_id` is not a valid user id.
    /// [`Unavailable`](crate::ErrorKind::Unavailable) in an outage, because a list from memory would be incomplete.
    /// [`Overloaded`](crate::ErrorKind::Overloaded), [`Unauthorized`](crate::ErrorKind::Unauthorized),
    /// [`SchemaOutdated`](crate::ErrorKind::SchemaOutdated), [`LocalStorage`](crate::ErrorKind::LocalStorage) and
    /// [`Closed`](crate::ErrorKind::Closed) as for [`get`](Self::get).
    pub fn list(&self, user_id: impl AsRef<str>) -> List {
        List { cache: self.clone(), user: user(user_id.as_ref()), limit: DEFAULT_LIMIT, after: None }
    }
}

impl List {
    /// Limits the number of conversations. The default is 100. See [`List`] for an example.
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    /// Starts after `last`, the last conversation of an earlier list. See [`List`] for an example.
    pub fn after(mut self, last: &Conversation) -> Self {
        self.after = Some((last.version(), last.key().clone()));
        self
    }
}

impl IntoFuture for List {
    type Output = Result<Vec<Conversation>>;
    type IntoFuture = BoxFuture<Vec<Conversation>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let Self { cache, user, limit, mut after } = self;
            cache.0.check_not_shut_down()?;
            let user = user?;
            let (mut found, mut page_size) = (Vec::new(), PageSizer::new(MAX_PAGE));
            // Each round advances the cursor, so the loop ends (I12).
            while found.len() < limit {
                let request = |limit| {
                    cache.fetch_page(ListRequest {
                        user: Some(Arc::clone(&user)),
                        limit,
                        after: after.clone(),
                    })
                };
                let page = page_size.fetch(&*cache.0.store, limit - found.len(), request).await?;
                let Some(end) = cache.admit_page(&user, page, &mut found).await? else { break };
                after = Some(check_progress(end, after)?);
            }
            // A stale record was replaced by a newer version, which belongs further up.
            found.sort_by(|one, two| (two.version(), two.key()).cmp(&(one.version(), one.key())));
            Ok(found)
        })
    }
}

/// Returns the end of a page if it lies after the start. Otherwise the list would never end.
fn check_progress(end: (Version, Key), after: Option<(Version, Key)>) -> Result<(Version, Key)> {
    if after.is_none_or(|after| end < after) {
        return Ok(end);
    }
    Err(Error::new(ErrorKind::SchemaOutdated, "the store returned a page that does not advance the list"))
}

impl Cache {
    /// Requests one page.
    async fn fetch_page(&self, request: ListRequest) -> Result<Observed<ListPage>> {
        let shared = &self.0;
        shared.check_breaker()?;
        let (copies, store) = (Arc::clone(&shared.copies), Arc::clone(&shared.store));
        let listed = tasks::run(async move { copies.observe(&copies.begin(), store.list(&request)).await });
        shared.note(Access::Read, listed.await?)
    }

    /// Appends one page to `found`. Returns its end, unless it is the last page.
    async fn admit_page(
        &self,
        user: &str,
        listed: Observed<ListPage>,
        found: &mut Vec<Conversation>,
    ) -> Result<Option<(Version, Key)>> {
        let shared = &self.0;
        let is_last = listed.value.is_last;
        let listed = listed.map(|page| page.records.into_iter().map(Arc::new).collect::<Vec<_>>());
        let end = listed.value.last().map(|record| (record.version, record.key.clone()));
        // Copies that a caller has read are promoted first, so that this list does not displace them.
        shared.copies.save_first_reads().await;
        let listed = shared.copies.persist(listed, CopyRank::Listed).await;
        let admissions = shared.copies.admit_listed(&listed, listed.value());
        for (record, admission) in listed.value().iter().zip(admissions) {
            let key = &record.key;
            if let Admission::Cached(entry) = admission {
                found.extend(shared.is_live(&entry).then(|| Conversation::new(entry, Freshness::Fresh)));
            } else {
                // A newer version exists, which may belong to another user or be a tombstone.
                let current = self.get(key.as_str()).await?;
                found.extend(current.filter(|current| current.user() == Some(user)));
            }
        }
        Ok(end.filter(|_| !is_last))
    }
}
