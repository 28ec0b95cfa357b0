//! What the local file adds to the handle, in the words of the model.

use std::path::Path;

use threadkeep::{Builder, Cache, Conversation, Freshness, WriteOutcome};

use crate::history::{Claim, Outcome};
use crate::plan::Settings;

pub const HAS_LANDED: bool = true;

pub struct Letter {
    pub key: String,
    pub json: Option<String>,
}

pub fn with_queue(builder: Builder, path: &Path, settings: &Settings) -> Builder {
    builder.queue(path).queue_max_bytes(settings.queue_bytes).replica_max_bytes(settings.replica_bytes)
}

/// As when the machine is booted: what was known of the clock counts no more.
pub fn forget_the_clock(path: &Path) {
    let file = rusqlite::Connection::open(path).unwrap();
    file.busy_timeout(std::time::Duration::from_secs(20)).unwrap();
    file.execute("delete from meta where name = 'clock_checkpoint'", []).unwrap();
}

pub fn is_queue_empty(cache: &Cache) -> bool {
    cache.health().queue.is_none_or(|queue| queue.records == 0)
}

pub async fn dead_letters(cache: &Cache) -> Vec<Letter> {
    let all = cache.dead_letters().await.unwrap();
    let letter = |dead: threadkeep::DeadLetter| Letter {
        key: dead.record.key.as_str().to_owned(),
        json: dead.record.value.map(|json| json.as_str().to_owned()),
    };
    all.into_iter().map(letter).collect()
}

pub fn outcome(durability: WriteOutcome) -> Outcome {
    match durability {
        WriteOutcome::Stored => Outcome::Stored,
        WriteOutcome::Superseded => Outcome::Superseded,
        WriteOutcome::Queued => Outcome::Queued,
        other => panic!("unknown to the model: {other:?}"),
    }
}

pub fn claim(found: &Conversation) -> Claim {
    match found.freshness() {
        Freshness::Fresh => Claim::Fresh,
        Freshness::Stale { .. } => Claim::Stale,
        Freshness::Queued => Claim::Queued,
        other => panic!("unknown to the model: {other:?}"),
    }
}
