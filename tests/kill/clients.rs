//! Clients that send turns, record each response in the ledger, and check each read against the ledger.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fastrand::Rng;
use serde::Deserialize;

use crate::ledger::{AcknowledgedTurn, Conversation, Deletion, Ledger};
use crate::oracle::{Message, judge_read};
use crate::process::{self, Answer};

/// Number of conversations that two clients share.
const SHARED_CONVERSATIONS: usize = 8;
/// Number of conversations with one client. That client may delete its conversation.
const EXCLUSIVE_CONVERSATIONS: usize = 4;
/// A client leaves its conversation after this number of turns on average, and starts another one.
const MEAN_TURNS: usize = 150;

/// The state that all clients share.
pub struct World {
    pub daemon: process::Client,
    pub kills: AtomicUsize,
    is_stopped: AtomicBool,
    ledger: Mutex<Ledger>,
}

impl World {
    pub fn new(daemon: process::Client) -> Arc<Self> {
        let kills = AtomicUsize::new(0);
        Arc::new(Self { daemon, kills, is_stopped: AtomicBool::new(false), ledger: Mutex::default() })
    }

    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap()
    }

    /// Stops the clients: no client begins another action.
    pub fn stop(&self) {
        self.is_stopped.store(true, SeqCst);
    }

    /// Records a violation, unless the ledger contains the same one.
    pub fn report(&self, violation: String) {
        let kills = self.kills.load(SeqCst);
        let violations = &mut self.ledger().violations;
        if !violations.iter().any(|known| known.ends_with(&violation)) {
            violations.push(format!("after {kills} kills: {violation}"));
        }
    }

    /// Reads a conversation and checks the response against the turns acknowledged before the request.
    pub async fn read(&self, id: &str) -> Option<Vec<Message>> {
        let (known, kills) = (self.ledger().known(id), self.kills.load(SeqCst));
        let kind = match self.daemon.try_request("GET", &format!("/conversations/{id}"), None).await {
            Err(error) => return self.check_lost("GET", id, kills, &error),
            Ok(answer) if answer.status == 200 => return Some(self.check_messages(id, &known, &answer)),
            Ok(answer) if answer.status == 404 => {
                self.check_absence(id, &known, &answer);
                "absent"
            }
            Ok(answer) => {
                self.check_failure(id, &answer);
                "unavailable"
            }
        };
        self.count_read(kind);
        None
    }

    fn check_messages(&self, id: &str, known: &Conversation, answer: &Answer) -> Vec<Message> {
        let freshness = answer.body["freshness"].as_str().unwrap_or("of unknown freshness").to_owned();
        let messages = Vec::<Message>::deserialize(&answer.body["messages"]).unwrap_or_default();
        for fault in judge_read(known, &messages) {
            self.report(format!("a {freshness} read: {id} {fault}"));
        }
        self.count_read(&freshness);
        messages
    }

    fn count_read(&self, kind: &str) {
        *self.ledger().counts.reads.entry(kind.to_owned()).or_default() += 1;
    }

    /// Checks a 404: the conversation has no acknowledged turn, or a client tried to delete it.
    fn check_absence(&self, id: &str, known: &Conversation, answer: &Answer) {
        if known.deletion == Deletion::None && !known.turns.is_empty() {
            self.report(format!("{id} has {} acknowledged turns: {answer:?}", known.turns.len()));
        }
    }

    /// Checks an error status. The network causes only 503 (unavailable) and 409 (conflict).
    fn check_failure(&self, id: &str, answer: &Answer) {
        if answer.status != 503 && answer.status != 409 {
            self.report(format!("{id}: {answer:?}"));
        }
    }

    /// Checks a lost response. A daemon that was not killed since the request, when `kills` was the number of kills, answers.
    ///
    /// After a kill, even a timeout proves nothing. On a busy machine a request sometimes stays in the HTTP client until its timeout,
    /// although its connection has ended: after 8 s all sockets of the client were those of later requests.
    fn check_lost<T>(&self, method: &str, id: &str, kills: usize, error: &reqwest::Error) -> Option<T> {
        if error.is_timeout() && kills == self.kills.load(SeqCst) {
            self.report(format!("{method} {id} got no response: {error:?}"));
        }
        None
    }
}

/// The id of the current conversation of one or two clients.
type CurrentId = Arc<Mutex<Option<String>>>;

struct Client {
    world: Arc<World>,
    number: usize,
    rng: Rng,
    sent: usize,
    current: CurrentId,
    is_exclusive: bool,
    /// Every conversation in which the client has a turn.
    past: Vec<String>,
}

