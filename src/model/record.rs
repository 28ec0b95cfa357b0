//! A conversation at one version.

use std::sync::Arc;

use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::version::{Timestamp, Version};

/// One conversation at one version: a row of the database, or an entry of the cache. A record without a value is a tombstone.
///
/// ```
/// use threadkeep::store::{Json, Key, Record, Timestamp, Version};
///
/// # fn main() -> threadkeep::Result<()> {
/// let key = Key::new("thread-1")?;
/// let mut record = Record::put(key.clone(), Version::from_raw(7), Json::new("[1]")?, Timestamp(60_000));
/// record.user = Some("u1".into());
/// assert!(record.is_live(Timestamp(59_999)) && !record.is_live(Timestamp(60_000)));
/// assert_eq!(record.bytes(), 8 + 3 + 2 + 2); // the empty metadata is `{}`
/// assert!(Record::tombstone(key, Version::NONE).value.is_none());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The thread id.
    pub key: Key,
    /// The version of the conversation.
    pub version: Version,
    /// The conversation, or `None` in a tombstone.
    pub value: Option<Json>,
    /// The time of expiry by the store's clock (I17).
    pub expires_at: Timestamp,
    /// The user id of the owner.
    pub user: Option<Arc<str>>,
    /// The caller's own data beside the conversation.
    pub metadata: Json,
}

impl Record {
    /// Creates the record of a put, without user and metadata. See [`Record`] for an example.
    pub fn put(key: Key, version: Version, value: Json, expires_at: Timestamp) -> Self {
        Self { key, version, value: Some(value), expires_at, user: None, metadata: Json::default() }
    }

    /// Creates the record of a deletion, or of a conversation that never existed. See [`Record`] for an example.
    pub fn tombstone(key: Key, version: Version) -> Self {
        Self { key, version, value: None, expires_at: version.at(), user: None, metadata: Json::default() }
    }

    /// Whether a read returns this record at the time `now`. A tombstone and an expired record are not live.
    /// See [`Record`] for an example.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.value.is_some() && now < self.expires_at
    }

    /// Returns the bytes of the thread id, value, user id and metadata together. See [`Record`] for an example.
    pub fn bytes(&self) -> usize {
        self.key.as_str().len()
            + self.value.as_ref().map_or(0, Json::len)
            + self.user.as_ref().map_or(0, |user| user.len())
            + self.metadata.len()
    }
}
