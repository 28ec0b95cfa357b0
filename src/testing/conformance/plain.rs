//! Rules about plain writes: content, order, tombstones, expiry, listing and purge.

use std::sync::Arc;
use std::time::Duration;

use super::{DAY, HOUR, Suite, parse, parsed};
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};
use crate::store::{Applied, ListRequest, LoadRequest, Loaded, Write};

/// The purges of the rule about expired values.
const MAX_PURGES: usize = 5;

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
        let [first, second] = self.versions();
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
        keys.push(Key::new(format!("{:x<512}", self.run)).unwrap());
        keys.push(self.key(&"🦀".repeat(120)));
        let records: Vec<Record> = keys
            .iter()
            .enumerate()
            .map(|(at, key)| self.record(key, self.version(), &at.to_string()))
            .collect();
        let writes: Vec<Write> = records.iter().cloned().map(Write::from).collect();
        let applied = self.store.apply(&writes).await.unwrap();
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
        let applied = self.store.apply(&writes).await.unwrap();
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

    pub(super) async fn apply_in_any_order_keeps_newest(&self) {
        let key = self.key("newest");
        let versions: Vec<Version> = (0..6).map(|_| self.version()).collect();
        // Only the writes 2 and 5 raise the version.
        for at in [2, 5, 0, 4, 1, 3] {
            let expected =
                if at == 2 || at == 5 { Applied::Stored } else { Applied::Superseded(versions[5]) };
            assert_eq!(
                self.apply(self.record(&key, versions[at], &at.to_string())).await,
                expected,
                "write {at}"
            );
        }
        self.assert_value(&key, versions[5], "5").await;
    }

    pub(super) async fn apply_runs_writes_of_one_key_in_order(&self) {
        let (one, two) = (self.key("twice 1"), self.key("twice 2"));
        let versions: Vec<Version> = (0..4).map(|_| self.version()).collect();
        let write =
            |key, version: usize| Write::from(self.record(key, versions[version], &version.to_string()));
        let all = [write(&two, 3), write(&one, 0), write(&one, 1), write(&two, 2)];
        let applied = self.store.apply(&all).await.unwrap();
        let stored = Applied::Stored;
        assert_eq!(applied, [stored, stored, stored, Applied::Superseded(versions[3])]);
        self.assert_value(&one, versions[1], "1").await;
        self.assert_value(&two, versions[3], "3").await;
    }

    pub(super) async fn apply_rejects_future_and_old_versions(&self) {
        let (key, now) = (self.key("clock"), self.store.clock().now());
        let ahead = Version::min_at(now.plus(Duration::from_secs(300)));
        let old = Version::min_at(now.minus(8 * DAY));
        assert_eq!(self.apply(self.record(&key, ahead, "1")).await, Applied::VersionInFuture);
        assert_eq!(self.apply(self.tombstone(&key, ahead)).await, Applied::VersionInFuture);
        assert_eq!(self.apply(self.record(&key, old, "1")).await, Applied::TooOld);
        assert_eq!(self.load(&key).await, Loaded::Absent(Version::NONE));
        // Six days are within the limit of seven days (I13).
        let late = Version::min_at(now.minus(6 * DAY));
        assert_eq!(self.apply(self.record(&key, late, "1")).await, Applied::Stored);
    }

    pub(super) async fn concurrent_applies_keep_newest(&self) {
        let keys: Vec<Key> = (0..10).map(|at| self.key(&format!("contended {at}"))).collect();
        let mut calls = tokio::task::JoinSet::new();
        let mut newest = Vec::new();
        for round in 0..12 {
            let mut writes: Vec<Write> =
                keys.iter().map(|key| self.record(key, self.version(), &round.to_string()).into()).collect();
            newest = writes.iter().map(|write| write.record.version).collect();
            // Calls with opposite key orders deadlock in a store that locks in call order.
            if round % 2 == 0 {
                writes.reverse();
            }
            let store = Arc::clone(&self.store);
            calls.spawn(async move { store.apply(&writes).await });
        }
        while let Some(call) = calls.join_next().await {
            call.unwrap().unwrap();
        }
        for (key, version) in keys.iter().zip(newest) {
            self.assert_value(key, version, "11").await;
        }
    }

    pub(super) async fn probe_succeeds(&self) {
        self.store.probe().await.unwrap();
    }

    pub(super) async fn tombstone_outlives_late_writes(&self) {
        let [before, late, removal, after] = self.versions();
        for (key, exists) in [(self.key("deleted"), true), (self.key("deleted nothing"), false)] {
            if exists {
                assert_eq!(self.apply(self.record(&key, before, "1")).await, Applied::Stored);
            }
            assert_eq!(self.apply(self.tombstone(&key, removal)).await, Applied::Stored);
            assert_eq!(self.load(&key).await, Loaded::Absent(removal));
            assert_eq!(self.apply(self.record(&key, late, "2")).await, Applied::Superseded(removal));
            assert_eq!(self.load(&key).await, Loaded::Absent(removal));
            assert_eq!(self.apply(self.record(&key, after, "3")).await, Applied::Stored);
            self.assert_value(&key, after, "3").await;
        }
    }

    pub(super) async fn expiry_follows_store_clock(&self) {
        let (brief, past) = (self.key("brief"), self.key("past"));
        let [first, second, third] = self.versions();
        let record_until =
            |at: Timestamp, key: &Key, version| Record { expires_at: at, ..self.record(key, version, "1") };
        let now = self.store.clock().now();
        let soon = now.plus(Duration::from_millis(1500));
        assert_eq!(self.apply(record_until(soon, &brief, first)).await, Applied::Stored);
        assert_eq!(self.apply(record_until(now.minus(HOUR), &past, second)).await, Applied::Stored);
        assert_eq!(self.load(&past).await, Loaded::Absent(second));
        assert!(matches!(self.load(&brief).await, Loaded::Found(_)), "the record has not expired yet");
        while self.store.clock().now() < soon.plus(Duration::from_millis(20)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let known = LoadRequest { key: brief.clone(), if_none_match: Some(first) };
        assert_eq!(self.load_all(&[known]).await, [Loaded::Absent(first)]);
        assert_eq!(self.apply(self.record(&brief, third, "2")).await, Applied::Stored);
        self.assert_value(&brief, third, "2").await;
    }

    pub(super) async fn list_pages_live_records_newest_first(&self) {
        let user: Arc<str> = format!("user {}", self.run).into();
        let keys: Vec<Key> = (0..5).map(|at| self.key(&format!("listed {at}"))).collect();
        for key in &keys {
            let record = Record { user: Some(Arc::clone(&user)), ..self.record(key, self.version(), "1") };
            assert_eq!(self.apply(record).await, Applied::Stored);
        }
        assert_eq!(self.apply(self.tombstone(&keys[3], self.version())).await, Applied::Stored);
        let mut listed = Vec::new();
        let mut after = None;
        loop {
            let page = ListRequest { user: Some(Arc::clone(&user)), limit: 3, after: after.take() };
            let recent = self.store.list(&page).await.unwrap();
            assert!(recent.records.len() <= 3 && (recent.is_last || !recent.records.is_empty()));
            after = recent.records.last().map(|last| (last.version, last.key.clone()));
            listed.extend(recent.records.into_iter().map(|record| record.key));
            if recent.is_last {
                break;
            }
        }
        let expected: Vec<Key> = [4, 2, 1, 0].map(|at: usize| keys[at].clone()).into();
        assert_eq!(listed, expected);
    }

    pub(super) async fn touch_and_purge_keep_live_records(&self) {
        let (live, gone, expired) = (self.key("kept"), self.key("kept tombstone"), self.key("kept expiry"));
        let [first, removal, late] = self.versions();
        let brief = Record { expires_at: self.store.clock().now(), ..self.record(&expired, late, "1") };
        assert_eq!(self.apply(brief).await, Applied::Stored);
        let record = self.record(&live, first, "1");
        let expires_at = record.expires_at;
        assert_eq!(self.apply(record).await, Applied::Stored);
        assert_eq!(self.apply(self.tombstone(&gone, late)).await, Applied::Stored);
        let keys = [live.clone(), gone.clone(), self.key("never there")];
        self.store.touch(&keys).await.unwrap();
        self.store.purge(1_000).await.unwrap();
        self.assert_value(&live, first, "1").await;
        let Loaded::Found(found) = self.load(&live).await else { panic!("the live record is gone") };
        assert_eq!(found.expires_at, expires_at, "touch changes no expiry");
        for young in [&gone, &expired] {
            let late_write = self.record(young, removal, "1");
            assert_eq!(self.apply(late_write).await, Applied::Superseded(late), "purge keeps {young}");
        }
        assert_eq!(self.load(&expired).await, Loaded::Absent(late));
    }

    /// Only the count tells that a value has gone, because no call returns an expired value.
    pub(super) async fn purge_clears_expired_values(&self) {
        let purge = async || self.store.purge(1_000).await.unwrap();
        let key = self.key("cleared");
        for _ in 0..MAX_PURGES {
            let now = self.store.clock().now();
            let expired = Record { expires_at: now, ..self.record(&key, self.version(), "1") };
            assert_eq!(self.apply(expired).await, Applied::Stored);
            // Another client of the store may have cleared the value already.
            if purge().await > 0 {
                return;
            }
        }
        panic!("purge keeps the values of expired records, or does not count them");
    }
}
