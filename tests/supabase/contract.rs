//! The conformance suite and the plan's tests.

use std::sync::Arc;

use serde_json::{Value, json};
use threadkeep::store::{ResilientStore, Supabase};
use threadkeep::testing::{Deviation, conformance_with};
use threadkeep::{Cache, WriteOutcome};

use crate::stack::{Server, Stack};
use crate::{SECOND, get, key, row, shared};

on_each_server!(
    store_passes_the_conformance_suite,
    resilient_store_with_legacy_key_passes_the_suite,
    planned_tests_pass_on_supabase,
    stored_row_has_the_planned_columns
);

async fn conforms(server: Server, store: Arc<dyn threadkeep::store::Store>) {
    let kept = Deviation::KeepsExpiredValues;
    match server {
        Server::Postrust | Server::Postgrest => conformance_with(store, &[kept]).await,
        // Numbers pass through JavaScript there.
        Server::Lite => conformance_with(store, &[kept, Deviation::RoundsNumbers]).await,
    }
}

async fn store_passes_the_conformance_suite(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let store = Supabase::new(&gateway.url(), &gateway.keys().secret).unwrap();
    conforms(server, Arc::new(store)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn store_on_partitions_passes_the_conformance_suite() {
    let stack = tokio::task::block_in_place(|| Stack::start_partitioned(Server::Postrust));
    let gateway = stack.gateway().await;
    let store = Supabase::new(&gateway.url(), &gateway.keys().secret).unwrap();
    conforms(Server::Postrust, Arc::new(store)).await;
    let kind = tokio::task::block_in_place(|| {
        stack.psql("select relkind from pg_class where relname = 'conversation_threads'")
    });
    assert_eq!(kind, "p");
}

async fn resilient_store_with_legacy_key_passes_the_suite(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let store = Supabase::new(&gateway.url(), &gateway.keys().service_jwt).unwrap();
    let guard = ResilientStore::new(store, 20 * SECOND);
    guard.connect().await.unwrap();
    conforms(server, Arc::new(guard)).await;
}

async fn planned_tests_pass_on_supabase(server: Server) {
    let (_, _gateway, cache) = shared(server).await;
    planned(&cache, WriteOutcome::Stored).await;
}

#[tokio::test]
async fn planned_tests_pass_on_memory_and_local() {
    planned(&Cache::builder().memory().open().await.unwrap(), WriteOutcome::Volatile).await;
    let dir = tempfile::tempdir().unwrap();
    let local = Cache::builder().local(dir.path().join("t.db")).open().await.unwrap();
    planned(&local, WriteOutcome::Stored).await;
}

/// Tests put and get, expiry after seconds, and remove. `written` is the outcome of a write to this store.
async fn planned(cache: &Cache, written: WriteOutcome) {
    let (stored, brief, deleted) = (key("stored"), key("brief"), key("deleted"));
    let value = json!({"messages": [{"role": "user", "content": "it's \"quoted\" 🦀"}]});
    assert_eq!(cache.put(&stored, &value).await.unwrap(), written);
    assert_eq!(get(cache, &stored).await.unwrap().decode::<Value>().unwrap(), value);
    cache.evict(&stored).unwrap();
    assert_eq!(
        get(cache, &stored).await.unwrap().decode::<Value>().unwrap(),
        value,
        "the loaded value differs"
    );

    cache.put(&brief, &value).ttl(2 * SECOND).await.unwrap();
    assert!(get(cache, &brief).await.is_some());
    tokio::time::sleep(2 * SECOND + SECOND / 20).await;
    assert!(get(cache, &brief).await.is_none());

    cache.put(&deleted, &value).await.unwrap();
    assert_eq!(cache.remove(&deleted).await.unwrap(), written);
    assert!(get(cache, &deleted).await.is_none());
    cache.evict(&deleted).unwrap();
    assert!(get(cache, &deleted).await.is_none());
}

async fn stored_row_has_the_planned_columns(server: Server) {
    let (stack, _gateway, cache) = shared(server).await;
    let key = key("row");
    cache.put(&key, &json!({"a": [1]})).user("u'1").metadata(&json!({"m": 2})).await.unwrap();
    let columns =
        "user_id, conversation_data, metadata, round(extract(epoch from expires_at - created_at) / 3600)";
    assert_eq!(row(stack, &key, columns), r#"u'1|{"a": [1]}|{"m": 2}|24"#);
    let version = get(&cache, &key).await.unwrap().version();
    let state = "version, base_version, last_writer >> 24 > 0, run_began";
    assert_eq!(row(stack, &key, state), format!("{version}|{version}|t|0"));
    cache.remove(&key).await.unwrap();
    let columns = "conversation_data, expires_at <= clock_timestamp(), user_id is null";
    assert_eq!(row(stack, &key, columns), "null|t|t");
}

/// The library rejects exactly the values that `jsonb` rejects.
#[tokio::test(flavor = "multi_thread")]
async fn library_rejects_exactly_the_values_that_jsonb_rejects() {
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    let client = stack.sql().await;
    let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
    for text in [
        "1e131071".to_owned(),
        "1e131072".into(),
        "-0.1e131072".into(),
        "-0.1e131073".into(),
        "0.001e131074".into(),
        "0.001e131075".into(),
        "0e200000".into(),
        "0e-16384".into(),
        "0.0e131073".into(),
        "1e-16383".into(),
        "1e-16384".into(),
        "123.456e-16380".into(),
        "123.456e-16381".into(),
        "9".repeat(131_072),
        "9".repeat(131_073),
        r#""\u0000""#.into(),
        r#""\ud83d""#.into(),
        r#""\ud83d\ude00""#.into(),
        r#""\\u0000""#.into(),
        deep(127),
    ] {
        let door = threadkeep::store::Json::new(text.clone()).is_ok();
        let jsonb = client.query_one("select $1::text::jsonb::text", &[&text]).await.is_ok();
        assert_eq!(door, jsonb, "{text:.40}");
    }
}
