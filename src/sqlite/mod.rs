//! Opens, locks, reads, writes and checkpoints one SQLite file. The local store and the outage file share this module.

pub(crate) mod database;
pub(crate) mod error;
pub(crate) mod file;
pub(crate) mod health;
pub(crate) mod lock;
pub(crate) mod readers;
pub(crate) mod rows;
mod wal;
mod worker;
pub(crate) mod writer;
