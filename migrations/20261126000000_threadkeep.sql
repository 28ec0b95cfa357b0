-- Adds threadkeep's part of the schema: versions, writers, tombstones, and the functions that threadkeep calls. Other daemons may
-- continue to write plain rows.
--
-- A version is a value of a hybrid logical clock: milliseconds since the epoch << 21, plus 21 bits that order writes within a
-- millisecond. The upper bits of a writer (writer >> 24) name a daemon. Zero is no daemon.
--
-- A tombstone is the record of a deletion, with a version. A remove by threadkeep keeps its tombstone in the table, as an expired row
-- with the value 'null'. A plain DELETE leaves its tombstone in threadkeep_tombstones.
--
-- The file can be applied again. The second time it takes no lock that blocks readers or writers. The revision of the schema is 4.
-- The functions below return the revision, so that a client can detect a missing migration.
--
-- Why does the contract live in SQL functions? One call carries many records, and each record needs a compare and a write under one
-- row lock. `decide` in src/store/decide.rs is the definition of the rules. tests/migrations compares threadkeep_apply with it.

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
    elsif kind <> 'r' and not exists (
        -- The table of optional/20261127000000_hash_partitions.sql.
        select from pg_catalog.pg_partitioned_table as p
        join pg_catalog.pg_attribute as a on a.attrelid = p.partrelid and a.attname = 'thread_id' and p.partattrs::text = a.attnum::text
        where p.partrelid = 'public.conversation_threads'::regclass and p.partstrat = 'h') then
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
        ('changed_xid',       'xid8',                     false, ''),
        ('base_version',      'bigint',                   false, ''),
        ('last_writer',       'bigint',                   false, ''),
        ('run_began',         'bigint',                   false, '')
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
        -- PostgreSQL cannot keep a column unique over all partitions that does not choose the partition.
        from compared where (name = 'thread_id' or name = 'id' and kind = 'r') and not exists (
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
    thread_id   text        primary key,
    version     bigint      not null,
    removed_at  timestamptz not null,
    changed_xid xid8        not null default '0'
);

-- The versions by which threadkeep_apply recognises a repeated conditional write or append.
create table if not exists public.threadkeep_writers (
    thread_id text   not null,
    writer    bigint not null,
    version   bigint not null,
    primary key (thread_id, writer)
);

-- Drops the functions of earlier builds, which had other names and parameters. Functions of triggers follow below.
do $$
declare
    one record;
begin
    for one in
        select p.oid::regprocedure as name from pg_catalog.pg_proc as p
        where p.pronamespace = 'public'::regnamespace
          and (p.proname in ('threadkeep_row', 'threadkeep_tombstone_of')
               or p.proname in ('threadkeep_recent', 'threadkeep_load', 'threadkeep_apply', 'threadkeep_purge')
               and p.proargnames && '{wants,records,page,most}')
    loop
        execute format('drop function %s', one.name);
    end loop;
end $$;

-- Trigger functions. The triggers themselves follow after the table has its columns.

-- Stamps the row of a plain write: gives it a higher version, and ends the run of the last daemon.
create or replace function public.threadkeep_set_version() returns trigger
    language plpgsql security invoker set search_path = '' as $$
declare
    -- threadkeep_now() is not used here: a role with write access to the table may lack the right to call that function.
    present bigint := floor(extract(epoch from clock_timestamp()) * 1000)::bigint;
    before  bigint := 0;
begin
    if tg_op = 'UPDATE' then
        -- The comparison takes conversation_data last, because it may be large.
        if (new.version, new.thread_id, new.user_id, new.created_at, new.expires_at, new.metadata, new.conversation_data)
           is not distinct from
           (old.version, old.thread_id, old.user_id, old.created_at, old.expires_at, old.metadata, old.conversation_data)
        then
            return new;
        end if;
        before := old.version;
    end if;
    -- A version far in the future would block every later write. The versions of daemons are even, so an odd one meets none of them.
    if new.version <= before or new.version >> 21 > present + 2000 then
        new.version := greatest(before + 1, present << 21) | 1;
    end if;
    -- New metadata alone replaces no content, so late writes of content keep their chance.
    if tg_op = 'INSERT' or new.thread_id <> old.thread_id or new.expires_at < old.expires_at
       or new.conversation_data is distinct from old.conversation_data then
        new.base_version := new.version;
    end if;
    new.last_writer := 0;
    new.run_began := 0;
    new.changed_xid := pg_catalog.pg_current_xact_id();
    return new;
end $$;

-- Keeps a tombstone when a plain statement removes a row, and raises a new plain row above its tombstone (I13). A live row gets a
-- tombstone with a higher version. An expired row, also a tombstone, keeps its version, so that the plain DELETE changes nothing for
-- clients.
--
-- The function is SECURITY DEFINER, so that a role with write access to the table needs no rights on threadkeep_tombstones. The file
-- revokes the right to execute it from all roles, so only triggers run it. The function takes no name and no code from the caller.
--
-- The function locks the row first, then its tombstone. Only two transactions lock a tombstone: the transaction that removed the row,
-- and purge. Purge skips locked rows and never waits. So the function adds no deadlock.
create or replace function public.threadkeep_keep_tombstone() returns trigger
    language plpgsql security definer set search_path = '' as $$
declare
    present timestamptz := clock_timestamp();
    millis  bigint      := floor(extract(epoch from present) * 1000)::bigint;
