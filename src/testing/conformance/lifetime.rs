//! Rules about lifetime: tombstones, expiry, listing and purge.

use std::sync::Arc;
use std::time::Duration;

use super::{HOUR, Suite};
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::Timestamp;
use crate::store::{Applied, ListRequest, LoadRequest, Loaded};

/// The purges of the rule about expired values.
const MAX_PURGES: usize = 5;

impl Suite {
    pub(super) async fn probe_succeeds(&self) {
        self.store.probe().await.unwrap_or_else(|e| panic!("probe: {e:?}"));
    }

    pub(super) async fn tombstone_outlives_late_writes(&self) {
        let key = self.key("deleted");
        let (before, late, removal, after) = (self.version(), self.version(), self.version(), self.version());
        assert_eq!(self.apply(self.record(&key, before, "1")).await, Applied::Stored);
        assert_eq!(self.apply(self.tombstone(&key, removal)).await, Applied::Stored);
        assert_eq!(self.load(&key).await, Loaded::Absent(removal));
        assert_eq!(self.apply(self.record(&key, late, "2")).await, Applied::Superseded(removal));
        assert_eq!(self.load(&key).await, Loaded::Absent(removal));
        assert_eq!(self.apply(self.record(&key, after, "3")).await, Applied::Stored);
        self.assert_value(&key, after, "3").await;
    }

    pub(super) async fn tombstone_of_missing_key_is_kept(&self) {
        let key = self.key("deleted nothing");
        let (late, removal) = (self.version(), self.version());
        assert_eq!(self.apply(self.tombstone(&key, removal)).await, Applied::Stored);
        assert_eq!(self.apply(self.record(&key, late, "1")).await, Applied::Superseded(removal));
        assert_eq!(self.load(&key).await, Loaded::Absent(removal));
    }

    pub(super) async fn expiry_follows_store_clock(&self) {
        let (brief, past) = (self.key("brief"), self.key("past"));
        let (first, second, third) = (self.version(), self.version(), self.version());
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
            let recent = self.store.list(&page).await.unwrap_or_else(|e| panic!("list: {e:?}"));
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
        let (first, removal, late) = (self.version(), self.version(), self.version());
        let brief = Record { expires_at: self.store.clock().now(), ..self.record(&expired, late, "1") };
        assert_eq!(self.apply(brief).await, Applied::Stored);
        let record = self.record(&live, first, "1");
        let expires_at = record.expires_at;
        assert_eq!(self.apply(record).await, Applied::Stored);
        assert_eq!(self.apply(self.tombstone(&gone, late)).await, Applied::Stored);
        let keys = [live.clone(), gone.clone(), self.key("never there")];
        self.store.touch(&keys).await.unwrap_or_else(|e| panic!("touch: {e:?}"));
        self.store.purge(1_000).await.unwrap_or_else(|e| panic!("purge: {e:?}"));
        self.assert_value(&live, first, "1").await;
        let Loaded::Found(found) = self.load(&live).await else {
            panic!("touch and purge keep a live record")
        };
        assert_eq!(found.expires_at, expires_at, "touch changes no expiry");
        let superseded = Applied::Superseded(late);
        assert_eq!(
            self.apply(self.record(&gone, removal, "1")).await,
            superseded,
            "purge keeps a young tombstone"
        );
        assert_eq!(
            self.apply(self.record(&expired, removal, "1")).await,
            superseded,
            "purge keeps a young expired record"
        );
        assert_eq!(self.load(&expired).await, Loaded::Absent(late));
    }

    /// Only the count tells that a value has gone, because no call returns an expired value.
    pub(super) async fn purge_clears_expired_values(&self) {
        let purge = async || self.store.purge(1_000).await.unwrap_or_else(|e| panic!("purge: {e:?}"));
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
