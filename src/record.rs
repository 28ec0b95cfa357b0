//! What is kept: keys, JSON values, records. Each is parsed once, at the door; nothing later checks again.

use std::borrow::Borrow;
use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::error::{Error, ErrorKind, Result};
use crate::version::{Moment, Timestamp, Version};

const MAX_KEY: usize = 512;
const MAX_USER: usize = 512;
/// What a value may take at most, and its metadata, whatever the settings say.
pub(crate) const LARGEST: usize = 64 << 20;
/// What serde_json parses: beyond it a thread could be put, but neither decoded nor updated.
const MAX_DEPTH: usize = 127;
/// What numbers may take beyond their text when `jsonb` writes them out: 1e100000 becomes 100,001 digits.
pub(crate) const EXPANSION: usize = 8 << 20;
/// What PostgreSQL's `numeric` holds before and after the decimal point.
const MAX_WHOLE: i64 = 131_072;
const MAX_FRACTION: i64 = 16_383;

/// The identity of a thread: 1 to 512 bytes of UTF-8 without NUL.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Arc<str>);

impl Key {
    /// Proves that `text` is a key.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where it is empty, longer than 512 bytes, or has a NUL.
    pub fn new(text: impl AsRef<str>) -> Result<Self> {
        name(text.as_ref(), "a thread id", MAX_KEY).map(Self)
    }

    /// The key's text.
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

/// Proves that `text` can name a user: 1 to 512 bytes without NUL.
pub(crate) fn user(text: &str) -> Result<Arc<str>> {
    name(text, "a user id", MAX_USER)
}

fn name(text: &str, what: &str, most: usize) -> Result<Arc<str>> {
    let invalid = |why: String| Err(Error::new(ErrorKind::Invalid, format!("{what} {why}")));
    match text.len() {
        0 => invalid("must not be empty".into()),
        len if len > most => invalid(format!("has {len} bytes; at most {most} are possible")),
        _ if text.contains('\0') => invalid("must not contain a NUL".into()),
        _ => Ok(text.into()),
    }
}

/// JSON text that PostgreSQL's `jsonb` can hold, shared without being copied.
#[derive(Clone, PartialEq, Eq)]
pub struct Json(Arc<str>);

impl Json {
    /// Proves that `text` is JSON that can be stored.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where it is not JSON, or has what `jsonb` cannot hold or hand out again: `\u0000`, a lone
    /// surrogate, a number outside `numeric`, numbers that take more than 8 MiB when they are written out, more than 127
    /// levels of nesting.
    pub fn new(text: impl Into<Arc<str>>) -> Result<Self> {
        let text = text.into();
        serde_json::from_str::<&RawValue>(&text)
            .map_err(|e| Error::new(ErrorKind::Invalid, format!("not valid JSON: {e}")))?;
        Self::known(text)
    }

    /// The JSON of a value.
    ///
    /// # Errors
    /// As [`Json::new`]; also where `value` cannot be written as JSON: it has a float that is not finite, or a map whose keys
    /// are no strings.
    pub fn of<T: Serialize + ?Sized>(value: &T) -> Result<Self> {
        let text = crate::json::text(value).map_err(|e| {
            Error::new(ErrorKind::Invalid, format!("the value cannot be written as JSON: {e}"))
        })?;
        Self::known(text.into())
    }

