//! The limits of PostgreSQL's `jsonb`, which stores and returns less than JSON allows.

/// The depth that serde_json parses. A deeper conversation could be put, but neither decoded nor updated.
const MAX_DEPTH: usize = 127;

/// The limit of digits that `jsonb` adds when it writes numbers without exponents. 1e100000 becomes 100,001 digits.
pub(crate) const EXPANSION: usize = 8 << 20;

/// The digits of PostgreSQL's `numeric` before the decimal point.
const MAX_WHOLE_DIGITS: i64 = 131_072;
/// The digits of PostgreSQL's `numeric` after the decimal point.
const MAX_FRACTION_DIGITS: i64 = 16_383;

/// Finds the first part of valid JSON that `jsonb` cannot hold, and names it.
pub(super) fn find_unstorable(text: &[u8]) -> Option<&'static str> {
    let (mut at, mut depth, mut expansion) = (0, 0_usize, 0_u64);
    while let Some(byte) = text.get(at) {
        at += match byte {
            b'"' => match string_len(&text[at..]) {
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

/// Returns the length of the string literal at the start of `text`, with its quotes.
fn string_len(text: &[u8]) -> Result<usize, &'static str> {
    let mut at = 1;
    loop {
        match (text[at], text.get(at + 1)) {
            (b'"', _) => return Ok(at + 1),
            // A surrogate is valid only as the first half of a pair.
            (b'\\', Some(b'u')) => match code_unit(&text[at..]) {
                Some(0) => return Err("a \\u0000"),
                Some(0xD800..=0xDBFF) => match code_unit(&text[at + 6..]) {
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

/// Returns the code unit of a `\uXXXX` at the start of `text`.
fn code_unit(text: &[u8]) -> Option<u16> {
    let digits = text.strip_prefix(b"\\u")?.get(..4)?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Returns the digits that `jsonb` adds to a number when it writes the number without an exponent. Returns `None` if
/// `numeric` cannot hold the number.
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
    // The place of the first nonzero digit: positive before the point, zero or negative after the point.
    let whole = digits.iter().position(|b| (b'1'..=b'9').contains(b)).map(|first| match first < point {
        true => len(point - first),
        false => -len(first - point - 1),
    });
    let fits = whole.is_none_or(|whole| whole + exponent <= MAX_WHOLE_DIGITS)
        && len(fraction) - exponent <= MAX_FRACTION_DIGITS;
    fits.then_some(exponent.unsigned_abs())
}
