//! Conversations that survive restarts and outages.
//!
//! A conversation is a JSON document under a thread id, with a time to live. A [`Cache`] answers reads from memory. It
//! acknowledges a write only after the [store] has it. The store is one SQLite file or a Supabase project.
//!
//! While Supabase is unavailable, a circuit breaker stops the requests. The cache then syncs writes to a queue on the local
//! disk, and replays them later. Reads return the last known copy, with its age.
//!
//! ```
//! use std::time::Duration;
//! use threadkeep::{Cache, WriteOutcome};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> threadkeep::Result<()> {
//! let cache = Cache::builder().memory().open().await?; // `Cache::from_env()` in a daemon
//!
//! let outcome = cache.put("thread-1", &vec!["hello"]).ttl(Duration::from_secs(3600)).user("u1").await?;
//! assert_eq!(outcome, WriteOutcome::Volatile); // `Stored` with the other backends
//!
//! let found = cache.get("thread-1").await?.expect("the put has stored it");
//! assert_eq!(found.decode::<Vec<String>>()?, ["hello"]);
//! assert_eq!(found.user(), Some("u1"));
//!
//! // Only the new items travel to the store, and no concurrent turn is lost.
//! let appended = cache.append("thread-1", &["how are you?"]).await?;
//! assert_eq!(appended.length, Some(2));
//! # Ok(())
//! # }
//! ```
//!
//! # Four rules
//!
//! * **An acknowledged write is never lost.** A [`WriteOutcome`] says whether the store or the local queue has it.
//! * **An outage never looks like absence.** Only the store, or a queued remove, makes [`Cache::get`] return `None`.
//! * **The newest write wins,** in any order of arrival. A [`Version`] orders the writes of all daemons.
//! * **Every failure names a reaction.** An [`Error`] has a [`kind`](Error::kind) and often a [`remedy`](Error::remedy).
//!
//! # Modules
//!
//! | for | look at |
//! |---|---|
//! | daemons | [`Cache`], [`Builder`], [`Conversation`], [`Error`], and the [`guide`] |
//! | tests of a daemon | [`testing`] (feature `testing`): a store that fails by script |
//! | operators | [`metrics`], [`prometheus`] (feature `prometheus`), [`Health`] |
//! | authors of stores | [`store`]: the trait [`Store`](store::Store), the contract, and the wrappers |
//! | command lines | [`tools`]: the table of settings, the outage file without a cache, and probes for a diagnosis |
//!
//! The environment or a [`Builder`] gives the settings; [`tools::SETTINGS`] lists them. `DESIGN.md` in the repository
//! explains the protocol.
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod cache;
mod config;
mod error;
mod model;
mod observe;
mod outage;
mod resilience;
#[cfg(test)]
#[path = "../tests/simulator/mod.rs"]
mod simulator;
mod sqlite;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use cache::conversation::Conversation;
pub use cache::health::{FeedHealth, Health, QueueHealth};
pub use cache::list::List;
pub use cache::warmup::{WarmupProgress, WarmupState};
pub use cache::{AppendCall, Cache, DeadLetters, OnOutage, Put, Remove, ShutdownReport, Update};
pub use config::{Backend, Builder};
pub use error::{Error, ErrorKind, Result};
pub use model::key::Key;
pub use model::outcome::{Appended, Freshness, WriteOutcome};
pub use model::version::Version;
pub use observe::metrics;
#[cfg(feature = "prometheus")]
pub use observe::prometheus;
pub use outage::DeadLetter;
pub use resilience::breaker::BreakerState;

/// Tools for command lines and scripts: the table of settings, the outage file without a cache, and probes for a
/// diagnosis.
pub mod tools {
    pub use crate::config::resolved::{ResolvedConfig, Secret};
    pub use crate::config::{SETTINGS, Setting, SettingProblem};
    pub use crate::outage::admin::QueueAdmin;
    pub use crate::outage::inspect::{FileSummary, Inspection, inspect_local, inspect_outage_file};
    pub use crate::outage::{ImportItem, ImportReport, QueuedWrite, Usage};
    pub use crate::sqlite::file::quarantine_path;
    pub use crate::store::supabase::project_probe::{Caller, FUNCTIONS, ProbeResponse, ProjectProbe};
    pub use crate::store::supabase::{KeyFacts, KeyKind, REVISION, origin_of};
}

/// The guide, in eight chapters. These modules hold text and no code.
///
/// * [`embed`](guide::embed): put threadkeep into a daemon
/// * [`choose`](guide::choose): choose a backend and settings
/// * [`watch`](guide::watch): metrics, dashboards, health
/// * [`test`](mod@guide::test): test the daemon's reaction to an outage
/// * [`several_daemons`](guide::several_daemons): run several daemons on one database
/// * [`from_a_map`](guide::from_a_map): replace a map in memory
/// * [`from_plain_supabase`](guide::from_plain_supabase): replace direct calls to Supabase's tables
/// * [`side_by_side`](guide::side_by_side): run the old and the new storage together for a while
///
/// `OPERATIONS.md`, beside the README, is for operators: metrics, alerts, errors, capacity.
pub mod guide {
    #[doc = include_str!("../guide/embed.md")]
    pub mod embed {}

    #[doc = include_str!("../guide/choose.md")]
    pub mod choose {}

    #[cfg(feature = "prometheus")]
    #[doc = include_str!("../guide/watch.md")]
    pub mod watch {}

    #[cfg(feature = "testing")]
    #[doc = include_str!("../guide/test.md")]
    pub mod test {}

    #[doc = include_str!("../guide/several_daemons.md")]
    pub mod several_daemons {}

    #[doc = include_str!("../guide/from_a_map.md")]
    pub mod from_a_map {}

    #[doc = include_str!("../guide/from_plain_supabase.md")]
    pub mod from_plain_supabase {}

    #[doc = include_str!("../guide/side_by_side.md")]
    pub mod side_by_side {}
}

/// Compiles the README's examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
