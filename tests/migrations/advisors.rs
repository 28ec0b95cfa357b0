//! Implements the rules of Supabase's advisors that apply to this schema, and further rules, in SQL.

use crate::database::Database;

/// Each rule: its name, and a query that lists its violations.
const RULES: &[(&str, &str)] = &[
    (
        "function_search_path_mutable",
        "select p.oid::regprocedure::text from pg_proc as p
         where p.pronamespace = 'public'::regnamespace
           and not exists (select from unnest(p.proconfig) as setting where setting like 'search_path=%')",
    ),
    (
        "security_definer_function_executable",
        "select p.oid::regprocedure::text from pg_proc as p, unnest(array['anon', 'authenticated', 'service_role']) as role
         where p.pronamespace = 'public'::regnamespace and p.prosecdef and has_function_privilege(role, p.oid, 'execute')",
    ),
    (
        "function_executable_by_the_public_key",
        "select p.oid::regprocedure::text from pg_proc as p, unnest(array['anon', 'authenticated']) as role
         where p.pronamespace = 'public'::regnamespace and has_function_privilege(role, p.oid, 'execute')",
    ),
    (
        "table_open_to_the_public_key",
        "select c.oid::regclass::text from pg_class as c, unnest(array['anon', 'authenticated']) as role
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v', 'm')
           and has_table_privilege(role, c.oid, 'select, insert, update, delete, truncate, references, trigger')",
    ),
    (
        "rls_disabled_in_public",
        "select c.oid::regclass::text from pg_class as c
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') and not c.relrowsecurity",
    ),
    (
        "rls_enabled_no_policy",
        "select c.oid::regclass::text from pg_class as c
         where c.relnamespace = 'public'::regnamespace and c.relrowsecurity
           and not exists (select from pg_policy where polrelid = c.oid)",
    ),
    (
        "policy_exists_rls_disabled",
        "select c.oid::regclass::text from pg_class as c
         where c.relnamespace = 'public'::regnamespace and not c.relrowsecurity
           and exists (select from pg_policy where polrelid = c.oid)",
    ),
    (
        "rls_policy_always_true",
        "select polname::text from pg_policy join pg_class as c on c.oid = polrelid
         where c.relnamespace = 'public'::regnamespace and polpermissive
           and (pg_get_expr(polqual, polrelid) = 'true' or pg_get_expr(polwithcheck, polrelid) = 'true')",
    ),
    (
        "multiple_permissive_policies",
        "select min(c.relname)::text from pg_policy join pg_class as c on c.oid = polrelid, unnest(polroles) as role
         where c.relnamespace = 'public'::regnamespace and polpermissive group by polrelid, polcmd, role having count(*) > 1",
    ),
    (
        "no_primary_key",
        "select c.oid::regclass::text from pg_class as c
         where c.relnamespace = 'public'::regnamespace and c.relkind = 'r'
           and not exists (select from pg_index where indrelid = c.oid and indisprimary)",
    ),
    (
        "unindexed_foreign_keys",
        "select f.conname::text from pg_constraint as f
         where f.contype = 'f' and f.connamespace = 'public'::regnamespace and not exists (
             select from pg_index as i where i.indrelid = f.conrelid
               and (i.indkey::int2[])[0:cardinality(f.conkey) - 1] @> f.conkey)",
    ),
    (
        "duplicate_index",
        "select a.indexrelid::regclass::text from pg_index as a join pg_index as b
           on a.indrelid = b.indrelid and a.indexrelid > b.indexrelid and a.indkey::text = b.indkey::text
          and coalesce(pg_get_expr(a.indpred, a.indrelid), '') = coalesce(pg_get_expr(b.indpred, b.indrelid), '')
          and coalesce(pg_get_expr(a.indexprs, a.indrelid), '') = coalesce(pg_get_expr(b.indexprs, b.indrelid), '')
         join pg_class as c on c.oid = a.indrelid and c.relnamespace = 'public'::regnamespace",
    ),
    // The advisors compare equal indexes only. A longer index also serves the queries of its prefix.
    (
        "index_that_a_longer_one_serves",
        "select a.indexrelid::regclass::text from pg_index as a join pg_index as b
           on a.indrelid = b.indrelid and b.indkey::text like a.indkey::text || ' %' and not a.indisunique
         join pg_class as c on c.oid = a.indrelid and c.relnamespace = 'public'::regnamespace",
    ),
    (
        "security_definer_view",
        "select c.oid::regclass::text from pg_class as c
         where c.relnamespace = 'public'::regnamespace and c.relkind = 'v'
           and not coalesce(c.reloptions::text ~ 'security_invoker=(true|on)', false)",
    ),
    (
        "extension_in_public",
        "select extname::text from pg_extension where extnamespace = 'public'::regnamespace",
    ),
    (
        "not_commented",
        "select p.oid::regprocedure::text from pg_proc as p
         where p.pronamespace = 'public'::regnamespace and obj_description(p.oid, 'pg_proc') is null
         union all
         select format('%s.%s', c.oid::regclass, a.attname) from pg_class as c
         join pg_attribute as a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition and col_description(c.oid, a.attnum) is null
         union all
         select c.oid::regclass::text from pg_class as c
         where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') and obj_description(c.oid, 'pg_class') is null",
    ),
];

