//! The commands `get`, `put`, `remove` and `list`. With the backend `supabase` they work beside a running daemon.

use std::io::{IsTerminal as _, Read as _};
use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use serde_json::value::RawValue;
use threadkeep::store::ArrayPath;
use threadkeep::{Backend, Builder, Cache, Conversation, Freshness, WriteOutcome};

use crate::arguments::{Append, Get, List, Put, Remove};
use crate::failure::{Failure, Outcome, tell};
use crate::output::{Output, counted, moment, raw, shown, size};

/// The time limit of the shutdown. A command leaves almost no work behind.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// The input limit. It lies above the largest conversation, because the input may have spaces between tokens.
const MAX_INPUT_BYTES: u64 = 256 << 20;
/// A person can wait longer than a daemon's caller.
const SOFT_TIMEOUT: Duration = Duration::from_secs(30);

/// A conversation as JSON output.
#[derive(Debug, Serialize)]
struct ConversationEntry<'a> {
    key: &'a str,
    value: Box<RawValue>,
    freshness: &'static str,
    version: String,
    expires_at: String,
    user: Option<&'a str>,
    metadata: Box<RawValue>,
}

impl<'a> ConversationEntry<'a> {
    fn new(found: &'a Conversation) -> Result<Self, Failure> {
        Ok(Self {
            key: found.key().as_str(),
            value: raw(found.json())?,
            freshness: match found.freshness() {
                Freshness::Fresh => "fresh",
                Freshness::Queued => "queued",
                _ => "stale",
            },
            version: found.version().to_string(),
            expires_at: moment(found.expires_at()),
            user: found.user(),
            metadata: raw(found.metadata())?,
        })
    }
}

async fn open(settings: Builder) -> Result<Cache, Failure> {
    if settings.backend() == Backend::Memory {
        let text =
            "the backend is `memory`: only the daemon's memory holds its conversations; ask the daemon";
        return Err(Failure::Other(text.into()));
    }
    Ok(settings.without_queue().soft_timeout(SOFT_TIMEOUT).open().await?)
}

pub async fn get(settings: Builder, get: &Get, out: &mut Output) -> Result<Outcome, Failure> {
    let cache = open(settings).await?;
    let found = cache.get(&get.key).await?;
    cache.shutdown(SHUTDOWN_TIMEOUT).await?;
    match found {
        Some(found) if out.is_json => out.json(&ConversationEntry::new(&found)?)?,
        Some(found) => out.line(found.json())?,
        None => return Ok(no_conversation(&get.key)),
    }
    Ok(Outcome::Done)
}

pub async fn put(settings: Builder, put: &Put, out: &mut Output) -> Result<Outcome, Failure> {
    let value = parse_json(&value_text(&put.value)?, "the conversation")?;
    let cache = open(settings).await?;
    let mut write = cache.put(&put.key, &value);
    if let Some(ttl) = put.ttl {
        write = write.ttl(ttl);
    }
    if let Some(user) = &put.user {
        write = write.user(user);
    }
    if let Some(metadata) = &put.metadata {
        write = write.metadata(&parse_json(metadata, "the metadata")?);
    }
    let outcome = write.await?;
    cache.shutdown(SHUTDOWN_TIMEOUT).await?;
    report(&put.key, outcome, out)
}

pub async fn append(settings: Builder, append: &Append, out: &mut Output) -> Result<Outcome, Failure> {
    let items = parse_json(&value_text(&append.items)?, "the items")?;
    let cache = open(settings).await?;
    let mut call =
        cache.append(&append.key, &items).at(append.at.iter().map(String::as_str).collect::<ArrayPath>());
    if append.only_if_present {
        call = call.only_if_present();
    }
    if let Some(ttl) = append.ttl {
        call = call.ttl(ttl);
    }
    if let Some(user) = &append.user {
        call = call.user(user);
    }
    if let Some(metadata) = &append.metadata {
        call = call.metadata(&parse_json(metadata, "the metadata")?);
    }
    let appended = call.await?;
    cache.shutdown(SHUTDOWN_TIMEOUT).await?;
    match (appended.outcome, appended.length) {
        (WriteOutcome::Stored, Some(length)) => {
            let json = json!({"key": append.key, "outcome": "stored", "length": length});
            out.either(&json, || format!("stored, {length} in the array now"))?;
            Ok(Outcome::Done)
        }
        (outcome, _) => report(&append.key, outcome, out),
    }
}

pub async fn remove(settings: Builder, remove: &Remove, out: &mut Output) -> Result<Outcome, Failure> {
    let cache = open(settings).await?;
    let outcome = cache.remove(&remove.key).await?;
    cache.shutdown(SHUTDOWN_TIMEOUT).await?;
    report(&remove.key, outcome, out)
}

pub async fn list(settings: Builder, list: &List, out: &mut Output) -> Result<Outcome, Failure> {
    let cache = open(settings).await?;
    for found in cache.list(&list.user).limit(list.limit).await? {
        match out.is_json {
            true => out.json(&ConversationEntry::new(&found)?)?,
            false => out.line(&format!(
                "{}\t{}\tuntil {}",
                shown(found.key().as_str()),
                counted(found.json().len(), "byte"),
                moment(found.expires_at())
            ))?,
        }
    }
    cache.shutdown(SHUTDOWN_TIMEOUT).await?;
    Ok(Outcome::Done)
}

/// Returns the argument, or standard input if the argument is `-`.
fn value_text(text: &str) -> Result<String, Failure> {
    let failed = |e| Failure::Other(format!("standard input cannot be read: {e}"));
    if text != "-" {
        return Ok(text.to_owned());
    }
    if std::io::stdin().is_terminal() {
        tell("threadkeep: reads the conversation from standard input; end it with Ctrl-D");
    }
    let text = std::io::read_to_string(std::io::stdin().take(MAX_INPUT_BYTES)).map_err(failed)?;
    match text.len() as u64 {
        MAX_INPUT_BYTES => Err(Failure::Other(format!(
            "standard input has {} or more, which is above the input limit",
            size(MAX_INPUT_BYTES)
        ))),
        _ => Ok(text),
    }
}

fn parse_json(text: &str, subject: &str) -> Result<Box<RawValue>, Failure> {
    let hint = "a JSON string needs its own quotes, as in '\"hello\"'";
    serde_json::from_str(text)
        .map_err(|e| Failure::Usage(format!("cannot read {subject} as JSON: {e}; {hint}")))
}

fn no_conversation(key: &str) -> Outcome {
    tell(&format!("threadkeep: there is no conversation {}", shown(key)));
    Outcome::NotFound
}

fn report(key: &str, outcome: WriteOutcome, out: &mut Output) -> Result<Outcome, Failure> {
    let word = match outcome {
        WriteOutcome::Stored => "stored",
        WriteOutcome::Superseded => "superseded",
        WriteOutcome::Absent => "absent",
        _ => "queued",
    };
    out.either(&json!({"key": key, "outcome": word}), || word.to_owned())?;
    match outcome {
        WriteOutcome::Superseded => {
            tell("threadkeep: the store holds a newer write, which stays");
            Ok(Outcome::Partly)
        }
        WriteOutcome::Absent => Ok(no_conversation(key)),
        _ => Ok(Outcome::Done),
    }
}
