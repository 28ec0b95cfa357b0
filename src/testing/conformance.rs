//! The contract of [`Store`], as tests for any store.
//!
//! Each rule of the contract is one function. The functions use keys of their own, so that the suite can run against a
//! shared database.
#![allow(clippy::unwrap_used, reason = "the suite is a test")]

mod appends;
mod plain;
mod writers;

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::store::{Applied, LoadRequest, Loaded, Store, Write};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A deviation from the contract of [`Store`] that [`conformance_with`] allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Deviation {
    /// The store rounds numbers. Some servers in front of a database parse JSON numbers as floating point.
    RoundsNumbers,
    /// The store keeps the value of an expired record until it purges the record.
    KeepsExpiredValues,
}

/// Tests a store against the contract of [`Store`].
///
/// The store may hold other records. The suite writes keys of its own and leaves its records in the store.
///
/// # Panics
/// If the store breaks the contract; the message names the broken rule.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use std::sync::Arc;
/// use threadkeep::store::Memory;
///
/// threadkeep::testing::conformance(Arc::new(Memory::new())).await;
/// # }
/// ```
pub async fn conformance(store: Arc<dyn Store>) {
    conformance_with(store, &[]).await;
}

/// Tests a store as [`conformance`] does, but allows some deviations.
///
/// # Panics
/// If the store breaks the contract; the message names the broken rule.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use std::sync::Arc;
/// use threadkeep::store::Memory;
/// use threadkeep::testing::{Deviation, conformance_with};
///
/// conformance_with(Arc::new(Memory::new()), &[Deviation::RoundsNumbers]).await;
/// # }
/// ```
pub async fn conformance_with(store: Arc<dyn Store>, allowed: &[Deviation]) {
    let suite = Suite::new(store);
    suite.all().await;
    if !allowed.contains(&Deviation::RoundsNumbers) {
        suite.numbers_keep_digits().await;
    }
    if !allowed.contains(&Deviation::KeepsExpiredValues) {
        suite.purge_clears_expired_values().await;
    }
}

/// One run of the suite against a store.
struct Suite {
    store: Arc<dyn Store>,
    /// Random suffix of all keys, so that two runs share no record.
    run: String,
}

impl Suite {
    fn new(store: Arc<dyn Store>) -> Self {
        Self { store, run: format!("{:016x}", fastrand::u64(..)) }
    }

    async fn all(&self) {
        self.probe_succeeds().await;
        self.load_returns_applied_record().await;
        self.apply_in_any_order_keeps_newest().await;
        self.apply_runs_writes_of_one_key_in_order().await;
        self.repeated_put_is_stored_again().await;
        self.repeated_update_is_stored_after_writes_of_others().await;
        self.condition_compares_versions().await;
        self.condition_holds_over_own_run().await;
        self.write_of_another_ends_the_run().await;
        self.writer_without_daemon_is_never_recognised().await;
        self.remove_is_not_undone().await;
        self.late_put_does_not_undo_an_update().await;
        self.own_put_behind_own_update_is_not_swallowed().await;
        self.update_of_a_missing_row_follows_its_base().await;
        self.purge_keeps_young_notes_of_writers().await;
        self.tombstone_outlives_late_writes().await;
        self.expiry_follows_store_clock().await;
        self.apply_rejects_future_and_old_versions().await;
        self.load_omits_known_version().await;
        self.apply_accepts_any_key().await;
        self.apply_accepts_any_value().await;
        self.apply_takes_5000_keys_in_one_call().await;
        self.concurrent_applies_keep_newest().await;
        self.list_pages_live_records_newest_first().await;
        self.touch_and_purge_keep_live_records().await;
        // Last, because a repeated append gets another answer. A script of faults ends before it.
        self.append_is_applied_once().await;
        self.appends_commute_in_any_order_of_arrival().await;
        self.append_loses_against_a_newer_put_or_remove().await;
        self.append_finds_its_array_or_rejects_the_record_alone().await;
        self.append_keeps_the_limit_of_bytes().await;
        self.append_keeps_user_and_metadata_and_shortens_no_life().await;
        self.append_after_the_expiry_begins_a_new_conversation().await;
        self.append_only_if_present_creates_nothing().await;
        self.update_holds_over_own_appends().await;
    }

    fn key(&self, name: &str) -> Key {
        Key::new(format!("{name} {}", self.run)).unwrap()
    }

    /// Stamps a version above all earlier versions of the suite.
    fn version(&self) -> Version {
        self.store.clock().issue().version
    }

    /// Stamps versions in rising order.
    fn versions<const COUNT: usize>(&self) -> [Version; COUNT] {
        std::array::from_fn(|_| self.version())
    }

    fn record(&self, key: &Key, version: Version, value: &str) -> Record {
        Record::put(key.clone(), version, Json::new(value).unwrap(), self.store.clock().now().plus(HOUR))
    }

    fn tombstone(&self, key: &Key, version: Version) -> Record {
        Record::tombstone(key.clone(), version)
    }

    async fn apply(&self, record: Record) -> Applied {
        self.apply_write(record.into()).await
    }

    async fn apply_write(&self, write: Write) -> Applied {
        let applied = self.store.apply(&[write]).await.unwrap();
        assert_eq!(applied.len(), 1, "apply returns one result for each write");
        applied[0]
    }

    async fn load_all(&self, requests: &[LoadRequest]) -> Vec<Loaded> {
        let loaded = self.store.load(requests).await.unwrap();
        assert_eq!(loaded.len(), requests.len(), "load returns one result for each request");
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
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn parsed(record: &Record) -> Value {
    parse(record.value.as_ref().map_or("null", Json::as_str))
}
