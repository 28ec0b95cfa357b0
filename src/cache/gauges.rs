//! The gauges. A background task samples them from `health`, never a call.

use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::cache::Shared;
use crate::error::Error;
use crate::observe::metrics::GaugeSet;

/// The sampling interval. It is shorter than any usual scrape interval.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// Samples the gauges now, and then at each interval until the cache is dropped.
pub(super) fn run(cache: &Arc<Shared>) -> impl Future<Output = ()> + use<> {
    let (mut gauges, cache) = (GaugeSet::default(), Arc::downgrade(cache));
    sample(&cache, &mut gauges);
    async move {
        loop {
            tokio::time::sleep(SAMPLE_INTERVAL).await;
            if !sample(&cache, &mut gauges) {
                return;
            }
        }
    }
}

/// Records one sample. Returns false if the cache is dropped.
fn sample(cache: &Weak<Shared>, gauges: &mut GaugeSet) -> bool {
    let cache = cache.upgrade();
    cache.iter().for_each(|cache| cache.record_gauges(gauges));
    cache.is_some()
}

impl Shared {
    fn record_gauges(&self, gauges: &mut GaugeSet) {
        let health = self.health();
        gauges.record("threadkeep_cache_entries", health.conversations as f64);
        gauges.record("threadkeep_cache_bytes", health.bytes as f64);
        gauges.record("threadkeep_cache_limit_bytes", health.max_bytes as f64);
        gauges.record("threadkeep_warmup_conversations", health.warmup.conversations as f64);
        let queue = health.queue.as_ref();
        let of = |what: fn(&super::QueueHealth) -> u64| queue.map_or(0.0, |queue| what(queue) as f64);
        gauges.record("threadkeep_queue_records", of(|queue| queue.records));
        gauges.record("threadkeep_queue_bytes", of(|queue| queue.bytes));
        gauges.record("threadkeep_queue_limit_bytes", of(|queue| queue.max_bytes));
        gauges.record("threadkeep_queue_parked_records", of(|queue| queue.parked));
        gauges.record("threadkeep_dead_letters", of(|queue| queue.dead_letters));
        gauges.record("threadkeep_dead_letters_bytes", of(|queue| queue.dead_letters_bytes));
        gauges.record("threadkeep_replica_records", of(|queue| queue.copies));
        gauges.record("threadkeep_replica_bytes", of(|queue| queue.copies_bytes));
        gauges.record("threadkeep_replica_limit_bytes", of(|queue| queue.copies_max_bytes));
        let oldest = queue.and_then(|queue| queue.oldest).unwrap_or_default();
        gauges.set("threadkeep_queue_oldest_age_seconds", oldest.as_secs_f64());
        let lag = health.feed.as_ref().map_or(Duration::ZERO, |feed| feed.lag);
        gauges.set("threadkeep_feed_lag_seconds", lag.as_secs_f64());
        let offset = self.copies.clock.offset();
        gauges.set("threadkeep_clock_offset_seconds", offset as f64 / 1_000.0);
        let alert = self.alert.get().or(health.cause).filter(Error::needs_operator);
        let alerts = [alert, self.store.fault(), self.file_fault()];
        gauges.record_alerts(&alerts.iter().flatten().collect::<Vec<_>>());
    }
}
