//! Measures each path of the cache in one process, to detect a path that becomes slower:
//! `cargo bench --bench paths --features testing`. `-- queued` runs the benchmarks with `queued` in their name.
//!
//! Criterion compares with the last run on the same machine. `benches/versus` compares with other libraries on a real
//! database. Without `--bench` (`cargo test --benches`), each benchmark runs once with little data.
#![allow(clippy::unwrap_used, missing_docs)]

mod after;
mod reads;
#[path = "../../tests/allocations/shelf.rs"]
mod shelf;
#[allow(dead_code, reason = "only `versus` measures latencies")]
#[path = "../versus/work.rs"]
mod work;
mod world;
mod writes;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};

/// Short settings, so that all benchmarks together take two minutes.
fn short_runs() -> Criterion {
    let criterion = Criterion::default().sample_size(20).nresamples(10_000);
    criterion.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2))
}

criterion_group! {
    name = paths;
    config = short_runs();
    targets = reads::hit, reads::hit_in_an_outage, reads::miss, writes::put, writes::queued_put, after::replay,
        after::warmup
}
criterion_main!(paths);
