//! JSON text: what `Json` accepts, and that a value decodes to itself.

use std::collections::{BTreeMap, HashMap};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use threadkeep::store::Json;

fn text<T: Serialize + ?Sized>(value: &T) -> threadkeep::Result<String> {
    Json::of(value).map(|json| json.as_str().to_owned())
}

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
    let raw = RawValue::from_string("{ \"digits\": [1.10, 1e5, 18446744073709551617] }".to_owned()).unwrap();
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

#[test]
fn json_new_rejects_text_that_jsonb_cannot_hold() {
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
fn json_debug_shows_only_the_length() {
    assert_eq!(format!("{:?}", Json::of("secret").unwrap()), "Json(8 bytes)");
}
