//! Serialization to JSON text that decodes to the same value.
//!
//! serde_json alone writes a number that is not finite as `null`, so no later call can decode or update the conversation.
//! Here such a number is an error. serde_json also parses integers beyond 64 bits as floats. `untouched.rs` restores their
//! digits if an update leaves them alone.
//!
//! Why not serde_json's feature `arbitrary_precision`? A feature holds for the whole daemon. With this one, serde_json cannot
//! decode floats inside tagged enums, untagged enums and flattened structs.

use std::io;

use serde::Serialize;
use serde::ser::Error as _;
use serde_json::ser::{CompactFormatter, Formatter};
use serde_json::{Result, Serializer};

use super::finite::Finite;

/// Writes a value as JSON text.
///
/// # Errors
/// A number is not finite, or JSON cannot express the value, such as a map with keys that are not strings.
pub(crate) fn text<T: Serialize + ?Sized>(value: &T) -> Result<String> {
    let mut text = Vec::with_capacity(128);
    value.serialize(Finite(&mut Serializer::with_formatter(&mut text, PointFormatter)))?;
    String::from_utf8(text).map_err(serde_json::Error::custom)
}

/// Writes floats so that `jsonb` returns floats. `jsonb` turns `1e16` into an integer of 17 digits, and keeps
/// `10000000000000000.0`. From 2e19 on, serde_json reads integers as floats anyway.
struct PointFormatter;

impl PointFormatter {
    fn needs_point(value: f64) -> bool {
        const MIN_WITH_EXPONENT: f64 = 1e16;
        const MAX_INTEGER: f64 = 2e19;
        (MIN_WITH_EXPONENT..MAX_INTEGER).contains(&value.abs())
    }
}

impl Formatter for PointFormatter {
    fn write_f64<W: io::Write + ?Sized>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        match Self::needs_point(value) {
            true => write!(writer, "{value:.1}"),
            false => CompactFormatter.write_f64(writer, value),
        }
    }

    fn write_f32<W: io::Write + ?Sized>(&mut self, writer: &mut W, value: f32) -> io::Result<()> {
        match Self::needs_point(value.into()) {
            true => write!(writer, "{value:.1}"),
            false => CompactFormatter.write_f32(writer, value),
        }
    }
}
