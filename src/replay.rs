//! Replay: what waits in the queue goes into the source of truth, whenever that can be reached.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tracing::Instrument;
use tracing::instrument::WithSubscriber;

use crate::backoff::Backoff;
use crate::error::{Error, ErrorKind, Result};
#[cfg(feature = "sqlite")]
use crate::local::spool::Spool;
use crate::metrics::{Metrics, Replayed};
use crate::near::Near;
use crate::pending::Pending;
use crate::record::{Json, Key, Record, Write};
#[cfg(not(feature = "sqlite"))]
use crate::spool::without::Spool;
use crate::spool::{Fate, Queued, Reason};
use crate::store::{Applied, Store};
use crate::trouble::{Call, Trouble};
use crate::version::{Blindness, Moment, TOLERANCE, Timestamp, Version};

/// What one call carries at first and at least, and at most.
const LEAST: usize = 32;
const RECORDS: usize = 500;
const BYTES: usize = 1 << 20;
/// After so many batches the pace is found out anew.
const MEASURED_ANEW: u32 = 64;
/// Batches under way at once: one is sent, and meanwhile the one before is settled, or the next one read …
const BATCHES: usize = 2;
/// … but beside a call that takes longer than this, the next one is sent, too.
const BESIDE: Duration = Duration::from_millis(100);
/// Records that are sent alone, because a batch with them failed, at once.
const SUSPECTS: usize = 4;
/// The pauses while the source of truth cannot be asked, though no breaker says so.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(10);
/// The most that a source of truth may ask for by `Retry-After`.
const LONGEST_REST: Duration = Duration::from_secs(60);
/// A record that fails alone waits for a second, then two, and so on up to this.
const LONGEST_PARKING: Duration = Duration::from_secs(60);
/// From this failure on the record counts as parked, which is said once.
const PARKED: u32 = 3;
/// When to look again whether a newer write of this handle has taken the place of one.
const SOON: Duration = Duration::from_millis(50);
/// How often a compare-and-set is sent anew over what was found stored.
const BASES: usize = 3;
/// How often a long replay says how far it is.
const REPORT: Duration = Duration::from_secs(5);

/// What connects queue and source of truth.
#[derive(Debug, Clone)]
pub(crate) struct Replay {
    origin: Arc<dyn Store>,
    spool: Arc<Spool>,
    near: Arc<Near>,
    pending: Arc<Pending>,
    /// There may be no traffic that would tell of a refused key, or that it was mended.
    trouble: Arc<Trouble>,
    metrics: Arc<Metrics>,
    /// Whose batch it is to be sent.
    turns: Arc<Semaphore>,
}

/// A record that failed in a batch, and is sent alone from then on.
#[derive(Debug)]
struct Suspect {
    version: Version,
    failures: u32,
    due: Instant,
    is_under_way: bool,
    /// How often it was sent alone, and failed.
    tries: u32,
    /// How many writes the source of truth had accepted when this one came under suspicion, or when replay last stopped.
    accepted: u64,
}

/// How queued writes are sent.
#[derive(Debug, Clone, Copy)]
enum Trial {
    Together,
    /// One suspect; see [`Suspect`].
    Alone {
        was_tried: bool,
        accepted: u64,
    },
}

/// What became of a batch.
#[derive(Debug)]
enum Sent {
    /// All of it has found its end, but for these, which are to be sent again after a while.
    Settled(Vec<(Key, Version, Duration)>),
    /// The source of truth cannot be asked.
    Away(Error),
    /// It can, but did not take these.
    Failed(Error),
}

/// What a call was about, and what became of it.
#[derive(Debug)]
struct Landed {
    was_alone: bool,
    keys: Vec<(Key, Version)>,
    sent: Sent,
    took: Duration,
}

