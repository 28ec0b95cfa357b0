//! The requests of the store contract, and their results.

use std::sync::Arc;

use crate::model::append::{Append, Unsuitable, appended};
use crate::model::key::Key;
use crate::model::outcome::Applied;
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

/// A place in the history of a store. Only the store that made it can read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor(Arc<str>);

/// The relation of a page of changes to the cursor of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continuity {
    /// The page has each conversation that changed since the cursor.
    Unbroken,
    /// The page begins the history: the request had no cursor, or the store cannot name each change since that cursor.
    Begun,
    /// The store was restored, or is another one. Each copy may be of a history that never was.
    Restored,
}

/// The changes of a store since a cursor.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Changes {
    /// The place of the next request.
    pub cursor: Cursor,
    /// The changed conversations with their present versions, in any order. Deleted ones have the version of their tombstone.
    pub changed: Vec<(Key, Version)>,
    /// The relation to the cursor of the request.
    pub continuity: Continuity,
    /// The identity of the database, if the store has one. A restore changes it. Daemons keep it over restarts, and compare it.
    pub history: Option<Arc<str>>,
    /// Whether the store has no further change now. Otherwise the next request follows at once.
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
    /// The target, if the value of the record is an array of items that follow those of the conversation.
    pub append: Option<Append>,
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

impl Cursor {
    /// Wraps the text of a store's own cursor.
    ///
    /// ```
    /// use threadkeep::store::{Changes, Continuity, Cursor};
    ///
    /// let changes = Changes::new(Cursor::new("7"), Vec::new(), Continuity::Begun, true);
    /// assert_eq!(changes.cursor.as_str(), "7");
    /// ```
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// Returns the text. See [`new`](Self::new) for an example.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Changes {
    /// Creates a page of changes, without an identity of the database. See [`Cursor::new`] for an example.
    pub fn new(cursor: Cursor, changed: Vec<(Key, Version)>, continuity: Continuity, is_last: bool) -> Self {
        Self { cursor, changed, continuity, history: None, is_last }
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
        Self { record: record.into(), writer: WriterId::NONE, condition: Condition::Any, append: None }
    }

    /// Makes the write conditional: it replaces this version, or later writes of the same daemon over it.
    ///
    /// [`Version::NONE`] means that no row may exist. See [`new`](Self::new) for an example.
    #[must_use]
    pub fn with_if_version(self, version: Version) -> Self {
        Self { condition: Condition::IfVersion(version), ..self }
    }

    /// Makes the write an append. The value of its record is the array of new items. The version is not the version of the conversation
    /// afterwards, because another daemon may append at once.
    ///
    /// ```
    /// use threadkeep::store::{Append, ArrayPath, Json, Key, Record, Timestamp, Version, Write, WriteKind};
    ///
    /// # fn main() -> threadkeep::Result<()> {
    /// let items = Record::put(Key::new("thread-1")?, Version::from_raw(8), Json::new("[1]")?, Timestamp(60_000));
    /// let write = Write::new(items).with_append(Append::new(ArrayPath::default(), 8 << 20));
    /// assert_eq!(write.head().kind, WriteKind::Append);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_append(self, append: Append) -> Self {
        let condition = if append.only_if_present { Condition::IfPresent } else { Condition::Any };
        Self { condition, append: Some(append), ..self }
    }

    /// Names the writer, so that the store recognises the write if it comes again. See [`new`](Self::new) for an example.
    #[must_use]
    pub fn with_writer(self, writer: WriterId) -> Self {
        Self { writer, ..self }
    }

    /// Returns the part that decides about the write. See [`decide`](crate::store::decide) for an example.
    pub fn head(&self) -> WriteHead {
        WriteHead {
            kind: match (&self.append, &self.record.value) {
                (Some(_), _) => WriteKind::Append,
                (None, Some(_)) => WriteKind::Put,
                (None, None) => WriteKind::Remove,
            },
            version: self.record.version,
            writer: self.writer,
            condition: self.condition,
            expires_at: self.record.expires_at,
        }
    }
}

impl Write {
    /// Returns the record after this write over `held`, and the answer to the writer. [`decide`](crate::store::decide) has decided that
    /// the row gets `version`.
    ///
    /// # Errors
    /// [`Applied::NotAnArray`] or [`Applied::TooLarge`]: the conversation cannot take the append, and stays as it is.
    ///
    /// ```
    /// use threadkeep::store::{Append, Applied, ArrayPath, Json, Key, Record, Timestamp, Version, Write};
    ///
    /// # fn main() -> threadkeep::Result<()> {
    /// let (old, new) = (Version::from_raw(6), Version::from_raw(8));
    /// let record = |version, json| Ok::<_, threadkeep::Error>(Record::put(Key::new("thread-1")?, version, Json::new(json)?, Timestamp(60_000)));
    /// let write = Write::new(record(new, "[2]")?).with_append(Append::new(ArrayPath::default(), 8 << 20));
    /// let (after, applied) = write.over(Some(&record(old, "[1]")?), new).unwrap();
    /// assert_eq!(after.value, Some(Json::new("[1,2]")?));
    /// assert_eq!(applied, Applied::Appended { version: new, over: old, length: 2 });
    /// assert_eq!(write.over(Some(&record(old, "{}")?), new), Err(Applied::NotAnArray));
    /// # Ok(())
    /// # }
    /// ```
    pub fn over(&self, held: Option<&Record>, version: Version) -> Result<(Arc<Record>, Applied), Applied> {
        let Some(append) = &self.append else { return Ok((Arc::clone(&self.record), Applied::Stored)) };
        let over = held.map_or(Version::NONE, |held| held.version);
        match appended(held, &self.record, append, version) {
            Ok((record, length)) => Ok((record.into(), Applied::Appended { version, over, length })),
            Err(Unsuitable::NotAnArray) => Err(Applied::NotAnArray),
            Err(Unsuitable::TooLarge) => Err(Applied::TooLarge),
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
