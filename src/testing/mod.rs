//! Tests of stores and daemons: the conformance suite, and a store with planned faults.
//!
//! ```
//! use std::sync::Arc;
//! use threadkeep::testing::{Fault, FaultStore, conformance};
//! use threadkeep::store::Memory;
//! use threadkeep::Cache;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> threadkeep::Result<()> {
//! // Tests a store against the contract:
//! conformance(Arc::new(Memory::new())).await;
//!
//! // Tests how a daemon reacts to an outage:
//! let store = FaultStore::new(Memory::new());
//! let faults = store.faults();
//! let cache = Cache::builder().store(store).open().await?;
//! faults.always(Fault::Refuse);
//! assert!(cache.put("thread-1", "hello").await.unwrap_err().is_outage());
//! faults.clear();
//! cache.put("thread-1", "hello").await?;
//! # Ok(())
//! # }
//! ```

mod conformance;
mod fault_store;

#[cfg(not(test))]
pub use crate::model::moment::step_system_clock;
pub use crate::resilience::tasks::stay_on_this_thread;
pub use conformance::{Deviation, conformance, conformance_with};
pub use fault_store::{Fault, FaultStore, Faults};