/// How many records a batch has: twice as many as the one before, until that takes half as long again as the shortest, then half.
/// So where the way is long, batches are large; where the database is what takes the time, they are small, and live traffic
/// beside them waits for little. The two are told apart as by TCP Vegas (Brakmo, O'Malley, and Peterson, "TCP Vegas: New
/// Techniques for Congestion Detection and Avoidance", 1994): by the shortest time so far, which is found out anew now and then,
/// for the way may have become a longer one.
#[derive(Debug)]
struct Pace {
    records: usize,
    shortest: Duration,
    calls: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { records: LEAST, shortest: Duration::MAX, calls: 0 }
    }
}

impl Pace {
    fn note(&mut self, took: Duration) {
        self.calls += 1;
        if self.calls == MEASURED_ANEW {
            *self = Self::default();
            return;
        }
        self.shortest = self.shortest.min(took);
        let is_longer = took > self.shortest * 3 / 2;
        let records = if is_longer { self.records / 2 } else { self.records * 2 };
        self.records = records.clamp(LEAST, RECORDS);
    }
}

/// How a replay goes on between two calls.
#[derive(Debug, Default)]
struct Round {
    under_way: JoinSet<Landed>,
    batches: usize,
    pace: Pace,
    suspects: HashMap<Key, Suspect>,
    /// The queue has been read up to here.
    cursor: i64,
    /// The blindness of the clock up to whose end the queue was put right.
    straightened: Option<Blindness>,
    /// Why it has to wait.
    away: Option<Error>,
}

impl Replay {
    pub(crate) fn new(
        origin: Arc<dyn Store>,
        spool: Arc<Spool>,
        near: Arc<Near>,
        pending: Arc<Pending>,
        trouble: Arc<Trouble>,
    ) -> Self {
        let (metrics, turns) = (Arc::new(Metrics::new()), Arc::new(Semaphore::new(1)));
        Self { origin, spool, near, pending, trouble, metrics, turns }
    }

    /// Replays for ever, whether or not there is traffic.
    pub(crate) async fn run(self) {
        let (mut round, mut pauses, mut report) = (Round::default(), pauses(), Report::default());
        let mut changes = self.pending.watch();
        loop {
            changes.borrow_and_update();
            let mended = self.trouble.mended();
            report.tell(self.pending.len());
            self.reachable().await;
            if let Err(error) = self.first_contact(&round).await {
                round.away = Some(error);
            } else if let Err(error) = self.send_more(&mut round).await {
                tracing::warn!(%error, "the queue cannot be read for replay");
                round.away = Some(error);
            }
            if round.under_way.is_empty()
                && let Some(error) = round.away.take()
            {
                let accepted = self.trouble.accepted();
                let pause = pauses.next().max(error.retry_after()).unwrap_or(LAST_PAUSE).min(LONGEST_REST);
                tracing::debug!(%error, ?pause, "replay waits");
                // A live write that is accepted ends the wait, but not more often than every first pause.
                tokio::time::sleep(pause.min(FIRST_PAUSE)).await;
                tokio::select! {
                    () = tokio::time::sleep(pause.saturating_sub(FIRST_PAUSE)) => {}
                    () = mended => {}
                }
                round.begin_again(accepted);
                continue;
            }
            self.pending.set_parked(round.parked());
            let due = round.next_due();
            let sent = tokio::select! {
                Some(sent) = round.under_way.join_next() => sent,
                _ = changes.changed(), if round.away.is_none() => continue,
                () = until(due) => continue,
            };
            if self.take_in(&mut round, sent) {
                pauses = self::pauses();
            }
        }
    }

    async fn reachable(&self) {
        if let Some(breaker) = self.origin.breaker() {
            breaker.closed().await;
        }
    }

    /// Before anything is sent, the source of truth's clock must be known.
    async fn first_contact(&self, round: &Round) -> Result<()> {
        let clock = self.origin.clock();
        if clock.blindness().is_none() || round.away.is_some() || self.pending.len() == 0 {
            return Ok(());
        }
        let asked = clock.moment();
        let probed = self.origin.probe().await;
        self.trouble.note(Call::Probe, &probed);
        probed?;
        clock.trust(asked);
        self.known_now().map(drop)
    }

