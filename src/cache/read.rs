//! Reads: one lookup over memory and queue, one load for all callers, and the stale fallback.
//!
//! [`ReadPolicy`] is the only difference between `get` and `update`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::Instrument;

use super::conversation::Conversation;
use super::copies::Call;
use super::key_state::{Event, Origin, Queued};
use super::memory::{Admission, CacheEntry, Validity, View, Wish};
use super::single_flight::LoadHandle;
use super::write::can_enqueue;
use super::{Access, Cache, Shared, within};
use crate::error::{Error, ErrorKind, Result};
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::outcome::Freshness;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::observe::metrics::ReadResult;
use crate::outage::file::OutageFile;
use crate::outage::{CopyRank, Folded};
use crate::store::{LoadRequest, Loaded};

/// Limit the lookups of one call (I12). Each further lookup needs a change of the conversation during the last one.
const MAX_LOOKUPS: usize = 64;
const MAX_LOOKUP_TIME: Duration = Duration::from_secs(15);
/// The limit on the wait until memory follows a change of the outage file.
const MAX_FILE_LEAD: Duration = Duration::from_secs(5);
/// The wait that the errors of this file recommend before a retry.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The demands of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadPolicy {
    /// A get: any failure of the store leads to the stale fallback.
    Get,
    /// The first attempt of an update: the stale fallback answers if the update can be queued.
    Update,
    /// An update after a conflict. Memory may hold the version that lost, so only a result of this call counts.
    UpdateAgain,
}

/// The result of a read. The version is the one that an update starts from.
pub(super) type Found = (Option<Conversation>, Version);

/// What memory and queue know of a conversation.
enum Lookup {
    Nothing,
    /// A record of the store or of the replica. It may have expired.
    Entry(Arc<CacheEntry>),
    /// The store had no live record at this moment.
    Absent(Version, Moment),
    /// The value of the newest queued write, and the base of an update. `None` if an update has to wait for replay.
    Queued(Option<Conversation>, Option<Version>),
    /// As [`Queued`](Self::Queued), but the time to live is over. Another daemon may have renewed the conversation since.
    Expired(Option<Version>),
    /// Appends are queued, and nobody knows the value before them. Only replay tells it.
    Unknown,
}

impl Cache {
    /// Returns the conversation with this thread id, or `None` if it does not exist.
    ///
    /// Memory answers if the store or the change feed validated the entry within `fresh_for`. Such a read does no I/O, takes no lock of
    /// threadkeep, and does not allocate, parse or copy. If a write of this daemon waits in the queue, that write is the
    /// answer. Otherwise one load serves all callers.
    ///
    /// In an outage, or after the soft timeout, the stale fallback answers: an unexpired copy from memory or from the local
    /// disk. Such a copy reports its age as [`Stale`](crate::Freshness::Stale). Only the store, or a queued remove, makes this
    /// return `None`.
    ///
    /// # Errors
    ///
    /// * [`ErrorKind::Unavailable`] if the store is unreachable and no copy is known.
    /// * [`ErrorKind::Invalid`] if `key` is not a valid thread id.
    /// * [`ErrorKind::Overloaded`] if too many loads are in flight, or if the conversation changes during
    ///   each attempt.
    /// * [`ErrorKind::Unauthorized`] or [`ErrorKind::SchemaOutdated`] if the store rejects the key, or
    ///   lacks the migrations, and no copy is known.
    /// * [`ErrorKind::LocalStorage`] if the disk fails.
    /// * [`ErrorKind::Closed`] after a shutdown.
    ///
    /// ```
    /// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
    /// match cache.get("thread-1").await? {
    ///     Some(found) => println!("{} ({:?})", found.json(), found.freshness()),
    ///     None => println!("start a new conversation"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get(&self, key: impl AsRef<str>) -> Result<Option<Conversation>> {
        let shared = &self.0;
        shared.check_not_shut_down()?;
        if let Some((entry, freshness)) =
            shared.copies.memory.hit(key.as_ref(), || !shared.is_breaker_closed())
        {
            shared.metrics.read(read_result(freshness, ReadResult::Hit));
            return Ok(Some(Conversation::new(entry, freshness)));
        }
        let key = Key::new(key)?;
        let span = tracing::debug_span!("get", thread_id = %key);
        let result = shared.read(&key, ReadPolicy::Get).instrument(span).await.map(|(found, _)| found);
        shared.metrics.read(match &result {
            Ok(Some(found)) => read_result(found.freshness(), ReadResult::Miss),
            Ok(None) => ReadResult::Absent,
            Err(_) => ReadResult::Failed,
        });
        result
    }
}

