//! `Memory`: the reference store. What it holds is gone when the process ends.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use crate::error::Result;
use crate::record::{Json, Key, Record, Want, Write};
use crate::store::{ACCEPTED, Applied, Loaded, Page, Recent, Store, judge};
use crate::version::{Clock, REMEMBERED, Version};

/// A map of records: the shortest implementation of the contract, and the backend `memory`.
#[derive(Debug)]
pub struct Memory {
    clock: Arc<Clock>,
    threads: Mutex<BTreeMap<Key, Thread>>,
}

#[derive(Debug)]
struct Thread {
    record: Arc<Record>,
    /// Newest first.
    accepted: Vec<Version>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { clock: Clock::of_truth().into(), threads: Mutex::default() }
    }
}

impl Memory {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn threads(&self) -> MutexGuard<'_, BTreeMap<Key, Thread>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_up(&self, want: &Want) -> Loaded {
        match self.threads().get(&want.key) {
            None => Loaded::Absent(Version::NONE),
            Some(Thread { record, .. }) if !record.is_live(self.clock.now()) => {
                Loaded::Absent(record.version)
            }
            Some(Thread { record, .. }) if want.known == Some(record.version) => Loaded::Same,
            Some(Thread { record, .. }) => Loaded::Found(Arc::clone(record)),
        }
    }

    fn write(&self, write: &Write) -> Applied {
        let mut threads = self.threads();
        let accepted = threads.get(&write.record.key).map_or(&[][..], |thread| &thread.accepted);
        if let Some(verdict) = judge(write, accepted, &self.clock) {
            return verdict;
        }
        let mut accepted = accepted.to_vec();
        accepted.insert(0, write.record.version);
        accepted.truncate(ACCEPTED);
        let record = Arc::clone(&write.record);
        threads.insert(record.key.clone(), Thread { record, accepted });
        Applied::Stored
    }
}

#[async_trait]
impl Store for Memory {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        Ok(wants.iter().map(|want| self.look_up(want)).collect())
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        Ok(writes.iter().map(|write| self.write(write)).collect())
    }

    async fn recent(&self, page: &Page) -> Result<Recent> {
        let now = self.clock.now();
        let is_wanted = |record: &Record| {
            record.is_live(now)
                && page.user.as_ref().is_none_or(|user| record.user.as_ref() == Some(user))
                && page
                    .after
                    .as_ref()
                    .is_none_or(|(version, key)| (record.version, &record.key) < (*version, key))
        };
        let threads = self.threads();
        let mut newest: Vec<&Record> =
            threads.values().map(|thread| &*thread.record).filter(|record| is_wanted(record)).collect();
        newest.sort_unstable_by_key(|record| std::cmp::Reverse((record.version, &record.key)));
        let is_last = newest.len() <= page.most;
        Ok(Recent { records: newest.into_iter().take(page.most).cloned().collect(), is_last })
    }

    async fn touch(&self, _: &[Key]) -> Result<()> {
        Ok(())
    }

    async fn purge(&self, most: usize) -> Result<usize> {
        let now = self.clock.now();
        let past = now.minus(REMEMBERED);
        let mut threads = self.threads();
        // Of an expired thread only the version is still needed.
        for Thread { record, .. } in threads.values_mut().filter(|thread| thread.record.expires_at <= now) {
            if record.value.is_some() {
                *record = Arc::new(Record {
                    value: None,
                    user: None,
                    metadata: Json::default(),
                    ..Record::clone(record)
                });
            }
        }
        let forgotten: Vec<Key> = threads
            .iter()
            .filter(|(_, thread)| thread.record.expires_at < past && thread.record.version.at() < past)
            .map(|(key, _)| key.clone())
            .take(most)
            .collect();
        forgotten.iter().for_each(|key| drop(threads.remove(key)));
        Ok(forgotten.len())
    }

    async fn probe(&self) -> Result<()> {
        Ok(())
    }
}
