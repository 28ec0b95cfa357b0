//! Every series in one table, and the handles to count with.
//!
//! Counts go through the [`metrics`] facade; whether anything listens is the daemon's decision. **Install the recorder
//! before opening a cache**: a handle made before it counts into nothing for ever.

use std::fmt;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::error::Error;

/// A series as it is documented, and as dashboards may use it.
#[derive(Debug)]
pub struct Series {
    /// Its name.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// Its label and the values that this takes, where it has one.
    pub label: Option<(&'static str, &'static [&'static str])>,
    /// What it counts, with the unit.
    pub what: &'static str,
}

const READS: &[&str] = &["hit", "loaded", "queued", "stale", "absent", "failed"];
const WRITES: &[&str] = &["stored", "superseded", "queued", "failed"];
const REPLAYED: &[&str] = &["stored", "dead"];
const OPERATIONS: &[&str] = &["load", "apply", "recent", "touch", "purge", "probe"];
const STATES: &[&str] = &["closed", "open", "half_open"];

/// All series. No label ever carries a thread id, so their number is fixed.
pub const SERIES: &[Series] = &[
    Series {
        name: "threadkeep_reads_total",
        kind: "counter",
        label: Some(("outcome", READS)),
        what: "reads by where the answer came from",
    },
    Series {
        name: "threadkeep_writes_total",
        kind: "counter",
        label: Some(("outcome", WRITES)),
        what: "puts, removes and updates by outcome",
    },
    Series {
        name: "threadkeep_replayed_total",
        kind: "counter",
        label: Some(("outcome", REPLAYED)),
        what: "queued writes that found their end by outcome: in the source of truth, or as a dead letter",
    },
    Series {
        name: "threadkeep_origin_seconds",
        kind: "histogram",
        label: Some(("operation", OPERATIONS)),
        what: "time of one call to the source of truth, in seconds",
    },
    Series {
        name: "threadkeep_failures_total",
        kind: "counter",
        label: Some(("kind", &["unavailable", "denied", "refused", "schema"])),
        what: "failed calls to the source of truth by kind of error",
    },
    Series {
        name: "threadkeep_breaker_state",
        kind: "gauge",
        label: None,
        what: "0 closed, 1 open, 2 half open (a probe is under way)",
    },
    Series {
        name: "threadkeep_breaker_transitions_total",
        kind: "counter",
        label: Some(("to", STATES)),
        what: "breaker transitions by the state entered",
    },
    Series {
        name: "threadkeep_discarded_fills_total",
        kind: "counter",
        label: None,
        what: "loads whose result a newer write had overtaken",
    },
];

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
    Dead,
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
    state: Gauge,
    transitions: Vec<Counter>,
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
            state: gauge!("threadkeep_breaker_state"),
            transitions: all("threadkeep_breaker_transitions_total", "to", STATES),
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
            counter!("threadkeep_failures_total", "kind" => error.kind().as_str()).increment(1);
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
