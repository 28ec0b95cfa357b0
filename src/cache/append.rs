//! Appends: only the new items travel, and concurrent appends of one conversation travel together.

use std::collections::{HashMap, VecDeque};
use std::future::IntoFuture;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::oneshot;
use tracing::Instrument;

use super::put::{BoxFuture, Options, PendingWrite};
use super::write::{AdmittedWrite, WriteTask};
use super::{Cache, Shared};
use crate::error::{Error, ErrorKind, Result};
use crate::model::append::{Append, ArrayPath};
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::outcome::Appended;
use crate::resilience::tasks;

/// The limit on bytes of items that travel together.
const MAX_GROUP_BYTES: usize = 1 << 20;

/// An append call of [`Cache::append`]. Await it, or spawn its [`IntoFuture`].
///
/// ```
/// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
/// # use std::time::Duration;
/// let append = cache.append("thread-1", &["hello"]).at("messages").only_if_present();
/// let appended = append.ttl(Duration::from_secs(3600)).user("u1").metadata(&["archived"]).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "nothing is appended before this is awaited"]
pub struct AppendCall {
    cache: Cache,
    key: Result<Key>,
    items: Result<Items>,
    target: Append,
    options: Result<Options>,
}

/// A JSON array that is not empty, and the number of its items.
#[derive(Debug)]
struct Items {
    json: Json,
    count: u64,
}

impl Cache {
    /// Adds items to the end of a conversation that is a JSON array, or of an [array inside it](AppendCall::at).
    ///
    /// Only the new items travel to the store. An append commutes with the appends of other daemons, so it never conflicts and never
    /// runs twice. A newer put or remove of another daemon, or a newer write of plain SQL, wins against it. The appends of one
    /// conversation keep their order.
    ///
    /// If the conversation does not exist, the append creates it with the time to live, user and metadata of this call. User and
    /// metadata of a present conversation stay. Its life ends at the later of both expiries.
    ///
    /// In an outage the append is queued, also if this daemon does not know the conversation. A reader then sees the known part and
    /// the queued items.
    ///
    /// # Errors
    ///
    /// When awaited:
    ///
    /// * [`ErrorKind::Invalid`] if `items` is no array as JSON, or has no item.
    /// * [`ErrorKind::Rejected`] if the conversation has no array at this place (`null` is no array), or would be too large. If the
    ///   append was queued, it becomes a [dead letter](Self::dead_letters), with the appends that were queued at the same moment.
    /// * All errors of [`put`](Self::put).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> threadkeep::Result<()> {
    /// # let cache = threadkeep::Cache::builder().memory().open().await?;
    /// cache.append("thread-1", &["hello"]).await?;
    /// let appended = cache.append("thread-1", &["how are you?"]).await?;
    /// assert_eq!(appended.length, Some(2));
    /// # Ok(())
    /// # }
    /// ```
    pub fn append<T: Serialize + ?Sized>(&self, key: impl AsRef<str>, items: &T) -> AppendCall {
        let items = self.0.serialize_value(items).and_then(Items::new);
        let target = Append::new(ArrayPath::default(), self.0.limits.value_bytes);
        AppendCall { cache: self.clone(), key: Key::new(key), items, target, options: Ok(Options::default()) }
    }
}

impl AppendCall {
    /// Names the array inside the conversation, by the member of an object, or by several members from the outermost one. A missing
    /// member is created. See [`AppendCall`] for an example.
    pub fn at(mut self, path: impl Into<ArrayPath>) -> Self {
        self.target.at = path.into();
        self
    }

    /// Leaves an absent conversation absent. The outcome is then [`Absent`](crate::WriteOutcome::Absent). A queued append becomes
    /// a [dead letter](Cache::dead_letters) if replay finds no conversation. See [`AppendCall`] for an example.
    pub fn only_if_present(mut self) -> Self {
        self.target.only_if_present = true;
        self
    }

    /// Sets the time to live, from this call on. See [`AppendCall`] for an example.
    pub fn ttl(self, ttl: std::time::Duration) -> Self {
        self.with(|options| options.set_ttl(ttl))
    }

    /// Sets the user of a conversation that this append creates. See [`AppendCall`] for an example.
    pub fn user(self, id: impl AsRef<str>) -> Self {
        self.with(|options| options.set_user(id.as_ref()))
    }

    /// Sets the metadata of a conversation that this append creates. See [`AppendCall`] for an example.
    pub fn metadata<T: Serialize + ?Sized>(self, metadata: &T) -> Self {
        self.with(|options| options.set_metadata(metadata))
    }

    fn with(mut self, change: impl FnOnce(&mut Options) -> Result<()>) -> Self {
        self.options = self.options.and_then(|mut options| change(&mut options).map(|()| options));
        self
    }
}

impl IntoFuture for AppendCall {
    type Output = Result<Appended>;
    type IntoFuture = BoxFuture<Appended>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let (key, items, target, options) = (self.key?, self.items?, self.target, self.options?);
            items.check_at(&target.at)?;
            let span = tracing::debug_span!("append", thread_id = %key);
            let shared = &self.cache.0;
            let appended = shared.append(key, items, Alike { target, options }).instrument(span).await;
            shared.metrics.wrote(appended.as_ref().ok().map(|appended| appended.outcome));
            appended
        })
    }
}

impl Items {
    /// Checks that a conversation with the items at this place has no more levels than a store can hold.
    fn check_at(&self, path: &ArrayPath) -> Result<()> {
        path.check()?;
        let document = Json::appended(None, path, &self.json).map(|(document, _)| document);
        document.map_or(Ok(()), |document| Json::new(document.as_str()).map(drop))
    }

