-- What makes the planned table safe for several daemons at once: versions, a change mark, and the functions through
-- which threadkeep reads and writes. Harmless when applied twice, and beside daemons that still write plain rows.
--
-- A version is a hybrid logical clock: milliseconds since the epoch << 21, then 21 bits that order writes within a
-- millisecond. A deletion is an expired row ('null', expires_at = the moment of deletion) that keeps its version.

-- The index behind `unique` serves every look-up by thread_id; a second one costs 5 to 15 % of the writes.
drop index if exists public.conversation_threads_thread_id_idx;

-- The default is evaluated once, so rows that are here already get a version without the table being rewritten.
alter table public.conversation_threads
    add column if not exists version bigint not null default ((extract(epoch from now()) * 1000)::bigint << 21),
    add column if not exists accepted_versions bigint[] not null default '{}',
    add column if not exists changed_xid xid8 not null default '0';
alter table public.conversation_threads alter column version set default 0;

-- Room on each page keeps touches of accessed_at inside it (heap-only tuples).
alter table public.conversation_threads set (fillfactor = 85);

-- The database's clock in milliseconds, and the lowest version of a millisecond.
create or replace function public.threadkeep_now() returns bigint
    language sql volatile security invoker set search_path = ''
    as $$ select floor(extract(epoch from clock_timestamp()) * 1000)::bigint $$;

-- Stamps rows that others write with plain statements, and marks every change with its transaction.
-- It does not run for accessed_at, so that a touch bumps neither version nor change mark.
create or replace function public.threadkeep_stamp() returns trigger
    language plpgsql security invoker set search_path = '' as $$
declare
    -- Not by threadkeep_now(): whoever may write the table need not be allowed to call the functions.
    present bigint := floor(extract(epoch from clock_timestamp()) * 1000)::bigint;
    before  bigint := 0;
begin
    if tg_op = 'UPDATE' then
        if (new.thread_id, new.user_id, new.conversation_data, new.created_at, new.expires_at, new.metadata, new.version)
           is not distinct from
           (old.thread_id, old.user_id, old.conversation_data, old.created_at, old.expires_at, old.metadata, old.version)
        then
            return new;
        end if;
        before := old.version;
        new.accepted_versions := old.accepted_versions;
    else
        new.accepted_versions := '{}';
    end if;
    -- A version that did not rise was not given by threadkeep; one beyond the horizon would block every later edit.
    if new.version <= before or new.version >> 21 > present + 2000 then
        new.version := greatest(before + 1, present << 21);
    end if;
    new.accepted_versions := (new.version || new.accepted_versions)[1:16];
    new.changed_xid := pg_catalog.pg_current_xact_id();
    return new;
end $$;

create or replace trigger threadkeep_stamp
    before insert or update of id, thread_id, user_id, conversation_data, created_at, expires_at, metadata, version,
                               accepted_versions, changed_xid
    on public.conversation_threads
    for each row execute function public.threadkeep_stamp();

-- Is the database there, what does its clock say, and which version of these functions does it have?
create or replace function public.threadkeep_probe() returns json
    language sql volatile security invoker set search_path = ''
    as $$ select json_build_object('now', public.threadkeep_now(), 'schema', 1) $$;