begin
    if tg_op <> 'INSERT' then
        insert into public.threadkeep_tombstones as kept
        select gone.thread_id,
               case when gone.expires_at > present then greatest(gone.version + 1, millis << 21) | 1 else gone.version end,
               least(gone.expires_at, present), pg_catalog.pg_current_xact_id()
        from (
            -- The cap lets a DELETE repair a conversation with a version that is more than a day ahead.
            select removed.thread_id, least(removed.version, (millis + 86400000) << 21) as version, removed.expires_at
            from (select old.thread_id, old.version, old.expires_at where tg_op <> 'TRUNCATE'
                  union all
                  select thread.thread_id, thread.version, thread.expires_at from public.conversation_threads as thread
                  where tg_op = 'TRUNCATE'
                    and greatest(thread.expires_at, to_timestamp((thread.version >> 21)::numeric / 1000)) > present - interval '8 days') as removed
        ) as gone
        on conflict (thread_id) do update
        set version = excluded.version, removed_at = excluded.removed_at, changed_xid = excluded.changed_xid
        where kept.version < excluded.version;
    end if;
    if tg_op in ('INSERT', 'UPDATE') then
        -- The trigger runs after the insert. Before it, another transaction could still delete the old row and add a tombstone.
        perform set_config('threadkeep.applying', 'yes', true);
        update public.conversation_threads as thread
        set version = kept.version + 1 | 1, base_version = kept.version + 1 | 1, changed_xid = pg_catalog.pg_current_xact_id()
        from public.threadkeep_tombstones as kept
        where thread.thread_id = new.thread_id and kept.thread_id = new.thread_id and kept.version >= thread.version;
        perform set_config('threadkeep.applying', '', true);
    end if;
    return null;
end $$;

-- Updates columns, indexes, policies and triggers to this revision. The block reads the catalog first and collects the missing
-- statements. If there are any, it takes the strongest lock of the table at once, because a weaker lock that grows can deadlock.
do $$
declare
    threads constant regclass := 'public.conversation_threads';
    -- The table and its partitions, if it has any.
    all_parts constant regclass[] := array(
        select threads union all
        select i.inhrelid from pg_catalog.pg_inherits as i join pg_catalog.pg_class as c on c.oid = i.inhrelid and c.relispartition
        where i.inhparent = threads);
    todo    text[] := '{}';
    one     record;
    step    text;
    roles   text;
