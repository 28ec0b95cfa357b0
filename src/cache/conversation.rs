//! The result of a read.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;

use super::memory::CacheEntry;
use crate::error::{Error, ErrorKind, Result};
use crate::model::key::Key;
use crate::model::outcome::Freshness;
use crate::model::version::Version;

/// A conversation that a read found. It shares the entry of the cache: `get` neither parses nor copies.
///
/// ```
/// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
/// if let Some(found) = cache.get("thread-1").await? {
///     let messages: Vec<String> = found.decode()?; // or `found.json()`, as text
///     println!("{}: {} messages, version {:?}", found.key(), messages.len(), found.version());
///     println!("user {:?}, metadata {}, expires {}", found.user(), found.metadata(), found.expires_at());
///     if let threadkeep::Freshness::Stale { age } = found.freshness() {
///         println!("an outage: this copy is {age:?} old");
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Conversation {
    entry: Arc<CacheEntry>,
    freshness: Freshness,
}

impl Conversation {
    pub(super) fn new(entry: Arc<CacheEntry>, freshness: Freshness) -> Self {
        Self { entry, freshness }
    }

    /// Returns the thread id. See [`Conversation`] for an example.
    pub fn key(&self) -> &Key {
        &self.entry.record().key
    }

    /// Returns the conversation as JSON text.
    ///
    /// Memory keeps the writer's own text. After a reload from Supabase, the text is the output of `jsonb`. `jsonb` orders
    /// keys, normalises spaces, and keeps the last of two members of one name. It writes exponents out (`1e5` becomes `100000`)
    /// and drops the sign of a zero. It keeps all digits, also behind the decimal point.
    /// See [`Conversation`] for an example.
    pub fn json(&self) -> &str {
        // A found record has a value. Memory holds a tombstone as an absence.
        self.entry.record().value.as_ref().map_or("null", |value| value.as_str())
    }

    /// Parses the conversation. Floats read back to the last bit.
    ///
    /// A `T` may hold less than the text. `serde_json::Value` has integers of 64 bits, and reads larger ones as floats. The
    /// feature `arbitrary_precision` of serde_json avoids that. A `Box<RawValue>` holds all of the text.
    /// See [`Conversation`] for an example.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Decode`] if the JSON is not a `T`.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(self.json()).map_err(|e| {
            let type_name = std::any::type_name::<T>();
            let message = format!("conversation {} cannot be decoded as {type_name}: {e}", self.key());
            Error::new(ErrorKind::Decode, message).with_key(self.key().as_str())
        })
    }

    /// Returns how fresh the conversation is. See [`Conversation`] for an example.
    pub fn freshness(&self) -> Freshness {
        self.freshness
    }

    /// Returns the version. A greater version is newer. See [`Conversation`] for an example.
    pub fn version(&self) -> Version {
        self.entry.record().version
    }

    /// Returns the time of expiry, by the store's clock. From then on, `get` returns `None`, or an error during an outage.
    /// See [`Conversation`] for an example.
    pub fn expires_at(&self) -> DateTime<Utc> {
        self.entry.record().expires_at.into()
    }

    /// Returns the user of the conversation, if a write has set one. See [`Conversation`] for an example.
    pub fn user(&self) -> Option<&str> {
        self.entry.record().user.as_deref()
    }

    /// Returns the metadata as JSON text: `{}` if no write has set them. See [`Conversation`] for an example.
    pub fn metadata(&self) -> &str {
        self.entry.record().metadata.as_str()
    }
}
