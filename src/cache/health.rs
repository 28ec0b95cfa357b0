//! How the cache, its source of truth and its queue are doing.

use std::path::PathBuf;
use std::time::Duration;

use super::{Cache, Inner, OnOutage};
use crate::breaker::{Breaker, State};
use crate::error::{Error, ErrorKind};
use crate::warmup::WarmUp;

/// How the cache and its source of truth are doing.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Health {
    /// `local`, `supabase`, `memory`, or `custom`.
    pub backend: &'static str,
    /// The breaker's state, where the backend has one.
    pub breaker: Option<State>,
    /// Why the breaker is not closed; or what keeps the store from working though it answers, until it works again: a
    /// refused key, missing migrations, a full disk. Also the fault of the queue's file, if the store itself is well.
    pub cause: Option<Error>,
    /// Whether the cause is one of the source of truth, and not of the queue's file alone.
    is_available: bool,
    /// Threads in memory.
    pub threads: u64,
    /// The bytes that they take.
    pub bytes: u64,
    /// The bytes that they may take.
    pub bytes_bound: u64,
    /// What waits on the local disk, where there is such a file.
    pub queue: Option<Queue>,
    /// How far the warm-up is.
    pub warm_up: WarmUp,
}

/// What the file beside the source of truth holds.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Queue {
    /// Where the file lies.
    pub path: PathBuf,
    /// Acknowledged writes that are not yet in the source of truth: falls while they are replayed.
    pub records: u64,
    /// Their bytes, as counted against the bound.
    pub bytes: u64,
    /// The bound of queued writes and dead letters together, in bytes.
    pub bound: u64,
    /// How long the oldest has been waiting.
    pub oldest: Option<Duration>,
    /// How many failed alone, again and again; they are tried less and less often, and delay no others.
    pub parked: u64,
    /// Acknowledged writes that the source of truth turned out not to take.
    pub dead_letters: u64,
    /// Their bytes, as counted against the bound.
    pub dead_letters_bytes: u64,
    /// Last known copies.
    pub copies: u64,
    /// Their bytes, as counted against their bound.
    pub copies_bytes: u64,
    /// The bound of the copies, in bytes.
    pub copies_bound: u64,
    /// Why a write in an outage is not taken: the queue is full, its file cannot be written, or none is wanted there. What
    /// the last write met is forgotten when one is taken, and otherwise after a minute, since it may be mended.
    pub refusal: Option<Error>,
    /// What keeps the file from working, until it works again: it was deleted, its disk is full. Replay stands still meanwhile,
    /// but for a deleted file, whose queue is still replayed.
    pub fault: Option<Error>,
}

impl Health {
    /// Whether the source of truth can be worked with, as far as is known.
    pub fn is_available(&self) -> bool {
        self.is_available
    }

    /// Whether a write would be kept now, as far as is known: in the source of truth, or else in the queue. A daemon in an
    /// outage whose queue works is worth sending requests to; one that can do neither is not.
    ///
    /// # Errors
    /// What stands in the way: of the queue, or where there is none, of the source of truth.
    pub fn can_write(&self) -> Result<(), Error> {
        if self.is_available() {
            return Ok(());
        }
        match (&self.queue, &self.cause) {
            (Some(queue), _) => queue.refusal.clone().map_or(Ok(()), Err),
            (None, Some(cause)) => Err(cause.clone()),
            (None, None) => Err(Error::new(ErrorKind::Unavailable, "the source of truth is unavailable")),
        }
    }
}

impl Cache {
    /// How the cache and its source of truth are doing; asks nobody.
    pub fn health(&self) -> Health {
        self.0.health()
    }
}

impl Inner {
    pub(super) fn health(&self) -> Health {
        let breaker = self.origin.breaker();
        let state = breaker.map(Breaker::state);
        let is_cut_off = state.is_some_and(|state| state != State::Closed);
        let outage = breaker.filter(|_| is_cut_off).and_then(Breaker::cause);
        let cause = outage.or_else(|| self.trouble.get()).or_else(|| self.origin.fault());
        let is_available = !is_cut_off && cause.is_none();
        let (threads, bytes) = self.near.size();
        let bytes_bound = self.limits.memory_bytes;
        Health {
            backend: self.backend,
            breaker: state,
            cause: cause.or_else(|| self.file_fault()),
            is_available,
            threads,
            bytes,
            bytes_bound,
            queue: self.queue(),
            warm_up: *self.warm_up.borrow(),
        }
    }

    /// What waits on disk.
    fn queue(&self) -> Option<Queue> {
        let spool = self.spool.as_ref()?;
        let (holdings, bounds) = (spool.holdings(), spool.bounds());
        // The file is settled first: what memory still shows as queued counts.
        let records = holdings.queue.records.max(self.pending.len() as u64);
        Some(Queue {
            path: spool.path().to_owned(),
            records,
            bytes: holdings.queue.bytes,
            bound: bounds.queue,
            oldest: self.pending.oldest(),
            // One that found its end otherwise is forgotten by replay when its time comes.
            parked: records.min(self.pending.parked() as u64),
            dead_letters: holdings.dead_letters.records,
            dead_letters_bytes: holdings.dead_letters.bytes,
            copies: holdings.replica.records,
            copies_bytes: holdings.replica.bytes,
            copies_bound: bounds.replica,
            refusal: match self.limits.on_outage {
                OnOutage::Queue => self.file_fault().or_else(|| self.refusal().clone()),
                OnOutage::Reject => {
                    let why =
                        "writes are rejected while the source of truth is away (CONVERSATION_ON_OUTAGE)";
                    Some(Error::new(ErrorKind::Unavailable, why))
                }
            },
            fault: self.file_fault(),
        })
    }

    /// What keeps the queue's file from working.
    pub(super) fn file_fault(&self) -> Option<Error> {
        self.spool.as_ref().and_then(|spool| spool.fault())
    }
}
