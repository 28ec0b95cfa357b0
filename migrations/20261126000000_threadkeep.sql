-- threadkeep's part of the schema: versions, tombstones, and the functions through which threadkeep reads and writes. Daemons that
-- write plain rows may go on beside it.
--
-- A version is a hybrid logical clock: milliseconds since the epoch << 21, then 21 bits that order writes within a millisecond.
-- A tombstone is the record of a deletion, with a version. A remove by threadkeep keeps its tombstone in the table, as an expired row
-- with the value 'null'. A plain DELETE leaves its tombstone in threadkeep_deleted.
--
-- The file can be applied again. It then takes no lock that readers or writers notice. The revision of the schema is 2: the functions
-- below return it, so that a client knows whether this file was applied.

set lock_timeout = '1s';

-- Compares the table with the plan before anything is changed.
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
        -- Constraints and triggers of others may refuse what threadkeep writes. The trial is undone in any case.
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

create table if not exists public.threadkeep_deleted (
    thread_id         text        primary key,
    version           bigint      not null,
    accepted_versions bigint[]    not null,
    removed_at        timestamptz not null
);

-- The trigger functions come before the triggers.

-- Gives a version to rows that others write with plain statements, and marks the change with its transaction. A statement of
-- threadkeep brings all that and is let through. A change of accessed_at alone raises neither version nor mark.
create or replace function public.threadkeep_stamp() returns trigger
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
    -- Not by threadkeep_now(): a role that may write the table need not be allowed to call the functions.
    present := floor(extract(epoch from clock_timestamp()) * 1000)::bigint;
    if tg_op = 'UPDATE' then
        -- The value last, for it may be large.
        if (new.version, new.thread_id, new.user_id, new.created_at, new.expires_at, new.metadata, new.conversation_data)
           is not distinct from
           (old.version, old.thread_id, old.user_id, old.created_at, old.expires_at, old.metadata, old.conversation_data)
        then
            return new;
        end if;
    end if;
    -- Under another id it is another conversation.
    if tg_op = 'UPDATE' and new.thread_id = old.thread_id then
        new.accepted_versions := old.accepted_versions;
    else
        new.accepted_versions := '{}';
    end if;
    -- A version that did not rise was not given by threadkeep. One beyond the horizon would block every later edit.
    if new.version <= before or new.version >> 21 > present + 2000 then
        new.version := greatest(before + 1, present << 21);
    end if;
    new.accepted_versions := (new.version || new.accepted_versions)[1:16];
    new.changed_xid := pg_catalog.pg_current_xact_id();
    return new;
end $$;

-- The tombstone of a row that a plain statement removes at `present`. A live row is removed now. An expired row, and so a tombstone,
-- was removed at its expiry: it keeps its version, so that the plain DELETE changes nothing for clients.
create or replace function public.threadkeep_tombstone(one public.conversation_threads, present timestamptz)
    returns public.threadkeep_deleted
    language plpgsql immutable security invoker set search_path = '' as $$
declare
    millis bigint := floor(extract(epoch from present) * 1000)::bigint;
    gone   public.threadkeep_deleted;
begin
    gone.thread_id := one.thread_id;
    -- A version more than a day ahead is not kept, so that a DELETE of such a row mends the thread.
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

-- Keeps tombstones of what plain statements remove, and gives what they create again a version above its tombstone.
--
-- SECURITY DEFINER, because any role that may write the table must still be able to, and no such role needs rights on
-- threadkeep_deleted. Nobody may execute the function but as a trigger, and it takes no name and no code from the caller.
--
-- The order of locks is the row, then its tombstone. A tombstone is locked only by the transaction that removed the row and by the
-- purge, which waits for nobody. So the function adds no deadlock.
create or replace function public.conversation_threads_remember() returns trigger
    language plpgsql security definer set search_path = '' as $$
declare
    tombstone public.threadkeep_deleted;
    last      bigint;
    accepted  bigint[];
