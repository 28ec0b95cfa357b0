-- Adds threadkeep's part of the schema: versions, tombstones, and the functions that threadkeep calls. Other daemons may continue to
-- write plain rows.
--
-- A version is a value of a hybrid logical clock: milliseconds since the epoch << 21, plus 21 bits that order writes within a
-- millisecond.
--
-- A tombstone is the record of a deletion, with a version. A remove by threadkeep keeps its tombstone in the table, as an expired row
-- with the value 'null'. A plain DELETE leaves its tombstone in threadkeep_tombstones.
--
-- The file can be applied again. The second time it takes no lock that blocks readers or writers. The revision of the schema is 2.
-- The functions below return the revision, so that a client can detect a missing migration.
--
-- Why does the contract live in SQL functions? One call carries many records, and each record needs a compare and a write under one
-- row lock. The conformance suite of the crate (src/testing/conformance.rs) tests the functions.

set lock_timeout = '1s';

-- Compares the table with the plan before the first change. On a difference the file stops and names the statements that repair it.
do $$
declare
    problems text[] := '{}';
    kind     "char";
    rejected text;
begin
    select relkind into kind from pg_catalog.pg_class where oid = to_regclass('public.conversation_threads');
    if kind is null then
        raise exception 'threadkeep: there is no table public.conversation_threads; apply 20260101000000_conversation_threads.sql first';
    elsif kind <> 'r' then
        raise exception 'threadkeep changed nothing: public.conversation_threads is a %, and a plain table is needed; rename it and apply both files again',
            case kind when 'v' then 'view' when 'm' then 'materialized view' when 'f' then 'foreign table' when 'p' then 'partitioned table'
                      else 'relation of kind ' || kind::text end;
    end if;

    with planned (name, type, is_required, addition) as (values
        ('id',                'uuid',                     true,  'primary key default gen_random_uuid()'),
        ('thread_id',         'text',                     true,  'not null unique'),
        ('user_id',           'text',                     true,  ''),
        ('conversation_data', 'jsonb',                    true,  'not null default ''null'''),
        ('created_at',        'timestamp with time zone', true,  'default now()'),
        ('accessed_at',       'timestamp with time zone', true,  'default now()'),
        ('expires_at',        'timestamp with time zone', true,  'not null default now() + interval ''1 day'''),
        ('metadata',          'jsonb',                    true,  'default ''{}'''),
        ('version',           'bigint',                   false, ''),
        ('accepted_versions', 'bigint[]',                 false, ''),
        ('changed_xid',       'xid8',                     false, '')
    ), compared as (
        select planned.*, actual.attnum, format_type(actual.atttypid, actual.atttypmod) as actual_type, actual.attnotnull, actual.atthasdef, actual.attidentity
        from planned
        left join pg_catalog.pg_attribute as actual
          on actual.attrelid = 'public.conversation_threads'::regclass and actual.attname = planned.name and not actual.attisdropped
    ), differences (place, problem, remedy) as (
        select attnum, format('column %s has the type %s instead of %s', name, actual_type, type),
               case when not is_required then format('rename column %I to %I', name, name || '_before_threadkeep')
                    when name = 'id' then case when attidentity <> '' then 'alter column id drop identity; alter table public.conversation_threads ' else '' end
                         || 'alter column id drop default, alter column id type uuid using gen_random_uuid(), alter column id set default gen_random_uuid()'
                    else format('alter column %I type %s using %s', name, type, case
                        when actual_type like 'timestamp%without time zone' then format('%I at time zone ''UTC''', name)
                        when type like 'timestamp%' and actual_type in ('smallint', 'integer', 'bigint', 'numeric', 'double precision', 'real')
                        then format('to_timestamp(%I)', name)
                        else format('%I::%s', name, type) end) end
        from compared where actual_type <> type
        union all
        select 100, format('column %s is missing', name), format('add column %I %s %s', name, type, addition)
        from compared where attnum is null and is_required
        union all
        select attnum, format('column %s may be null', name), format('alter column %I set not null', name)
        from compared where name in ('id', 'thread_id', 'conversation_data', 'expires_at') and not attnotnull
        union all
        select attnum, 'column id has no default', 'alter column id set default gen_random_uuid()'
        from compared where name = 'id' and actual_type = type and not atthasdef
        union all
        select attnum, format('column %s is not unique', name), format('add unique (%I)', name)
        from compared where name in ('id', 'thread_id') and not exists (
            select from pg_catalog.pg_index as i
            where i.indrelid = 'public.conversation_threads'::regclass and i.indisunique and i.indisvalid and i.indimmediate
              and i.indnkeyatts = 1 and i.indkey[0] = attnum and i.indpred is null)
          and attnum is not null
        union all
        select attnum, format('threadkeep does not fill the column %s, which is NOT NULL without a default', attname),
               format('alter column %I drop not null', attname)
        from pg_catalog.pg_attribute
        where attrelid = 'public.conversation_threads'::regclass and attnum > 0 and not attisdropped
          and attnotnull and not atthasdef and attidentity = '' and attname not in (select name from planned)
    )
    select coalesce(array_agg(format('%s (alter table public.conversation_threads %s)', problem, remedy) order by place, problem), '{}')
    into problems from differences;

    if problems = '{}' then
        -- Constraints and triggers of other owners may reject the rows of threadkeep. So the file inserts one row as a trial. The
        -- exception below undoes the insert in any case.
        begin
            insert into public.conversation_threads (thread_id, conversation_data, expires_at, metadata)
            values ('threadkeep-trial-' || gen_random_uuid(), 'null', now(), '{}');
            raise exception using errcode = 'TK000';
        exception
            when sqlstate 'TK000' then null;
            when lock_not_available then raise;
            when others then
                problems := array[format('a tombstone cannot be written, with SQLSTATE %s: %s (change or drop what refuses it)', sqlstate, sqlerrm)];
        end;
    end if;
    if problems <> '{}' then
        raise exception 'threadkeep changed nothing, because the table public.conversation_threads is not as planned: %; apply this file again after that',
            array_to_string(problems, '; ');
    end if;
