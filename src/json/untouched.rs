//! The numbers that an update leaves alone keep their digits, whatever the type that it goes through makes of them.
//!
//! A type may not hold a number as it is stored: `Value` has no integers beyond 64 bits, and a float none of `1.10`, `5` or
//! twenty digits. What an update does not touch shows by a comparison of two texts: the value as it was decoded and is
//! written again, and the value after the change.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;

use foldhash::fast::FixedState;
use serde::Serialize;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// The stored text, and what the type of an update makes of it.
#[derive(Debug)]
pub(crate) struct Untouched<'a> {
    stored: &'a str,
    before: String,
}

impl<'a> Untouched<'a> {
    /// Looks at a value that was decoded from the stored text. `None` if its type holds each number as it is stored.
    pub(crate) fn of<T: Serialize>(stored: &'a str, value: &T) -> Option<Self> {
        let numbers = tally(stored);
        if numbers == tally("") {
            return None;
        }
        let before = super::text(value).ok()?;
        (numbers != tally(&before)).then_some(Self { stored, before })
    }

    /// The text after the change, with the digits that are stored where the change left a number alone. `None` if there is no
    /// such number, or if the result would not be the value after the change.
    pub(crate) fn restore<T: Serialize + DeserializeOwned>(&self, after: &str) -> Option<String> {
        let parse = |text| serde_json::from_str::<&RawValue>(text).ok();
        let (stored, before, raw) = (parse(self.stored)?, parse(&self.before)?, parse(after)?);
        let mut restored = String::with_capacity(after.len() + self.stored.len() / 2);
        restore(stored.get(), before.get(), raw.get(), &mut restored)?;
        (restored != after && means::<T>(&restored, after)).then_some(restored)
    }
}

/// Whether the type reads a text as the value that it writes as `after`. Sets, for one, have no order that could be relied on.
fn means<T: Serialize + DeserializeOwned>(text: &str, after: &str) -> bool {
    let again = serde_json::from_str::<T>(text).and_then(|value| super::text(&value));
    let Ok(again) = again else { return false };
    let value = |text: &str| serde_json::from_str::<Value>(text).ok();
    again == after || value(&again).is_some_and(|again| Some(again) == value(after))
}

/// Writes `after`, with the digits of `stored` where `before` and `after` have the same number.
fn restore(stored: &str, before: &str, after: &str, to: &mut String) -> Option<()> {
    match (kind(stored), kind(before), kind(after)) {
        (b'0', b'0', b'0') if before == after => to.push_str(stored),
        (b'{', b'{', b'{') => restore_members(stored, before, after, to)?,
        (b'[', b'[', b'[') => restore_elements(stored, before, after, to)?,
        _ => to.push_str(after),
    }
    Some(())
}

/// How a value begins; numbers with a zero.
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
    if stored.len() != before.len() {
        to.push_str(after);
        return Some(());
    }
    let partners = partners(&before, &after_all);
    to.push('[');
    for (at, (value, partner)) in after_all.iter().zip(partners).enumerate() {
        separate(at, to);
        match partner {
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

/// Which element each element after the change was before it. Most changes append, drop the oldest, or change one in its place:
/// what is the same at both ends is found first, then what is the same in between, in its order, and what is left is paired as
/// it stands.
fn partners(before: &[&RawValue], after: &[&RawValue]) -> Vec<Option<usize>> {
    let is_same = |(one, other): &(&&RawValue, &&RawValue)| one.get() == other.get();
    let ahead = before.iter().zip(after).take_while(is_same).count();
    let (left, right) = (&before[ahead..], &after[ahead..]);
    let behind = left.iter().rev().zip(right.iter().rev()).take_while(is_same).count();
    let (left, right) = (&left[..left.len() - behind], &right[..right.len() - behind]);
    let head = (0..ahead).map(Some);
    let tail = (before.len() - behind..before.len()).map(Some);
    head.chain(between(left, right).into_iter().map(|of| of.map(|of| of + ahead))).chain(tail).collect()
}

fn between(before: &[&RawValue], after: &[&RawValue]) -> Vec<Option<usize>> {
    let mut places = HashMap::<&str, Vec<usize>>::new();
    for (at, value) in before.iter().enumerate().rev() {
        places.entry(value.get()).or_default().push(at);
    }
    let kept: HashSet<&str> = after.iter().map(|value| value.get()).collect();
    let mut next = 0;
    let mut partner = |value: &&RawValue| {
        let same = places.get_mut(value.get()).and_then(|places| {
            while places.last().is_some_and(|place| *place < next) {
                places.pop();
            }
            places.pop()
        });
        let changed = || (next..before.len()).next().filter(|at| !kept.contains(before[*at].get()));
        let of = same.or_else(changed)?;
        next = of + 1;
        Some(of)
    };
    after.iter().map(&mut partner).collect()
}

/// The members of an object, in their order.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Members<'de>;

            fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                to.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut all = Vec::new();
                while let Some((Name(name), value)) = map.next_entry::<Name<'de>, &'de RawValue>()? {
                    all.push((name, value));
                }
                Ok(Members(all))
            }
        }
        from.deserialize_map(All)
    }
}

