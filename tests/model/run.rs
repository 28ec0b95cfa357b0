//! Runs a plan in a world: operations under faults and restarts, recovery, and the final documents.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::daemon::Daemon;
use crate::files::Files;
use crate::history::{
    DeadWrite, Document, Drift, FinalState, History, Jump, Op, OpKind, Outcome, Recorder, Rules, WriteKind,
    WriteOp,
};
use crate::oracle;
use crate::plan::{
    Action, Episode, FileAct, HANDLES, KEYS, LOGS, Plan, REGISTERS, Restart, StatementKind, Step,
};
use crate::queue;
use crate::store::Plain;
use crate::world::World;

/// The longest recovery.
const MAX_RECOVERY: Duration = Duration::from_secs(90); // a busy machine misses deadlines for a while

/// Runs a plan and returns its history.
///
/// # Errors
/// The reason, if a handle does not recover or a call was invalid.
pub async fn run(plan: &Plan, world: Arc<dyn World>) -> Result<History, String> {
    let (recorder, files) = (Arc::new(Recorder::new()), Arc::new(Files::new()));
    let daemons = (0..HANDLES).map(|index| {
        let (world, recorder) = (Arc::clone(&world), Arc::clone(&recorder));
        Daemon::start(index, world, recorder, &plan.settings, Arc::clone(&files))
    });
    let daemons: Arc<[Daemon]> = futures::future::join_all(daemons).await.into();
    let episodes = tokio::spawn(run_episodes(
        plan.episodes(),
        Arc::clone(&daemons),
        Arc::clone(&world),
        Arc::clone(&recorder),
    ));
    let sql = run_statements(plan, &*world, &recorder);
    tokio::join!(run_workers(plan, &daemons), sql);
    episodes.abort();
    episodes.await.ok();
    recover(&daemons, &*world).await?;
    let dead_letters = collect_dead_letters(&daemons, &*world).await?;
    read_all(&daemons).await;
    for daemon in &*daemons {
        daemon.shut_down().await;
    }
    let finals = final_states(&*world, &recorder).await;
    let jumps = recorder.jumps();
    let rules = rules(plan, &daemons, &*world, &jumps);
    let (mut ops, notes, file_changes) = (recorder.take(), recorder.notes(), files.changes());
    oracle::note_drift(&mut ops, &jumps, &file_changes);
    match world.invalid_call() {
        Some(message) => Err(message),
        None => Ok(History { ops, dead_letters, file_changes, finals, notes, jumps, rules }),
    }
}

/// Executes the plain SQL of another client. It has no faults, and each result is certain.
async fn run_statements(plan: &Plan, world: &dyn World, recorder: &Recorder) {
    for statement in &plan.statements {
        tokio::time::sleep(statement.pause).await;
        let (key, id) = (statement.key, recorder.id());
        let (kind, plain) = match statement.kind {
            StatementKind::Delete => (WriteKind::Remove, Plain::Delete),
            StatementKind::Append => (WriteKind::Append, Plain::Append(id)),
            StatementKind::Put => {
                let document = Document { ids: vec![id], ..Document::default() };
                (WriteKind::Put, Plain::Put(document, statement.ttl))
            }
        };
        let begin = recorder.now();
        if !world.execute(&world.thread_id(key), &plain).await {
            continue;
        }
        let ttl_ms = i64::try_from(statement.ttl.as_millis()).unwrap();
        let write = WriteOp { id, kind, ttl_ms, outcome: Outcome::Stored };
        let (kind, end) = (OpKind::Write(write), Some(recorder.now()));
        recorder.push(Op {
            handle: HANDLES,
            life: 0,
            key,
            begin,
            end,
            off_ms: 0,
            drift: Drift::default(),
            kind,
        });
    }
}

