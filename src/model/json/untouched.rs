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
        push_name(at, &name, to)?;
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

/// Writes the name of a member before its value.
pub(super) fn push_name(at: usize, name: &str, to: &mut String) -> Option<()> {
    separate(at, to);
    to.push_str(&serde_json::to_string(name).ok()?);
    to.push(':');
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
pub(super) struct Members<'a>(pub(super) Vec<(Cow<'a, str>, &'a RawValue)>);

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