impl Shared {
    /// Reads a conversation. Each round costs one load, and repeats only if the conversation changed during that load (I12).
    pub(super) async fn read(self: &Arc<Self>, key: &Key, policy: ReadPolicy) -> Result<Found> {
        let (began, start, mut is_unknown) = (Moment::now(), Instant::now(), false);
        for _ in (0..MAX_LOOKUPS).take_while(|_| start.elapsed() < MAX_LOOKUP_TIME) {
            let validity = self.copies.memory.validity();
            match self.lookup(key, policy).await? {
                Lookup::Queued(found, base) => return queued(key, policy, found, base),
                Lookup::Unknown if std::mem::replace(&mut is_unknown, true) => {
                    return Err(waits_for_replay(key));
                }
                // Then a load tells at least the copy that the appends follow.
                Lookup::Unknown => self.wait_for_queue(key).await,
                Lookup::Entry(entry) if self.may_answer(&entry, validity, policy, began) => {
                    return Ok(fresh(entry));
                }
                Lookup::Absent(version, at) if policy != ReadPolicy::UpdateAgain || at >= began => {
                    return Ok((None, version));
                }
                _ => {}
            }
            if let Some(found) = self.fetch(key, policy, began).await? {
                return Ok(found);
            }
        }
        let fallback = if policy == ReadPolicy::Get { self.stale_fallback(key, policy).await } else { None };
        fallback.ok_or_else(|| unsettled(key, "it changed during each lookup"))
    }

    /// Looks a conversation up in memory, and reads a queued write that memory has evicted from the disk.
    async fn lookup(&self, key: &Key, policy: ReadPolicy) -> Result<Lookup> {
        let deadline = Instant::now() + MAX_FILE_LEAD;
        let mut changes = self.copies.file.as_ref().map(|file| file.queue());
        for _ in 0..MAX_LOOKUPS {
            // Noted before the view of memory, so that no change after it is missed.
            changes.iter_mut().for_each(|changes| _ = changes.borrow_and_update());
            let View { entry, absent, queued } = self.copies.memory.view(key);
            let (Some(version), Some(file), Some(changes)) =
                (queued.answer(), &self.copies.file, &mut changes)
            else {
                return Ok(match (entry, absent) {
                    (Some(entry), _) if entry.origin() != Origin::Queue => Lookup::Entry(entry),
                    (None, Some((version, at))) => Lookup::Absent(version, at),
                    _ => Lookup::Nothing,
                });
            };
            // Only the file knows the base of an update (C3).
            let is_enough = policy == ReadPolicy::Get && queued == Queued::Newest(version);
            if let Some(entry) = entry.filter(|entry| is_enough && entry.origin() == Origin::Queue) {
                return Ok(self.queued_entry(entry, Some(version)));
            }
            match self.read_queued(file, key, version).await? {
                Some(found) => return Ok(found),
                // The file has completed or replaced the write at this moment. Memory follows.
                None => {
                    if within(deadline.saturating_duration_since(Instant::now()), changes.changed())
                        .await
                        .is_none()
                    {
                        break;
                    }
                }
            }
        }
        let error = unsettled(key, "the outage file and memory disagree on its queued write");
        tracing::error!(%error, "queue lookup failed; the call fails");
        Err(error)
    }

    /// Reads the value of the newest queued write from the outage file. Returns `None` if the file has another one by now.
    async fn read_queued(&self, file: &OutageFile, key: &Key, version: Version) -> Result<Option<Lookup>> {
        let (record, base) = match file.fold(key).await? {
            Folded::Known { record, base } if record.version == version => (record, base),
            Folded::Unknown { newest } if newest == version => return Ok(Some(Lookup::Unknown)),
            _ => return Ok(None),
        };
        if record.value.is_none() {
            return Ok(Some(Lookup::Queued(None, base)));
        }
        let event = Event::QueuedRead(record);
        let now = self.copies.clock.moment();
        Ok(match self.copies.memory.drive(key, None, now, event, Wish::Caller) {
            Admission::Cached(entry) if entry.record().version == version => {
                Some(self.queued_entry(entry, base))
            }
            // Replay completed the write during the read.
            _ => Some(Lookup::Nothing),
        })
    }

