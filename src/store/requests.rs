//! The requests of the store contract, and their results.

use std::sync::Arc;

use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::model::writer::WriterId;
use crate::store::decide::{Condition, WriteHead, WriteKind};

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

/// A record to write.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Write {
    /// The new record or tombstone.
    pub record: Arc<Record>,
    /// The writer that issued the record's version.
    pub writer: WriterId,
    /// The condition.
    pub condition: Condition,
}

impl From<Record> for Write {
    fn from(record: Record) -> Self {
        Self::new(record)
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
    /// Creates a write without a condition, by no daemon.
    ///
    /// ```
    /// use threadkeep::store::{Condition, Key, Record, Version, Write, WriterId};
    ///
    /// # fn main() -> threadkeep::Result<()> {
    /// let record = Record::tombstone(Key::new("thread-1")?, Version::from_raw(8));
    /// let write = Write::new(record).with_writer(WriterId::random()).with_if_version(Version::from_raw(6));
    /// assert_eq!(write.condition, Condition::IfVersion(Version::from_raw(6)));
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(record: impl Into<Arc<Record>>) -> Self {
        Self { record: record.into(), writer: WriterId::NONE, condition: Condition::Any }
    }

    /// Makes the write conditional: it replaces this version, or later writes of the same daemon over it.
    ///
    /// [`Version::NONE`] means that no row may exist. See [`new`](Self::new) for an example.
    #[must_use]
    pub fn with_if_version(self, version: Version) -> Self {
        Self { condition: Condition::IfVersion(version), ..self }
    }

    /// Names the writer, so that the store recognises the write if it comes again. See [`new`](Self::new) for an example.
    #[must_use]
    pub fn with_writer(self, writer: WriterId) -> Self {
        Self { writer, ..self }
    }

    /// Returns the part that decides about the write. See [`decide`](crate::store::decide) for an example.
    pub fn head(&self) -> WriteHead {
        WriteHead {
            kind: if self.record.value.is_some() { WriteKind::Put } else { WriteKind::Remove },
            version: self.record.version,
            writer: self.writer,
            condition: self.condition,
            expires_at: self.record.expires_at,
        }
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
