//! Clients that append to, read, delete and abandon conversations at an even rate.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fastrand::Rng;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::process::{Answer, Client, Daemon};

const CLIENTS: usize = 12;
const INTERVAL: Duration = Duration::from_millis(40);
const TURNS: usize = 12;

/// Counts of the responses, and the unexpected responses.
#[derive(Debug, Default, Clone)]
pub struct Counts {
    requests: usize,
    stored: usize,
    queued: usize,
    stale: usize,
    unavailable: usize,
    pub complaints: Vec<String>,
}

pub struct Load {
    counts: Arc<Mutex<Counts>>,
    stop: watch::Sender<bool>,
    clients: JoinSet<()>,
}

impl Load {
    pub fn start(daemon: &Daemon) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (counts, mut clients) = (Arc::<Mutex<Counts>>::default(), JoinSet::new());
        for _ in 0..CLIENTS {
            let user = SimulatedUser {
                client: daemon.clone_client(),
                counts: Arc::clone(&counts),
                stopped: stopped.clone(),
                rng: Rng::new(),
            };
            clients.spawn(user.run());
        }
        Self { counts, stop, clients }
    }

    pub async fn end(self) -> Counts {
        self.stop.send_replace(true);
        self.clients.join_all().await;
        self.counts.lock().unwrap().clone()
    }
}

struct SimulatedUser {
    client: Client,
    counts: Arc<Mutex<Counts>>,
    stopped: watch::Receiver<bool>,
    rng: Rng,
}

impl SimulatedUser {
    async fn run(mut self) {
        while !*self.stopped.borrow() {
            self.converse().await;
        }
    }

    /// Runs one conversation. Half of the conversations end with a delete.
    async fn converse(&mut self) {
        let words = "word ".repeat(self.rng.usize(1..100));
        let first = self.client.chat(&words, None).await;
        self.record("begin", &first);
        if first.status != 200 {
            return;
        }
        let id = first.id();
        for _ in 0..self.rng.usize(..TURNS) {
            tokio::time::sleep(INTERVAL).await;
            let answer = match self.rng.u8(..4) {
                0 => self.client.chat(&words, Some(&id)).await,
                1 => self.client.get("nobody has this one").await,
                _ => self.client.get(&id).await,
            };
            self.record(&id, &answer);
        }
        if self.rng.bool() {
            let answer = self.client.delete(&id).await;
            self.record(&id, &answer);
        }
    }

    /// Counts a response. Only the unknown conversation may give 404. An outage gives 503.
    fn record(&self, id: &str, answer: &Answer) {
        let is_unknown = answer.body["error"].as_str().is_some_and(|error| error.contains("nobody has"));
        let mut counts = self.counts.lock().unwrap();
        counts.requests += 1;
        counts.stored += usize::from(answer.body["durability"] == "stored");
        counts.queued += usize::from(answer.body["durability"] == "queued");
        counts.stale += usize::from(answer.body["freshness"] == "stale");
        counts.unavailable += usize::from(answer.status == 503);
        match answer.status {
            200 | 204 | 503 => {}
            404 if is_unknown => {}
            _ => counts.complaints.push(format!("{id}: {answer:?}")),
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, stored, queued, stale, unavailable, complaints } = self;
        write!(
            f,
            "{requests} requests: {stored} turns stored, {queued} queued, {stale} reads stale, {unavailable} times 503, \
             {} complaints",
            complaints.len()
        )
    }
}
