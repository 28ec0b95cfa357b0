//! Requests and answers as they travel: pure functions.

use std::borrow::Cow;
use std::io::Write as _;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::{Error, ErrorKind, Result};
use crate::record::{Json, Key, Record, Want, Write};
use crate::store::{Applied, Loaded, Page};
use crate::version::{Timestamp, Version};

/// The body of a `threadkeep_load`.
pub(super) fn load(wants: &[Want]) -> Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Row<'a> {
        key: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        known: Option<String>,
    }
    let known = |want: &Want| want.known.map(|version| version.to_string());
    let rows: Vec<Row<'_>> =
        wants.iter().map(|want| Row { key: want.key.as_str(), known: known(want) }).collect();
    body("wants", &rows)
}

/// The body of a `threadkeep_apply`. Written by hand: the values are JSON already, and are neither parsed nor copied twice.
pub(super) fn apply(writes: &[Write]) -> Result<Vec<u8>> {
    /// What a record takes beside its texts.
    const BESIDE: usize = 160;
    let texts: usize = writes.iter().map(|write| write.record.bytes()).sum();
    let mut body = Vec::with_capacity(texts + (writes.len() + 1) * BESIDE);
    body.extend_from_slice(br#"{"records":["#);
    for (at, write) in writes.iter().enumerate() {
        if at > 0 {
            body.push(b',');
        }
        record(&mut body, write).map_err(unwritable)?;
    }
    body.extend_from_slice(b"]}");
    Ok(body)
}

fn record(body: &mut Vec<u8>, Write { record, expect, again }: &Write) -> serde_json::Result<()> {
    body.extend_from_slice(br#"{"key":"#);
    serde_json::to_writer(&mut *body, record.key.as_str())?;
    // Versions travel as strings: JavaScript on the way would round what is beyond 2^53.
    field(body, "version", format_args!("\"{}\"", record.version));
    field(body, "expires", format_args!("{}", record.expires_at.0));
    if let Some(user) = &record.user {
        body.extend_from_slice(br#","user":"#);
        serde_json::to_writer(&mut *body, &**user)?;
    }
    field(body, "metadata", format_args!("{}", record.metadata.as_str()));
    if let Some(value) = &record.value {
        field(body, "value", format_args!("{}", value.as_str()));
    }
    if let Some(version) = expect {
        field(body, "expect", format_args!("\"{version}\""));
    }
    if *again {
        field(body, "again", format_args!("true"));
    }
    body.push(b'}');
    Ok(())
}

fn field(body: &mut Vec<u8>, name: &str, json: std::fmt::Arguments<'_>) {
    // To write into memory does not fail.
    write!(body, ",\"{name}\":{json}").ok();
}

/// The body of a `threadkeep_recent`.
pub(super) fn recent(page: &Page) -> Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Row<'a> {
        most: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        user: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        version: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        key: Option<&'a str>,
    }
    let (version, key) =
        page.after.as_ref().map(|(version, key)| (version.to_string(), key.as_str())).unzip();
    body("page", &Row { most: page.most, user: page.user.as_deref(), version, key })
}

/// The body of a `threadkeep_touch`.
pub(super) fn touch(keys: &[Key]) -> Result<Vec<u8>> {
    body("keys", &keys.iter().map(Key::as_str).collect::<Vec<_>>())
}

/// The body of a `threadkeep_purge`.
pub(super) fn purge(most: usize) -> Result<Vec<u8>> {
    body("most", &most)
}

fn body(name: &str, argument: &impl Serialize) -> Result<Vec<u8>> {
    let mut body = format!("{{{name:?}:").into_bytes();
    serde_json::to_writer(&mut body, argument).map_err(unwritable)?;
    body.push(b'}');
    Ok(body)
}

fn unwritable(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::Invalid, "the request cannot be written as JSON").with_source(error)
}

/// An answer of any of the functions: the database's clock, the version of its functions, and what was asked for.
#[derive(Debug, Deserialize)]
pub(super) struct Answer<'a> {
    pub(super) now: i64,
    pub(super) schema: u32,
    #[serde(borrow, default)]
    pub(super) rows: Vec<Row<'a>>,
    #[serde(default)]
    pub(super) count: usize,
    #[serde(default)]
    pub(super) last: bool,
}

