//! `queue dead`: writes that Supabase turned out not to take.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;
use threadkeep::{Builder, DeadLetter, Key, QueueFile};

use crate::arguments::Dead;
use crate::failure::{Failure, Outcome, tell};
use crate::output::{Entry, Output, shown};
use crate::queue::{Lines, for_each_letter};

pub async fn dead(settings: Builder, dead: &Dead, out: &mut Output) -> Result<Outcome, Failure> {
    let file = settings.open_queue_file().await?;
    if let Some(to) = &dead.export {
        export(&file, to, dead.forget, out).await?;
    }
    match &dead.requeue {
        Some(key) => requeue(&file, Some(&Key::new(key)?), out).await,
        None if dead.all => requeue(&file, None, out).await,
        None if dead.export.is_none() => list(&file, out).await,
        None => Ok(Outcome::Done),
    }
}

async fn list(file: &QueueFile, out: &mut Output) -> Result<Outcome, Failure> {
    for_each_letter(file, async |letter| {
        let entry = Entry::dead(letter);
        out.either(&entry, || {
            let (died, reason) = (entry.died_at.as_deref().unwrap_or_default(), shown(&letter.reason));
            format!("{}\t{}\t{} bytes\tdied {died}\t{reason}", shown(entry.key), entry.kind, entry.bytes)
        })
    })
    .await?;
    Ok(Outcome::Done)
}

/// Exports all, and forgets what is in a file on disk then.
async fn export(file: &QueueFile, to: &Path, forget: bool, out: &mut Output) -> Result<(), Failure> {
    if forget && to == Path::new("-") {
        return Err(Failure::Usage(
            "dead letters are forgotten only once they are in a file: --export FILE".into(),
        ));
    }
    let mut lines = Lines::to(to, out)?;
    let mut last = None;
    let count = for_each_letter(file, async |letter| {
        last = Some(letter.clone());
        lines.write(&file.export_letter(letter)?)
    })
    .await?;
    lines.finish()?;
    tell(&format!("exported {count} dead letters"));
    if let Some(last) = last.filter(|_| forget) {
        tell(&format!("forgot {} dead letters", file.forget_dead_letters(&last).await?));
    }
    Ok(())
}

/// Queues the newest letter of the thread, or of each thread, again.
async fn requeue(file: &QueueFile, key: Option<&Key>, out: &mut Output) -> Result<Outcome, Failure> {
    let mut newest: BTreeMap<Key, DeadLetter> = BTreeMap::new();
    for_each_letter(file, async |letter| {
        let record = &letter.record;
        let is_newer = newest.get(&record.key).is_none_or(|held| held.record.version < record.version);
        if is_newer && key.is_none_or(|key| *key == record.key) {
            newest.insert(record.key.clone(), letter.clone());
        }
        Ok(())
    })
    .await?;
    if let Some(key) = key.filter(|_| newest.is_empty()) {
        return Err(Failure::Other(format!("there is no dead letter of the thread {key}")));
    }
    let (mut requeued, mut left) = (0, 0);
    for letter in newest.values() {
        if file.requeue(letter).await? {
            requeued += 1;
        } else {
            left += 1;
            tell(&format!(
                "threadkeep: of {} a newer write waits in the queue: its letter stays",
                letter.record.key
            ));
        }
    }
    let said = || {
        format!("requeued {requeued}; `threadkeep queue replay`, or the next start of a daemon, sends them")
    };
    out.either(&json!({"requeued": requeued, "left": left}), said)?;
    Ok(if left == 0 { Outcome::Done } else { Outcome::Partly })
}
