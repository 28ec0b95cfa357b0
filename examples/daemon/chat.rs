//! The routes of conversations. A conversation is a document, and each message appends a turn.

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use threadkeep::{Cache, Error, Freshness, WriteOutcome};

use crate::reply::{Failure, not_found};

/// The stored document.
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
    /// Answers a message. Returns both as new messages, and the answer.
    fn turn(&self, message: &str) -> ([Message; 2], String) {
        let answer = respond(message, self);
        let new = [("user", message), ("assistant", &answer)];
        (new.map(|(role, content)| Message { role: role.into(), content: content.into() }), answer)
    }
}

type Reply = Result<Json<Value>, Failure>;

pub fn routes() -> Router<Cache> {
    Router::new().route("/chat", post(chat)).route("/conversations/{id}", get(conversation).delete(forget))
}

/// Appends a turn. Only its two messages travel to the store, and no concurrent turn of the conversation is lost.
async fn chat(State(cache): State<Cache>, body: Result<Json<Chat>, JsonRejection>) -> Reply {
    let Json(chat) = body?;
    let Some(id) = chat.continuation_id.clone() else { return begin(&cache, &chat).await };
    let found = cache.get(&id).await?.ok_or_else(|| Failure::not_found(&id))?;
    let (turn, answer) = found.decode::<Conversation>()?.turn(&chat.message);
    let appended = cache.append(&id, &turn).at("messages").only_if_present().await?;
    match appended.outcome {
        WriteOutcome::Absent => Err(Failure::not_found(&id)),
        outcome => Ok(turn_response(&id, &answer, outcome)),
    }
}

/// Puts a new conversation with its first turn. The cache then knows all of it, so it can go on in an outage too.
async fn begin(cache: &Cache, chat: &Chat) -> Reply {
    let id = uuid::Uuid::new_v4().to_string();
    let (turn, answer) = Conversation::default().turn(&chat.message);
    let put = cache.put(&id, &Conversation { messages: turn.into() });
    let outcome = match &chat.user_id {
        Some(user) => put.user(user).await?,
        None => put.await?,
    };
    Ok(turn_response(&id, &answer, outcome))
}

fn turn_response(id: &str, answer: &str, outcome: WriteOutcome) -> Json<Value> {
    if outcome == WriteOutcome::Superseded {
        tracing::warn!(%id, "a newer write of another daemon superseded this turn");
    }
    let durability = format!("{outcome:?}").to_lowercase();
    Json(json!({ "reply": answer, "continuation_id": id, "durability": durability }))
}

/// Stands in for a model.
fn respond(message: &str, history: &Conversation) -> String {
    let turn = history.messages.iter().filter(|message| message.role == "user").count() + 1;
    match history.messages.iter().rev().find(|message| message.role == "user") {
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
    let remove_existing =
        |current: Option<Value>| current.map(|_| None).ok_or_else(|| Error::aborted(not_found(&id)));
    cache.update(&id, remove_existing).await?;
    Ok(StatusCode::NO_CONTENT)
}