    fn new(json: Json) -> Result<Self> {
        match Json::appended(None, &ArrayPath::default(), &json) {
            Some((json, count)) if count > 0 => Ok(Self { json, count }),
            _ => {
                let message = "the items of an append are not a JSON array with at least one item";
                Err(Error::new(ErrorKind::Invalid, message).with_remedy("pass a slice or a Vec"))
            }
        }
    }
}

/// What appends have in common if they may travel together.
#[derive(Debug, Clone, PartialEq)]
struct Alike {
    target: Append,
    options: Options,
}

/// The groups of appends that wait for the key lock of their conversation, in their order. The last one is open for more appends.
#[derive(Debug, Default)]
pub(super) struct AppendGroups(Mutex<HashMap<Key, VecDeque<Group>, foldhash::fast::RandomState>>);

/// Appends that travel as one write.
#[derive(Debug)]
struct Group {
    alike: Alike,
    members: Vec<Member>,
    bytes: usize,
    /// The time of the first call. The time to live starts here.
    called_at: Moment,
}

/// One append of a group.
#[derive(Debug)]
struct Member {
    items: Items,
    sender: oneshot::Sender<Result<Appended>>,
    _admitted: AdmittedWrite,
}

impl AppendGroups {
    /// Adds an append to the last group of its conversation. Returns true if it began a group, which then needs a task.
    fn join(&self, key: &Key, member: Member, alike: Alike, called_at: Moment) -> bool {
        let (mut groups, bytes) = (self.0.lock(), member.items.json.len());
        let groups = groups.entry(key.clone()).or_default();
        match groups.back_mut() {
            Some(last) if last.alike == alike && last.bytes + bytes <= MAX_GROUP_BYTES => {
                last.bytes += bytes;
                last.members.push(member);
                false
            }
            _ => {
                groups.push_back(Group { alike, members: vec![member], bytes, called_at });
                true
            }
        }
    }

    /// Takes the first group of a conversation. No append joins it any more.
    fn close_first(&self, key: &Key) -> Option<Group> {
        let mut groups = self.0.lock();
        let first = groups.get_mut(key)?.pop_front();
        if groups.get(key).is_some_and(VecDeque::is_empty) {
            groups.remove(key);
        }
        first
    }
}

impl Group {
    /// Makes one write of all members. The items of an earlier call come first.
    fn pending_write(&self, key: &Key) -> PendingWrite {
        let inner = |member: &Member| member.items.json.as_str()[1..member.items.json.len() - 1].to_owned();
        let items: Vec<String> = self.members.iter().map(inner).collect();
        PendingWrite {
            key: key.clone(),
            value: Some(Json::trusted(format!("[{}]", items.join(",")))),
            options: self.alike.options.clone(),
            base: None,
            append: Some(self.alike.target.clone()),
        }
    }

    /// Answers each caller, unless the store has rejected several appends together. Then returns their halves.
    fn answer_or_halve(mut self, result: &Result<Appended>) -> Option<[Self; 2]> {
        // A write of unknown outcome is not sent again with another version.
        let is_rejected = |error: &Error| error.kind() == ErrorKind::Rejected && !error.outcome_unknown();
        if self.members.len() == 1 || !result.as_ref().is_err_and(is_rejected) {
            self.answer(result);
            return None;
        }
        let members = self.members.split_off(self.members.len() / 2);
        let second = Self { alike: self.alike.clone(), members, ..self };
        Some([self, second])
    }

    /// Answers each caller. The length that it gets is the one after its own items.
    fn answer(self, result: &Result<Appended>) {
        let mut later_items = 0;
        for Member { items, sender, .. } in self.members.into_iter().rev() {
            let length = |length: u64| length.saturating_sub(later_items);
            let own = |appended: &Appended| Appended { length: appended.length.map(length), ..*appended };
            sender.send(result.as_ref().map(own).map_err(Error::clone)).ok();
            later_items += items.count;
        }
    }
}

impl Shared {
    async fn append(self: &Arc<Self>, key: Key, items: Items, alike: Alike) -> Result<Appended> {
        let admitted = self.admit_write(Some(&items.json), alike.options.metadata.as_ref()).await?;
        let (sender, receiver) = oneshot::channel();
        let member = Member { items, sender, _admitted: admitted };
        if self.append_groups.join(&key, member, alike, self.copies.clock.moment()) {
            let (shared, key) = (Arc::clone(self), key.clone());
            // Callers of other runtimes may join, so the task must not end with this one.
            tasks::spawn_for_good(async move { shared.write_first_group(&key).await }.in_current_span());
        }
        receiver.await.unwrap_or_else(|_| Err(self.task_ended(&key, None)))
    }

    /// Writes the first group of a conversation as soon as no other update or append of it is under way (C1). Meanwhile more appends join.
    ///
    /// If the store rejects a group, its halves are sent alone: an append that does not fit must not reject the others.
    async fn write_first_group(self: &Arc<Self>, key: &Key) {
        let key_lock = self.key_locks.hold_alone(key).await;
        let Some(group) = self.append_groups.close_first(key) else { return };
        let key_lock = match key_lock {
            Ok(key_lock) => Arc::new(key_lock),
            Err(busy) => return group.answer(&Err(busy)),
        };
        let mut groups = vec![group];
        while let Some(group) = groups.pop() {
            let (sender, receiver) = oneshot::channel();
            let (pending, called_at) = (group.pending_write(key), group.called_at);
            let task = WriteTask { shared: Arc::clone(self), pending, called_at };
            let answer = async {
                let result = receiver.await.unwrap_or_else(|_| Err(self.task_ended(key, None)));
                group.answer_or_halve(&result)
            };
            // The task goes on after its answer, if the request is late.
            let ((), halves) = tokio::join!(task.run(Some(Arc::clone(&key_lock)), sender), answer);
            groups.extend(halves.into_iter().flatten().rev());
        }
    }
}
