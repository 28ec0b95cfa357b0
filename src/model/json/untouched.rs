//! Keeps the digits of numbers that an update leaves alone.
//!
//! A Rust type often cannot hold the digits of a stored number. `Value` has no integers beyond 64 bits, and a float loses the
//! text of `1.10`, `5` and numbers of twenty digits. This module compares two texts: the decoded value written again, and the
//! value after the change. A number that is equal in both texts gets its stored digits back.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;

use foldhash::fast::FixedState;
use serde::Serialize;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// Holds the stored text, and the same value as the type of the update writes it.
#[derive(Debug)]
pub(crate) struct PreservedDigits<'a> {
    stored: &'a str,
    before: String,
}

impl<'a> PreservedDigits<'a> {
    /// Compares a decoded value with its stored text. Returns `None` if the type keeps the digits of each number.
    pub(crate) fn of<T: Serialize>(stored: &'a str, value: &T) -> Option<Self> {
        let numbers = digest(stored);
        if numbers == digest("") {
            return None;
        }
        let before = super::serialize::text(value).ok()?;
        (numbers != digest(&before)).then_some(Self { stored, before })
    }

    /// Returns the text after the change, with the stored digits of each number that the change left alone. Returns `None`
    /// if no digits differ, or if the result would decode to another value.
    pub(crate) fn restore<T: Serialize + DeserializeOwned>(&self, after: &str) -> Option<String> {
        let parse = |text| serde_json::from_str::<&RawValue>(text).ok();
        let (stored, before, raw) = (parse(self.stored)?, parse(&self.before)?, parse(after)?);
        let mut restored = String::with_capacity(after.len() + self.stored.len() / 2);
        restore(stored.get(), before.get(), raw.get(), &mut restored)?;
        (restored != after && decodes_to_same::<T>(&restored, after)).then_some(restored)
    }
}

/// Checks that `T` decodes `text` to the value that it writes as `after`. A hash set writes its elements in any order, so the
/// check also accepts equal JSON values.
fn decodes_to_same<T: Serialize + DeserializeOwned>(text: &str, after: &str) -> bool {
    let again = serde_json::from_str::<T>(text).and_then(|value| super::serialize::text(&value));
    let Ok(again) = again else { return false };
    let value = |text: &str| serde_json::from_str::<Value>(text).ok();
    again == after || value(&again).is_some_and(|again| Some(again) == value(after))
}

/// Writes `after` to `to`. If `before` and `after` have the same number, the number gets the digits of `stored`.
fn restore(stored: &str, before: &str, after: &str, to: &mut String) -> Option<()> {
    match (kind(stored), kind(before), kind(after)) {
        (b'0', b'0', b'0') if before == after => to.push_str(stored),
        (b'{', b'{', b'{') => restore_members(stored, before, after, to)?,
        (b'[', b'[', b'[') => restore_elements(stored, before, after, to)?,
        _ => to.push_str(after),
    }
    Some(())
}

/// Returns the first byte of a value, or a zero digit for each number.
fn kind(text: &str) -> u8 {
    match text.as_bytes().first() {
        Some(b'-' | b'0'..=b'9') => b'0',
        first => first.copied().unwrap_or_default(),
    }
}

fn restore_members(stored: &str, before: &str, after: &str, to: &mut String) -> Option<()> {
    let members = |text| serde_json::from_str::<Members<'_>>(text).ok().map(|Members(all)| all);
    let (stored, before): (HashMap<_, _>, HashMap<_, _>) =
        (members(stored)?.into_iter().collect(), members(before)?.into_iter().collect());
    to.push('{');
    for (at, (name, value)) in members(after)?.into_iter().enumerate() {
        separate(at, to);
        to.push_str(&serde_json::to_string(&name).ok()?);
        to.push(':');
        match (stored.get(&name), before.get(&name)) {
            (Some(stored), Some(before)) => restore(stored.get(), before.get(), value.get(), to)?,
            _ => to.push_str(value.get()),
        }
    }
    to.push('}');
    Some(())
}

fn restore_elements(stored: &str, before: &str, after: &str, to: &mut String) -> Option<()> {
    let elements = |text| serde_json::from_str::<Vec<&RawValue>>(text).ok();
    let (stored, before, after_all) = (elements(stored)?, elements(before)?, elements(after)?);
    // The type dropped or merged elements, so the indexes of the two arrays do not correspond.
    if stored.len() != before.len() {
        to.push_str(after);
        return Some(());
    }
    let matches = match_elements(&before, &after_all);
    to.push('[');
    for (at, (value, index_before)) in after_all.iter().zip(matches).enumerate() {
        separate(at, to);
        match index_before {
            Some(of) => restore(stored[of].get(), before[of].get(), value.get(), to)?,
            None => to.push_str(value.get()),
        }
    }
    to.push(']');
    Some(())
}

fn separate(at: usize, to: &mut String) {
    if at > 0 {
        to.push(',');
    }
}

