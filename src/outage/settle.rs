//! The end of queued writes: what the store's answers mean for the queue.

use std::sync::Arc;

use rusqlite::{Connection, params};

use super::Verdict;
use super::dead_letters::add_dead_letter;
use super::file::OutageFile;
use super::replica;
use super::rows::{
    copy, copy_version, delete_copy, delete_queued, heads, insert, queued_write_of, row_bytes,
};
use super::rules::{self, Settlement};
use super::state::{Settled, WriterState};
use crate::error::Result;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};
use crate::sqlite::writer::CommitLevel;
use crate::store::{Applied, Condition, WriteHead, WriteKind};

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
        let is_harmless = |(.., answer): &Answer| {
            matches!(
                answer,
                Ok(Applied::Stored
                    | Applied::Appended { .. }
                    | Applied::AppendedBefore(_)
                    | Applied::VersionInFuture)
            )
        };
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
        Err(_) => Settlement::DeadLetter,
        Ok(applied) => rules::settle(&row.write, *applied, now),
    };
    let verdict = match settlement {
        Settlement::Stored => {
            turn_into_copy(connection, state, key, version, now)?;
            Verdict::Stored
        }
        Settlement::Appended => {
            Verdict::Appended(append_to_copy(connection, state, key, version, answer, now)?)
        }
        Settlement::DeadLetter => {
            let (reason, newer) = reason(&row.write, answer);
            // The dead letter comes first, because it copies the value from the row.
            let bytes = add_dead_letter(connection, key, version, &reason, newer, now)?;
            state.usage.dead_letters.add(bytes);
            delete_queued(connection, state, key, version)?;
            if let Some(newer) = newer {
                drop_older_copy(connection, state, key, newer, now)?;
            }
            Verdict::Dead { reason, newer }
        }
        Settlement::Rebased(base) => {
            let sql = "update records set if_version = ?3 where key = ?1 and is_queued = 1 and version = ?2";
            connection.execute(sql, params![key.as_str(), version.raw(), base.raw()])?;
            return Ok(None);
        }
        Settlement::Stays => return Ok(None),
    };
    let left = rules::tail_without(&rows, version);
    let settled = Settled { key: key.clone(), version, verdict: verdict.clone(), left };
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

/// Removes a queued append whose items the store has. Returns the version that the conversation has at least.
///
/// A copy of the version before gets the items. Any other copy lacks them, or may lack them.
fn append_to_copy(
    connection: &Connection,
    state: &mut WriterState,
    key: &Key,
    version: Version,
    answer: &Result<Applied, String>,
    now: Timestamp,
) -> rusqlite::Result<Version> {
    let &Ok(Applied::Appended { version: after, over, .. }) = answer else {
        // It was applied before, and perhaps others after it. A load may have saved the copy just before. This version has them all.
        let after =
            if let Ok(Applied::AppendedBefore(after)) = *answer { after.max(version) } else { version };
        delete_queued(connection, state, key, version)?;
        drop_older_copy(connection, state, key, after, now)?;
        return Ok(after);
    };
    let (held, queued) = (copy(connection, key)?, queued_write_of(connection, key, version)?);
    let follows = match &held {
        Some(held) => held.value.is_some() && held.version == over,
        // The copy may be lost.
        None => over == Version::NONE && queued.seq > state.unverified,
    };
    let merged = queued.write.over(held.as_ref(), after).ok().filter(|_| follows);
    delete_queued(connection, state, key, version)?;
    match merged {
        Some((record, _)) => replace_copy(connection, state, &record, now)?,
        None => drop_older_copy(connection, state, key, after, now)?,
    }
    Ok(after)
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
    replace_copy(connection, state, &Record::tombstone(key.clone(), newer), now)
}

fn replace_copy(
    connection: &Connection,
    state: &mut WriterState,
    record: &Record,
    now: Timestamp,
) -> rusqlite::Result<()> {
    delete_copy(connection, state, &record.key)?;
    state.usage.replica.add(row_bytes(record));
    insert(connection, state.next_seq(), record, now, None)
}

/// Returns the reason of a dead letter, and the version that superseded it.
fn reason(write: &WriteHead, answer: &Result<Applied, String>) -> (String, Option<Version>) {
    let text = match answer {
        Err(reason) => return (format!("rejected: {reason}"), None),
        Ok(Applied::Superseded(newer) | Applied::Conflict(newer)) => {
            let text = match (write.kind, write.condition) {
                (WriteKind::Append, _) => {
                    "superseded: a newer put, remove or plain SQL write took the place of the conversation"
                }
                (_, Condition::IfVersion(_)) => {
                    "superseded: another writer changed the conversation after this update had read it"
                }
                _ => "superseded",
            };
            return (text.into(), Some(*newer));
        }
        Ok(Applied::TooOld) => "older than 7 days",
        Ok(Applied::Absent) => "rejected: the append was for a present conversation only, and it is absent",
        Ok(Applied::NotAnArray) => "rejected: the target of the append is not an array of the conversation",
        Ok(Applied::TooLarge) => "rejected: the conversation would be too large after the append",
        Ok(other) => return (format!("the store answered {other:?}"), None),
    };
    (text.into(), None)
}
