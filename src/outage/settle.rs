//! The end of queued writes: what the store's answers mean for the queue.

use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, params};

use super::Verdict;
use super::dead_letters::add_dead_letter;
use super::file::OutageFile;
use super::replica;
use super::rows::{copy_version, delete_copy, delete_queued, heads, insert, row_bytes};
use super::rules::{self, Settlement};
use super::state::{Settled, WriterState};
use crate::error::Result;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{MAX_WRITE_AGE, Timestamp, Version};
use crate::sqlite::writer::CommitLevel;
use crate::store::{Applied, Condition, WriteHead};

/// The time that an imported write may wait in the queue before the database rejects it as too old. See [`MAX_WRITE_AGE`].
const AGE_MARGIN: Duration = Duration::from_secs(86_400);

/// The answer about one queued write: of the store, or the reason of its rejection.
pub(super) type Answer = (Key, Version, Result<Applied, String>);

impl OutageFile {
    /// Settles queued writes by the store's answers, of replay or of a live attempt that outlived its caller. Returns the
    /// verdict on each write, or `None` if it has left the queue before, or stays in it.
    pub(crate) async fn settle(&self, answers: Vec<(Key, Version, Applied)>) -> Result<Vec<Option<Verdict>>> {
        let answers = answers.into_iter().map(|(key, version, applied)| (key, version, Ok(applied)));
        self.settle_all(answers.collect()).await
    }

    pub(super) async fn settle_all(&self, answers: Vec<Answer>) -> Result<Vec<Option<Verdict>>> {
        let (clock, limit) = (Arc::clone(&self.clock), self.limits.replica);
        let is_harmless =
            |(.., answer): &Answer| matches!(answer, Ok(Applied::Stored | Applied::VersionInFuture));
        // A dead letter is synced before replay sends the next write of its conversation (C5).
        let level = match answers.iter().all(is_harmless) {
            true => self.settle_level,
            false => CommitLevel::PowerCut,
        };
        let work = move |connection: &Connection, state: &mut WriterState| {
            let settle = |(key, version, answer): &Answer| {
                settle_row(connection, state, key, *version, answer, clock.now())
            };
            let verdicts = answers.iter().map(settle).collect();
            // Stored writes became copies, so the replica may exceed its limit.
            replica::evict(connection, state, limit)?;
            verdicts
        };
        self.write(level, work).await
    }
}

/// Settles a row. Returns `None` if it has left the queue before, or stays in it.
pub(super) fn settle_row(
    connection: &Connection,
    state: &mut WriterState,
    key: &Key,
    version: Version,
    answer: &Result<Applied, String>,
    now: Timestamp,
) -> rusqlite::Result<Option<Verdict>> {
    let rows = heads(connection, key)?;
    let Some(row) = rows.iter().find(|row| row.write.version == version) else { return Ok(None) };
    let settlement = match answer {
        Err(_) => Some(Settlement::DeadLetter),
        // The store has this very write, from another writer id.
        Ok(Applied::Superseded(held) | Applied::Conflict(held)) if *held == version => {
            Some(Settlement::Stored)
        }
        Ok(applied) if rebase(connection, key, &row.write, *applied, now)? => return Ok(None),
        Ok(applied) => rules::settle(&rows, version, applied),
    };
    let verdict = match settlement {
        Some(Settlement::Stored) => {
            turn_into_copy(connection, state, key, version, now)?;
            Verdict::Stored
        }
        Some(Settlement::DeadLetter) => {
            let (reason, newer) = reason(row.write.condition, answer);
            // The dead letter comes first, because it copies the value from the row.
            let bytes = add_dead_letter(connection, key, version, &reason, newer, now)?;
            state.usage.dead_letters.add(bytes);
            delete_queued(connection, state, key, version)?;
            if let Some(newer) = newer {
                drop_older_copy(connection, state, key, newer, now)?;
            }
            Verdict::Dead { reason, newer }
        }
        Some(Settlement::Stays) | None => return Ok(None),
    };
    let newest_left = rows.iter().rev().map(|row| row.write.version).find(|left| *left != version);
    let settled = Settled { key: key.clone(), version, verdict: verdict.clone(), newest_left };
    state.change.settled.push(settled);
    Ok(Some(verdict))
}

