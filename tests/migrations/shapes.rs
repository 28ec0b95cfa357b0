//! Tables that are not as planned: the migrations say so in a sentence, change nothing, and take the table after the remedy.

use crate::database::Database;
use crate::{FIRST_BUILDING, PLANNED};

/// The plan's table with other lines.
fn planned_but(changes: &[(&str, &str)]) -> String {
    changes.iter().fold(PLANNED.to_owned(), |sql, (line, instead)| {
        assert!(sql.contains(line), "{line}");
        sql.replace(line, instead)
    })
}

/// The remedies that a sentence names, in parentheses.
fn remedies(said: &str) -> Vec<String> {
    let mut remedies = Vec::new();
    for (at, _) in said.match_indices("(alter table") {
        let mut depth = 0;
        let end = said[at..].find(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            depth == 0
        });
        remedies.push(said[at + 1..at + end.unwrap()].to_owned());
    }
    remedies
}

#[test]
fn a_table_that_is_not_as_planned_is_refused_and_taken_after_the_remedy() {
    let row = "('before', 'somebody', '[1]', now() + interval '1 hour')";
    let uuid = "('before', gen_random_uuid(), '[1]', now() + interval '1 hour')";
    let cases: &[(&[(&str, &str)], &str)] = &[
        (
            &[("user_id text", "user_id uuid"), (row, uuid)],
            "column user_id has the type uuid instead of text",
        ),
        (
            &[("user_id text", "user_id varchar(40)")],
            "column user_id has the type character varying(40) instead of text",
        ),
        (
            &[("thread_id text", "thread_id uuid"), ("'before'", "gen_random_uuid()")],
            "column thread_id has the type uuid instead of text",
        ),
        (
            &[("thread_id text", "thread_id varchar")],
            "column thread_id has the type character varying instead of text",
        ),
        (&[("not null unique", "not null")], "column thread_id is not unique"),
        (&[("not null unique", "not null unique deferrable")], "column thread_id is not unique"),
        (&[("not null unique", "unique")], "column thread_id may be null"),
        (
            &[("conversation_data jsonb", "conversation_data json")],
            "column conversation_data has the type json instead of jsonb",
        ),
        (
            &[("conversation_data jsonb", "conversation_data text")],
            "column conversation_data has the type text instead of jsonb",
        ),
        (
            &[("conversation_data jsonb not null", "conversation_data jsonb")],
            "column conversation_data may be null",
        ),
        (
            &[("expires_at timestamptz", "expires_at timestamp")],
            "column expires_at has the type timestamp without time zone instead of timestamp with time zone",
        ),
        (
            &[("expires_at timestamptz", "expires_at bigint"), ("now() + interval '1 hour'", "2000000000")],
            "column expires_at has the type bigint instead of timestamp with time zone",
        ),
        (&[("expires_at timestamptz not null", "expires_at timestamptz")], "column expires_at may be null"),
        (
            &[("accessed_at timestamptz", "accessed_at timestamp(0)")],
            "column accessed_at has the type timestamp(0) without",
        ),
        (
            &[("metadata jsonb default '{}'", "metadata json default '{}'")],
            "column metadata has the type json instead of jsonb",
        ),
        (&[(",\n        metadata jsonb default '{}'", "")], "column metadata is missing"),
        (&[("        accessed_at timestamptz default now(),\n", "")], "column accessed_at is missing"),
        (
            &[("id uuid primary key default gen_random_uuid()", "id bigserial primary key")],
            "column id has the type bigint instead of uuid",
        ),
        (
            &[(
                "id uuid primary key default gen_random_uuid()",
                "id bigint primary key generated always as identity",
            )],
            "column id has the type bigint instead of uuid",
        ),
        (
            &[("primary key default gen_random_uuid()", "default gen_random_uuid()")],
            "column id is not unique",
        ),
        (
            &[
                ("id uuid primary key default gen_random_uuid()", "id uuid primary key"),
                ("(thread_id, user_id", "(id, thread_id, user_id"),
                ("('before'", "(gen_random_uuid(), 'before'"),
            ],
            "column id has no default",
        ),
        (
            &[
                ("metadata jsonb", "title text not null, metadata jsonb"),
                ("(thread_id, user_id", "(title, thread_id, user_id"),
                ("('before'", "('title', 'before'"),
            ],
            "does not fill the column title",
        ),
        (
            &[("metadata jsonb", "version integer default 1, metadata jsonb")],
            "column version has the type integer instead of bigint",
        ),
        (
            &[
                ("user_id text", "user_id uuid"),
                (row, uuid),
                ("metadata jsonb default '{}'", "metadata json"),
            ],
            "column user_id has the type uuid instead of text (alter table",
        ),
    ];
    for (changes, expected) in cases {
        let database = Database::new();
        database.try_sql(&planned_but(changes)).unwrap_or_else(|said| panic!("{expected}: {said}"));
        let before = (database.schema(), database.sql("select * from conversation_threads"));
        let said = database.apply("migrations").unwrap_err();
        assert!(said.contains(expected) && said.contains("changed nothing"), "{said}");
        assert_eq!(
            (database.schema(), database.sql("select * from conversation_threads")),
            before,
            "{expected}"
        );
        let remedies = remedies(&said);
        assert!(!remedies.is_empty(), "{said}");
        for remedy in remedies {
            database.try_sql(&remedy).unwrap_or_else(|said| panic!("{remedy}: {said}"));
        }
        database.apply("migrations").unwrap_or_else(|said| panic!("{expected}: {said}"));
        let value = "select jsonb_array_length(conversation_data), version > 0 from conversation_threads";
        assert_eq!(database.sql(value), "1|t", "{expected}");
    }
}

