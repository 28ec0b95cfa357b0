//! A custom store that passes the conformance suite: `cargo run --features testing --example custom_store`.
//!
//! The store is a journal: each accepted write appends a line to a file, and `open` reads the file. The store does not
//! decide which write it accepts: [`decide`] does (I9). The store keeps three things for it: the [`RowState`] of each
//! conversation, the last version of each writer, and a clock.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use threadkeep::store::{
    Applied, Clock, Decision, Json, ListPage, ListRequest, LoadRequest, Loaded, Record, RowState, Store,
    Timestamp, Write, WriterId, decide,
};
use threadkeep::testing::conformance;
use threadkeep::{Cache, Error, ErrorKind, Key, Result, Version, WriteOutcome};

#[tokio::main]
async fn main() -> Result<()> {
    let path = std::env::temp_dir().join(format!("threadkeep-journal-{}", std::process::id()));
    conformance(Arc::new(Journal::open(&path)?)).await;
    println!("the journal keeps the contract");

    let cache = Cache::builder().store(Journal::open(&path)?).open().await?;
    assert_eq!(cache.put("thread-1", &["hello"]).await?, WriteOutcome::Stored);
    let reopened = Cache::builder().store(Journal::open(&path)?).open().await?;
    let found = reopened.get("thread-1").await?;
    println!("after a restart: {}", found.as_ref().map_or("nothing", |found| found.json()));
    assert!(found.is_some());
    std::fs::remove_file(&path).map_err(|error| failed("removed", error))
}

#[derive(Debug)]
struct Journal {
    clock: Arc<Clock>,
    contents: Mutex<Contents>,
}

#[derive(Debug)]
struct Contents {
    file: File,
    entries: BTreeMap<Key, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    record: Arc<Record>,
    state: RowState,
    /// The last counted version of each writer.
    writers: HashMap<WriterId, Version>,
}

/// A line of the file, which holds one accepted write.
#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    version: i64,
    expires_at: i64,
    value: Option<Box<RawValue>>,
    user: Option<String>,
    metadata: Box<RawValue>,
    writer: i64,
    noted: Option<i64>,
    base_version: i64,
    run_began: i64,
}

impl Journal {
    fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path);
        let mut file = file.map_err(|error| failed("opened", error))?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|error| failed("read", error))?;
        let mut entries = BTreeMap::new();
        // A crash can leave a last line without its newline. Its write was never acknowledged.
        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        file.set_len(complete as u64).map_err(|error| failed("written", error))?;
        for line in text[..complete].lines() {
            let line: Line = serde_json::from_str(line).map_err(|error| failed("understood", error))?;
            let (record, state, noted) = line.read()?;
            accept(&mut entries, record, state, noted);
        }
        // Expiry follows the store's clock (I17). This store's clock is the system's.
        let clock = Clock::authoritative();
        for entry in entries.values() {
            clock.advance(entry.record.version);
        }
        Ok(Self { clock: clock.into(), contents: Mutex::new(Contents { file, entries }) })
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_up(&self, request: &LoadRequest) -> Loaded {
        match self.contents().entries.get(&request.key).map(|entry| &entry.record) {
            None => Loaded::Absent(Version::NONE),
            Some(record) if !record.is_live(self.clock.now()) => Loaded::Absent(record.version),
            Some(record) if request.if_none_match == Some(record.version) => Loaded::NotModified,
            Some(record) => Loaded::Found(Arc::clone(record)),
        }
    }
}

/// Replaces the record of a key. A call may hold several writes of one key, and each one sees the previous one.
fn accept(
    entries: &mut BTreeMap<Key, Entry>,
    record: Arc<Record>,
    state: RowState,
    noted: Option<(WriterId, Version)>,
) {
    let mut writers = entries.remove(&record.key).map_or(HashMap::new(), |entry| entry.writers);
    writers.extend(noted);
    entries.insert(record.key.clone(), Entry { record, state, writers });
}

impl Contents {
    /// Appends lines and syncs the file. After a failure, the file is cut back to the synced lines.
    fn append(&mut self, lines: &str) -> Result<()> {
        let before = self.file.seek(SeekFrom::End(0)).map_err(|error| failed("read", error))?;
        let written = self.file.write_all(lines.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|error| {
            self.file.set_len(before).ok();
            failed("written", error)
        })
    }
}