/// What became of one record, in the words of the SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Found,
    Same,
    Absent,
    Later,
    Stored,
    Superseded,
    Conflict,
    Forgotten,
    Ahead,
    #[serde(rename = "too old")]
    TooOld,
}

/// One row of an answer; which fields are there depends on the state.
#[derive(Debug, Deserialize)]
pub(super) struct Row<'a> {
    state: State,
    #[serde(borrow, default)]
    version: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    key: Option<Cow<'a, str>>,
    #[serde(default)]
    expires: Option<i64>,
    #[serde(borrow, default)]
    user: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    metadata: Option<&'a RawValue>,
    #[serde(borrow, default)]
    value: Option<&'a RawValue>,
}

impl Row<'_> {
    /// What a load says of this thread; `None` where the answer had grown too long for it.
    pub(super) fn loaded(self, key: &Key) -> Result<Option<Loaded>> {
        Ok(Some(match self.state {
            // Never somebody else's conversation.
            State::Found if self.key.as_deref() != Some(key.as_str()) => {
                return Err(unexpected("another thread"));
            }
            State::Found => Loaded::Found(Arc::new(self.record()?)),
            State::Same => Loaded::Same,
            State::Absent => Loaded::Absent(self.version()?),
            State::Later => return Ok(None),
            other => return Err(unexpected(other)),
        }))
    }

    /// What an apply says of one write.
    pub(super) fn applied(self) -> Result<Applied> {
        Ok(match self.state {
            State::Stored => Applied::Stored,
            State::Superseded => Applied::Superseded(self.version()?),
            State::Conflict => Applied::Conflict(self.version()?),
            State::Forgotten => Applied::Forgotten(self.version()?),
            State::Ahead => Applied::Ahead,
            State::TooOld => Applied::TooOld,
            other => return Err(unexpected(other)),
        })
    }

    /// The record of a found row.
    pub(super) fn record(self) -> Result<Record> {
        let version = self.version()?;
        let text = |raw: &RawValue| Json::trusted(raw.get());
        Ok(Record {
            key: Key::new(self.key.as_deref().unwrap_or_default())?,
            version,
            // JSON's null reads as None; what is found has a value.
            value: Some(self.value.map_or_else(|| Json::trusted("null"), text)),
            expires_at: Timestamp(self.expires.ok_or_else(|| unexpected("no expiry"))?),
            user: self.user.map(Into::into),
            metadata: self.metadata.filter(|raw| raw.get() != "{}").map(text).unwrap_or_default(),
        })
    }

    fn version(&self) -> Result<Version> {
        let version = self.version.as_deref().and_then(|version| version.parse().ok());
        version.map(Version::from_raw).ok_or_else(|| unexpected("no version"))
    }
}

fn unexpected(what: impl std::fmt::Debug) -> Error {
    Error::new(ErrorKind::Schema, format!("the database's functions gave an unknown answer ({what:?})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_travels_with_its_value_untouched() {
        let record = Record {
            key: Key::new("a \"quoted\" key").unwrap(),
            version: Version::from_raw(i64::MAX),
            value: Some(Json::new(r#"{"digits":12345678901234567890.10}"#).unwrap()),
            expires_at: Timestamp(5),
            user: None,
            metadata: Json::default(),
        };
        let write = Write { record: record.into(), expect: Some(Version::NONE), again: false };
        assert_eq!(
            std::str::from_utf8(&apply(&[write]).unwrap()).unwrap(),
            r#"{"records":[{"key":"a \"quoted\" key","version":"9223372036854775807","expires":5,"metadata":{},"value":{"digits":12345678901234567890.10},"expect":"0"}]}"#
        );
    }

    #[test]
    fn a_null_value_is_a_value() {
        let text = r#"{"now":1,"schema":1,"rows":[{"state":"found","key":"k","version":"7","expires":9,"user":null,"metadata":null,"value":null}]}"#;
        let answer: Answer<'_> = serde_json::from_str(text).unwrap();
        let Some(Loaded::Found(found)) =
            answer.rows.into_iter().next().unwrap().loaded(&Key::new("k").unwrap()).unwrap()
        else {
            panic!()
        };
        assert_eq!(found.value.as_ref().map(Json::as_str), Some("null"));
        assert_eq!(found.metadata.as_str(), "{}");
    }
}
