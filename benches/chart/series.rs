//! What was seen, in steps of a tenth of a second.

use std::time::{Duration, Instant};

use threadkeep::{Cache, State};

use crate::load::{Call, End, Load};

pub const STEP: Duration = Duration::from_millis(100);

/// When it happened, in seconds.
pub struct Outage {
    pub began: f64,
    pub ended: f64,
    /// From here on the breaker is closed and the queue empty.
    pub well: f64,
}

/// How things stood at a moment.
pub struct Moment {
    pub at: f64,
    pub breaker: State,
    pub queued: u64,
}

pub struct Series {
    began: Instant,
    pub moments: Vec<Moment>,
    pub calls: Vec<Call>,
}

/// The calls begun in one step of time.
#[derive(Default)]
pub struct Bin {
    reads: Vec<Duration>,
    writes: Vec<Duration>,
    /// Reads by where they came from: fresh, queued, stale, failed.
    pub sources: [usize; 4],
}

impl Series {
    /// Forgets what the load did before.
    pub fn begin(load: &Load) -> Self {
        load.take();
        Self { began: Instant::now(), moments: Vec::new(), calls: Vec::new() }
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
            self.moments.push(Moment { at: self.now(), breaker: health.breaker.unwrap(), queued });
            self.calls.extend(load.take().into_iter().filter(|call| call.begun >= self.began));
        }
    }

    /// The time that the picture shows, in seconds.
    pub fn span(&self) -> f64 {
        self.moments.last().unwrap().at
    }

    pub fn bins(&self, width: f64) -> Vec<Bin> {
        let mut bins: Vec<Bin> = Vec::new();
        bins.resize_with((self.span() / width) as usize, Bin::default);
        for call in &self.calls {
            let at = call.begun.duration_since(self.began).as_secs_f64() / width;
            let Some(bin) = bins.get_mut(at as usize) else { continue };
            if call.is_read {
                bin.reads.push(call.took);
                bin.sources[call.end as usize] += 1;
            } else {
                bin.writes.push(call.took);
            }
        }
        bins
    }

    /// What the picture shows, in words.
    pub fn summary(&self, outage: &Outage) -> String {
        let inside = |call: &&Call| {
            let at = call.begun.duration_since(self.began).as_secs_f64();
            at >= outage.began && at < outage.ended
        };
        let count = |is_read: bool, end: End| {
            self.calls.iter().filter(inside).filter(|call| call.is_read == is_read && call.end == end).count()
        };
        let opened = self.moments.iter().find(|moment| moment.breaker == State::Open);
        format!(
            "an outage of {:.0} s: the breaker opened after {:.1} s\n\
             reads: {} fresh, {} queued, {} stale, {} failed (threads that this daemon never saw)\n\
             writes: {} stored, {} queued, 0 failed\n\
             most queued: {}; all replayed {:.1} s after the end",
            outage.ended - outage.began,
            opened.map_or(f64::NAN, |moment| moment.at - outage.began),
            count(true, End::Fresh),
            count(true, End::Queued),
            count(true, End::Stale),
            count(true, End::Failed),
            count(false, End::Fresh),
            count(false, End::Queued),
            self.moments.iter().map(|moment| moment.queued).max().unwrap_or_default(),
            outage.well - outage.ended,
        )
    }
}

impl Bin {
    /// The latency that this share of the reads or writes stayed below, in milliseconds.
    pub fn latency(&self, of_reads: bool, share: f64) -> Option<f64> {
        let mut took = if of_reads { self.reads.clone() } else { self.writes.clone() };
        took.sort();
        let at = (share * took.len() as f64) as usize;
        took.get(at.min(took.len().saturating_sub(1))).map(|took| took.as_secs_f64() * 1e3)
    }
}
