//! Standard output, as text or as JSON.

use std::io::{self, BufWriter, StdoutLock, Write as _};
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;
use serde_json::value::RawValue;
use threadkeep::DeadLetter;
use threadkeep::store::{Condition, Record, Timestamp};

use crate::failure::Failure;

/// Buffered standard output. The caller must call [`finish`](Self::finish) to write it.
pub struct Output {
    pub is_json: bool,
    out: BufWriter<StdoutLock<'static>>,
}

impl Output {
    pub fn new(is_json: bool) -> Self {
        Self { is_json, out: BufWriter::new(io::stdout().lock()) }
    }

    pub fn line(&mut self, text: &str) -> Result<(), Failure> {
        Ok(writeln!(self.out, "{text}")?)
    }

    pub fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let failed = |e| Failure::Other(format!("the output cannot be written as JSON: {e}"));
        let text = serde_json::to_string(value).map_err(failed)?;
        self.line(&text)
    }

    /// Prints the value if the caller asked for JSON, and the text otherwise.
    pub fn either(&mut self, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), Failure> {
        if self.is_json { self.json(value) } else { self.line(&text()) }
    }

    pub fn finish(&mut self) -> Result<(), Failure> {
        Ok(self.out.flush()?)
    }
}

/// The output for a queued write or a dead letter, without the conversation's value.
#[derive(Debug, Serialize)]
pub struct QueueEntry<'a> {
    pub key: &'a str,
    /// `put`, `update` or `remove`.
    pub kind: &'static str,
    pub version: String,
    pub queued_at: String,
    pub expires_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<&'a str>,
    pub bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub died_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'a str>,
}

impl<'a> QueueEntry<'a> {
    pub fn new(record: &'a Record, queued_at: Timestamp, is_update: bool) -> Self {
        Self {
            key: record.key.as_str(),
            kind: match record.value {
                None => "remove",
                Some(_) if is_update => "update",
                Some(_) => "put",
            },
            version: record.version.to_string(),
            queued_at: time(queued_at),
            expires_at: time(record.expires_at),
            user: record.user.as_deref(),
            bytes: record.bytes(),
            died_at: None,
            reason: None,
        }
    }

    pub fn dead(letter: &'a DeadLetter) -> Self {
        let (died_at, reason) = (Some(time(letter.died_at)), Some(letter.reason.as_str()));
        let is_update = letter.condition != Condition::Any;
        Self { died_at, reason, ..Self::new(&letter.record, letter.queued_at, is_update) }
    }
}

/// Wraps JSON of the library, and fails if the text is not JSON.
pub fn raw(json: &str) -> Result<Box<RawValue>, Failure> {
    // A list has one value a line, so the value must fit on one line.
    let flat = json.replace(['\n', '\r'], " ");
    RawValue::from_string(flat).map_err(|e| Failure::Other(format!("the stored value is not JSON: {e}")))
}

pub fn time(at: Timestamp) -> String {
    moment(at.into())
}

pub fn moment(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// Escapes text that has control characters, because these could move the cursor of a terminal.
pub fn shown(text: &str) -> String {
    if text.contains(char::is_control) { format!("{text:?}") } else { text.to_owned() }
}

/// Formats a number of bytes in a fitting unit.
pub fn size(bytes: u64) -> String {
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} bytes"),
    }
}

/// Formats a duration in a fitting unit.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}
