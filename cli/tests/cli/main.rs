//! The command line, run as people run it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

#[macro_use]
#[path = "../../../tests/stack/mod.rs"]
mod stack;

mod damage;
mod files;
mod migrations;
#[path = "../../../tests/disk/mount.rs"]
mod mount;
mod process;
mod supabase;
mod usage;
