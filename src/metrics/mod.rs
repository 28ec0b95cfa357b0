//! Every series in one table, and the handles to count with.
//!
//! Counts go through the [`metrics`] facade; whether anything listens is the daemon's decision. The feature `prometheus`
//! has an exporter that is set up for these series.
//!
//! **Install the recorder before anything of threadkeep's is opened**: its handles are made when a cache (or a
//! [`Guard`](crate::Guard)) is, and one that was made before there was a recorder counts into nothing for ever. All
//! series are there from then on, at zero, whatever the backend. So don't let an exporter forget series that did not change
//! for a while (`idle_timeout`): what is counted later would be lost.
//!
//! Gauges follow within a second, without traffic and without anybody who calls [`health`](crate::Cache::health). Where a
//! process has several caches, the gauges are their sum; but the breaker's state, the oldest write and the clock are
//! those of the cache that told last. A clone of a cache is no other cache.
//!
#![doc = include_str!("series.md")]

mod series;

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

pub use series::{SERIES, Series};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::error::Error;

// Labels, in the order of the enums below.
const READS: &[&str] = &["hit", "loaded", "queued", "stale", "absent", "failed"];
const WRITES: &[&str] = &["stored", "superseded", "queued", "failed"];
const REPLAYED: &[&str] = &["stored", "superseded", "refused"];
const OPERATIONS: &[&str] = &["load", "apply", "recent", "touch", "purge", "probe"];
/// Those of which many go together, the first of the operations.
const GATHERED: &[&str] = &["load", "apply"];
const STATES: &[&str] = &["closed", "open", "half_open"];
/// Kinds of error; the last stands for all others.
const FAILURES: &[&str] = &["unavailable", "denied", "busy", "refused", "schema", "other"];
pub(crate) const TROUBLES: &[&str] = &["denied", "schema", "local", "unavailable"];

/// Where the answer to a read came from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Read {
    Hit,
    Loaded,
    Queued,
    Stale,
    Absent,
    Failed,
}

/// How a write ended.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wrote {
    Stored,
    Superseded,
    Queued,
    Failed,
}

/// How a queued write ended.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Replayed {
    Stored,
    Superseded,
    /// Or too old.
    Refused,
}

/// Which call of the store is being timed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operation {
    Load,
    Apply,
    Recent,
    Touch,
    Purge,
    Probe,
}

impl Operation {
    /// Its name, as in the label.
    pub(crate) fn as_str(self) -> &'static str {
        OPERATIONS[self as usize]
    }
}

/// Handles to count with, made once: a cached handle costs 5 ns, the macro 60.
pub(crate) struct Metrics {
    reads: Vec<Counter>,
    writes: Vec<Counter>,
    replayed: Vec<Counter>,
    origin: Vec<Histogram>,
    batches: Vec<Histogram>,
    failures: Vec<Counter>,
    state: Gauge,
    transitions: Vec<Counter>,
    pub(crate) evictions: Counter,
    pub(crate) discarded_fills: Counter,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let all = |name: &'static str, label: &'static str, values: &[&'static str]| {
            values.iter().map(|value| counter!(name, label => *value)).collect()
        };
        Self {
            reads: all("threadkeep_reads_total", "outcome", READS),
            writes: all("threadkeep_writes_total", "outcome", WRITES),
            replayed: all("threadkeep_replayed_total", "outcome", REPLAYED),
            origin: OPERATIONS
                .iter()
                .map(|name| histogram!("threadkeep_origin_seconds", "operation" => *name))
                .collect(),
            batches: GATHERED
                .iter()
                .map(|name| histogram!("threadkeep_batch_records", "operation" => *name))
                .collect(),
            failures: all("threadkeep_failures_total", "kind", FAILURES),
            state: gauge!("threadkeep_breaker_state"),
            transitions: all("threadkeep_breaker_transitions_total", "to", STATES),
            evictions: counter!("threadkeep_memory_evictions_total"),
            discarded_fills: counter!("threadkeep_discarded_fills_total"),
        }
    }

    pub(crate) fn read(&self, read: Read) {
        self.reads[read as usize].increment(1);
    }

    pub(crate) fn wrote(&self, wrote: Wrote) {
        self.writes[wrote as usize].increment(1);
    }

    pub(crate) fn replayed(&self, replayed: Replayed) {
        self.replayed[replayed as usize].increment(1);
    }

    pub(crate) fn called(&self, operation: Operation, took: Duration, failure: Option<&Error>) {
        self.origin[operation as usize].record(took.as_secs_f64());
        if let Some(error) = failure {
            let at = FAILURES.iter().position(|kind| *kind == error.kind().as_str());
            self.failures[at.unwrap_or(FAILURES.len() - 1)].increment(1);
        }
    }

    /// A call goes with so many records.
    pub(crate) fn gathered(&self, operation: Operation, records: usize) {
        if let Some(batches) = self.batches.get(operation as usize) {
            batches.record(records as f64);
        }
    }

    /// The breaker's state, by its number in the table.
    pub(crate) fn breaker(&self, state: u8) {
        self.state.set(f64::from(state));
    }

    pub(crate) fn transition(&self, to: u8) {
        self.breaker(to);
        self.transitions[usize::from(to)].increment(1);
    }
}

/// What one cache holds, as gauges. Those of several caches add up, and what one showed goes with it.
#[derive(Default)]
pub(crate) struct Levels(HashMap<(&'static str, &'static str), Level>);

/// A gauge, and how much of it is this cache's.
struct Level {
    gauge: Gauge,
    shown: f64,
}

impl Level {
    fn new(gauge: Gauge) -> Self {
        Self { gauge, shown: 0.0 }
    }

    fn show(&mut self, value: f64) {
        self.gauge.increment(value - std::mem::replace(&mut self.shown, value));
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        self.show(0.0);
    }
}

impl Levels {
    /// Shows a value of this cache.
    pub(crate) fn show(&mut self, name: &'static str, value: f64) {
        self.0.entry((name, "")).or_insert_with(|| Level::new(gauge!(name))).show(value);
    }

    /// Shows whether there is trouble of a kind.
    pub(crate) fn show_trouble(&mut self, kind: &'static str, is_there: bool) {
        let made = || Level::new(gauge!("threadkeep_trouble", "kind" => kind));
        let level = self.0.entry(("threadkeep_trouble", kind)).or_insert_with(made);
        level.show(f64::from(u8::from(is_there)));
    }

    /// Shows what cannot be added up: it is that of the cache that showed it last.
    pub(crate) fn set(&mut self, name: &'static str, value: f64) {
        self.0.entry((name, "")).or_insert_with(|| Level::new(gauge!(name))).gauge.set(value);
    }
}
