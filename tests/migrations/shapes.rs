//! Tests tables that differ from the plan. The migrations name the difference, change nothing, and succeed after the remedy.

use crate::database::Database;
use crate::{FIRST_BUILDING, PLANNED, REVISION_2};

/// Returns the plan's table with some lines replaced.
fn planned_but(changes: &[(&str, &str)]) -> String {
    changes.iter().fold(PLANNED.to_owned(), |sql, (line, instead)| {
        assert!(sql.contains(line), "{line}");
        sql.replace(line, instead)
    })
}

/// Extracts the remedies from an error message. Each is in parentheses.
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

/// The row in the plan's table.
const ROW: &str = "('before', 'somebody', '[1]', now() + interval '1 hour')";
/// The row for a table with a `uuid` as its user id.
const UUID_ROW: &str = "('before', gen_random_uuid(), '[1]', now() + interval '1 hour')";
/// Changes of the plan's table, each with the difference that the migration must name.
const UNPLANNED_TABLES: &[(&[(&str, &str)], &str)] = &[
    (
        &[("user_id text", "user_id uuid"), (ROW, UUID_ROW)],
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
    (&[("primary key default gen_random_uuid()", "default gen_random_uuid()")], "column id is not unique"),
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
            (ROW, UUID_ROW),
            ("metadata jsonb default '{}'", "metadata json"),
        ],
        "column user_id has the type uuid instead of text (alter table",
    ),
];

