//! Metrics: the table of all series, and the handles that record them.
//!
//! The crate records through the [`metrics`] facade. The daemon decides whether a recorder listens. The feature
//! `prometheus` has an exporter with the buckets and descriptions of these series.
//!
//! **Install the recorder before you open a cache.** A cache or a [`ResilientStore`](crate::store::ResilientStore)
//! creates its handles when it is created. A handle that is older than the recorder never records anything. With a
//! recorder, all series exist from the start, at zero, for every backend. Do not set the exporter's `idle_timeout`: the
//! exporter would drop a series that did not change for a while, and later counts would be lost.
//!
//! A background task updates the gauges once a second, so that they are right without traffic. The gauges of several
//! caches in one process add up. The breaker's state, the age of the oldest write and the clock offset cannot be added
//! up: these gauges show the cache that was sampled last. Clones of a handle share one cache.
//!
#![doc = include_str!("series.md")]

use std::collections::HashMap;
use std::time::Duration;

pub use super::series::{SERIES, Series};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::error::Error;
use crate::model::outcome::WriteOutcome;

/// Operations that are batched; a prefix of [`OPERATIONS`], so that one index serves both.
pub(super) const BATCHED_OPERATIONS: &[&str] = &["load", "apply"];
pub(crate) const STATES: &[&str] = &["closed", "open", "half_open"];
/// Kinds of error; the last one stands for all other kinds.
pub(super) const ERROR_KINDS: &[&str] =
    &["unavailable", "unauthorized", "overloaded", "rejected", "schema_outdated", "other"];
pub(super) const ALERT_KINDS: &[&str] = &["unauthorized", "schema_outdated", "local_storage", "unavailable"];

/// Defines an enum and its label values. The discriminant of a variant is the index of its label.
macro_rules! labels {
    ($(#[$doc:meta])* $name:ident, $values:ident: $($variant:ident = $label:literal,)*) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy)]
        pub(crate) enum $name { $($variant,)* }

        pub(super) const $values: &[&str] = &[$($label,)*];
    };
}

labels! {
    /// The source of the answer to a read.
    ReadResult, READS: Hit = "hit", Miss = "miss", Queued = "queued", Stale = "stale", Absent = "absent", Failed = "failed",
}
labels! {
    /// The outcome of a write.
    WriteResult, WRITES: Stored = "stored", Superseded = "superseded", Queued = "queued", Volatile = "volatile", Absent = "absent",
    Failed = "failed",
}
labels! {
    /// The outcome of a queued write in replay. `Rejected` includes a record that is too old.
    ReplayResult, REPLAYED: Stored = "stored", Superseded = "superseded", Rejected = "rejected",
}
labels! {
    /// A call of the store, as in the label `operation`.
    StoreOperation, OPERATIONS: Load = "load", Apply = "apply", List = "list", Changes = "changes", Touch = "touch", Purge = "purge",
    Probe = "probe",
}

impl StoreOperation {
    pub(crate) fn as_str(self) -> &'static str {
        OPERATIONS[self as usize]
    }
}

