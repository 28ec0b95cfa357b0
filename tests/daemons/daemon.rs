//! The daemon process: tasks that append and update, and log each acknowledgement.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use fastrand::Rng;
use serde::{Deserialize, Serialize};
use threadkeep::{Cache, Error, WriteOutcome};

use crate::log::{Ack, Line, Log};
use crate::{CONVERSATIONS, key};

const TASKS: usize = 6;
const MAX_PAUSE: Duration = Duration::from_millis(60);

/// A conversation. Appends and updates add a text each, and updates also count.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Document {
    #[serde(default)]
    pub messages: Vec<String>,
    #[serde(default)]
    pub updates: usize,
}

/// What the test tells a daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Orders {
    pub number: usize,
    pub directory: PathBuf,
    pub url: String,
    pub secret: String,
    pub appends: usize,
    pub updates: usize,
}

struct Daemon {
    orders: Orders,
    cache: Cache,
    log: Log,
    /// The prefix of each text of this process.
    name: String,
    sent: AtomicUsize,
}

/// Runs until the share of this daemon is acknowledged and its queue is empty.
pub async fn run(orders: Orders) {
    let log = Log::open(&orders.directory);
    let life = log.lines().iter().filter(|line| **line == Line::Start).count();
    let builder = Cache::builder().supabase(&orders.url, &orders.secret);
    let builder = builder.queue(orders.directory.join("queue.db")).fresh_for(Duration::from_secs(1));
    let builder = builder.timeout(Duration::from_secs(1)).soft_timeout(Duration::from_millis(300));
    let cache = builder.open().await.unwrap();
    let name = format!("{}.{life}", orders.number);
    let daemon = Arc::new(Daemon { orders, cache, log, name, sent: AtomicUsize::new(0) });
    let work = |_| {
        let daemon = Arc::clone(&daemon);
        async move {
            let mut rng = Rng::new();
            while daemon.write(&mut rng).await {
                tokio::time::sleep(MAX_PAUSE.mul_f64(rng.f64())).await;
            }
        }
    };
    (0..TASKS).map(work).collect::<tokio::task::JoinSet<()>>().join_all().await;
    daemon.log.add(Line::Finished);
    daemon.finish().await;
}

impl Daemon {
    /// Makes one write. Returns false if the share is done.
    async fn write(&self, rng: &mut Rng) -> bool {
        let (appends, updates) = self.left();
        if appends + updates == 0 {
            return false;
        }
        let is_update = rng.usize(..appends + updates) >= appends;
        let (kind, number) = (if is_update { "u" } else { "a" }, self.sent.fetch_add(1, Relaxed));
        let (text, key) = (format!("{kind}.{}.{number}", self.name), key(rng.usize(..CONVERSATIONS)));
        let earlier = self.log.lines().len();
        let written = match is_update {
            true => self.update(&key, &text).await,
            false => self.cache.append(&key, &[&text]).at("messages").await.map(|appended| appended.outcome),
        };
        match written {
            Ok(outcome @ (WriteOutcome::Stored | WriteOutcome::Queued)) => {
                let is_queued = outcome == WriteOutcome::Queued;
                self.log.add(Line::Done(Ack { key: key.clone(), text, is_queued, earlier }));
                if rng.u32(..4) == 0 {
                    self.check_read(&key).await;
                }
            }
            Ok(outcome) => {
                self.log.add(Line::Fault(format!("{outcome:?} is the outcome of {text} on {key}")))
            }
            Err(error) if !error.outcome_unknown() => self.log.add(Line::Refused(text)),
            Err(_) => {}
        }
        true
    }

    /// Returns the numbers of appends and updates that are not acknowledged yet.
    fn left(&self) -> (usize, usize) {
        let lines = self.log.lines();
        let count = |of_updates: bool| {
            let is_counted = |line: &&Line| matches!(line, Line::Done(ack) if ack.is_update() == of_updates);
            lines.iter().filter(is_counted).count()
        };
        (self.orders.appends.saturating_sub(count(false)), self.orders.updates.saturating_sub(count(true)))
    }

    async fn update(&self, key: &str, text: &str) -> Result<WriteOutcome, Error> {
        let change = |found: Option<Document>| {
            let mut document = found.unwrap_or_default();
            document.messages.push(text.to_owned());
            document.updates += 1;
            Ok(Some(document))
        };
        self.cache.update(key, change).await
    }

    /// A read shows each own text that was acknowledged before it. A queued update may lose against another daemon.
    async fn check_read(&self, key: &str) {
        let is_own = |ack: &&Ack| ack.key == key && !(ack.is_queued && ack.is_update());
        let done = |line: &Line| if let Line::Done(ack) = line { Some(ack.clone()) } else { None };
        let known: Vec<Ack> = self.log.lines().iter().filter_map(done).filter(|ack| is_own(&ack)).collect();
        let found = match self.cache.get(key).await {
            Ok(Some(found)) => found,
            Ok(None) => return self.log.add(Line::Fault(format!("{key} is absent for its writer"))),
            Err(_) => return,
        };
        let messages = found.decode::<Document>().unwrap().messages;
        for ack in known {
            let count = messages.iter().filter(|text| **text == ack.text).count();
            if count != 1 {
                let freshness = found.freshness();
                self.log.add(Line::Fault(format!("a read ({freshness:?}) has {count} times {ack:?}")));
            }
        }
    }

    async fn finish(&self) {
        while self.cache.health().queue.is_none_or(|queue| queue.records > 0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut buried = BTreeSet::new();
        for letter in self.cache.dead_letters().await.unwrap() {
            let value = letter.record.value.as_ref().map_or("[]", |value| value.as_str());
            match serde_json::from_str(value).unwrap() {
                Dead::Items(items) => items.into_iter().for_each(|text| self.log.add(Line::Dead(text))),
                Dead::Document(mut document) => {
                    document.messages.pop().into_iter().for_each(|text| self.log.add(Line::Dead(text)));
                    let is_own = |text: &String| text.starts_with(&format!("u.{}.", self.orders.number));
                    buried.extend(document.messages.into_iter().filter(is_own));
                }
            }
        }
        buried.into_iter().for_each(|text| self.log.add(Line::Buried(text)));
        self.cache.shutdown(Duration::from_secs(10)).await.unwrap();
    }
}

/// The value of a dead letter.
#[derive(Deserialize)]
#[serde(untagged)]
enum Dead {
    Items(Vec<String>),
    Document(Document),
}

/// Ends this process with its parent, also if the parent was killed.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
        std::process::exit(1);
    });
}

/// Starts the daemon in a process of its own.
pub fn spawn(orders: &Orders, entry: &str) -> tokio::process::Child {
    let output = |name| {
        let path: &Path = &orders.directory.join(name);
        std::fs::File::options().create(true).append(true).open(path).unwrap()
    };
    tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", entry, "--ignored", "--nocapture"])
        .env("DAEMON_ORDERS", serde_json::to_string(orders).unwrap())
        .stdin(std::process::Stdio::piped())
        .stdout(output("output"))
        .stderr(output("output"))
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}
