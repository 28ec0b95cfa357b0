//! The contract of [`Store`], as tests that any store can be put to.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::record::{Json, Key, Record, Want, Write};
use crate::store::{ACCEPTED, Applied, Loaded, Page, Store};
use crate::version::{Timestamp, Version};

const HOUR: Duration = Duration::from_secs(3600);

/// Puts a store to the contract. The store may hold other records; those that the suite writes have keys of their own.
///
/// # Panics
/// Where the store breaks the contract, saying how.
pub async fn conformance(store: Arc<dyn Store>) {
    let suite = Suite::new(store);
    suite.all().await;
    suite.numbers_keep_their_digits().await;
}

/// As [`conformance`], for a store behind a server that passes JSON numbers through floating point.
///
/// # Panics
/// As [`conformance`].
pub async fn conformance_without_digits(store: Arc<dyn Store>) {
    Suite::new(store).all().await;
}

struct Suite {
    store: Arc<dyn Store>,
    run: String,
}

impl Suite {
    fn new(store: Arc<dyn Store>) -> Self {
        Self { store, run: format!("{:016x}", fastrand::u64(..)) }
    }

    async fn all(&self) {
        self.probe_sets_the_clock().await;
        self.what_was_applied_is_loaded().await;
        self.apply_is_idempotent().await;
        self.the_newest_wins_in_any_order().await;
        self.writes_of_one_key_in_one_call_are_carried_out_in_order().await;
        self.compare_and_set().await;
        self.an_accepted_write_is_recognised().await;
        self.a_delete_holds_against_late_writes().await;
        self.a_delete_of_nothing_is_remembered().await;
        self.expiry_follows_the_stores_clock().await;
        self.versions_ahead_of_the_clock_or_too_old_are_refused().await;
        self.a_known_version_is_not_sent_again().await;
        self.any_key_will_do().await;
        self.any_value_will_do().await;
        self.five_thousand_keys_in_one_call().await;
        self.concurrent_applies_keep_the_newest().await;
        self.recent_lists_a_users_live_threads_newest_first().await;
        self.touch_and_purge_leave_live_threads_alone().await;
    }

    fn key(&self, name: &str) -> Key {
        Key::new(format!("{name} {}", self.run)).unwrap_or_else(|e| panic!("{e}"))
    }

    fn version(&self) -> Version {
        self.store.clock().stamp().version
    }

    fn record(&self, key: &Key, version: Version, value: &str) -> Record {
        Record {
            key: key.clone(),
            version,
            value: Some(Json::new(value).unwrap_or_else(|e| panic!("{e}"))),
            expires_at: self.store.clock().now().plus(HOUR),
            user: None,
            metadata: Json::default(),
        }
    }

    fn deletion(&self, key: &Key, version: Version) -> Record {
        Record { value: None, expires_at: version.at(), ..self.record(key, version, "null") }
    }

    async fn apply(&self, record: Record) -> Applied {
        self.apply_write(record.into()).await
    }

    async fn apply_write(&self, write: Write) -> Applied {
        let applied = self.store.apply(&[write]).await.unwrap_or_else(|e| panic!("apply: {e:?}"));
        assert_eq!(applied.len(), 1, "one answer for one write");
        applied[0]
    }

    async fn load_all(&self, wants: &[Want]) -> Vec<Loaded> {
        let loaded = self.store.load(wants).await.unwrap_or_else(|e| panic!("load: {e:?}"));
        assert_eq!(loaded.len(), wants.len(), "one answer for each want");
        loaded
    }

    async fn load(&self, key: &Key) -> Loaded {
        self.load_all(&[key.clone().into()]).await.remove(0)
    }

    async fn assert_value(&self, key: &Key, version: Version, value: &str) {
        let Loaded::Found(found) = self.load(key).await else { panic!("{key} is not found") };
        assert_eq!((&found.key, found.version), (key, version));
        assert_eq!(parsed(&found), parse(value), "{key}");
    }

    async fn probe_sets_the_clock(&self) {
        self.store.probe().await.unwrap_or_else(|e| panic!("probe: {e:?}"));
    }

