//! Appends: items that follow those of an array in a conversation.

use serde::{Deserialize, Serialize};

use super::json::Json;
use super::record::Record;
use super::version::Version;
use crate::error::{Error, ErrorKind, Result};

/// Limits the names of a path. `jsonb` and serde_json parse 127 levels, and the items need some of them.
const MAX_NAMES: usize = 16;
/// Limits the bytes of a path, as the limit of a thread id.
const MAX_PATH_BYTES: usize = 512;

/// The place of an array in a conversation: the names of the members that lead to it. Without a name, the conversation is the array.
///
/// ```
/// use threadkeep::store::ArrayPath;
///
/// assert_eq!(ArrayPath::from("messages").to_string(), "messages");
/// assert_eq!(ArrayPath::from(["state", "messages"]).to_string(), "state.messages");
/// assert_eq!(ArrayPath::default().names().count(), 0);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ArrayPath(Vec<String>);

impl ArrayPath {
    /// Returns the names, from the outermost one. See [`ArrayPath`] for an example.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Checks the path against the limits of `jsonb`.
    pub(crate) fn check(&self) -> Result<()> {
        let bytes: usize = self.names().map(str::len).sum();
        let reason = if self.0.len() > MAX_NAMES {
            format!("has {} names, and {MAX_NAMES} are the limit", self.0.len())
        } else if bytes > MAX_PATH_BYTES {
            format!("has {bytes} bytes, and {MAX_PATH_BYTES} are the limit")
        } else if self.names().any(|name| name.contains('\0')) {
            "contains a NUL character".into()
        } else {
            return Ok(());
        };
        let message = format!("the path of the array {reason}");
        Err(Error::new(ErrorKind::Invalid, message).with_remedy("name another array"))
    }
}

impl std::fmt::Display for ArrayPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join("."))
    }
}

impl From<&str> for ArrayPath {
    fn from(name: &str) -> Self {
        Self(vec![name.into()])
    }
}

impl<const N: usize> From<[&str; N]> for ArrayPath {
    fn from(names: [&str; N]) -> Self {
        names.into_iter().collect()
    }
}

impl<'a> FromIterator<&'a str> for ArrayPath {
    fn from_iter<I: IntoIterator<Item = &'a str>>(names: I) -> Self {
        Self(names.into_iter().map(Into::into).collect())
    }
}

/// The target of an append. The queue, an export and the wire have it in this form.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Append {
    /// The array.
    #[serde(default)]
    pub at: ArrayPath,
    /// The limit of bytes of the conversation after the append.
    pub max_bytes: usize,
    /// Whether an absent conversation stays absent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub only_if_present: bool,
}

impl Append {
    /// Appends to this array, and creates conversation and array if there is none.
    ///
    /// ```
    /// use threadkeep::store::{Append, ArrayPath};
    ///
    /// assert!(!Append::new(ArrayPath::from("messages"), 8 << 20).only_if_present);
    /// ```
    pub fn new(at: ArrayPath, max_bytes: usize) -> Self {
        Self { at, max_bytes, only_if_present: false }
    }
}

/// The reason why a conversation cannot take an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unsuitable {
    NotAnArray,
    TooLarge,
}

/// Returns the record after an append, and the number of items in its array.
///
/// `items` is the record of the append: its value has the new items. `version` is the version of the row afterwards. The content
/// that had expired at the time of the append does not count. User and metadata of a live conversation stay, and its life does not
/// get shorter.
pub(crate) fn appended(
    held: Option<&Record>,
    items: &Record,
    append: &Append,
    version: Version,
) -> std::result::Result<(Record, u64), Unsuitable> {
    let held = held.filter(|held| held.is_live(items.version.at()));
    let new = items.value.as_ref().ok_or(Unsuitable::NotAnArray)?;
    let document = held.and_then(|held| held.value.as_ref());
    let (value, length) = Json::appended(document, &append.at, new).ok_or(Unsuitable::NotAnArray)?;
    if value.len() > append.max_bytes {
        return Err(Unsuitable::TooLarge);
    }
    let base = held.unwrap_or(items);
    let expires_at = base.expires_at.max(items.expires_at);
    Ok((Record { version, value: Some(value), expires_at, ..base.clone() }, length))
}