end $$;

create table if not exists public.threadkeep_tombstones (
    thread_id         text        primary key,
    version           bigint      not null,
    accepted_versions bigint[]    not null,
    removed_at        timestamptz not null
);

-- Drops the functions of earlier builds, which had other names and parameters.
do $$
declare
    one record;
begin
    for one in
        select p.oid::regprocedure as name from pg_catalog.pg_proc as p
        where p.pronamespace = 'public'::regnamespace
          and (p.proname in ('threadkeep_recent', 'threadkeep_load', 'threadkeep_apply', 'threadkeep_purge')
               and p.proargnames && '{wants,records,page,most}')
    loop
        execute format('drop function %s', one.name);
    end loop;
end $$;

-- Trigger functions. The triggers themselves follow after the table has its columns.

-- Stamps plain writes: sets the version and the transaction id of the row. A statement of threadkeep sets both itself, and passes
-- unchanged. A change of accessed_at alone raises neither.
create or replace function public.threadkeep_set_version() returns trigger
    language plpgsql security invoker set search_path = '' as $$
declare
    present bigint;
    before  bigint := 0;
begin
    if tg_op = 'UPDATE' then
        before := old.version;
    end if;
    if new.version <> before and new.accepted_versions[1] = new.version and new.changed_xid = pg_catalog.pg_current_xact_id() then
        return new;
    end if;
    -- threadkeep_now() is not used here: a role with write access to the table may lack the right to call that function.
    present := floor(extract(epoch from clock_timestamp()) * 1000)::bigint;
    if tg_op = 'UPDATE' then
        -- The comparison takes conversation_data last, because it may be large.
        if (new.version, new.thread_id, new.user_id, new.created_at, new.expires_at, new.metadata, new.conversation_data)
           is not distinct from
           (old.version, old.thread_id, old.user_id, old.created_at, old.expires_at, old.metadata, old.conversation_data)
        then
            return new;
        end if;
    end if;
    -- A row with another thread_id is another conversation, without earlier versions.
    if tg_op = 'UPDATE' and new.thread_id = old.thread_id then
        new.accepted_versions := old.accepted_versions;
    else
        new.accepted_versions := '{}';
    end if;
    -- threadkeep always raises the version, so an equal or lower version comes from a plain write. A version far in the future would
    -- block every later write.
    if new.version <= before or new.version >> 21 > present + 2000 then
        new.version := greatest(before + 1, present << 21);
    end if;
    new.accepted_versions := (new.version || new.accepted_versions)[1:16];
    new.changed_xid := pg_catalog.pg_current_xact_id();
    return new;
end $$;

-- Returns the tombstone of a row that a plain statement removes at `present`. A live row gets a tombstone with a higher version. An
-- expired row, also a tombstone, keeps its version, so that the plain DELETE changes nothing for clients.
create or replace function public.threadkeep_tombstone_of(one public.conversation_threads, present timestamptz)
    returns public.threadkeep_tombstones
    language plpgsql immutable security invoker set search_path = '' as $$
declare
    millis bigint := floor(extract(epoch from present) * 1000)::bigint;
    gone   public.threadkeep_tombstones;
begin
    gone.thread_id := one.thread_id;
    -- The function caps a version that is more than a day ahead, so that a DELETE repairs a conversation with such a version.
    gone.version := least(one.version, (millis + 86400000) << 21);
    if one.expires_at > present then
        gone.version := greatest(gone.version + 1, millis << 21);
    end if;
    gone.accepted_versions := one.accepted_versions;
    if gone.accepted_versions[1] is distinct from gone.version then
        gone.accepted_versions := (gone.version || one.accepted_versions)[1:16];
    end if;
    gone.removed_at := least(one.expires_at, present);
    return gone;
end $$;

-- Keeps a tombstone when a plain statement removes a row, and raises a new row above its tombstone (I13).
--
-- The function is SECURITY DEFINER, so that a role with write access to the table needs no rights on threadkeep_tombstones. The file
-- revokes the right to execute it from all roles, so only triggers run it. The function takes no name and no code from the caller.
--
-- The function locks the row first, then its tombstone. Only two transactions lock a tombstone: the transaction that removed the row,
-- and purge. Purge skips locked rows and never waits. So the function adds no deadlock.
create or replace function public.threadkeep_keep_tombstone() returns trigger
    language plpgsql security definer set search_path = '' as $$
declare
    tombstone public.threadkeep_tombstones;
    last      bigint;
    accepted  bigint[];