begin
    if tg_op = 'INSERT' and current_setting('threadkeep.applying', true) = 'yes' then
        -- threadkeep_apply looks itself.
        return null;
    end if;
    if tg_op in ('DELETE', 'UPDATE') then
        insert into public.threadkeep_deleted as kept
        select gone.* from public.threadkeep_tombstone(old, clock_timestamp()) as gone
        on conflict (thread_id) do update
        set version = excluded.version, accepted_versions = excluded.accepted_versions, removed_at = excluded.removed_at
        where kept.version < excluded.version;
    end if;
    if tg_op in ('INSERT', 'UPDATE') then
        -- After the row is there: until then, another transaction could have deleted it.
        select * into tombstone from public.threadkeep_deleted as gone where gone.thread_id = new.thread_id;
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

-- The same for TRUNCATE, which locks the table as a whole.
create or replace function public.conversation_threads_remember_all() returns trigger
    language plpgsql security definer set search_path = '' as $$
begin
    insert into public.threadkeep_deleted as kept
    select gone.* from public.conversation_threads as thread, public.threadkeep_tombstone(thread, clock_timestamp()) as gone
    where thread.expires_at > clock_timestamp() - interval '8 days'
       or thread.version >> 21 > extract(epoch from clock_timestamp() - interval '8 days') * 1000
    on conflict (thread_id) do update
    set version = excluded.version, accepted_versions = excluded.accepted_versions, removed_at = excluded.removed_at
    where kept.version < excluded.version;
    return null;
end $$;

-- Brings tables, indexes, policies and triggers to what they should be. Looks into the catalog first, and locks the table only if
-- something is to be changed: then first of all and as a whole, because a lesser lock that grows can deadlock.
do $$
declare
    threads constant regclass := 'public.conversation_threads';
    todo    text[] := '{}';
    one     record;
    step    text;
    roles   text;