/// What others add to the table may refuse a tombstone: that shows before the daemon's first remove.
#[test]
fn constraints_and_triggers_of_others_that_refuse_a_tombstone_are_named() {
    for (addition, expected) in [
        ("alter table conversation_threads add constraint an_array check (jsonb_typeof(conversation_data) = 'array')", "an_array"),
        (
            "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'not you'; end $$;
             create trigger refuse before insert on conversation_threads for each row execute function refuse()",
            "not you",
        ),
    ] {
        let database = Database::new();
        database.try_sql(PLANNED).unwrap();
        database.try_sql(addition).unwrap();
        let before = database.schema();
        let said = database.apply("migrations").unwrap_err();
        assert!(said.contains(expected) && said.contains("a tombstone cannot be written"), "{said}");
        assert!(database.schema() == before);
        assert_eq!(database.sql("select count(*) from conversation_threads"), "1");
    }
}

#[test]
fn what_is_no_table_is_named() {
    for (sql, kind) in [
        ("create view conversation_threads as select 1 as id", "view"),
        ("create materialized view conversation_threads as select 1 as id", "materialized view"),
        ("create table conversation_threads (id uuid) partition by hash (id)", "partitioned table"),
        ("create sequence conversation_threads", "relation of kind S"),
    ] {
        let database = Database::new();
        database.try_sql(sql).unwrap();
        let said = database.apply("migrations").unwrap_err();
        assert!(
            said.contains(&format!("public.conversation_threads is a {kind}, and a plain table is needed")),
            "{said}"
        );
    }
}

#[test]
fn the_last_file_alone_names_the_first() {
    let database = Database::new();
    let last = crate::stack::migrations("migrations").pop().unwrap();
    let said = database.try_sql(&std::fs::read_to_string(last).unwrap()).unwrap_err();
    assert!(said.contains("apply 20260101000000_conversation_threads.sql first"), "{said}");
}

/// Only indexes that another one makes redundant go, whatever they are called.
#[test]
fn redundant_indexes_go_and_those_of_others_stay() {
    let database = Database::new();
    database.try_sql(PLANNED).unwrap();
    let others = [
        "create index by_value on conversation_threads using gin (conversation_data)",
        "create index by_user_and_time on conversation_threads (user_id, created_at)",
        "create index live on conversation_threads (expires_at) where user_id is null",
        "create index lower_user on conversation_threads (lower(user_id))",
        "create index expires_last on conversation_threads (expires_at desc)",
    ];
    let redundant = [
        "create index on conversation_threads (thread_id)",
        "create unique index by_thread on conversation_threads (thread_id)",
        "create index by_expiry on conversation_threads (expires_at)",
        "create index by_user on conversation_threads (user_id)",
    ];
    for sql in others.iter().chain(&redundant) {
        database.try_sql(sql).unwrap();
    }
    assert_eq!(database.indexes().len(), 14);
    database.apply("migrations").unwrap();
    assert_eq!(
        database.indexes(),
        [
            "by_user_and_time",
            "by_value",
            "conversation_threads_newest",
            "conversation_threads_newest_of_user",
            "conversation_threads_pkey",
            "conversation_threads_thread_id_key",
            "expires_last",
            "idx_conversation_threads_expires_at",
            "live",
            "lower_user",
        ]
    );
}

