//! For tests of stores and of daemons: the conformance suite, and a store that fails by script or by seed.
//!
//! ```
//! use std::sync::Arc;
//! use threadkeep::testing::{Fault, Faulty, conformance};
//! use threadkeep::{Cache, Memory};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> threadkeep::Result<()> {
//! // A store of one's own:
//! conformance(Arc::new(Memory::new())).await;
//!
//! // A daemon's reaction to an outage:
//! let store = Faulty::new(Memory::new());
//! let faults = store.faults();
//! let cache = Cache::builder().store(store).open().await?;
//! faults.always(Fault::Refuse);
//! assert!(cache.put("thread-1", "hello").await.unwrap_err().is_outage());
//! faults.heal();
//! cache.put("thread-1", "hello").await?;
//! # Ok(())
//! # }
//! ```

mod conformance;
mod faulty;

pub use crate::background::stay_on_this_thread;
pub use conformance::{conformance, conformance_without_digits};
pub use faulty::{Fault, Faults, Faulty};