begin
    -- The default is evaluated once, so existing rows get a version without the table being rewritten.
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

    -- Room on each page keeps touches of accessed_at inside it (heap-only tuples).
    if not coalesce('fillfactor=85' = any ((select reloptions from pg_catalog.pg_class where oid = threads)::text[]), false) then
        todo := todo || 'alter table public.conversation_threads set (fillfactor = 85)'::text;
    end if;

    -- lz4 makes an append to a large document several times cheaper than pglz. Not every server is built with it.
    if exists (select from pg_catalog.pg_settings where name = 'default_toast_compression' and 'lz4' = any (enumvals)) then
        -- A server without that setting has no such column, either.
        if exists (select from pg_catalog.pg_attribute
                   where attrelid = threads and attname = 'conversation_data' and attcompression <> 'l') then
            todo := todo || 'alter table public.conversation_threads alter column conversation_data set compression lz4'::text;
        end if;
    end if;

    -- An index costs every write, so only those stay that a read needs: the unique one on thread_id (all calls), expires_at (purge),
    -- newest (warm-up) and newest_of_user (listings). The unique index serves what a second index on thread_id would, and
    -- newest_of_user what one on user_id would. Of several on expires_at one stays. Indexes with conditions, expressions or more
    -- columns are of others, and stay.
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
        -- An index that `create index concurrently` left behind half made serves nobody.
        if not one.indisvalid then
            todo := todo || format('drop index public.%I', one.name);
        end if;
        if one.indisvalid is not true then
            todo := todo || format('create index %I on public.conversation_threads (%s)', one.name, one.columns);
        end if;
    end loop;
    if to_regclass('public.threadkeep_deleted_removed_at') is null then
        todo := todo || 'create index threadkeep_deleted_removed_at on public.threadkeep_deleted (removed_at)'::text;
    end if;

    -- Row level security keeps out whoever holds the public key. The policy says so again, also if another policy lets somebody in.
    select string_agg(quote_ident(rolname), ', ') into roles from pg_catalog.pg_roles where rolname in ('anon', 'authenticated');
    for one in
        select c.oid, c.oid::regclass as name, c.relrowsecurity from pg_catalog.pg_class as c
        where c.oid in (threads, 'public.threadkeep_deleted'::regclass)
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

    -- The comment of a trigger tells whether it is the one of this file. The two triggers that threadkeep_apply meets have no WHEN:
    -- PostgreSQL would parse the condition once for each statement, which costs more than their functions' first line.
    for one in
        select * from (values
            ('threadkeep_stamp',
             'before insert or update of id, thread_id, user_id, conversation_data, created_at, expires_at, metadata, version, accepted_versions, changed_xid
              on public.conversation_threads for each row execute function public.threadkeep_stamp()',
             'threadkeep, revision 2: plain writes get a version'),
            ('threadkeep_remember_insert',
             'after insert on public.conversation_threads for each row execute function public.conversation_threads_remember()',
             'threadkeep, revision 2: what is created again gets a version above its tombstone'),
            ('threadkeep_remember_rename',
             'after update of thread_id on public.conversation_threads for each row when (old.thread_id is distinct from new.thread_id)
              execute function public.conversation_threads_remember()',
             'threadkeep, revision 2: a change of thread_id is a delete and an insert'),
            -- The purge removes only rows that are older than the condition: these need no tombstone, because a write may be
            -- late by 7 days at most.
            ('threadkeep_remember_delete',
             'after delete on public.conversation_threads for each row when (
                  old.expires_at > clock_timestamp() - interval ''8 days''
                  or old.version >> 21 > extract(epoch from clock_timestamp() - interval ''8 days'') * 1000)
              execute function public.conversation_threads_remember()',
             'threadkeep, revision 2: a plain delete leaves a tombstone'),
            ('threadkeep_remember_truncate',
             'before truncate on public.conversation_threads execute function public.conversation_threads_remember_all()',
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

    if todo = '{}' then
        return;
    end if;
    -- Callers queue behind the wait for this lock, so each wait is short, and callers go on between two of them.
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

-- The database's clock in milliseconds. The lowest version of a millisecond is that << 21.
create or replace function public.threadkeep_now() returns bigint
    language plpgsql volatile security invoker set search_path = ''
    as $$ begin return floor(extract(epoch from clock_timestamp()) * 1000)::bigint; end $$;

-- Some servers hand a jsonb argument over as a JSON string of itself.
create or replace function public.threadkeep_argument(given jsonb) returns jsonb
    language plpgsql immutable security invoker set search_path = ''
    as $$ begin return case jsonb_typeof(given) when 'string' then (given #>> '{}')::jsonb else given end; end $$;

-- One row as it travels.
create or replace function public.threadkeep_row(one public.conversation_threads, body text) returns json
    language sql stable security invoker set search_path = ''
    as $$ select json_build_object(
        'state', 'found', 'key', one.thread_id, 'version', one.version::text,
        -- Others may have written 'infinity', which no number of milliseconds can say.
        'expires', floor(extract(epoch from least(one.expires_at, '9999-12-31')) * 1000)::bigint,
        'user', one.user_id, 'metadata', one.metadata, 'value', body::json) $$;

-- wants: [{"key": …, "known": "version"?}, …]. Answers in the order asked, each with a state: found | same | absent |
-- later (the answer has grown to 16 MiB: ask again for these). An absence has the version of its tombstone.
create or replace function public.threadkeep_load(wants jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' as $$
begin
    return (with clock as materialized (
        select clock_timestamp() as now
    ), asked as (
        select want.ord, want.one ->> 'key' as key, (want.one ->> 'known')::bigint as known
        from jsonb_array_elements(public.threadkeep_argument(wants)) with ordinality as want(one, ord)
    ), matched as (
        -- Column by column: a row as a whole would be read with its value, wanted or not.
        select asked.ord, asked.key, asked.known, thread.thread_id, thread.conversation_data, thread.expires_at, thread.user_id,
               thread.metadata, thread.version,
               coalesce(thread.expires_at > clock.now, false) as live, count(*) over () = 1 as alone
        from asked cross join clock
        left join public.conversation_threads as thread on thread.thread_id = asked.key
    ), wanted as (
        -- What is known, or lies beyond 16 MiB as it is stored, is not even read.
        select matched.*, live and version is distinct from known as is_wanted,
               sum(case when live and version is distinct from known then pg_column_size(conversation_data) end)
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
        'schema', 2,
        'rows', coalesce(json_agg(
            case when not live      then json_build_object('state', 'absent', 'version', coalesce(version,
                     -- Looked up only for threads without a row.
                     (select gone.version from public.threadkeep_deleted as gone where gone.thread_id = key), 0)::text)
                 when not is_wanted then json_build_object('state', 'same')
                 when bytes is null or before >= 16 * 1024 * 1024 then json_build_object('state', 'later')
                 else json_build_object(
                     'state', 'found', 'key', thread_id, 'version', version::text,
                     -- Others may have written 'infinity', which no number of milliseconds can say.
                     'expires', floor(extract(epoch from least(expires_at, '9999-12-31')) * 1000)::bigint,
                     'user', user_id, 'metadata', metadata, 'value', conversation_data) end), '[]'))
    from (select * from sized order by ord) as sorted);
end $$;

-- records: [{"key", "version", "expires": ms, "user"?, "metadata"?, "value"?, "expect"?: version, "again"?: true}, …];
-- a record without a value is a deletion. Writes each record that is newer than the row or its tombstone (with `expect`: only over
-- that version) and answers in the order given: stored | superseded | conflict | forgotten (a conflict of a write that comes again
-- and may be among those accepted before the 16 remembered) | ahead | too old. If others keep a row locked for 2 s, the call fails
-- as a whole, so that one row does not hold up all callers.
create or replace function public.threadkeep_apply(records jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' set lock_timeout = '2s' as $$
declare
    oldest  bigint := (public.threadkeep_now() - 7 * 86400000::bigint) << 21;
    given   record;
    held    record;
    gone    public.threadkeep_deleted;
    ends    timestamptz;
    verdict text;
    fresh   text[];
    results json[];
begin
    -- The inserts of this function look at tombstones themselves.
    verdict := set_config('threadkeep.applying', 'yes', true);
    -- One order of locks everywhere, and two writes of one key in the order given.
    for given in
        select one.ord, one.body, one.body ->> 'key' as key, (one.body ->> 'version')::bigint as version,
               (one.body ->> 'expect')::bigint as expect, (one.body ->> 'again')::boolean as again
        from jsonb_array_elements(public.threadkeep_argument(records)) with ordinality as one(body, ord)
        order by one.body ->> 'key' collate "C", one.ord
    loop
        if given.version is null then
            raise exception 'a record without a version' using errcode = 'not_null_violation';
        end if;
        if given.body ? 'value' then
            ends := to_timestamp((given.body ->> 'expires')::numeric / 1000);
        else
            ends := least(to_timestamp((given.version >> 21)::numeric / 1000), clock_timestamp());
        end if;
        loop
            -- Nearly all are newer than the row, and in their time: one statement, where a look and a lock are two more.
            if given.version between oldest and ((public.threadkeep_now() + 2001) << 21) - 1 then
                update public.conversation_threads as thread
                set version = given.version, accepted_versions = (given.version || thread.accepted_versions)[1:16],
                    changed_xid = pg_catalog.pg_current_xact_id(), conversation_data = coalesce(given.body -> 'value', 'null'),
                    expires_at = ends, accessed_at = now(), user_id = given.body ->> 'user',
                    metadata = coalesce(given.body -> 'metadata', '{}')
                where thread_id = given.key and version < given.version
                  and (given.expect is null or version = given.expect);
                if found then
                    results[given.ord] := '{"state": "stored"}';
                    exit;
                end if;
                -- Most of the others are new.
                if given.expect is null then
                    insert into public.conversation_threads
                        (thread_id, version, accepted_versions, changed_xid, conversation_data, expires_at, user_id, metadata)
                    select given.key, given.version, array[given.version], pg_catalog.pg_current_xact_id(),
                           coalesce(given.body -> 'value', 'null'), ends, given.body ->> 'user', coalesce(given.body -> 'metadata', '{}')
                    where not exists (select from public.threadkeep_deleted as kept where kept.thread_id = given.key)
                    on conflict (thread_id) do nothing;
                    if found then
                        results[given.ord] := '{"state": "stored"}';
                        fresh := fresh || given.key;
                        exit;
                    end if;
                end if;
            end if;
            with present as (
                select thread.version, thread.accepted_versions, true as is_row
                from public.conversation_threads as thread where thread.thread_id = given.key for no key update
            )
            select * into held from present
            union all
            select kept.version, kept.accepted_versions, false
            from public.threadkeep_deleted as kept where kept.thread_id = given.key and not exists (select from present);
            verdict := case
                when given.version = any (held.accepted_versions) or given.version = held.version then 'stored'
                when (given.version >> 21) > public.threadkeep_now() + 2000 then 'ahead'
                when given.version < oldest then 'too old'
                when given.expect is not null and given.expect <> coalesce(held.version, 0) then
                    case when given.again and given.version < held.accepted_versions[16] then 'forgotten'
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
            -- Without a verdict, another transaction has inserted the row since the update: once more.
            if verdict is not null then
                results[given.ord] := json_build_object('state', verdict, 'version', coalesce(held.version, 0)::text);
                exit;
            end if;
        end loop;
    end loop;
    verdict := set_config('threadkeep.applying', '', true);
    -- An insert may have waited for others who created and deleted the thread meanwhile. Their tombstone is seen now. If it is newer,
    -- the row becomes that tombstone: nobody has seen it yet.
    for gone in
        select kept.* from public.threadkeep_deleted as kept
        join public.conversation_threads as thread on thread.thread_id = kept.thread_id and thread.version < kept.version
        where kept.thread_id = any (fresh)
    loop
        update public.conversation_threads as thread
        set version = gone.version, accepted_versions = gone.accepted_versions, changed_xid = pg_catalog.pg_current_xact_id(),
            conversation_data = 'null', expires_at = gone.removed_at, user_id = null, metadata = '{}'
        where thread.thread_id = gone.thread_id;
        for given in
            select one.ord, one.body ->> 'expect' is not null as is_conditional
            from jsonb_array_elements(public.threadkeep_argument(records)) with ordinality as one(body, ord)
            where one.body ->> 'key' = gone.thread_id and results[one.ord] ->> 'state' = 'stored'
              -- What was accepted before the deletion stays so.
              and (one.body ->> 'version')::bigint <> all (gone.accepted_versions)
        loop
            results[given.ord] := json_build_object('state', case when given.is_conditional then 'conflict' else 'superseded' end,
                                                    'version', gone.version::text);
        end loop;
    end loop;
    return json_build_object('now', public.threadkeep_now(), 'schema', 2,
                             'rows', coalesce(array_to_json(results), '[]'));
end $$;

-- page: {"most", "user"?, "version"? and "key"?}. The newest live threads, of one user if one is named, before a given
-- (version, key): at most `most` rows and about 16 MiB, and whether these are the `last`.
create or replace function public.threadkeep_recent(page jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' as $$
declare
    asked     jsonb  := public.threadkeep_argument(page);
    whose     text   := asked ->> 'user';
    most      bigint := (asked ->> 'most')::bigint;
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
    -- Ids first, for values may be large; one more than asked tells whether there are more. Executed, to be planned for this
    -- very page, with or without a user; what reads the threads is planned once for a session.
    for picked in execute $pick$
        select thread.id from public.conversation_threads as thread
        where thread.expires_at > $1
          and ($2 is null or thread.user_id = $2)
          and (thread.version, thread.thread_id collate "C") < ($3, $4)
          -- Others may have written ids that threadkeep cannot have. Asked so that PostgreSQL guesses that most rows hold it:
          -- of a plain comparison it guesses one in 200, and then reads and sorts the whole table rather than go by the index.
          and case when octet_length(thread.thread_id) between 1 and 512 then true end is not null
        order by thread.version desc, thread.thread_id collate "C" desc
        limit $5 $pick$
        using present, whose, below, below_key, most + 1
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
    return json_build_object('now', floor(extract(epoch from present) * 1000)::bigint, 'schema', 2,
                             'rows', coalesce(array_to_json(found_rows), '[]'), 'last', is_last);
end $$;

-- Marks threads as accessed. Passes over rows that somebody is writing: these are being accessed anyway.
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
    return json_build_object('now', public.threadkeep_now(), 'schema', 2, 'count', touched);
end $$;

-- Removes up to `most` rows and tombstones whose expiry and version are both older than 8 days: a day longer than a write may be
-- late, so that no late write meets a forgotten deletion.
create or replace function public.threadkeep_purge(most integer) returns json
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
        -- By the index; skipping what is locked, no order of locks is needed.
        order by thread.expires_at
        limit most
        for update skip locked
    );
    get diagnostics removed = row_count;
    delete from public.threadkeep_deleted
    where thread_id in (
        select gone.thread_id from public.threadkeep_deleted as gone
        where gone.removed_at < now() - interval '8 days'
          and gone.version < past
        order by gone.removed_at
        limit most - removed
        for update skip locked
    );
    get diagnostics forgotten = row_count;
    return json_build_object('now', public.threadkeep_now(), 'schema', 2, 'count', removed + forgotten);
end $$;

-- Tells that the database is there and takes writes, what its clock says, and which revision its functions have. The write goes
-- through the table and all of its triggers, and is undone. A constraint or a trigger that wants more of a row than this one has, such as
-- a user, shows nothing about other writes.
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
    return json_build_object('now', public.threadkeep_now(), 'schema', 2);
end $$;

-- Since 2026 Supabase grants nothing by itself, and PostgreSQL lets everybody execute a new function. Only the secret (service_role)
-- key may use any of this. Nobody may execute the SECURITY DEFINER functions, which only triggers need.
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
          and (p.proname like 'threadkeep\_%' or p.proname in ('conversation_threads_remember', 'conversation_threads_remember_all'))
    loop
        execute format('revoke all on function %s from %s', one.name, array_to_string(everybody, ', '));
        if is_there and one.prosecdef then
            execute format('revoke all on function %s from service_role', one.name);
        elsif is_there then
            execute format('grant execute on function %s to service_role', one.name);
        end if;
    end loop;
    execute format('revoke all on table public.conversation_threads, public.threadkeep_deleted from %s', array_to_string(everybody, ', '));
    if is_there then
        grant select, insert, update, delete on table public.conversation_threads to service_role;
        grant select, update, delete on table public.threadkeep_deleted to service_role;
    end if;
end $$;

-- Comments wait for a vacuum, so each is made only if it is not there yet.
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
            ('threadkeep_deleted', '', 'Tombstones of conversations that plain statements deleted, for 8 days: no late write brings these back.'),
            ('threadkeep_deleted', 'thread_id', 'The name of the conversation.'),
            ('threadkeep_deleted', 'version', 'The version of the deletion; of an expired row, its own.'),
            ('threadkeep_deleted', 'accepted_versions', 'As in conversation_threads.'),
            ('threadkeep_deleted', 'removed_at', 'When the conversation was deleted or had expired.')) as wanted (relation, part, meaning)
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

comment on function public.threadkeep_stamp() is 'Trigger: gives plain inserts and updates a version.';
comment on function public.threadkeep_tombstone(public.conversation_threads, timestamptz) is 'The tombstone of a row that a plain statement removes.';
comment on function public.conversation_threads_remember() is 'Trigger: keeps the tombstone of a deleted row, and puts a row that is created again above it.';
comment on function public.conversation_threads_remember_all() is 'Trigger: keeps the tombstones of a truncated table.';
comment on function public.threadkeep_now() is 'The database''s clock, in milliseconds since the epoch.';
comment on function public.threadkeep_argument(jsonb) is 'Unwraps an argument that a server passed as a JSON string of itself.';
comment on function public.threadkeep_row(public.conversation_threads, text) is 'A row as the functions return it.';
comment on function public.threadkeep_load(jsonb) is 'threadkeep: reads conversations by their ids.';
comment on function public.threadkeep_apply(jsonb) is 'threadkeep: writes and deletes conversations; the newest wins.';
comment on function public.threadkeep_recent(jsonb) is 'threadkeep: a page of the newest live conversations, of all or of one user.';
comment on function public.threadkeep_touch(jsonb) is 'threadkeep: marks conversations as accessed.';
comment on function public.threadkeep_purge(integer) is 'threadkeep: forgets what has been expired or deleted for 8 days.';
comment on function public.threadkeep_probe() is 'threadkeep: the database''s clock, the revision of these functions, and a write that is undone.';

-- PostgREST keeps a cache of the schema.
notify pgrst, 'reload schema';
reset lock_timeout;
