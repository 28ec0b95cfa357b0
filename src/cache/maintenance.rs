//! Maintenance: a background task reports access times, purges expired records, and shrinks the outage file.

use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::cache::{Access, Shared};
use crate::resilience::tasks::unblock;

/// The limit on conversations of one call to the store.
const MAX_BATCH: usize = 500;

/// The interval of the checks whether a fault has ended.
const RECHECK_INTERVAL: Duration = Duration::from_secs(5);
/// The limit on calls of one purge, in case a store always reports more expired records (I12).
const MAX_PURGE_CALLS: usize = 1_000;

/// Runs the maintenance every `interval` until the cache is dropped.
///
/// Each wait is a random 75 to 100 % of the interval, so that many daemons do not run in step.
pub(super) async fn run(cache: Weak<Shared>, interval: Duration) {
    loop {
        // The timer does not count a sleep of the machine. After a jump of the clock the maintenance runs at once: its calls to
        // the store also correct the clock.
        let Some(clock) = cache.upgrade().map(|cache| Arc::clone(cache.store.clock())) else { return };
        let mut next_run = std::pin::pin!(async {
            tokio::select! {
                () = tokio::time::sleep(interval.mul_f64(0.75 + fastrand::f64() / 4.0)) => {}
                () = clock.jumped() => {}
            }
        });
        // A fault may stop all traffic that would show its end. So the task checks more often.
        loop {
            let is_due = tokio::select! {
                () = &mut next_run => true,
                () = tokio::time::sleep(RECHECK_INTERVAL) => false,
            };
            let Some(cache) = cache.upgrade() else { return };
            cache.recheck().await;
            if is_due {
                break;
            }
        }
        let Some(cache) = cache.upgrade() else { return };
        cache.flush_access_times().await;
        cache.copies.save_first_reads().await;
        cache.purge().await;
        cache.vacuum().await;
    }
}

impl Shared {
    /// Probes the store, or checks the outage file, if the last call showed a fault. Without traffic, no other call would show
    /// its end.
    async fn recheck(&self) {
        let has_fault = self.alert.get().is_some() || self.store.fault().is_some();
        if has_fault && self.is_breaker_closed() {
            self.note(Access::Probe, self.store.probe().await).ok();
        }
        if let Some(file) = self.copies.file.as_ref().filter(|file| file.fault().is_some())
            && let Err(error) = file.check_working().await
        {
            tracing::debug!(%error, "the outage file still has a fault");
        }
    }

    /// Reports the conversations that callers read since the last report. A report that fails is dropped: access times are
    /// hints.
    pub(super) async fn flush_access_times(&self) {
        // The scan visits all of memory, so it runs on a blocking thread.
        let memory = Arc::clone(&self.copies.memory);
        let accessed = unblock(move || memory.drain_accessed()).await.unwrap_or_default();
        for keys in accessed.chunks(MAX_BATCH) {
            if !self.is_breaker_closed() {
                return;
            }
            if let Err(error) = self.store.touch(keys).await {
                return tracing::debug!(%error, "access times were not reported to the store");
            }
        }
    }

    /// Returns the space of replayed writes to the disk, and erases deleted contents.
    async fn vacuum(&self) {
        let Some(file) = &self.copies.file else { return };
        match file.vacuum().await {
            // The file may take writes again. The next enqueue shows it.
            Ok(()) => *self.enqueue_error.lock() = None,
            Err(error) => {
                tracing::debug!(%error, "the outage file was not vacuumed; the next maintenance retries")
            }
        }
    }

    /// Deletes records that expired long ago.
    async fn purge(&self) {
        for _ in (0..MAX_PURGE_CALLS).take_while(|_| self.is_breaker_closed()) {
            match self.store.purge(MAX_BATCH).await {
                Ok(MAX_BATCH..) => {}
                Ok(_) => return,
                Err(error) => {
                    return tracing::debug!(%error, "expired conversations were not purged; the next maintenance retries");
                }
            }
        }
    }
}
