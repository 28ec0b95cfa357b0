//! Deletions by plain SQL statements. No late write undoes them.

use std::time::Duration;

use serde_json::json;
use threadkeep::store::{Applied, Json, LoadRequest, Loaded, Record, Store, Supabase, Write, WriterId};
use threadkeep::{Key, Version, WriteOutcome};

use crate::stack::{Fault, Gateway, Server, Stack};
use crate::{builder, daemon, eventually, get, key, row, shared};

on_each_server!(
    tombstone_survives_a_plain_delete,
    plain_delete_of_expired_row_keeps_its_version,
    plain_delete_of_live_row_leaves_newer_tombstone,
    repeated_writes_do_not_undo_a_plain_delete,
    plain_insert_over_tombstone_gets_a_higher_version,
    change_of_thread_id_is_a_delete_and_an_insert,
    delete_repairs_a_row_with_an_absurd_version,
    update_after_plain_delete_starts_from_absence,
    replayed_put_does_not_undo_an_earlier_delete,
);

/// A store and the versions that its clock issued, in order.
struct Bench {
    stack: &'static Stack,
    _gateway: Gateway,
    store: Supabase,
    key: Key,
}

impl Bench {
    async fn new(server: Server, name: &str) -> Self {
        let (stack, gateway, _) = shared(server).await;
        let store = Supabase::new(&gateway.url(), &gateway.keys().secret).unwrap();
        store.probe().await.unwrap();
        Self { stack, _gateway: gateway, store, key: Key::new(key(name)).unwrap() }
    }

    fn versions<const N: usize>(&self) -> [Version; N] {
        std::array::from_fn(|_| self.store.clock().issue_version())
    }

    fn record(&self, version: Version, value: Option<i32>) -> Record {
        let value = value.map(|value| Json::of(&value).unwrap());
        let expires_at = if value.is_some() {
            self.store.clock().now().plus(Duration::from_secs(3600))
        } else {
            version.at()
        };
        Record { key: self.key.clone(), version, value, expires_at, user: None, metadata: Json::default() }
    }

    async fn apply(&self, write: impl Into<Write>) -> Applied {
        self.store.apply(&[write.into()]).await.unwrap()[0]
    }

    async fn put(&self, version: Version) -> Applied {
        self.apply(self.record(version, Some(1))).await
    }

    async fn load(&self) -> Loaded {
        self.store.load(&[LoadRequest::from(self.key.clone())]).await.unwrap().remove(0)
    }

    fn sql(&self, sql: &str) -> String {
        self.stack.psql(&sql.replace("KEY", self.key.as_str())).trim().to_owned()
    }

    fn delete(&self) {
        self.sql("delete from conversation_threads where thread_id = 'KEY'");
    }
}

async fn tombstone_survives_a_plain_delete(server: Server) {
    let bench = Bench::new(server, "tombstone").await;
    let [first, late, removal, newer] = bench.versions();
    assert_eq!(bench.put(first).await, Applied::Stored);
    assert_eq!(bench.apply(bench.record(removal, None)).await, Applied::Stored);
    // The plan's `get` deletes expired rows.
    bench.sql("delete from conversation_threads where thread_id = 'KEY' and expires_at <= now()");
    assert_eq!(bench.sql("select count(*) from conversation_threads where thread_id = 'KEY'"), "0");
    assert_eq!(bench.put(late).await, Applied::Superseded(removal));
    assert_eq!(bench.load().await, Loaded::Absent(removal));
    assert_eq!(bench.put(newer).await, Applied::Stored);
    assert!(matches!(bench.load().await, Loaded::Found(found) if found.version == newer));
}

