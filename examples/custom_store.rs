//! A source of truth of one's own, put to the contract: `cargo run --features testing --example custom_store`.
//!
//! A journal: a file to which each accepted write adds a line, which is read when it is opened. What a store may accept is not
//! for it to decide: that is [`judge`]'s.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use threadkeep::testing::conformance;
use threadkeep::{
    ACCEPTED, Applied, Cache, Clock, Durability, Error, ErrorKind, Json, Key, Loaded, Page, Recent, Record,
    Result, Store, Timestamp, Version, Want, Write, judge,
};

#[tokio::main]
async fn main() -> Result<()> {
    let path = std::env::temp_dir().join(format!("threadkeep-journal-{}", std::process::id()));
    conformance(Arc::new(Journal::open(&path)?)).await;
    println!("the journal keeps the contract");

    let cache = Cache::builder().store(Journal::open(&path)?).open().await?;
    assert_eq!(cache.put("thread-1", &["hello"]).await?, Durability::Stored);
    let after_a_restart = Cache::builder().store(Journal::open(&path)?).open().await?;
    let found = after_a_restart.get("thread-1").await?;
    println!("after a restart: {}", found.as_ref().map_or("nothing", |found| found.json()));
    assert!(found.is_some());
    std::fs::remove_file(&path).map_err(|error| failed("removed", error))
}

#[derive(Debug)]
struct Journal {
    clock: Arc<Clock>,
    threads: Mutex<Threads>,
}

#[derive(Debug)]
struct Threads {
    file: File,
    held: BTreeMap<Key, Thread>,
}

#[derive(Debug, Clone)]
struct Thread {
    record: Arc<Record>,
    /// The last versions that were accepted, newest first.
    accepted: Vec<Version>,
}

/// A record as a line of the file.
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
        let mut held = BTreeMap::new();
        // A last line without an end was never acknowledged.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64).map_err(|error| failed("written", error))?;
        for line in text[..whole].lines() {
            let line: Line = serde_json::from_str(line).map_err(|error| failed("understood", error))?;
            accept(&mut held, line.record()?);
        }
        let clock = Clock::new();
        // It is the truth about time, too.
        let now = Instant::now();
        clock.correct(now, now, clock.at(now));
        held.values().for_each(|thread| clock.advance(thread.record.version));
        Ok(Self { clock: clock.into(), threads: Mutex::new(Threads { file, held }) })
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_up(&self, want: &Want) -> Loaded {
        match self.threads().held.get(&want.key).map(|thread| &thread.record) {
            None => Loaded::Absent(Version::NONE),
            Some(record) if !record.is_live(self.clock.now()) => Loaded::Absent(record.version),
            Some(record) if want.known == Some(record.version) => Loaded::Same,
            Some(record) => Loaded::Found(Arc::clone(record)),
        }
    }
}

/// Several writes of one key may come in one call: each finds the one before.
fn accept(held: &mut BTreeMap<Key, Thread>, record: Record) {
    let mut accepted = held.get(&record.key).map_or(Vec::new(), |thread| thread.accepted.clone());
    accepted.insert(0, record.version);
    accepted.truncate(ACCEPTED);
    held.insert(record.key.clone(), Thread { record: Arc::new(record), accepted });
}

impl Threads {
    /// What was not synced is not held.
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

    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        Ok(wants.iter().map(|want| self.look_up(want)).collect())
    }

    /// A store with more to do would do it on a thread for blocking work.
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let mut threads = self.threads();
        let (mut new, mut lines, mut answers) = (BTreeMap::new(), String::new(), Vec::new());
        for write in writes {
            let key = &write.record.key;
            if let (false, Some(thread)) = (new.contains_key(key), threads.held.get(key)) {
                new.insert(key.clone(), Thread::clone(thread));
            }
            let accepted = new.get(key).map_or(&[][..], |thread| &thread.accepted);
            let verdict = judge(write, accepted, &self.clock);
            if verdict.is_none() {
                lines += &Line::of(&write.record)?;
                accept(&mut new, Record::clone(&write.record));
            }
            answers.push(verdict.unwrap_or(Applied::Stored));
        }
        threads.append(&lines)?;
        threads.held.extend(new);
        Ok(answers)
    }

    async fn recent(&self, page: &Page) -> Result<Recent> {
        let now = self.clock.now();
        let is_wanted = |record: &&Arc<Record>| {
            let is_after = |(version, key): &(Version, Key)| (record.version, &record.key) < (*version, key);
            let is_theirs = |user: &Arc<str>| record.user.as_ref() == Some(user);
            record.is_live(now)
                && page.user.as_ref().is_none_or(is_theirs)
                && page.after.as_ref().is_none_or(is_after)
        };
        let threads = self.threads();
        let mut newest: Vec<_> =
            threads.held.values().map(|thread| &thread.record).filter(is_wanted).collect();
        newest.sort_unstable_by_key(|record| std::cmp::Reverse((record.version, &record.key)));
        let is_last = newest.len() <= page.most;
        let records = newest.into_iter().take(page.most).map(|record| Record::clone(record)).collect();
        Ok(Recent { records, is_last })
    }

    async fn touch(&self, _: &[Key]) -> Result<()> {
        Ok(())
    }

    /// A journal forgets nothing; one that should would be written anew now and then.
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
        // JSON on one line: a value may have been written on many.
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

fn failed(what: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Local, format!("the journal cannot be {what}: {error}")).with_source(error)
}