/// Spawns all clients with random numbers from a seed.
pub fn spawn_all(world: &Arc<World>, seed: u64) -> tokio::task::JoinSet<()> {
    let mut rng = Rng::with_seed(seed);
    let conversations = (0..SHARED_CONVERSATIONS + EXCLUSIVE_CONVERSATIONS).map(|_| CurrentId::default());
    let seats = conversations.enumerate().flat_map(|(at, current)| {
        let is_exclusive = at >= SHARED_CONVERSATIONS;
        std::iter::repeat_n((current, is_exclusive), if is_exclusive { 1 } else { 2 })
    });
    let clients = seats.enumerate().map(|(number, (current, is_exclusive))| Client {
        world: Arc::clone(world),
        number,
        rng: rng.fork(),
        sent: 0,
        current,
        is_exclusive,
        past: Vec::new(),
    });
    clients.map(Client::run).collect()
}

impl Client {
    async fn run(mut self) {
        while !self.world.is_stopped.load(SeqCst) {
            self.act().await;
            // The pause models a user, and it keeps the load even for the whole test.
            tokio::time::sleep(Duration::from_millis(self.rng.u64(0..100))).await;
        }
    }

    async fn act(&mut self) {
        let current = self.current.lock().unwrap().clone();
        match (current, self.rng.u32(0..100)) {
            (None, _) | (_, 0) => self.start().await,
            (Some(id), 1..5) if self.is_exclusive => self.delete(&id).await,
            (_, 5..10) if !self.past.is_empty() => self.read_past().await,
            (Some(id), 10..15) => drop(self.world.read(&id).await),
            (Some(id), _) => self.add_turn(&id).await,
        }
    }

    async fn start(&mut self) {
        if let Some(id) = self.send(None).await {
            self.world.ledger().counts.started += 1;
            *self.current.lock().unwrap() = Some(id);
        }
    }

    async fn add_turn(&mut self, id: &str) {
        if self.send(Some(id)).await.is_some() && self.rng.bool() {
            self.world.read(id).await;
        }
        if self.rng.usize(0..MEAN_TURNS) == 0 {
            self.leave(id);
        }
    }

    /// Reads an old conversation. Memory may have evicted it.
    async fn read_past(&mut self) {
        let id = self.past[self.rng.usize(..self.past.len())].clone();
        self.world.read(&id).await;
    }

    fn leave(&self, id: &str) {
        let mut current = self.current.lock().unwrap();
        if current.as_deref() == Some(id) {
            *current = None;
        }
    }

    /// Sends a turn with a unique text. Returns the id of the conversation if the daemon acknowledged the turn.
    async fn send(&mut self, id: Option<&str>) -> Option<String> {
        self.sent += 1;
        let text = format!("{}/{}", self.number, self.sent);
        let known = id.map(|id| self.world.ledger().known(id)).unwrap_or_default();
        let kills = self.world.kills.load(SeqCst);
        let name = id.unwrap_or("a new conversation");
        match self.world.daemon.try_chat(&text, id).await {
            Ok(answer) if answer.status == 200 => {
                return Some(self.acknowledge(text, known.turns.len(), &answer));
            }
            Ok(answer) if answer.status < 500 => {
                match answer.status {
                    404 => self.world.check_absence(name, &known, &answer),
                    _ => self.world.check_failure(name, &answer),
                }
                self.world.ledger().refuse(text);
            }
            Ok(answer) => {
                self.world.check_failure(name, &answer);
                self.world.ledger().counts.unknown += 1;
            }
            Err(error) if error.is_connect() => self.world.ledger().refuse(text),
            Err(error) => {
                self.world.check_lost::<()>("POST", name, kills, &error);
                self.world.ledger().counts.unknown += 1;
            }
        }
        None
    }

    fn acknowledge(&mut self, text: String, earlier: usize, answer: &Answer) -> String {
        let id = answer.id();
        let turn = AcknowledgedTurn {
            text,
            answer: answer.body["reply"].as_str().unwrap_or_default().to_owned(),
            earlier,
            durability: answer.body["durability"].as_str().unwrap_or_default().to_owned(),
            kills: self.world.kills.load(SeqCst),
        };
        self.world.ledger().acknowledge(&id, turn);
        if self.past.last() != Some(&id) {
            self.past.push(id.clone());
        }
        id
    }

    /// Deletes the conversation. The client then takes another conversation, also after a failure.
    async fn delete(&mut self, id: &str) {
        self.leave(id);
        let (known, kills) = (self.world.ledger().known(id), self.world.kills.load(SeqCst));
        let deletion =
            match self.world.daemon.try_request("DELETE", &format!("/conversations/{id}"), None).await {
                Ok(answer) if answer.status == 204 => Deletion::Acknowledged,
                Ok(answer) if answer.status == 404 => {
                    self.world.check_absence(id, &known, &answer);
                    Deletion::None
                }
                Ok(answer) => {
                    self.world.check_failure(id, &answer);
                    Deletion::Unknown
                }
                Err(error) if error.is_connect() => Deletion::None,
                Err(error) => {
                    self.world.check_lost::<()>("DELETE", id, kills, &error);
                    Deletion::Unknown
                }
            };
        self.world.ledger().counts.deleted += usize::from(deletion == Deletion::Acknowledged);
        self.world.ledger().set_deletion(id, deletion);
    }
}
