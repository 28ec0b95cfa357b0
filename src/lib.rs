//! Conversation threads that survive restarts.
//!
//! A [`Cache`] keeps JSON documents under thread ids: in memory for reads, and in a source of truth before a write is
//! acknowledged. The source of truth is one SQLite file or a Supabase project; in front of the latter stands a circuit
//! breaker, so that known threads can be read on while it is away.
//!
//! ```
//! use std::time::Duration;
//! use threadkeep::{Cache, Durability};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> threadkeep::Result<()> {
//! let cache = Cache::builder().memory().open().await?; // `Cache::from_env()` in a daemon
//! let acknowledged = cache.put("thread-1", &vec!["hello"]).ttl(Duration::from_secs(3600)).user("u1").await?;
//! assert_eq!(acknowledged, Durability::Stored);
//!
//! let found = cache.get("thread-1").await?.expect("it was just put");
//! assert_eq!(found.decode::<Vec<String>>()?, ["hello"]);
//! assert_eq!(found.user(), Some("u1"));
//! # Ok(())
//! # }
//! ```
//!
//! What goes wrong is an [`Error`] whose [`kind`](Error::kind) tells what to do; an outage is never read as absence. The
//! [settings](SETTINGS) come from the environment or from [`Builder`]. A [`Store`] of one's own can take the place of
//! those here: see [`testing`] (feature `testing`) for the suite that it has to pass. The [`guide`] says how to embed it, how to
//! choose settings, and how to come from something else.
//!
//! The modules below stand in the order of their dependencies: each uses only those before it, which a test holds.
#![forbid(unsafe_code)]

mod error;
mod background;
mod backoff;
mod blocking;
mod version;
mod json;
mod record;
pub mod metrics;
mod breaker;
mod store;
mod memory;
#[cfg_attr(not(feature = "sqlite"), allow(dead_code, reason = "there is no file to put it into"))]
mod spool;
#[cfg(feature = "sqlite")]
mod local;
#[cfg(feature = "sqlite")]
mod queue_file;
mod supabase;
mod guard;
mod batch;
#[cfg(feature = "testing")]
pub mod testing;
mod fence;
mod pending;
mod near;
mod fill;
mod trouble;
mod replay;
mod warmup;
mod cache;
mod settings;
#[cfg(feature = "prometheus")]
pub mod prometheus;
#[cfg(feature = "cli")]
pub mod doctor;
pub mod guide;

pub use backoff::Backoff;
pub use batch::Batched;
pub use breaker::{Breaker, State};
pub use cache::{Cache, DeadLetters, Found, Health, List, OnOutage, Put, Queue, Remove, Shutdown, Update};
pub use error::{Error, ErrorKind, Result};
pub use guard::Guard;
#[cfg(feature = "sqlite")]
pub use local::Local;
pub use memory::Memory;
#[cfg(feature = "sqlite")]
pub use queue_file::{QueueFile, QueueStatus, Salvaged};
pub use record::{Durability, Freshness, Json, Key, Record, Want, Write};
pub use settings::{Backend, Builder, SETTINGS, Setting};
pub use spool::DeadLetter;
#[cfg(feature = "sqlite")]
pub use spool::{Imported, QueuedWrite};
pub use store::{ACCEPTED, Applied, Loaded, Page, Recent, Store, judge};
pub use supabase::Supabase;
pub use version::{Clock, Moment, OLDEST, REMEMBERED, Stamp, TOLERANCE, Timestamp, Version};
pub use warmup::WarmUp;

/// The README's examples compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
