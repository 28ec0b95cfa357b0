//! The optional migration that splits the table into hash partitions, and back.

use serde_json::json;

use crate::advisors::advice;
use crate::agreement::call;
use crate::changes::{Feed, insert};
use crate::database::Database;
use crate::{FIRST_BUILDING, PLANNED};

/// Fills all tables, and adds objects of other owners that the file must keep.
const FILLED: &str = "
    insert into conversation_threads (thread_id, user_id, conversation_data, expires_at, metadata)
    select 't' || at, 'u' || at % 9, jsonb_build_array(at), now() + interval '1h' * (at - 100), jsonb_build_object('at', at)
    from generate_series(1, 500) as at;
    insert into conversation_threads (thread_id, conversation_data, expires_at) values ('long', to_jsonb(repeat(md5('1'), 9000)), now() + interval '1h');
    delete from conversation_threads where thread_id in ('t250', 't251');
    select threadkeep_apply(jsonb_build_array(jsonb_build_object('key', 't300', 'version', (threadkeep_now() << 21)::text, 'writer', '16777217',
        'expires_at', 4000000000000, 'value', '[1]'::jsonb, 'append', '{\"at\": [], \"max_bytes\": 100}'::jsonb)));
    alter table conversation_threads add column title text default 'none' check (title <> ''), add column size int generated always as (length(thread_id)) stored;
    alter table conversation_threads set (autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_scale_factor = 0.01);
    comment on column conversation_threads.title is 'Of another program';
    create index by_value on conversation_threads using gin (metadata);
    create index live on conversation_threads (lower(user_id)) where title is not null;
    create role reader_of_threads nologin;
    grant select, update (title) on conversation_threads to reader_of_threads;
    create policy readers on conversation_threads as permissive for select to reader_of_threads using (title <> 'secret');
    create function title() returns trigger language plpgsql as $$ begin new.title := coalesce(new.title, 'some'); return new; end $$;
    create trigger title before insert on conversation_threads for each row execute function title();
    create trigger off before delete on conversation_threads for each row execute function title();
    alter table conversation_threads disable trigger off";

const ROWS: &str = "select t.id, t.thread_id, t.user_id, md5(t.conversation_data::text), t.created_at, t.accessed_at, t.expires_at, t.metadata, t.version,
                           t.changed_xid, t.base_version, t.last_writer, t.run_began, t.title, t.size
                    from conversation_threads as t order by t.thread_id;
                    select * from threadkeep_tombstones order by thread_id; select * from threadkeep_writers";

#[test]
fn partitions_keep_rows_and_objects_in_both_directions() {
    let database = Database::plain();
    database.sql(FILLED);
    let (rows, schema) = (database.sql(ROWS), database.schema());
    for count in [16, 3, 0, 256, 0] {
        database.partition(count).unwrap();
        assert_eq!(database.sql(ROWS), rows, "{count}");
        let parts = "select count(*), count(distinct (reloptions::text, relowner)), min(reloptions::text) from pg_class where relispartition and relkind = 'r'";
        let options = "{fillfactor=85,autovacuum_vacuum_scale_factor=0.02}";
        let expected = if count == 0 { "0|0|".to_owned() } else { format!("{count}|1|{options}") };
        assert_eq!(database.sql(parts), expected);
        // The files of the plain table and this file change nothing the second time.
        let (before, oid) = (database.schema(), "select 'conversation_threads'::regclass::oid");
        let table = database.sql(oid);
        database.apply("migrations").unwrap();
        database.partition(count).unwrap();
        assert_eq!((database.sql(oid), database.schema() == before), (table, true), "{count}");
        if count == 0 {
            let lines: Vec<_> =
                before.lines().zip(schema.lines()).filter(|(one, other)| one != other).collect();
            assert!(before == schema, "{lines:#?}");
        }
    }
    database.sql("drop owned by reader_of_threads; drop role reader_of_threads");
}

/// A daemon's session compiled the functions before. Its feed begins again, because the table is another one.
#[tokio::test(flavor = "multi_thread")]
async fn open_session_goes_on_over_partitions() {
    let database = Database::plain();
    let client = database.connect().await;
    let mut feed = Feed::begin(&database).await;
    for count in [0, 16, 0] {
        database.sql(&insert("a"));
        tokio::task::block_in_place(|| database.partition(count)).unwrap();
        let is_first = database.sql("select count(*) from conversation_threads") == "1";
        assert_eq!(feed.page().await.state, if is_first { "unbroken" } else { "restored" });
        for round in 0..8 {
            let present: i64 = database.sql("select threadkeep_now() << 21").parse().unwrap();
            let write = |key: &str, later: i64| json!({"key": key, "version": (present + later).to_string(), "writer": "16777217", "value": [round], "expires_at": 4_000_000_000_000_i64});
            let mut append = write("b", 2);
            append["append"] = json!({"at": [], "max_bytes": 1000});
            for writes in [json!([write("b", 0), write("c", 0)]), json!([append])] {
                let said = call(&client, "threadkeep_apply", &writes).await;
                assert!(
                    said["rows"].as_array().unwrap().iter().all(|row| row["state"] == "stored"),
                    "{said}"
                );
            }
            let list = call(&client, "threadkeep_list", &json!({"limit": 10})).await;
            assert_eq!(list["rows"].as_array().unwrap().len(), 3);
            let load = call(&client, "threadkeep_load", &json!([{"key": "b"}, {"key": "d"}])).await;
            let states = json!([load["rows"][0]["value"], load["rows"][1]["state"]]);
            assert_eq!(states, json!([[round, round], "absent"]));
            let touch = call(&client, "threadkeep_touch", &json!(["a", "b", "d"])).await;
            assert_eq!(touch["count"], 2);
            assert_eq!(feed.names().await, ["b", "c"]);
        }
    }
}

