//! An update keeps the digits of the numbers that it leaves alone.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use threadkeep::Cache;

use super::{raw, stored};

/// Returns the text of an update of `text` by `change`.
#[tokio::main(flavor = "current_thread")]
async fn changed<T: Serialize + DeserializeOwned + Send>(
    text: &str,
    mut change: impl FnMut(&mut T) + Send,
) -> String {
    let cache = Cache::builder().memory().open().await.unwrap();
    cache.put("t", &raw(text)).await.unwrap();
    let change = |value: Option<T>| {
        let mut value = value.unwrap();
        change(&mut value);
        Ok(Some(value))
    };
    cache.update("t", change).await.unwrap();
    stored(&cache, "t").await
}

const LONG: &str = "123456789012345678901234567890.10";

#[test]
fn update_finds_no_digits_inside_strings() {
    let text = r#"{"a1":-1.5e+3,"b\"2":[0,"3\\",4e5],"c":"6"}"#;
    assert_eq!(changed::<Value>(text, |_| {}), text);
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
    assert_eq!(changed::<List>(&stored, |list| list.insert(0, new())), format!("[\"new\",{}]", all(0, 9)));
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
    let stored = r#"[ {"text": "a", "score": 0.12345678901234567890, "count": 3}, {"text":"b","score":1} ]"#;
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
