//! A guide in seven chapters: there is no code in these modules.
//!
//! * [`embed`]: put it into a daemon
//! * [`choose`]: which backend, and which settings
//! * [`watch`]: metrics, dashboards, health
//! * [`test`](mod@test): what your daemon does in an outage, tested
//! * [`from_a_map`]: come from a map in memory
//! * [`from_plain_supabase`]: come from calls to Supabase's tables
//! * [`side_by_side`]: run the old and the new together for a while
//!
//! What an operator needs (metrics, alerts, errors, capacity) stands in `OPERATIONS.md`, beside the README.

#[doc = include_str!("embed.md")]
pub mod embed {}

#[doc = include_str!("choose.md")]
pub mod choose {}

#[cfg(feature = "prometheus")]
#[doc = include_str!("watch.md")]
pub mod watch {}

#[cfg(feature = "testing")]
#[doc = include_str!("test.md")]
pub mod test {}

#[doc = include_str!("from_a_map.md")]
pub mod from_a_map {}

#[doc = include_str!("from_plain_supabase.md")]
pub mod from_plain_supabase {}

#[doc = include_str!("side_by_side.md")]
pub mod side_by_side {}
