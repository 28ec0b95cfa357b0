//! The metrics of a daemon: `cargo run --features prometheus --example metrics`.
//!
//! The example writes, reads and misses conversations, then prints the series in the format of Prometheus. A daemon
//! without a web server calls `threadkeep::prometheus::install` with an address instead.

use threadkeep::{Cache, Result, prometheus};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    // The recorder comes first: a cache that was opened earlier records nothing.
    let exporter = prometheus::install_recorder()?;
    let cache = Cache::builder().memory().open().await?;
    for number in 0..10 {
        cache.put(format!("thread-{number}"), &["hello"]).await?;
        assert!(cache.get(format!("thread-{number}")).await?.is_some());
    }
    assert!(cache.get("unknown").await?.is_none());

    let text = exporter.render();
    println!("{text}");
    assert!(text.contains("threadkeep_reads_total{outcome=\"hit\"} 10"), "ten hits in memory");
    assert!(text.contains("threadkeep_reads_total{outcome=\"absent\"} 1"), "one absent conversation");
    Ok(())
}