async fn plain_delete_of_expired_row_keeps_its_version(server: Server) {
    let bench = Bench::new(server, "expired").await;
    let [late, put, newer] = bench.versions();
    let brief = Record { expires_at: bench.store.clock().now(), ..bench.record(put, Some(1)) };
    assert_eq!(bench.apply(brief).await, Applied::Stored);
    assert_eq!(bench.load().await, Loaded::Absent(put));
    bench.delete();
    assert_eq!(bench.load().await, Loaded::Absent(put), "the delete must keep the version of the tombstone");
    assert_eq!(bench.put(late).await, Applied::Superseded(put));
    let over = Write::from(bench.record(newer, Some(2))).with_if_version(put);
    assert_eq!(bench.apply(over).await, Applied::Stored);
}

async fn plain_delete_of_live_row_leaves_newer_tombstone(server: Server) {
    let bench = Bench::new(server, "live").await;
    let [put, late] = bench.versions();
    assert_eq!(bench.put(put).await, Applied::Stored);
    bench.delete();
    let Loaded::Absent(deleted) = bench.load().await else { panic!("the conversation is not deleted") };
    assert!(deleted > late, "{deleted:?} {late:?}");
    assert_eq!(bench.put(late).await, Applied::Superseded(deleted));
    // A compare-and-set without the deletion gets a conflict. Its retry starts from the deletion.
    let [next, last] = bench.versions();
    let over = |version, expect| Write::from(bench.record(version, Some(2))).with_if_version(expect);
    assert_eq!(bench.apply(over(next, Version::NONE)).await, Applied::Conflict(deleted));
    assert_eq!(bench.apply(over(next, put)).await, Applied::Conflict(deleted));
    assert_eq!(bench.apply(over(last, deleted)).await, Applied::Stored);
}

/// A response was lost, and the conversation was deleted meanwhile. The store recognises a conditional write that comes again. It
/// recognises a plain write only until something newer takes its place.
async fn repeated_writes_do_not_undo_a_plain_delete(server: Server) {
    let bench = Bench::new(server, "repeated").await;
    let [put, updated] = bench.versions();
    let update =
        Write::from(bench.record(updated, Some(2))).with_if_version(put).with_writer(WriterId::random());
    assert_eq!(bench.put(put).await, Applied::Stored);
    assert_eq!(bench.apply(update.clone()).await, Applied::Stored);
    let insert = "insert into conversation_threads (thread_id, conversation_data, expires_at) values ('KEY', '9', now() + interval '1h')";
    for (change, value) in [("delete from conversation_threads where thread_id = 'KEY'", ""), (insert, "9")] {
        bench.sql(change);
        assert!(matches!(bench.put(put).await, Applied::Superseded(newer) if newer > updated), "{change}");
        assert_eq!(bench.apply(update.clone()).await, Applied::Stored, "{change}");
        assert_eq!(
            bench.sql("select conversation_data from conversation_threads where thread_id = 'KEY'"),
            value
        );
    }
}

async fn plain_insert_over_tombstone_gets_a_higher_version(server: Server) {
    let bench = Bench::new(server, "again").await;
    let insert = "insert into conversation_threads (thread_id, conversation_data, expires_at)
                  values ('KEY', '2', now() + interval '1 hour')";
    let upsert = format!(
        "{insert} on conflict (thread_id) do update set conversation_data = excluded.conversation_data"
    );
    for create in [insert, &upsert] {
        let [put] = bench.versions();
        assert_eq!(bench.put(put).await, Applied::Stored);
        bench.delete();
        // The tombstone of a daemon with a fast clock, at the highest version that the store accepts.
        bench.sql(
            "update threadkeep_tombstones set version = version + (1000::bigint << 21)
                   where thread_id = 'KEY'",
        );
        let Loaded::Absent(deleted) = bench.load().await else { panic!("the conversation is not deleted") };
        bench.sql(create);
        let Loaded::Found(found) = bench.load().await else {
            panic!("the conversation is not inserted again")
        };
        assert!(found.version > deleted);
        let first = "select base_version = version and last_writer = 0 from conversation_threads where thread_id = 'KEY'";
        assert_eq!(bench.sql(first), "t");
        bench.delete();
        let Loaded::Absent(again) = bench.load().await else {
            panic!("the conversation is not deleted again")
        };
        assert!(again > found.version);
        bench.sql("delete from threadkeep_tombstones where thread_id = 'KEY'");
    }
}

