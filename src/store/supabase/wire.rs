//! Requests and responses of the database functions, as pure conversions.

use std::borrow::Cow;
use std::io::Write as _;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::{Error, ErrorKind, Result};
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};
use crate::store::{
    Applied, Changes, Condition, Continuity, Cursor, ListRequest, LoadRequest, Loaded, Write,
};

/// Writes the body of a `threadkeep_load`.
pub(super) fn load(requests: &[LoadRequest]) -> Result<Vec<u8>> {
    #[derive(Serialize)]
    struct LoadRow<'a> {
        key: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        if_none_match: Option<String>,
    }
    let if_none_match = |request: &LoadRequest| request.if_none_match.map(|version| version.to_string());
    let rows: Vec<LoadRow<'_>> = requests
        .iter()
        .map(|request| LoadRow { key: request.key.as_str(), if_none_match: if_none_match(request) })
        .collect();
    body("requests", &rows)
}

/// Writes the body of a `threadkeep_apply`, without a serializer: the values are JSON already, and are neither parsed nor
/// copied twice.
pub(super) fn apply(writes: &[Write]) -> Result<Vec<u8>> {
    /// The bytes of a record beside its texts.
    const RECORD_OVERHEAD: usize = 192;
    let texts: usize = writes.iter().map(|write| write.record.bytes()).sum();
    let mut body = Vec::with_capacity(texts + (writes.len() + 1) * RECORD_OVERHEAD);
    body.extend_from_slice(br#"{"writes":["#);
    for (at, write) in writes.iter().enumerate() {
        if at > 0 {
            body.push(b',');
        }
        let Write { record, writer, condition, append } = write;
        body.extend_from_slice(br#"{"key":"#);
        serde_json::to_writer(&mut body, record.key.as_str()).map_err(not_serializable)?;
        // Versions and writers are strings, because a JavaScript server would round numbers beyond 2^53.
        let Record { version, expires_at: Timestamp(expires_at), metadata, .. } = &**record;
        let metadata = metadata.as_str();
        // Writing to memory cannot fail.
        write!(
            body,
            r#","version":"{version}","writer":"{writer}","expires_at":{expires_at},"metadata":{metadata}"#
        )
        .ok();
        if let Some(user) = &record.user {
            body.extend_from_slice(br#","user":"#);
            serde_json::to_writer(&mut body, &**user).map_err(not_serializable)?;
        }
        if let Some(value) = &record.value {
            write!(body, r#","value":{}"#, value.as_str()).ok();
        }
        if let Condition::IfVersion(version) = condition {
            write!(body, r#","if_version":"{version}""#).ok();
        }
        if let Some(append) = append {
            body.extend_from_slice(br#","append":"#);
            serde_json::to_writer(&mut body, append).map_err(not_serializable)?;
        }
        body.push(b'}');
    }
    body.extend_from_slice(b"]}");
    Ok(body)
}

/// Writes the body of a `threadkeep_list`.
pub(super) fn list(request: &ListRequest) -> Result<Vec<u8>> {
    #[derive(Serialize)]
    struct ListQuery<'a> {
        limit: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        user: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        after_version: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        after_key: Option<&'a str>,
    }
    let after = request.after.as_ref().map(|(version, key)| (version.to_string(), key.as_str()));
    let (after_version, after_key) = after.unzip();
    let user = request.user.as_deref();
    body("request", &ListQuery { limit: request.limit, user, after_version, after_key })
}

/// Writes the body of a `threadkeep_changes`.
pub(super) fn changes(since: Option<&Cursor>) -> Result<Vec<u8>> {
    #[derive(Serialize)]
    struct ChangesQuery<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        cursor: Option<&'a str>,
    }
    body("request", &ChangesQuery { cursor: since.map(Cursor::as_str) })
}

/// Writes the body of a `threadkeep_touch`.
pub(super) fn touch(keys: &[Key]) -> Result<Vec<u8>> {
    body("keys", &keys.iter().map(Key::as_str).collect::<Vec<_>>())
}

/// Writes the body of a `threadkeep_purge`.
pub(super) fn purge(limit: usize) -> Result<Vec<u8>> {
    body("max_rows", &limit)
}

fn body(name: &str, argument: &impl Serialize) -> Result<Vec<u8>> {
    let mut body = format!("{{{name:?}:").into_bytes();
    serde_json::to_writer(&mut body, argument).map_err(not_serializable)?;
    body.push(b'}');
    Ok(body)
}

fn not_serializable(error: serde_json::Error) -> Error {
    Error::new(ErrorKind::Invalid, "cannot write the request as JSON").with_source(error)
}

/// The response of a database function: the database's clock, the revision of the functions, and the rows.
#[derive(Debug, Deserialize)]
pub(super) struct FunctionResponse<'a> {
    pub(super) now: i64,
    /// The first building called the revision `schema`. Reading both names tells an old database from a foreign server.
    #[serde(alias = "schema")]
    pub(super) revision: u32,
    #[serde(borrow, default)]
    pub(super) rows: Vec<ResultRow<'a>>,
    #[serde(default)]
    pub(super) count: usize,
    #[serde(default)]
    pub(super) is_last: bool,
    /// Of a page of changes: the next cursor, and the relation to the cursor of the request.
    #[serde(borrow, default)]
    cursor: Option<Cow<'a, str>>,
    #[serde(default)]
    state: Option<FeedState>,
}

/// The state of a page of changes, in the words of the SQL.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FeedState {
    Begun,
    Unbroken,
    Restored,
}

impl FunctionResponse<'_> {
    /// Converts a page of changes.
    pub(super) fn changes(self) -> Result<Changes> {
        let continuity = match self.state.ok_or_else(|| unexpected("no state"))? {
            FeedState::Begun => Continuity::Begun,
            FeedState::Unbroken => Continuity::Unbroken,
            FeedState::Restored => Continuity::Restored,
        };
        let cursor = Cursor::new(&*self.cursor.ok_or_else(|| unexpected("no cursor"))?);
        let changed = self.rows.into_iter().map(ResultRow::changed).collect::<Result<_>>()?;
        let mut page = Changes::new(cursor, changed, continuity, self.is_last);
        // The SQL begins a cursor with the identity of the database.
        page.history = page.cursor.as_str().split_once(' ').map(|(history, _)| history.into());
        Ok(page)
    }
}

/// The state of one row, in the words of the SQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ResultState {
    /// A row of a page of changes has no state.
    #[default]
    Changed,
    Found,
    NotModified,
    Absent,
    Deferred,
    Stored,
    Superseded,
    Conflict,
    VersionInFuture,
    TooOld,
    NotAnArray,
    TooLarge,
}