/// Borrowed if it has no escapes.
#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

/// The numbers in a JSON text, as they are written.
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

/// How many numbers a text has, and a sum of their hashes: that of another order is the same.
fn tally(text: &str) -> (usize, u64) {
    let hash = |number| FixedState::default().hash_one(number);
    Numbers(text).fold((0, 0), |(count, sum), number| (count + 1, hash(number).wrapping_add(sum)))
}

/// What follows the string literal at the start of a text.
fn after_string(text: &str) -> &str {
    let mut from = 1;
    // A long text is searched for its quotes many times as fast as it is walked through.
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

    /// What becomes of a stored text when this changes it.
    fn changed<T: Serialize + DeserializeOwned>(stored: &str, change: impl FnOnce(&mut T)) -> String {
        let mut value: T = serde_json::from_str(stored).unwrap();
        let untouched = Untouched::of(stored, &value);
        change(&mut value);
        let after = super::super::text(&value).unwrap();
        untouched.and_then(|untouched| untouched.restore::<T>(&after)).unwrap_or(after)
    }

    const LONG: &str = "123456789012345678901234567890.10";

    #[test]
    fn numbers_are_found_outside_of_strings() {
        let text = r#"{"a1":-1.5e+3,"b\"2":[0,"3\\",4e5],"c":"6"}7"#;
        assert_eq!(Numbers(text).collect::<Vec<_>>(), ["-1.5e+3", "0", "4e5", "7"]);
        assert_eq!(Numbers("\"unfinished\\").count() + Numbers("").count(), 0);
    }

    #[test]
    fn an_untouched_number_keeps_its_digits() {
        let stored = format!(r#"{{"a":{LONG},"b":[1.10,1e5,18446744073709551617],"c":{{"d":1.0}}}}"#);
        let after = changed::<Value>(&stored, |value| value["e"] = json!(2));
        assert_eq!(after, stored.replace("}}", "},\"e\":2}"));
        let after = changed::<Value>(&stored, |value| value["b"][1] = json!("new"));
        assert_eq!(after, stored.replace("1e5", "\"new\""));
        let after = changed::<Value>(&stored, |value| drop(value.as_object_mut().unwrap().remove("a")));
        assert_eq!(after, r#"{"b":[1.10,1e5,18446744073709551617],"c":{"d":1.0}}"#);
    }

    #[test]
    fn a_number_that_was_set_is_as_it_was_set() {
        let after = changed::<Value>("[18446744073709551617,1.10]", |value| value[0] = json!(7));
        assert_eq!(after, "[7,1.10]");
        assert_eq!(changed::<f64>("1.10", |value| *value = 2.5), "2.5");
        assert_eq!(changed::<f64>("1.10", |_| {}), "1.10");
        assert_eq!(changed::<f64>("5", |_| {}), "5");
    }

    #[test]
    fn elements_keep_theirs_when_others_come_and_go() {
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
    fn a_type_that_holds_less_loses_no_digits_of_what_it_leaves_alone() {
        #[derive(Serialize, Deserialize)]
        struct Turn {
            score: f32,
            #[serde(default)]
            count: f64,
            #[serde(rename = "text")]
            said: String,
        }
        let stored =
            r#"[ {"text": "a", "score": 0.12345678901234567890, "count": 3}, {"text":"b","score":1} ]"#;
        let after = changed::<Vec<Turn>>(stored, |turns| turns[0].said = "c".into());
        let expected =
            r#"[{"score":0.12345678901234567890,"count":3,"text":"c"},{"score":1,"count":0.0,"text":"b"}]"#;
        assert_eq!(after, expected);
    }

    #[test]
    fn a_type_without_an_order_gets_no_digits_of_another_number() {
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
    fn objects_with_odd_names_and_twice_the_same_name_are_no_trouble() {
        let stored = r#"{"\u0061\n":1.0, "b":1.10, "b":2.20}"#;
        let after = changed::<BTreeMap<String, f64>>(stored, |map| {
            map.insert("c".into(), 0.5);
        });
        assert_eq!(after, r#"{"a\n":1.0,"b":2.20,"c":0.5}"#);
    }
}
