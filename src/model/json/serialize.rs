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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use serde::de::DeserializeOwned;
    use serde::{Deserialize, Serialize};
    use serde_json::value::RawValue;

    use super::*;

    fn reads_back<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(value: T) {
        let text = text(&value).unwrap();
        assert_eq!(serde_json::from_str::<T>(&text).unwrap(), value, "{text}");
    }

    #[test]
    fn text_rejects_non_finite_floats_at_any_depth() {
        #[derive(Serialize)]
        enum AnyVariant {
            One(f64),
            Two(f64, f32),
            Three { x: Option<f64> },
        }
        #[derive(Serialize)]
        struct Unit(f64);
        #[derive(Serialize)]
        struct Flat {
            a: u8,
            #[serde(flatten)]
            rest: BTreeMap<&'static str, f64>,
        }
        for bad in [f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            #[expect(clippy::cast_possible_truncation, reason = "a float that is not finite has no digits")]
            let narrow = bad as f32;
            let results = [
                text(&bad),
                text(&narrow),
                text(&Some(bad)),
                text(&vec![1.0, bad]),
                text(&(1, (2, narrow))),
                text(&HashMap::from([("k", Some(bad))])),
                text(&AnyVariant::One(bad)),
                text(&AnyVariant::Two(1.0, narrow)),
                text(&AnyVariant::Three { x: Some(bad) }),
                text(&Unit(bad)),
                text(&Flat { a: 1, rest: BTreeMap::from([("b", bad)]) }),
                text(&[[[Some(Box::new(bad))]]]),
            ];
            for result in results {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("not finite") && error.contains(&bad.to_string()), "{error}");
            }
        }
        struct FloatKey(f64);
        impl Serialize for FloatKey {
            fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
                let mut map = to.serialize_map(Some(1))?;
                serde::ser::SerializeMap::serialize_entry(&mut map, &self.0, &1)?;
                serde::ser::SerializeMap::end(map)
            }
        }
        assert!(text(&FloatKey(f64::NAN)).unwrap_err().to_string().contains("not finite"));
        assert_eq!(text(&FloatKey(1.5)).unwrap(), r#"{"1.5":1}"#);
    }

    #[test]
    fn text_decodes_to_the_same_value_of_each_type() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "type")]
        enum Tagged {
            Temperature { value: f64, count: u64 },
            Nothing,
        }
        reads_back((i128::MIN, u128::MAX, i64::MIN, u64::MAX));
        reads_back(('\u{1F600}', "\u{1}\"\\".to_owned(), String::new()));
        reads_back((Some(()), None::<u8>, [Some(1), None]).1);
        reads_back(HashMap::from([(-1_i64, 1_u8), (i64::MAX, 2)]));
        reads_back(HashMap::from([(u128::MAX, true)]));
        reads_back(HashMap::from([('k', vec![0_u8, 255])]));
        reads_back(vec![Tagged::Temperature { value: 0.1 + 0.2, count: u64::MAX }, Tagged::Nothing]);
        reads_back((f32::MIN_POSITIVE, f32::MAX, f32::from_bits(1), 0.1_f32, 16_777_217.0_f32));
        reads_back((f64::MIN_POSITIVE, f64::MAX, f64::from_bits(1), 0.1, 1e16, 1e19, 1.9e19, 1e22, 1e300));
        let raw =
            RawValue::from_string("{ \"digits\": [1.10, 1e5, 18446744073709551617] }".to_owned()).unwrap();
        assert_eq!(text(&raw).unwrap(), raw.get());
        assert!(text(&serde_json::json!({"raw": raw})).is_ok());
    }

    #[test]
    fn text_keeps_the_bits_of_floats_through_jsonb() {
        let mut random = fastrand::Rng::with_seed(12);
        for _ in 0..100_000 {
            let wide = f64::from_bits(random.u64(..));
            let narrow = f32::from_bits(random.u32(..));
            if wide.is_finite() {
                let text = text(&wide).unwrap();
                assert_eq!(serde_json::from_str::<f64>(&text).unwrap().to_bits(), wide.to_bits(), "{text}");
            }
            if narrow.is_finite() {
                let text = text(&narrow).unwrap();
                assert_eq!(serde_json::from_str::<f32>(&text).unwrap().to_bits(), narrow.to_bits(), "{text}");
            }
        }
        for float in [1e16, -1e16, 12_345_678_901_234_567_000.0, 9.5e18] {
            let text = text(&float).unwrap();
            assert!(text.ends_with(".0"), "jsonb turns this float into an integer: {text}");
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(value, serde_json::json!(float));
        }
    }
}
