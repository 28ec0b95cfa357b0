//! The command `queue replay` sends the queued writes to Supabase without a daemon.

use std::time::{Duration, Instant};

use serde_json::json;
use threadkeep::{Backend, Builder, Cache, OnOutage, QueueHealth};

use crate::arguments::Replay;
use crate::failure::{Failure, Outcome, tell, with_causes};
use crate::output::{Output, counted};
use crate::progress::Progress;

/// The interval at which the command reads the queue's length.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

pub async fn replay(settings: Builder, replay: &Replay, out: &mut Output) -> Result<Outcome, Failure> {
    if settings.backend() != Backend::Supabase {
        let text = "CONVERSATION_STORAGE_BACKEND: only the backend `supabase` has a queue; set it, with its URL and key";
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
        0 => format!("the queue is empty; replay sent {} to Supabase", counted(replayed, "write")),
        left => format!("the queue still has {}; replay sent {replayed} to Supabase", counted(left, "write")),
    })?;
    if dead > 0 {
        let dead = counted(dead, "dead letter");
        tell(&format!("threadkeep: replay made {dead}: see `threadkeep queue dead-letters`"));
    }
    if after.records == 0 {
        return Ok(if dead == 0 { Outcome::Done } else { Outcome::Partly });
    }
    tell(&match cause {
        Some(cause) if after.fault.is_some() => format!("threadkeep: {}", with_causes(&cause)),
        Some(cause) => format!("threadkeep: writes to Supabase fail: {}", with_causes(&cause)),
        None => "threadkeep: Supabase answers, but these writes fail repeatedly, are ahead of its clock, or take longer than the \
                 timeout; --verbose prints a key and the reason"
            .to_owned(),
    });
    Ok(Outcome::Partly)
}

/// Waits until the queue is empty, or its length has not changed for `timeout` (I12).
async fn wait(cache: &Cache, before: &QueueHealth, timeout: Duration) -> Result<(), Failure> {
    let total = before.records;
    let mut progress = Progress::new("replaying", Some(total));
    let (mut left, mut changed_at) = (total, Instant::now());
    while left > 0 && changed_at.elapsed() < timeout {
        tokio::time::sleep(POLL_INTERVAL).await;
        let now = queue(cache)?.records;
        if now != left {
            (left, changed_at) = (now, Instant::now());
        }
        progress.set(total.saturating_sub(left), Some(total));
        let cause = cache.health().cause;
        progress.note(&cause.map(|cause| cause.to_string()).unwrap_or_default());
    }
    Ok(())
}

fn queue(cache: &Cache) -> Result<QueueHealth, Failure> {
    cache.health().queue.ok_or_else(|| Failure::Other("this backend has no queue".into()))
}
