//! The local file of the queue on disks that fail: power cuts, errors at any call, full, read-only, damaged, in use.
//!
//! `DISK_EVERY_BYTE=1 cargo test --all-features --test disk` cuts the write-ahead log at each of its bytes (minutes).
#![cfg(all(feature = "sqlite", unix))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod damage;
mod faults;
mod full;
mod log;
mod mount;
mod names;
mod power;
mod processes;
mod vfs;
mod world;