#[async_trait]
impl Store for Journal {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        Ok(requests.iter().map(|request| self.look_up(request)).collect())
    }

    // A store with more work in a call moves it to an OS thread for blocking work.
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let mut contents = self.contents();
        // Memory changes only after the file is synced, so the accepted writes stay in `new` until then.
        let mut new = BTreeMap::new();
        let mut lines = String::new();
        let mut results = Vec::new();
        for write in writes {
            let key = &write.record.key;
            if let (false, Some(entry)) = (new.contains_key(key), contents.entries.get(key)) {
                new.insert(key.clone(), Entry::clone(entry));
            }
            let (head, held) = (write.head(), new.get(key));
            let last = held.and_then(|entry| entry.writers.get(&write.writer)).copied();
            let now = self.clock.now_for_versions();
            let state = held.map(|entry| &entry.state);
            results.push(match decide(&head, state, last.unwrap_or_default(), now) {
                Decision::Answer(answer) => answer,
                Decision::Apply(state) => match write.over(held.map(|entry| &*entry.record), state.version) {
                    Ok((record, applied)) => {
                        let noted = head.is_counted().then_some((head.writer, head.version));
                        lines += &Line::of(&record, state, noted)?;
                        accept(&mut new, record, state, noted);
                        applied
                    }
                    Err(unsuitable) => unsuitable,
                },
            });
        }
        contents.append(&lines)?;
        contents.entries.extend(new);
        Ok(results)
    }

    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        let now = self.clock.now();
        let matches = |record: &&Arc<Record>| {
            let is_after = |(version, key): &(Version, Key)| (record.version, &record.key) < (*version, key);
            let is_of_user = |user: &Arc<str>| record.user.as_ref() == Some(user);
            record.is_live(now)
                && page.user.as_ref().is_none_or(is_of_user)
                && page.after.as_ref().is_none_or(is_after)
        };
        let contents = self.contents();
        let mut newest: Vec<_> =
            contents.entries.values().map(|entry| &entry.record).filter(matches).collect();
        newest.sort_unstable_by_key(|record| std::cmp::Reverse((record.version, &record.key)));
        let is_last = newest.len() <= page.limit;
        let records = newest.into_iter().take(page.limit).map(|record| Record::clone(record)).collect();
        Ok(ListPage::new(records, is_last))
    }

    async fn touch(&self, _: &[Key]) -> Result<()> {
        Ok(())
    }

    // A real journal also rewrites its file from time to time.
    async fn purge(&self, _: usize) -> Result<usize> {
        let (now, mut contents) = (self.clock.now(), self.contents());
        let mut cleared = 0;
        for Entry { record, .. } in contents.entries.values_mut() {
            if record.expires_at <= now && record.value.is_some() {
                let tombstone = Record::tombstone(record.key.clone(), record.version);
                *record = Arc::new(Record { expires_at: record.expires_at, ..tombstone });
                cleared += 1;
            }
        }
        Ok(cleared)
    }

    async fn probe(&self) -> Result<()> {
        Ok(())
    }
}

impl Line {
    fn of(record: &Record, state: RowState, noted: Option<Note>) -> Result<String> {
        let raw = |json: &Json| {
            RawValue::from_string(json.as_str().into()).map_err(|error| failed("written", error))
        };
        let line = Self {
            key: record.key.as_str().into(),
            version: record.version.raw(),
            expires_at: record.expires_at.0,
            value: record.value.as_ref().map(raw).transpose()?,
            user: record.user.as_deref().map(Into::into),
            metadata: raw(&record.metadata)?,
            writer: state.last_writer.raw(),
            noted: noted.map(|(_, version)| version.raw()),
            base_version: state.base_version.raw(),
            run_began: state.run_began.raw(),
        };
        // A value may contain newlines between its tokens, and a line of the journal must not.
        let line = serde_json::to_string(&line).map_err(|error| failed("written", error))?;
        Ok(line.replace(['\n', '\r'], " ") + "\n")
    }

    /// Returns the record, the state of its row, and the version to note for its writer.
    fn read(self) -> Result<(Arc<Record>, RowState, Option<Note>)> {
        let (version, writer) = (Version::from_raw(self.version), WriterId::from_raw(self.writer));
        let state = RowState {
            version,
            base_version: Version::from_raw(self.base_version),
            last_writer: writer,
            run_began: Version::from_raw(self.run_began),
            expires_at: Timestamp(self.expires_at),
        };
        let record = Record {
            key: Key::new(self.key)?,
            version,
            expires_at: Timestamp(self.expires_at),
            value: self.value.map(|value| Json::new(value.get())).transpose()?,
            user: self.user.map(Into::into),
            metadata: Json::new(self.metadata.get())?,
        };
        Ok((record.into(), state, self.noted.map(|noted| (writer, Version::from_raw(noted)))))
    }
}

/// The version that the store has noted for a writer.
type Note = (WriterId, Version);

fn failed(action: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::LocalStorage, format!("the journal cannot be {action}: {error}")).with_source(error)
}
