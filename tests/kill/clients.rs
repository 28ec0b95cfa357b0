//! Clients that talk all the time, remember what they were told, and look whether it is true.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fastrand::Rng;
use serde::Deserialize;

use crate::ledger::{Conversation, Fate, Ledger, Turn};
use crate::oracle::{Message, judge_read};
use crate::process::{self, Answer};

/// Conversations that two clients share, and those that one has for itself, and may delete.
const SHARED: usize = 8;
const OWN: usize = 4;
/// After so many turns, at most, a conversation is left and another one started.
const LONGEST: usize = 150;

/// What everybody knows.
pub struct World {
    pub daemon: process::Client,
    pub kills: AtomicUsize,
    over: AtomicBool,
    ledger: Mutex<Ledger>,
}

impl World {
    pub fn new(daemon: process::Client) -> Arc<Self> {
        let (kills, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        Arc::new(Self { daemon, kills, over, ledger: Mutex::default() })
    }

    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap()
    }

    /// No client begins anything any more.
    pub fn end(&self) {
        self.over.store(true, SeqCst);
    }

    /// Takes a complaint down, unless somebody made the same before.
    pub fn complain(&self, what: String) {
        let kills = self.kills.load(SeqCst);
        let complaints = &mut self.ledger().complaints;
        if !complaints.iter().any(|known| known.ends_with(&what)) {
            complaints.push(format!("after {kills} kills: {what}"));
        }
    }