/// Turns a queued write that the store holds into a copy. The value stays where it is.
fn turn_into_copy(
    connection: &Connection,
    state: &mut WriterState,
    key: &Key,
    version: Version,
    now: Timestamp,
) -> rusqlite::Result<()> {
    if copy_version(connection, key)? > version {
        return delete_queued(connection, state, key, version);
    }
    delete_copy(connection, state, key)?;
    // Only columns of fixed size change, so SQLite writes no page of the value.
    let sql = "update records set is_queued = 0, at = ?3 where key = ?1 and is_queued = 1 and version = ?2
               returning seq, bytes";
    let values = params![key.as_str(), version.raw(), now.0];
    let (seq, bytes): (i64, i64) =
        connection.prepare_cached(sql)?.query_row(values, |row| Ok((row.get(0)?, row.get(1)?)))?;
    state.left_queue(seq, bytes.unsigned_abs());
    state.usage.replica.add(bytes.unsigned_abs());
    // The store may have been seen with a newer version, so this copy is not the last known one (I16).
    if seq <= state.unverified {
        delete_copy(connection, state, key)?;
    }
    Ok(())
}

/// Replaces a copy that is older than a version of the store by a tombstone of that version (I16).
fn drop_older_copy(
    connection: &Connection,
    state: &mut WriterState,
    key: &Key,
    newer: Version,
    now: Timestamp,
) -> rusqlite::Result<()> {
    if copy_version(connection, key)? >= newer {
        return Ok(());
    }
    delete_copy(connection, state, key)?;
    let tombstone = Record::tombstone(key.clone(), newer);
    state.usage.replica.add(row_bytes(&tombstone));
    insert(connection, state.next_seq(), &tombstone, now, None)
}

/// Whether a version is so old that the database rejects it, or soon will.
pub(super) fn is_too_old(version: Version, now: Timestamp) -> bool {
    version < Version::min_at(now.minus(MAX_WRITE_AGE - AGE_MARGIN))
}

/// Gives an imported update another base, if the store holds something older than its base. Returns whether it did.
///
/// A conversation of a local file that was last written long ago is queued as an update of its own version. It replaces
/// anything older, as a put does.
fn rebase(
    connection: &Connection,
    key: &Key,
    write: &WriteHead,
    applied: Applied,
    now: Timestamp,
) -> rusqlite::Result<bool> {
    let (Condition::IfVersion(base), Applied::Conflict(held)) = (write.condition, applied) else {
        return Ok(false);
    };
    if held >= base || !is_too_old(base, now) {
        return Ok(false);
    }
    let sql = "update records set if_version = ?3 where key = ?1 and is_queued = 1 and version = ?2";
    Ok(connection.execute(sql, params![key.as_str(), write.version.raw(), held.raw()])? == 1)
}

/// Returns the reason of a dead letter, and the version that superseded it.
fn reason(condition: Condition, answer: &Result<Applied, String>) -> (String, Option<Version>) {
    match answer {
        Err(reason) => (format!("rejected: {reason}"), None),
        Ok(Applied::TooOld) => ("older than 7 days".into(), None),
        Ok(Applied::Superseded(newer) | Applied::Conflict(newer)) => match condition {
            Condition::Any => ("superseded".into(), Some(*newer)),
            Condition::IfVersion(_) => {
                let text =
                    "superseded: another writer changed the conversation after this update had read it";
                (text.into(), Some(*newer))
            }
        },
        Ok(other) => (format!("the store answered {other:?}"), None),
    }
}
