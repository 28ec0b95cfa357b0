//! The one store that all handles of a world share. It has the true time, and executes the plain SQL of another client.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::store::{
    Applied, Clock, Decision, Json, ListPage, ListRequest, LoadRequest, Loaded, Record, RowState, Store,
    Write, WriteHead, WriteKind, WriterId, decide,
};
use threadkeep::{Key, Result, Version};

use crate::clocks::true_time;
use crate::history::Document;
use crate::planted::Bug;

/// A plain SQL statement of another client. It states no version; the trigger of the database issues one.
#[derive(Debug, Clone)]
pub enum Plain {
    /// An upsert of a register.
    Put(Document, Duration),
    /// An upsert that adds an id to a log.
    Append(u64),
    Delete,
}

#[derive(Debug)]
pub struct ModelStore {
    clock: Arc<Clock>,
    rows: Mutex<BTreeMap<Key, Row>>,
    bug: Option<Bug>,
}

#[derive(Debug, Clone)]
struct Row {
    record: Arc<Record>,
    state: RowState,
    /// The last counted version of each writer.
    writers: HashMap<WriterId, Version>,
}

/// The lifetime of a log.
pub const LOG_TTL: Duration = Duration::from_secs(3_600);

impl ModelStore {
    pub fn new(bug: Option<Bug>) -> Self {
        Self { clock: Arc::default(), rows: Mutex::default(), bug }
    }

