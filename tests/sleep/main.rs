//! The machine sleeps, a virtual machine is paused, or the system clock is set while a process runs. No acknowledged write is
//! lost, and no old value counts as fresh.
//!
//! A test of the machine's clocks runs in a separate process that preloads `clocks.c`. `cc` compiles that file.
#![cfg(target_os = "linux")]
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
mod step_back;

use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
/// The limit of each wait. It is long, because the machine may be slow and busy.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Waits until `condition` holds.
async fn wait_until(event: &str, mut condition: impl AsyncFnMut() -> bool) {
    let started = std::time::Instant::now();
    while !condition().await {
        assert!(started.elapsed() < MAX_WAIT, "timed out: {event}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