async fn change_of_thread_id_is_a_delete_and_an_insert(server: Server) {
    let bench = Bench::new(server, "before").await;
    let [put, late] = bench.versions();
    assert_eq!(bench.put(put).await, Applied::Stored);
    let after = Key::new(format!("{} after", bench.key.as_str())).unwrap();
    bench.sql("update conversation_threads set thread_id = 'KEY after' where thread_id = 'KEY'");
    let Loaded::Absent(deleted) = bench.load().await else { panic!("the old thread id still has a record") };
    assert_eq!(bench.put(late).await, Applied::Superseded(deleted));
    let loaded = bench.store.load(&[LoadRequest::from(after)]).await.unwrap().remove(0);
    assert!(matches!(loaded, Loaded::Found(found) if found.version > put));
    // The id changes back, over the tombstone.
    bench.sql("update conversation_threads set thread_id = 'KEY' where thread_id = 'KEY after'");
    assert!(matches!(bench.load().await, Loaded::Found(found) if found.version > deleted));
}

/// An operator restored the row without the triggers.
async fn delete_repairs_a_row_with_an_absurd_version(server: Server) {
    let bench = Bench::new(server, "absurd").await;
    for (expiry, end) in [("infinity", "live"), ("-infinity", "expired")] {
        bench.sql(&format!(
            "set session_replication_role = replica;
             insert into conversation_threads (thread_id, conversation_data, expires_at, version)
             values ('KEY', '1', '{expiry}', 9223372036854775807)"
        ));
        bench.delete();
        // Two days pass.
        bench.sql("update threadkeep_tombstones set version = version - ((2 * 86400000::bigint) << 21) where thread_id = 'KEY'");
        let [put] = bench.versions();
        assert_eq!(bench.put(put).await, Applied::Stored, "{end}");
        bench.delete();
        bench.sql("delete from threadkeep_tombstones where thread_id = 'KEY'");
    }
}

async fn update_after_plain_delete_starts_from_absence(server: Server) {
    let (stack, gateway, cache) = shared(server).await;
    let other = daemon(&gateway).await;
    let key = key("updated");
    cache.put(&key, &[1]).await.unwrap();
    stack.psql(&format!("delete from conversation_threads where thread_id = '{key}'"));
    gateway.forget();
    for turn in [2, 3] {
        let append = |turns: Option<Vec<i32>>| Ok(Some([turns.unwrap_or_default(), vec![turn]].concat()));
        assert_eq!(other.update(&key, append).await.unwrap(), WriteOutcome::Stored);
    }
    assert_eq!(gateway.count("threadkeep_apply"), 2, "each update must succeed at its first attempt");
    assert_eq!(get(&cache, &key).await.unwrap().json().replace(' ', ""), "[2,3]");
}

/// A put is queued, another daemon removes the conversation, the plan's `get` deletes the row, and replay sends the put.
async fn replayed_put_does_not_undo_an_earlier_delete(server: Server) {
    let (stack, _gateway, other) = shared(server).await;
    let cut_off = stack.gateway().await;
    let cache = builder(&cut_off).open().await.unwrap();
    let key = key("cleaned up");
    other.put(&key, &json!("before")).await.unwrap();
    cut_off.rule(|_| Fault::html(503));
    assert_eq!(cache.put(&key, &json!("queued")).await.unwrap(), WriteOutcome::Queued);
    assert_eq!(other.remove(&key).await.unwrap(), WriteOutcome::Stored);
    stack
        .psql(&format!("delete from conversation_threads where thread_id = '{key}' and expires_at <= now()"));
    assert_eq!(row(stack, &key, "1"), "");
    cut_off.clear();
    eventually("the replay", async || cache.health().queue.unwrap().records == 0).await;
    assert_eq!(cache.health().queue.unwrap().dead_letters, 1);
    assert!(get(&cache, &key).await.is_none() && get(&other, &key).await.is_none());
    assert_eq!(row(stack, &key, "1"), "", "replay must not restore the row");
}

