//! Rules about content: a load returns each key and value as an apply wrote it.

use super::{Suite, parse, parsed};
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::store::{Applied, LoadRequest, Loaded, Write};

impl Suite {
    pub(super) async fn load_returns_applied_record(&self) {
        let key = self.key("applied");
        assert_eq!(self.load(&key).await, Loaded::Absent(Version::NONE));
        let mut record = self.record(&key, self.version(), r#"{"messages":["hello"]}"#);
        record.user = Some("user 'one'".into());
        record.metadata = Json::of(&["tag"]).unwrap_or_default();
        assert_eq!(self.apply(record.clone()).await, Applied::Stored);
        let Loaded::Found(found) = self.load(&key).await else { panic!("not found") };
        assert_eq!((found.version, found.expires_at), (record.version, record.expires_at));
        assert_eq!(found.user, record.user);
        assert_eq!(parse(found.metadata.as_str()), parse(record.metadata.as_str()));
        assert_eq!(parsed(&found), parsed(&record));
    }

    pub(super) async fn load_omits_known_version(&self) {
        let key = self.key("known");
        let (first, second) = (self.version(), self.version());
        assert_eq!(self.apply(self.record(&key, first, "1")).await, Applied::Stored);
        let request = |known| LoadRequest { key: key.clone(), if_none_match: Some(known) };
        assert_eq!(self.load_all(&[request(first)]).await, [Loaded::NotModified]);
        assert!(matches!(self.load_all(&[request(second)]).await[0], Loaded::Found(_)));
    }

    pub(super) async fn apply_accepts_any_key(&self) {
        let names = [
            "'quotes' \"double\"",
            "comma,s",
            "(parentheses)",
            "back\\slash",
            " spaces  ",
            "+",
            "%41%",
            "🦀",
            "&=?#/;:",
            "a.b",
            "*",
            "{}[]",
            "null",
            "\u{1}\t\n\u{7f}",
            "ÄÖÜ e\u{301}",
            "\u{feff}\u{200b}",
        ];
        let mut keys: Vec<Key> = names.iter().map(|name| self.key(name)).collect();
        keys.push(Key::new(format!("{:x<512}", self.run)).unwrap_or_else(|e| panic!("{e}")));
        keys.push(self.key(&"🦀".repeat(120)));
        let records: Vec<Record> = keys
            .iter()
            .enumerate()
            .map(|(at, key)| self.record(key, self.version(), &at.to_string()))
            .collect();
        let writes: Vec<Write> = records.iter().cloned().map(Write::from).collect();
        let applied = self.store.apply(&writes).await.unwrap_or_else(|e| panic!("apply: {e:?}"));
        assert!(applied.iter().all(|applied| *applied == Applied::Stored), "{applied:?}");
        let requests: Vec<LoadRequest> = keys.iter().cloned().map(LoadRequest::from).collect();
        for (record, loaded) in records.iter().zip(self.load_all(&requests).await) {
            let Loaded::Found(found) = loaded else { panic!("{} is not found", record.key) };
            assert_eq!((&found.key, parsed(&found)), (&record.key, parsed(record)));
        }
    }

    pub(super) async fn apply_accepts_any_value(&self) {
        let mib = |count: usize| format!("[{:?}]", "é".repeat(count << 19));
        let deep = "[".repeat(120) + &"]".repeat(120);
        let small = [
            "null",
            "true",
            "0",
            "-1.5",
            "\"\"",
            "[]",
            "{}",
            "\"\\u0001 \\\\ \\\" \\/ \\ud83e\\udd80\"",
            "{\"\":{\"a\":[null,false]}}",
            "\"null\"",
            deep.as_str(),
        ];
        for value in small.map(str::to_owned).into_iter().chain([mib(1), mib(8).replacen("éé", "", 1)]) {
            let key = self.key(&format!("value {}", fastrand::u64(..)));
            let version = self.version();
            assert_eq!(self.apply(self.record(&key, version, &value)).await, Applied::Stored, "{value:.40}");
            self.assert_value(&key, version, &value).await;
        }
    }

    pub(super) async fn numbers_keep_digits(&self) {
        let key = self.key("digits");
        let value = "[1.0,12345678901234567890123456789.0123456789,1e-30]";
        assert_eq!(self.apply(self.record(&key, self.version(), value)).await, Applied::Stored);
        let Loaded::Found(found) = self.load(&key).await else { panic!("not found") };
        let text: String = found.value.iter().flat_map(|json| json.as_str().split_whitespace()).collect();
        // PostgreSQL writes numeric values without an exponent.
        let without_exponent = text.replace("0.000000000000000000000000000001", "1e-30");
        assert_eq!(without_exponent, value);
    }

    pub(super) async fn apply_takes_5000_keys_in_one_call(&self) {
        let keys: Vec<Key> = (0..5_000).map(|at| self.key(&format!("many {at}"))).collect();
        let records: Vec<Record> = keys
            .iter()
            .enumerate()
            .filter(|(at, _)| at % 5 != 0)
            .map(|(at, key)| self.record(key, self.version(), &at.to_string()))
            .collect();
        let writes: Vec<Write> = records.iter().cloned().map(Write::from).collect();
        let applied = self.store.apply(&writes).await.unwrap_or_else(|e| panic!("apply: {e:?}"));
        assert_eq!(applied.len(), 4_000);
        assert!(applied.iter().all(|applied| *applied == Applied::Stored));
        let requests: Vec<LoadRequest> = keys.iter().cloned().map(LoadRequest::from).collect();
        for (at, loaded) in self.load_all(&requests).await.into_iter().enumerate() {
            match loaded {
                Loaded::Found(found) => assert_eq!(parsed(&found), parse(&at.to_string())),
                other => assert_eq!((other, at % 5), (Loaded::Absent(Version::NONE), 0)),
            }
        }
    }
}
