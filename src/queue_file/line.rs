//! JSON lines: how queued writes and dead letters travel between files.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::error::{Error, ErrorKind, Result};
use crate::record::{Json, Key, Record, user};
use crate::spool::{DeadLetter, Incoming, QueuedWrite, can_be_stamped, is_time};
use crate::version::{Timestamp, Version};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Queued,
    Dead,
}

/// Versions travel as strings, since numbers beyond 2^53 do not survive everywhere; times are milliseconds since the epoch.
#[derive(Debug, Serialize, Deserialize)]
struct Line<'a> {
    kind: Kind,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    origin: Option<Cow<'a, str>>,
    #[serde(borrow)]
    key: Cow<'a, str>,
    #[serde(borrow)]
    version: Cow<'a, str>,
    /// Without: a deletion. `null` is a value.
    #[serde(borrow, default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    value: Option<Cow<'a, RawValue>>,
    expires: i64,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    user: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    metadata: Option<Cow<'a, RawValue>>,
    queued_at: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    chain: Vec<String>,
    #[serde(default, skip_serializing_if = "is_false")]
    sent: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    unsure: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    overtaken: bool,
    /// Perhaps overtaken: nobody had verified it yet.
    #[serde(default, skip_serializing_if = "is_false")]
    doubtful: bool,
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

/// A field that is there, also where it is `null`.
fn present<'de: 'a, 'a, D: Deserializer<'de>>(from: D) -> Result<Option<Cow<'a, RawValue>>, D::Error> {
    <&'a RawValue>::deserialize(from).map(|raw| Some(Cow::Borrowed(raw)))
}

/// The JSON on one line: what breaks a line can only stand between its parts.
fn flat(json: &Json) -> Result<Cow<'_, RawValue>> {
    let not_json = |e| Error::new(ErrorKind::Local, "a record in the file is not JSON").with_source(e);
    match json.as_str().contains(['\n', '\r']) {
        false => serde_json::from_str::<&RawValue>(json.as_str()).map(Cow::Borrowed).map_err(not_json),
        true => {
            let flat = json.as_str().replace(['\n', '\r'], " ");
            RawValue::from_string(flat).map(Cow::Owned).map_err(not_json)
        }
    }
}

impl<'a> Line<'a> {
    fn of(kind: Kind, record: &'a Record, queued_at: Timestamp, origin: Option<&'a str>) -> Result<Self> {
        Ok(Self {
            kind,
            origin: origin.map(Cow::Borrowed),
            key: Cow::Borrowed(record.key.as_str()),
            version: record.version.to_string().into(),
            value: record.value.as_ref().map(flat).transpose()?,
            expires: record.expires_at.0,
            user: record.user.as_deref().map(Cow::Borrowed),
            metadata: Some(flat(&record.metadata)?),
            queued_at: queued_at.0,
            base: None,
            chain: Vec::new(),
            sent: false,
            unsure: false,
            overtaken: false,
            doubtful: false,
            died_at: None,
            reason: None,
            newer: None,
        })
    }

    fn text(&self) -> Result<String> {
        let failed = |e| Error::new(ErrorKind::Local, "a record cannot be written as JSON").with_source(e);
        serde_json::to_string(self).map_err(failed)
    }

    /// The record, proved as what a caller says.
    fn record(&self) -> Result<Record> {
        let json = |raw: &RawValue| Json::new(raw.get());
        Ok(Record {
            key: Key::new(&self.key)?,
            version: version(&self.version)?,
            value: self.value.as_deref().map(json).transpose()?,
            expires_at: time(self.expires)?,
            user: self.user.as_deref().map(user).transpose()?,
            metadata: self.metadata.as_deref().map(json).transpose()?.unwrap_or_default(),
        })
    }
}

fn time(millis: i64) -> Result<Timestamp> {
    let at = Some(Timestamp(millis)).filter(|at| is_time(*at));
    at.ok_or_else(|| Error::new(ErrorKind::Invalid, format!("{millis} is not a time in milliseconds")))
}

fn version(text: &str) -> Result<Version> {
    let raw = text.parse().ok().filter(|raw: &i64| *raw > 0);
    let wrong = || Error::new(ErrorKind::Invalid, format!("{text:?} is not a version"));
    raw.map(Version::from_raw).ok_or_else(wrong)
}

/// A queued write as a line, without the line's end.
pub(super) fn of_write(write: &QueuedWrite, origin: Option<&str>) -> Result<String> {
    Line {
        base: write.base.map(|base| base.to_string()),
        chain: write.chain.iter().map(Version::to_string).collect(),
        sent: write.is_sent,
        unsure: write.is_unsure,
        overtaken: write.is_overtaken,
        doubtful: write.is_doubtful,
        ..Line::of(Kind::Queued, &write.record, write.queued_at, origin)?
    }
    .text()
}

/// A dead letter as a line, without the line's end.
pub(super) fn of_letter(letter: &DeadLetter, origin: Option<&str>) -> Result<String> {
    Line {
        died_at: Some(letter.died_at.0),
        reason: Some(Cow::Borrowed(&letter.reason)),
        newer: letter.newer.map(|newer| newer.to_string()),
        ..Line::of(Kind::Dead, &letter.record, letter.queued_at, origin)?
    }
    .text()
}