    fn queued_entry(&self, entry: Arc<CacheEntry>, base: Option<Version>) -> Lookup {
        match self.is_live(&entry) {
            true => Lookup::Queued(Some(Conversation::new(entry.touched(), Freshness::Queued)), base),
            false => Lookup::Expired(base),
        }
    }

    /// Returns true if an entry answers without a load: it is fresh, or was validated during this call.
    fn may_answer(&self, entry: &CacheEntry, validity: Validity, policy: ReadPolicy, began: Moment) -> bool {
        let is_fresh = policy != ReadPolicy::UpdateAgain
            && self.copies.memory.is_fresh(entry, validity, self.copies.clock.moment());
        let is_new = entry.origin() == Origin::Store && entry.validated_at() >= began;
        (is_fresh || is_new) && self.is_live(entry)
    }

    /// Loads a conversation. Returns `None` if the caller has to look again.
    async fn fetch(self: &Arc<Self>, key: &Key, policy: ReadPolicy, began: Moment) -> Result<Option<Found>> {
        let can_fall_back = policy == ReadPolicy::Get || self.queue.is_some();
        let (loaded, started_at) = match self.check_breaker().and_then(|()| self.load(key)) {
            Ok(mut load) => tokio::select! {
                biased;
                loaded = load.wait() => (loaded.and_then(|loaded| loaded), load.call.at),
                Some(found) = self.stale_fallback_after_soft_timeout(key, policy), if can_fall_back => return Ok(Some(found)),
            },
            Err(e) => (Err(e), began),
        };
        match loaded {
            // No error says that the conversation is absent, so a copy is a correct answer (I14).
            Err(e) if policy == ReadPolicy::Get || can_fall_back && can_enqueue(&e) => {
                self.stale_fallback(key, policy).await.map(Some).ok_or(e)
            }
            loaded => self.judge(key, policy, loaded?, [began, started_at]).await,
        }
    }

    /// Turns the result of a load into an answer. Returns `None` if the caller has to look again.
    async fn judge(
        &self,
        key: &Key,
        policy: ReadPolicy,
        loaded: Admission,
        [began, started_at]: [Moment; 2],
    ) -> Result<Option<Found>> {
        // This caller may have joined an old load, whose result may be older than the policy allows.
        let memory = &self.copies.memory;
        let may_join = policy != ReadPolicy::UpdateAgain || started_at >= began;
        Ok(match loaded {
            // The record may have expired on its way. Only the store knows whether another writer renewed it.
            Admission::Cached(entry) => {
                let may_answer = may_join && memory.is_recent(started_at, began) && self.is_live(&entry);
                may_answer.then(|| fresh(entry))
            }
            Admission::Absent(version) => {
                let may_answer = may_join && memory.is_recent_absence(started_at, began);
                may_answer.then_some((None, version))
            }
            Admission::Stale => None,
            // If the queued write has expired, the stored record that it replaces counts as absent, too.
            Admission::QueuedIsNewer => match self.lookup(key, policy).await? {
                Lookup::Expired(base) => Some(queued(key, policy, None, base)?),
                Lookup::Queued(found, base) => Some(queued(key, policy, found, base)?),
                _ => None,
            },
        })
    }

    /// Reads the stale fallback, in this order: queued write, memory, replica. Expired entries are skipped.
    ///
    /// The lookup runs at return time. So the result is never older than a write that was acknowledged meanwhile (I16).
    async fn stale_fallback(&self, key: &Key, policy: ReadPolicy) -> Option<Found> {
        for _ in 0..MAX_LOOKUPS {
            let validity = self.copies.memory.validity();
            let in_memory = |entry: Arc<CacheEntry>| {
                let version = entry.record().version;
                self.is_live(&entry).then(|| (Some(self.to_conversation(entry, validity)), version))
            };
            match self.lookup(key, policy).await.ok()? {
                Lookup::Queued(found, base) => return queued(key, policy, found, base).ok(),
                Lookup::Expired(_) | Lookup::Unknown => return None,
                Lookup::Entry(entry) => {
                    if let Some(found) = in_memory(entry) {
                        return Some(found);
                    }
                }
                Lookup::Absent(..) | Lookup::Nothing => {}
            }
            match self.copies.read_copy(key).await {
                Some(Admission::Cached(entry)) => return in_memory(entry),
                // The conversation changed during the read of the replica.
                Some(_) => {}
                // A load may have filled memory meanwhile.
                None => return self.copies.memory.view(key).entry.and_then(in_memory),
            }
        }
        None
    }

