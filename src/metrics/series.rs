//! The table of all series.

use super::{FAILURES, GATHERED, OPERATIONS, READS, REPLAYED, STATES, TROUBLES, WRITES};

/// A series as it is documented, and as dashboards may use it.
#[derive(Debug)]
pub struct Series {
    /// Its name.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// What one of it is: `seconds`, `bytes`, or what is counted.
    pub unit: &'static str,
    /// Its label and the values that this takes, where it has one.
    pub label: Option<(&'static str, &'static [&'static str])>,
    /// Of a histogram: the upper bounds of its buckets. An exporter that is not told them makes summaries, which cannot be
    /// added up over several daemons.
    pub buckets: &'static [f64],
    /// What it says.
    pub what: &'static str,
}

type Label = (&'static str, &'static [&'static str]);

const fn series(kind: &'static str, name: &'static str, unit: &'static str, what: &'static str) -> Series {
    Series { name, kind, unit, label: None, buckets: &[], what }
}

const fn counter(name: &'static str, unit: &'static str, what: &'static str) -> Series {
    series("counter", name, unit, what)
}

const fn gauge(name: &'static str, unit: &'static str, what: &'static str) -> Series {
    series("gauge", name, unit, what)
}

impl Series {
    const fn by(self, label: Label) -> Self {
        Self { label: Some(label), ..self }
    }
}

/// From a database next door to the longest deadline that a call can have: five seconds, and one for each of 16 MiB.
const LATENCY: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0];

/// A call carries from one record to 500.
const RECORDS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0];

/// All series. No label ever carries a thread id, so their number is fixed.
pub const SERIES: &[Series] = &[
    counter("threadkeep_reads_total", "reads", "gets by where the answer came from; what an update looks at is not counted").by(("outcome", READS)),
    counter("threadkeep_writes_total", "writes", "puts, removes and updates by how they ended; what is refused as invalid input is not counted")
        .by(("outcome", WRITES)),
    Series {
        buckets: LATENCY,
        ..series(
            "histogram",
            "threadkeep_origin_seconds",
            "seconds",
            "time of one call to the source of truth; with the backends `local` and `memory` there are none",
        )
        .by(("operation", OPERATIONS))
    },
    Series {
        buckets: RECORDS,
        ..series(
            "histogram",
            "threadkeep_batch_records",
            "records",
            "records in one call of those that are gathered: reads and writes, with the backend `supabase`",
        )
        .by(("operation", GATHERED))
    },
    counter("threadkeep_failures_total", "calls", "failed calls to the source of truth by kind of error")
        .by(("kind", FAILURES)),
    gauge("threadkeep_trouble", "caches", "1 while an operator has to mend this: a refused key, missing migrations, a file, a store that takes no writes")
        .by(("kind", TROUBLES)),
    gauge("threadkeep_breaker_state", "state", "0 closed, 1 open, 2 half open (a probe is under way)"),
    counter("threadkeep_breaker_transitions_total", "transitions", "breaker transitions by the state entered")
        .by(("to", STATES)),
    gauge("threadkeep_queue_records", "records", "acknowledged writes that are not yet in the source of truth"),
    gauge("threadkeep_queue_bytes", "bytes", "what they count against the queue's bound"),
    gauge("threadkeep_queue_bound_bytes", "bytes", "the bound of queued writes and dead letters together"),
    gauge("threadkeep_queue_oldest_seconds", "seconds", "how long the oldest queued write has been waiting"),
    gauge("threadkeep_parked_records", "records", "queued writes that failed alone, again and again"),
    gauge("threadkeep_dead_letters", "records", "writes that the source of truth turned out not to take, until forgotten"),
    gauge("threadkeep_dead_letters_bytes", "bytes", "what they count against the queue's bound"),
    counter(
        "threadkeep_replayed_total",
        "records",
        "queued writes that found their end in replay: stored, or else, superseded or refused, as a dead letter",
    )
    .by(("outcome", REPLAYED)),
    gauge("threadkeep_replica_records", "records", "last known copies on the local disk"),
    gauge("threadkeep_replica_bytes", "bytes", "what they count against their bound"),
    gauge("threadkeep_replica_bound_bytes", "bytes", "their bound"),
    gauge("threadkeep_memory_entries", "threads", "threads in memory"),
    gauge("threadkeep_memory_bytes", "bytes", "what they take"),
    gauge("threadkeep_memory_bound_bytes", "bytes", "what they may take"),
    gauge("threadkeep_warm_up_threads", "threads", "threads that the warm-up has brought into memory since the start"),
    counter("threadkeep_memory_evictions_total", "threads", "threads that had to make room for others in memory"),
    counter("threadkeep_discarded_fills_total", "loads", "loads whose result a newer write had overtaken"),
    gauge(
        "threadkeep_clock_offset_seconds",
        "seconds",
        "how far the clock of the source of truth is ahead of the system's; 0 within two seconds",
    ),
];