/// One row of a response. The state decides which fields are present.
#[derive(Debug, Deserialize)]
pub(super) struct ResultRow<'a> {
    #[serde(default)]
    state: ResultState,
    #[serde(borrow, default)]
    version: Option<Cow<'a, str>>,
    /// Of an append: the version before, and the number of items now.
    #[serde(borrow, default)]
    over: Option<Cow<'a, str>>,
    #[serde(default)]
    length: Option<u64>,
    #[serde(borrow, default)]
    key: Option<Cow<'a, str>>,
    #[serde(default)]
    expires_at: Option<i64>,
    #[serde(borrow, default)]
    user: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    metadata: Option<&'a RawValue>,
    #[serde(borrow, default)]
    value: Option<&'a RawValue>,
}

impl ResultRow<'_> {
    /// Converts a row of a load. `None` if the response had no room for the record.
    pub(super) fn loaded(self, key: &Key) -> Result<Option<Loaded>> {
        Ok(Some(match self.state {
            // A caller never gets another conversation than the requested one.
            ResultState::Found if self.key.as_deref() != Some(key.as_str()) => {
                return Err(unexpected("another conversation").with_key(key.as_str()));
            }
            ResultState::Found => Loaded::Found(Arc::new(self.record()?)),
            ResultState::NotModified => Loaded::NotModified,
            ResultState::Absent => Loaded::Absent(self.version()?),
            ResultState::Deferred => return Ok(None),
            other => return Err(unexpected(other)),
        }))
    }

    /// Converts a row of an apply.
    pub(super) fn applied(self, write: &Write) -> Result<Applied> {
        Ok(match self.state {
            ResultState::Stored => match (&self.over, self.length) {
                (Some(over), Some(length)) => {
                    Applied::Appended { version: self.version()?, over: parsed(Some(over))?, length }
                }
                _ if write.append.is_some() => Applied::AppendedBefore(self.version()?),
                _ => Applied::Stored,
            },
            ResultState::Absent => Applied::Absent,
            ResultState::NotAnArray => Applied::NotAnArray,
            ResultState::TooLarge => Applied::TooLarge,
            ResultState::Superseded => Applied::Superseded(self.version()?),
            ResultState::Conflict => Applied::Conflict(self.version()?),
            ResultState::VersionInFuture => Applied::VersionInFuture,
            ResultState::TooOld => Applied::TooOld,
            other => return Err(unexpected(other)),
        })
    }

    /// Converts a row of a page of changes.
    fn changed(self) -> Result<(Key, Version)> {
        Ok((Key::new(self.key.as_deref().unwrap_or_default())?, self.version()?))
    }

    /// Converts a found row.
    pub(super) fn record(self) -> Result<Record> {
        let version = self.version()?;
        let text = |raw: &RawValue| Json::trusted(raw.get());
        Ok(Record {
            key: Key::new(self.key.as_deref().unwrap_or_default())?,
            version,
            // serde reads JSON's null as `None`. A found row always has a value.
            value: Some(self.value.map_or_else(|| Json::trusted("null"), text)),
            expires_at: Timestamp(self.expires_at.ok_or_else(|| unexpected("no expiry"))?),
            user: self.user.map(Into::into),
            // All records without metadata share one default text.
            metadata: self.metadata.filter(|raw| raw.get() != "{}").map(text).unwrap_or_default(),
        })
    }

    fn version(&self) -> Result<Version> {
        parsed(self.version.as_deref())
    }
}

fn parsed(version: Option<&str>) -> Result<Version> {
    let version = version.and_then(|version| version.parse().ok());
    version.map(Version::from_raw).ok_or_else(|| unexpected("no version"))
}

fn unexpected(content: impl std::fmt::Debug) -> Error {
    let message = format!("the database functions sent an unknown response ({content:?})");
    Error::new(ErrorKind::SchemaOutdated, message)
}
