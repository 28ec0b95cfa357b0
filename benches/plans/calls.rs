//! Fills the table, and builds the calls that the library makes.

use tokio_postgres::Client;

use crate::stack::Stack;

/// A call of an SQL function.
pub struct Call {
    pub name: &'static str,
    /// The call expression; `$1` is the argument.
    pub function: &'static str,
    /// Number of conversations that the call reads or writes.
    pub count: usize,
    /// SQL that builds the argument from :turn, :count and :threads.
    argument: &'static str,
}

impl Call {
    pub const fn new(
        name: &'static str,
        function: &'static str,
        count: usize,
        argument: &'static str,
    ) -> Self {
        Self { name, function, count, argument }
    }

    pub async fn argument(&self, sql: &Client, turn: usize, threads: usize) -> String {
        let numbers = [(":turn", turn), (":count", self.count), (":threads", threads)];
        let text = numbers
            .iter()
            .fold(self.argument.to_owned(), |text, (name, number)| text.replace(name, &number.to_string()));
        let rows = sql.query(&format!("select ({text})::text"), &[]).await;
        let rows = rows.unwrap_or_else(|error| panic!("{text}: {error:?}"));
        rows[0].try_get(0).unwrap_or_else(|error| panic!("{text}: {error:?}"))
    }

    pub fn is_on_the_table(&self) -> bool {
        self.count > 0
    }

    /// Returns the rows that one plan step may process. Expired rows may lie between the requested rows.
    pub fn allowed_rows(&self) -> u64 {
        2 * self.count as u64 + 100
    }
}

const LOAD: &str = "threadkeep_load($1::text::jsonb)";
pub const APPLY: &str = "threadkeep_apply($1::text::jsonb)";
const LIST: &str = "threadkeep_list($1::text::jsonb)";
const CHANGES: &str = "threadkeep_changes($1::text::jsonb)";
const TOUCH: &str = "threadkeep_touch($1::text::jsonb)";

/// Every third conversation is known to the caller, every seventh does not exist.
const REQUESTS: &str =
    "select jsonb_agg(case when nth % 7 = 6 then jsonb_build_object('key', 'nobody-' || nth)
        when nth % 3 = 2 then jsonb_build_object('key', thread_id, 'if_none_match', version::text)
        else jsonb_build_object('key', thread_id) end)
    from bench.some(:turn, :count, :threads)";
const NEW: &str = "select jsonb_agg(bench.record('new-' || gen_random_uuid(), null, nth)) from generate_series(1, :count) as nth";
pub const KNOWN: &str =
    "select jsonb_agg(bench.record(thread_id, null, nth)) from bench.some(:turn, :count, :threads)";
/// Every second write is new. The batch is plain, so one statement writes it.
const PLAIN: &str = "select jsonb_agg(bench.record(case when nth % 2 = 0 then 'new-' || gen_random_uuid() else thread_id end, null, nth))
    from bench.some(:turn, :count, :threads)";
/// Every second write is new, every eighth a remove, and every fifth write of an existing row has a condition.
const MIXED: &str = "select jsonb_agg(case when nth % 8 = 7 then bench.record(thread_id, null, nth) - 'value'
        when nth % 2 = 0 then bench.record('new-' || gen_random_uuid(), null, nth)
        else bench.record(thread_id, case when nth % 5 = 0 then version end, nth) end)
    from bench.some(:turn, :count, :threads)";
pub const APPENDS: &str = r#"select jsonb_agg(bench.record(thread_id, null, nth) || '{"append": {"at": [], "max_bytes": 8388608}}')
    from bench.some(:turn, :count, :threads)"#;
const FIRST_PAGE: &str = "select jsonb_build_object('limit', :count)";
/// Begins in the middle of the live conversations.
const LATE_PAGE: &str =
    "select jsonb_build_object('limit', :count, 'after_version', version::text, 'after_key', thread_id)
    from (select version, thread_id from public.conversation_threads where expires_at > now()
          order by version desc offset :threads / 2 + :turn limit 1) as row";
/// Begins close to the end, so that no page follows.
const LAST_PAGE: &str =
    "select jsonb_build_object('limit', :count, 'after_version', version::text, 'after_key', thread_id)
    from (select version, thread_id from public.conversation_threads where expires_at > now()
          order by version offset :count / 2 + :turn limit 1) as row";
const USERS_PAGE: &str = "select jsonb_build_object('limit', :count, 'user', 'user-' || :turn)";
const BUSY_USERS_PAGE: &str = "select jsonb_build_object('limit', :count, 'user', 'busy')";
const BUSY_USERS_LATE_PAGE: &str =
    "select jsonb_build_object('limit', :count, 'user', 'busy', 'after_version', version::text, 'after_key', thread_id)
    from (select version, thread_id from public.conversation_threads where expires_at > now() and user_id = 'busy'
          order by version desc offset :threads / 25 + :turn limit 1) as row";
const KEYS: &str = "select jsonb_agg(thread_id) from bench.some(:turn, :count, :threads)";
/// Changes conversations after the cursor.
const CURSOR: &str = "select jsonb_build_object('cursor', bench.change(:turn, :count, :threads))";
/// Inserts expired rows for purge to remove.
const MOST: &str = "select bench.expire(:turn, :count)";