    /// Text that comes from a store, or otherwise is known to be JSON that can be stored.
    pub(crate) fn trusted(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// Text that is known to be JSON, but not to be what `jsonb` can hold.
    fn known(text: Arc<str>) -> Result<Self> {
        match unstorable(text.as_bytes()) {
            None => Ok(Self(text)),
            Some(why) => Err(Error::new(
                ErrorKind::Invalid,
                format!("the database could not store this JSON: it has {why}"),
            )),
        }
    }

    /// The text itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// JSON text is never empty.
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl Default for Json {
    /// The empty object, which most metadata is.
    fn default() -> Self {
        static EMPTY: LazyLock<Json> = LazyLock::new(|| Json::trusted("{}"));
        EMPTY.clone()
    }
}

/// Conversations stay out of logs: only the length shows.
impl fmt::Debug for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Json({} bytes)", self.len())
    }
}

/// What in valid JSON `jsonb` cannot hold, if anything.
fn unstorable(text: &[u8]) -> Option<&'static str> {
    let (mut at, mut depth, mut expansion) = (0, 0_usize, 0_u64);
    while let Some(byte) = text.get(at) {
        at += match byte {
            b'"' => match string(&text[at..]) {
                Ok(len) => len,
                Err(why) => return Some(why),
            },
            b'-' | b'0'..=b'9' => {
                let len = text[at..].iter().take_while(|b| b"+-.eE0123456789".contains(b)).count();
                let Some(digits) = digits_of_numeric(&text[at..at + len]) else {
                    return Some("a number outside PostgreSQL's numeric");
                };
                expansion += digits;
                if expansion > EXPANSION as u64 {
                    return Some("numbers that take more than 8 MiB when they are written out");
                }
                len
            }
            b'[' | b'{' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Some("more than 127 levels of nesting");
                }
                1
            }
            b']' | b'}' => {
                depth -= 1;
                1
            }
            _ => 1,
        };
    }
    None
}

/// The length of the string literal at the start of `text`, quotes included.
fn string(text: &[u8]) -> Result<usize, &'static str> {
    let mut at = 1;
    loop {
        match (text[at], text.get(at + 1)) {
            (b'"', _) => return Ok(at + 1),
            (b'\\', Some(b'u')) => match escape(&text[at..]) {
                Some(0) => return Err("a \\u0000"),
                Some(0xD800..=0xDBFF) => match escape(&text[at + 6..]) {
                    Some(0xDC00..=0xDFFF) => at += 12,
                    _ => return Err("a lone surrogate"),
                },
                Some(0xDC00..=0xDFFF) => return Err("a lone surrogate"),
                _ => at += 6,
            },
            (b'\\', _) => at += 2,
            _ => at += 1,
        }
    }
}

/// The code unit of a `\uXXXX` at the start of `text`.
fn escape(text: &[u8]) -> Option<u16> {
    let digits = text.strip_prefix(b"\\u")?.get(..4)?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// The digits that an exponent adds to a JSON number when it is written out; `None` where the number does not fit
/// `numeric`, which has 131,072 digits before the decimal point and 16,383 after it.
fn digits_of_numeric(number: &[u8]) -> Option<u64> {
    let is_exponent = |b: &u8| matches!(b, b'e' | b'E');
    let (mantissa, exponent) = match number.iter().position(is_exponent) {
        Some(at) => (&number[..at], std::str::from_utf8(&number[at + 1..]).unwrap_or_default()),
        None => (number, "0"),
    };
    let exponent = i64::from(exponent.parse::<i32>().ok()?);
    let digits = mantissa.strip_prefix(b"-").unwrap_or(mantissa);
    let len = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    let point = digits.iter().position(|b| *b == b'.').unwrap_or(digits.len());
    let fraction = digits.len().saturating_sub(point + 1);
    // Where the first digit that counts stands, before the point or, negative, after it.
    let whole = digits.iter().position(|b| (b'1'..=b'9').contains(b)).map(|first| match first < point {
        true => len(point - first),
        false => -len(first - point - 1),
    });
    let fits =
        whole.is_none_or(|whole| whole + exponent <= MAX_WHOLE) && len(fraction) - exponent <= MAX_FRACTION;
    fits.then_some(exponent.unsigned_abs())
}

/// One thread at one version: a row of the database, an entry of the cache. Without a value it is a deletion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Which thread.
    pub key: Key,
    /// Which of its versions.
    pub version: Version,
    /// The conversation, or `None` for a deletion.
    pub value: Option<Json>,
    /// From when on it is absent.
    pub expires_at: Timestamp,
    /// Whose thread it is.
    pub user: Option<Arc<str>>,
    /// What the caller keeps beside the conversation.
    pub metadata: Json,
}

impl Record {
    /// Says that there is no such thread at this version.
    pub(crate) fn deletion(key: Key, version: Version) -> Self {
        Self { key, version, value: None, expires_at: version.at(), user: None, metadata: Json::default() }
    }

