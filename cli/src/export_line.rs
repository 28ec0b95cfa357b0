//! The export format: one line of JSON for each queued write or dead letter.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use threadkeep::store::{Append, Condition, Json, Key, Record, Timestamp, Version, WriterId};
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
    writer: Option<String>,
    /// The version that an update changes. An earlier threadkeep called it `base`.
    #[serde(default, alias = "base", skip_serializing_if = "Option::is_none")]
    if_version: Option<String>,
    /// The target of an append. The value has the items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    append: Option<Append>,
    /// Of an earlier threadkeep. A zero marks the update of a queued put, which is not in a line of its own.
    #[serde(default, skip_serializing)]
    sent_versions: Vec<String>,
    #[serde(default, skip_serializing_if = "is_false")]
    provisional: bool,
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
            writer: None,
            if_version: None,
            append: None,
            sent_versions: Vec::new(),
            provisional: false,
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

/// Returns the version that an update changes.
pub fn if_version(condition: Condition) -> Option<String> {
    match condition {
        Condition::IfVersion(version) => Some(version.to_string()),
        Condition::Any | Condition::IfPresent => None,
    }
}

/// Writes a queued write as a line, without the line break.
pub fn of_write(queued: &QueuedWrite, project: Option<&str>) -> Result<String> {
    let write = &queued.write;
    Line {
        writer: Some(write.writer.to_string()),
        if_version: if_version(write.condition),
        append: write.append.clone(),
        provisional: queued.is_provisional,
        ..Line::new(Kind::Queued, &write.record, queued.queued_at, project)?
    }
    .to_text()
}

/// Writes a dead letter as a line, without the line break.
pub fn of_dead_letter(letter: &DeadLetter, project: Option<&str>) -> Result<String> {
    Line {
        died_at: Some(letter.died_at.0),
        reason: Some(Cow::Borrowed(&letter.reason)),
        newer: letter.newer.map(|newer| newer.to_string()),
        if_version: if_version(letter.condition),
        append: letter.append.clone(),
        ..Line::new(Kind::DeadLetter, &letter.record, letter.queued_at, project)?
    }
    .to_text()
}

/// Parses a line. Returns its writes and the project that they were queued for. The library validates the values.
pub fn parse(text: &str) -> Result<(Vec<ImportItem>, Option<String>)> {
    let invalid = |e| Error::new(ErrorKind::Invalid, format!("not a line of an export: {e}"));
    let line: Line<'_> = serde_json::from_str(text).map_err(invalid)?;
    let (record, queued_at) = (line.record()?, Timestamp(line.queued_at));
    let if_version = line.if_version.as_deref().map(parse_version).transpose()?;
    let items = match line.kind {
        Kind::Queued => {
            let mut queued = QueuedWrite::new(record, queued_at);
            queued.is_provisional = line.provisional;
            if let Some(writer) = line.writer {
                queued.write.writer = parse_writer(&writer)?;
            }
            let put = if_version.filter(|_| line.sent_versions.iter().any(|version| version == "0"));
            let put = put.map(|version| with_version(&queued, version));
            queued.write.condition = if_version.map_or(Condition::Any, Condition::IfVersion);
            if let Some(append) = line.append {
                queued.write = queued.write.with_append(append);
            }
            put.into_iter().chain([queued]).map(ImportItem::Queued).collect()
        }
        Kind::DeadLetter => {
            let died_at = line.died_at.map_or(queued_at, Timestamp);
            let reason = line.reason.map_or_else(|| "unknown".into(), Cow::into_owned);
            let mut letter = DeadLetter::new(record, queued_at, died_at, reason);
            letter.newer = line.newer.as_deref().map(parse_version).transpose()?;
            letter.condition = match (&line.append, if_version) {
                (Some(append), _) if append.only_if_present => Condition::IfPresent,
                (_, base) => base.map_or(Condition::Any, Condition::IfVersion),
            };
            letter.append = line.append;
            vec![ImportItem::DeadLetter(letter)]
        }
    };
    Ok((items, line.project.map(Cow::into_owned)))
}

