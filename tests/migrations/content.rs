//! The content of a row, and what an append makes of it by the code of the library.

use serde_json::{Value, json};
use threadkeep::store::{
    Append, Applied, Json, Key, LoadRequest, Loaded, Memory, Record, Store, Timestamp, Write,
};

/// The paths of random appends.
pub const PATHS: &[&[&str]] = &[&[], &["m"], &["m"], &["0"], &["m", "0"], &["m", "n"], &["-1"]];

/// What a row has beside its state. A tombstone has nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Content {
    pub value: Option<Value>,
    pub user: Option<String>,
}

impl Content {
    /// Returns the content, or nothing if it had expired.
    pub fn filter(self, is_live: bool) -> Self {
        if is_live { self } else { Self::default() }
    }
}

/// Draws a document. Some have an array on one of [`PATHS`]. None is null, because a row of null that has expired is a tombstone.
pub fn random_document(rng: &mut fastrand::Rng) -> Value {
    let documents = [
        json!([]),
        json!([1]),
        json!([[1], { "m": [2] }]),
        json!({}),
        json!({ "m": [] }),
        json!({ "a": "x", "m": [1, "0", null], "z": 1.5 }),
        json!({ "m": { "n": [1], "0": [], "a": 1 } }),
        json!({ "0": [1], "m": "text", "-1": [1] }),
        json!({ "m": null }),
        json!("text"),
        json!(rng.u32(..)),
    ];
    rng.choice(&documents).unwrap().clone()
}

/// Appends by the store in memory, and returns the content and the length of the array.
pub async fn appended(held: Content, items: Content, target: &Append) -> Result<(Content, u64), Applied> {
    let store = Memory::new();
    let record = |content: Content, version| {
        let value = Json::new(content.value.unwrap().to_string()).unwrap();
        let record = Record::put(Key::new("k").unwrap(), version, value, Timestamp(i64::MAX));
        Record { user: content.user.map(Into::into), ..record }
    };
    if held.value.is_some() {
        let put = Write::new(record(held, store.clock().issue_version()));
        store.apply(&[put]).await.unwrap();
    }
    // The database decides about the condition.
    let mut target = target.clone();
    target.only_if_present = false;
    let append = Write::new(record(items, store.clock().issue_version())).with_append(target);
    let applied = store.apply(&[append]).await.unwrap().remove(0);
    let Applied::Appended { length, .. } = applied else { return Err(applied) };
    let key = Key::new("k").unwrap();
    let Loaded::Found(record) = store.load(&[LoadRequest::new(key)]).await.unwrap().remove(0) else {
        panic!("the conversation is absent")
    };
    let value = serde_json::from_str(record.value.as_ref().unwrap().as_str()).ok();
    Ok((Content { value, user: record.user.as_deref().map(str::to_owned) }, length))
}
