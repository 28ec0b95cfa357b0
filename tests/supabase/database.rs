//! Tests the migrations: rows of other writers, the rights of each role, and repeated application.

use std::time::Duration;

use serde_json::{Value, json};
use threadkeep::WriteOutcome;
use threadkeep::store::{Store as _, Supabase};

use crate::stack::{Server, Stack, test_partitions};
use crate::{AMPLE, SECOND, builder, eventually, get, key, rejecting, row, shared};

on_each_server!(
    rows_of_plain_sql_get_versions,
    reads_update_accessed_at_in_the_database,
    purge_deletes_long_expired_rows
);

async fn rows_of_plain_sql_get_versions(server: Server) {
    let (stack, _gateway, cache) = shared(server).await;
    let key = key("plain");
    let upsert = |value: &str| {
        stack.psql(&format!(
            "insert into conversation_threads (thread_id, conversation_data, expires_at)
             values ('{key}', '{value}', now() + interval '1 hour')
             on conflict (thread_id) do update set conversation_data = excluded.conversation_data"
        ))
    };
    upsert("1");
    let first = get(&cache, &key).await.unwrap();
    assert_eq!(first.json(), "1");
    upsert("2");
    let second = get(&cache, &key).await.unwrap();
    assert_eq!(second.json(), "2");
    assert!(second.version() > first.version());
    assert_eq!(cache.put(&key, &3).await.unwrap(), WriteOutcome::Stored);
    stack.psql(&format!("update conversation_threads set expires_at = now() where thread_id = '{key}'"));
    assert!(get(&cache, &key).await.is_none(), "an expiry in the past must hide the row");

    // The trigger clamps an absurd version. Otherwise, no writer could write this conversation again.
    let absurd = "update conversation_threads set version = 9223372036854775807, expires_at = now() + interval '1 hour'";
    stack.psql(&format!("{absurd} where thread_id = '{key}'"));
    tokio::time::sleep(2 * SECOND + SECOND / 10).await;
    assert_eq!(get(&cache, &key).await.unwrap().json(), "3");
    assert_eq!(cache.put(&key, &4).await.unwrap(), WriteOutcome::Stored);
    assert_eq!(get(&cache, &key).await.unwrap().json(), "4");
}

async fn reads_update_accessed_at_in_the_database(server: Server) {
    let (stack, gateway, _) = shared(server).await;
    let cache =
        builder(&gateway).fresh_for(60 * SECOND).maintenance_interval(SECOND / 5).open().await.unwrap();
    let key = key("accessed");
    cache.put(&key, "1").await.unwrap();
    stack.psql(&format!(
        "update conversation_threads set accessed_at = now() - interval '1 day' where thread_id = '{key}'"
    ));
    let unchanged =
        "version, changed_xid, expires_at, conversation_data, base_version, last_writer, run_began";
    let before = row(stack, &key, unchanged);
    assert!(get(&cache, &key).await.is_some());
    eventually("accessed_at is updated", async || {
        row(stack, &key, "accessed_at > now() - interval '1 minute'") == "t"
    })
    .await;
    assert_eq!(row(stack, &key, unchanged), before, "a touch must keep the version and the change mark");
}