/// Returns the put that an update of an earlier threadkeep had replaced in the queue, with the update's value.
fn with_version(update: &QueuedWrite, version: Version) -> QueuedWrite {
    let mut put = update.clone();
    put.write.record = Record { version, ..Record::clone(&update.write.record) }.into();
    put
}

fn parse_writer(text: &str) -> Result<WriterId> {
    let invalid = || Error::new(ErrorKind::Invalid, format!("{text:?} is not a writer"));
    text.parse().map(WriterId::from_raw).map_err(|_| invalid())
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
        let mut queued = QueuedWrite::new(record, Timestamp(3));
        queued.write.condition = Condition::IfVersion(Version::NONE);
        queued.is_provisional = true;
        queued
    }

    #[test]
    fn line_of_write_keeps_every_field() {
        for value in [None, Some("null"), Some("{\n \"a\": \"x\\ny\" }")] {
            let queued = write(value);
            let line = of_write(&queued, Some("host")).unwrap();
            assert!(!line.contains('\n') && !line.contains('\r'), "{line}");
            let (mut items, project) = parse(&line).unwrap();
            let Some(ImportItem::Queued(read)) = items.pop() else { panic!("{line}") };
            assert_eq!((project.as_deref(), items.len()), (Some("host"), 0));
            let (written, found) = (&queued.write.record, &read.write.record);
            assert_eq!(found.value.is_some(), value.is_some(), "null is a value: {line}");
            let flat = |json: &Json| json.as_str().replace(['\n', '\r'], " ");
            assert_eq!(found.value.as_ref().map(flat), written.value.as_ref().map(flat));
            assert_eq!(flat(&found.metadata), flat(&written.metadata));
            assert_eq!((&found.key, found.version), (&written.key, written.version));
            assert_eq!((&found.user, found.expires_at), (&written.user, written.expires_at));
            assert_eq!(
                (read.write.writer, read.write.condition),
                (queued.write.writer, queued.write.condition)
            );
            assert_eq!((read.queued_at, read.is_provisional), (queued.queued_at, true));
        }
    }

    #[test]
    fn line_of_an_append_keeps_its_target() {
        let mut append = Append::new(["state", "a\nb"].into(), 7);
        for is_conditional in [false, true] {
            append.only_if_present = is_conditional;
            let mut queued = write(Some("[1, 2]"));
            queued.write = queued.write.with_append(append.clone());
            let item = parse(&of_write(&queued, None).unwrap()).unwrap().0.remove(0);
            let ImportItem::Queued(read) = item else { panic!("{item:?}") };
            let (read, queued) = (&read.write, &queued.write);
            assert_eq!((&read.append, read.condition), (&queued.append, queued.condition));
            assert_eq!(read.writer, queued.writer);
            let mut letter = DeadLetter::new(Record::clone(&queued.record), Timestamp(1), Timestamp(2), "");
            (letter.append, letter.condition) = (queued.append.clone(), queued.condition);
            let item = parse(&of_dead_letter(&letter, None).unwrap()).unwrap().0.remove(0);
            let ImportItem::DeadLetter(read) = item else { panic!("{item:?}") };
            assert_eq!((read.append, read.condition), (letter.append, letter.condition));
        }
    }

    #[test]
    fn parse_line_of_an_earlier_threadkeep_keeps_its_condition() {
        let line = |more: &str| {
            let text = r#"{"kind":"queued","key":"k","version":"9","value":1,"expires_at":1,"queued_at":1,"dispatched":true,"#;
            let items = parse(&format!("{text}\"superseded\":true,{more}}}")).unwrap().0;
            let version = |item: &ImportItem| match item {
                ImportItem::Queued(queued) => (queued.write.record.version.raw(), queued.write.condition),
                other => panic!("{other:?}"),
            };
            items.iter().map(version).collect::<Vec<_>>()
        };
        let update = (9, Condition::IfVersion(Version::from_raw(7)));
        assert_eq!(line(r#""base":"7","sent_versions":["8"]"#), [update]);
        assert_eq!(line(r#""base":"7","sent_versions":["0"]"#), [(7, Condition::Any), update]);
        assert_eq!(line(r#""unverified":true"#), [(9, Condition::Any)]);
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
