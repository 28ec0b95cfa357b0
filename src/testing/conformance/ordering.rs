//! Rules about the order of plain writes by several clients.

use std::sync::Arc;
use std::time::Duration;

use super::{DAY, Suite};
use crate::model::key::Key;
use crate::model::version::Version;
use crate::store::{Applied, Loaded, Write};

impl Suite {
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
        let applied = self.store.apply(&all).await.unwrap_or_else(|e| panic!("apply: {e:?}"));
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
            call.unwrap_or_else(|e| panic!("{e}")).unwrap_or_else(|e| panic!("apply: {e:?}"));
        }
        for (key, version) in keys.iter().zip(newest) {
            self.assert_value(key, version, "11").await;
        }
    }
}