/// Pairs each element after the change with its index before the change.
///
/// Most changes append, drop the oldest elements, or edit one element in place. So equal elements at both ends are paired
/// first, then equal elements in between in their order. The other elements are paired by position.
fn match_elements(before: &[&RawValue], after: &[&RawValue]) -> Vec<Option<usize>> {
    let is_same = |(one, other): &(&&RawValue, &&RawValue)| one.get() == other.get();
    let ahead = before.iter().zip(after).take_while(is_same).count();
    let (left, right) = (&before[ahead..], &after[ahead..]);
    let behind = left.iter().rev().zip(right.iter().rev()).take_while(is_same).count();
    let (left, right) = (&left[..left.len() - behind], &right[..right.len() - behind]);
    let head = (0..ahead).map(Some);
    let tail = (before.len() - behind..before.len()).map(Some);
    head.chain(match_middle(left, right).into_iter().map(|of| of.map(|of| of + ahead))).chain(tail).collect()
}

/// Pairs the elements between the equal ends. Indexes only rise, so the pairs keep the order of the array.
fn match_middle(before: &[&RawValue], after: &[&RawValue]) -> Vec<Option<usize>> {
    let mut places = HashMap::<&str, Vec<usize>>::new();
    for (at, value) in before.iter().enumerate().rev() {
        places.entry(value.get()).or_default().push(at);
    }
    let kept: HashSet<&str> = after.iter().map(|value| value.get()).collect();
    let mut next = 0;
    let mut find_match = |value: &&RawValue| {
        let same = places.get_mut(value.get()).and_then(|places| {
            while places.last().is_some_and(|place| *place < next) {
                places.pop();
            }
            places.pop()
        });
        // An element that is still in the array is the match of its equal, not of a changed element.
        let changed = || (next..before.len()).next().filter(|at| !kept.contains(before[*at].get()));
        let of = same.or_else(changed)?;
        next = of + 1;
        Some(of)
    };
    after.iter().map(&mut find_match).collect()
}

/// The members of an object in the order of the text, with repeated names.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct MembersVisitor;
        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members<'de>;

            fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                to.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut all = Vec::new();
                while let Some((MemberName(name), value)) =
                    map.next_entry::<MemberName<'de>, &'de RawValue>()?
                {
                    all.push((name, value));
                }
                Ok(Members(all))
            }
        }
        from.deserialize_map(MembersVisitor)
    }
}

/// The name of a member, borrowed if the text has no escapes.
#[derive(serde::Deserialize)]
struct MemberName<'a>(#[serde(borrow)] Cow<'a, str>);

/// Iterates over the numbers of a JSON text, each with its digits.
struct Numbers<'a>(&'a str);

impl<'a> Iterator for Numbers<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        loop {
            let start = self.0.bytes().position(|byte| matches!(byte, b'"' | b'-' | b'0'..=b'9'))?;
            let from = &self.0[start..];
            if !from.starts_with('"') {
                let end = from.bytes().position(|byte| !b"+-.eE0123456789".contains(&byte));
                let (number, rest) = from.split_at(end.unwrap_or(from.len()));
                self.0 = rest;
                return Some(number);
            }
            self.0 = after_string(from);
        }
    }
}

/// Returns the count of the numbers in a text, and the sum of their hashes. The sum does not depend on their order.
fn digest(text: &str) -> (usize, u64) {
    let hash = |number| FixedState::default().hash_one(number);
    Numbers(text).fold((0, 0), |(count, sum), number| (count + 1, hash(number).wrapping_add(sum)))
}