    async fn what_was_applied_is_loaded(&self) {
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

    async fn apply_is_idempotent(&self) {
        let key = self.key("idempotent");
        let (first, second) = (self.version(), self.version());
        for _ in 0..3 {
            assert_eq!(self.apply(self.record(&key, first, "1")).await, Applied::Stored);
        }
        assert_eq!(self.apply(self.record(&key, second, "2")).await, Applied::Stored);
        // It was accepted once, which is all its writer wants to know; it changes nothing now.
        assert_eq!(self.apply(self.record(&key, first, "1")).await, Applied::Stored);
        self.assert_value(&key, second, "2").await;
    }

    async fn the_newest_wins_in_any_order(&self) {
        let key = self.key("newest");
        let versions: Vec<Version> = (0..6).map(|_| self.version()).collect();
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

    async fn writes_of_one_key_in_one_call_are_carried_out_in_order(&self) {
        let (one, two) = (self.key("twice 1"), self.key("twice 2"));
        let versions: Vec<Version> = (0..4).map(|_| self.version()).collect();
        let of = |key, version: usize| Write::from(self.record(key, versions[version], &version.to_string()));
        let all = [of(&two, 3), of(&one, 0), of(&one, 1), of(&two, 2)];
        let applied = self.store.apply(&all).await.unwrap_or_else(|e| panic!("apply: {e:?}"));
        let stored = Applied::Stored;
        assert_eq!(applied, [stored, stored, stored, Applied::Superseded(versions[3])]);
        self.assert_value(&one, versions[1], "1").await;
        self.assert_value(&two, versions[3], "3").await;
    }

    async fn compare_and_set(&self) {
        let key = self.key("cas");
        let (first, second, third) = (self.version(), self.version(), self.version());
        let over = |version, expect| Write { expect: Some(expect), ..self.record(&key, version, "1").into() };
        assert_eq!(self.apply_write(over(second, first)).await, Applied::Conflict(Version::NONE));
        assert_eq!(self.apply_write(over(first, Version::NONE)).await, Applied::Stored);
        assert_eq!(self.apply_write(over(second, Version::NONE)).await, Applied::Conflict(first));
        assert_eq!(self.apply_write(over(second, first)).await, Applied::Stored);
        assert_eq!(self.apply_write(over(third, first)).await, Applied::Conflict(second));
        assert_eq!(self.load(&key).await.version(), second);
    }

    async fn an_accepted_write_is_recognised(&self) {
        let key = self.key("accepted");
        let versions: Vec<Version> = (0..ACCEPTED + 2).map(|_| self.version()).collect();
        let write =
            |at: usize, expect| Write { expect, again: true, ..self.record(&key, versions[at], "1").into() };
        let never = self.version();
        for at in 0..versions.len() {
            let expect = at.checked_sub(1).map_or(Version::NONE, |before| versions[before]);
            assert_eq!(self.apply_write(write(at, Some(expect))).await, Applied::Stored);
        }
        let newest = versions[ACCEPTED + 1];
        for at in 2..versions.len() {
            let expect = Some(versions[at - 1]);
            assert_eq!(self.apply_write(write(at, expect)).await, Applied::Stored, "own success {at}");
        }
        assert_eq!(self.apply_write(write(1, Some(versions[0]))).await, Applied::Forgotten(newest));
        let first_time = Write { again: false, ..write(1, Some(versions[0])) };
        assert_eq!(self.apply_write(first_time).await, Applied::Conflict(newest));
        let other = Write { expect: Some(versions[0]), again: true, ..self.record(&key, never, "1").into() };
        assert_eq!(self.apply_write(other).await, Applied::Conflict(newest));
    }

    async fn a_delete_holds_against_late_writes(&self) {
        let key = self.key("deleted");
        let (before, late, deletion, after) =
            (self.version(), self.version(), self.version(), self.version());
        assert_eq!(self.apply(self.record(&key, before, "1")).await, Applied::Stored);
        assert_eq!(self.apply(self.deletion(&key, deletion)).await, Applied::Stored);
        assert_eq!(self.load(&key).await, Loaded::Absent(deletion));
        assert_eq!(self.apply(self.record(&key, late, "2")).await, Applied::Superseded(deletion));
        assert_eq!(self.load(&key).await, Loaded::Absent(deletion));
        assert_eq!(self.apply(self.record(&key, after, "3")).await, Applied::Stored);
        self.assert_value(&key, after, "3").await;
    }

    async fn a_delete_of_nothing_is_remembered(&self) {
        let key = self.key("deleted nothing");
        let (late, deletion) = (self.version(), self.version());
        assert_eq!(self.apply(self.deletion(&key, deletion)).await, Applied::Stored);
        assert_eq!(self.apply(self.record(&key, late, "1")).await, Applied::Superseded(deletion));
        assert_eq!(self.load(&key).await, Loaded::Absent(deletion));
    }

    async fn expiry_follows_the_stores_clock(&self) {
        let (brief, past) = (self.key("brief"), self.key("past"));
        let (first, second, third) = (self.version(), self.version(), self.version());
        let until =
            |at: Timestamp, key: &Key, version| Record { expires_at: at, ..self.record(key, version, "1") };
        let now = self.store.clock().now();
        let soon = now.plus(Duration::from_millis(1500));
        assert_eq!(self.apply(until(soon, &brief, first)).await, Applied::Stored);
        assert_eq!(self.apply(until(now.minus(HOUR), &past, second)).await, Applied::Stored);
        assert_eq!(self.load(&past).await, Loaded::Absent(second));
        assert!(matches!(self.load(&brief).await, Loaded::Found(_)), "not expired yet");
        while self.store.clock().now() < soon.plus(Duration::from_millis(20)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let known = Want { key: brief.clone(), known: Some(first) };
        assert_eq!(self.load_all(&[known]).await, [Loaded::Absent(first)]);
        assert_eq!(self.apply(self.record(&brief, third, "2")).await, Applied::Stored);
        self.assert_value(&brief, third, "2").await;
    }

    async fn versions_ahead_of_the_clock_or_too_old_are_refused(&self) {
        let (key, now) = (self.key("clock"), self.store.clock().now());
        let ahead = Version::lowest(now.plus(Duration::from_secs(300)));
        let old = Version::lowest(now.minus(8 * 24 * HOUR));
        assert_eq!(self.apply(self.record(&key, ahead, "1")).await, Applied::Ahead);
        assert_eq!(self.apply(self.deletion(&key, ahead)).await, Applied::Ahead);
        assert_eq!(self.apply(self.record(&key, old, "1")).await, Applied::TooOld);
        assert_eq!(self.load(&key).await, Loaded::Absent(Version::NONE));
        let late = Version::lowest(now.minus(6 * 24 * HOUR));
        assert_eq!(self.apply(self.record(&key, late, "1")).await, Applied::Stored);
    }

    async fn a_known_version_is_not_sent_again(&self) {
        let key = self.key("known");
        let (first, second) = (self.version(), self.version());
        assert_eq!(self.apply(self.record(&key, first, "1")).await, Applied::Stored);
        let want = |known| Want { key: key.clone(), known: Some(known) };
        assert_eq!(self.load_all(&[want(first)]).await, [Loaded::Same]);
        assert!(matches!(self.load_all(&[want(second)]).await[0], Loaded::Found(_)));
    }

    async fn any_key_will_do(&self) {
        let plain = [
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
        let mut keys: Vec<Key> = plain.iter().map(|name| self.key(name)).collect();
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
        let wants: Vec<Want> = keys.iter().cloned().map(Want::from).collect();
        for (record, loaded) in records.iter().zip(self.load_all(&wants).await) {
            let Loaded::Found(found) = loaded else { panic!("{} is not found", record.key) };
            assert_eq!((&found.key, parsed(&found)), (&record.key, parsed(record)));
        }
    }

    async fn any_value_will_do(&self) {
        let mib = |count: usize| format!("[{:?}]", "é".repeat(count << 19));
        let deep = "[".repeat(120) + &"]".repeat(120);
        let plain = [
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
        for value in plain.map(str::to_owned).into_iter().chain([mib(1), mib(8).replacen("éé", "", 1)]) {
            let key = self.key(&format!("value {}", fastrand::u64(..)));
            let version = self.version();
            assert_eq!(self.apply(self.record(&key, version, &value)).await, Applied::Stored, "{value:.40}");
            self.assert_value(&key, version, &value).await;
        }
    }

    async fn numbers_keep_their_digits(&self) {
        let key = self.key("digits");
        let value = "[1.0,12345678901234567890123456789.0123456789,1e-30]";
        assert_eq!(self.apply(self.record(&key, self.version(), value)).await, Applied::Stored);
        let Loaded::Found(found) = self.load(&key).await else { panic!("not found") };
        let text: String = found.value.iter().flat_map(|json| json.as_str().split_whitespace()).collect();
        let written_out = text.replace("0.000000000000000000000000000001", "1e-30");
        assert_eq!(written_out, value);
    }

    async fn five_thousand_keys_in_one_call(&self) {
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
        let wants: Vec<Want> = keys.iter().cloned().map(Want::from).collect();
        for (at, loaded) in self.load_all(&wants).await.into_iter().enumerate() {
            match loaded {
                Loaded::Found(found) => assert_eq!(parsed(&found), parse(&at.to_string())),
                other => assert_eq!((other, at % 5), (Loaded::Absent(Version::NONE), 0)),
            }
        }
    }

    async fn concurrent_applies_keep_the_newest(&self) {
        let keys: Vec<Key> = (0..10).map(|at| self.key(&format!("contended {at}"))).collect();
        let mut calls = tokio::task::JoinSet::new();
        let mut newest = Vec::new();
        for round in 0..12 {
            let mut writes: Vec<Write> =
                keys.iter().map(|key| self.record(key, self.version(), &round.to_string()).into()).collect();
            newest = writes.iter().map(|write| write.record.version).collect();
            if round % 2 == 0 {
                writes.reverse();
            }
            let store = Arc::clone(&self.store);
            calls.spawn(async move { store.apply(&writes).await });
        }
        while let Some(call) = calls.join_next().await {
            call.unwrap_or_else(|e| panic!("{e}")).unwrap_or_else(|e| panic!("apply: {e:?}"));
        }
        for (key, version) in keys.iter().zip(newest) {
            self.assert_value(key, version, "11").await;
        }
    }

    async fn recent_lists_a_users_live_threads_newest_first(&self) {
        let user: Arc<str> = format!("user {}", self.run).into();
        let keys: Vec<Key> = (0..5).map(|at| self.key(&format!("listed {at}"))).collect();
        for key in &keys {
            let record = Record { user: Some(Arc::clone(&user)), ..self.record(key, self.version(), "1") };
            assert_eq!(self.apply(record).await, Applied::Stored);
        }
        assert_eq!(self.apply(self.deletion(&keys[3], self.version())).await, Applied::Stored);
        let mut listed = Vec::new();
        let mut after = None;
        loop {
            let page = Page { user: Some(Arc::clone(&user)), most: 3, after: after.take() };
            let recent = self.store.recent(&page).await.unwrap_or_else(|e| panic!("recent: {e:?}"));
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

    async fn touch_and_purge_leave_live_threads_alone(&self) {
        let (live, gone, expired) = (self.key("kept"), self.key("kept deletion"), self.key("kept expiry"));
        let (first, deletion, late) = (self.version(), self.version(), self.version());
        let brief = Record { expires_at: self.store.clock().now(), ..self.record(&expired, late, "1") };
        assert_eq!(self.apply(brief).await, Applied::Stored);
        assert_eq!(self.apply(self.record(&live, first, "1")).await, Applied::Stored);
        assert_eq!(self.apply(self.deletion(&gone, late)).await, Applied::Stored);
        let keys = [live.clone(), gone.clone(), self.key("never there")];
        self.store.touch(&keys).await.unwrap_or_else(|e| panic!("touch: {e:?}"));
        self.store.purge(1_000).await.unwrap_or_else(|e| panic!("purge: {e:?}"));
        self.assert_value(&live, first, "1").await;
        let superseded = Applied::Superseded(late);
        assert_eq!(
            self.apply(self.record(&gone, deletion, "1")).await,
            superseded,
            "a young deletion is remembered"
        );
        assert_eq!(
            self.apply(self.record(&expired, deletion, "1")).await,
            superseded,
            "and so is a young expiry"
        );
        assert_eq!(self.load(&expired).await, Loaded::Absent(late));
    }
}

impl Loaded {
    fn version(&self) -> Version {
        match self {
            Self::Found(record) => record.version,
            Self::Absent(version) => *version,
            Self::Same => Version::NONE,
        }
    }
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:.80} is not JSON: {e}"))
}

fn parsed(record: &Record) -> Value {
    parse(record.value.as_ref().map_or("null", Json::as_str))
}