    /// The present time. While the clock is not known, nothing is sent: what is live would be taken for expired.
    fn known_now(&self) -> Result<Timestamp> {
        let unknown = || {
            Error::new(ErrorKind::Unavailable, "this machine's clock has jumped, and no answer came since")
        };
        self.origin.clock().known_now().ok_or_else(unknown)
    }

    /// Fills the lanes: suspects alone, the others in batches.
    async fn send_more(&self, round: &mut Round) -> Result<()> {
        if round.away.is_some() {
            return Ok(());
        }
        let ended = self.origin.clock().last_ended();
        if round.straightened != ended && !round.under_way.is_empty() {
            return Ok(());
        }
        if round.cursor == 0 || round.straightened != ended {
            // The queue is read anew: what was stamped in that blindness has been passed over.
            (round.cursor, round.straightened) = (0, ended);
            self.spool.straighten().await?;
            self.pending.straighten();
        }
        // From now on it may be in the source of truth, whatever becomes of this process.
        self.spool.mark_sent().await?;
        for key in round.due() {
            match self.spool.queued(&key).await?.filter(|queued| queued.is_waiting) {
                Some(queued) if queued.is_sent && queued.blindness.is_none() => {
                    round.send_alone(self, queued)
                }
                // It was written anew just now.
                Some(_) => {}
                None => _ = round.suspects.remove(&key),
            }
        }
        if round.batches == 0 {
            // The way may be another one by now.
            round.pace = Pace::default();
        }
        while round.batches < BATCHES {
            let next = self.spool.next(round.cursor, round.pace.records, BYTES).await?;
            let Some(last) = next.last() else { break };
            round.cursor = last.seq;
            let batch: Vec<Queued> = next.into_iter().filter(|queued| round.is_trusted(queued)).collect();
            if !batch.is_empty() {
                round.send(self, batch);
            }
        }
        Ok(())
    }

    /// Takes note of how a batch went; says whether the source of truth answered.
    fn take_in(&self, round: &mut Round, sent: Result<Landed, tokio::task::JoinError>) -> bool {
        let Landed { was_alone, keys, sent, took } = match sent {
            Ok(sent) => sent,
            Err(error) => {
                // A panic: what it was about cannot be told, so all is looked at anew.
                tracing::error!(%error, "a replay was given up");
                round.restart();
                return false;
            }
        };
        if !was_alone {
            round.batches -= 1;
            if matches!(sent, Sent::Settled(_)) && keys.len() >= LEAST {
                round.pace.note(took);
            }
        }
        match sent {
            Sent::Settled(again) => {
                if was_alone && keys.iter().any(|(key, _)| round.has_failed(key)) {
                    // The cause of its failures is mended, and perhaps that of the others.
                    round.retry_all();
                }
                keys.iter().filter(|_| was_alone).for_each(|(key, _)| round.look_again(key));
                for (key, version, wait) in again {
                    round.suspect(key, version, wait, self.trouble.accepted());
                }
                true
            }
            Sent::Away(error) => {
                keys.iter().for_each(|(key, _)| round.free(key, was_alone));
                round.away = Some(error);
                false
            }
            Sent::Failed(error) if was_alone => {
                keys.iter().for_each(|(key, _)| round.strike(key, &error));
                true
            }
            Sent::Failed(_) => {
                let accepted = self.trouble.accepted();
                for (key, version) in keys {
                    round.suspect(key, version, Duration::ZERO, accepted);
                }
                true
            }
        }
    }

