//! JSON text that the database can hold, and that decodes to the value it was made of.

mod append;
mod jsonb;
mod serialize;
mod untouched;

use std::fmt;
use std::sync::{Arc, LazyLock};

use serde::Serialize;
use serde_json::value::RawValue;

use crate::error::{Error, ErrorKind, Result};

pub(crate) use jsonb::EXPANSION;
use jsonb::find_unstorable;
pub(crate) use untouched::PreservedDigits;

/// The limit of bytes of a value and of its metadata, independent of the settings.
pub(crate) const LARGEST: usize = 64 << 20;

/// JSON text that PostgreSQL's `jsonb` can hold. A clone shares the text.
///
/// ```
/// use threadkeep::store::Json;
///
/// assert_eq!(Json::new("[1, 2]").unwrap().as_str(), "[1, 2]");
/// assert_eq!(Json::of(&["hello"]).unwrap().len(), 9);
/// assert!(Json::new("[1, 2").is_err() && Json::of(&f64::NAN).is_err());
/// assert!(!Json::default().is_empty());
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Json(Arc<str>);

impl Json {
    /// Checks that `text` is JSON that the database can store and return.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if `text` is not JSON, or if `jsonb` cannot hold it. `jsonb` does not hold `\u0000`, a lone
    /// surrogate, a number outside `numeric`, numbers of more than 8 MiB in digits, or more than 127 levels of nesting.
    /// See [`Json`] for an example.
    pub fn new(text: impl Into<Arc<str>>) -> Result<Self> {
        let text = text.into();
        serde_json::from_str::<&RawValue>(&text)
            .map_err(|e| Error::new(ErrorKind::Invalid, format!("not valid JSON: {e}")))?;
        Self::check(text)
    }

    /// Writes a value as JSON.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] as [`Json::new`], and if JSON cannot express `value`. JSON has no float that is not finite, and
    /// no map with keys that are not strings. See [`Json`] for an example.
    pub fn of<T: Serialize + ?Sized>(value: &T) -> Result<Self> {
        let text = serialize::text(value).map_err(|e| {
            Error::new(ErrorKind::Invalid, format!("the value cannot be written as JSON: {e}"))
        })?;
        Self::check(text.into())
    }

    /// Wraps text without a check. The caller has the text from a store, or has checked it.
    pub(crate) fn trusted(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// Checks valid JSON against the limits of `jsonb`.
    fn check(text: Arc<str>) -> Result<Self> {
        match find_unstorable(text.as_bytes()) {
            None => Ok(Self(text)),
            Some(why) => Err(Error::new(
                ErrorKind::Invalid,
                format!("the database cannot store this JSON: it has {why}"),
            )),
        }
    }

    /// Returns the text. See [`Json`] for an example.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the length of the text in bytes. See [`Json`] for an example.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns false, because JSON text is never empty. See [`Json`] for an example.
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl Default for Json {
    /// Returns the empty object. Most metadata is this object, so all of them share one text.
    fn default() -> Self {
        static EMPTY: LazyLock<Json> = LazyLock::new(|| Json::trusted("{}"));
        EMPTY.clone()
    }
}

/// Shows only the length, so that no conversation reaches a log.
impl fmt::Debug for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Json({} bytes)", self.len())
    }
}