async fn run_workers(plan: &Plan, daemons: &Arc<[Daemon]>) {
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

/// Runs one episode after another. The caller aborts this task.
async fn run_episodes(
    episodes: impl Iterator<Item = Episode>,
    daemons: Arc<[Daemon]>,
    world: Arc<dyn World>,
    recorder: Arc<Recorder>,
) {
    for episode in episodes {
        tokio::time::sleep(episode.pause).await;
        let ends = tokio::time::Instant::now() + episode.fault.map_or(Duration::ZERO, |(_, span)| span);
        if let Some((fault, _)) = episode.fault {
            recorder.note(format!("handles {:?}: {fault:?}", episode.handles));
            for handle in &episode.handles {
                world.inject(*handle, fault).await;
            }
        }
        if let Some(restart) = episode.restart {
            tokio::time::sleep_until(ends.min(tokio::time::Instant::now() + episode.pause / 4)).await;
            // The restart has its own task, because the caller may abort this one halfway.
            recorder.note(format!("{restart:?}"));
            let daemons = Arc::clone(&daemons);
            let restarted = tokio::spawn(async move { daemons[restart.handle].restart(restart).await });
            tokio::time::sleep_until(ends).await;
            for handle in &episode.handles {
                world.clear(*handle).await;
            }
            restarted.await.unwrap();
        } else {
            tokio::time::sleep_until(ends).await;
        }
        for handle in &episode.handles {
            world.clear(*handle).await;
        }
        recorder.note(format!("handles {:?}: faults ended", episode.handles));
    }
}

/// Ends all faults and waits until the queues are empty. Restarts the handles, so that abandoned writes end, and waits
/// again.
async fn recover(daemons: &[Daemon], world: &dyn World) -> Result<(), String> {
    for (handle, daemon) in daemons.iter().enumerate() {
        world.clear(handle).await;
        // An episode's restart may still run.
        wait_for(daemon, "the cache is open", |_| true).await?;
        wait_for(daemon, "the queue is empty", queue::is_queue_empty).await?;
        let shutdown = Some(Duration::from_secs(20));
        daemon.restart(Restart { handle, shutdown, act: FileAct::Keep, reboots: false }).await;
        wait_for(daemon, "the queue is empty after a restart", queue::is_queue_empty).await?;
    }
    Ok(())
}

async fn wait_for(
    daemon: &Daemon,
    condition: &str,
    holds: impl Fn(&threadkeep::Cache) -> bool,
) -> Result<(), String> {
    let deadline = Instant::now() + MAX_RECOVERY;
    while !daemon.cache()?.is_some_and(|cache| holds(&cache)) {
        if Instant::now() > deadline {
            let health = daemon.cache()?.map(|cache| cache.health());
            let rows = health
                .as_ref()
                .and_then(|health| health.queue.as_ref())
                .map(|queue| queue::rows(&queue.path));
            return Err(format!(
                "no recovery within {MAX_RECOVERY:?}: condition \"{condition}\" is false; {health:?}; rows: {rows:#?}"
            ));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Reads each conversation once more with each handle, from the store.
async fn read_all(daemons: &[Daemon]) {
    let pause = Duration::ZERO;
    for daemon in daemons {
        for key in 0..KEYS {
            for action in [Action::Evict, Action::Get] {
                daemon.step(&Step { pause, key, action, ttl: pause, pad: 0, abandon_after: None }).await;
            }
        }
    }
}

async fn collect_dead_letters(daemons: &[Daemon], world: &dyn World) -> Result<Vec<DeadWrite>, String> {
    let mut dead_letters = Vec::new();
    for (handle, daemon) in daemons.iter().enumerate() {
        let Some(cache) = daemon.cache()? else { continue };
        for dead in queue::dead_letters(&cache).await {
            let key = (0..KEYS).find(|key| world.thread_id(*key) == dead.key).unwrap();
            let is_add = dead.is_append;
            let ids = match dead.json {
                Some(items) if is_add => serde_json::from_str(&items).unwrap(),
                document => document.map_or_else(Vec::new, |json| ids(&json)),
            };
            dead_letters.push(DeadWrite { handle, key, ids, is_add });
        }
    }
    Ok(dead_letters)
}

async fn final_states(world: &dyn World, recorder: &Recorder) -> Vec<FinalState> {
    let mut finals = Vec::new();
    for key in 0..KEYS {
        let at = recorder.now();
        let seen = world.stored_document(&world.thread_id(key)).await.map(|json| ids(&json));
        // An absent document may have expired during the call, so the moment after the call counts.
        let at = if seen.is_some() { at } else { recorder.now() };
        finals.push(FinalState { key, seen, at });
    }
    finals
}

fn ids(json: &str) -> Vec<u64> {
    serde_json::from_str::<Document>(json).unwrap().ids
}

fn rules(plan: &Plan, daemons: &[Daemon], world: &dyn World, jumps: &[Jump]) -> Rules {
    const BETWEEN_DAEMONS_MS: i64 = 2_000;
    let clock_error_ms = world.max_clock_error_ms() + 1;
    let was_within_tolerance = daemons.iter().any(Daemon::was_within_tolerance);
    let openings_ms = daemons.iter().flat_map(Daemon::openings_ms);
    Rules {
        order_ms: 2 * clock_error_ms + if was_within_tolerance { BETWEEN_DAEMONS_MS } else { 0 },
        mark_starts_ms: openings_ms.chain(jumps.iter().map(|jump| jump.at_ms)).collect(),
        clock_ms: 2 * clock_error_ms,
        fresh_ms: i64::try_from(plan.settings.fresh_for.as_millis()).unwrap(),
        registers: REGISTERS,
        logs: LOGS,
        replica_keeps_all: plan.settings.replica_bytes > 1 << 20 && plan.settings.has_file == [true; HANDLES],
        queue_may_be_full: plan.settings.queue_bytes < 1 << 20,
    }
}
