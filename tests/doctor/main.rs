//! `threadkeep doctor` on faults that are planted: each is named, with what to do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

#[macro_use]
#[path = "../stack/mod.rs"]
mod stack;

mod database;
mod files;
#[path = "../disk/mount.rs"]
mod mount;
mod patient;
#[allow(dead_code, reason = "the tests of the other commands use the rest")]
#[path = "../cli/process.rs"]
mod process;
mod tls;
mod way;