pub const CALLS: &[Call] = &[
    Call::new("probe", "threadkeep_probe()", 1, "select ''"),
    Call::new("load 1", LOAD, 1, REQUESTS),
    Call::new("load 64", LOAD, 64, REQUESTS),
    Call::new("load 500", LOAD, 500, REQUESTS),
    Call::new("apply 1, new", APPLY, 1, NEW),
    Call::new("apply 1, known", APPLY, 1, KNOWN),
    Call::new("apply 64, plain", APPLY, 64, PLAIN),
    Call::new("apply 500, plain", APPLY, 500, PLAIN),
    Call::new("apply 64, mixed", APPLY, 64, MIXED),
    Call::new("apply 500, mixed", APPLY, 500, MIXED),
    Call::new("append 1", APPLY, 1, APPENDS),
    Call::new("append 64", APPLY, 64, APPENDS),
    Call::new("list, first page", LIST, 500, FIRST_PAGE),
    Call::new("list, late page", LIST, 500, LATE_PAGE),
    Call::new("list, last page", LIST, 500, LAST_PAGE),
    Call::new("list of a user", LIST, 500, USERS_PAGE),
    Call::new("list of a busy user, first page", LIST, 500, BUSY_USERS_PAGE),
    Call::new("list of a busy user, late page", LIST, 500, BUSY_USERS_LATE_PAGE),
    Call::new("changes, 1", CHANGES, 1, CURSOR),
    Call::new("changes, 1,000", CHANGES, 1_000, CURSOR),
    Call::new("touch 64", TOUCH, 64, KEYS),
    Call::new("touch 500", TOUCH, 500, KEYS),
    Call::new("purge 500", "threadkeep_purge($1::text::integer)", 500, MOST),
];

/// SQL functions that build the arguments. The schema `bench` is not part of the library.
const SUPPORT: &str = r#"
    drop schema if exists bench cascade;
    create schema bench;
    create function bench.key(at bigint) returns text language sql immutable
        as $$ select 'thread-' || lpad(at::text, 8, '0') $$;
    -- 1 KiB of JSON.
    create function bench.value(at bigint) returns jsonb language sql immutable as $$
        select jsonb_build_array(
            jsonb_build_object('role', 'user', 'content', repeat(md5(at::text) || ' ', 15)),
            jsonb_build_object('role', 'assistant', 'content', repeat(md5((at + 1)::text) || ' ', 13))) $$;
    create function bench.version(at timestamptz, nth bigint) returns bigint language sql immutable
        as $$ select (floor(extract(epoch from at) * 1000)::bigint << 21) + nth % 2097152 $$;
    -- Conversations from all parts of the table, different ones at each turn.
    create function bench.some(turn bigint, count bigint, threads bigint)
        returns table (nth bigint, thread_id text, version bigint) language sql as $$
        select nth, thread.thread_id, thread.version from generate_series(1, count) as nth
        join public.conversation_threads as thread
          on thread.thread_id = bench.key((turn * count + nth) * 104729 % threads) $$;
    create function bench.record(key text, expect bigint, nth bigint) returns jsonb language sql as $$
        select jsonb_strip_nulls(jsonb_build_object(
            'key', key, 'version', bench.version(clock_timestamp(), nth)::text, 'writer', '16777217', 'if_version', expect::text,
            'expires_at', public.threadkeep_now() + 86400000, 'user', 'user of ' || key, 'metadata', '{}'::jsonb,
            'value', bench.value(nth))) $$;
    create function bench.change(turn bigint, count bigint, threads bigint) returns text language plpgsql as $$
    declare
        cursor constant text := public.threadkeep_changes('{}') ->> 'cursor';
    begin
        perform public.threadkeep_apply(jsonb_agg(bench.record(thread_id, null, nth))) from bench.some(turn, count, threads);
        return cursor;
    end $$;
    create function bench.expire(turn bigint, count bigint) returns bigint language plpgsql as $$
    begin
        insert into public.conversation_threads (thread_id, version, conversation_data, expires_at)
        select 'gone-' || turn || '-' || nth, bench.version(now() - interval '10 days', nth), bench.value(nth),
               now() - interval '9 days'
        from generate_series(1, count) as nth;
        return count;
    end $$;
"#;

/// Fills the table with rows as `threadkeep_apply` writes them.
///
/// The live conversations have versions of the last 23 h, in random order. Every tenth belongs to one busy user; the
/// other users have 18 each. The table also has 2 % tombstones and 20 % expired rows. Purge may remove half of the
/// expired rows.
const FILL: &str = "
    truncate public.conversation_threads;
    truncate public.threadkeep_tombstones, public.threadkeep_writers;
    insert into public.conversation_threads
        (thread_id, version, conversation_data, created_at, accessed_at, expires_at, user_id, metadata)
    select bench.key(at), bench.version(written, at), bench.value(at), written, written, written + interval '1 day',
           case when at % 10 = 0 then 'busy' else 'user-' || at / 20 end, '{}'
    from (select nth * 7919 % :threads as at, now() - random() * interval '23 hours' as written
          from generate_series(1::bigint, :threads) as nth) as live;
    insert into public.conversation_threads (thread_id, version, conversation_data, expires_at, user_id)
    select 'deleted-' || at, bench.version(written, at), 'null', written, 'user-' || at
    from (select at, now() - random() * interval '23 hours' as written
          from generate_series(1, :threads / 50) as at) as deleted;
    insert into public.conversation_threads (thread_id, version, conversation_data, expires_at, user_id)
    select 'expired-' || at, bench.version(written, at), bench.value(at), written + interval '1 day', 'user-' || at / 20
    from (select at, now() - interval '2 days' - at % 2 * interval '8 days' - random() * interval '5 days' as written
          from generate_series(1, :threads / 5) as at) as expired";

pub fn fill(stack: &Stack, threads: usize) {
    stack.psql(SUPPORT);
    stack.psql(&FILL.replace(":threads", &threads.to_string()));
    stack.psql("vacuum analyze public.conversation_threads");
}