    fn rows(&self) -> MutexGuard<'_, BTreeMap<Key, Row>> {
        self.rows.lock().unwrap()
    }

    /// Returns the live record of a conversation.
    pub fn live(&self, key: &Key) -> Option<Arc<Record>> {
        let record = self.rows().get(key).map(|row| Arc::clone(&row.record));
        record.filter(|record| record.is_live(true_time()))
    }

    /// Executes plain SQL. Returns true if it changed a live row, or inserted one.
    pub fn execute(&self, key: &Key, plain: &Plain) -> bool {
        let (mut rows, now) = (self.rows(), true_time());
        let row = rows.get(key);
        let held = row.map(|row| row.record.version).unwrap_or_default();
        let version = Version::from_raw(Version::min_at(now).raw().max(held.raw() + 1) | 1);
        let live = row.map(|row| &row.record).filter(|record| record.is_live(now));
        let put = |document: &Document, expires_at| {
            Record::put(key.clone(), version, Json::of(document).unwrap(), expires_at)
        };
        let record = match (plain, live) {
            (Plain::Put(document, ttl), _) => put(document, now.plus(*ttl)),
            (Plain::Append(id), None) => {
                put(&Document { ids: vec![*id], ..Document::default() }, now.plus(LOG_TTL))
            }
            (Plain::Append(id), Some(record)) => {
                let json = record.value.as_ref().unwrap();
                let mut document: Document = serde_json::from_str(json.as_str()).unwrap();
                document.ids.push(*id);
                put(&document, record.expires_at)
            }
            (Plain::Delete, Some(_)) => Record::tombstone(key.clone(), version),
            (Plain::Delete, None) => return false,
        };
        let row = row.cloned();
        if record.value.is_none() && self.bug == Some(Bug::ForgetsPlainDeletes) {
            rows.remove(key);
        } else {
            rows.insert(key.clone(), self.plain_row(row, record));
        }
        true
    }

    /// Returns the row after plain SQL, as the trigger of the database makes it.
    fn plain_row(&self, held: Option<Row>, record: Record) -> Row {
        let mut state = RowState {
            version: record.version,
            base_version: record.version,
            last_writer: WriterId::NONE,
            run_began: Version::NONE,
            expires_at: record.expires_at,
        };
        let mut record = record;
        let held_state = held.as_ref().map(|row| row.state);
        match (self.bug, held_state) {
            (Some(Bug::KeepsVersionOfUpsert), Some(held)) if record.value.is_some() => {
                record.version = held.version;
                state = RowState { expires_at: record.expires_at, ..held };
            }
            (Some(Bug::KeepsRunOverUpsert), Some(RowState { last_writer, run_began, .. })) => {
                state = RowState { last_writer, run_began, ..state };
            }
            _ => {}
        }
        Row { record: record.into(), state, writers: held.map(|row| row.writers).unwrap_or_default() }
    }

    fn load_one(&self, request: &LoadRequest) -> Loaded {
        match self.rows().get(&request.key) {
            None => Loaded::Absent(Version::NONE),
            Some(row) if !row.record.is_live(true_time()) => Loaded::Absent(row.record.version),
            Some(row) if request.if_none_match == Some(row.record.version) => Loaded::NotModified,
            Some(row) => Loaded::Found(Arc::clone(&row.record)),
        }
    }

    fn apply_one(&self, write: &Write) -> Applied {
        let (mut rows, head) = (self.rows(), write.head());
        let held = rows.get(&write.record.key).cloned();
        let held = held.filter(|row| self.bug != Some(Bug::ForgetsTombstones) || row.record.value.is_some());
        let mut writers = held.as_ref().map(|row| row.writers.clone()).unwrap_or_default();
        let last = writers.get(&write.writer).copied().unwrap_or_default();
        let held_state = held.as_ref().map(|row| row.state);
        let (state, last) = self.with_bug(held_state, last, &head);
        let mut state = match decide(&head, state.as_ref(), last, true_time()) {
            Decision::Answer(answer) => return answer,
            Decision::Apply(state) => state,
        };
        if let (Some(Bug::KeepsRunOverOthers), Some(held)) = (self.bug, held_state) {
            (state.last_writer, state.run_began) = (held.last_writer, held.run_began);
        }
        let before = held.as_ref().map(|row| &*row.record);
        let (record, applied) = match write.over(before, state.version) {
            Ok(changed) => changed,
            Err(unsuitable) => return unsuitable,
        };
        if head.is_counted() && !(write.append.is_some() && self.bug == Some(Bug::ForgetsAppends)) {
            writers.insert(write.writer, head.version);
        }
        rows.insert(write.record.key.clone(), Row { record, state, writers });
        applied
    }

    /// Returns the state that a store with the planted bug would remember.
    fn with_bug(
        &self,
        state: Option<RowState>,
        last: Version,
        head: &WriteHead,
    ) -> (Option<RowState>, Version) {
        let change = |state: RowState| match self.bug {
            Some(Bug::ForgetsOwnRuns) if !head.is_plain() => {
                RowState { last_writer: WriterId::NONE, ..state }
            }
            Some(Bug::ForgetsBaseVersions) => RowState { base_version: Version::NONE, ..state },
            Some(Bug::AppendsToNewerPuts) if head.kind == WriteKind::Append => {
                RowState { base_version: Version::NONE, ..state }
            }
            _ => state,
        };
        let last = if self.bug == Some(Bug::ForgetsCountedWrites) { Version::NONE } else { last };
        (state.map(change), last)
    }
}

#[async_trait]
impl Store for ModelStore {
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
        let (rows, now) = (self.rows(), true_time());
        let is_after = |record: &Record| {
            page.after.as_ref().is_none_or(|(version, key)| (record.version, &record.key) < (*version, key))
        };
        let live =
            rows.values().map(|row| &*row.record).filter(|record| record.is_live(now) && is_after(record));
        let mut newest: Vec<Record> = live.cloned().collect();
        newest.sort_unstable_by(|a, b| (b.version, &b.key).cmp(&(a.version, &a.key)));
        let is_last = newest.len() <= page.limit;
        newest.truncate(page.limit);
        Ok(ListPage::new(newest, is_last))
    }
    async fn touch(&self, _: &[Key]) -> Result<()> {
        Ok(())
    }
    async fn purge(&self, _: usize) -> Result<usize> {
        Ok(0)
    }
    async fn probe(&self) -> Result<()> {
        Ok(())
    }
}
