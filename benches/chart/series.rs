//! Samples the state of the cache every tenth of a second, and collects the calls of the load.

use std::time::{Duration, Instant};

use threadkeep::{BreakerState, Cache};

use crate::load::{Call, CallOutcome, Load};

pub const STEP: Duration = Duration::from_millis(100);
/// A call that takes longer waits for the store: half of the soft timeout.
const WAIT: Duration = Duration::from_millis(500);

/// Times of the outage, in seconds since the begin of the series.
pub struct Outage {
    pub began: f64,
    pub ended: f64,
    /// The time at which the breaker is closed and the queue is empty.
    pub recovered: f64,
}

/// A sample of the cache's state.
pub struct Sample {
    pub at: f64,
    pub breaker: BreakerState,
    pub queued: u64,
}

pub struct Series {
    began: Instant,
    pub samples: Vec<Sample>,
    pub calls: Vec<Call>,
}

/// The calls that started in one interval.
#[derive(Default)]
pub struct Bin {
    reads: Vec<Duration>,
    writes: Vec<Duration>,
    /// Reads by outcome: fresh, queued, stale, failed.
    pub sources: [usize; 4],
}

impl Series {
    /// Begins a series and discards the earlier calls of the load.
    pub fn begin(load: &Load) -> Self {
        load.take();
        Self { began: Instant::now(), samples: Vec::new(), calls: Vec::new() }
    }

    pub fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    pub async fn watch(&mut self, cache: &Cache, load: &Load, span: Duration) {
        let until = Instant::now() + span;
        while Instant::now() < until {
            tokio::time::sleep(STEP).await;
            let health = cache.health();
            let queued = health.queue.map_or(0, |queue| queue.records);
            self.samples.push(Sample { at: self.now(), breaker: health.breaker.unwrap(), queued });
            self.calls.extend(load.take().into_iter().filter(|call| call.started >= self.began));
        }
    }

    /// Returns the length of the series in seconds.
    pub fn span(&self) -> f64 {
        self.samples.last().unwrap().at
    }

    pub fn bins(&self, width: f64) -> Vec<Bin> {
        let mut bins: Vec<Bin> = Vec::new();
        bins.resize_with((self.span() / width) as usize, Bin::default);
        for call in &self.calls {
            let at = call.started.duration_since(self.began).as_secs_f64() / width;
            let Some(bin) = bins.get_mut(at as usize) else { continue };
            if call.is_read {
                bin.reads.push(call.took);
                bin.sources[call.outcome as usize] += 1;
            } else {
                bin.writes.push(call.took);
            }
        }
        bins
    }

    /// Returns the main figures of the picture as text.
    pub fn summary(&self, outage: &Outage) -> String {
        let inside = |call: &&Call| {
            let at = call.started.duration_since(self.began).as_secs_f64();
            at >= outage.began && at < outage.ended
        };
        let count = |is_read: bool, outcome: CallOutcome| {
            self.calls
                .iter()
                .filter(inside)
                .filter(|call| call.is_read == is_read && call.outcome == outcome)
                .count()
        };
        let opened = self.samples.iter().find(|sample| sample.breaker == BreakerState::Open);
        let waits = self.calls.iter().filter(inside).filter(|call| call.took > WAIT);
        let last_wait =
            waits.map(|call| call.started.duration_since(self.began).as_secs_f64()).fold(0.0, f64::max);
        format!(
            "an outage of {:.0} s: the breaker opened after {:.1} s, and no call waited for the store after {:.2} s\n\
             reads: {} fresh, {} queued, {} stale, {} failed (conversations that this daemon never read)\n\
             writes: {} stored, {} queued, 0 failed\n\
             most queued: {}; all writes replayed {:.1} s after the end",
            outage.ended - outage.began,
            opened.map_or(f64::NAN, |sample| sample.at - outage.began),
            last_wait - outage.began,
            count(true, CallOutcome::Fresh),
            count(true, CallOutcome::Queued),
            count(true, CallOutcome::Stale),
            count(true, CallOutcome::Failed),
            count(false, CallOutcome::Fresh),
            count(false, CallOutcome::Queued),
            self.samples.iter().map(|sample| sample.queued).max().unwrap_or_default(),
            outage.recovered - outage.ended,
        )
    }
}

impl Bin {
    /// Returns a percentile of the reads or writes, in milliseconds.
    pub fn latency(&self, of_reads: bool, share: f64) -> Option<f64> {
        let mut took = if of_reads { self.reads.clone() } else { self.writes.clone() };
        took.sort();
        let at = (share * took.len() as f64) as usize;
        took.get(at.min(took.len().saturating_sub(1))).map(|took| took.as_secs_f64() * 1e3)
    }
}