    async fn stale_fallback_after_soft_timeout(&self, key: &Key, policy: ReadPolicy) -> Option<Found> {
        tokio::time::sleep(self.limits.soft_timeout).await;
        self.stale_fallback(key, policy).await
    }

    /// Turns an entry of the stale fallback into a conversation. The entry may be fresh by now.
    fn to_conversation(&self, entry: Arc<CacheEntry>, validity: Validity) -> Conversation {
        let now = self.copies.clock.moment();
        let freshness = match self.copies.memory.is_fresh(&entry, validity, now) {
            true => Freshness::Fresh,
            false => Freshness::stale(validity.validated_at(&entry), now),
        };
        Conversation::new(entry.touched(), freshness)
    }

    /// Returns true if the record did not expire on its way.
    pub(super) fn is_live(&self, entry: &CacheEntry) -> bool {
        entry.record().is_live(self.copies.clock.now())
    }

    /// Joins or starts the load of a conversation.
    fn load(self: &Arc<Self>, key: &Key) -> Result<LoadHandle<Result<Admission>>> {
        let (shared, wanted) = (Arc::clone(self), key.clone());
        self.single_flight.join_or_start(key, &self.copies, |call| async move {
            shared.load_into_memory(wanted, &call).await
        })
    }

    /// Loads a conversation, and hands the result to the outage file and then to memory (I1, I3).
    async fn load_into_memory(&self, key: Key, call: &Arc<Call>) -> Result<Admission> {
        let cached = self.copies.memory.view(&key).entry;
        let if_none_match = cached.as_ref().map(|cached| cached.record().version);
        let request = [LoadRequest { key: key.clone(), if_none_match }];
        let loaded = self.copies.observe(call, self.store.load(&request)).await;
        let mut loaded = self.note(Access::Read, loaded)?;
        let persisted = match (loaded.value.pop(), cached) {
            (Some(Loaded::Found(record)), _) => {
                self.copies.persist(loaded.map(|_| [record]), CopyRank::Used).await
            }
            (Some(Loaded::Absent(version)), _) => {
                let tombstone = Arc::new(Record::tombstone(key, version));
                self.copies.persist(loaded.map(|_| [tombstone]), CopyRank::Used).await
            }
            (Some(Loaded::NotModified), Some(cached)) => {
                self.copies.confirm(loaded.map(|_| Arc::clone(cached.record()))).await
            }
            (None | Some(Loaded::NotModified), _) => {
                let message = format!("the store returned no result for conversation {key}");
                return Err(Error::new(ErrorKind::SchemaOutdated, message).with_key(key.as_str()));
            }
        };
        let admission = self.copies.admit(persisted);
        if matches!(admission, Admission::Stale) {
            self.metrics.stale_loads.increment(1);
        }
        Ok(admission)
    }
}

/// Returns the source of an answer for the metrics. A fresh answer has the source `if_fresh`.
fn read_result(freshness: Freshness, if_fresh: ReadResult) -> ReadResult {
    match freshness {
        Freshness::Fresh => if_fresh,
        Freshness::Queued => ReadResult::Queued,
        Freshness::Stale { .. } => ReadResult::Stale,
    }
}

fn fresh(entry: Arc<CacheEntry>) -> Found {
    let version = entry.record().version;
    (Some(Conversation::new(entry.touched(), Freshness::Fresh)), version)
}

/// Returns the value of a queued write. An update needs its base, too.
fn queued(
    key: &Key,
    policy: ReadPolicy,
    found: Option<Conversation>,
    base: Option<Version>,
) -> Result<Found> {
    let base = base.or((policy == ReadPolicy::Get).then_some(Version::NONE));
    Ok((found, base.ok_or_else(|| waits_for_replay(key))?))
}

/// Creates the error of a call that needs the result of queued appends.
fn waits_for_replay(key: &Key) -> Error {
    let message =
        format!("the queued appends of conversation {key} wait for the store, and their result is unknown");
    let error = Error::new(ErrorKind::Unavailable, message);
    error.with_key(key.as_str()).with_retry_after(RETRY_AFTER)
}

/// Creates the error of a call that reached its limit of lookups.
fn unsettled(key: &Key, reason: &str) -> Error {
    let error = Error::new(ErrorKind::Overloaded, format!("conversation {key} cannot be read: {reason}"));
    error.with_key(key.as_str()).with_retry_after(RETRY_AFTER)
}
