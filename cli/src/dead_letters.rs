//! The command `queue dead-letters` lists, exports, deletes and requeues the writes that Supabase did not take.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;
use threadkeep::tools::QueueAdmin;
use threadkeep::{Builder, DeadLetter, Key};

use crate::arguments::DeadLetters;
use crate::export_line;
use crate::failure::{Failure, Outcome, tell};
use crate::output::{Output, QueueEntry, shown};
use crate::queue::{ExportTarget, for_each};

pub async fn dead_letters(
    settings: Builder,
    dead: &DeadLetters,
    out: &mut Output,
) -> Result<Outcome, Failure> {
    let file = settings.open_queue().await?;
    if let Some(to) = &dead.export {
        export(&file, to, dead.delete, out).await?;
    }
    match &dead.requeue {
        Some(key) => requeue(&file, Some(&Key::new(key)?), out).await,
        None if dead.all => requeue(&file, None, out).await,
        None if dead.export.is_none() => list(&file, out).await,
        None => Ok(Outcome::Done),
    }
}

async fn list(file: &QueueAdmin, out: &mut Output) -> Result<Outcome, Failure> {
    for_each(
        async |last: Option<&DeadLetter>| file.dead_letters(last).await,
        async |letter| {
            let entry = QueueEntry::dead(letter);
            out.either(&entry, || {
                let (died, reason) = (entry.died_at.as_deref().unwrap_or_default(), shown(&letter.reason));
                format!("{}\t{}\t{} bytes\tdied {died}\t{reason}", shown(entry.key), entry.kind, entry.bytes)
            })
        },
    )
    .await?;
    Ok(Outcome::Done)
}

/// Exports all dead letters. Then deletes the exported ones, if the caller asked for that.
///
/// The deletion comes after the sync of the export, so a crash loses no dead letter.
async fn export(file: &QueueAdmin, to: &Path, delete: bool, out: &mut Output) -> Result<(), Failure> {
    if delete && to == Path::new("-") {
        return Err(Failure::Usage("--delete needs an export to a file: give --export FILE".into()));
    }
    let mut lines = ExportTarget::open(to, out)?;
    let mut last = None;
    let count = for_each(
        async |last: Option<&DeadLetter>| file.dead_letters(last).await,
        async |letter| {
            last = Some(letter.clone());
            lines.write(&export_line::of_dead_letter(letter, file.project())?)
        },
    )
    .await?;
    lines.finish()?;
    tell(&format!("exported {count} dead letters"));
    if let Some(last) = last.filter(|_| delete) {
        tell(&format!("deleted {} dead letters", file.delete_dead_letters(&last).await?));
    }
    Ok(())
}

/// Requeues the newest dead letter of the conversation, or of each conversation.
async fn requeue(file: &QueueAdmin, key: Option<&Key>, out: &mut Output) -> Result<Outcome, Failure> {
    let mut newest: BTreeMap<Key, DeadLetter> = BTreeMap::new();
    for_each(
        async |last: Option<&DeadLetter>| file.dead_letters(last).await,
        async |letter| {
            let record = &letter.record;
            let is_newer = newest.get(&record.key).is_none_or(|held| held.record.version < record.version);
            if is_newer && key.is_none_or(|key| *key == record.key) {
                newest.insert(record.key.clone(), letter.clone());
            }
            Ok(())
        },
    )
    .await?;
    if let Some(key) = key.filter(|_| newest.is_empty()) {
        return Err(Failure::Other(format!("there is no dead letter of the conversation {key}")));
    }
    let (mut requeued, mut left) = (0, 0);
    for letter in newest.values() {
        if file.requeue(letter).await? {
            requeued += 1;
        } else {
            left += 1;
            tell(&format!(
                "threadkeep: a newer write of {} is queued; its dead letter stays",
                letter.record.key
            ));
        }
    }
    let text = || {
        format!("requeued {requeued}; the next start of a daemon, or `threadkeep queue replay`, sends them")
    };
    out.either(&json!({"requeued": requeued, "left": left}), text)?;
    Ok(if left == 0 { Outcome::Done } else { Outcome::Partly })
}
