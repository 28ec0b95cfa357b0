//! What a read hands out.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind, Result};
use crate::near::Entry;
use crate::record::{Freshness, Key};
use crate::version::{Moment, Version};

/// A thread as it was found: shared with the cache, neither parsed nor copied.
#[derive(Debug, Clone)]
pub struct Found {
    entry: Arc<Entry>,
    freshness: Freshness,
}

impl Found {
    pub(super) fn new(entry: Arc<Entry>, freshness: Freshness) -> Self {
        Self { entry, freshness }
    }

    pub(super) fn fresh(entry: Arc<Entry>) -> Self {
        Self { entry, freshness: Freshness::Fresh }
    }

    pub(super) fn queued(entry: Arc<Entry>) -> Self {
        Self { entry, freshness: Freshness::Queued }
    }

    pub(super) fn stale(entry: Arc<Entry>) -> Self {
        let freshness = Freshness::stale(entry.confirmed, Moment::now());
        Self { entry, freshness }
    }

    /// Which thread this is.
    pub fn key(&self) -> &Key {
        &self.entry.record.key
    }

    /// The conversation as JSON text: the writer's own while it is in memory, and what `jsonb` made of it after a reload from
    /// Supabase. `jsonb` orders keys, sets spaces, keeps the last of two members of one name, writes exponents out (`1e5`
    /// becomes `100000`), and drops the sign of a zero. It keeps all digits, those behind the point included.
    pub fn json(&self) -> &str {
        // What is found has a value; a deletion is news of an absence.
        self.entry.record.value.as_ref().map_or("null", |value| value.as_str())
    }

    /// The conversation, parsed. Floats read back to the last bit.
    ///
    /// A `T` may hold less than the text: `serde_json::Value` has integers of 64 bits and reads larger ones as floats, unless
    /// the daemon turns on serde_json's feature `arbitrary_precision`. A `Box<RawValue>` holds all of it.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`] where the JSON is not a `T`.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(self.json()).map_err(|e| {
            let what = std::any::type_name::<T>();
            Error::new(
                ErrorKind::Mismatch,
                format!("the thread {} cannot be read as {what}: {e}", self.key()),
            )
        })
    }

    /// Whether the source of truth confirmed it just now.
    pub fn freshness(&self) -> Freshness {
        self.freshness
    }

    /// Its version: greater is newer.
    pub fn version(&self) -> Version {
        self.entry.record.version
    }

    /// From when on it is absent, by the database's clock.
    pub fn expires_at(&self) -> DateTime<Utc> {
        self.entry.record.expires_at.into()
    }

    /// Whose thread it is.
    pub fn user(&self) -> Option<&str> {
        self.entry.record.user.as_deref()
    }

    /// The metadata as JSON text.
    pub fn metadata(&self) -> &str {
        self.entry.record.metadata.as_str()
    }
}