begin
    if tg_op = 'INSERT' and current_setting('threadkeep.applying', true) = 'yes' then
        -- threadkeep_apply reads the tombstones itself.
        return null;
    end if;
    if tg_op in ('DELETE', 'UPDATE') then
        insert into public.threadkeep_tombstones as kept
        select gone.* from public.threadkeep_tombstone_of(old, clock_timestamp()) as gone
        on conflict (thread_id) do update
        set version = excluded.version, accepted_versions = excluded.accepted_versions, removed_at = excluded.removed_at
        where kept.version < excluded.version;
    end if;
    if tg_op in ('INSERT', 'UPDATE') then
        -- The trigger runs after the insert. Before it, another transaction could still delete the old row and add a tombstone.
        select * into tombstone from public.threadkeep_tombstones as gone where gone.thread_id = new.thread_id;
        if found then
            last := greatest(new.version, tombstone.version + 1);
            accepted := (last || tombstone.accepted_versions)[1:16];
            if accepted is distinct from new.accepted_versions then
                update public.conversation_threads as thread
                set version = last, accepted_versions = accepted, changed_xid = pg_catalog.pg_current_xact_id()
                where thread.thread_id = new.thread_id;
            end if;
        end if;
    end if;
    return null;
end $$;

-- Keeps the tombstones of a TRUNCATE, which locks the whole table.
create or replace function public.threadkeep_keep_tombstones() returns trigger
    language plpgsql security definer set search_path = '' as $$
begin
    insert into public.threadkeep_tombstones as kept
    select gone.* from public.conversation_threads as thread, public.threadkeep_tombstone_of(thread, clock_timestamp()) as gone
    where thread.expires_at > clock_timestamp() - interval '8 days'
       or thread.version >> 21 > extract(epoch from clock_timestamp() - interval '8 days') * 1000
    on conflict (thread_id) do update
    set version = excluded.version, accepted_versions = excluded.accepted_versions, removed_at = excluded.removed_at
    where kept.version < excluded.version;
    return null;
end $$;

-- Updates columns, indexes, policies and triggers to this revision. The block reads the catalog first and collects the missing
-- statements. If there are any, it takes the strongest lock of the table at once, because a weaker lock that grows can deadlock.
do $$
declare
    threads constant regclass := 'public.conversation_threads';
    todo    text[] := '{}';
    one     record;
    step    text;
    roles   text;