/// A unique index may stand in for the constraint, and an index of another name for the plan's.
#[test]
fn the_last_index_that_serves_a_column_stays() {
    let database = Database::new();
    let sql = planned_but(&[
        ("text not null unique", "text not null"),
        ("create index idx_conversation_threads_thread_id", "create unique index my_ids"),
        ("idx_conversation_threads_expires_at", "my_expiries"),
    ]);
    database.try_sql(&sql).unwrap();
    database.apply("migrations").unwrap();
    let expected = [
        "conversation_threads_newest",
        "conversation_threads_newest_of_user",
        "conversation_threads_pkey",
        "my_expiries",
        "my_ids",
    ];
    assert_eq!(database.indexes(), expected);
}

/// An operator may have begun to build an index beforehand, and not finished.
#[test]
fn an_index_that_was_made_beforehand_is_taken_and_a_half_made_one_made_anew() {
    let database = Database::migrated();
    let oid = "select 'conversation_threads_newest'::regclass::oid";
    let before = database.sql(oid);
    database.apply("migrations").unwrap();
    assert_eq!(database.sql(oid), before);
    database.sql(
        "update pg_index set indisvalid = false where indexrelid = 'conversation_threads_newest'::regclass",
    );
    database.apply("migrations").unwrap();
    assert_ne!(database.sql(oid), before);
    let valid = "select bool_and(indisvalid) from pg_index where indrelid = 'conversation_threads'::regclass";
    assert_eq!(database.sql(valid), "t");
}

/// Plain PostgreSQL has none of Supabase's roles. Roles are the cluster's, so the files are made to look for others.
#[test]
fn a_database_without_the_roles_of_supabase_is_taken() {
    let database = Database::new();
    for file in crate::stack::migrations("migrations") {
        let sql = std::fs::read_to_string(file).unwrap();
        let sql = ["anon", "authenticated", "service_role"]
            .iter()
            .fold(sql, |sql, role| sql.replace(&format!("'{role}'"), &format!("'no_{role}'")));
        database.try_sql(&sql).unwrap();
    }
    let policies =
        "select count(*) from pg_policies where tablename in ('conversation_threads', 'threadkeep_deleted')";
    assert_eq!(database.sql(policies), "0");
    assert_eq!(database.sql("select threadkeep_probe() ->> 'schema'"), "2");
}

/// Old versions stay as they are, and rows get what they lack.
#[test]
fn rows_of_the_first_building_keep_their_versions() {
    let database = Database::new();
    database.apply(FIRST_BUILDING).unwrap();
    database.sql(
        "select threadkeep_apply(jsonb_build_array(jsonb_build_object('key', 'k', 'version',
             ((extract(epoch from now()) * 1000)::bigint << 21)::text, 'expires', 4000000000000, 'value', 1)));
         insert into conversation_threads (thread_id, conversation_data, expires_at) values ('plain', '2', now() + interval '1h')",
    );
    let rows = "select * from conversation_threads order by thread_id";
    let before = database.sql(rows);
    database.apply("migrations").unwrap();
    assert_eq!(database.sql(rows), before);
    assert!(database.schema() == Database::migrated().schema());
}

/// Functions of every file answer with the same revision, the probe included.
#[test]
fn every_function_carries_the_revision() {
    let database = Database::migrated();
    let answers = database.sql(
        "select threadkeep_probe() ->> 'schema'; select threadkeep_load('[]') ->> 'schema'; select threadkeep_apply('[]') ->> 'schema';
         select threadkeep_recent('{\"most\": 0}') ->> 'schema'; select threadkeep_touch('[]') ->> 'schema';
         select threadkeep_purge(0) ->> 'schema'",
    );
    assert_eq!(answers, ["2"; 6].join("\n"));
    assert_eq!(database.sql("select attcompression from pg_attribute where attrelid = 'conversation_threads'::regclass and attname = 'conversation_data'"), "l");
}
