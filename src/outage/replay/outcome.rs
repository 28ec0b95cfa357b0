//! The requests for queued writes, and the meaning of the store's answers.

use std::sync::Arc;

use crate::model::json::Json;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};
use crate::outage::{DeadLetterReason, QueuedRow, ReplayOutcome};
use crate::store::{Applied, Write};

/// Returns the request for a queued write. An expired write is sent without its value. Otherwise the older record that it
/// replaces would come back.
pub(super) fn to_write(queued: &QueuedRow, now: Timestamp) -> Write {
    let record = if queued.record.is_live(now) {
        Arc::clone(&queued.record)
    } else {
        Arc::new(Record { value: None, metadata: Json::default(), ..Record::clone(&queued.record) })
    };
    Write { record, if_version: queued.base, is_retry: queued.is_dispatched }
}

/// Returns the stored version if a conflicting update may overwrite it. That version is an earlier write of this daemon, or is
/// older than the base, or does not exist.
pub(super) fn rebase_target(queued: &QueuedRow, applied: Applied) -> Option<Version> {
    let (Some(base), Applied::Conflict(stored) | Applied::Indeterminate(stored)) = (queued.base, applied)
    else {
        return None;
    };
    let is_ours = stored == Version::NONE || queued.sent_versions.contains(&stored);
    // An update of a queued put replaces any older version, as the put does. An update of a queued update does not: if its base
    // became a dead letter, the stored version belongs to another daemon.
    let follows_a_put = queued.sent_versions.contains(&Version::NONE) && stored < base;
    (is_ours || follows_a_put).then_some(stored)
}

/// Returns the end of a queued write. `None` if replay must send the write again.
pub(super) fn outcome(queued: &QueuedRow, applied: Applied) -> Option<ReplayOutcome> {
    let dead_letter =
        |text: &str, newer| Some(ReplayOutcome::DeadLettered(DeadLetterReason { text: text.into(), newer }));
    match applied {
        Applied::Stored => Some(ReplayOutcome::Stored),
        // First, because a newer write of this daemon is no reason for a dead letter (I10).
        Applied::Superseded(newer) | Applied::Conflict(newer) | Applied::Indeterminate(newer)
            if queued.replaced_by.contains(&newer) =>
        {
            Some(ReplayOutcome::Replaced(newer))
        }
        Applied::Superseded(newer) => dead_letter("superseded", Some(newer)),
        // The rebases of this call are used up. The next call begins from the base again.
        Applied::Conflict(_) if rebase_target(queued, applied).is_some() => None,
        Applied::Conflict(newer) => dead_letter(
            "superseded: another writer changed the conversation after this update had read it",
            Some(newer),
        ),
        Applied::Indeterminate(newer) => dead_letter(
            "superseded: the store has accepted too many later writes to tell whether it had accepted this one",
            Some(newer),
        ),
        Applied::TooOld => dead_letter("older than 7 days", None),
        Applied::VersionInFuture => None,
    }
}