/// Returns the findings of all rules for this database.
pub fn advice(database: &Database) -> Vec<String> {
    let mut all = Vec::new();
    for (rule, sql) in RULES {
        let broken = database.sql(&format!("select distinct broken from ({sql}) as rule (broken)"));
        all.extend(broken.lines().map(|object| format!("{rule}: {object}")));
    }
    all
}

/// A fault for each rule: the rule, a statement that plants the fault, and a statement that repairs it.
const FAULTS: [(&str, &str, &str); 16] = [
    (
        "function_search_path_mutable",
        "create function public.planted() returns int language sql as 'select 1'",
        "drop function planted()",
    ),
    (
        "security_definer_function_executable",
        "create function public.planted() returns int language sql security definer set search_path = '' as 'select 1'",
        "drop function planted()",
    ),
    (
        "function_executable_by_the_public_key",
        "grant execute on function threadkeep_load to anon",
        "revoke execute on function threadkeep_load from anon",
    ),
    (
        "table_open_to_the_public_key",
        "grant select on threadkeep_tombstones to authenticated",
        "revoke all on threadkeep_tombstones from authenticated",
    ),
    (
        "rls_disabled_in_public",
        "alter table threadkeep_tombstones disable row level security",
        "alter table threadkeep_tombstones enable row level security",
    ),
    (
        "policy_exists_rls_disabled",
        "alter table conversation_threads disable row level security",
        "alter table conversation_threads enable row level security",
    ),
    (
        "rls_enabled_no_policy",
        "create table planted (a int primary key); alter table planted enable row level security",
        "drop table planted",
    ),
    (
        "rls_policy_always_true",
        "create policy planted on threadkeep_tombstones using (true)",
        "drop policy planted on threadkeep_tombstones",
    ),
    (
        "multiple_permissive_policies",
        "create policy one on threadkeep_tombstones using (false); create policy two on threadkeep_tombstones using (false)",
        "drop policy one on threadkeep_tombstones; drop policy two on threadkeep_tombstones",
    ),
    ("no_primary_key", "create table planted (a int)", "drop table planted"),
    (
        "unindexed_foreign_keys",
        "create table planted (a int primary key, b text references threadkeep_tombstones)",
        "drop table planted",
    ),
    ("duplicate_index", "create index planted on conversation_threads (expires_at)", "drop index planted"),
    (
        "index_that_a_longer_one_serves",
        "create index planted on conversation_threads (user_id)",
        "drop index planted",
    ),
    ("security_definer_view", "create view planted as select 1 as one", "drop view planted"),
    ("extension_in_public", "create extension plpgsql_check", "drop extension plpgsql_check"),
    ("not_commented", "create table planted (a int)", "drop table planted"),
];

#[test]
fn planted_fault_is_found_by_its_rule() {
    let database = Database::migrated();
    assert_eq!(advice(&database), [""; 0]);
    for (rule, fault, repair) in FAULTS {
        database.sql(fault);
        let findings = advice(&database);
        assert!(findings.iter().any(|finding| finding.starts_with(rule)), "{rule}: {findings:?}");
        database.sql(repair);
        assert_eq!(advice(&database), [""; 0], "after {repair}");
    }
}

/// Each index must serve a call of the library or a rule of the table. `benches/PLANS.md` has the plans of a large table.
#[test]
fn library_calls_use_every_index() {
    let database = Database::migrated();
    database.sql(
        "insert into conversation_threads (thread_id, user_id, conversation_data, expires_at, version)
         select 't' || at, 'u' || at % 50, '1', now() + interval '1h' * (at - 1000), (extract(epoch from now() - interval '20 days') * 1000)::bigint + at << 21
         from generate_series(1, 2000) as at;
         delete from conversation_threads where thread_id like '%7';
         analyze",
    );
    database.sql(
        "set enable_seqscan = off;
         select threadkeep_load('[{\"key\": \"t1\"}, {\"key\": \"t7\"}]');
         select threadkeep_list('{\"most\": 10}');
         select threadkeep_list('{\"most\": 10, \"user\": \"u1\"}');
         select threadkeep_touch('[\"t1999\"]');
         select threadkeep_apply(jsonb_build_array(jsonb_build_object('key', 'new', 'writer', '16777217', 'if_version', '0', 'value', 1,
             'version', (threadkeep_now() << 21)::text, 'expires_at', 4000000000000)));
         select threadkeep_changes(jsonb_build_object('cursor', threadkeep_changes('{}') ->> 'cursor'));
         select threadkeep_purge(10000)",
    );
    // The primary key is a rule of the plan. The calls name conversations by thread_id. A partitioned index counts as one.
    let select_unused = "
        select string_agg(distinct root::text, ', ') from (
            select coalesce(inhparent, indexrelid)::regclass as root, sum(idx_scan) from pg_stat_user_indexes
            left join pg_inherits on inhrelid = indexrelid where schemaname = 'public' group by 1) as used (root, scans)
        where scans = 0 and root <> 'conversation_threads_pkey'::regclass";
    let mut unused = String::new();
    // PostgreSQL publishes the statistics shortly after the end of the session.
    for _ in 0..1_500 {
        unused = database.sql(select_unused);
        if unused.is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("no call uses {unused}");
}