    /// Reads a conversation and holds the answer against what had been acknowledged before it was asked for.
    pub async fn read(&self, id: &str) -> Option<Vec<Message>> {
        let known = self.ledger().known(id);
        let kind = match self.daemon.try_request("GET", &format!("/conversations/{id}"), None).await {
            Err(error) => return self.note_lost("GET", id, &error),
            Ok(answer) if answer.status == 200 => return Some(self.take_in(id, &known, &answer)),
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

    fn take_in(&self, id: &str, known: &Conversation, answer: &Answer) -> Vec<Message> {
        let freshness = answer.body["freshness"].as_str().unwrap_or("of unknown freshness").to_owned();
        let messages = Vec::<Message>::deserialize(&answer.body["messages"]).unwrap_or_default();
        for wrong in judge_read(known, &messages) {
            self.complain(format!("a {freshness} read: {id} {wrong}"));
        }
        self.count_read(&freshness);
        messages
    }

    fn count_read(&self, kind: &str) {
        *self.ledger().counts.reads.entry(kind.to_owned()).or_default() += 1;
    }

    /// A 404 says that there is no such conversation, and that must be so.
    fn check_absence(&self, id: &str, known: &Conversation, answer: &Answer) {
        if known.fate == Fate::Kept && !known.turns.is_empty() {
            self.complain(format!("{id} has {} acknowledged turns: {answer:?}", known.turns.len()));
        }
    }

    /// Unavailable, or too busy: no other failure is one of the weather.
    fn check_failure(&self, id: &str, answer: &Answer) {
        if answer.status != 503 && answer.status != 409 {
            self.complain(format!("{id}: {answer:?}"));
        }
    }

    /// A kill cuts connections, but the daemon answers while it lives.
    fn note_lost<T>(&self, what: &str, id: &str, error: &reqwest::Error) -> Option<T> {
        if error.is_timeout() {
            self.complain(format!("{what} {id} was never answered"));
        }
        None
    }
}

/// Where the present conversation of one or two clients is.
type Place = Arc<Mutex<Option<String>>>;

struct Client {
    world: Arc<World>,
    number: usize,
    rng: Rng,
    said: usize,
    place: Place,
    is_alone: bool,
    /// All conversations it took part in.
    past: Vec<String>,
}

/// Everybody who talks, on a seed.
pub fn spawn_all(world: &Arc<World>, seed: u64) -> tokio::task::JoinSet<()> {
    let mut rng = Rng::with_seed(seed);
    let places = (0..SHARED + OWN).map(|_| Place::default());
    let seats = places.enumerate().flat_map(|(at, place)| {
        let is_alone = at >= SHARED;
        std::iter::repeat_n((place, is_alone), if is_alone { 1 } else { 2 })
    });
    let clients = seats.enumerate().map(|(number, (place, is_alone))| Client {
        world: Arc::clone(world),
        number,
        rng: rng.fork(),
        said: 0,
        place,
        is_alone,
        past: Vec::new(),
    });
    clients.map(Client::live).collect()
}

impl Client {
    async fn live(mut self) {
        while !self.world.over.load(SeqCst) {
            self.act().await;
            // They are people, and the load is to last the whole test.
            tokio::time::sleep(Duration::from_millis(self.rng.u64(0..100))).await;
        }
    }

    async fn act(&mut self) {
        let present = self.place.lock().unwrap().clone();
        match (present, self.rng.u32(0..100)) {
            (None, _) | (_, 0) => self.start().await,
            (Some(id), 1..5) if self.is_alone => self.delete(&id).await,
            (_, 5..10) if !self.past.is_empty() => self.look_back().await,
            (Some(id), 10..15) => drop(self.world.read(&id).await),
            (Some(id), _) => self.go_on(&id).await,
        }
    }

    async fn start(&mut self) {
        if let Some(id) = self.say(None).await {
            self.world.ledger().counts.started += 1;
            *self.place.lock().unwrap() = Some(id);
        }
    }

    async fn go_on(&mut self, id: &str) {
        if self.say(Some(id)).await.is_some() && self.rng.bool() {
            self.world.read(id).await;
        }
        if self.rng.usize(0..LONGEST) == 0 {
            self.leave(id);
        }
    }

    /// An old conversation: memory may not have it any more.
    async fn look_back(&mut self) {
        let id = self.past[self.rng.usize(..self.past.len())].clone();
        self.world.read(&id).await;
    }

    fn leave(&self, id: &str) {
        let mut place = self.place.lock().unwrap();
        if place.as_deref() == Some(id) {
            *place = None;
        }
    }

    /// Says something that was never said before; the id of the conversation if it was acknowledged.
    async fn say(&mut self, id: Option<&str>) -> Option<String> {
        self.said += 1;
        let text = format!("{}/{}", self.number, self.said);
        let known = id.map(|id| self.world.ledger().known(id)).unwrap_or_default();
        let name = id.unwrap_or("a new conversation");
        match self.world.daemon.try_chat(&text, id).await {
            Ok(answer) if answer.status == 200 => return Some(self.acknowledged(text, &answer)),
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
                self.world.note_lost::<()>("POST", name, &error);
                self.world.ledger().counts.unknown += 1;
            }
        }
        None
    }

    fn acknowledged(&mut self, text: String, answer: &Answer) -> String {
        let id = answer.id();
        let turn = Turn {
            client: self.number,
            text,
            place: place(answer).unwrap_or_default(),
            durability: answer.body["durability"].as_str().unwrap_or_default().to_owned(),
            kills: self.world.kills.load(SeqCst),
        };
        self.world.ledger().acknowledge(&id, turn);
        if self.past.last() != Some(&id) {
            self.past.push(id.clone());
        }
        id
    }

    /// Deletes the conversation and turns to another one, whatever became of it.
    async fn delete(&mut self, id: &str) {
        self.leave(id);
        let known = self.world.ledger().known(id);
        let fate = match self.world.daemon.try_request("DELETE", &format!("/conversations/{id}"), None).await
        {
            Ok(answer) if answer.status == 204 => Fate::Deleted,
            Ok(answer) if answer.status == 404 => {
                self.world.check_absence(id, &known, &answer);
                Fate::Kept
            }
            Ok(answer) => {
                self.world.check_failure(id, &answer);
                Fate::MayBeGone
            }
            Err(error) if error.is_connect() => Fate::Kept,
            Err(error) => {
                self.world.note_lost::<()>("DELETE", id, &error);
                Fate::MayBeGone
            }
        };
        self.world.ledger().counts.deleted += usize::from(fate == Fate::Deleted);
        self.world.ledger().doom(id, fate);
    }
}

/// Which turn of its conversation this answers.
fn place(answer: &Answer) -> Option<usize> {
    let reply = answer.body["reply"].as_str()?.strip_prefix("This is turn ")?;
    reply.split('.').next()?.parse().ok()
}