async fn purge_deletes_long_expired_rows(server: Server) {
    let (stack, gateway, _) = shared(server).await;
    let store = Supabase::new(&gateway.url(), &gateway.keys().secret).unwrap();
    let long_ago = "((extract(epoch from now() - interval '9 days') * 1000)::bigint << 21)";
    let insert = |name: &str, version: &str, expiry: &str| {
        let key = key(name);
        stack.psql(&format!(
            "insert into conversation_threads (thread_id, conversation_data, version, expires_at)
             values ('{key}', '1', {version}, now() - interval '{expiry}')"
        ));
        key
    };
    let old = insert("old", long_ago, "8 days 1 hour");
    let (young_version, young_expiry) =
        (insert("young version", "0", "9 days"), insert("young expiry", long_ago, "7 days"));
    while store.purge(100).await.unwrap() == 100 {}
    let is_there = |key: &str| row(stack, key, "1") == "1";
    assert_eq!([is_there(&old), is_there(&young_version), is_there(&young_expiry)], [false, true, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_applied_twice_change_nothing() {
    let stack = tokio::task::spawn_blocking(|| Stack::start(Server::Postrust)).await.unwrap();
    let gateway = stack.gateway().await;
    let cache = builder(&gateway).open().await.unwrap();
    cache.put("t", &json!({"a": 1})).await.unwrap();
    let everything = "select * from conversation_threads";
    let schema = "select string_agg(pg_get_functiondef(oid), '' order by proname) from pg_proc where proname like 'threadkeep%'";
    let indexes = "select indexdef from pg_indexes where tablename = 'conversation_threads' order by 1";
    let before = [everything, schema, indexes].map(|sql| stack.psql(sql));
    tokio::task::block_in_place(|| stack.apply_migrations());
    assert_eq!([everything, schema, indexes].map(|sql| stack.psql(sql)), before);
    assert!(
        !before[2].contains("(thread_id)\n") || before[2].matches("(thread_id)").count() == 1,
        "{}",
        before[2]
    );
    assert_eq!(get(&cache, "t").await.unwrap().decode::<Value>().unwrap(), json!({"a": 1}));
}

/// The planned table has rows before the first migration adds versions.
#[tokio::test(flavor = "multi_thread")]
async fn migration_keeps_existing_rows_readable_and_writable() {
    let stack =
        tokio::task::spawn_blocking(|| Stack::start_without_migrations(Server::Postrust)).await.unwrap();
    let planned = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations")).unwrap().flatten();
    let planned = planned.map(|entry| entry.path()).min().unwrap();
    stack.psql(&format!("set role postgres; {}", std::fs::read_to_string(planned).unwrap()));
    stack.psql(
        "insert into conversation_threads (thread_id, conversation_data, expires_at)
         values ('old', '{\"a\": 1}', now() + interval '1 hour')",
    );
    tokio::task::block_in_place(|| stack.apply_migrations());
    let gateway = stack.gateway().await;
    let cache = builder(&gateway).open().await;
    let cache = match cache {
        Ok(cache) => cache,
        // The server may not have seen the new functions yet.
        Err(_) => {
            tokio::task::block_in_place(|| {
                stack.kill_server();
                stack.start_server();
            });
            builder(&gateway).open().await.unwrap()
        }
    };
    assert_eq!(get(&cache, "old").await.unwrap().decode::<Value>().unwrap(), json!({"a": 1}));
    assert_eq!(cache.put("old", "new").await.unwrap(), WriteOutcome::Stored);
    assert_eq!(get(&cache, "old").await.unwrap().json(), "\"new\"");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_service_role_may_use_table_and_functions() {
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    // The triggers alone run threadkeep_keep_tombstone and threadkeep_keep_tombstones. No role may call them.
    let granted = |role: &str| {
        stack.psql(&format!(
            "select count(*) filter (where has_function_privilege('{role}', oid, 'execute')) || '/' || count(*)
             from pg_proc where proname like 'threadkeep%' and proname not like '%keep_tombstone%'"
        ))
    };
    let all = granted("service_role");
    let (some, total) = all.trim().split_once('/').unwrap();
    assert!(some == total && total.parse::<u32>().unwrap() >= 7, "{all}");
    for role in ["anon", "authenticated"] {
        assert_eq!(granted(role).trim(), format!("0/{total}"), "{role}");
        let table = "'conversation_threads', 'select, insert, update, delete'";
        assert_eq!(
            stack.psql(&format!("select has_table_privilege('{role}', {table})")).trim(),
            "f",
            "{role}"
        );
    }
    // Supabase's linter requires both settings.
    let unfixed =
        "select proname from pg_proc where proname like 'threadkeep%' and proname not like '%keep_tombstone%'
                   and (prosecdef or not coalesce(proconfig::text like '%search_path%', false))";
    assert_eq!(stack.psql(unfixed).trim(), "");
    assert_eq!(
        stack.psql("select relrowsecurity from pg_class where relname = 'conversation_threads'").trim(),
        "t"
    );
}

/// Rows written by hand are read as far as possible and do not affect other rows.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_rows_do_not_affect_other_rows() {
    let (stack, _gateway, cache) = shared(Server::Postrust).await;
    let (user, good, endless) = (key("user"), key("good"), key("endless"));
    cache.put(&good, "good").user(&user).await.unwrap();
    let insert = |id: &str, expiry: &str| {
        stack.psql(&format!(
            "insert into conversation_threads (thread_id, user_id, conversation_data, expires_at)
             values ({id}, '{user}', '1', '{expiry}')"
        ))
    };
    insert(&format!("'{endless}'"), "infinity");
    insert(&format!("repeat('x', 600) || '{user}'"), "2100-01-01");
    assert_eq!(get(&cache, &endless).await.unwrap().json(), "1");
    let listed = cache.list(&user).await.unwrap();
    let mut names: Vec<_> = listed.iter().map(|found| found.key().as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, {
        let mut both = [&*endless, &*good];
        both.sort_unstable();
        both
    });
}

/// A role with rights on the table needs no right to call the functions.
#[tokio::test(flavor = "multi_thread")]
async fn another_role_with_grants_can_write_plain_rows() {
    let stack = tokio::task::spawn_blocking(|| Stack::start(Server::Postrust)).await.unwrap();
    stack.psql(
        "create role reporter; grant usage on schema public to reporter; alter role reporter bypassrls;
                grant select, insert, update on conversation_threads to reporter",
    );
    let row = stack.psql("set role reporter;
        insert into conversation_threads (thread_id, conversation_data, expires_at) values ('t', '1', now() + interval '1h');
        update conversation_threads set conversation_data = '2';
        select conversation_data, version > 0, version = base_version from conversation_threads");
    assert_eq!(row.trim(), "2|t|t");
}

/// threadkeep never sends such a record. A manual call of the function must fail without a wait or a lock on the row.
#[tokio::test(flavor = "multi_thread")]
async fn record_without_a_version_is_rejected_at_once() {
    let (stack, _, _) = shared(Server::Postrust).await;
    let (sql, known) = (stack.sql().await, key("has a row"));
    let insert =
        "insert into conversation_threads (thread_id, conversation_data, expires_at) values ($1, '1', now())";
    sql.execute(insert, &[&known]).await.unwrap();
    sql.batch_execute("set statement_timeout = '5s'").await.unwrap();
    for key in [known, key("has none")] {
        for version in ["", r#""version": null, "#] {
            let records =
                format!(r#"[{{"key": "{key}", {version}"expires_at": 4000000000000, "value": 1}}]"#);
            let error = sql.query("select threadkeep_apply($1::text::jsonb)", &[&records]).await.unwrap_err();
            assert_eq!(error.code().map(|code| code.code()), Some("23502"), "{error:?}");
        }
    }
}

/// Beside many rows of other users, a user's listing uses an index and reads only the values of its page.
#[tokio::test(flavor = "multi_thread")]
async fn listing_and_warm_up_read_only_their_pages() {
    let stack = tokio::task::spawn_blocking(|| Stack::start(Server::Postrust)).await.unwrap();
    stack.psql("insert into conversation_threads (thread_id, user_id, conversation_data, expires_at)
                select 't' || n, 'u' || n % 500, to_jsonb(repeat(md5(n::text), 30)), now() + interval '1h' from generate_series(1, 20000) as n;
                analyze conversation_threads");
    // The first call in a session also reads the catalogue.
    let hits = |page: &str| -> u64 {
        let call = format!("select threadkeep_list('{page}')");
        let buffers =
            stack.psql(&format!("{call}; explain (analyze, buffers, costs off, timing off) {call}"));
        let hit = buffers.split("Buffers: shared hit=").nth(1).unwrap();
        hit.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    };
    let parts = "select (sum(pg_relation_size(oid)) / 8192)::bigint from pg_class where relkind = 'r' and relname like 'conversation_threads%'";
    let pages: u64 = stack.psql(parts).trim().parse().unwrap();
    // A page of a list begins in the index of each partition.
    let most = 200 + 10 * u64::from(test_partitions().unwrap_or_default());
    let of_user = hits(r#"{"user": "u7", "limit": 10}"#);
    assert!(of_user < most && pages > 2_000, "{of_user} of {pages} pages");
    let newest = stack.psql("select max(version) from conversation_threads").trim().to_owned();
    for page in
        [r#"{"limit": 10}"#, &format!(r#"{{"limit": 10, "after_version": "{newest}", "after_key": "t"}}"#)]
    {
        let of_all = hits(page);
        assert!(of_all < most, "{of_all} of {pages} pages for {page}");
    }
    // Uses the page size of the warm-up, because the plan for 10 rows says nothing about 500. PostgreSQL looks each
    // conversation up by its key.
    let of_all = hits(r#"{"limit": 500}"#);
    assert!(of_all < 2_300 + most && pages > 3_000, "{of_all} hits for 500 threads, of {pages} pages");
}

/// Conversations that are small in the database but large in a response arrive in several responses.
#[tokio::test(flavor = "multi_thread")]
async fn listing_of_large_conversations_is_paged() {
    let (_, gateway, _) = shared(Server::Postrust).await;
    let cache = builder(&gateway).timeout(AMPLE).soft_timeout(AMPLE).open().await.unwrap();
    let (user, large) = (key("large"), "x".repeat(3 << 20));
    for at in 0..14 {
        let put = cache.put(key(&at.to_string()), &large).user(&user);
        assert_eq!(put.await.unwrap(), WriteOutcome::Stored);
    }
    gateway.forget();
    assert_eq!(cache.list(&user).await.unwrap().len(), 14);
    assert_eq!(gateway.count("threadkeep_list"), 3, "six conversations fill a response of 16 MiB");
}

/// A locked row is no outage.
#[tokio::test(flavor = "multi_thread")]
async fn locked_row_delays_only_its_own_writers() {
    let (stack, gateway, _) = shared(Server::Postrust).await;
    let cache = rejecting(&gateway).timeout(5 * SECOND).open().await.unwrap();
    let (locked, other) = (key("locked"), key("other"));
    cache.put(&locked, &1).await.unwrap();
    let client = stack.sql().await;
    let lock = format!("begin; select 1 from conversation_threads where thread_id = '{locked}' for update");
    client.batch_execute(&lock).await.unwrap();
    for _ in 0..6 {
        let error = cache.put(&locked, &2).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.outcome_unknown()),
            (threadkeep::ErrorKind::Overloaded, false),
            "{error}"
        );
    }
    assert_eq!(cache.put(&other, &1).await.unwrap(), WriteOutcome::Stored);
    client.batch_execute("rollback").await.unwrap();
    assert_eq!(cache.put(&locked, &3).await.unwrap(), WriteOutcome::Stored);
}

/// Concurrent writes, touches and purges cause no deadlock. Each row ends with its newest write.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_writes_touches_and_purges_do_not_deadlock() {
    let (stack, gateway, _) = shared(Server::Postrust).await;
    let before = stack.psql("select deadlocks from pg_stat_database where datname = current_database()");
    let keys: Vec<threadkeep::Key> =
        (0..60).map(|at| threadkeep::Key::new(key(&at.to_string())).unwrap()).collect();
    let mut tasks = tokio::task::JoinSet::new();
    for seed in 0..8 {
        let store = Supabase::new(&gateway.url(), &gateway.keys().secret).unwrap();
        store.probe().await.unwrap();
        let mut keys = keys.clone();
        tasks.spawn(async move {
            let mut rng = fastrand::Rng::with_seed(seed);
            for round in 0..40 {
                rng.shuffle(&mut keys);
                match round % 4 {
                    0 => store.touch(&keys).await.unwrap(),
                    1 if seed == 0 => drop(store.purge(100).await.unwrap()),
                    _ => {
                        let record = |key: &threadkeep::Key| threadkeep::store::Record {
                            key: key.clone(),
                            version: store.clock().issue_version(),
                            value: Some(threadkeep::store::Json::of(&round).unwrap()),
                            expires_at: store.clock().now().plus(Duration::from_secs(60)),
                            user: None,
                            metadata: threadkeep::store::Json::default(),
                        };
                        let writes: Vec<_> = keys.iter().map(|key| record(key).into()).collect();
                        store.apply(&writes).await.unwrap();
                    }
                }
            }
        });
    }
    tasks.join_all().await;
    let after = stack.psql("select deadlocks from pg_stat_database where datname = current_database()");
    assert_eq!(after, before);
}

/// The warm-up of a second daemon loads the conversations of the first before any read.
#[tokio::test(flavor = "multi_thread")]
async fn warm_up_loads_the_newest_conversations() {
    let (_, gateway, cache) = shared(Server::Postrust).await;
    let keys: Vec<String> = (0..50).map(|at| key(&at.to_string())).collect();
    for key in &keys {
        assert_eq!(cache.put(key, "warm").await.unwrap(), WriteOutcome::Stored);
    }
    let next =
        builder(&gateway).timeout(AMPLE).warmup_limit(5_000).fresh_for(10 * AMPLE).open().await.unwrap();
    let warmup = next.warm().await.unwrap();
    assert!(warmup.conversations >= 50 && warmup.state == threadkeep::WarmupState::Done, "{warmup:?}");
    gateway.forget();
    for key in &keys {
        assert_eq!(next.get(key).await.unwrap().unwrap().json(), "\"warm\"");
    }
    assert_eq!(gateway.count("threadkeep_load"), 0);
}