/// Holds the handles that record metrics.
///
/// The handles are created once, because a cached handle costs 5 ns and the macro 60 ns.
#[derive(Debug)]
pub(crate) struct Metrics {
    reads: Vec<Counter>,
    writes: Vec<Counter>,
    replayed: Vec<Counter>,
    store_requests: Vec<Histogram>,
    batches: Vec<Histogram>,
    failures: Vec<Counter>,
    state: Gauge,
    transitions: Vec<Counter>,
    pub(crate) evictions: Counter,
    pub(crate) stale_loads: Counter,
    pub(crate) feed_changes: Counter,
    pub(crate) feed_invalidations: Counter,
    pub(crate) feed_reloads: Counter,
    pub(crate) feed_restores: Counter,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let counters = |name: &'static str, label: &'static str, values: &[&'static str]| {
            values.iter().map(|value| counter!(name, label => *value)).collect()
        };
        let histograms = |name: &'static str, operations: &[&'static str]| {
            operations.iter().map(|operation| histogram!(name, "operation" => *operation)).collect()
        };
        Self {
            reads: counters("threadkeep_reads_total", "outcome", READS),
            writes: counters("threadkeep_writes_total", "outcome", WRITES),
            replayed: counters("threadkeep_replayed_total", "outcome", REPLAYED),
            store_requests: histograms("threadkeep_store_request_duration_seconds", OPERATIONS),
            batches: histograms("threadkeep_batch_size_records", BATCHED_OPERATIONS),
            failures: counters("threadkeep_store_errors_total", "kind", ERROR_KINDS),
            state: gauge!("threadkeep_breaker_state"),
            transitions: counters("threadkeep_breaker_transitions_total", "to", STATES),
            evictions: counter!("threadkeep_cache_evictions_total"),
            stale_loads: counter!("threadkeep_stale_loads_discarded_total"),
            feed_changes: counter!("threadkeep_feed_changes_total"),
            feed_invalidations: counter!("threadkeep_feed_invalidations_total"),
            feed_reloads: counter!("threadkeep_feed_reloads_total"),
            feed_restores: counter!("threadkeep_feed_restores_total"),
        }
    }

    pub(crate) fn read(&self, read: ReadResult) {
        self.reads[read as usize].increment(1);
    }

    /// Counts the result of a write. A failed one has no outcome.
    pub(crate) fn wrote(&self, outcome: Option<WriteOutcome>) {
        let result = match outcome {
            Some(WriteOutcome::Stored) => WriteResult::Stored,
            Some(WriteOutcome::Superseded) => WriteResult::Superseded,
            Some(WriteOutcome::Queued) => WriteResult::Queued,
            Some(WriteOutcome::Volatile) => WriteResult::Volatile,
            Some(WriteOutcome::Absent) => WriteResult::Absent,
            None => WriteResult::Failed,
        };
        self.writes[result as usize].increment(1);
    }

    pub(crate) fn replayed(&self, replayed: ReplayResult) {
        self.replayed[replayed as usize].increment(1);
    }

    pub(crate) fn called(&self, operation: StoreOperation, took: Duration, failure: Option<&Error>) {
        self.store_requests[operation as usize].record(took.as_secs_f64());
        if let Some(error) = failure {
            let index = ERROR_KINDS.iter().position(|kind| *kind == error.kind().as_str());
            self.failures[index.unwrap_or(ERROR_KINDS.len() - 1)].increment(1);
        }
    }

    /// Records the number of records in one batched call.
    ///
    /// Operations without batches have no histogram and are skipped.
    pub(crate) fn record_batch_size(&self, operation: StoreOperation, records: usize) {
        if let Some(batches) = self.batches.get(operation as usize) {
            batches.record(records as f64);
        }
    }

    /// Shows the breaker's state by its index in [`STATES`].
    pub(crate) fn breaker(&self, state: u8) {
        self.state.set(f64::from(state));
    }

    pub(crate) fn transition(&self, to: u8) {
        self.breaker(to);
        self.transitions[usize::from(to)].increment(1);
    }
}

/// Holds the share of one cache in the process-wide gauges.
///
/// The shares of several caches add up. Dropping the set removes its share.
#[derive(Default)]
pub(crate) struct GaugeSet(HashMap<(&'static str, &'static str), (Gauge, f64)>);

impl Drop for GaugeSet {
    fn drop(&mut self) {
        for (gauge, share) in self.0.values() {
            gauge.decrement(*share);
        }
    }
}

impl GaugeSet {
    pub(crate) fn record(&mut self, name: &'static str, value: f64) {
        self.record_share((name, ""), || gauge!(name), value);
    }

    /// Shows which operator alerts are raised.
    pub(crate) fn record_alerts(&mut self, raised: &[&Error]) {
        const NAME: &str = "threadkeep_operator_alert";
        for kind in ALERT_KINDS {
            let is_raised = raised.iter().any(|error| error.kind().as_str() == *kind);
            self.record_share((NAME, kind), || gauge!(NAME, "kind" => *kind), f64::from(u8::from(is_raised)));
        }
    }

    fn record_share(&mut self, key: (&'static str, &'static str), new: impl Fn() -> Gauge, value: f64) {
        let (gauge, share) = self.0.entry(key).or_insert_with(|| (new(), 0.0));
        gauge.increment(value - std::mem::replace(share, value));
    }

    /// Sets the whole gauge. Used for values that cannot be added up: the last cache wins.
    pub(crate) fn set(&mut self, name: &'static str, value: f64) {
        self.0.entry((name, "")).or_insert_with(|| (gauge!(name), 0.0)).0.set(value);
    }
}
