//! crate docs placeholder
mod backoff;
mod breaker;
mod cache;
mod error;
mod fence;
mod fill;
mod guard;
#[cfg(feature = "sqlite")]
mod local;
mod memory;
pub mod metrics;
mod near;
mod record;
mod settings;
mod store;
mod supabase;
#[cfg(feature = "testing")]
pub mod testing;
mod upkeep;
pub mod version;

pub use backoff::Backoff;
pub use breaker::{Breaker, State};
pub use cache::{Cache, Found, Health, List, Put, Remove, Shutdown, Update};
pub use error::{Error, ErrorKind, Result};
pub use guard::Guard;
#[cfg(feature = "sqlite")]
pub use local::Local;
pub use memory::Memory;
pub use record::{Durability, Freshness, Json, Key, Record, Want, Write};
pub use settings::{Backend, Builder, SETTINGS, Setting};
pub use store::{ACCEPTED, Applied, Loaded, Page, Store, judge};
pub use supabase::Supabase;
pub use version::{Clock, Stamp, Timestamp, Version};
