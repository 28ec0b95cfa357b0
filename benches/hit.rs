//! The hit path beside raw moka, in one run: `cargo bench --bench hit`.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use futures::executor::block_on;
use moka::policy::EvictionPolicy;
use threadkeep::Cache;

const THREADS: usize = 10_000;

fn hits(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let keys: Vec<String> = (0..THREADS).map(|at| format!("thread-{at:08}")).collect();
    let value = "x".repeat(1024);
    let cache = runtime.block_on(async {
        let cache = Cache::builder().memory().open().await.unwrap();
        for key in &keys {
            let _ = cache.put(key, &value).await.unwrap();
        }
        cache
    });
    let raw: moka::future::Cache<String, Arc<str>> = moka::future::Cache::new(1 << 20);
    let same = moka::future::Cache::builder()
        .max_capacity(1 << 30)
        .weigher(|_: &String, value: &Arc<str>| value.len() as u32)
        .eviction_policy(EvictionPolicy::lru())
        .build_with_hasher(foldhash::fast::RandomState::default());
    for key in &keys {
        block_on(raw.insert(key.clone(), value.as_str().into()));
        block_on(same.insert(key.clone(), value.as_str().into()));
    }
    let mut group = criterion.benchmark_group("hit");
    let mut turn = (0..THREADS).cycle();
    let mut next = || &keys[turn.next().unwrap() * 7919 % THREADS];
    group.bench_function("moka as it comes", |b| b.iter(|| block_on(raw.get(next())).unwrap()));
    group.bench_function("moka, same hasher and policy", |b| b.iter(|| block_on(same.get(next())).unwrap()));
    group.bench_function("threadkeep", |b| b.iter(|| block_on(cache.get(next())).unwrap().unwrap()));
    group.finish();
}

criterion_group!(benches, hits);
criterion_main!(benches);
