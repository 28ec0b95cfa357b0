//! The outage file on disks that fail: power cuts, errors at any call, full, read-only, corrupt, locked.
//!
//! `DISK_EVERY_BYTE=1 cargo test --all-features --test disk` cuts the write-ahead log at each byte. This takes minutes.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod damage;
mod faults;
mod full;
mod log;
mod mount;
mod names;
mod power;
mod power_cut;
mod processes;
mod vfs;
mod world;
