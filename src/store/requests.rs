//! The requests of the store contract, and their results.

use std::sync::Arc;

use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::Version;

/// The result of one load request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loaded {
    /// The live record.
    Found(Arc<Record>),
    /// The record is live and has the version of the request's `if_none_match`.
    NotModified,
    /// No live record exists. The version is that of the tombstone or the expired record.
    ///
    /// A cache compares this version with a late load result, and discards the older of the two (I2).
    Absent(Version),
}

/// Selects the records of one page.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ListRequest {
    /// Selects the records of this user only, if set.
    pub user: Option<Arc<str>>,
    /// The maximum number of records.
    pub limit: usize,
    /// The last record of the previous page. The page begins after it.
    pub after: Option<(Version, Key)>,
}

/// A page of records.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ListPage {
    /// The records, newest first.
    pub records: Vec<Record>,
    /// Whether no further page exists.
    pub is_last: bool,
}

/// A record to write, with an optional condition.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Write {
    /// The new record or tombstone.
    pub record: Arc<Record>,
    /// Makes the write conditional: it replaces exactly this version. [`Version::NONE`] means that no record may exist.
    pub if_version: Option<Version>,
    /// Whether an earlier attempt of this write lost its response. The store may hold the write already.
    pub is_retry: bool,
}

impl From<Record> for Write {
    fn from(record: Record) -> Self {
        Self { record: record.into(), if_version: None, is_retry: false }
    }
}

/// Names the record to load.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LoadRequest {
    /// The thread id of the conversation.
    pub key: Key,
    /// The version that the caller holds. The store answers [`Loaded::NotModified`] if the record still has it.
    pub if_none_match: Option<Version>,
}

impl From<Key> for LoadRequest {
    fn from(key: Key) -> Self {
        Self { key, if_none_match: None }
    }
}

impl ListRequest {
    /// Requests the first `limit` records of all users.
    ///
    /// Set [`user`](Self::user) or [`after`](Self::after) to narrow the request.
    ///
    /// ```
    /// use threadkeep::store::ListRequest;
    ///
    /// let mut request = ListRequest::new(100);
    /// request.user = Some("u1".into());
    /// ```
    pub fn new(limit: usize) -> Self {
        Self { user: None, limit, after: None }
    }
}

impl ListPage {
    /// Creates a page. The records must be in the order of the list, newest first.
    ///
    /// ```
    /// let page = threadkeep::store::ListPage::new(Vec::new(), true);
    /// assert!(page.is_last);
    /// ```
    pub fn new(records: Vec<Record>, is_last: bool) -> Self {
        Self { records, is_last }
    }
}

impl Write {
    /// Creates a write without a condition, for its first attempt.
    ///
    /// ```
    /// use threadkeep::store::{Key, Record, Version, Write};
    ///
    /// # fn main() -> threadkeep::Result<()> {
    /// let record = Record::tombstone(Key::new("thread-1")?, Version::from_raw(7));
    /// let write = Write::new(record).with_if_version(Version::from_raw(6)).as_retry();
    /// assert!(write.is_retry);
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(record: impl Into<Arc<Record>>) -> Self {
        Self { record: record.into(), if_version: None, is_retry: false }
    }

    /// Makes the write conditional: it replaces exactly this version. See [`new`](Self::new) for an example.
    #[must_use]
    pub fn with_if_version(self, version: Version) -> Self {
        Self { if_version: Some(version), ..self }
    }

    /// Marks a write that was sent before and whose response was lost. See [`new`](Self::new) for an example.
    #[must_use]
    pub fn as_retry(self) -> Self {
        Self { is_retry: true, ..self }
    }
}

impl LoadRequest {
    /// Requests the newest record of a conversation.
    ///
    /// ```
    /// use threadkeep::store::{Key, LoadRequest, Version};
    ///
    /// # fn main() -> threadkeep::Result<()> {
    /// let request = LoadRequest::new(Key::new("thread-1")?).with_if_none_match(Version::from_raw(7));
    /// assert_eq!(request.if_none_match, Some(Version::from_raw(7)));
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(key: Key) -> Self {
        Self { key, if_none_match: None }
    }

    /// Spares the transfer of the value if the record still has this version. See [`new`](Self::new) for an example.
    #[must_use]
    pub fn with_if_none_match(self, version: Version) -> Self {
        Self { if_none_match: Some(version), ..self }
    }
}
