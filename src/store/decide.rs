//! The rule by which every store decides about a write (I9).

use crate::model::clock::Clock;
use crate::model::version::{MAX_CLOCK_SKEW, MAX_WRITE_AGE, Version};
use crate::store::{Applied, Write};

/// The number of accepted versions that a store remembers for each key.
pub const REMEMBERED_VERSIONS: usize = 16;

/// Decides whether a write replaces the stored record (I9). Returns `None` if the store has to keep it.
///
/// `accepted` holds the versions that the store accepted for this key, newest first. It is empty if no record exists. All
/// stores in this process use this function. The SQL of the migrations implements the same rules.
///
/// ```
/// use threadkeep::store::{Applied, Clock, Key, Record, Write, decide};
///
/// # fn main() -> threadkeep::Result<()> {
/// let clock = Clock::new();
/// let (older, newer) = (clock.issue_version(), clock.issue_version());
/// let write = Write::new(Record::tombstone(Key::new("thread-1")?, older));
/// assert_eq!(decide(&write, &[], &clock), None);
/// assert_eq!(decide(&write, &[newer], &clock), Some(Applied::Superseded(newer)));
/// # Ok(())
/// # }
/// ```
pub fn decide(write: &Write, accepted: &[Version], clock: &Clock) -> Option<Applied> {
    let (version, now) = (write.record.version, clock.now_for_versions());
    let held = accepted.first().copied().unwrap_or_default();
    // A repeated write is idempotent, even if its version is too old by now.
    if accepted.contains(&version) {
        return Some(Applied::Stored);
    }
    if version.at() > now.plus(MAX_CLOCK_SKEW) {
        return Some(Applied::VersionInFuture);
    }
    if version < Version::min_at(now.minus(MAX_WRITE_AGE)) {
        return Some(Applied::TooOld);
    }
    match write.if_version {
        // With a full list, a retry older than the list may have been accepted before.
        Some(expected) if expected != held => match accepted.get(REMEMBERED_VERSIONS - 1) {
            Some(oldest) if write.is_retry && version < *oldest => Some(Applied::Indeterminate(held)),
            _ => Some(Applied::Conflict(held)),
        },
        _ if version < held => Some(Applied::Superseded(held)),
        _ => None,
    }
}
