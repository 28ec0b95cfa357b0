//! The validation of imported items.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::model::json::Json;
use crate::model::key::user;
use crate::model::version::{Timestamp, Version};
use crate::outage::{ImportItem, QueuedWrite};
use crate::store::Condition;

/// The largest error of a clock that issued a version.
const MAX_LEAD: Duration = Duration::from_secs(86_400);
/// The first millisecond of the year 10000.
const END_OF_TIME: i64 = 253_402_300_800_000;

/// Separates the valid items from the invalid ones, which come with their index.
pub(in crate::outage) fn validate(items: Vec<ImportItem>) -> (Vec<ImportItem>, Vec<(usize, Error)>) {
    let now = Clock::new().now();
    let (mut valid, mut invalid) = (Vec::new(), Vec::new());
    for (at, item) in items.into_iter().enumerate() {
        match validate_item(&item, now) {
            Ok(()) => valid.push(item),
            Err(error) => invalid.push((at, error)),
        }
    }
    (valid, invalid)
}

fn validate_item(item: &ImportItem, now: Timestamp) -> Result<()> {
    let (record, append, times) = match item {
        ImportItem::Queued(QueuedWrite { write, queued_at, .. }) => {
            (&*write.record, write.append.as_ref(), vec![*queued_at])
        }
        ImportItem::DeadLetter(letter) => {
            (&letter.record, letter.append.as_ref(), vec![letter.queued_at, letter.died_at])
        }
        ImportItem::LocalRecord(record) => (record, None, Vec::new()),
    };
    let invalid =
        |message: String| Err(Error::new(ErrorKind::Invalid, message).with_key(record.key.as_str()));
    // SQLite does not notice corruption inside a value, so the texts are parsed.
    if let Some(value) = &record.value {
        Json::new(value.as_str())?;
    }
    Json::new(record.metadata.as_str())?;
    if let Some(id) = &record.user {
        user(id)?;
    }
    if let Some(append) = append {
        append.at.check()?;
        if !record.value.as_ref().is_some_and(|items| items.as_str().trim_start().starts_with('[')) {
            return invalid("the items of the append are not an array".into());
        }
    }
    let is_time = |at: &Timestamp| (0..END_OF_TIME).contains(&at.0);
    if let Some(at) = times.iter().chain([&record.expires_at]).find(|at| !is_time(at)) {
        return invalid(format!("{} is not a time in milliseconds", at.0));
    }
    if let Some(version) = invalid_version(item, record.version) {
        return invalid(format!("{version} is not a version"));
    }
    // A version far in the future would win over every write until its time has come.
    let queued_at = times.first().copied().unwrap_or(now);
    if record.version.at() > queued_at.max(now).plus(MAX_LEAD) {
        let days = record.version.at().since(now).as_secs() / 86_400;
        return invalid(format!(
            "the version {} is {days} days ahead of this machine's clock: no clock has issued it yet, and it would win \
             over every write until then",
            record.version
        ));
    }
    Ok(())
}

/// Returns a version of an item that no clock can have issued.
fn invalid_version(item: &ImportItem, version: Version) -> Option<Version> {
    let (condition, newer) = match item {
        ImportItem::Queued(queued) => (queued.write.condition, None),
        ImportItem::DeadLetter(letter) => (letter.condition, letter.newer),
        ImportItem::LocalRecord(_) => (Condition::Any, None),
    };
    // An update may change a conversation that never existed, so its base may be `Version::NONE`.
    let base = match condition {
        Condition::IfVersion(base) => Some(base).filter(|base| *base < Version::NONE),
        Condition::Any | Condition::IfPresent => None,
    };
    newer.into_iter().chain([version]).find(|version| *version <= Version::NONE).or(base)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::key::Key;
    use crate::model::record::Record;
    use crate::outage::DeadLetter;

    #[test]
    fn validate_impossible_versions_are_rejected() {
        let record = Record::tombstone(Key::new("k").unwrap(), Version::from_raw(7));
        let with_base = |base| {
            let mut queued = QueuedWrite::new(record.clone(), Timestamp(1));
            queued.write.condition = Condition::IfVersion(Version::from_raw(base));
            ImportItem::Queued(queued)
        };
        let with_newer = |newer| {
            let mut letter = DeadLetter::new(record.clone(), Timestamp(1), Timestamp(1), "superseded");
            letter.newer = Some(Version::from_raw(newer));
            ImportItem::DeadLetter(letter)
        };
        let items = [with_base(0), with_base(-1), with_newer(1), with_newer(0)];
        let (valid, invalid) = validate(items.into());
        assert_eq!((valid.len(), invalid.len()), (2, 2), "{invalid:?}");
        assert!(
            invalid.iter().all(|(_, error)| error.to_string().contains("is not a version")),
            "{invalid:?}"
        );
    }
}