begin
    -- PostgreSQL evaluates this default once, so existing rows get a version without a rewrite of the table.
    for one in
        select * from (values
            ('version', 'bigint not null default ((extract(epoch from now()) * 1000)::bigint << 21)'),
            ('accepted_versions', 'bigint[] not null default ''{}'''),
            ('changed_xid', 'xid8 not null default ''0''')) as wanted (name, definition)
        where not exists (select from pg_catalog.pg_attribute where attrelid = threads and attname = name and not attisdropped)
    loop
        todo := todo || format('alter table public.conversation_threads add column %I %s', one.name, one.definition);
    end loop;
    if not exists (
        select from pg_catalog.pg_attrdef as d join pg_catalog.pg_attribute as a on a.attrelid = d.adrelid and a.attnum = d.adnum
        where d.adrelid = threads and a.attname = 'version' and pg_get_expr(d.adbin, d.adrelid) in ('0', '''0''::bigint')) then
        todo := todo || 'alter table public.conversation_threads alter column version set default 0'::text;
    end if;

    -- Free space on each page lets an update of accessed_at stay on its page (heap-only tuple), without new index entries.
    if not coalesce('fillfactor=85' = any ((select reloptions from pg_catalog.pg_class where oid = threads)::text[]), false) then
        todo := todo || 'alter table public.conversation_threads set (fillfactor = 85)'::text;
    end if;

    -- With lz4, an append to a large document is several times cheaper than with pglz. Some servers are built without lz4.
    if exists (select from pg_catalog.pg_settings where name = 'default_toast_compression' and 'lz4' = any (enumvals)) then
        -- A server without the setting also lacks the column attcompression, so the check is nested.
        if exists (select from pg_catalog.pg_attribute
                   where attrelid = threads and attname = 'conversation_data' and attcompression <> 'l') then
            todo := todo || 'alter table public.conversation_threads alter column conversation_data set compression lz4'::text;
        end if;
    end if;

    -- Each index slows every write, so only four stay: the unique index on thread_id (all calls), expires_at (purge), newest (warm-up)
    -- and newest_of_user (lists). The unique index makes a second index on thread_id redundant. newest_of_user makes an index on
    -- user_id redundant. Of several indexes on expires_at, one stays. Indexes with conditions, expressions or more columns belong to
    -- other applications and stay.
    for one in
        select * from (
            select i.indexrelid::regclass as name, c.relname, a.attname, is_constraint,
                   row_number() over (partition by a.attname order by is_constraint desc, i.indisunique desc,
                                      c.relname = 'idx_conversation_threads_' || a.attname desc, c.relname) as place,
                   i.indisunique, i.indisreplident
            from pg_catalog.pg_index as i
            join pg_catalog.pg_class as c on c.oid = i.indexrelid
            join pg_catalog.pg_am as m on m.oid = c.relam and m.amname = 'btree'
            join pg_catalog.pg_attribute as a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
            join pg_catalog.pg_opclass as o on o.oid = i.indclass[0] and o.opcdefault,
            lateral (select exists (select from pg_catalog.pg_constraint where conindid = i.indexrelid)) as backed (is_constraint)
            where i.indrelid = threads and i.indnatts = 1 and i.indpred is null and i.indexprs is null
              and i.indoption[0] = 0 and i.indcollation[0] in (0, a.attcollation) and i.indisvalid
        ) as plain
        where attname in ('thread_id', 'user_id', 'expires_at')
    loop
        if one.is_constraint or one.indisreplident then
            continue;
        elsif one.attname = 'user_id' and not one.indisunique or one.attname <> 'user_id' and one.place > 1 then
            todo := todo || format('drop index %s', one.name);
        elsif one.relname = 'conversation_threads_expires_at_idx' then
            todo := todo || format('alter index %s rename to idx_conversation_threads_expires_at', one.name);
        end if;
    end loop;
    if not exists (
        select from pg_catalog.pg_index as i join pg_catalog.pg_attribute as a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
        where i.indrelid = threads and a.attname = 'expires_at' and i.indpred is null and i.indisvalid) then
        todo := todo || 'create index idx_conversation_threads_expires_at on public.conversation_threads (expires_at)'::text;
    end if;
    for one in
        select * from (values ('conversation_threads_newest', 'version, expires_at'),
                              ('conversation_threads_newest_of_user', 'user_id, version')) as wanted (name, columns)
        left join pg_catalog.pg_index as i on i.indrelid = threads and i.indexrelid = to_regclass('public.' || name)
    loop
        -- A failed `create index concurrently` leaves an invalid index, which no query uses.
        if not one.indisvalid then
            todo := todo || format('drop index public.%I', one.name);
        end if;
        if one.indisvalid is not true then
            todo := todo || format('create index %I on public.conversation_threads (%s)', one.name, one.columns);
        end if;
    end loop;
    if to_regclass('public.threadkeep_tombstones_removed_at') is null then
        todo := todo || 'create index threadkeep_tombstones_removed_at on public.threadkeep_tombstones (removed_at)'::text;
    end if;

    -- Row level security rejects the public keys. The restrictive policy rejects them even if another policy admits them.
    select string_agg(quote_ident(rolname), ', ') into roles from pg_catalog.pg_roles where rolname in ('anon', 'authenticated');
    for one in
        select c.oid, c.oid::regclass as name, c.relrowsecurity from pg_catalog.pg_class as c
        where c.oid in (threads, 'public.threadkeep_tombstones'::regclass)
    loop
        if not one.relrowsecurity then
            todo := todo || format('alter table %s enable row level security', one.name);
        end if;
        if roles is not null and not exists (
            select from pg_catalog.pg_policy where polrelid = one.oid and polname = 'threadkeep_rejects_public_keys') then
            todo := todo || format('create policy threadkeep_rejects_public_keys on %s as restrictive for all to %s using (false) with check (false)',
                                   one.name, roles);
        end if;
    end loop;

    -- The comment of a trigger shows whether the trigger is of this revision. The two triggers that fire in threadkeep_apply have no
    -- WHEN clause: PostgreSQL parses the condition once for each statement, which costs more than the first line of the function.
    for one in
        select * from (values
            ('threadkeep_set_version',
             'before insert or update of id, thread_id, user_id, conversation_data, created_at, expires_at, metadata, version, accepted_versions, changed_xid
              on public.conversation_threads for each row execute function public.threadkeep_set_version()',
             'threadkeep, revision 2: plain writes get a version'),
            ('threadkeep_tombstone_on_insert',
             'after insert on public.conversation_threads for each row execute function public.threadkeep_keep_tombstone()',
             'threadkeep, revision 2: what is created again gets a version above its tombstone'),
            ('threadkeep_tombstone_on_rename',
             'after update of thread_id on public.conversation_threads for each row when (old.thread_id is distinct from new.thread_id)
              execute function public.threadkeep_keep_tombstone()',
             'threadkeep, revision 2: a change of thread_id is a delete and an insert'),
            -- Purge removes only rows that are older than this condition. Such rows need no tombstone, because the functions reject
            -- a write that is more than 7 days late (I13).
            ('threadkeep_tombstone_on_delete',
             'after delete on public.conversation_threads for each row when (
                  old.expires_at > clock_timestamp() - interval ''8 days''
                  or old.version >> 21 > extract(epoch from clock_timestamp() - interval ''8 days'') * 1000)
              execute function public.threadkeep_keep_tombstone()',
             'threadkeep, revision 2: a plain delete leaves a tombstone'),
            ('threadkeep_tombstone_on_truncate',
             'before truncate on public.conversation_threads execute function public.threadkeep_keep_tombstones()',
             'threadkeep, revision 2: a truncate leaves tombstones')) as wanted (name, definition, meaning)
        where not exists (
            select from pg_catalog.pg_trigger as t
            where t.tgrelid = threads and t.tgname = wanted.name and t.tgenabled <> 'D'
              and obj_description(t.oid, 'pg_trigger') = wanted.meaning)
    loop
        if exists (select from pg_catalog.pg_trigger where tgrelid = threads and tgname = one.name) then
            todo := todo || format('drop trigger %I on public.conversation_threads', one.name);
        end if;
        todo := todo || format('create trigger %I %s', one.name, one.definition)
                     || format('comment on trigger %I on public.conversation_threads is %L', one.name, one.meaning);
    end loop;
    -- Revision 1 named the version trigger threadkeep_stamp. Both triggers together would give each row two versions.
    if to_regprocedure('public.threadkeep_stamp()') is not null then
        todo := todo || array['drop trigger if exists threadkeep_stamp on public.conversation_threads',
                              'drop function public.threadkeep_stamp()'];
    end if;

    if todo = '{}' then
        return;
    end if;
    -- All other callers queue behind a waiting lock request. So each wait is short, and callers continue between two waits (I12).
    for attempt in 1..5 loop
        begin
            lock table public.conversation_threads in access exclusive mode;
            exit;
        exception when lock_not_available then
            if attempt = 5 then
                raise exception 'threadkeep changed nothing: the table public.conversation_threads is in use by a long transaction; apply this file again when it has ended (select pid, xact_start, query from pg_stat_activity order by xact_start)'
                    using errcode = 'lock_not_available';
            end if;
        end;
        perform pg_sleep(0.5);
    end loop;
    foreach step in array todo loop
        execute step;
    end loop;
end $$;

-- Returns the database's clock in milliseconds since the epoch. The lowest version of a millisecond is this value << 21.
create or replace function public.threadkeep_now() returns bigint
    language plpgsql volatile security invoker set search_path = ''
    as $$ begin return floor(extract(epoch from clock_timestamp()) * 1000)::bigint; end $$;

-- Unwraps an argument. Some servers pass a jsonb argument as a JSON string that contains the document.
create or replace function public.threadkeep_argument(given jsonb) returns jsonb
    language plpgsql immutable security invoker set search_path = ''
    as $$ begin return case jsonb_typeof(given) when 'string' then (given #>> '{}')::jsonb else given end; end $$;

-- Returns one row in the format of the responses.
create or replace function public.threadkeep_row(one public.conversation_threads, body text) returns json
    language sql stable security invoker set search_path = ''
    as $$ select json_build_object(
        'state', 'found', 'key', one.thread_id, 'version', one.version::text,
        -- Plain rows may contain 'infinity', which milliseconds cannot express.
        'expires_at', floor(extract(epoch from least(one.expires_at, '9999-12-31')) * 1000)::bigint,
        'user', one.user_id, 'metadata', one.metadata, 'value', body::json) $$;

-- Reads records by key. requests: [{"key": …, "if_none_match": "version"?}, …].
--
-- The response has one row for each request, in the same order. Each row has a state:
--   found         the record, with its value
--   not_modified  the stored version equals if_none_match
--   absent        no live record; `version` is the version of the tombstone, or 0
--   deferred      the response has reached 16 MiB; the client requests the row again
create or replace function public.threadkeep_load(requests jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' as $$
begin
    return (with clock as materialized (
        select clock_timestamp() as now
    ), asked as (
        select request.ord, request.one ->> 'key' as key, (request.one ->> 'if_none_match')::bigint as if_none_match
        from jsonb_array_elements(public.threadkeep_argument(requests)) with ordinality as request(one, ord)
    ), matched as (
        -- The columns are listed one by one. A whole-row reference would read every value, also the values that are not sent.
        select asked.ord, asked.key, asked.if_none_match, thread.thread_id, thread.conversation_data, thread.expires_at, thread.user_id,
               thread.metadata, thread.version,
               coalesce(thread.expires_at > clock.now, false) as live, count(*) over () = 1 as alone
        from asked cross join clock
        left join public.conversation_threads as thread on thread.thread_id = asked.key
    ), wanted as (
        -- The sum of stored sizes lets the next step skip values without reading them: known values, and values beyond 16 MiB.
        select matched.*, live and version is distinct from if_none_match as is_wanted,
               sum(case when live and version is distinct from if_none_match then pg_column_size(conversation_data) end)
                   over (order by ord) as stored_bytes
        from matched
    ), measured as materialized (
        select wanted.*, case when not is_wanted then 0
                              when alone then 1
                              when stored_bytes < 16 * 1024 * 1024 or stored_bytes = pg_column_size(conversation_data)
                              then octet_length(conversation_data::text) end as bytes
        from wanted
    ), sized as (
        select measured.*, sum(coalesce(bytes, 0)) over (order by ord) - coalesce(bytes, 0) as before
        from measured
    )
    select json_build_object(
        'now', floor(extract(epoch from (select now from clock)) * 1000)::bigint,
        'revision', 2,
        'rows', coalesce(json_agg(
            case when not live      then json_build_object('state', 'absent', 'version', coalesce(version,
                     -- PostgreSQL runs this subquery only for keys without a row.
                     (select gone.version from public.threadkeep_tombstones as gone where gone.thread_id = key), 0)::text)
                 when not is_wanted then json_build_object('state', 'not_modified')
                 when bytes is null or before >= 16 * 1024 * 1024 then json_build_object('state', 'deferred')
                 else json_build_object(
                     'state', 'found', 'key', thread_id, 'version', version::text,
                     -- Plain rows may contain 'infinity', which milliseconds cannot express.
                     'expires_at', floor(extract(epoch from least(expires_at, '9999-12-31')) * 1000)::bigint,
                     'user', user_id, 'metadata', metadata, 'value', conversation_data) end), '[]'))
    from (select * from sized order by ord) as sorted);
end $$;

-- Writes records. writes: [{"key", "version", "expires_at": ms, "user"?, "metadata"?, "value"?, "if_version"?: version,
-- "is_retry"?: true}, …]. A write without a value is a remove.
--
-- A write is stored if its version is above the version of the row or its tombstone (I9). With `if_version`, the stored version must
-- also equal `if_version`. The response has one row for each write, in the same order. Each row has a state:
--   stored             the write is stored now, or an earlier attempt of the same write was
--   superseded         the table holds a newer version
--   conflict           the stored version differs from if_version
--   indeterminate      a conflict of a retry whose version may be older than the 16 remembered versions
--   version_in_future  the version is more than 2 s ahead of the database's clock
--   too_old            the version is more than 7 days old (I13)
--
-- If another transaction locks a row for 2 s, the call fails, so that one row cannot block all callers.
create or replace function public.threadkeep_apply(writes jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' set lock_timeout = '2s' as $$
declare
    oldest  bigint := (public.threadkeep_now() - 7 * 86400000::bigint) << 21;
    given   record;
    held    record;
    gone    public.threadkeep_tombstones;
    ends    timestamptz;
    verdict text;
    fresh   text[];
    results json[];
begin
    -- This setting turns off threadkeep_keep_tombstone: the inserts below read the tombstones themselves.
    verdict := set_config('threadkeep.applying', 'yes', true);
    -- All calls lock rows in the order of the keys, so that they cannot deadlock. Two writes of one key run in the order given.
    for given in
        select one.ord, one.body, one.body ->> 'key' as key, (one.body ->> 'version')::bigint as version,
               (one.body ->> 'if_version')::bigint as if_version, (one.body ->> 'is_retry')::boolean as is_retry
        from jsonb_array_elements(public.threadkeep_argument(writes)) with ordinality as one(body, ord)
        order by one.body ->> 'key' collate "C", one.ord
    loop
        if given.version is null then
            raise exception 'a record without a version' using errcode = 'not_null_violation';
        end if;
        if given.body ? 'value' then
            ends := to_timestamp((given.body ->> 'expires_at')::numeric / 1000);
        else
            ends := least(to_timestamp((given.version >> 21)::numeric / 1000), clock_timestamp());
        end if;
        loop
            -- Fast path: nearly all writes are newer than the row and within the time limits. One update is enough for these. A read
            -- and a lock would be two more statements.
            if given.version between oldest and ((public.threadkeep_now() + 2001) << 21) - 1 then
                update public.conversation_threads as thread
                set version = given.version, accepted_versions = (given.version || thread.accepted_versions)[1:16],
                    changed_xid = pg_catalog.pg_current_xact_id(), conversation_data = coalesce(given.body -> 'value', 'null'),
                    expires_at = ends, accessed_at = now(), user_id = given.body ->> 'user',
                    metadata = coalesce(given.body -> 'metadata', '{}')
                where thread_id = given.key and version < given.version
                  and (given.if_version is null or version = given.if_version);
                if found then
                    results[given.ord] := '{"state": "stored"}';
                    exit;
                end if;
                -- Fast path for new keys: most of the other writes have neither a row nor a tombstone.
                if given.if_version is null then
                    insert into public.conversation_threads
                        (thread_id, version, accepted_versions, changed_xid, conversation_data, expires_at, user_id, metadata)
                    select given.key, given.version, array[given.version], pg_catalog.pg_current_xact_id(),
                           coalesce(given.body -> 'value', 'null'), ends, given.body ->> 'user', coalesce(given.body -> 'metadata', '{}')
                    where not exists (select from public.threadkeep_tombstones as kept where kept.thread_id = given.key)
                    on conflict (thread_id) do nothing;
                    if found then
                        results[given.ord] := '{"state": "stored"}';
                        fresh := fresh || given.key;
                        exit;
                    end if;
                end if;
            end if;
            -- Slow path: locks the row, or reads the tombstone, and decides (I9).
            with present as (
                select thread.version, thread.accepted_versions, true as is_row
                from public.conversation_threads as thread where thread.thread_id = given.key for no key update
            )
            select * into held from present
            union all
            select kept.version, kept.accepted_versions, false
            from public.threadkeep_tombstones as kept where kept.thread_id = given.key and not exists (select from present);
            verdict := case
                when given.version = any (held.accepted_versions) or given.version = held.version then 'stored'
                when (given.version >> 21) > public.threadkeep_now() + 2000 then 'version_in_future'
                when given.version < oldest then 'too_old'
                when given.if_version is not null and given.if_version <> coalesce(held.version, 0) then
                    case when given.is_retry and given.version < held.accepted_versions[16] then 'indeterminate'
                         else 'conflict' end
                when given.version < held.version then 'superseded'
            end;
            if verdict is null and held.is_row is not true then
                insert into public.conversation_threads
                    (thread_id, version, accepted_versions, changed_xid, conversation_data, expires_at, user_id, metadata)
                values (given.key, given.version, (given.version || held.accepted_versions)[1:16], pg_catalog.pg_current_xact_id(),
                        coalesce(given.body -> 'value', 'null'), ends, given.body ->> 'user', coalesce(given.body -> 'metadata', '{}'))
                on conflict (thread_id) do nothing;
                if found then
                    verdict := 'stored';
                    fresh := fresh || given.key;
                end if;
            end if;
            -- No verdict means that another transaction has inserted the row since the update. The loop runs once more.
            if verdict is not null then
                results[given.ord] := json_build_object('state', verdict, 'version', coalesce(held.version, 0)::text);
                exit;
            end if;
        end loop;
    end loop;
    verdict := set_config('threadkeep.applying', '', true);
    -- An insert may have waited for a transaction that created and deleted the same conversation. The tombstone of that transaction is
    -- visible now. If the tombstone is newer, the row becomes a tombstone. No reader has seen the row yet, so the change is safe.
    for gone in
        select kept.* from public.threadkeep_tombstones as kept
        join public.conversation_threads as thread on thread.thread_id = kept.thread_id and thread.version < kept.version
        where kept.thread_id = any (fresh)
    loop
        update public.conversation_threads as thread
        set version = gone.version, accepted_versions = gone.accepted_versions, changed_xid = pg_catalog.pg_current_xact_id(),
            conversation_data = 'null', expires_at = gone.removed_at, user_id = null, metadata = '{}'
        where thread.thread_id = gone.thread_id;
        for given in
            select one.ord, one.body ->> 'if_version' is not null as is_conditional
            from jsonb_array_elements(public.threadkeep_argument(writes)) with ordinality as one(body, ord)
            where one.body ->> 'key' = gone.thread_id and results[one.ord] ->> 'state' = 'stored'
              -- A version that the table accepted before the deletion stays accepted.
              and (one.body ->> 'version')::bigint <> all (gone.accepted_versions)
        loop
            results[given.ord] := json_build_object('state', case when given.is_conditional then 'conflict' else 'superseded' end,
                                                    'version', gone.version::text);
        end loop;
    end loop;
    return json_build_object('now', public.threadkeep_now(), 'revision', 2,
                             'rows', coalesce(array_to_json(results), '[]'));
end $$;

-- Lists the newest live conversations. request: {"limit", "user"?, "after_version"? and "after_key"?}.
--
-- With `user`, the list contains the conversations of this user only. A page begins after (after_version, after_key). A page has at
-- most `limit` rows and about 16 MiB. `is_last` is true if no row follows.
create or replace function public.threadkeep_list(request jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' as $$
declare
    asked     jsonb  := public.threadkeep_argument(request);
    whose     text   := asked ->> 'user';
    max_rows  bigint := (asked ->> 'limit')::bigint;
    below     bigint := coalesce((asked ->> 'after_version')::bigint, 9223372036854775807);
    below_key text   := coalesce(asked ->> 'after_key', '');
    present   timestamptz := clock_timestamp();
    picked    uuid;
    one       public.conversation_threads;
    body      text;
    bytes     bigint  := 0;
    sent      integer := 0;
    found_rows json[];
    is_last   boolean := true;
begin
    -- The loop picks ids first, because values may be large. It picks one id more than the limit, to set is_last. EXECUTE gives each
    -- page a plan of its own, with or without a user. The select in the loop keeps one plan for the session.
    for picked in execute $pick$
        select thread.id from public.conversation_threads as thread
        where thread.expires_at > $1
          and ($2 is null or thread.user_id = $2)
          and (thread.version, thread.thread_id collate "C") < ($3, $4)
          -- The condition skips plain rows with ids that threadkeep does not support. The CASE is a hint for the planner: PostgreSQL
          -- estimates that most rows pass it. For a plain comparison PostgreSQL estimates one row in 200, and then sorts the whole
          -- table instead of reading the index.
          and case when octet_length(thread.thread_id) between 1 and 512 then true end is not null
        order by thread.version desc, thread.thread_id collate "C" desc
        limit $5 $pick$
        using present, whose, below, below_key, max_rows + 1
    loop
        if sent = max_rows or bytes >= 16 * 1024 * 1024 then
            is_last := false;
            exit;
        end if;
        select * into one from public.conversation_threads as thread
        where thread.id = picked and thread.expires_at > present and (whose is null or thread.user_id = whose);
        -- Another transaction may have removed the row since the loop picked its id.
        continue when not found;
        body := one.conversation_data::text;
        bytes := bytes + octet_length(body);
        sent := sent + 1;
        found_rows[sent] := public.threadkeep_row(one, body);
    end loop;
    return json_build_object('now', floor(extract(epoch from present) * 1000)::bigint, 'revision', 2,
                             'rows', coalesce(array_to_json(found_rows), '[]'), 'is_last', is_last);
end $$;

-- Marks conversations as accessed. The function skips locked rows: their writers set accessed_at anyway.
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
    return json_build_object('now', public.threadkeep_now(), 'revision', 2, 'count', touched);
end $$;

-- Removes up to `max_rows` rows and tombstones whose expiry and version are both older than 8 days. threadkeep_apply rejects writes
-- that are more than 7 days late, so no accepted write can bring back a removed conversation (I13).
create or replace function public.threadkeep_purge(max_rows integer) returns json
    language plpgsql volatile security invoker set search_path = '' as $$
declare
    past      bigint := (public.threadkeep_now() - 8 * 86400000::bigint) << 21;
    removed   integer;
    forgotten integer;
begin
    delete from public.conversation_threads
    where id in (
        select thread.id from public.conversation_threads as thread
        where thread.expires_at < now() - interval '8 days'
          and thread.version < past
        -- The order follows the index. The delete skips locked rows and never waits, so it needs no lock order.
        order by thread.expires_at
        limit max_rows
        for update skip locked
    );
    get diagnostics removed = row_count;
    delete from public.threadkeep_tombstones
    where thread_id in (
        select gone.thread_id from public.threadkeep_tombstones as gone
        where gone.removed_at < now() - interval '8 days'
          and gone.version < past
        order by gone.removed_at
        limit max_rows - removed
        for update skip locked
    );
    get diagnostics forgotten = row_count;
    return json_build_object('now', public.threadkeep_now(), 'revision', 2, 'count', removed + forgotten);
end $$;

-- Checks that the database accepts writes, and returns its clock and the revision of the functions.
--
-- The function writes a row through all triggers of the table and undoes the write. It ignores the errors of constraints and triggers
-- that reject this row, for example because it has no user: such an error shows nothing about other writes.
create or replace function public.threadkeep_probe() returns json
    language plpgsql volatile security invoker set search_path = '' set lock_timeout = '2s' as $$
declare
    probe text := 'threadkeep_probe ' || gen_random_uuid();
begin
    begin
        insert into public.conversation_threads (thread_id, conversation_data, expires_at)
        values (probe, '{}', now() + interval '1 minute');
        update public.conversation_threads set conversation_data = '[]' where thread_id = probe;
        raise exception using errcode = 'TK001';
    exception when sqlstate 'TK001' or integrity_constraint_violation or data_exception or plpgsql_error then
        null;
    end;
    return json_build_object('now', public.threadkeep_now(), 'revision', 2);
end $$;

-- Sets the rights. Only the secret key (role service_role) may use the tables and functions. New Supabase projects grant no table
-- rights by default, but PostgreSQL lets every role execute a new function. No role may execute the SECURITY DEFINER functions,
-- because only triggers need them.
do $$
declare
    everybody text[] := array(select quote_ident(rolname) from pg_catalog.pg_roles where rolname in ('anon', 'authenticated'))
                        || 'public'::text;
    is_there  boolean := exists (select from pg_catalog.pg_roles where rolname = 'service_role');
    one       record;
begin
    for one in
        select p.oid::regprocedure as name, p.prosecdef from pg_catalog.pg_proc as p
        where p.pronamespace = 'public'::regnamespace
          and (p.proname like 'threadkeep\_%' or p.proname in ('threadkeep_keep_tombstone', 'threadkeep_keep_tombstones'))
    loop
        execute format('revoke all on function %s from %s', one.name, array_to_string(everybody, ', '));
        if is_there and one.prosecdef then
            execute format('revoke all on function %s from service_role', one.name);
        elsif is_there then
            execute format('grant execute on function %s to service_role', one.name);
        end if;
    end loop;
    execute format('revoke all on table public.conversation_threads, public.threadkeep_tombstones from %s', array_to_string(everybody, ', '));
    if is_there then
        grant select, insert, update, delete on table public.conversation_threads to service_role;
        grant select, update, delete on table public.threadkeep_tombstones to service_role;
    end if;
end $$;

-- Adds the comments of tables and columns. A COMMENT statement waits for a running vacuum, so the block adds only missing comments.
do $$
declare
    one record;
begin
    for one in
        select * from (values
            ('conversation_threads', '', 'Conversations, one row for each thread. Rows may be written by plain SQL; threadkeep writes them by threadkeep_apply.'),
            ('conversation_threads', 'id', 'The primary key; a thread that is created again gets another one.'),
            ('conversation_threads', 'thread_id', 'The name of the conversation; unique.'),
            ('conversation_threads', 'user_id', 'Whose conversation it is, if anybody''s.'),
            ('conversation_threads', 'conversation_data', 'The conversation, as JSON; null in a tombstone.'),
            ('conversation_threads', 'created_at', 'When the row was inserted.'),
            ('conversation_threads', 'accessed_at', 'When the conversation was last read or written, to within minutes.'),
            ('conversation_threads', 'expires_at', 'From then on the conversation is absent; the row goes 8 days later.'),
            ('conversation_threads', 'metadata', 'What else the daemon keeps with the conversation.'),
            ('conversation_threads', 'version', 'Orders writes: milliseconds since the epoch << 21, and 21 bits more. A trigger gives plain writes one.'),
            ('conversation_threads', 'accepted_versions', 'The last 16 versions that were accepted, newest first: a write that comes again is recognised.'),
            ('conversation_threads', 'changed_xid', 'The transaction that changed the row last.'),
            ('threadkeep_tombstones', '', 'Tombstones of conversations that plain statements deleted, for 8 days: no late write brings these back.'),
            ('threadkeep_tombstones', 'thread_id', 'The name of the conversation.'),
            ('threadkeep_tombstones', 'version', 'The version of the deletion; of an expired row, its own.'),
            ('threadkeep_tombstones', 'accepted_versions', 'As in conversation_threads.'),
            ('threadkeep_tombstones', 'removed_at', 'When the conversation was deleted or had expired.')) as wanted (relation, part, meaning)
    loop
        if one.part = '' and obj_description(to_regclass('public.' || one.relation), 'pg_class') is distinct from one.meaning then
            execute format('comment on table public.%I is %L', one.relation, one.meaning);
        elsif one.part <> '' and one.meaning is distinct from (
            select col_description(attrelid, attnum) from pg_catalog.pg_attribute
            where attrelid = to_regclass('public.' || one.relation) and attname = one.part) then
            execute format('comment on column public.%I.%I is %L', one.relation, one.part, one.meaning);
        end if;
    end loop;
end $$;

comment on function public.threadkeep_set_version() is 'Trigger: gives plain inserts and updates a version.';
comment on function public.threadkeep_tombstone_of(public.conversation_threads, timestamptz) is 'The tombstone of a row that a plain statement removes.';
comment on function public.threadkeep_keep_tombstone() is 'Trigger: keeps the tombstone of a deleted row, and puts a row that is created again above it.';
comment on function public.threadkeep_keep_tombstones() is 'Trigger: keeps the tombstones of a truncated table.';
comment on function public.threadkeep_now() is 'The database''s clock, in milliseconds since the epoch.';
comment on function public.threadkeep_argument(jsonb) is 'Unwraps an argument that a server passed as a JSON string of itself.';
comment on function public.threadkeep_row(public.conversation_threads, text) is 'A row as the functions return it.';
comment on function public.threadkeep_load(jsonb) is 'threadkeep: reads conversations by their ids.';
comment on function public.threadkeep_apply(jsonb) is 'threadkeep: writes and deletes conversations; the newest wins.';
comment on function public.threadkeep_list(jsonb) is 'threadkeep: a page of the newest live conversations, of all or of one user.';
comment on function public.threadkeep_touch(jsonb) is 'threadkeep: marks conversations as accessed.';
comment on function public.threadkeep_purge(integer) is 'threadkeep: forgets what has been expired or deleted for 8 days.';
comment on function public.threadkeep_probe() is 'threadkeep: the database''s clock, the revision of these functions, and a write that is undone.';

-- Makes PostgREST reload its cached schema, so that it finds the functions.
notify pgrst, 'reload schema';
reset lock_timeout;