    /// Until it is dropped, no other batch is sent, unless it takes long.
    async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        tokio::select! {
            turn = self.turns.acquire() => turn.ok(),
            () = tokio::time::sleep(BESIDE) => None,
        }
    }

    /// Sends a batch, and settles what has found its end; says how long the sending took.
    async fn send(&self, batch: Vec<Queued>, trial: Trial) -> (Sent, Duration) {
        let turn = match trial {
            Trial::Together => self.turn().await,
            Trial::Alone { .. } => None,
        };
        let now = match self.known_now() {
            Ok(now) => now,
            Err(unknown) => return (Sent::Away(unknown), Duration::ZERO),
        };
        let (began, start) = (Moment::now(), Instant::now());
        let applied = self.apply(&batch, now).await;
        let took = start.elapsed();
        drop(turn);
        let sent = match applied {
            Ok(applied) => {
                self.trouble.wrote(Ok(&applied));
                self.conclude(batch, applied, began).await
            }
            Err(error) => self.examine(batch, error, trial).await,
        };
        (sent, took)
    }

    async fn conclude(&self, batch: Vec<Queued>, applied: Vec<Applied>, began: Moment) -> Sent {
        let (mut settled, mut again) = (Vec::new(), Vec::new());
        for (queued, applied) in batch.into_iter().zip(applied) {
            let (key, version) = (queued.record.key.clone(), queued.record.version);
            match fate(&queued, applied) {
                // It lost to a write of this very handle, which is about to take its place in the file.
                Some(Fate::Dead(Reason { newer: Some(newer), .. })) if self.pending.passes(&key, newer) => {
                    again.push((key.clone(), version, SOON));
                }
                Some(fate) => settled.push((queued, fate)),
                None => again.push((key.clone(), version, self.restamp(&key, version).await)),
            }
        }
        match self.settle(settled, began).await {
            Ok(()) => Sent::Settled(again),
            // It is sent again, and recognised.
            Err(error) => Sent::Away(error),
        }
    }

    /// Applies a batch; an update is sent anew over what was found stored, as long as that is no other writer's.
    async fn apply(&self, batch: &[Queued], now: Timestamp) -> Result<Vec<Applied>> {
        let mut writes: Vec<Write> = batch.iter().map(|queued| write(queued, now)).collect();
        let mut applied = self.origin.apply_on_trial(&writes).await?;
        for _ in 0..BASES {
            let anew: Vec<(usize, Version)> = (0..applied.len().min(batch.len()))
                .filter_map(|at| Some((at, own_base(&batch[at], applied[at])?)))
                .collect();
            if anew.is_empty() {
                break;
            }
            let some = anew.iter().map(|(at, base)| {
                writes[*at].expect = Some(*base);
                writes[*at].clone()
            });
            let some: Vec<Write> = some.collect();
            for ((at, _), result) in anew.iter().zip(self.origin.apply_on_trial(&some).await?) {
                applied[*at] = result;
            }
        }
        if applied.len() == batch.len() {
            return Ok(applied);
        }
        Err(Error::new(ErrorKind::Schema, "the store did not answer for all records"))
    }

    /// Finds out whether a batch failed because of a record in it, or because the source of truth takes no writes. Only a
    /// record that was refused alone, by its own fault, twice, is given up.
    async fn examine(&self, batch: Vec<Queued>, error: Error, trial: Trial) -> Sent {
        let is_about_records = error.is_outage() || error.may_be_of_one() || error.needs_operator();
        if !is_about_records || error.kind() == ErrorKind::Local {
            return Sent::Away(error);
        }
        if let Err(away) = self.origin.probe().await {
            self.trouble.note::<()>(Call::Probe, &Err(away.clone()));
            return Sent::Away(away);
        }
        let (Trial::Alone { was_tried, accepted }, Some(queued)) = (trial, batch.first()) else {
            return Sent::Failed(error);
        };
        let is_own_fault = was_tried && error.is_own_fault();
        let others_pass = was_tried && self.trouble.accepted() > accepted;
        if others_pass {
            return if is_own_fault { self.give_up(batch, &error).await } else { Sent::Failed(error) };
        }
        // The probe has neither document nor user: that it passed shows nothing about a constraint.
        let is_constraint = error.code().is_some_and(|code| code.starts_with("23"));
        match self.trouble.is_common(&queued.record.key, &error) {
            Some(common) => Sent::Away(common),
            None if is_own_fault && !is_constraint => self.give_up(batch, &error).await,
            None => Sent::Failed(error),
        }
    }

    async fn give_up(&self, batch: Vec<Queued>, error: &Error) -> Sent {
        let reason = Reason { text: format!("refused: {error}"), newer: None };
        let settled = batch.into_iter().map(|queued| (queued, Fate::Dead(reason.clone()))).collect();
        match self.settle(settled, Moment::now()).await {
            Ok(()) => Sent::Settled(Vec::new()),
            Err(error) => Sent::Away(error),
        }
    }

    /// The file first, then memory.
    async fn settle(&self, settled: Vec<(Queued, Fate)>, began: Moment) -> Result<()> {
        let all = settled
            .iter()
            .map(|(queued, fate)| (queued.record.key.clone(), queued.record.version, fate.clone()));
        let was_queued = self.spool.settle(all.collect()).await?;
        let ended = settled.into_iter().zip(was_queued).filter(|(_, was_queued)| *was_queued);
        for ((queued, fate), _) in ended {
            self.metrics.replayed(match &fate {
                Fate::Stored | Fate::Replaced(_) => Replayed::Stored,
                Fate::Dead(Reason { newer: Some(_), .. }) => Replayed::Superseded,
                Fate::Dead(_) => Replayed::Refused,
            });
            let (key, version) = (&queued.record.key, queued.record.version);
            match fate {
                Fate::Stored => self.near.stored(&queued.record, began, !queued.is_sent),
                Fate::Replaced(newer) => self.near.died(key, version, Some(newer)),
                Fate::Dead(reason) => {
                    tracing::error!(
                        thread = %key, reason = %reason.text,
                        "a queued write was given up: it is kept as a dead letter"
                    );
                    self.near.died(key, version, reason.newer);
                }
            }
        }
        Ok(())
    }

    /// Its version lies ahead of the source of truth's clock. A little: real time catches up. More: it gets another one.
    /// Says how long to wait.
    async fn restamp(&self, key: &Key, version: Version) -> Duration {
        let clock = self.origin.clock();
        let excess = version.at().since(clock.now_for_versions().plus(TOLERANCE));
        if excess <= TOLERANCE {
            return excess + Duration::from_millis(50);
        }
        let to = clock.stamp().version;
        match self.spool.restamp(key, version, to).await {
            Ok(true) => self.pending.restamp(key, version, to),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, "a queued write could not be stamped anew");
                return Duration::from_secs(1);
            }
        }
        Duration::ZERO
    }
}