-- Some servers hand a jsonb argument over as a JSON string of itself.
create or replace function public.threadkeep_argument(given jsonb) returns jsonb
    language sql immutable security invoker set search_path = ''
    as $$ select case jsonb_typeof(given) when 'string' then (given #>> '{}')::jsonb else given end $$;

-- One row as it travels, without and with its key.
create or replace function public.threadkeep_row(one public.conversation_threads, body text) returns json
    language sql stable security invoker set search_path = ''
    as $$ select json_build_object(
        'state', 'found', 'key', one.thread_id, 'version', one.version::text,
        -- Others may have written 'infinity', which no number of milliseconds can say.
        'expires', floor(extract(epoch from least(one.expires_at, '9999-12-31')) * 1000)::bigint,
        'user', one.user_id, 'metadata', one.metadata, 'value', body::json) $$;

-- wants: [{"key": …, "known": "version"?}, …]. Answers in the order asked, each with a state: found | same | absent |
-- later (the answer has grown to 16 MiB: ask again for these).
create or replace function public.threadkeep_load(wants jsonb) returns json
    language sql volatile security invoker set search_path = '' as $$
    with clock as materialized (
        select clock_timestamp() as now
    ), asked as (
        select want.ord, want.one ->> 'key' as key, (want.one ->> 'known')::bigint as known
        from jsonb_array_elements(public.threadkeep_argument(wants)) with ordinality as want(one, ord)
    ), matched as (
        select asked.ord, asked.known, thread, coalesce(thread.version, 0) as version,
               coalesce(thread.expires_at > clock.now, false) as live
        from asked cross join clock
        left join public.conversation_threads as thread on thread.thread_id = asked.key
    ), wanted as (
        -- What is known, or lies beyond 16 MiB as it is stored, is not even read.
        select matched.*, live and version is distinct from known as is_wanted,
               sum(case when live and version is distinct from known
                        then pg_column_size((matched.thread).conversation_data) end) over (order by ord) as stored_bytes
        from matched
    ), read as materialized (
        select wanted.*, case when is_wanted and (stored_bytes < 16 * 1024 * 1024
                                                  or stored_bytes = pg_column_size((wanted.thread).conversation_data))
                              then (wanted.thread).conversation_data::text end as body
        from wanted
    ), sized as (
        select read.*, sum(coalesce(octet_length(body), 0)) over (order by ord) - coalesce(octet_length(body), 0) as before
        from read
    )
    select json_build_object(
        'now', floor(extract(epoch from (select now from clock)) * 1000)::bigint,
        'schema', 1,
        'rows', coalesce(json_agg(
            case when not live      then json_build_object('state', 'absent', 'version', version::text)
                 when not is_wanted then json_build_object('state', 'same')
                 when body is null or before >= 16 * 1024 * 1024 then json_build_object('state', 'later')
                 else public.threadkeep_row(thread, body) end
            order by ord), '[]'))
    from sized
$$;

-- records: [{"key", "version", "expires": ms, "user"?, "metadata"?, "value"?, "expect"?: version, "again"?: true}, …];
-- one without a value is a deletion. Writes each record that is newer than what is stored (with `expect`: only over
-- that version) and answers in the order given: stored | superseded | conflict | forgotten (as conflict, of a write
-- that comes again and may be among those accepted before the 16 remembered) | ahead | too old. A row that others keep
-- locked must not hold up everybody: after 2 s the call fails as a whole.
create or replace function public.threadkeep_apply(records jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' set lock_timeout = '2s' as $$
declare
    oldest  bigint := (public.threadkeep_now() - 7 * 86400000::bigint) << 21;
    given   record;
    held    record;
    gone    boolean;
    ends    timestamptz;
    verdict text;
    results json[];
begin
    -- One order of locks everywhere, and two writes of one key in the order given.
    for given in
        select one.ord, one.body, one.body ->> 'key' as key, (one.body ->> 'version')::bigint as version,
               (one.body ->> 'expect')::bigint as expect, (one.body ->> 'again')::boolean as again
        from jsonb_array_elements(public.threadkeep_argument(records)) with ordinality as one(body, ord)
        order by one.body ->> 'key' collate "C", one.ord
    loop
        gone := not given.body ? 'value';
        ends := to_timestamp((case when gone then (given.version >> 21)::text else given.body ->> 'expires' end)::numeric / 1000);
        if gone then
            ends := least(ends, clock_timestamp());
        end if;
        loop
            select version, accepted_versions into held
            from public.conversation_threads where thread_id = given.key for no key update;
            verdict := case
                when given.version = any (held.accepted_versions) or given.version = held.version then 'stored'
                when (given.version >> 21) > public.threadkeep_now() + 2000 then 'ahead'
                when given.version < oldest then 'too old'
                when given.expect is not null and given.expect <> coalesce(held.version, 0) then
                    case when given.again and given.version < held.accepted_versions[16] then 'forgotten'
                         else 'conflict' end
                when given.version < held.version then 'superseded'
            end;
            exit when verdict is not null;
            if held.version is null then
                insert into public.conversation_threads
                    (thread_id, version, conversation_data, expires_at, user_id, metadata)
                values (given.key, given.version, coalesce(given.body -> 'value', 'null'), ends,
                        given.body ->> 'user', coalesce(given.body -> 'metadata', '{}'))
                on conflict (thread_id) do nothing;
            else
                update public.conversation_threads
                set version = given.version, conversation_data = coalesce(given.body -> 'value', 'null'),
                    expires_at = ends, accessed_at = now(), user_id = given.body ->> 'user',
                    metadata = coalesce(given.body -> 'metadata', '{}')
                where thread_id = given.key;
            end if;
            -- Another transaction may have inserted the row between the look and the insert: look again.
            if found then
                verdict := 'stored';
                exit;
            end if;
        end loop;
        results[given.ord] := json_build_object('state', verdict, 'version', coalesce(held.version, 0)::text);
    end loop;
    return json_build_object('now', public.threadkeep_now(), 'schema', 1,
                             'rows', coalesce(array_to_json(results), '[]'));
end $$;

-- page: {"most", "user"?, "version"? and "key"?}. The newest live threads, of one user where one is named, before a given
-- (version, key): at most `most` rows and about 16 MiB, and whether these are the `last`. Planned anew for each call, so
-- that a user's page comes by the index on user_id.
create or replace function public.threadkeep_recent(page jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' set plan_cache_mode = 'force_custom_plan' as $$
declare
    asked     jsonb  := public.threadkeep_argument(page);
    whose     text   := asked ->> 'user';
    most      bigint := asked ->> 'most';
    below     bigint := coalesce((asked ->> 'version')::bigint, 9223372036854775807);
    below_key text   := coalesce(asked ->> 'key', '');
    present   timestamptz := clock_timestamp();
    picked    uuid;
    one       public.conversation_threads;
    body      text;
    bytes     bigint  := 0;
    sent      integer := 0;
    found_rows json[];
    is_last   boolean := true;
begin
    -- Ids first, for values may be large; one more than asked tells whether there are more.
    for picked in
        select thread.id from public.conversation_threads as thread
        where thread.expires_at > present
          and (whose is null or thread.user_id = whose)
          and (thread.version, thread.thread_id collate "C") < (below, below_key)
          -- Others may have written ids that threadkeep cannot have.
          and octet_length(thread.thread_id) between 1 and 512
        order by thread.version desc, thread.thread_id collate "C" desc
        limit most + 1
    loop
        if sent = most or bytes >= 16 * 1024 * 1024 then
            is_last := false;
            exit;
        end if;
        select * into one from public.conversation_threads as thread
        where thread.id = picked and thread.expires_at > present and (whose is null or thread.user_id = whose);
        -- It may have gone since it was picked.
        continue when not found;
        body := one.conversation_data::text;
        bytes := bytes + octet_length(body);
        sent := sent + 1;
        found_rows[sent] := public.threadkeep_row(one, body);
    end loop;
    return json_build_object('now', floor(extract(epoch from present) * 1000)::bigint, 'schema', 1,
                             'rows', coalesce(array_to_json(found_rows), '[]'), 'last', is_last);
end $$;

-- Marks threads as accessed. Rows that somebody is writing are being accessed anyway and are passed over.
create or replace function public.threadkeep_touch(keys jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' as $$
declare
    touched integer;
begin
    with wanted as (
        select thread.id from public.conversation_threads as thread
        where thread.thread_id in (select jsonb_array_elements_text(public.threadkeep_argument(keys)))
          and thread.expires_at > now()
        order by thread.thread_id collate "C"
        for no key update skip locked
    )
    update public.conversation_threads as thread set accessed_at = now()
    from wanted where thread.id = wanted.id;
    get diagnostics touched = row_count;
    return json_build_object('now', public.threadkeep_now(), 'schema', 1, 'count', touched);
end $$;

-- Removes up to `most` rows whose expiry and version are both older than 8 days: a day longer than a write may be
-- late, so that no late write meets a forgotten deletion.
create or replace function public.threadkeep_purge(most integer) returns json
    language plpgsql volatile security invoker set search_path = '' as $$
declare
    past    bigint := (public.threadkeep_now() - 8 * 86400000::bigint) << 21;
    removed integer;
begin
    delete from public.conversation_threads
    where id in (
        select thread.id from public.conversation_threads as thread
        where thread.expires_at < now() - interval '8 days'
          and thread.version < past
        -- By the index; skipping what is locked, no order of locks is needed.
        order by thread.expires_at
        limit most
        for update skip locked
    );
    get diagnostics removed = row_count;
    return json_build_object('now', public.threadkeep_now(), 'schema', 1, 'count', removed);
end $$;

-- Since 2026 Supabase grants nothing by itself, and PostgreSQL lets everybody execute a new function: only the secret
-- (service_role) key may use any of this. Row level security has no policy, so nobody else sees a row either.
alter table public.conversation_threads enable row level security;

do $$
declare
    role_name text;
    one       regprocedure;
begin
    for one in
        select p.oid::regprocedure from pg_catalog.pg_proc as p
        where p.pronamespace = 'public'::regnamespace and p.proname like 'threadkeep\_%'
    loop
        execute format('revoke all on function %s from public', one);
        foreach role_name in array array['anon', 'authenticated'] loop
            if exists (select from pg_catalog.pg_roles where rolname = role_name) then
                execute format('revoke all on function %s from %I', one, role_name);
            end if;
        end loop;
        if exists (select from pg_catalog.pg_roles where rolname = 'service_role') then
            execute format('grant execute on function %s to service_role', one);
        end if;
    end loop;
    foreach role_name in array array['anon', 'authenticated'] loop
        if exists (select from pg_catalog.pg_roles where rolname = role_name) then
            execute format('revoke all on table public.conversation_threads from %I', role_name);
        end if;
    end loop;
    if exists (select from pg_catalog.pg_roles where rolname = 'service_role') then
        grant select, insert, update, delete on table public.conversation_threads to service_role;
    end if;
end $$;

-- PostgREST keeps a cache of the schema.
notify pgrst, 'reload schema';
