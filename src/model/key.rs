//! Thread ids and user ids, checked once at the boundary of the crate.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

const MAX_ID_BYTES: usize = 512;

/// The thread id of a conversation: 1 to 512 bytes of UTF-8 without NUL.
///
/// `Display` is for errors and logs: it writes the id between quotes, with escapes. [`as_str`](Self::as_str) returns the id itself.
///
/// ```
/// let key = threadkeep::Key::new("thread\n1")?;
/// assert_eq!((key.to_string().as_str(), key.as_str()), (r#""thread\n1""#, "thread\n1"));
/// # Ok::<(), threadkeep::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Arc<str>);

impl Key {
    /// Checks that `text` is a thread id.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if `text` is empty, is longer than 512 bytes, or contains a NUL.
    ///
    /// ```
    /// use threadkeep::Key;
    ///
    /// assert_eq!(Key::new("thread-1").unwrap().as_str(), "thread-1");
    /// assert!(Key::new("").is_err());
    /// ```
    pub fn new(text: impl AsRef<str>) -> Result<Self> {
        parse_id(text.as_ref(), "a thread id").map(Self)
    }

    /// Returns the text of the thread id. See [`Key::new`] for an example.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

/// Checks that `text` is a user id: 1 to 512 bytes without NUL.
pub(crate) fn user(text: &str) -> Result<Arc<str>> {
    parse_id(text, "a user id")
}

fn parse_id(text: &str, subject: &str) -> Result<Arc<str>> {
    let invalid = |reason: String| Err(Error::new(ErrorKind::Invalid, format!("{subject} {reason}")));
    match text.len() {
        0 => invalid("must not be empty".into()),
        len if len > MAX_ID_BYTES => invalid(format!("has {len} bytes; at most {MAX_ID_BYTES} are possible")),
        _ if text.contains('\0') => invalid("must not contain a NUL".into()),
        _ => Ok(text.into()),
    }
}