impl Round {
    /// Whether a record may go with others. One that was written anew since it failed may.
    fn is_trusted(&mut self, queued: &Queued) -> bool {
        let key = &queued.record.key;
        let Some(suspect) = self.suspects.get(key) else { return true };
        if suspect.is_under_way || suspect.version == queued.record.version {
            return false;
        }
        self.suspects.remove(key);
        true
    }

    fn send(&mut self, replay: &Replay, batch: Vec<Queued>) {
        self.batches += 1;
        self.spawn(replay, batch, Trial::Together);
    }

    fn send_alone(&mut self, replay: &Replay, queued: Queued) {
        if let Some(suspect) = self.suspects.get_mut(&queued.record.key) {
            suspect.is_under_way = true;
            suspect.version = queued.record.version;
            let (was_tried, accepted) = (suspect.tries > 0, suspect.accepted);
            self.spawn(replay, vec![queued], Trial::Alone { was_tried, accepted });
        }
    }

    fn spawn(&mut self, replay: &Replay, batch: Vec<Queued>, trial: Trial) {
        let was_alone = matches!(trial, Trial::Alone { .. });
        let replay = replay.clone();
        let keys = batch.iter().map(|queued| (queued.record.key.clone(), queued.record.version)).collect();
        let span = tracing::debug_span!("replay", records = batch.len());
        let send = async move {
            let (sent, took) = replay.send(batch, trial).await;
            Landed { was_alone, keys, sent, took }
        };
        self.under_way.spawn(send.instrument(span).with_current_subscriber());
    }

    /// The suspects whose time has come, as many as there is room for.
    fn due(&self) -> Vec<Key> {
        let now = Instant::now();
        let mut due: Vec<_> = self.idle().filter(|(_, suspect)| suspect.due <= now).collect();
        // Those that were tried least come first, or a few that always fail would keep the others from their turn.
        due.sort_by_key(|(_, suspect)| suspect.tries);
        due.truncate(SUSPECTS.saturating_sub(self.sent_alone()));
        due.into_iter().map(|(key, _)| key.clone()).collect()
    }

