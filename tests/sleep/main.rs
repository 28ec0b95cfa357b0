//! The machine sleeps, a virtual machine is paused, or the system's clock is set, while a process runs: nothing that was
//! acknowledged is lost, and nothing old is taken for fresh.
//!
//! Each test runs in a process of its own, into which `clocks.c` is preloaded: `cc` compiles it.
#![cfg(all(feature = "sqlite", target_os = "linux"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod daemon;
mod database;
mod local;
mod machine;
#[path = "../daemon/process.rs"]
mod process;
mod remote;
#[path = "../stack/mod.rs"]
mod stack;

use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
/// A machine may be slow, and busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until it is so.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = std::time::Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
