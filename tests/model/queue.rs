//! The outage file of a handle: the queue, dead letters and freshness, as types of the model.

use std::path::Path;

use threadkeep::{Builder, Cache, Conversation, Freshness, WriteOutcome};

use crate::clocks::true_time;
use crate::history::{Claim, Outcome};
use crate::plan::Settings;

/// The thread id and the document of a dead letter.
pub struct DeadLetterText {
    pub key: String,
    pub json: Option<String>,
    pub is_append: bool,
}

pub fn with_queue(builder: Builder, path: &Path, settings: &Settings) -> Builder {
    builder.queue(path).queue_max_bytes(settings.queue_bytes).replica_max_bytes(settings.replica_bytes)
}

/// Makes a closed file look as if the machine had booted since.
pub fn change_boot(path: &Path) {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    if !path.exists() || boot.is_empty() {
        return;
    }
    let file = rusqlite::Connection::open(path).unwrap();
    file.busy_timeout(std::time::Duration::from_secs(20)).unwrap();
    file.execute("update meta set value = replace(value, ?1, 'earlier')", [boot.trim()]).unwrap();
}

/// Returns the queued writes of an open file: the key, the lead of version and time over the true time in milliseconds, and
/// whether the version is provisional.
pub fn rows(path: &Path) -> Vec<(String, i64, i64, bool)> {
    let sql = "select key, version >> 21, at, is_provisional from records where is_queued = 1 order by seq";
    let file = rusqlite::Connection::open(path).unwrap();
    let mut rows = file.prepare(sql).unwrap();
    let now = true_time().0;
    let lead = |row: &rusqlite::Row<'_>| {
        Ok((row.get(0)?, row.get::<_, i64>(1)? - now, row.get::<_, i64>(2)? - now, row.get(3)?))
    };
    rows.query_map([], lead).unwrap().map(Result::unwrap).collect()
}

pub fn is_queue_empty(cache: &Cache) -> bool {
    cache.health().queue.is_none_or(|queue| queue.records == 0)
}

pub async fn dead_letters(cache: &Cache) -> Vec<DeadLetterText> {
    if cache.health().queue.is_none() {
        return Vec::new();
    }
    let dead_letters = cache.dead_letters().await.unwrap();
    let text = |dead: threadkeep::DeadLetter| DeadLetterText {
        key: dead.record.key.as_str().to_owned(),
        json: dead.record.value.map(|json| json.as_str().to_owned()),
        is_append: dead.append.is_some(),
    };
    dead_letters.into_iter().map(text).collect()
}

pub fn outcome(outcome: WriteOutcome) -> Outcome {
    match outcome {
        WriteOutcome::Stored => Outcome::Stored,
        WriteOutcome::Superseded => Outcome::Superseded,
        WriteOutcome::Queued => Outcome::Queued,
        other => panic!("the model lacks the variant: {other:?}"),
    }
}

pub fn claim(found: &Conversation) -> Claim {
    match found.freshness() {
        Freshness::Fresh => Claim::Fresh,
        Freshness::Stale { .. } => Claim::Stale,
        Freshness::Queued => Claim::Queued,
        other => panic!("the model lacks the variant: {other:?}"),
    }
}
