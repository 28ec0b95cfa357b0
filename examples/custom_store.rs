//! A custom store that passes the conformance suite: `cargo run --features testing --example custom_store`.
//!
//! The store is a journal: each accepted write appends a line to a file, and `open` reads the file. The store does not
//! decide which write it accepts: [`decide`] does (I9).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use threadkeep::store::{
    Applied, Clock, Json, ListPage, ListRequest, LoadRequest, Loaded, REMEMBERED_VERSIONS, Record, Store,
    Timestamp, Write, decide,
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
    /// The last accepted versions, newest first.
    accepted: Vec<Version>,
}

/// A line of the file, which holds one record.
#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    version: i64,
    expires_at: i64,
    value: Option<Box<RawValue>>,
    user: Option<String>,
    metadata: Box<RawValue>,
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
            accept(&mut entries, line.record()?);
        }
        let clock = Clock::new();
        // Expiry follows the store's clock (I17). This store's clock is the local one, so it is correct by definition.
        let now = Instant::now();
        clock.correct(now, now, clock.now());
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
fn accept(entries: &mut BTreeMap<Key, Entry>, record: Record) {
    let mut accepted = entries.get(&record.key).map_or(Vec::new(), |entry| entry.accepted.clone());
    accepted.insert(0, record.version);
    accepted.truncate(REMEMBERED_VERSIONS);
    entries.insert(record.key.clone(), Entry { record: Arc::new(record), accepted });
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
            let accepted = new.get(key).map_or(&[][..], |entry| &entry.accepted);
            let decision = decide(write, accepted, &self.clock);
            if decision.is_none() {
                lines += &Line::of(&write.record)?;
                accept(&mut new, Record::clone(&write.record));
            }
            results.push(decision.unwrap_or(Applied::Stored));
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

    // The journal keeps expired records. A real one rewrites its file from time to time.
    async fn purge(&self, _: usize) -> Result<usize> {
        Ok(0)
    }

    async fn probe(&self) -> Result<()> {
        Ok(())
    }
}

impl Line {
    fn of(record: &Record) -> Result<String> {
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
        };
        // A value may contain newlines between its tokens, and a line of the journal must not.
        let line = serde_json::to_string(&line).map_err(|error| failed("written", error))?;
        Ok(line.replace(['\n', '\r'], " ") + "\n")
    }

    fn record(self) -> Result<Record> {
        Ok(Record {
            key: Key::new(self.key)?,
            version: Version::from_raw(self.version),
            expires_at: Timestamp(self.expires_at),
            value: self.value.map(|value| Json::new(value.get())).transpose()?,
            user: self.user.map(Into::into),
            metadata: Json::new(self.metadata.get())?,
        })
    }
}

fn failed(action: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::LocalStorage, format!("the journal cannot be {action}: {error}")).with_source(error)
}