/// Obstacles, each with the fault that the file names, and with its remedy.
const OBSTACLES: &[(&str, &str, &str)] = &[
    (
        "create table notes (about uuid constraint about_id references conversation_threads)",
        "constraint about_id of notes refers to rows",
        "alter table notes drop constraint about_id",
    ),
    (
        "alter table conversation_threads add column nr int generated always as identity",
        "column nr is an identity",
        "alter table public.conversation_threads alter column nr drop identity",
    ),
    (
        "alter table conversation_threads add column nr serial",
        "conversation_threads_nr_seq belongs to the table",
        "alter sequence conversation_threads_nr_seq owned by none",
    ),
    (
        "create publication news for table conversation_threads",
        "publication news has the table",
        "alter publication news drop table public.conversation_threads",
    ),
    (
        "create unique index by_content on conversation_threads (md5(conversation_data::text))",
        "unique index by_content has no thread_id",
        "drop index by_content",
    ),
    (
        "create view shown as select thread_id from conversation_threads",
        "view shown depends on the table",
        "drop view shown",
    ),
    (
        "create function name_of(conversation_threads) returns text language sql as 'select $1.thread_id'",
        "function name_of(conversation_threads) depends on the table",
        "drop function name_of",
    ),
    (
        "create table others (); create policy of_threads on others using (exists (select from conversation_threads))",
        "policy of_threads on table others depends on table conversation_threads",
        "drop table others",
    ),
    (
        "create function threads() returns bigint begin atomic select count(*) from conversation_threads; end",
        "function threads() depends on table conversation_threads",
        "drop function threads",
    ),
    (
        "create table heir () inherits (conversation_threads)",
        "table heir depends on table conversation_threads",
        "drop table heir",
    ),
];

#[test]
fn obstacle_is_named_and_partitions_follow_its_remedy() {
    let database = Database::plain();
    database.sql(&insert("a"));
    for (obstacle, expected, remedy) in OBSTACLES {
        database.partition(0).unwrap();
        database.try_sql(obstacle).unwrap();
        let before = database.schema();
        let said = database.partition(4).unwrap_err();
        assert!(said.contains(expected) && said.contains("changed nothing"), "{said}");
        assert!(!remedy.starts_with("alter") || said.contains(remedy), "{said}");
        assert!(!said.contains("threadkeep_before") && !said.contains("CASCADE"), "{said}");
        assert!(database.schema() == before);
        database.try_sql(remedy).unwrap();
        database.partition(4).unwrap();
        assert_eq!(database.sql("select count(*) from conversation_threads"), "1");
        database.sql("alter table conversation_threads drop column if exists nr");
    }
    for setting in ["1", "257", "-2", "abc", "99999999999", "1.5"] {
        let said = database.partition(setting).unwrap_err();
        let expected =
            format!("threadkeep.partitions is {setting}; set it to 0, or to a number from 2 to 256");
        assert!(said.contains(&expected), "{said}");
    }
}

#[test]
fn partitions_without_the_migrations_name_them() {
    let (empty, planned, old) = (Database::new(), Database::new(), Database::new());
    planned.try_sql(PLANNED).unwrap();
    old.apply(FIRST_BUILDING).unwrap();
    for database in [empty, planned, old] {
        let said = database.partition(16).unwrap_err();
        assert!(said.contains("and 20261126000000_threadkeep.sql first"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_beside_long_reader_fail_with_a_remedy() {
    let database = Database::plain();
    let reader = database.connect().await;
    reader.batch_execute("begin; select count(*) from conversation_threads").await.unwrap();
    let said = tokio::task::block_in_place(|| database.partition(16)).unwrap_err();
    assert!(
        said.contains("in use by a long transaction") && said.contains("apply this file again"),
        "{said}"
    );
    reader.batch_execute("commit").await.unwrap();
    tokio::task::block_in_place(|| database.partition(16)).unwrap();
}

/// Old projects grant each new table to the public keys.
#[test]
fn partitions_are_closed_to_the_public_keys() {
    let database = Database::plain();
    database.try_sql("alter default privileges in schema public grant all on tables to anon, authenticated, service_role").unwrap();
    database.partition(16).unwrap();
    assert_eq!(advice(&database), [""; 0]);
    let open = "select count(*) from pg_class where relispartition and relkind = 'r' and has_table_privilege('service_role', oid, 'select')";
    assert_eq!(database.sql(open), "0");
    database.sql(&format!("set role service_role; {}", insert("a")));
    database.sql("truncate conversation_threads");
    assert_eq!(database.sql("select thread_id from threadkeep_tombstones"), "a");
}
