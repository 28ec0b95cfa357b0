//! The routes: conversations are documents that grow by a turn with each message.

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use threadkeep::{Cache, Durability, Error, Freshness};

use crate::reply::{Failure, not_found};

/// A conversation as it is kept.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Conversation {
    messages: Vec<Message>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Message {
    role: String,
    content: String,
}

#[derive(Debug, Deserialize)]
struct Chat {
    message: String,
    continuation_id: Option<String>,
    user_id: Option<String>,
}

impl Conversation {
    /// Appends a message and the answer to it.
    fn turn(&mut self, message: &str) -> String {
        let answer = respond(message, self);
        for (role, content) in [("user", message), ("assistant", &answer)] {
            self.messages.push(Message { role: role.into(), content: content.into() });
        }
        answer
    }
}

type Reply = Result<Json<Value>, Failure>;

pub fn routes() -> Router<Cache> {
    Router::new().route("/chat", post(chat)).route("/conversations/{id}", get(conversation).delete(forget))
}

/// Appends a turn, by compare-and-set: concurrent turns of one conversation are all kept.
async fn chat(State(cache): State<Cache>, body: Result<Json<Chat>, JsonRejection>) -> Reply {
    let Json(chat) = body?;
    let Some(id) = chat.continuation_id.clone() else { return begin(&cache, &chat).await };
    let mut answer = String::new();
    let update = cache.update(&id, |current: Option<Conversation>| {
        let mut conversation = current.ok_or_else(|| Error::aborted(not_found(&id)))?;
        answer = conversation.turn(&chat.message);
        Ok(Some(conversation))
    });
    let durability = match &chat.user_id {
        Some(user) => update.user(user).await?,
        None => update.await?,
    };
    Ok(turn(&id, &answer, durability))
}

/// A new conversation is put: nobody else can have its id, so there is nothing to compare with, also in an outage.
async fn begin(cache: &Cache, chat: &Chat) -> Reply {
    let id = uuid::Uuid::new_v4().to_string();
    let mut conversation = Conversation::default();
    let answer = conversation.turn(&chat.message);
    let put = cache.put(&id, &conversation);
    let durability = match &chat.user_id {
        Some(user) => put.user(user).await?,
        None => put.await?,
    };
    Ok(turn(&id, &answer, durability))
}

fn turn(id: &str, answer: &str, durability: Durability) -> Json<Value> {
    if durability == Durability::Superseded {
        tracing::warn!(%id, "another daemon wrote this conversation at the same time");
    }
    let durability = format!("{durability:?}").to_lowercase();
    Json(json!({ "reply": answer, "continuation_id": id, "durability": durability }))
}

/// What a model would do.
fn respond(message: &str, before: &Conversation) -> String {
    let turn = before.messages.iter().filter(|message| message.role == "user").count() + 1;
    match before.messages.iter().rev().find(|message| message.role == "user") {
        None => format!("This is turn {turn}. You said: {message}"),
        Some(last) => format!("This is turn {turn}. You said: {message} (before that: {})", last.content),
    }
}

async fn conversation(State(cache): State<Cache>, Path(id): Path<String>) -> Reply {
    let found = cache.get(&id).await?.ok_or_else(|| Failure::not_found(&id))?;
    let conversation: Conversation = found.decode()?;
    let mut body = json!({ "continuation_id": id, "freshness": "fresh", "messages": conversation.messages });
    match found.freshness() {
        Freshness::Stale { age } => {
            body["freshness"] = "stale".into();
            body["age_seconds"] = age.as_secs().into();
        }
        Freshness::Queued => body["freshness"] = "queued".into(),
        _ => {}
    }
    Ok(Json(body))
}

async fn forget(State(cache): State<Cache>, Path(id): Path<String>) -> Result<StatusCode, Failure> {
    let is_there =
        |current: Option<Value>| current.map(|_| None).ok_or_else(|| Error::aborted(not_found(&id)));
    let _ = cache.update(&id, is_there).await?;
    Ok(StatusCode::NO_CONTENT)
}
