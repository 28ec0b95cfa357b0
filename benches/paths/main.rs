//! Each path of the cache by itself, in this process, so that one that gets slower is noticed:
//! `cargo bench --bench paths --features testing`; `-- queued` runs only what has that in its name.
//!
//! Criterion compares with the run before on the same machine. How fast a path is beside others, and on a real database, is
//! the question of `benches/versus`. Without `--bench`, as `cargo test --benches` calls it, each runs once and small.
#![allow(clippy::unwrap_used, missing_docs)]

mod after;
mod reads;
#[path = "../../tests/allocations/shelf.rs"]
mod shelf;
#[allow(dead_code, reason = "what measures latencies is for `versus`")]
#[path = "../versus/work.rs"]
mod work;
mod world;
mod writes;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};

/// All paths together take two minutes.
fn brief() -> Criterion {
    let criterion = Criterion::default().sample_size(20).nresamples(10_000);
    criterion.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2))
}

criterion_group! {
    name = paths;
    config = brief();
    targets = reads::hit, reads::hit_in_an_outage, reads::miss, writes::put, writes::queued_put, after::replay,
        after::warm_up
}
criterion_main!(paths);
