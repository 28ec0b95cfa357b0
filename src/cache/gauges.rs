//! The gauges say what `health` says.

use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::Inner;
use crate::error::Error;
use crate::metrics::{Levels, TROUBLES};

/// What is shown is at most so old. Whoever scrapes comes by less often.
const PERIOD: Duration = Duration::from_secs(1);

/// Shows what the cache holds, now and from then on, until it is gone.
pub(super) fn follow(cache: &Arc<Inner>) -> impl Future<Output = ()> + use<> {
    let (mut levels, cache) = (Levels::default(), Arc::downgrade(cache));
    look(&cache, &mut levels);
    async move {
        loop {
            tokio::time::sleep(PERIOD).await;
            if !look(&cache, &mut levels) {
                return;
            }
        }
    }
}

fn look(cache: &Weak<Inner>, levels: &mut Levels) -> bool {
    let cache = cache.upgrade();
    cache.iter().for_each(|cache| cache.show(levels));
    cache.is_some()
}

impl Inner {
    fn show(&self, levels: &mut Levels) {
        let health = self.health();
        levels.show("threadkeep_memory_entries", health.threads as f64);
        levels.show("threadkeep_memory_bytes", health.bytes as f64);
        levels.show("threadkeep_memory_bound_bytes", health.bytes_bound as f64);
        levels.show("threadkeep_warm_up_threads", health.warm_up.threads as f64);
        let queue = health.queue.as_ref();
        let of = |what: fn(&super::Queue) -> u64| queue.map_or(0.0, |queue| what(queue) as f64);
        levels.show("threadkeep_queue_records", of(|queue| queue.records));
        levels.show("threadkeep_queue_bytes", of(|queue| queue.bytes));
        levels.show("threadkeep_queue_bound_bytes", of(|queue| queue.bound));
        levels.show("threadkeep_parked_records", of(|queue| queue.parked));
        levels.show("threadkeep_dead_letters", of(|queue| queue.dead_letters));
        levels.show("threadkeep_dead_letters_bytes", of(|queue| queue.dead_letters_bytes));
        levels.show("threadkeep_replica_records", of(|queue| queue.copies));
        levels.show("threadkeep_replica_bytes", of(|queue| queue.copies_bytes));
        levels.show("threadkeep_replica_bound_bytes", of(|queue| queue.copies_bound));
        let oldest = queue.and_then(|queue| queue.oldest).unwrap_or_default();
        levels.set("threadkeep_queue_oldest_seconds", oldest.as_secs_f64());
        let offset = self.origin.clock().offset();
        levels.set("threadkeep_clock_offset_seconds", offset as f64 / 1_000.0);
        let alert = self.trouble.get().or(health.cause).filter(Error::needs_operator);
        let troubles = [alert, self.origin.fault(), self.file_fault()];
        let troubles = troubles.map(|trouble| trouble.map(|trouble| trouble.kind().as_str()));
        for kind in TROUBLES {
            levels.show_trouble(kind, troubles.contains(&Some(*kind)));
        }
    }
}