    /// The same at another version, whose life begins so many milliseconds later.
    pub(crate) fn stamped_anew(&self, version: Version, later: i64) -> Self {
        Self { version, expires_at: Timestamp(self.expires_at.0.saturating_add(later)), ..self.clone() }
    }

    /// Whether it can be read at this moment.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.value.is_some() && now < self.expires_at
    }

    /// The bytes it holds: key, value, user and metadata.
    pub fn bytes(&self) -> usize {
        self.key.as_str().len()
            + self.value.as_ref().map_or(0, Json::len)
            + self.user.as_ref().map_or(0, |user| user.len())
            + self.metadata.len()
    }
}

/// A record to be written, and the version it may replace where that matters.
#[derive(Debug, Clone)]
pub struct Write {
    /// What to write.
    pub record: Arc<Record>,
    /// Compare-and-set: write only over exactly this version ([`Version::NONE`]: only where there never was one).
    pub expect: Option<Version>,
    /// Whether this very write was sent before and its answer was lost, so that it may be stored already.
    pub again: bool,
}

impl From<Record> for Write {
    fn from(record: Record) -> Self {
        Self { record: record.into(), expect: None, again: false }
    }
}

/// A record to be read. A `known` version spares the transfer of an unchanged value.
#[derive(Debug, Clone)]
pub struct Want {
    /// Which thread.
    pub key: Key,
    /// The version at hand.
    pub known: Option<Version>,
}

impl From<Key> for Want {
    fn from(key: Key) -> Self {
        Self { key, known: None }
    }
}

/// How fresh a value is that a read hands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Freshness {
    /// The source of truth confirmed it within the time set by `fresh_for`.
    Fresh,
    /// It is a write of this daemon that waits on disk for the source of truth: the newest there is, as far as is known.
    Queued,
    /// The source of truth cannot be asked, or is slow; it last confirmed this so long ago.
    Stale {
        /// Time since the last confirmation.
        age: Duration,
    },
}

impl Freshness {
    /// Confirmed last at one moment, and handed out at another.
    pub(crate) fn stale(confirmed: Moment, now: Moment) -> Self {
        Self::Stale { age: now.since(confirmed) }
    }
}

/// What an acknowledged write is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a write may turn out superseded"]
#[non_exhaustive]
pub enum Durability {
    /// Committed in the source of truth.
    Stored,
    /// The source of truth already holds something newer, which stays.
    Superseded,
    /// On the local disk, synced, and kept there until the source of truth holds it or something newer.
    Queued,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_checked_at_the_door() {
        assert!(Key::new("a".repeat(512)).is_ok());
        for (bad, why) in [("", "empty"), (&"a".repeat(513), "513"), ("a\0b", "NUL")] {
            let error = Key::new(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn json_that_jsonb_cannot_hold_is_refused() {
        let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        for good in [
            "null".into(),
            deep(127),
            r#"{"a":"\ud83d\ude00 \\u0000 \" \\"}"#.into(),
            "[1e131071,-1.5E-16382,0.1]".into(),
            format!("0.{}", "1".repeat(16_383)),
        ] {
            assert!(Json::new(good.clone()).is_ok(), "{good:.60}");
        }
        for (bad, why) in [
            (r#"{"a":1"#.to_owned(), "not valid JSON"),
            (String::new(), "not valid JSON"),
            (r#"["\u0000"]"#.into(), "\\u0000"),
            (r#"["\ud83d"]"#.into(), "surrogate"),
            (r#"["\ud83dx\ude00"]"#.into(), "surrogate"),
            (r#"["\ude00"]"#.into(), "surrogate"),
            ("[1e131072]".into(), "numeric"),
            ("[1e-16384]".into(), "numeric"),
            ("1e99999999999".into(), "numeric"),
            (deep(128), "nesting"),
            (format!("[{}0]", "1e131000,".repeat(65)), "8 MiB"),
        ] {
            let error = Json::new(bad).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
        assert!(Json::of("a\0b").unwrap_err().to_string().contains("\\u0000"));
    }

    #[test]
    fn conversations_do_not_show_in_debug() {
        assert_eq!(format!("{:?}", Json::of("secret").unwrap()), "Json(8 bytes)");
    }
}
