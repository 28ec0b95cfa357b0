//! What is done now and then in the background: accesses are reported, what is long expired is forgotten.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::{Call, Inner};
use crate::blocking;

/// Threads in one call.
const PORTION: usize = 500;

/// How often the end of a fault is looked for.
const PROOF: Duration = Duration::from_secs(5);
/// Calls of one purge at most: a store that always says that there is more must not keep it busy for ever.
const PURGES: usize = 1_000;

/// Does the chores every `period`, drawn anew each time between three quarters and all of it so that many daemons do not
/// keep step, until the cache is gone.
pub(super) async fn keep_up(cache: Weak<Inner>, period: Duration) {
    loop {
        // This timer does not count a sleep of the machine. The chores also ask the origin, and so learn what time it is.
        let Some(clock) = cache.upgrade().map(|cache| Arc::clone(cache.origin.clock())) else { return };
        let mut chores = std::pin::pin!(async {
            tokio::select! {
                () = tokio::time::sleep(period.mul_f64(0.75 + fastrand::f64() / 4.0)) => {}
                () = clock.jumped() => {}
            }
        });
        // A fault may keep all traffic away that would show its end, so its end is looked for more often.
        loop {
            let is_time = tokio::select! {
                () = &mut chores => true,
                () = tokio::time::sleep(PROOF) => false,
            };
            let Some(cache) = cache.upgrade() else { return };
            cache.ask_again().await;
            if is_time {
                break;
            }
        }
        let Some(cache) = cache.upgrade() else { return };
        cache.report_accesses().await;
        cache.keep_read().await;
        cache.purge().await;
        cache.tidy().await;
    }
}

impl Inner {
    /// Where the origin needed an operator, asks whether it has got one: there may be no traffic that would tell.
    async fn ask_again(&self) {
        let is_at_fault = self.trouble.get().is_some() || self.origin.fault().is_some();
        if is_at_fault && self.is_reachable() {
            self.note(Call::Probe, self.origin.probe().await).ok();
        }
        if let Some(spool) = self.spool.as_ref().filter(|spool| spool.fault().is_some())
            && let Err(error) = spool.prove().await
        {
            tracing::debug!(%error, "the queue's file does not work yet");
        }
    }

    /// Reports what was read. What cannot be reported now is not reported later: it is a hint, no more.
    pub(super) async fn report_accesses(&self) {
        // It looks at all of memory.
        let near = Arc::clone(&self.near);
        let accessed = blocking::unblock(move || near.take_accessed()).await.unwrap_or_default();
        for keys in accessed.chunks(PORTION) {
            if !self.is_reachable() {
                return;
            }
            if let Err(error) = self.origin.touch(keys).await {
                return tracing::debug!(%error, "accesses could not be reported");
            }
        }
    }

    /// Gives back to the disk what replay has freed, and ends the traces of what was deleted.
    async fn tidy(&self) {
        let Some(spool) = &self.spool else { return };
        match spool.tidy().await {
            // Perhaps it can take writes again: the next one will tell.
            Ok(()) => *self.refusal() = None,
            Err(error) => tracing::debug!(%error, "the queue's file could not be tidied"),
        }
    }

    /// Forgets what is long expired.
    async fn purge(&self) {
        for _ in (0..PURGES).take_while(|_| self.is_reachable()) {
            match self.origin.purge(PORTION).await {
                Ok(PORTION..) => {}
                Ok(_) => return,
                Err(error) => return tracing::debug!(%error, "expired threads could not be purged"),
            }
        }
    }
}
