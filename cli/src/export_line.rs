//! The export format: one line of JSON for each queued write or dead letter.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use threadkeep::store::{Json, Key, Record, Timestamp, Version};
use threadkeep::tools::{ImportItem, QueuedWrite};
use threadkeep::{DeadLetter, Error, ErrorKind, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Queued,
    DeadLetter,
}

/// One line of an export. Versions are strings, because JavaScript rounds numbers beyond 2^53. Times are milliseconds since the epoch.
#[derive(Debug, Serialize, Deserialize)]
struct Line<'a> {
    kind: Kind,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    project: Option<Cow<'a, str>>,
    #[serde(borrow)]
    key: Cow<'a, str>,
    #[serde(borrow)]
    version: Cow<'a, str>,
    /// Absent in a tombstone. `null` is a value.
    #[serde(borrow, default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    value: Option<Cow<'a, RawValue>>,
    expires_at: i64,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    user: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    metadata: Option<Cow<'a, RawValue>>,
    queued_at: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    sent_versions: Vec<String>,
    #[serde(default, skip_serializing_if = "is_false")]
    dispatched: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    provisional: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    superseded: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    unverified: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    died_at: Option<i64>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    reason: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    newer: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's shape")]
fn is_false(is: &bool) -> bool {
    !is
}

/// Reads a field that is present, even if it is `null`.
fn present<'de: 'a, 'a, D: Deserializer<'de>>(from: D) -> Result<Option<Cow<'a, RawValue>>, D::Error> {
    <&'a RawValue>::deserialize(from).map(|raw| Some(Cow::Borrowed(raw)))
}

/// Returns the JSON on one line. Line breaks can only stand between its tokens.
fn on_one_line(json: &Json) -> Result<Cow<'_, RawValue>> {
    let not_json = |e| Error::new(ErrorKind::LocalStorage, "a record in the file is not JSON").with_source(e);
    match json.as_str().contains(['\n', '\r']) {
        false => serde_json::from_str::<&RawValue>(json.as_str()).map(Cow::Borrowed).map_err(not_json),
        true => {
            let flat = json.as_str().replace(['\n', '\r'], " ");
            RawValue::from_string(flat).map(Cow::Owned).map_err(not_json)
        }
    }
}

impl<'a> Line<'a> {
    fn new(kind: Kind, record: &'a Record, queued_at: Timestamp, project: Option<&'a str>) -> Result<Self> {
        Ok(Self {
            kind,
            project: project.map(Cow::Borrowed),
            key: Cow::Borrowed(record.key.as_str()),
            version: record.version.to_string().into(),
            value: record.value.as_ref().map(on_one_line).transpose()?,
            expires_at: record.expires_at.0,
            user: record.user.as_deref().map(Cow::Borrowed),
            metadata: Some(on_one_line(&record.metadata)?),
            queued_at: queued_at.0,
            base: None,
            sent_versions: Vec::new(),
            dispatched: false,
            provisional: false,
            superseded: false,
            unverified: false,
            died_at: None,
            reason: None,
            newer: None,
        })
    }

    fn to_text(&self) -> Result<String> {
        let failed = |e| Error::new(ErrorKind::LocalStorage, "cannot write a record as JSON").with_source(e);
        serde_json::to_string(self).map_err(failed)
    }

    fn record(&self) -> Result<Record> {
        let json = |raw: &RawValue| Json::new(raw.get());
        let mut record = Record::tombstone(Key::new(&self.key)?, parse_version(&self.version)?);
        record.value = self.value.as_deref().map(json).transpose()?;
        record.expires_at = Timestamp(self.expires_at);
        record.user = self.user.as_deref().map(Into::into);
        record.metadata = self.metadata.as_deref().map(json).transpose()?.unwrap_or_default();
        Ok(record)
    }
}

fn parse_version(text: &str) -> Result<Version> {
    let invalid = || Error::new(ErrorKind::Invalid, format!("{text:?} is not a version"));
    text.parse().map(Version::from_raw).map_err(|_| invalid())
}

/// Writes a queued write as a line, without the line break.
pub fn of_write(write: &QueuedWrite, project: Option<&str>) -> Result<String> {
    Line {
        base: write.base.map(|base| base.to_string()),
        sent_versions: write.sent_versions.iter().map(Version::to_string).collect(),
        dispatched: write.is_dispatched,
        provisional: write.is_provisional,
        superseded: write.is_superseded,
        unverified: write.is_unverified,
        ..Line::new(Kind::Queued, &write.record, write.queued_at, project)?
    }
    .to_text()
}

