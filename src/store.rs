//! The one trait: a place where records live.

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;

use crate::breaker::Breaker;
use crate::error::{Error, Result};
use crate::record::{Key, Record, Want, Write};
use crate::version::{Clock, OLDEST, TOLERANCE, Version};

/// A place where records live: a database, a file, memory, or a wrapping of one of these.
///
/// The contract, which [`testing::conformance`](crate::testing::conformance) checks:
///
/// * **apply is idempotent**: a record that was accepted once is `Stored` however often it comes again, for at least
///   its key's next 15 accepted writes;
/// * **apply keeps the newest**: a record replaces only older ones, so the order of calls does not matter;
/// * **load sees what apply stored**, at once;
/// * **the store's clock decides** what has expired, and refuses versions more than 2 s ahead of it or 7 days behind;
/// * a deletion is remembered for 8 days;
/// * a call that fails with [`outcome_unknown`](crate::Error::outcome_unknown) unset has changed nothing.
#[async_trait]
pub trait Store: Debug + Send + Sync + 'static {
    /// The clock of the source of truth, as far as it is known.
    fn clock(&self) -> &Arc<Clock>;

    /// The breaker that stands before this store, where there is one.
    fn breaker(&self) -> Option<&Breaker> {
        None
    }

    /// What keeps the store from working, as far as it knows by itself: such as a file that was deleted. Asks nobody.
    fn fault(&self) -> Option<Error> {
        None
    }

    /// Each key's newest record, in the order asked.
    ///
    /// # Errors
    /// [`Unavailable`](crate::ErrorKind::Unavailable) and [`Denied`](crate::ErrorKind::Denied), among others. Never for
    /// absence, which is an answer.
    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>>;

    /// Writes each record that is newer than what is stored (and, with `expect`, only over that version); answers in
    /// the order given. Several writes of one key are carried out in their order.
    ///
    /// # Errors
    /// As for [`load`](Self::load); [`Refused`](crate::ErrorKind::Refused) where a record cannot be stored.
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>>;

    /// As [`apply`](Self::apply), for writes that may themselves be at fault: tried once, and a failure says nothing about
    /// the store, so that no [breaker](Self::breaker) opens by it.
    ///
    /// # Errors
    /// As for [`apply`](Self::apply).
    async fn apply_on_trial(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.apply(writes).await
    }

    /// A page of the newest live records, newest first: at least one where there are any, and perhaps fewer than
    /// asked; it says whether it is the last.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    async fn recent(&self, page: &Page) -> Result<Recent>;

    /// Marks threads as accessed now. Changes neither version nor expiry.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    async fn touch(&self, keys: &[Key]) -> Result<()>;

    /// Forgets up to `most` records whose expiry and version are both older than 8 days; answers how many it forgot.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    async fn purge(&self, most: usize) -> Result<usize>;

    /// Asks whether the store is there and takes writes, as cheaply as possible. A store that can answer reads while it
    /// takes no writes has to write something, which need not stay.
    ///
    /// # Errors
    /// As for [`load`](Self::load); [`Schema`](crate::ErrorKind::Schema) where the migrations are missing.
    async fn probe(&self) -> Result<()>;
}

/// A store that several hold is a store.
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
    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        (**self).load(wants).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        (**self).apply(writes).await
    }
    async fn apply_on_trial(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        (**self).apply_on_trial(writes).await
    }
    async fn recent(&self, page: &Page) -> Result<Recent> {
        (**self).recent(page).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        (**self).touch(keys).await
    }
    async fn purge(&self, most: usize) -> Result<usize> {
        (**self).purge(most).await
    }
    async fn probe(&self) -> Result<()> {
        (**self).probe().await
    }
}

/// What a load found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loaded {
    /// The live record.
    Found(Arc<Record>),
    /// It is live, and at the version that the caller knows.
    Same,
    /// There is no live record. Absence has a version too, that of the deleted or expired record, so that late fills
    /// lose against it.
    Absent(Version),
}

