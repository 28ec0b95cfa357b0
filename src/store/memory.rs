//! `Memory`: the reference store. Its records end with the process.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;

use crate::error::Result;
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{TOMBSTONE_TTL, Version};
use crate::model::writer::WriterId;
use crate::store::{
    Applied, Decision, ListPage, ListRequest, LoadRequest, Loaded, RowState, Store, Write, decide,
};

/// Keeps records in a map. It is the shortest implementation of the contract, and the backend `memory`.
#[derive(Debug)]
pub struct Memory {
    clock: Arc<Clock>,
    conversations: Mutex<BTreeMap<Key, StoredConversation>>,
}

#[derive(Debug)]
struct StoredConversation {
    record: Arc<Record>,
    state: RowState,
    /// The last counted version of each writer.
    writers: HashMap<WriterId, Version>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { clock: Clock::authoritative().into(), conversations: Mutex::default() }
    }
}

impl Memory {
    /// Creates an empty store.
    ///
    /// Its clock is the clock of this machine. See [`Store`] for an example.
    pub fn new() -> Self {
        Self::default()
    }

    fn load_one(&self, request: &LoadRequest) -> Loaded {
        match self.conversations.lock().get(&request.key) {
            None => Loaded::Absent(Version::NONE),
            Some(StoredConversation { record, .. }) if !record.is_live(self.clock.now()) => {
                Loaded::Absent(record.version)
            }
            Some(StoredConversation { record, .. }) if request.if_none_match == Some(record.version) => {
                Loaded::NotModified
            }
            Some(StoredConversation { record, .. }) => Loaded::Found(Arc::clone(record)),
        }
    }

    fn apply_one(&self, write: &Write) -> Applied {
        let (mut conversations, head) = (self.conversations.lock(), write.head());
        let key = &write.record.key;
        let held = conversations.get_mut(key);
        let last = held.as_ref().and_then(|held| held.writers.get(&write.writer).copied());
        let state = held.as_ref().map(|held| held.state);
        let now = self.clock.now_for_versions();
        let state = match decide(&head, state.as_ref(), last.unwrap_or_default(), now) {
            Decision::Answer(answer) => return answer,
            Decision::Apply(state) => state,
        };
        let (record, applied) = match write.over(held.as_ref().map(|held| &*held.record), state.version) {
            Ok(changed) => changed,
            Err(unsuitable) => return unsuitable,
        };
        let mut writers = held.map(|held| std::mem::take(&mut held.writers)).unwrap_or_default();
        if head.is_counted() {
            writers.insert(write.writer, head.version);
        }
        conversations.insert(key.clone(), StoredConversation { record, state, writers });
        applied
    }
}

#[async_trait]
impl Store for Memory {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        Ok(requests.iter().map(|request| self.load_one(request)).collect())
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        Ok(writes.iter().map(|write| self.apply_one(write)).collect())
    }

    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        let now = self.clock.now();
        let is_selected = |record: &Record| {
            record.is_live(now)
                && page.user.as_ref().is_none_or(|user| record.user.as_ref() == Some(user))
                && page
                    .after
                    .as_ref()
                    .is_none_or(|(version, key)| (record.version, &record.key) < (*version, key))
        };
        let conversations = self.conversations.lock();
        let mut newest: Vec<&Record> = conversations
            .values()
            .map(|stored| &*stored.record)
            .filter(|record| is_selected(record))
            .collect();
        newest.sort_unstable_by_key(|record| std::cmp::Reverse((record.version, &record.key)));
        let is_last = newest.len() <= page.limit;
        Ok(ListPage { records: newest.into_iter().take(page.limit).cloned().collect(), is_last })
    }

    async fn touch(&self, _: &[Key]) -> Result<()> {
        Ok(())
    }

    async fn purge(&self, limit: usize) -> Result<usize> {
        let now = self.clock.now();
        let oldest = now.minus(TOMBSTONE_TTL);
        let mut conversations = self.conversations.lock();
        for stored in conversations.values_mut() {
            stored.writers.retain(|_, version| version.at() >= oldest);
        }
        let expired = |stored: &StoredConversation| {
            stored.record.expires_at < oldest && stored.record.version.at() < oldest
        };
        let keys: Vec<Key> = conversations
            .iter()
            .filter(|(_, stored)| expired(stored))
            .map(|(key, _)| key.clone())
            .take(limit)
            .collect();
        for key in &keys {
            conversations.remove(key);
        }
        let mut purged = keys.len();
        for StoredConversation { record, .. } in conversations.values_mut() {
            // An expired conversation needs its version only.
            if record.expires_at <= now && record.value.is_some() {
                let tombstone = Record::tombstone(record.key.clone(), record.version);
                *record = Arc::new(Record { expires_at: record.expires_at, ..tombstone });
                purged += 1;
            }
        }
        Ok(purged)
    }

    async fn probe(&self) -> Result<()> {
        Ok(())
    }
}
