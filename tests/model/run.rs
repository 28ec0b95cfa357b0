//! Runs a plan in a world: work under faults and restarts, healing, and what is left.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::daemon::Daemon;
use crate::history::{Dead, Document, Final, History, Recorder, Rules};
use crate::plan::{Does, Episode, KEYS, Plan, REGISTERS, Step};
use crate::queue;
use crate::world::World;

/// How long healing may take: probes come half a minute apart after a long outage.
const HEALING: Duration = Duration::from_secs(20);

/// Carries out a plan; the history, or why the world did not heal.
pub async fn run(plan: &Plan, world: Arc<dyn World>) -> Result<History, String> {
    let (recorder, files) = (Arc::new(Recorder::new()), tempfile::tempdir().unwrap());
    let daemons = plan.settings.skews.iter().enumerate().map(|(index, _)| {
        let file = files.path().join(format!("handle-{index}.db"));
        Daemon::start(index, Arc::clone(&world), Arc::clone(&recorder), &plan.settings, file)
    });
    let daemons: Arc<[Daemon]> = futures::future::join_all(daemons).await.into();
    let episodes = tokio::spawn(go_wrong(
        plan.episodes(),
        Arc::clone(&daemons),
        Arc::clone(&world),
        Arc::clone(&recorder),
    ));
    work(plan, &daemons).await;
    episodes.abort();
    episodes.await.ok();
    clear(&daemons, &*world).await?;
    let dead = letters(&daemons, &*world).await?;
    look(&daemons).await;
    for daemon in &*daemons {
        daemon.shut_down().await;
    }
    let finals = finals(&*world, &recorder).await;
    let rules = rules(plan, &daemons, &*world);
    match world.complaint() {
        Some(complaint) => Err(complaint),
        None => Ok(History { ops: recorder.take(), dead, finals, notes: recorder.notes(), rules }),
    }
}

async fn work(plan: &Plan, daemons: &Arc<[Daemon]>) {
    let mut workers = JoinSet::new();
    for (handle, steps) in plan.workers.clone() {
        let daemons = Arc::clone(daemons);
        workers.spawn(async move {
            for step in steps {
                tokio::time::sleep(step.pause).await;
                daemons[handle].step(&step).await;
            }
        });
    }
    while let Some(worker) = workers.join_next().await {
        worker.unwrap();
    }
}

/// One episode after another, until this is aborted.
async fn go_wrong(
    episodes: impl Iterator<Item = Episode>,
    daemons: Arc<[Daemon]>,
    world: Arc<dyn World>,
    recorder: Arc<Recorder>,
) {
    for episode in episodes {
        tokio::time::sleep(episode.pause).await;
        let ends = tokio::time::Instant::now() + episode.trouble.map_or(Duration::ZERO, |(_, span)| span);
        if let Some((trouble, _)) = episode.trouble {
            recorder.note(format!("handles {:?}: {trouble:?}", episode.whom));
            for handle in &episode.whom {
                world.trouble(*handle, trouble).await;
            }
        }
        if let Some(restart) = episode.restart {
            tokio::time::sleep_until(ends.min(tokio::time::Instant::now() + episode.pause / 4)).await;
            // In a task of its own, so that it is completed though this one ends.
            recorder.note(format!("{restart:?}"));
            let daemons = Arc::clone(&daemons);
            let restarted =
                tokio::spawn(async move { daemons[restart.handle].restart(restart.shutdown).await });
            tokio::time::sleep_until(ends).await;
            for handle in &episode.whom {
                world.clear(*handle).await;
            }
            restarted.await.unwrap();
        } else {
            tokio::time::sleep_until(ends).await;
        }
        for handle in &episode.whom {
            world.clear(*handle).await;
        }
        recorder.note(format!("handles {:?}: healed", episode.whom));
    }
}

/// Ends all faults and waits until nothing is queued; restarts both handles, so that abandoned work is done, and waits
/// again.
async fn clear(daemons: &[Daemon], world: &dyn World) -> Result<(), String> {
    for (handle, daemon) in daemons.iter().enumerate() {
        world.clear(handle).await;
        // A restart may be under way.
        wait_for(daemon, "it is open", |_| true).await?;
        wait_for(daemon, "its queue is empty", queue::is_queue_empty).await?;
        daemon.restart(Some(Duration::from_secs(20))).await;
        wait_for(daemon, "its queue is empty after a restart", queue::is_queue_empty).await?;
    }
    Ok(())
}

async fn wait_for(
    daemon: &Daemon,
    what: &str,
    is_so: impl Fn(&threadkeep::Cache) -> bool,
) -> Result<(), String> {
    let deadline = Instant::now() + HEALING;
    while !daemon.cache()?.is_some_and(|cache| is_so(&cache)) {
        if Instant::now() > deadline {
            let health = daemon.cache()?.map(|cache| cache.health());
            return Err(format!("it did not heal: this never came true: {what}; {health:?}"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Each handle reads each thread once more, from the store.
async fn look(daemons: &[Daemon]) {
    let pause = Duration::ZERO;
    for daemon in daemons {
        for key in 0..KEYS {
            for what in [Does::Evict, Does::Get] {
                daemon.step(&Step { pause, key, what, ttl: pause, pad: 0, gives_up_after: None }).await;
            }
        }
    }
}

async fn letters(daemons: &[Daemon], world: &dyn World) -> Result<Vec<Dead>, String> {
    let mut all = Vec::new();
    for (handle, daemon) in daemons.iter().enumerate() {
        let Some(cache) = daemon.cache()? else { continue };
        for letter in queue::dead_letters(&cache).await {
            let key = (0..KEYS).find(|key| world.name(*key) == letter.key).unwrap();
            let ids = letter.json.map_or_else(Vec::new, |json| ids(&json));
            all.push(Dead { handle, key, ids });
        }
    }
    Ok(all)
}

async fn finals(world: &dyn World, recorder: &Recorder) -> Vec<Final> {
    let mut finals = Vec::new();
    for key in 0..KEYS {
        let at = recorder.now();
        let seen = world.truth(&world.name(key)).await.map(|json| ids(&json));
        // What was absent when the answer came may have expired after the question.
        let at = if seen.is_some() { at } else { recorder.now() };
        finals.push(Final { key, seen, at });
    }
    finals
}

fn ids(json: &str) -> Vec<u64> {
    serde_json::from_str::<Document>(json).unwrap().ids
}

fn rules(plan: &Plan, daemons: &[Daemon], world: &dyn World) -> Rules {
    const BETWEEN_DAEMONS: i64 = 2_000;
    let worst = world.worst_ms() + 1;
    let began_blind = daemons.iter().any(Daemon::began_blind);
    Rules {
        order_ms: 2 * worst + if began_blind { BETWEEN_DAEMONS } else { 0 },
        clock_ms: 2 * worst,
        fresh_ms: i64::try_from(plan.settings.fresh_for.as_millis()).unwrap(),
        registers: REGISTERS,
        replica_keeps_all: queue::HAS_LANDED && plan.settings.replica_bytes > 1 << 20,
        may_be_full: plan.settings.queue_bytes < 1 << 20,
    }
}
