//! Defines the table of all metric series.
//!
//! The documentation, the exporter and the tests read the same table, so that none of them can miss a series.

use super::metrics::{
    ALERT_KINDS, BATCHED_OPERATIONS, ERROR_KINDS, OPERATIONS, READS, REPLAYED, STATES, WRITES,
};

/// Describes one metric series.
///
/// Names, labels and buckets are stable, so that dashboards may depend on them.
#[derive(Debug)]
pub struct Series {
    /// The name of the series.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// The unit of a value, for example `seconds` or `bytes`.
    pub unit: &'static str,
    /// The name of the label and all of its values, if the series has a label.
    pub label: Option<(&'static str, &'static [&'static str])>,
    /// The upper bounds of a histogram's buckets; empty for other kinds.
    ///
    /// An exporter without buckets makes summaries. Summaries of several daemons cannot be added up.
    pub buckets: &'static [f64],
    /// The meaning of the series, for the exporter's `HELP` line.
    pub help: &'static str,
}

type Label = (&'static str, &'static [&'static str]);

const fn series(kind: &'static str, name: &'static str, unit: &'static str, help: &'static str) -> Series {
    Series { name, kind, unit, label: None, buckets: &[], help }
}

const fn counter(name: &'static str, unit: &'static str, help: &'static str) -> Series {
    series("counter", name, unit, help)
}

const fn gauge(name: &'static str, unit: &'static str, help: &'static str) -> Series {
    series("gauge", name, unit, help)
}

impl Series {
    const fn by(self, label: Label) -> Self {
        Self { label: Some(label), ..self }
    }
}

/// Bucket bounds for latencies, in seconds.
///
/// The range begins with a database in the same data centre. The range ends above the longest deadline of a call,
/// which is 5 s plus 1 s for each of 16 MiB.
const LATENCY: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0];

/// Bucket bounds for batch sizes: a call carries between 1 and 500 records.
const RECORDS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0];

/// Lists all series of the crate.
///
/// No label carries a thread id, so the number of time series is fixed.
///
/// ```
/// use threadkeep::metrics::SERIES;
///
/// assert!(SERIES.iter().all(|series| series.name.starts_with("threadkeep_")));
/// ```
pub const SERIES: &[Series] = &[
    counter("threadkeep_reads_total", "reads", "calls of get by the source of the answer; the reads of an update are not counted").by(("outcome", READS)),
    counter("threadkeep_writes_total", "writes", "calls of put, append, update and remove by outcome; calls with invalid input are not counted")
        .by(("outcome", WRITES)),
    Series {
        buckets: LATENCY,
        ..series(
            "histogram",
            "threadkeep_store_request_duration_seconds",
            "seconds",
            "duration of one call to the store; the backends `local` and `memory` record none",
        )
        .by(("operation", OPERATIONS))
    },
    Series {
        buckets: RECORDS,
        ..series(
            "histogram",
            "threadkeep_batch_size_records",
            "records",
            "records in one batched load or apply call; only the backend `supabase` batches",
        )
        .by(("operation", BATCHED_OPERATIONS))
    },
    counter("threadkeep_store_errors_total", "calls", "failed calls to the store by kind of error")
        .by(("kind", ERROR_KINDS)),
    gauge("threadkeep_operator_alert", "caches", "1 while a fault needs an operator: a rejected key, missing migrations, the local file, a store that rejects all writes")
        .by(("kind", ALERT_KINDS)),
    gauge("threadkeep_breaker_state", "state", "0 closed, 1 open, 2 half open (a probe is running)"),
    counter("threadkeep_breaker_transitions_total", "transitions", "breaker transitions by the state entered")
        .by(("to", STATES)),
    gauge("threadkeep_queue_records", "records", "acknowledged writes that the store does not have yet"),
    gauge("threadkeep_queue_bytes", "bytes", "size of queued writes, as counted against the limit of the queue"),
    gauge("threadkeep_queue_limit_bytes", "bytes", "limit of queued writes and dead letters together"),
    gauge("threadkeep_queue_oldest_age_seconds", "seconds", "age of the oldest queued write"),
    gauge("threadkeep_queue_parked_records", "records", "queued writes that failed several times when sent alone"),
    gauge("threadkeep_dead_letters", "records", "queued writes that the store will not take; they stay until an operator deletes them"),
    gauge("threadkeep_dead_letters_bytes", "bytes", "size of dead letters, as counted against the limit of the queue"),
    counter(
        "threadkeep_replayed_total",
        "records",
        "queued writes that replay finished: stored, or a dead letter that is superseded or rejected",
    )
    .by(("outcome", REPLAYED)),
    gauge("threadkeep_replica_records", "records", "last known copies of conversations on the local disk"),
    gauge("threadkeep_replica_bytes", "bytes", "size of the replica, as counted against its limit"),
    gauge("threadkeep_replica_limit_bytes", "bytes", "limit of the replica"),
    gauge("threadkeep_cache_entries", "conversations", "conversations in memory"),
    gauge("threadkeep_cache_bytes", "bytes", "size of the conversations in memory"),
    gauge("threadkeep_cache_limit_bytes", "bytes", "limit of the conversations in memory"),
    gauge("threadkeep_warmup_conversations", "conversations", "conversations that the warm-up has loaded since the start"),
    counter("threadkeep_cache_evictions_total", "conversations", "conversations that were evicted from memory to make room for others"),
    counter("threadkeep_stale_loads_discarded_total", "loads", "loads whose result was stale because of a newer write"),
    gauge("threadkeep_feed_lag_seconds", "seconds", "time since the last complete poll of the change feed; 0 without a feed"),
    counter("threadkeep_feed_changes_total", "conversations", "conversations that the change feed named as changed, own writes included"),
    counter("threadkeep_feed_invalidations_total", "conversations", "conversations that left memory because the change feed named a newer version"),
    counter("threadkeep_feed_reloads_total", "conversations", "conversations that the change feed loaded again, because callers read them lately"),
    counter("threadkeep_feed_restores_total", "restores", "times that the change feed found a restored database, and memory and replica were dropped"),
    gauge(
        "threadkeep_clock_offset_seconds",
        "seconds",
        "lead of the store's clock over the system clock; 0 if the lead is below two seconds",
    ),
];
