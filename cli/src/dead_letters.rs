//! The command `queue dead-letters` lists, exports, deletes and requeues the writes that Supabase did not take.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;
use threadkeep::tools::QueueAdmin;
use threadkeep::{Builder, DeadLetter, Key};

use crate::arguments::DeadLetters;
use crate::export_line;
use crate::failure::{Failure, Outcome, tell};
use crate::output::{Output, QueueEntry, counted};
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
            let entry = QueueEntry::of_dead_letter(letter);
            out.either(&entry, || entry.text())
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
    tell(&format!("exported {}", counted(count, "dead letter")));
    if let Some(last) = last.filter(|_| delete) {
        let deleted = file.delete_dead_letters(&last).await?;
        tell(&format!("deleted {}", counted(deleted, "dead letter")));
    }
    Ok(())
}

/// Requeues the newest dead letter of the conversation, or of each conversation. If it is an append, the appends before it come first.
async fn requeue(file: &QueueAdmin, key: Option<&Key>, out: &mut Output) -> Result<Outcome, Failure> {
    let mut letters: BTreeMap<Key, Vec<DeadLetter>> = BTreeMap::new();
    for_each(
        async |last: Option<&DeadLetter>| file.dead_letters(last).await,
        async |letter| {
            let found = &letter.record.key;
            if key.is_none_or(|key| key == found) {
                letters.entry(found.clone()).or_default().push(letter.clone());
            }
            Ok(())
        },
    )
    .await?;
    if let Some(key) = key.filter(|_| letters.is_empty()) {
        return Err(Failure::Other(format!("there is no dead letter of the conversation {key}")));
    }
    let (mut requeued, mut left) = (0_usize, 0_usize);
    for letters in letters.into_values() {
        for letter in newest(letters) {
            if file.requeue(&letter).await? {
                requeued += 1;
            } else {
                left += 1;
                let key = &letter.record.key;
                tell(&format!("threadkeep: a newer write of {key} is queued; its dead letter stays"));
            }
        }
    }
    let text = || match requeued {
        0 => "requeued no dead letter".to_owned(),
        _ => format!(
            "requeued {}; `threadkeep queue replay`, or the next start of a daemon, sends the queue to Supabase",
            counted(requeued, "dead letter")
        ),
    };
    out.either(&json!({"requeued": requeued, "left": left}), text)?;
    Ok(if left == 0 { Outcome::Done } else { Outcome::Partly })
}

/// Returns the newest dead letter, which replaces all others, or the appends after the newest one that is no append.
fn newest(mut letters: Vec<DeadLetter>) -> Vec<DeadLetter> {
    letters.sort_by_key(|letter| letter.record.version);
    let appends = letters.iter().rev().take_while(|letter| letter.append.is_some()).count();
    letters.split_off(letters.len() - appends.max(1))
}