/// Writes a dead letter as a line, without the line break.
pub fn of_dead_letter(letter: &DeadLetter, project: Option<&str>) -> Result<String> {
    Line {
        died_at: Some(letter.died_at.0),
        reason: Some(Cow::Borrowed(&letter.reason)),
        newer: letter.newer.map(|newer| newer.to_string()),
        ..Line::new(Kind::DeadLetter, &letter.record, letter.queued_at, project)?
    }
    .to_text()
}

/// Parses a line. Returns the write and the project that it was queued for. The library validates the values.
pub fn parse(text: &str) -> Result<(ImportItem, Option<String>)> {
    let invalid = |e| Error::new(ErrorKind::Invalid, format!("not a line of an export: {e}"));
    let line: Line<'_> = serde_json::from_str(text).map_err(invalid)?;
    let (record, queued_at) = (line.record()?, Timestamp(line.queued_at));
    let item = match line.kind {
        Kind::Queued => {
            let mut write = QueuedWrite::new(record, queued_at);
            write.base = line.base.as_deref().map(parse_version).transpose()?;
            write.sent_versions =
                line.sent_versions.iter().map(|text| parse_version(text)).collect::<Result<_>>()?;
            write.is_dispatched = line.dispatched;
            write.is_provisional = line.provisional;
            write.is_superseded = line.superseded;
            write.is_unverified = line.unverified;
            ImportItem::Queued(write)
        }
        Kind::DeadLetter => {
            let died_at = line.died_at.map_or(queued_at, Timestamp);
            let reason = line.reason.map_or_else(|| "unknown".into(), Cow::into_owned);
            let mut letter = DeadLetter::new(record, queued_at, died_at, reason);
            letter.newer = line.newer.as_deref().map(parse_version).transpose()?;
            ImportItem::DeadLetter(letter)
        }
    };
    Ok((item, line.project.map(Cow::into_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(value: Option<&str>) -> QueuedWrite {
        let key = Key::new("a \"key\"\n").unwrap();
        let mut record = Record::tombstone(key, Version::from_raw((1 << 53) + 1));
        record.value = value.map(|text| Json::new(text).unwrap());
        record.expires_at = Timestamp(7);
        record.user = Some("u\u{1F600}".into());
        record.metadata = Json::new("{\r\n\"a\":\t1}").unwrap();
        let mut write = QueuedWrite::new(record, Timestamp(3));
        write.base = Some(Version::NONE);
        write.sent_versions = vec![Version::NONE, Version::from_raw(6)];
        (write.is_dispatched, write.is_provisional) = (true, true);
        (write.is_superseded, write.is_unverified) = (true, true);
        write
    }

    #[test]
    fn line_of_write_keeps_every_field() {
        for value in [None, Some("null"), Some("{\n \"a\": \"x\\ny\" }")] {
            let write = write(value);
            let line = of_write(&write, Some("host")).unwrap();
            assert!(!line.contains('\n') && !line.contains('\r'), "{line}");
            let (ImportItem::Queued(read), project) = parse(&line).unwrap() else { panic!("{line}") };
            assert_eq!(project.as_deref(), Some("host"));
            assert_eq!(read.record.value.is_some(), value.is_some(), "null is a value: {line}");
            let flat = |json: &Json| json.as_str().replace(['\n', '\r'], " ");
            assert_eq!(read.record.value.as_ref().map(flat), write.record.value.as_ref().map(flat));
            assert_eq!(flat(&read.record.metadata), flat(&write.record.metadata));
            assert_eq!((read.record.key, read.record.version), (write.record.key, write.record.version));
            let (read_ends, write_ends) = (read.record.expires_at, write.record.expires_at);
            assert_eq!((read.record.user, read_ends), (write.record.user, write_ends));
            assert_eq!((read.base, read.queued_at), (write.base, write.queued_at));
            assert_eq!(read.sent_versions, write.sent_versions);
            assert!(read.is_dispatched && read.is_provisional && read.is_superseded && read.is_unverified);
        }
    }

    #[test]
    fn parse_invalid_line_says_why() {
        let line = |key: &str, version: &str, value: &str| {
            format!(
                r#"{{"kind":"queued","key":{key},"version":{version},"value":{value},"expires_at":1,"queued_at":1}}"#
            )
        };
        assert!(parse(&line("\"k\"", "\"1\"", "1")).is_ok());
        for (invalid, why) in [
            (line("\"\"", "\"1\"", "1"), "empty"),
            (line("\"k\"", "\"x\"", "1"), "version"),
            (line("\"k\"", "\"1\"", r#""\u0000""#), "\\u0000"),
            (line("\"k\"", "\"1\"", "nonsense"), "not a line"),
            ("{}".to_owned(), "kind"),
        ] {
            let error = parse(&invalid).unwrap_err();
            assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains(why), "{error}");
        }
    }
}