/// What became of one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It is, or was, the newest.
    Stored,
    /// Something newer is stored, at this version.
    Superseded(Version),
    /// Another version is stored than the one expected.
    Conflict(Version),
    /// As `Conflict`, for a write that comes [`again`](Write::again): so many others have been accepted since that the
    /// store cannot tell whether this one was among them.
    Forgotten(Version),
    /// Its version is ahead of the store's clock, which the caller has learnt by this answer.
    Ahead,
    /// Its version is more than 7 days old.
    TooOld,
}

/// Which records to list.
#[derive(Debug, Clone)]
pub struct Page {
    /// Only this user's.
    pub user: Option<Arc<str>>,
    /// At most so many.
    pub most: usize,
    /// Only those that come after this one in the listing.
    pub after: Option<(Version, Key)>,
}

/// A page of records.
#[derive(Debug, Clone)]
pub struct Recent {
    /// The records, newest first.
    pub records: Vec<Record>,
    /// Whether there are no more after these.
    pub is_last: bool,
}

/// How many threads the next page of a listing or a warm-up has. A page that does not come in time is asked for anew with
/// half as many. After some that came there are twice as many again.
#[derive(Debug)]
pub(crate) struct Portion {
    threads: usize,
    most: usize,
    /// Pages that are to come before a larger one is tried, and that have come since the number changed.
    wanted: usize,
    came: usize,
}

/// After each page that did not come, twice as many are wanted, so that few are asked for in vain.
const FEWEST_WANTED: usize = 2;
const MOST_WANTED: usize = 64;

impl Portion {
    pub(crate) fn new(most: usize) -> Self {
        Self { threads: most, most, wanted: FEWEST_WANTED, came: 0 }
    }

    /// As many, or as few as are left.
    pub(crate) fn of(&self, left: usize) -> usize {
        self.threads.min(left)
    }

    pub(crate) fn grow_after<T>(&mut self, page: &Result<T>) {
        self.came += usize::from(page.is_ok());
        if self.came == self.wanted {
            (self.threads, self.came) = (self.most.min(self.threads * 2), 0);
        }
    }

    /// After this failure of a page with so many threads; says whether a smaller one is worth a try.
    pub(crate) async fn shrink(&mut self, origin: &dyn Store, threads: usize, error: &Error) -> bool {
        let is_slow = error.is_outage() && threads > 1;
        // If the source of truth answers a probe, only the page was too much.
        let is_there = is_slow && is_there(origin).await;
        if is_there {
            (self.threads, self.came) = (threads / 2, 0);
            self.wanted = MOST_WANTED.min(self.wanted * 2);
        }
        is_there
    }
}

/// Whether the source of truth answers, as far as its breaker knows or finds out; `true` without a breaker.
async fn is_there(origin: &dyn Store) -> bool {
    match origin.breaker() {
        Some(breaker) => breaker.ask().await,
        None => true,
    }
}

/// How many accepted versions a store remembers for each key.
pub const ACCEPTED: usize = 16;

/// What to do with a write, given the versions accepted before (newest first, empty where there is no record): `None`
/// to store it. The one definition for the stores in this process; the SQL of the migrations says the same.
pub fn judge(write: &Write, accepted: &[Version], clock: &Clock) -> Option<Applied> {
    let (version, now) = (write.record.version, clock.now_for_versions());
    let held = accepted.first().copied().unwrap_or_default();
    if accepted.contains(&version) {
        return Some(Applied::Stored);
    }
    if version.at() > now.plus(TOLERANCE) {
        return Some(Applied::Ahead);
    }
    if version < Version::lowest(now.minus(OLDEST)) {
        return Some(Applied::TooOld);
    }
    match write.expect {
        Some(expected) if expected != held => match accepted.get(ACCEPTED - 1) {
            Some(oldest) if write.again && version < *oldest => Some(Applied::Forgotten(held)),
            _ => Some(Applied::Conflict(held)),
        },
        _ if version < held => Some(Applied::Superseded(held)),
        _ => None,
    }
}
