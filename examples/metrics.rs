//! What a daemon's metrics look like: `cargo run --features prometheus --example metrics`.
//!
//! Conversations are written, read and missed; then the series are printed as Prometheus reads them. A daemon without a
//! web server of its own calls `threadkeep::prometheus::install` with an address instead.

use threadkeep::{Cache, Result, prometheus};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    // First: what was opened before it counts for nobody.
    let exporter = prometheus::install_recorder()?;
    let cache = Cache::builder().memory().open().await?;
    for at in 0..10 {
        let _ = cache.put(format!("thread-{at}"), &["hello"]).await?;
        assert!(cache.get(format!("thread-{at}")).await?.is_some());
    }
    assert!(cache.get("unknown").await?.is_none());

    let text = exporter.render();
    println!("{text}");
    assert!(text.contains("threadkeep_reads_total{outcome=\"hit\"} 10"), "ten answers from memory");
    assert!(text.contains("threadkeep_reads_total{outcome=\"absent\"} 1"), "one that there is none");
    Ok(())
}