begin
    -- PostgreSQL evaluates this default once, so existing rows get a version without a rewrite of the table. Existing rows have no
    -- base_version: their version counts.
    for one in
        select * from (values
            ('version', 'bigint not null default ((extract(epoch from now()) * 1000)::bigint << 21)'),
            ('changed_xid', 'xid8 not null default ''0'''),
            ('base_version', 'bigint'),
            ('last_writer', 'bigint not null default 0'),
            ('run_began', 'bigint not null default 0')) as wanted (name, definition)
        where not exists (select from pg_catalog.pg_attribute where attrelid = threads and attname = name and not attisdropped)
    loop
        todo := todo || format('alter table public.conversation_threads add column %I %s', one.name, one.definition);
    end loop;
    if not exists (select from pg_catalog.pg_attribute where attrelid = 'public.threadkeep_tombstones'::regclass and attname = 'changed_xid') then
        todo := todo || 'alter table public.threadkeep_tombstones add column changed_xid xid8 not null default ''0'''::text;
    end if;
    if not exists (
        select from pg_catalog.pg_attrdef as d join pg_catalog.pg_attribute as a on a.attrelid = d.adrelid and a.attnum = d.adnum
        where d.adrelid = threads and a.attname = 'version' and pg_get_expr(d.adbin, d.adrelid) in ('0', '''0''::bigint')) then
        todo := todo || 'alter table public.conversation_threads alter column version set default 0'::text;
    end if;
    -- Earlier revisions remembered accepted versions. Their triggers depend on that column, so the triggers go first.
    for one in
        select tgname from pg_catalog.pg_trigger where tgrelid = threads and tgname in ('threadkeep_stamp', 'threadkeep_set_version')
    loop
        todo := todo || format('drop trigger %I on public.conversation_threads', one.tgname);
    end loop;
    for one in
        select attrelid::regclass as name from pg_catalog.pg_attribute
        where attrelid in (threads, 'public.threadkeep_tombstones'::regclass) and attname = 'accepted_versions' and not attisdropped
        order by attrelid <> threads
    loop
        todo := todo || format('alter table %s drop column accepted_versions', one.name);
    end loop;

    -- Free space on each page lets an update of accessed_at stay on its page (heap-only tuple), without new index entries.
    for one in
        select oid::regclass as name from pg_catalog.pg_class
        where oid = any (all_parts) and relkind = 'r' and not coalesce('fillfactor=85' = any (reloptions), false)
    loop
        todo := todo || format('alter table %s set (fillfactor = 85)', one.name);
    end loop;

    -- With lz4, an append to a large document is several times cheaper than with pglz. Some servers are built without lz4.
    if exists (select from pg_catalog.pg_settings where name = 'default_toast_compression' and 'lz4' = any (enumvals)) then
        -- A server without the setting also lacks the column attcompression, so the check is nested.
        for one in
            select attrelid::regclass as name from pg_catalog.pg_attribute
            where attrelid = any (all_parts) and attname = 'conversation_data' and attcompression <> 'l'
        loop
            todo := todo || format('alter table %s alter column conversation_data set compression lz4', one.name);
        end loop;
    end if;

    -- Each index slows every write, so only five stay: the unique index on thread_id (all calls), expires_at (purge), newest (warm-up),
    -- newest_of_user (lists) and changed (threadkeep_changes). The unique index makes a second index on thread_id redundant. newest_of_user makes an index on
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
                              ('conversation_threads_newest_of_user', 'user_id, version'),
                              ('conversation_threads_changed', 'changed_xid')) as wanted (name, columns)
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
    if to_regclass('public.threadkeep_tombstones_changed') is null then
        todo := todo || 'create index threadkeep_tombstones_changed on public.threadkeep_tombstones (changed_xid)'::text;
    end if;
    if to_regclass('public.threadkeep_writers_version') is null then
        todo := todo || 'create index threadkeep_writers_version on public.threadkeep_writers (version)'::text;
    end if;

    -- Row level security rejects the public keys. The restrictive policy rejects them even if another policy admits them.
    select string_agg(quote_ident(rolname), ', ') into roles from pg_catalog.pg_roles where rolname in ('anon', 'authenticated');
    for one in
        select c.oid, c.oid::regclass as name, c.relrowsecurity from pg_catalog.pg_class as c
        where c.oid in (threads, 'public.threadkeep_tombstones'::regclass, 'public.threadkeep_writers'::regclass)
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

    -- The comment of a trigger shows whether the trigger is of this revision. threadkeep_apply sets threadkeep.applying, so that no
    -- trigger function runs for its statements. PostgreSQL fires a trigger with a list of columns only if a statement names one of them,
    -- so an update of accessed_at alone fires none.
    for one in
        select * from (values
            ('threadkeep_version_on_insert',
             'before insert on public.conversation_threads for each row
              when (current_setting(''threadkeep.applying'', true) is distinct from ''yes'')
              execute function public.threadkeep_set_version()',
             'threadkeep, revision 4: plain inserts get a version'),
            ('threadkeep_version_on_update',
             'before update of id, thread_id, user_id, conversation_data, created_at, expires_at, metadata, version, changed_xid
              on public.conversation_threads for each row
              when (current_setting(''threadkeep.applying'', true) is distinct from ''yes'')
              execute function public.threadkeep_set_version()',
             'threadkeep, revision 4: plain updates get a version'),
            ('threadkeep_tombstone_on_insert',
             'after insert on public.conversation_threads for each row
              when (current_setting(''threadkeep.applying'', true) is distinct from ''yes'')
              execute function public.threadkeep_keep_tombstone()',
             'threadkeep, revision 4: what is created again gets a version above its tombstone'),
            ('threadkeep_tombstone_on_rename',
             'after update of thread_id on public.conversation_threads for each row when (old.thread_id is distinct from new.thread_id)
              execute function public.threadkeep_keep_tombstone()',
             'threadkeep, revision 4: a change of thread_id is a delete and an insert'),
            -- Purge removes only rows that are older than this condition. Such rows need no tombstone, because the functions reject
            -- a write that is more than 7 days late (I13).
            ('threadkeep_tombstone_on_delete',
             'after delete on public.conversation_threads for each row when (
                  old.expires_at > clock_timestamp() - interval ''8 days''
                  or old.version >> 21 > extract(epoch from clock_timestamp() - interval ''8 days'') * 1000)
              execute function public.threadkeep_keep_tombstone()',
             'threadkeep, revision 4: a plain delete leaves a tombstone'),
            ('threadkeep_tombstone_on_truncate',
             'before truncate on public.conversation_threads execute function public.threadkeep_keep_tombstone()',
             'threadkeep, revision 4: a truncate leaves tombstones')) as wanted (name, definition, meaning)
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

    for one in
        select to_regprocedure(name) as name from unnest('{public.threadkeep_stamp(),public.threadkeep_keep_tombstones()}'::text[]) as name
        where to_regprocedure(name) is not null
    loop
        todo := todo || format('drop function %s', one.name);
    end loop;

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
        -- With OFFSET, PostgreSQL looks up each key by the index. For a join with a partitioned table of medium size it would read all.
        left join lateral (
            select row.thread_id, row.conversation_data, row.expires_at, row.user_id, row.metadata, row.version
            from public.conversation_threads as row where row.thread_id = asked.key offset 0
        ) as thread on true
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
        'revision', 4,
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

-- Turns rows that threadkeep_apply has just inserted into the tombstones that plain deletes left, and returns their keys.
create or replace function public.threadkeep_bury(keys text[]) returns text[]
    language plpgsql volatile security invoker set search_path = '' as $$
declare
    buried text[];
begin
    with changed as (
        update public.conversation_threads as thread
        set version = kept.version, base_version = kept.version, last_writer = 0, run_began = 0, conversation_data = 'null',
            expires_at = kept.removed_at, user_id = null, metadata = '{}'
        from public.threadkeep_tombstones as kept
        where kept.thread_id = any (keys) and thread.thread_id = kept.thread_id
        returning thread.thread_id
    )
    select array_agg(thread_id) into buried from changed;
    return buried;
end $$;

-- Returns a document with items at the end of its array. target: {"at": [name, …], "max_bytes"}, with the names of the members that
-- lead to the array. Without a document, or without a member on the way, the function creates them.
--
-- The verdict is null, or says why the document cannot take the items. No document and no target raises an exception.
create or replace function public.threadkeep_appended(document jsonb, target jsonb, items jsonb,
                                                      out changed jsonb, out length integer, out verdict text)
    language plpgsql immutable security invoker set search_path = '' as $$
declare
    max_bytes constant bigint := (target ->> 'max_bytes')::bigint;
    path      constant text[] := array(select jsonb_array_elements_text(target -> 'at'));
    depth     integer := 0;
    part      jsonb;
    added     jsonb   := items;
    body      text;
    outside   text;
    spaces    bigint;
begin
    -- This reads the document from its place outside the row once, instead of once in each call below.
    changed := document #> '{}';
    part := changed;
    verdict := 'not_an_array';
    if jsonb_typeof(items) is distinct from 'array' then
        return;
    end if;
    -- The operator #> would also walk into an array, by a name like '0'.
    while part is not null and depth < cardinality(path) loop
        if jsonb_typeof(part) <> 'object' then
            return;
        end if;
        depth := depth + 1;
        part := part -> path[depth];
    end loop;
    length := jsonb_array_length(items);
    if part is null then
        for missing in reverse cardinality(path) .. depth + 1 loop
            added := jsonb_build_object(path[missing], added);
        end loop;
        changed := case when depth = 0 then added else jsonb_set(changed, path[:depth], added) end;
    elsif jsonb_typeof(part) <> 'array' then
        return;
    elsif depth = 0 then
        changed := part || items;
    elsif length <= 2 then
        -- For few items this is faster than jsonb_set, which builds the array twice.
        for one in 0 .. length - 1 loop
            changed := jsonb_insert(changed, path || '-1'::text, items -> one, true);
        end loop;
    else
        changed := jsonb_set(changed, path, part || items);
    end if;
    length := length + coalesce(jsonb_array_length(part), 0);
    -- The text is long to make. It has at most 8 times the size of the jsonb, unless numbers like 1e1000 expand.
    verdict := null;
    if 8 * pg_column_size(changed)::bigint > max_bytes or octet_length(items::text) > 8 * pg_column_size(items)::bigint then
        body := changed::text;
        if octet_length(body) > max_bytes then
            -- The limit does not count the space that PostgreSQL writes after each comma and colon outside of strings. At most half
            -- of the text is such space.
            verdict := 'too_large';
            if octet_length(body) <= 2 * max_bytes then
                outside := regexp_replace(body, '"(?:[^"\\]|\\.)*"', '', 'g');
                spaces := octet_length(outside) - octet_length(replace(outside, ' ', ''));
                verdict := case when octet_length(body) - spaces > max_bytes then 'too_large' end;
            end if;
        end if;
    end if;
exception when program_limit_exceeded then
    verdict := 'too_large';
end $$;

-- Writes records. writes: [{"key", "version", "writer", "expires_at": ms, "user"?, "metadata"?, "value"?, "if_version"?: version,
-- "append"?: {"at": [name, …], "max_bytes", "only_if_present"?}}, …]. A write without a value is a remove. With `append`, the items of the
-- value follow those of an array. A write without `if_version` and `append` is plain.
--
-- A write is stored if its version is above the version of the row or its tombstone (I9). With `if_version`, the row must also have
-- that version, or only later writes of the same daemon over it. An append is also stored over newer writes, but not over a newer plain
-- write. The response has one row for each write, in the same order. Each row has a state:
--   stored             the write is stored now, or was before. An append that is stored now has the `version` of the row, the version
--                      `over` which it was stored, and the `length` of the array
--   superseded         the table holds a newer version
--   conflict           another writer changed the row since if_version
--   absent             the append says only_if_present, and the conversation is absent
--   not_an_array       the append names no array
--   too_large          the append exceeds max_bytes
--   version_in_future  the version is more than 2 s ahead of the database's clock
--   too_old            the version is more than 7 days old (I13)
--
-- If another transaction locks a row for 2 s, the call fails, so that one row cannot block all callers.
--
-- With partitions, PostgreSQL would plan the statements of the loop again for each row, which takes longer than to run them.
create or replace function public.threadkeep_apply(writes jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' set lock_timeout = '2s' set plan_cache_mode = force_generic_plan as $$
declare
    stored     constant json := json_build_object('state', 'stored');
    all_writes jsonb  := public.threadkeep_argument(writes);
    present    bigint := public.threadkeep_now();
    newest     bigint := ((present + 2001) << 21) - 1;
    oldest     bigint := (present - 7 * 86400000::bigint) << 21;
    purged     bigint := (present - 8 * 86400000::bigint) << 21;
    results    json[];
    is_done    boolean := false;
    inserted   text[];
    buried     text[];
    given      record;
    held       record;
    verdict    text;
    appended   record;
    answer     json;
    made_at    timestamptz;
    ends       timestamptz;
    is_append  boolean;
    replaces   boolean;
    daemon     bigint;
    is_counted boolean;
    is_decided boolean;
    keeps_life boolean;
    keeps_owner boolean;
    content    jsonb;
    next       bigint;
begin
    -- This setting turns off the triggers of this file.
    perform set_config('threadkeep.applying', 'yes', true);

    -- A batch of plain writes with distinct keys is one statement. All or nothing: a statement for a part of the batch and the loop for
    -- the rest would lock rows in two orders, and could deadlock. The statement locks each row of the batch, also an unchanged one. For
    -- one write the loop is faster.
    if jsonb_array_length(all_writes) > 1 then
        with batch as materialized (
            select one.ord, one.body, one.body ->> 'key' as key, (one.body ->> 'version')::bigint as version
            from jsonb_array_elements(all_writes) with ordinality as one(body, ord)
        ), put as (
            insert into public.conversation_threads as thread
                (thread_id, version, changed_xid, base_version, last_writer, conversation_data, expires_at, user_id, metadata)
            select key, version, pg_catalog.pg_current_xact_id(), version,
                   -- Writers are above 0, which means plain SQL. 1 belongs to no daemon either.
                   greatest((body ->> 'writer')::bigint, 1),
                   coalesce(body -> 'value', 'null'),
                   case when body ? 'value' then to_timestamp((body ->> 'expires_at')::numeric / 1000)
                        else least(to_timestamp((version >> 21)::numeric / 1000), clock_timestamp()) end,
                   body ->> 'user', coalesce(body -> 'metadata', '{}')
            from batch
            where (select count(distinct key) = count(*) and bool_and(version between oldest and newest and not body ?| '{if_version,append}')
                       from batch)
              and not exists (select from public.threadkeep_tombstones as kept where kept.thread_id in (select key from batch))
            order by key collate "C"
            on conflict (thread_id) do update
            set version = excluded.version, changed_xid = excluded.changed_xid, base_version = excluded.version,
                last_writer = excluded.last_writer,
                run_began = case when thread.last_writer >> 24 = nullif(excluded.last_writer >> 24, 0) then thread.run_began
                                 else thread.version end,
                conversation_data = excluded.conversation_data, expires_at = excluded.expires_at, accessed_at = excluded.accessed_at,
                user_id = excluded.user_id, metadata = excluded.metadata
            where thread.version < excluded.version
            -- A new row has run_began 0. A run since 0 goes on only over a row that met no tombstone, so it is not buried below. (A
            -- partitioned table does not return xmax, which would tell the two apart.)
            returning thread.thread_id, thread.run_began = 0 as is_new
        )
        select array_agg(case when put.thread_id is not null then stored end order by batch.ord),
               count(put.thread_id) = count(*), array_agg(put.thread_id) filter (where put.is_new)
        into results, is_done, inserted
        from batch left join put on put.thread_id = batch.key;

        if inserted is not null then
            buried := public.threadkeep_bury(inserted);
        end if;
    end if;
    if not is_done or buried is not null then
        -- All calls lock rows in the order of the keys, so that they cannot deadlock. Two writes of one key run in the order given.
        for given in
            select one.ord, one.body ->> 'key' as key, (one.body ->> 'version')::bigint as version,
                   (one.body ->> 'if_version')::bigint as if_version, greatest((one.body ->> 'writer')::bigint, 1) as writer,
                   one.body -> 'value' as value, one.body -> 'append' as target, (one.body ->> 'expires_at')::numeric as expires_at,
                   one.body ->> 'user' as user_id, coalesce(one.body -> 'metadata', '{}') as metadata
            from jsonb_array_elements(all_writes) with ordinality as one(body, ord)
            where results[one.ord] is null or one.body ->> 'key' = any (buried)
            order by one.body ->> 'key' collate "C", one.ord
        loop
            if given.version is null then
                raise exception 'a record without a version' using errcode = 'not_null_violation';
            end if;
            made_at := to_timestamp((given.version >> 21)::numeric / 1000);
            if given.value is not null then
                ends := to_timestamp(given.expires_at / 1000);
            else
                ends := least(made_at, clock_timestamp());
            end if;
            is_append := given.target is not null;
            replaces := not is_append and (given.if_version is null or given.value is null);
            daemon := nullif(given.writer >> 24, 0);
            is_counted := (is_append or given.if_version is not null) and daemon is not null;
            -- Nearly all puts and removes are newer than the row. Then one update is enough, where a read and a lock would be two more
            -- statements. The version of a row is never below a version of threadkeep_writers, so no repeated write passes.
            is_decided := not is_append and given.version between oldest and newest;
            next := given.version;
            content := coalesce(given.value, 'null');
            keeps_life := false;
            keeps_owner := false;
            verdict := null;
            answer := stored;
            -- One round settles nearly every put, and two an append. The others are for a key that other transactions change meanwhile.
            for attempt in 1 .. 100 loop
                if attempt = 100 then
                    raise exception 'a trigger of public.conversation_threads keeps the row from being written'
                        using errcode = 'integrity_constraint_violation';
                end if;
                if is_decided then
                    update public.conversation_threads as thread
                    set version = next, changed_xid = pg_catalog.pg_current_xact_id(),
                        base_version = case
                            when replaces then next
                            -- A conversation that had expired when the write was made counts as removed just before its expiry.
                            when thread.expires_at < made_at + interval '1 ms'
                            then greatest(coalesce(thread.base_version, thread.version),
                                          (floor(extract(epoch from greatest(thread.expires_at, 'epoch')) * 1000)::bigint << 21) - 1)
                            else coalesce(thread.base_version, thread.version) end,
                        last_writer = given.writer,
                        run_began = case when thread.last_writer >> 24 = daemon then thread.run_began else thread.version end,
                        conversation_data = content, accessed_at = now(),
                        expires_at = case when keeps_life then greatest(thread.expires_at, ends) else ends end,
                        user_id = case when keeps_owner then thread.user_id else given.user_id end,
                        metadata = case when keeps_owner then thread.metadata else given.metadata end
                    where thread.thread_id = given.key and thread.version < next
                      and (given.if_version is null or thread.version = given.if_version
                           or thread.last_writer >> 24 = daemon and given.if_version between thread.run_began and thread.version);
                    exit when found;
                end if;
                -- Locks the row, or reads the tombstone, and decides (I9).
                with present as (
                    select thread.version, coalesce(thread.base_version, thread.version) as base_version, thread.last_writer,
                           thread.run_began, true as is_row, thread.expires_at >= made_at + interval '1 ms' as is_live,
                           case when not is_append or thread.expires_at < made_at + interval '1 ms' then null
                                when thread.expires_at > clock_timestamp() then thread.conversation_data
                                -- A tombstone that was a plain DELETE of an expired row has the expiry of that row.
                                else nullif(thread.conversation_data, 'null') end as document
                    from public.conversation_threads as thread where thread.thread_id = given.key for no key update
                )
                select * into held from present
                union all
                select kept.version, kept.version, 0, 0, false, kept.removed_at >= made_at + interval '1 ms', null
                from public.threadkeep_tombstones as kept where kept.thread_id = given.key and not exists (select from present);
                verdict := case
                    when is_counted and given.version <= (
                        select noted.version from public.threadkeep_writers as noted
                        where noted.thread_id = given.key and noted.writer = given.writer) then 'stored'
                    -- A later put or remove of the same daemon in its place.
                    when given.version <= held.base_version and held.last_writer >> 24 = daemon and held.run_began < given.version
                    then 'stored'
                    when not is_append and given.if_version is null and given.version <= held.base_version then
                        case when given.version = held.base_version then 'stored' else 'superseded' end
                    when given.version > newest then 'version_in_future'
                    when given.version < oldest then 'too_old'
                    when is_append then
                        case when (given.target ->> 'only_if_present')::boolean and held.is_live is not true then 'absent'
                             when given.version < held.base_version then 'superseded' end
                    -- A purged row has no version. Its readers may still name it.
                    when given.if_version <> coalesce(held.version, 0) and (held.version is not null or given.if_version >= purged)
                         and coalesce(held.last_writer >> 24 = daemon and given.if_version between held.run_began and held.version
                                      and held.version < given.version, false) is false then 'conflict'
                    when given.version <= held.version then 'superseded'
                end;
                if verdict is null and is_append then
                    appended := public.threadkeep_appended(held.document, given.target, given.value);
                    verdict := appended.verdict;
                    content := appended.changed;
                    keeps_life := held.is_live;
                    keeps_owner := held.document is not null;
                    next := case when given.version > held.version then given.version else coalesce(held.version + 1 | 1, given.version) end;
                    answer := json_build_object('state', 'stored', 'version', next::text, 'over', coalesce(held.version, 0)::text,
                                                'length', appended.length);
                end if;
                if verdict is not null then
                    results[given.ord] := json_build_object('state', verdict, 'version', coalesce(
                        case when is_append and verdict = 'superseded' then held.base_version else held.version end, 0)::text);
                    exit;
                end if;
                -- Without a verdict, a row that is there now is locked. The next round writes it.
                is_decided := held.is_row or not is_append;
                continue when held.is_row;
                insert into public.conversation_threads
                    (thread_id, version, changed_xid, base_version, last_writer, conversation_data, expires_at, user_id, metadata)
                values (given.key, given.version, pg_catalog.pg_current_xact_id(), case when replaces then given.version else 0 end,
                        given.writer, content, ends, given.user_id, given.metadata)
                on conflict (thread_id) do nothing;
                continue when not found;
                exit when not exists (select from public.threadkeep_tombstones as kept where kept.thread_id = given.key);
                -- The next round decides over the tombstone, under the lock of the row.
                perform public.threadkeep_bury(array[given.key]);
            end loop;
            if verdict is null then
                results[given.ord] := answer;
                if is_counted then
                    insert into public.threadkeep_writers as noted values (given.key, given.writer, given.version)
                    on conflict (thread_id, writer) do update set version = excluded.version;
                end if;
            end if;
        end loop;
    end if;
    perform set_config('threadkeep.applying', '', true);
    return json_build_object('now', public.threadkeep_now(), 'revision', 4, 'rows', coalesce(array_to_json(results), '[]'));
end $$;

-- Does the same as threadkeep_apply. The name keeps appends from a threadkeep_apply of an earlier revision, which would take each for a put.
create or replace function public.threadkeep_apply_appends(writes jsonb) returns json
    language plpgsql volatile security invoker set search_path = ''
    as $$ begin return public.threadkeep_apply(writes); end $$;

-- Lists the newest live conversations. request: {"limit", "user"?, "after_version"? and "after_key"?}.
--
-- With `user`, the list contains the conversations of this user only. A page begins after (after_version, after_key). A page has at
-- most `limit` rows and about 16 MiB. `is_last` is true if no row follows.
create or replace function public.threadkeep_list(request jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' set plan_cache_mode = force_generic_plan as $$
declare
    asked     jsonb  := public.threadkeep_argument(request);
    whose     text   := asked ->> 'user';
    max_rows  bigint := (asked ->> 'limit')::bigint;
    below     bigint := coalesce((asked ->> 'after_version')::bigint, 9223372036854775807);
    below_key text   := coalesce(asked ->> 'after_key', '');
    present   timestamptz := clock_timestamp();
    picked    text;
    one       public.conversation_threads;
    body      text;
    bytes     bigint  := 0;
    sent      integer := 0;
    found_rows json[];
    is_last   boolean := true;
begin
    -- The loop picks keys first, because values may be large. It picks one key more than the limit, to set is_last. The literals
    -- give each page a plan of its own, with or without a user. The select in the loop keeps one plan for the session.
    for picked in execute format($pick$
        select thread.thread_id from public.conversation_threads as thread
        where thread.expires_at > %1$L
          and (%2$L is null or thread.user_id = %2$L)
          and (thread.version, thread.thread_id collate "C") < (%3$L, %4$L)
          -- The condition skips plain rows with ids that threadkeep does not support. The CASE is a hint for the planner: PostgreSQL
          -- estimates that most rows pass it. For a plain comparison PostgreSQL estimates one row in 200, and then sorts the whole
          -- table instead of reading the index.
          and case when octet_length(thread.thread_id) between 1 and 512 then true end is not null
        order by thread.version desc, thread.thread_id collate "C" desc
        limit %5$L $pick$, present, whose, below, below_key, max_rows + 1)
    loop
        if sent = max_rows or bytes >= 16 * 1024 * 1024 then
            is_last := false;
            exit;
        end if;
        select * into one from public.conversation_threads as thread
        where thread.thread_id = picked and thread.expires_at > present and (whose is null or thread.user_id = whose);
        -- Another transaction may have removed the row since the loop picked its key.
        continue when not found;
        body := one.conversation_data::text;
        bytes := bytes + octet_length(body);
        sent := sent + 1;
        found_rows[sent] := json_build_object(
            'state', 'found', 'key', one.thread_id, 'version', one.version::text,
            -- Plain rows may contain 'infinity', which milliseconds cannot express.
            'expires_at', floor(extract(epoch from least(one.expires_at, '9999-12-31')) * 1000)::bigint,
            'user', one.user_id, 'metadata', one.metadata, 'value', body::json);
    end loop;
    return json_build_object('now', floor(extract(epoch from present) * 1000)::bigint, 'revision', 4,
                             'rows', coalesce(array_to_json(found_rows), '[]'), 'is_last', is_last);
end $$;

-- Names the conversations that changed since a cursor. request: {"cursor"?}.
--
-- The response has the next `cursor`, and a state:
--   unbroken  the rows have each conversation that changed since the cursor, with its version
--   begun     no rows: the request has no cursor, or the cursor is too old, or one transaction changed more than a page
--   restored  no rows: the cursor comes from another history, for example from before a restore
--
-- A time or a sequence would miss a transaction that commits late. A cursor holds a snapshot instead. A row changed since then if its
-- transaction is not visible in that snapshot: it was open, or began later. A page ends between two transactions, where a cursor can
-- stand.
--
-- PostgreSQL estimates far too many rows for an unknown range, and would compile the statement (JIT) for longer than it runs.
create or replace function public.threadkeep_changes(request jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' set jit = off as $$
declare
    page_rows constant integer := 10000;
    present   constant bigint  := public.threadkeep_now();
    given     constant text    := public.threadkeep_argument(request) ->> 'cursor';
    history   text;
    since     pg_snapshot;
    until     pg_snapshot;
    bound     xid8;
    cut       xid8;
    is_too_large boolean;
    found_rows   json;
    state     text := 'begun';
begin
    if pg_is_in_recovery() then
        -- The snapshot of a replica does not list the open transactions.
        raise exception 'a read replica cannot name changes' using errcode = 'read_only_sql_transaction';
    end if;
    -- A restore to an earlier point begins a new timeline, and a copy of the table is another table.
    history := concat_ws('-', left(pg_walfile_name(pg_current_wal_lsn()), 8), 'public.conversation_threads'::regclass::oid,
                         (select oid from pg_catalog.pg_database where datname = current_database()));
    if has_function_privilege('pg_control_system()', 'execute') then
        history := history || '-' || (select system_identifier from pg_control_system());
    end if;
    -- The tombstones of an older cursor may be purged.
    if split_part(given, ' ', 1) <> history then
        state := 'restored';
    elsif split_part(given, ' ', 2)::bigint > present - 7 * 86400000::bigint then
        state := 'unbroken';
        since := split_part(given, ' ', 3)::pg_snapshot;
    end if;

    -- One statement, so that the rows and the snapshot agree.
    with now as materialized (
        select pg_current_snapshot() as snapshot
    ), part (first, last) as (
        select open, open from pg_snapshot_xip(since) as open
        union all
        select pg_snapshot_xmax(since), pg_snapshot_xmax(now.snapshot) from now
    ), changed as materialized (
        select found.* from part cross join lateral (
            select thread.thread_id, thread.version, thread.changed_xid from public.conversation_threads as thread
            where thread.changed_xid between part.first and part.last
            union all
            select kept.thread_id, kept.version, kept.changed_xid from public.threadkeep_tombstones as kept
            where kept.changed_xid between part.first and part.last
            order by changed_xid
            limit page_rows + 1
        ) as found
        order by found.changed_xid
        limit page_rows + 1
    ), split as (
        select (select changed.changed_xid from changed order by changed.changed_xid limit 1) as first,
               (select changed.changed_xid from changed order by changed.changed_xid offset page_rows) as cut
    )
    select now.snapshot, split.cut, split.first = split.cut, (
        select json_agg(json_build_object('key', changed.thread_id, 'version', changed.version::text)) from changed
        -- Plain rows may have ids that threadkeep does not support.
        where octet_length(changed.thread_id) between 1 and 512 and (split.cut is null or changed.changed_xid < split.cut))
    into until, cut, is_too_large, found_rows
    from now, split;

    if pg_snapshot_xmax(since) > pg_snapshot_xmax(until) then
        state := 'restored';
    elsif is_too_large then
        state := 'begun';
    end if;
    if state <> 'unbroken' then
        cut := null;
        found_rows := null;
    elsif cut is not null then
        -- Of the changes up to the new snapshot, only those before the cut were named. The others count as open still.
        bound := greatest(cut, pg_snapshot_xmax(since));
        select format('%s:%s:%s', coalesce((array_agg(open order by open))[1], bound), bound,
                      string_agg(open::text, ',' order by open))::pg_snapshot
        into until
        from (select pg_snapshot_xip(since) as open union select pg_snapshot_xip(until)) as every
        where open < bound and (open >= cut or not pg_visible_in_snapshot(open, until));
    end if;

    -- After a crash PostgreSQL gives the numbers of transactions again whose end it had not written to disk. The cursor must have none of
    -- these, so the commit of this message writes them.
    if pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn() then
        perform pg_logical_emit_message(true, 'threadkeep', '');
    end if;
    return json_build_object('now', present, 'revision', 4, 'cursor', concat_ws(' ', history, present, until), 'state', state,
                             'rows', coalesce(found_rows, '[]'), 'is_last', cut is null);
end $$;

-- Marks conversations as accessed. The function skips locked rows: their writers set accessed_at anyway.
--
-- Look-ups by the index are right for any table. For a partitioned table of medium size, PostgreSQL would read all rows instead.
create or replace function public.threadkeep_touch(keys jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' set enable_hashjoin = off set enable_mergejoin = off as $$
declare
    touched integer;
begin
    with wanted as (
        select thread.thread_id from public.conversation_threads as thread
        where thread.thread_id in (select jsonb_array_elements_text(public.threadkeep_argument(keys)))
          and thread.expires_at > now()
        order by thread.thread_id collate "C"
        for no key update skip locked
    )
    update public.conversation_threads as thread set accessed_at = now()
    from wanted where thread.thread_id = wanted.thread_id;
    get diagnostics touched = row_count;
    return json_build_object('now', public.threadkeep_now(), 'revision', 4, 'count', touched);
end $$;

-- Removes up to `max_rows` rows, tombstones and versions of writers that are older than 8 days, by expiry and version. threadkeep_apply rejects writes
-- that are more than 7 days late, so no accepted write can bring back a removed conversation (I13).
create or replace function public.threadkeep_purge(max_rows integer) returns json
    language plpgsql volatile security invoker set search_path = '' as $$
declare
    past      bigint := (public.threadkeep_now() - 8 * 86400000::bigint) << 21;
    removed   integer;
    buried    integer;
    forgotten integer;
begin
    delete from public.conversation_threads
    where thread_id in (
        select thread.thread_id from public.conversation_threads as thread
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
    get diagnostics buried = row_count;
    delete from public.threadkeep_writers
    where (thread_id, writer) in (
        select noted.thread_id, noted.writer from public.threadkeep_writers as noted
        where noted.version < past
        order by noted.version
        limit max_rows - removed - buried
        for update skip locked
    );
    get diagnostics forgotten = row_count;
    return json_build_object('now', public.threadkeep_now(), 'revision', 4, 'count', removed + buried + forgotten);
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
    return json_build_object('now', public.threadkeep_now(), 'revision', 4);
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
          and p.proname like 'threadkeep\_%'
    loop
        execute format('revoke all on function %s from %s', one.name, array_to_string(everybody, ', '));
        if is_there and one.prosecdef then
            execute format('revoke all on function %s from service_role', one.name);
        elsif is_there then
            execute format('grant execute on function %s to service_role', one.name);
        end if;
    end loop;
    execute format('revoke all on table public.conversation_threads, public.threadkeep_tombstones, public.threadkeep_writers from %s',
                   array_to_string(everybody, ', '));
    if is_there then
        grant select, insert, update, delete on table public.conversation_threads, public.threadkeep_writers to service_role;
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
            ('conversation_threads', 'changed_xid', 'The transaction that changed the row last.'),
            ('conversation_threads', 'base_version', 'The version of the last write that replaced the content without a condition; null: that of the row.'),
            ('conversation_threads', 'last_writer', 'The writer of the last write; 0: plain SQL.'),
            ('conversation_threads', 'run_began', 'The version before the unbroken run of writes by the daemon of last_writer.'),
            ('threadkeep_tombstones', '', 'Tombstones of conversations that plain statements deleted, for 8 days: no late write brings these back.'),
            ('threadkeep_tombstones', 'thread_id', 'The name of the conversation.'),
            ('threadkeep_tombstones', 'version', 'The version of the deletion; of an expired row, its own.'),
            ('threadkeep_tombstones', 'removed_at', 'When the conversation was deleted or had expired.'),
            ('threadkeep_tombstones', 'changed_xid', 'The transaction that deleted the conversation.'),
            ('threadkeep_writers', '', 'Conditional writes and appends, for 8 days: one that comes again is recognised.'),
            ('threadkeep_writers', 'thread_id', 'The name of the conversation.'),
            ('threadkeep_writers', 'writer', 'One opening of a daemon''s outage file.'),
            ('threadkeep_writers', 'version', 'The last version that was accepted from this writer.')) as wanted (relation, part, meaning)
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
comment on function public.threadkeep_keep_tombstone() is 'Trigger: keeps the tombstones of deleted rows, and puts a row that is created again above it.';
comment on function public.threadkeep_now() is 'The database''s clock, in milliseconds since the epoch.';
comment on function public.threadkeep_argument(jsonb) is 'Unwraps an argument that a server passed as a JSON string of itself.';
comment on function public.threadkeep_bury(text[]) is 'Turns new rows into the tombstones that were there before them.';
comment on function public.threadkeep_load(jsonb) is 'threadkeep: reads conversations by their ids.';
comment on function public.threadkeep_apply(jsonb) is 'threadkeep: writes and deletes conversations; the newest wins.';
comment on function public.threadkeep_appended(jsonb, jsonb, jsonb) is 'The document with items at the end of its array, and the length of that array.';
comment on function public.threadkeep_apply_appends(jsonb) is 'threadkeep: as threadkeep_apply, for writes with appends.';
comment on function public.threadkeep_list(jsonb) is 'threadkeep: a page of the newest live conversations, of all or of one user.';
comment on function public.threadkeep_changes(jsonb) is 'threadkeep: names the conversations that changed since a cursor.';
comment on function public.threadkeep_touch(jsonb) is 'threadkeep: marks conversations as accessed.';
comment on function public.threadkeep_purge(integer) is 'threadkeep: forgets what has been expired or deleted for 8 days.';
comment on function public.threadkeep_probe() is 'threadkeep: the database''s clock, the revision of these functions, and a write that is undone.';

-- Makes PostgREST reload its cached schema, so that it finds the functions.
notify pgrst, 'reload schema';
reset lock_timeout;
