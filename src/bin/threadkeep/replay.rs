//! `queue replay`: what waits goes to Supabase, without a daemon.

use std::time::{Duration, Instant};

use serde_json::json;
use threadkeep::{Backend, Builder, Cache, OnOutage, Queue};

use crate::arguments::Replay;
use crate::failure::{Failure, Outcome, tell, with_causes};
use crate::output::Output;
use crate::progress::Progress;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

pub async fn replay(settings: Builder, replay: &Replay, out: &mut Output) -> Result<Outcome, Failure> {
    if settings.backend() != Backend::Supabase {
        let text =
            "CONVERSATION_STORAGE_BACKEND: only `supabase` has a queue; set that, with its URL and key";
        return Err(Failure::Other(text.into()));
    }
    let cache = settings.on_outage(OnOutage::Reject).open().await?;
    let before = queue(&cache)?;
    wait(&cache, &before, replay.timeout).await?;
    let (after, cause) = (queue(&cache)?, cache.health().cause);
    cache.shutdown(Duration::ZERO).await?;
    let dead = after.dead_letters.saturating_sub(before.dead_letters);
    let replayed = before.records.saturating_sub(after.records).saturating_sub(dead);
    let value = json!({
        "replayed": replayed,
        "dead_letters": dead,
        "left": after.records,
        "cause": cause.as_ref().map(ToString::to_string),
    });
    out.either(&value, || match after.records {
        0 => format!("the queue is empty; {replayed} writes were brought to Supabase"),
        left => format!("{left} writes are left; {replayed} were brought to Supabase"),
    })?;
    if dead > 0 {
        tell(&format!("threadkeep: {dead} writes became dead letters: see `threadkeep queue dead`"));
    }
    if after.records == 0 {
        return Ok(if dead == 0 { Outcome::Done } else { Outcome::Partly });
    }
    tell(&match cause {
        Some(cause) if after.fault.is_some() => format!("threadkeep: {}", with_causes(&cause)),
        Some(cause) => format!("threadkeep: Supabase cannot be written: {}", with_causes(&cause)),
        None => "threadkeep: Supabase answers, but these writes fail again and again, or take longer than the timeout; \
                 --verbose says more"
            .to_owned(),
    });
    Ok(Outcome::Partly)
}

/// Waits until the queue is empty, or nothing has moved for so long.
async fn wait(cache: &Cache, before: &Queue, patience: Duration) -> Result<(), Failure> {
    let of = before.records;
    let mut progress = Progress::new("replaying", Some(of));
    let (mut left, mut moved) = (of, Instant::now());
    while left > 0 && moved.elapsed() < patience {
        tokio::time::sleep(LOOK).await;
        let now = queue(cache)?.records;
        if now != left {
            (left, moved) = (now, Instant::now());
        }
        progress.set(of.saturating_sub(left), Some(of));
        let cause = cache.health().cause;
        progress.note(&cause.map(|cause| cause.to_string()).unwrap_or_default());
    }
    Ok(())
}

fn queue(cache: &Cache) -> Result<Queue, Failure> {
    cache.health().queue.ok_or_else(|| Failure::Other("this backend has no queue".into()))
}
