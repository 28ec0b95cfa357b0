//! `threadkeep doctor` names each planted fault with its remedy.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

#[macro_use]
#[path = "../../../tests/stack/mod.rs"]
mod stack;

mod connection;
mod database;
mod diagnosis;
mod files;
#[path = "../../../tests/disk/mount.rs"]
mod mount;
#[allow(dead_code, reason = "the tests of the other commands use the rest")]
#[path = "../cli/process.rs"]
mod process;
mod tls;