    /// The suspects that may be sent now or later. One that failed waits until all have been tried: if the others fail as
    /// well, the fault is not its own.
    fn idle(&self) -> impl Iterator<Item = (&Key, &Suspect)> {
        let are_all_tried = self.suspects.values().all(|suspect| suspect.tries > 0);
        let may_go = move |suspect: &Suspect| are_all_tried || suspect.tries == 0;
        self.suspects.iter().filter(move |(_, suspect)| !suspect.is_under_way && may_go(suspect))
    }

    fn sent_alone(&self) -> usize {
        self.suspects.values().filter(|suspect| suspect.is_under_way).count()
    }

    /// Those that wait long. One that was settled, or written anew, is forgotten when its time comes.
    fn parked(&self) -> usize {
        self.suspects.values().filter(|suspect| suspect.failures >= PARKED).count()
    }

    fn next_due(&self) -> Option<Instant> {
        if self.sent_alone() >= SUSPECTS || self.away.is_some() {
            return None;
        }
        self.idle().map(|(_, suspect)| suspect.due).min()
    }

    fn suspect(&mut self, key: Key, version: Version, wait: Duration, accepted: u64) {
        let due = Instant::now() + wait;
        let suspect = Suspect { version, failures: 0, due, is_under_way: false, accepted, tries: 0 };
        self.suspects.insert(key, suspect);
    }

    fn has_failed(&self, key: &Key) -> bool {
        self.suspects.get(key).is_some_and(|suspect| suspect.failures > 0)
    }

    /// The source of truth takes writes that it did not take before: nothing waits any longer.
    fn retry_all(&mut self) {
        let now = Instant::now();
        self.suspects.values_mut().for_each(|suspect| (suspect.failures, suspect.due) = (0, now));
    }

    /// Replay stopped when the source of truth had accepted so many writes: those say nothing any more.
    fn begin_again(&mut self, accepted: u64) {
        self.cursor = 0;
        self.retry_all();
        self.suspects.values_mut().for_each(|suspect| suspect.accepted = accepted);
    }

    /// Something newer may have come while it was sent alone, and have been passed over.
    fn look_again(&mut self, key: &Key) {
        if let Some(suspect) = self.suspects.get_mut(key) {
            (suspect.is_under_way, suspect.due) = (false, Instant::now());
        }
    }

    fn free(&mut self, key: &Key, was_alone: bool) {
        if let Some(suspect) = self.suspects.get_mut(key) {
            suspect.is_under_way = false;
            suspect.tries += u32::from(was_alone);
        }
    }

    /// A record that fails alone waits longer each time. It stays in the queue, and can be exported. One that is refused for
    /// the first time is looked at again when all others have been tried.
    fn strike(&mut self, key: &Key, error: &Error) {
        let Some(suspect) = self.suspects.get_mut(key) else { return };
        suspect.is_under_way = false;
        suspect.tries += 1;
        if suspect.tries == 1 && error.is_own_fault() {
            suspect.due = Instant::now() + SOON;
            return;
        }
        suspect.failures += 1;
        suspect.due =
            Instant::now() + Duration::from_secs(1 << suspect.failures.min(12)).min(LONGEST_PARKING);
        if suspect.failures == PARKED {
            tracing::error!(thread = %key, %error, "a queued write fails again and again: it is parked");
        }
    }

    fn restart(&mut self) {
        self.under_way.abort_all();
        *self = Self { suspects: std::mem::take(&mut self.suspects), ..Self::default() };
        self.suspects.values_mut().for_each(|suspect| suspect.is_under_way = false);
        self.away = Some(Error::new(ErrorKind::Unavailable, "a replay was given up"));
    }
}

/// Says when a replay begins, how far it is, and when it has ended.
#[derive(Debug, Default)]
struct Report {
    began: Option<(Instant, usize)>,
    told: Option<Instant>,
}