/// What a line says, and the source of truth that it was queued for.
pub(super) fn parse(text: &str, now: Timestamp) -> Result<(Incoming, Option<String>)> {
    let wrong = |e| Error::new(ErrorKind::Invalid, format!("not a line of an export: {e}"));
    let line: Line<'_> = serde_json::from_str(text).map_err(wrong)?;
    let (record, queued_at) = (line.record()?, time(line.queued_at)?);
    if !can_be_stamped(record.version, queued_at, now) {
        return Err(ahead(record.version, now));
    }
    let versions = |all: &[String]| all.iter().map(|text| version_or_none(text)).collect::<Result<Vec<_>>>();
    let incoming = match line.kind {
        Kind::Queued => Incoming::Queued(QueuedWrite {
            record,
            base: line.base.as_deref().map(version_or_none).transpose()?,
            chain: versions(&line.chain)?,
            is_sent: line.sent,
            is_unsure: line.unsure,
            is_overtaken: line.overtaken,
            is_doubtful: line.doubtful,
            queued_at,
            seq: 0,
        }),
        Kind::Dead => Incoming::Dead(DeadLetter {
            id: 0,
            record,
            queued_at,
            died_at: line.died_at.map_or(Ok(queued_at), time)?,
            reason: line.reason.map_or_else(|| "unknown".into(), Cow::into_owned),
            newer: line.newer.as_deref().map(version).transpose()?,
        }),
    };
    Ok((incoming, line.origin.map(Cow::into_owned)))
}

fn ahead(version: Version, now: Timestamp) -> Error {
    let days = version.at().since(now).as_secs() / 86_400;
    let why = "no clock can have given it yet, and it would win over all that is written until then";
    Error::new(
        ErrorKind::Invalid,
        format!("the version {version} is {days} days ahead of this machine's clock: {why}"),
    )
}

/// An update may go on from a thread that never was.
fn version_or_none(text: &str) -> Result<Version> {
    if text == "0" { Ok(Version::NONE) } else { version(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(value: Option<&str>) -> QueuedWrite {
        let record = Record {
            key: Key::new("a \"key\"\n").unwrap(),
            version: Version::from_raw((1 << 53) + 1),
            value: value.map(|text| Json::new(text).unwrap()),
            expires_at: Timestamp(7),
            user: Some("u\u{1F600}".into()),
            metadata: Json::new("{\r\n\"a\":\t1}").unwrap(),
        };
        QueuedWrite {
            record,
            base: Some(Version::NONE),
            chain: vec![Version::NONE, Version::from_raw(6)],
            is_sent: true,
            is_unsure: true,
            is_overtaken: true,
            is_doubtful: true,
            queued_at: Timestamp(3),
            seq: 9,
        }
    }

    #[test]
    fn a_line_says_all_of_a_write() {
        for value in [None, Some("null"), Some("{\n \"a\": \"x\\ny\" }")] {
            let write = write(value);
            let line = of_write(&write, Some("host")).unwrap();
            assert!(!line.contains('\n') && !line.contains('\r'), "{line}");
            let (Incoming::Queued(read), origin) = parse(&line, Timestamp(1 << 33)).unwrap() else {
                panic!("{line}")
            };
            assert_eq!(origin.as_deref(), Some("host"));
            assert_eq!(read.record.value.is_some(), value.is_some(), "null is a value: {line}");
            let flat = |json: &Json| json.as_str().replace(['\n', '\r'], " ");
            assert_eq!(read.record.value.as_ref().map(flat), write.record.value.as_ref().map(flat));
            assert_eq!(flat(&read.record.metadata), flat(&write.record.metadata));
            assert_eq!((read.record.key, read.record.version), (write.record.key, write.record.version));
            assert_eq!(
                (read.record.user, read.record.expires_at),
                (write.record.user, write.record.expires_at)
            );
            assert_eq!((read.base, read.chain, read.queued_at), (write.base, write.chain, write.queued_at));
            assert!(read.is_sent && read.is_unsure && read.is_overtaken && read.is_doubtful);
        }
    }

    #[test]
    fn a_version_may_be_ahead_of_one_clock_and_not_of_both() {
        let day = 86_400_000;
        for (queued_at, now, is_right) in
            [(9, 9, true), (9, 0, true), (0, 9, true), (7, 7, false), (0, 0, false)]
        {
            let version = Version::lowest(Timestamp(9 * day));
            let (queued_at, now) = (Timestamp(queued_at * day), Timestamp(now * day));
            let record = Record { version, ..write(None).record };
            let line = of_write(&QueuedWrite { record, queued_at, ..write(None) }, None).unwrap();
            assert_eq!(parse(&line, now).is_ok(), is_right, "{queued_at:?} {now:?}");
        }
    }

    #[test]
    fn what_cannot_be_a_record_is_refused_with_a_reason() {
        let line = |key: &str, version: &str, value: &str| {
            format!(
                r#"{{"kind":"queued","key":{key},"version":{version},"value":{value},"expires":1,"queued_at":1}}"#
            )
        };
        assert!(parse(&line("\"k\"", "\"1\"", "1"), Timestamp(1)).is_ok());
        for (bad, why) in [
            (line("\"\"", "\"1\"", "1"), "empty"),
            (line("\"k\"", "\"0\"", "1"), "version"),
            (line("\"k\"", "\"-5\"", "1"), "version"),
            (line("\"k\"", "\"9223372036854775807\"", "1"), "50903 days ahead"),
            (line("\"k\"", "\"1\"", r#""\u0000""#), "\\u0000"),
            (line("\"k\"", "\"1\"", "nonsense"), "not a line"),
            (line("\"k\"", "\"1\"", "1").replace(":1,\"q", ":-1,\"q"), "not a time"),
            ("{}".to_owned(), "kind"),
        ] {
            let error = parse(&bad, Timestamp(1)).unwrap_err();
            assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains(why), "{error}");
        }
    }
}