#[test]
fn unplanned_table_is_rejected_and_accepted_after_the_remedy() {
    for (changes, expected) in UNPLANNED_TABLES {
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

/// A foreign constraint may reject a tombstone. The migration reports that before the daemon's first remove.
#[test]
fn foreign_constraint_that_rejects_a_tombstone_is_named() {
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
fn relation_that_is_no_table_is_named() {
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
fn last_file_without_the_first_names_the_first() {
    let database = Database::new();
    let last = crate::stack::migrations("migrations").pop().unwrap();
    let said = database.try_sql(&std::fs::read_to_string(last).unwrap()).unwrap_err();
    assert!(said.contains("apply 20260101000000_conversation_threads.sql first"), "{said}");
}

/// The migration drops redundant indexes of any name, and no others.
#[test]
fn migration_drops_redundant_indexes_and_keeps_foreign_ones() {
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
            "conversation_threads_changed",
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

/// A unique index may replace the constraint. An index of another name may replace the plan's index.
#[test]
fn migration_keeps_the_last_index_that_serves_a_column() {
    let database = Database::new();
    let sql = planned_but(&[
        ("text not null unique", "text not null"),
        ("create index idx_conversation_threads_thread_id", "create unique index my_ids"),
        ("idx_conversation_threads_expires_at", "my_expiries"),
    ]);
    database.try_sql(&sql).unwrap();
    database.apply("migrations").unwrap();
    let expected = [
        "conversation_threads_changed",
        "conversation_threads_newest",
        "conversation_threads_newest_of_user",
        "conversation_threads_pkey",
        "my_expiries",
        "my_ids",
    ];
    assert_eq!(database.indexes(), expected);
}

/// An operator may have built an index in advance. An interrupted build leaves an invalid index.
#[test]
fn existing_index_is_kept_and_invalid_one_is_rebuilt() {
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

/// Plain PostgreSQL has no Supabase roles. All databases of the cluster share roles, so the test renames them in the files.
#[test]
fn database_without_supabase_roles_is_accepted() {
    let database = Database::new();
    for file in crate::stack::migrations("migrations") {
        let sql = std::fs::read_to_string(file).unwrap();
        let sql = ["anon", "authenticated", "service_role"]
            .iter()
            .fold(sql, |sql, role| sql.replace(&format!("'{role}'"), &format!("'no_{role}'")));
        database.try_sql(&sql).unwrap();
    }
    let policies = "select count(*) from pg_policies where tablename in ('conversation_threads', 'threadkeep_tombstones', 'threadkeep_writers')";
    assert_eq!(database.sql(policies), "0");
    assert_eq!(database.sql("select threadkeep_probe() ->> 'revision'"), "4");
}

/// The upgrade keeps old versions and fills missing columns.
#[test]
fn upgrade_from_first_building_keeps_versions_of_rows() {
    let database = Database::new();
    database.apply(FIRST_BUILDING).unwrap();
    database.sql(
        "select threadkeep_apply(jsonb_build_array(jsonb_build_object('key', 'k', 'version',
             ((extract(epoch from now()) * 1000)::bigint << 21)::text, 'expires', 4000000000000, 'value', 1)));
         insert into conversation_threads (thread_id, conversation_data, expires_at) values ('plain', '2', now() + interval '1h')",
    );
    assert_upgraded(&database);
}

/// Applies the migrations, and checks that rows and tombstones keep their content and their versions.
fn assert_upgraded(database: &Database) {
    let rows = "select id, thread_id, user_id, conversation_data, created_at, accessed_at, expires_at, metadata, version, changed_xid
                from conversation_threads order by thread_id";
    let before = database.sql(rows);
    for _ in 0..2 {
        database.apply("migrations").unwrap();
        assert_eq!(database.sql(rows), before);
        assert!(database.schema() == Database::plain().schema(), "{}", database.schema());
    }
}

/// Returns the JSON of a write at a version relative to the present one.
fn write(key: &str, age_ms: i64, more: &str) -> String {
    format!(
        "jsonb_build_array(jsonb_build_object('key', '{key}', 'version', ((floor(extract(epoch from now()) * 1000)::bigint - {age_ms}) << 21)::text,
             'expires_at', 4000000000000{more}))"
    )
}

/// The upgrade of a populated database drops the accepted versions and the triggers of revision 2.
#[test]
fn upgrade_from_revision_2_keeps_rows_and_versions() {
    let database = Database::new();
    let plan = crate::stack::migrations("migrations").remove(0);
    database.try_sql(&std::fs::read_to_string(plan).unwrap()).unwrap();
    database.apply(REVISION_2).unwrap();
    for (key, more) in
        [("put", ", 'value', 1"), ("updated", ", 'value', 1"), ("removed", ""), ("deleted", ", 'value', 1")]
    {
        database.sql(&format!("select threadkeep_apply({})", write(key, 9_000, more)));
    }
    database.sql(
        "insert into conversation_threads (thread_id, conversation_data, expires_at) values ('plain', '2', now() + interval '1h');
         delete from conversation_threads where thread_id = 'deleted'",
    );
    let tombstones = "select thread_id, version, removed_at from threadkeep_tombstones";
    let before = database.sql(tombstones);
    assert!(before.starts_with("deleted|"), "{before}");
    assert_upgraded(&database);
    assert_eq!(database.sql(tombstones), before);
    let schema = database.schema();
    assert!(
        !schema.contains("accepted_versions")
            && !schema.contains("threadkeep_set_version ON")
            && !schema.contains("threadkeep_row")
    );

    // Old rows take part in the protocol: a late put loses, the same put is recognised, and a newer one wins.
    let state =
        |write: String| database.sql(&format!("select threadkeep_apply({write}) -> 'rows' -> 0 ->> 'state'"));
    assert_eq!(state(write("put", 600_000, ", 'value', 2")), "superseded");
    assert_eq!(state(write("deleted", 600_000, ", 'value', 2")), "superseded");
    let again = "select threadkeep_apply(jsonb_build_array(jsonb_build_object('key', thread_id, 'version', version::text, 'expires_at', 0, 'value', 9)))
                 -> 'rows' -> 0 ->> 'state' from conversation_threads where thread_id = 'put'";
    assert_eq!(database.sql(again), "stored");
    let condition = ", 'value', 3, 'if_version', (select version::text from conversation_threads where thread_id = 'updated')";
    assert_eq!(state(write("updated", 0, condition)), "stored");
    assert_eq!(database.sql("select conversation_data from conversation_threads where thread_id in ('put', 'updated') order by thread_id"), "1\n3");
}

/// What revision 4 adds is taken away again, because nothing else differs in the tables of revision 3.
#[test]
fn upgrade_from_revision_3_keeps_rows_and_tombstones() {
    let database = Database::plain();
    for key in ["kept", "deleted"] {
        database.sql(&format!("select threadkeep_apply({})", write(key, 9_000, ", 'value', '[1]'::jsonb")));
    }
    database.sql("delete from conversation_threads where thread_id = 'deleted'");
    let triggers = "select format('comment on trigger %I on conversation_threads is %L;', tgname, replace(obj_description(oid, 'pg_trigger'), '4', '3'))
                    from pg_trigger where tgrelid = 'conversation_threads'::regclass and tgname like 'threadkeep%'";
    database.sql(&database.sql(triggers));
    database.sql(
        "drop index conversation_threads_changed;
         alter table threadkeep_tombstones drop column changed_xid;
         drop function threadkeep_changes, threadkeep_apply_appends, threadkeep_appended",
    );
    let tombstones = "select thread_id, version, removed_at from threadkeep_tombstones";
    let before = database.sql(tombstones);
    assert!(before.starts_with("deleted|"), "{before}");
    assert_upgraded(&database);
    assert_eq!(database.sql(tombstones), before);
    let append =
        write("kept", 0, r#", 'value', '[2]'::jsonb, 'append', '{"at": [], "max_bytes": 100}'::jsonb"#);
    assert_eq!(database.sql(&format!("select threadkeep_apply({append}) -> 'rows' -> 0 ->> 'length'")), "2");
}

/// All functions, including the probe, return the same revision.
#[test]
fn every_function_returns_the_revision() {
    let database = Database::migrated();
    let answers = database.sql(
        "select threadkeep_probe() ->> 'revision'; select threadkeep_load('[]') ->> 'revision'; select threadkeep_apply('[]') ->> 'revision';
         select threadkeep_list('{\"limit\": 0}') ->> 'revision'; select threadkeep_touch('[]') ->> 'revision';
         select threadkeep_purge(0) ->> 'revision'; select threadkeep_apply_appends('[]') ->> 'revision';
         select threadkeep_changes('{}') ->> 'revision'",
    );
    assert_eq!(answers, ["4"; 8].join("\n"));
    assert_eq!(database.sql("select attcompression from pg_attribute where attrelid = 'conversation_threads'::regclass and attname = 'conversation_data'"), "l");
}
