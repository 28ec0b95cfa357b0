//! `get`, `put`, `remove` and `list`: by the settings, beside a daemon where the backend is Supabase.

use std::io::Read as _;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use serde_json::value::RawValue;
use threadkeep::{Backend, Builder, Cache, Durability, Found, Freshness};

use crate::arguments::{Get, List, Put, Remove};
use crate::failure::{Failure, Outcome, tell};
use crate::output::{Output, moment, raw, shown, size};

/// What is left to do when a command has ended is next to nothing.
const GRACE: Duration = Duration::from_secs(5);
/// No conversation is as large; spaces between its parts are read, too.
const MOST: u64 = 256 << 20;
/// A person can wait longer than a daemon's caller.
const PATIENCE: Duration = Duration::from_secs(30);

/// A conversation as it was found.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    key: &'a str,
    value: Box<RawValue>,
    freshness: &'static str,
    version: String,
    expires_at: String,
    user: Option<&'a str>,
    metadata: Box<RawValue>,
}

impl<'a> Shown<'a> {
    fn new(found: &'a Found) -> Result<Self, Failure> {
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
            "the backend is `memory`: its conversations are in the daemon's memory alone; ask the daemon";
        return Err(Failure::Other(text.into()));
    }
    Ok(settings.without_queue().patience(PATIENCE).open().await?)
}

pub async fn get(settings: Builder, get: &Get, out: &mut Output) -> Result<Outcome, Failure> {
    let cache = open(settings).await?;
    let found = cache.get(&get.key).await?;
    cache.shutdown(GRACE).await?;
    match found {
        Some(found) if out.is_json => out.json(&Shown::new(&found)?)?,
        Some(found) => out.line(found.json())?,
        None => {
            tell(&format!("threadkeep: there is no thread {}", shown(&get.key)));
            return Ok(Outcome::NotFound);
        }
    }
    Ok(Outcome::Done)
}

pub async fn put(settings: Builder, put: &Put, out: &mut Output) -> Result<Outcome, Failure> {
    let value = parsed(&argument(&put.value)?, "the conversation")?;
    let cache = open(settings).await?;
    let mut write = cache.put(&put.key, &value);
    if let Some(ttl) = put.ttl {
        write = write.ttl(ttl);
    }
    if let Some(user) = &put.user {
        write = write.user(user);
    }
    if let Some(metadata) = &put.metadata {
        write = write.metadata(&parsed(metadata, "the metadata")?);
    }
    let durability = write.await?;
    cache.shutdown(GRACE).await?;
    acknowledge(&put.key, durability, out)
}

pub async fn remove(settings: Builder, remove: &Remove, out: &mut Output) -> Result<Outcome, Failure> {
    let cache = open(settings).await?;
    let durability = cache.remove(&remove.key).await?;
    cache.shutdown(GRACE).await?;
    acknowledge(&remove.key, durability, out)
}

pub async fn list(settings: Builder, list: &List, out: &mut Output) -> Result<Outcome, Failure> {
    let cache = open(settings).await?;
    for found in cache.list(&list.user).limit(list.limit).await? {
        match out.is_json {
            true => out.json(&Shown::new(&found)?)?,
            false => out.line(&format!(
                "{}\t{} bytes\tuntil {}",
                shown(found.key().as_str()),
                found.json().len(),
                moment(found.expires_at())
            ))?,
        }
    }
    cache.shutdown(GRACE).await?;
    Ok(Outcome::Done)
}

/// What was given, or comes by standard input.
fn argument(text: &str) -> Result<String, Failure> {
    let failed = |e| Failure::Other(format!("standard input cannot be read: {e}"));
    if text != "-" {
        return Ok(text.to_owned());
    }
    let text = std::io::read_to_string(std::io::stdin().take(MOST)).map_err(failed)?;
    match text.len() as u64 {
        MOST => {
            Err(Failure::Other(format!("standard input has {} or more: too much to be stored", size(MOST))))
        }
        _ => Ok(text),
    }
}

fn parsed(text: &str, what: &str) -> Result<Box<RawValue>, Failure> {
    let hint = "a text needs quotes of its own, as in '\"hello\"'";
    serde_json::from_str(text).map_err(|e| Failure::Usage(format!("{what} is not JSON: {e}; {hint}")))
}

fn acknowledge(key: &str, durability: Durability, out: &mut Output) -> Result<Outcome, Failure> {
    let word = match durability {
        Durability::Stored => "stored",
        Durability::Superseded => "superseded",
        _ => "queued",
    };
    out.either(&json!({"key": key, "durability": word}), || word.to_owned())?;
    if durability == Durability::Superseded {
        tell("threadkeep: something newer is stored, and stays");
        return Ok(Outcome::Partly);
    }
    Ok(Outcome::Done)
}
