//! Standard output, as text or as JSON.

use std::fmt::Display;
use std::io::{self, BufWriter, StdoutLock, Write as _};
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;
use serde_json::value::RawValue;
use threadkeep::DeadLetter;
use threadkeep::store::{Append, ArrayPath, Condition, Json, Record, Timestamp};
use threadkeep::tools::QueuedWrite;

use crate::export_line::if_version;
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
    /// `put`, `update`, `remove` or `append`.
    pub kind: &'static str,
    /// Of an append: the names that lead to the array.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<&'a ArrayPath>,
    /// Of an append: the number of its items.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub items: Option<usize>,
    pub version: String,
    /// Absent for a dead letter, whose writer the file does not keep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writer: Option<String>,
    /// The version that an update changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub if_version: Option<String>,
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
    fn new(
        record: &'a Record,
        queued_at: Timestamp,
        condition: Condition,
        append: Option<&'a Append>,
    ) -> Self {
        Self {
            key: record.key.as_str(),
            kind: match (append, &record.value) {
                (Some(_), _) => "append",
                (None, None) => "remove",
                (None, Some(_)) if condition != Condition::Any => "update",
                (None, Some(_)) => "put",
            },
            at: append.map(|append| &append.at),
            items: append.and(record.value.as_ref()).map(item_count),
            version: record.version.to_string(),
            writer: None,
            if_version: if_version(condition),
            queued_at: time(queued_at),
            expires_at: time(record.expires_at),
            user: record.user.as_deref(),
            bytes: record.bytes(),
            died_at: None,
            reason: None,
        }
    }

    pub fn of_write(queued: &'a QueuedWrite) -> Self {
        let write = &queued.write;
        let writer = Some(write.writer.to_string());
        let append = write.append.as_ref();
        Self { writer, ..Self::new(&write.record, queued.queued_at, write.condition, append) }
    }

    pub fn of_dead_letter(letter: &'a DeadLetter) -> Self {
        let (died_at, reason) = (Some(time(letter.died_at)), Some(letter.reason.as_str()));
        let DeadLetter { record, queued_at, condition, append, .. } = letter;
        Self { died_at, reason, ..Self::new(record, *queued_at, *condition, append.as_ref()) }
    }

    /// Formats the entry as one line with tabs between its columns.
    pub fn text(&self) -> String {
        let at = self.died_at.as_ref().map_or(("queued", &self.queued_at), |died_at| ("died", died_at));
        let named = [
            Some(at),
            Some(("version", &self.version)),
            self.writer.as_ref().map(|writer| ("writer", writer)),
            self.if_version.as_ref().map(|version| ("if_version", version)),
        ];
        let mut columns = vec![shown(self.key), self.shown_kind(), counted(self.bytes, "byte")];
        columns.extend(named.into_iter().flatten().map(|(name, value)| format!("{name} {value}")));
        columns.extend(self.reason.map(shown));
        columns.join("\t")
    }

    /// Returns the kind for a reader, with the place and the number of items of an append.
    fn shown_kind(&self) -> String {
        let Some((at, items)) = self.at.zip(self.items) else { return self.kind.to_owned() };
        let place =
            if at.names().len() == 0 { String::new() } else { format!(" at {}", shown(&at.to_string())) };
        format!("append of {}{place}", counted(items, "item"))
    }
}

fn item_count(items: &Json) -> usize {
    serde_json::from_str::<Vec<&RawValue>>(items.as_str()).map_or(0, |items| items.len())
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

/// Formats a number with its noun, such as `1 write` and `2 copies`.
pub fn counted<N: Display + PartialEq + From<u8>>(count: N, noun: &str) -> String {
    match noun.strip_suffix('y') {
        _ if count == N::from(1) => format!("{count} {noun}"),
        Some(stem) => format!("{count} {stem}ies"),
        None => format!("{count} {noun}s"),
    }
}

/// Formats a number of bytes in a fitting unit.
pub fn size(bytes: u64) -> String {
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => {
            let number = format!("{:.1}", bytes as f64 / unit as f64);
            format!("{} {name}", number.trim_end_matches(".0"))
        }
        None => counted(bytes, "byte"),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_one_is_singular() {
        let texts = [counted(0_u64, "queued write"), counted(1_u64, "copy"), counted(2_usize, "copy")];
        assert_eq!(texts, ["0 queued writes", "1 copy", "2 copies"]);
    }
}