impl Report {
    fn tell(&mut self, left: usize) {
        let now = Instant::now();
        match self.began {
            None if left > 0 => {
                tracing::info!(writes = left, "writes wait in the queue");
                (self.began, self.told) = (Some((now, left)), Some(now));
            }
            Some((began, most)) if left == 0 => {
                tracing::info!(writes = most, after = ?now - began, "the queue is empty");
                *self = Self::default();
            }
            Some((began, most)) => {
                self.began = Some((began, most.max(left)));
                if self.told.is_none_or(|told| now - told >= REPORT) {
                    tracing::info!(left, of = most.max(left), "writes wait in the queue");
                    self.told = Some(now);
                }
            }
            None => {}
        }
    }
}

fn pauses() -> Backoff {
    Backoff::new(FIRST_PAUSE, LAST_PAUSE)
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// How a queued write is sent. One whose time to live is over goes without its value, so that what it replaces does not
/// come back.
fn write(queued: &Queued, now: Timestamp) -> Write {
    let record = match queued.record.is_live(now) {
        true => Arc::clone(&queued.record),
        false => Arc::new(Record { value: None, metadata: Json::default(), ..Record::clone(&queued.record) }),
    };
    Write { record, expect: queued.base, again: queued.is_sent }
}

/// What an update may be sent over though it was not expected: what is stored is older than what it goes on from (which
/// has never been stored, or was deleted), or an earlier write of its own.
fn own_base(queued: &Queued, applied: Applied) -> Option<Version> {
    let (Some(base), Applied::Conflict(stored) | Applied::Forgotten(stored)) = (queued.base, applied) else {
        return None;
    };
    let is_ours = stored == Version::NONE || queued.chain.contains(&stored);
    // What goes on from a put takes, as that does, the place of whatever is older. What goes on from an update does not:
    // where that was given up, what is stored is somebody else's.
    let follows_a_put = queued.chain.contains(&Version::NONE) && stored < base;
    (is_ours || follows_a_put).then_some(stored)
}

/// What the verdict means for a queued write; `None` where it is to be sent again.
fn fate(queued: &Queued, applied: Applied) -> Option<Fate> {
    let dead = |text: &str, newer| Some(Fate::Dead(Reason { text: text.into(), newer }));
    match applied {
        Applied::Stored => Some(Fate::Stored),
        Applied::Superseded(newer) | Applied::Conflict(newer) | Applied::Forgotten(newer)
            if queued.replaced_by.contains(&newer) =>
        {
            Some(Fate::Replaced(newer))
        }
        Applied::Superseded(newer) => dead("superseded", Some(newer)),
        Applied::Conflict(_) if own_base(queued, applied).is_some() => None,
        Applied::Conflict(newer) => {
            dead("superseded: another writer has changed the thread since this update read it", Some(newer))
        }
        Applied::Forgotten(newer) => dead(
            "superseded: so often that it cannot be told whether this one was stored before",
            Some(newer),
        ),
        Applied::TooOld => dead("older than 7 days", None),
        Applied::Ahead => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes of the batches that come to be where a call takes so long, and so much longer for each record.
    fn sizes(way: Duration, each: Duration) -> impl Iterator<Item = usize> {
        let mut pace = Pace::default();
        std::iter::from_fn(move || {
            let records = pace.records;
            pace.note(way + each * u32::try_from(records).ok()?);
            Some(records)
        })
    }

    #[test]
    fn batches_are_large_where_the_way_is_long_and_small_where_the_database_is_slow() {
        let far = sizes(Duration::from_millis(50), Duration::from_micros(30));
        assert_eq!(far.take(6).collect::<Vec<_>>(), [32, 64, 128, 256, 500, 500]);
        let mut pace = Pace::default();
        (0..20).for_each(|_| pace.note(Duration::from_millis(40)));
        (0..100).for_each(|_| pace.note(Duration::from_millis(100)));
        assert_eq!(pace.records, RECORDS, "the way has become longer");
        let slow: Vec<_> = sizes(Duration::from_millis(1), Duration::from_micros(300)).take(40).collect();
        assert!(slow.iter().all(|records| *records <= 2 * LEAST), "{slow:?}");
    }
}
