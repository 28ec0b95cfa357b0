//! Random JSON with numbers that few types can hold, and a canonical text for comparisons.

use std::collections::BTreeMap;

use fastrand::Rng;
use serde_json::value::RawValue;

/// Numbers that many conversions change.
const NUMBERS: &[&str] = &[
    "0",
    "-0",
    "-0.0",
    "0.0",
    "1",
    "1.0",
    "1.00",
    "1.10",
    "5e0",
    "1e5",
    "1E+5",
    "1.5e1",
    "1e16",
    "1e22",
    "1e-7",
    "0.1",
    "0.30000000000000004",
    "9007199254740993",
    "-9007199254740993",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "18446744073709551617",
    "-18446744073709551617",
    "340282366920938463463374607431768211456",
    "123456789012345678901234567890.12345678901234567890",
    "1.7976931348623157e308",
    "5e-324",
    "2.2250738585072011e-308",
    "3.141592653589793238462643383279502884197",
];

/// Makes a random number. If `is_wide` is false, the number is in the range of a float.
pub fn number(random: &mut Rng, is_wide: bool) -> String {
    match random.u8(..6) {
        0..3 => NUMBERS[random.usize(..NUMBERS.len())].to_owned(),
        3 => {
            let digits = random.usize(1..40);
            let digits: String = (0..digits).map(|_| char::from(b'0' + random.u8(..10))).collect();
            format!("{}{}.{digits}", if random.bool() { "-" } else { "" }, random.u64(..))
        }
        4 => format!("{}e{}", random.u16(1..), random.i32(-290..290)),
        _ if is_wide => {
            format!("{}.5e{}", random.u8(1..), random.i32(310..900) * if random.bool() { 1 } else { -1 })
        }
        _ => f64::from_bits(random.u64(..) & !(1 << 62)).to_string(),
    }
}

/// Makes a random JSON text.
pub fn json(random: &mut Rng, depth: usize, is_wide: bool) -> String {
    match random.u8(..if depth == 0 { 4 } else { 8 }) {
        0..3 => number(random, is_wide),
        3 => ["true", "null", r#""1.50""#, r#""\u00e9 \" \\ 12e5""#, r#""""#][random.usize(..5)].to_owned(),
        4 | 5 => {
            let items: Vec<String> =
                (0..random.usize(..6)).map(|_| json(random, depth - 1, is_wide)).collect();
            format!("[{}]", items.join(","))
        }
        _ => {
            let member = |at| format!(r#""k\n{at}": {}"#, json(random, depth - 1, is_wide));
            format!("{{{}}}", (0..5).map(member).collect::<Vec<_>>().join(" ,"))
        }
    }
}

/// Returns a canonical text of a JSON text: without spaces, with sorted keys.
///
/// Numbers keep their text. With `as_decimals` they become decimals without needless zeros, as databases compare them.
pub fn canonical(text: &str, as_decimals: bool) -> String {
    let text = text.trim();
    match text.as_bytes()[0] {
        b'{' => {
            let items: BTreeMap<String, Box<RawValue>> = serde_json::from_str(text).unwrap();
            let members =
                items.iter().map(|(key, value)| format!("{key:?}:{}", canonical(value.get(), as_decimals)));
            format!("{{{}}}", members.collect::<Vec<_>>().join(","))
        }
        b'[' => {
            let items: Vec<Box<RawValue>> = serde_json::from_str(text).unwrap();
            let items: Vec<String> = items.iter().map(|value| canonical(value.get(), as_decimals)).collect();
            format!("[{}]", items.join(","))
        }
        b'"' => format!("{:?}", serde_json::from_str::<String>(text).unwrap()),
        b'-' | b'0'..=b'9' if as_decimals => decimal(text),
        _ => text.to_owned(),
    }
}

/// Returns `-12.50e3` as `-125e2`. Zero has no sign.
fn decimal(number: &str) -> String {
    let lower = number.to_ascii_lowercase();
    let (mantissa, exponent) = lower.split_once('e').unwrap_or((&lower, "0"));
    let (sign, digits) = mantissa.strip_prefix('-').map_or(("", mantissa), |digits| ("-", digits));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let joined = format!("{whole}{fraction}");
    let kept = joined.trim_start_matches('0').trim_end_matches('0');
    if kept.is_empty() {
        return "0".to_owned();
    }
    let dropped = joined.len() - joined.trim_end_matches('0').len();
    let exponent: i64 = exponent.parse().unwrap();
    let exponent = exponent - i64::try_from(fraction.len()).unwrap() + i64::try_from(dropped).unwrap();
    format!("{sign}{kept}e{exponent}")
}
