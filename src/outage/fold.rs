//! The value of a conversation with queued writes: the copy or a queued write, and the queued appends after it.

use rusqlite::Connection;

use super::file::OutageFile;
use super::rows::{copy, copy_version, heads, queued_from};
use super::rules::{self, FoldStart};
use super::state::UNVERIFIED;
use super::{Folded, QueuedWrite};
use crate::error::Result;
use crate::model::append::appended;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::model::writer::WriterId;
use crate::sqlite::file;
use crate::store::Condition;

impl OutageFile {
    /// Reads the value of a conversation with queued writes.
    ///
    /// Without appends, the newest write is the value, whatever the store holds. Memory knows if the store holds something newer.
    pub(crate) async fn fold(&self, key: &Key) -> Result<Folded> {
        // An append follows the newest copy. Without a working disk, no copy counts.
        let has_copies = self.flush_copies().await.is_ok() && !self.validity.is_invalid();
        let (key, writer) = (key.clone(), self.present_writer());
        self.database.read(move |connection| fold(connection, &key, writer, has_copies)).await
    }
}

fn fold(connection: &Connection, key: &Key, writer: WriterId, has_copies: bool) -> rusqlite::Result<Folded> {
    // One snapshot: between two of them, an append may move from its row to the copy.
    let connection = &*connection.unchecked_transaction()?;
    let rows = heads(connection, key)?;
    let Some(newest) = rows.last().map(|row| row.write.version) else { return Ok(Folded::Nothing) };
    let stored = copy_version(connection, key)?;
    let base = (!rules::must_update_wait(&rows, writer)).then(|| match rows.last() {
        // The value is outdated. No write may take the newer version as its base.
        Some(tail) if !tail.is_append() && !tail.is_provisional && newest < stored => newest,
        // Never the version of a queued update, because that one may still conflict (C3).
        _ => rules::base_for_update(&rows, stored, writer),
    });
    let Some(append) = rows.iter().find(|row| row.is_append()) else {
        let record = queued_from(connection, key, rows.len() - 1)?.pop().map(|queued| queued.write.record);
        let known = |record| Folded::Known { record, base };
        return Ok(record.map_or(Folded::Nothing, known));
    };
    // An expired copy is no absence: another writer may have renewed the conversation.
    let is_live = |copy: &Record| has_copies && copy.is_live(append.write.version.at());
    let copy = copy(connection, key)?.filter(is_live);
    let unknown = Ok(Folded::Unknown { newest });
    let (start, appends) = match rules::fold_start(&rows, stored, copy.is_some()) {
        None => return unknown,
        Some(FoldStart::Copy) => (copy, queued_from(connection, key, 0)?),
        Some(FoldStart::Row(place)) => {
            let mut queued = queued_from(connection, key, place)?.into_iter();
            let Some(first) = queued.next() else { return unknown };
            // The store may have been seen with a newer version than this write (I16).
            if !has_copies || first.seq <= unverified(connection)? {
                return unknown;
            }
            (Some(Record::clone(&first.write.record)), queued.collect())
        }
    };
    let Some(record) = follow(start, &appends, newest) else { return unknown };
    let record = record.unwrap_or_else(|| Record::tombstone(key.clone(), newest));
    Ok(Folded::Known { record: record.into(), base })
}

fn unverified(connection: &Connection) -> rusqlite::Result<i64> {
    Ok(file::meta(connection, UNVERIFIED)?.and_then(|seq| seq.parse().ok()).unwrap_or(0))
}

/// Returns the record after the appends of these writes. An append that the conversation cannot take becomes a dead letter alone.
///
/// The outer `None` means that the value had expired when an append came. Another writer may have renewed the conversation.
fn follow(start: Option<Record>, writes: &[QueuedWrite], newest: Version) -> Option<Option<Record>> {
    let mut held = start;
    for QueuedWrite { write, .. } in writes {
        let Some(append) = &write.append else { continue };
        let is_present = held.as_ref().is_some_and(|held| held.is_live(write.record.version.at()));
        if !is_present && held.as_ref().is_some_and(|held| held.value.is_some()) {
            return None;
        }
        if write.condition == Condition::IfPresent && !is_present {
            continue;
        }
        if let Ok((record, _)) = appended(held.as_ref(), &write.record, append, newest) {
            held = Some(record);
        }
    }
    Some(held.map(|held| Record { version: newest, ..held }))
}
