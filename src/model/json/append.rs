//! Items at the end of an array inside a JSON text. All other parts of the text stay as they are.

use serde_json::value::RawValue;

use super::Json;
use super::untouched::{Members, push_name};
use crate::model::append::ArrayPath;

impl Json {
    /// Returns the document with `items` at the end of the array at `path`, and the length of that array. `items` is an array.
    ///
    /// Without a document, or without a member on the path, the path is created. Returns `None` if a part of the path is neither an
    /// object nor missing, or if its end is not an array.
    pub(crate) fn appended(document: Option<&Self>, path: &ArrayPath, items: &Self) -> Option<(Self, u64)> {
        let names: Vec<&str> = path.names().collect();
        let mut text = String::with_capacity(document.map_or(0, Self::len) + items.len() + 64);
        let document = document.map(|document| document.as_str().trim());
        let length = append(document, &names, items.as_str(), &mut text)?;
        Some((Self::trusted(text), length))
    }
}

/// Writes `document` with the items to `to`, and returns the length of the array.
fn append(document: Option<&str>, names: &[&str], items: &str, to: &mut String) -> Option<u64> {
    let Some((name, names)) = names.split_first() else { return append_items(document, items, to) };
    let members = match document {
        Some(document) => serde_json::from_str::<Members<'_>>(document).ok()?.0,
        None => Vec::new(),
    };
    // Of members with one name, jsonb keeps the last.
    let target = members.iter().rposition(|(member, _)| member == name);
    let mut length = None;
    to.push('{');
    for (at, (member, value)) in members.iter().enumerate() {
        push_name(at, member, to)?;
        if target == Some(at) {
            length = Some(append(Some(value.get()), names, items, to)?);
        } else {
            to.push_str(value.get());
        }
    }
    if target.is_none() {
        push_name(members.len(), name, to)?;
        length = Some(append(None, names, items, to)?);
    }
    to.push('}');
    length
}

fn append_items(array: Option<&str>, items: &str, to: &mut String) -> Option<u64> {
    let count = |array: &str| Some(serde_json::from_str::<Vec<&RawValue>>(array).ok()?.len() as u64);
    let array = array.unwrap_or("[]");
    let (held, new) = (count(array)?, count(items)?);
    to.push('[');
    to.push_str(elements(array)?);
    if held > 0 && new > 0 {
        to.push(',');
    }
    to.push_str(elements(items)?);
    to.push(']');
    Some(held + new)
}

/// Returns the text between the brackets of an array.
fn elements(array: &str) -> Option<&str> {
    Some(array.trim().strip_prefix('[')?.strip_suffix(']')?.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn appended(document: Option<&str>, path: &[&str], items: &str) -> Option<(String, u64)> {
        let document = document.map(Json::trusted);
        let path = path.iter().copied().collect();
        let (json, length) = Json::appended(document.as_ref(), &path, &Json::trusted(items))?;
        Some((json.as_str().to_owned(), length))
    }

    #[test]
    fn append_keeps_all_other_parts_of_the_text() {
        let cases = [
            (None, &[][..], "[1]", "[1]", 1),
            (None, &["a", "b"], "[1]", r#"{"a":{"b":[1]}}"#, 1),
            (Some("[]"), &[], "[1, 2]", "[1, 2]", 2),
            (Some(" [1.10] "), &[], "[2]", "[1.10,2]", 2),
            (Some("[1]"), &[], "[]", "[1]", 1),
            (
                Some(r#"{"z":12345678901234567890123,"m":[{}]}"#),
                &["m"],
                "[2]",
                r#"{"z":12345678901234567890123,"m":[{},2]}"#,
                2,
            ),
            (Some(r#"{"a":1}"#), &["m"], "[2]", r#"{"a":1,"m":[2]}"#, 1),
            (Some(r#"{"a\"b":1,"m":[]}"#), &["m"], r#"["]"]"#, r#"{"a\"b":1,"m":["]"]}"#, 1),
        ];
        for (document, path, items, text, length) in cases {
            assert_eq!(appended(document, path, items), Some((text.to_owned(), length)), "{document:?}");
        }
    }

    #[test]
    fn append_rejects_a_path_that_is_no_array() {
        for (document, path) in [
            ("{}", &[][..]),
            ("null", &[]),
            ("\"a\"", &["m"]),
            ("[1]", &["0"]),
            (r#"{"m":"x"}"#, &["m"]),
            (r#"{"m":"x"}"#, &["m", "n"]),
        ] {
            assert_eq!(appended(Some(document), path, "[1]"), None, "{document}");
        }
    }
}