/// Returns the text after the string literal at its start.
fn after_string(text: &str) -> &str {
    let mut from = 1;
    // A search for quotes is many times as fast as a walk over each byte of a long text.
    while let Some(quote) = text.get(from..).and_then(|rest| rest.find('"')).map(|at| from + at) {
        let escapes = text[..quote].bytes().rev().take_while(|byte| *byte == b'\\').count();
        if escapes % 2 == 0 {
            return &text[quote + 1..];
        }
        from = quote + 1;
    }
    ""
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet, HashSet};

    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    /// Returns the text of an update of `stored` by `change`.
    fn changed<T: Serialize + DeserializeOwned>(stored: &str, change: impl FnOnce(&mut T)) -> String {
        let mut value: T = serde_json::from_str(stored).unwrap();
        let untouched = PreservedDigits::of(stored, &value);
        change(&mut value);
        let after = super::super::serialize::text(&value).unwrap();
        untouched.and_then(|untouched| untouched.restore::<T>(&after)).unwrap_or(after)
    }

    const LONG: &str = "123456789012345678901234567890.10";

    #[test]
    fn numbers_skip_digits_inside_strings() {
        let text = r#"{"a1":-1.5e+3,"b\"2":[0,"3\\",4e5],"c":"6"}7"#;
        assert_eq!(Numbers(text).collect::<Vec<_>>(), ["-1.5e+3", "0", "4e5", "7"]);
        assert_eq!(Numbers("\"unfinished\\").count() + Numbers("").count(), 0);
    }

    #[test]
    fn update_keeps_digits_of_untouched_numbers() {
        let stored = format!(r#"{{"a":{LONG},"b":[1.10,1e5,18446744073709551617],"c":{{"d":1.0}}}}"#);
        let after = changed::<Value>(&stored, |value| value["e"] = json!(2));
        assert_eq!(after, stored.replace("}}", "},\"e\":2}"));
        let after = changed::<Value>(&stored, |value| value["b"][1] = json!("new"));
        assert_eq!(after, stored.replace("1e5", "\"new\""));
        let after = changed::<Value>(&stored, |value| drop(value.as_object_mut().unwrap().remove("a")));
        assert_eq!(after, r#"{"b":[1.10,1e5,18446744073709551617],"c":{"d":1.0}}"#);
    }

    #[test]
    fn update_writes_digits_of_changed_numbers() {
        let after = changed::<Value>("[18446744073709551617,1.10]", |value| value[0] = json!(7));
        assert_eq!(after, "[7,1.10]");
        assert_eq!(changed::<f64>("1.10", |value| *value = 2.5), "2.5");
        assert_eq!(changed::<f64>("1.10", |_| {}), "1.10");
        assert_eq!(changed::<f64>("5", |_| {}), "5");
    }

    #[test]
    fn update_keeps_digits_when_elements_come_and_go() {
        let message = |at: usize| format!(r#"{{"at":1.{at}0,"text":"t{at}"}}"#);
        let all = |from: usize, to: usize| (from..to).map(message).collect::<Vec<_>>().join(",");
        let stored = format!("[{}]", all(0, 9));
        type List = Vec<Value>;
        let new = || json!("new");
        assert_eq!(changed::<List>(&stored, |list| list.push(new())), format!("[{},\"new\"]", all(0, 9)));
        assert_eq!(
            changed::<List>(&stored, |list| list.insert(0, new())),
            format!("[\"new\",{}]", all(0, 9))
        );
        assert_eq!(changed::<List>(&stored, |list| drop(list.drain(..3))), format!("[{}]", all(3, 9)));
        let slide = |list: &mut List| {
            list.remove(0);
            list.push(new());
        };
        assert_eq!(changed::<List>(&stored, slide), format!("[{},\"new\"]", all(1, 9)));
        let edit = |list: &mut List| {
            list.remove(0);
            list[3]["text"] = new();
            list.remove(6);
            list.push(new());
        };
        let expected = format!("[{},{},\"new\"]", all(1, 7), message(8)).replace("\"t4\"", "\"new\"");
        assert_eq!(changed::<List>(&stored, edit), expected);
    }

    #[test]
    fn update_keeps_digits_through_a_narrow_type() {
        #[derive(Serialize, Deserialize)]
        struct Message {
            score: f32,
            #[serde(default)]
            count: f64,
            #[serde(rename = "text")]
            said: String,
        }
        let stored =
            r#"[ {"text": "a", "score": 0.12345678901234567890, "count": 3}, {"text":"b","score":1} ]"#;
        let after = changed::<Vec<Message>>(stored, |messages| messages[0].said = "c".into());
        let expected =
            r#"[{"score":0.12345678901234567890,"count":3,"text":"c"},{"score":1,"count":0.0,"text":"b"}]"#;
        assert_eq!(after, expected);
    }

    #[test]
    fn update_of_a_set_keeps_each_number() {
        let stored = "[3.0,1,2]";
        for _ in 0..20 {
            let after = changed::<HashSet<u8>>("[3,1,2]", |set| {
                set.insert(4);
            });
            assert_eq!(serde_json::from_str::<BTreeSet<u8>>(&after).unwrap(), BTreeSet::from([1, 2, 3, 4]));
        }
        #[derive(Serialize, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
        struct Whole(#[serde(deserialize_with = "whole")] u8);
        fn whole<'de, D: Deserializer<'de>>(from: D) -> Result<u8, D::Error> {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]
            f64::deserialize(from).map(|float| float as u8)
        }
        let after = changed::<BTreeSet<Whole>>(stored, |set| {
            set.insert(Whole(4));
        });
        let mut numbers: Vec<f64> = serde_json::from_str(&after).unwrap();
        numbers.sort_by(f64::total_cmp);
        assert_eq!(numbers, [1.0, 2.0, 3.0, 4.0], "{after}");
    }

    #[test]
    fn update_accepts_escaped_and_repeated_names() {
        let stored = r#"{"\u0061\n":1.0, "b":1.10, "b":2.20}"#;
        let after = changed::<BTreeMap<String, f64>>(stored, |map| {
            map.insert("c".into(), 0.5);
        });
        assert_eq!(after, r#"{"a\n":1.0,"b":2.20,"c":0.5}"#);
    }
}