/// TRUNCATE and purge affect all conversations, so each test uses a private stack.
#[tokio::test(flavor = "multi_thread")]
async fn truncate_leaves_tombstones_until_a_purge() {
    let stack = tokio::task::spawn_blocking(|| Stack::start(Server::Postrust)).await.unwrap();
    let gateway = stack.gateway().await;
    let store = Supabase::new(&gateway.url(), &gateway.keys().secret).unwrap();
    store.probe().await.unwrap();
    let key = Key::new("truncated").unwrap();
    let put = |version| Record {
        key: key.clone(),
        version,
        value: Some(Json::of(&1).unwrap()),
        expires_at: store.clock().now().plus(Duration::from_secs(3600)),
        user: None,
        metadata: Json::default(),
    };
    let (first, late) = (store.clock().issue_version(), store.clock().issue_version());
    assert_eq!(store.apply(&[put(first).into()]).await.unwrap(), [Applied::Stored]);
    tokio::task::block_in_place(|| stack.psql("truncate conversation_threads"));
    let answers = store.apply(&[put(late).into()]).await.unwrap();
    assert!(matches!(answers[..], [Applied::Superseded(deleted)] if deleted > late), "{answers:?}");

    let count = "select count(*) from threadkeep_tombstones";
    let age = |days: u32| {
        let sql = format!(
            "update threadkeep_tombstones set removed_at = now() - interval '{days} days 1 hour',
             version = (extract(epoch from now() - interval '{days} days 1 hour') * 1000)::bigint << 21"
        );
        tokio::task::block_in_place(|| stack.psql(&sql));
    };
    for (days, left) in [(7, "1"), (8, "0")] {
        age(days);
        store.purge(100).await.unwrap();
        assert_eq!(tokio::task::block_in_place(|| stack.psql(count)).trim(), left, "after {days} days");
    }
    // A purged row leaves no tombstone.
    tokio::task::block_in_place(|| {
        stack.psql(
            "insert into conversation_threads (thread_id, conversation_data, version, expires_at)
             values ('old', '1', (extract(epoch from now() - interval '9 days') * 1000)::bigint << 21, now() - interval '9 days')",
        )
    });
    assert_eq!(store.purge(100).await.unwrap(), 1);
    assert_eq!(tokio::task::block_in_place(|| stack.psql(count)).trim(), "0");
}

/// A role that may delete rows needs no right on the tombstones, and gets none.
#[tokio::test(flavor = "multi_thread")]
async fn delete_by_role_with_table_rights_leaves_a_tombstone() {
    let stack = tokio::task::spawn_blocking(|| Stack::start(Server::Postrust)).await.unwrap();
    let answer = tokio::task::block_in_place(|| {
        stack.psql(
            "create role janitor bypassrls; grant usage on schema public to janitor;
             grant select, insert, update, delete, truncate on conversation_threads to janitor",
        );
        stack.psql(
            "set role janitor;
             insert into conversation_threads (thread_id, conversation_data, expires_at) values ('t', '1', now() + interval '1h');
             delete from conversation_threads;
             insert into conversation_threads (thread_id, conversation_data, expires_at) values ('t', '2', now() + interval '1h');
             update conversation_threads set thread_id = 'u';
             truncate conversation_threads;
             reset role;
             select string_agg(thread_id, ',' order by thread_id) from threadkeep_tombstones;
             select has_table_privilege('janitor', 'threadkeep_tombstones', 'select, insert, update, delete')",
        )
    });
    assert_eq!(answer.trim(), "t,u\nf");
}
