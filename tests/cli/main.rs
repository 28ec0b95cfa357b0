//! The command line, run as people run it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod damage;
mod files;
#[path = "../disk/mount.rs"]
mod mount;
mod process;
#[path = "../stack/mod.rs"]
mod stack;
mod supabase;
mod usage;
