//! A user's threads, newest first.

use std::future::IntoFuture;
use std::sync::Arc;

use super::write::Sending;
use super::{Cache, Call, Found};
use crate::background;
use crate::error::{Error, ErrorKind, Result};
use crate::near::Learnt;
use crate::record::{Key, user};
use crate::spool::Rank;
use crate::store::{Page, Portion, Recent};
use crate::version::{Moment, Version};

const DEFAULT_LIMIT: usize = 100;
/// Threads in one call.
const PAGE: usize = 500;

/// A listing that is about to be made: await it.
#[derive(Debug)]
#[must_use = "nothing is listed before this is awaited"]
pub struct List {
    cache: Cache,
    user: Result<Arc<str>>,
    limit: usize,
    after: Option<(Version, Key)>,
}

impl Cache {
    /// The live threads of a user, newest first, from the source of truth: the first 100 unless a limit is set.
    ///
    /// They come into memory only while half of that is free, and take no room from copies of threads in use.
    ///
    /// # Errors
    /// When awaited: [`Invalid`](crate::ErrorKind::Invalid) for what cannot be a user id; `Unavailable` in an outage,
    /// because a listing from memory would be incomplete; also `Denied`, `Schema`, `Local`, `Closed`.
    pub fn list(&self, user_id: impl AsRef<str>) -> List {
        List { cache: self.clone(), user: user(user_id.as_ref()), limit: DEFAULT_LIMIT, after: None }
    }
}

impl List {
    /// At most so many.
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit;
        self
    }

    /// Those that come after this one, the last of an earlier listing.
    pub fn after(mut self, last: &Found) -> Self {
        self.after = Some((last.version(), last.key().clone()));
        self
    }
}

impl IntoFuture for List {
    type Output = Result<Vec<Found>>;
    type IntoFuture = Sending<Vec<Found>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let Self { cache, user, limit, mut after } = self;
            cache.0.check_open()?;
            let user = user?;
            let (mut all, mut portion) = (Vec::new(), Portion::new(PAGE));
            // Each turn goes further down the listing, or asks for less.
            while all.len() < limit {
                let most = portion.of(limit - all.len());
                let page = Page { user: Some(Arc::clone(&user)), most, after: after.clone() };
                let listed = cache.list_page(&page, &mut all).await;
                portion.grow_after(&listed);
                match listed {
                    Ok(Some(end)) => after = Some(further(end, after)?),
                    Ok(None) => break,
                    Err(error) if portion.shrink(&*cache.0.origin, most, &error).await => {}
                    Err(error) => return Err(error),
                }
            }
            // What was overtaken came in its newer version.
            all.sort_by(|one, two| (two.version(), two.key()).cmp(&(one.version(), one.key())));
            Ok(all)
        })
    }
}

/// Where a page ended, if that lies further down than where it began: else a listing would never end.
fn further(end: (Version, Key), after: Option<(Version, Key)>) -> Result<(Version, Key)> {
    if after.is_none_or(|after| end < after) {
        return Ok(end);
    }
    Err(Error::new(ErrorKind::Schema, "the store answered with a page that it had been asked to go on from"))
}

impl Cache {
    /// Appends a page, and says where it ended if it was not the last.
    async fn list_page(&self, page: &Page, all: &mut Vec<Found>) -> Result<Option<(Version, Key)>> {
        let inner = &self.0;
        inner.check_reachable()?;
        let (ticket, began) = (inner.fences.begin(), Moment::now());
        let (origin, wanted) = (Arc::clone(&inner.origin), page.clone());
        let recent = background::run(async move { origin.recent(&wanted).await }).await;
        let Recent { records, is_last } = inner.note(Call::Read, recent?)?;
        let end = records.last().map(|record| (record.version, record.key.clone()));
        let records: Vec<_> = records.into_iter().map(Arc::new).collect();
        // First what was read since the last listing, so that this one does not displace it.
        inner.keep_read().await;
        // The newest goes last, if there are too many.
        inner.keep(records.iter().rev().cloned(), &ticket, began, Rank::Listed).await;
        let learnt = inner.near.learn_listed(&records, &ticket, began);
        for (record, learnt) in records.iter().zip(learnt) {
            let key = &record.key;
            if let Learnt::Present(entry) = learnt {
                all.extend(inner.is_live(&entry).then(|| Found::fresh(entry)));
            } else {
                // It was overtaken while it travelled, and may not belong into the listing any more.
                let found = self.get(key.as_str()).await?;
                all.extend(found.filter(|found| found.user() == page.user.as_deref()));
            }
        }
        Ok(end.filter(|_| !is_last))
    }
}
