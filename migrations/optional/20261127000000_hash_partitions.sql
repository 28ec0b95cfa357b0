-- Optional: splits public.conversation_threads into partitions by the hash of thread_id, or makes it one plain table again.
-- guide/several_daemons.md says when this helps, and how long it takes.
--
-- The file makes 16 partitions. Another number comes from a setting of the session, and 0 makes the plain table again:
--
--     set threadkeep.partitions = '32';
--
-- The file copies all rows into a new table, in one transaction. Meanwhile all readers and writers of the table wait, and calls of
-- daemons fail after their time limit: daemons queue their writes. The disk needs room for a second copy. The file changes nothing
-- if the table has that number of partitions already, and nothing if a step fails. It keeps rows, columns, indexes, triggers, policies,
-- rights, storage options, owner and comments. The other migrations can be applied to the new table as to the plain one.
--
-- Two rules change with partitions. The primary key is thread_id, because PostgreSQL keeps no column unique over all partitions
-- that does not choose the partition. threadkeep needs no index on id; a program that does can create one, which is not unique. A
-- TRUNCATE must name the table: of a single partition it leaves no tombstones.

set lock_timeout = '1s';
set statement_timeout = 0; -- Supabase ends a statement after two minutes.

do $$
declare
    threads    regclass := to_regclass('public.conversation_threads');
    setting    constant text := coalesce(nullif(current_setting('threadkeep.partitions', true), ''), '16');
    partitions constant integer := case when setting ~ '^[0-9]{1,4}$' then setting::integer end;
    -- The statements that make the new table like the old one.
    todo       text[] := '{}';
    problems   text[] := '{}';
    names      text[] := '{}';
    columns    text;
    options    text;
    everybody  text;
    roles      text;
    part       text;
    step       text;
    old        pg_catalog.pg_class;
    one        record;
    moved      bigint;
    dependents text;
begin
    -- The functions of earlier revisions need a plain table.
    if threads is null or not exists (
        select from pg_catalog.pg_proc where oid = to_regprocedure('public.threadkeep_apply(jsonb)')
          and substring(prosrc from '''revision'', (\d+)')::integer >= 4 and prosrc not like '%.xmax%') then
        raise exception 'threadkeep changed nothing: the table or its functions are missing or old; apply 20260101000000_conversation_threads.sql and 20261126000000_threadkeep.sql first';
    elsif partitions is null or partitions > 256 or partitions = 1 then
        raise exception 'threadkeep changed nothing: threadkeep.partitions is %; set it to 0, or to a number from 2 to 256', setting;
    end if;

    if partitions = (select count(*) from pg_catalog.pg_inherits where inhparent = threads) then
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
    -- Another session may have applied this file meanwhile.
    threads := 'public.conversation_threads'::regclass;
    select * into old from pg_catalog.pg_class where oid = threads;
    if partitions = (select count(*) from pg_catalog.pg_inherits where inhparent = threads) then
        return;
    end if;

    select array_agg(problem) into problems from (
        select format('constraint %I of %s refers to rows (alter table %s drop constraint %I)', conname, conrelid::regclass, conrelid::regclass, conname)
        from pg_catalog.pg_constraint
        where contype in ('f', 'x') and conparentid = 0 and (conrelid = threads or confrelid = threads)
        union all
        select format('column %I is an identity (alter table public.conversation_threads alter column %I drop identity)', attname, attname)
        from pg_catalog.pg_attribute where attrelid = threads and attidentity <> ''
        union all
        select format('publication %I has the table (alter publication %I drop table public.conversation_threads)', pubname, pubname)
        from pg_catalog.pg_publication_rel join pg_catalog.pg_publication as p on p.oid = prpubid where prrelid = threads
        union all
        select format('unique index %s has no thread_id (drop index %s)', indexrelid::regclass, indexrelid::regclass)
        from pg_catalog.pg_index as i
        where indrelid = threads and indisunique and partitions > 0 and pg_get_indexdef(indexrelid) !~ '\(id\)$'
          and not exists (select from pg_catalog.pg_attribute where attrelid = threads and attname = 'thread_id' and attnum = any (i.indkey))
        union all
        select format('%s depends on the table (drop it, and create it again after this file)', pg_describe_object(classid, objid, 0))
        from (select distinct d.classid, d.objid from pg_catalog.pg_depend as d
              where d.refobjid = old.reltype and d.deptype = 'n'
              union
              select 'pg_class'::regclass, r.ev_class from pg_catalog.pg_depend as d join pg_catalog.pg_rewrite as r on r.oid = d.objid
              where d.refobjid = threads and d.classid = 'pg_rewrite'::regclass) as dependent
        union all
        select format('%s belongs to the table (alter sequence %s owned by none)', objid::regclass, objid::regclass)
        from pg_catalog.pg_depend
        where refobjid = threads and deptype = 'a' and refobjsubid > 0 and classid = 'pg_class'::regclass
          and exists (select from pg_catalog.pg_class where oid = objid and relkind = 'S')
    ) as found (problem);
    if problems <> '{}' then
        raise exception 'threadkeep changed nothing: %; apply this file again after that', array_to_string(problems, '; ');
    end if;

    -- Storage options belong to the table that holds the rows. Those of its TOAST table have a prefix.
    select string_agg(option, ', ') into options from (
        select unnest(c.reloptions) from (
            select * from pg_catalog.pg_class
            where oid = threads and relkind = 'r' or oid in (select inhrelid from pg_catalog.pg_inherits where inhparent = threads)
            order by relname limit 1) as c
        union all
        select 'toast.' || unnest(t.reloptions) from (
            select reltoastrelid from pg_catalog.pg_class
            where oid = threads and relkind = 'r' or oid in (select inhrelid from pg_catalog.pg_inherits where inhparent = threads)
            order by relname limit 1) as c
        join pg_catalog.pg_class as t on t.oid = c.reltoastrelid
    ) as every (option);

    -- Projects may grant new tables to the public keys by default.
    select 'public' || coalesce(string_agg(', ' || quote_ident(rolname), ''), '') into everybody from pg_catalog.pg_roles
    where oid <> old.relowner and oid in (select (aclexplode(defaclacl)).grantee from pg_catalog.pg_default_acl);

    for one in
        select * from (
            -- The primary key and the unique thread_id follow below.
            select 1, indexrelid::text,
                   replace(pg_get_indexdef(indexrelid), ' ON ONLY ', ' ON ')
            from pg_catalog.pg_index where indrelid = threads and not (indisunique and pg_get_indexdef(indexrelid) ~ 'btree \((id|thread_id)\)$')
            union all
            select 2, tgname, pg_get_triggerdef(oid)
            from pg_catalog.pg_trigger where tgrelid = threads and not tgisinternal
            union all
            select 3, tgname, format('alter table public.conversation_threads %s trigger %I',
                                     case tgenabled when 'D' then 'disable' when 'A' then 'enable always' else 'enable replica' end, tgname)
            from pg_catalog.pg_trigger where tgrelid = threads and not tgisinternal and tgenabled <> 'O'
            union all
            select 4, tgname, format('comment on trigger %I on public.conversation_threads is %L', tgname, obj_description(oid, 'pg_trigger'))
            from pg_catalog.pg_trigger where tgrelid = threads and not tgisinternal and obj_description(oid, 'pg_trigger') is not null
            union all
            select 5, '', format('comment on table public.conversation_threads is %L', obj_description(threads, 'pg_class'))
            where obj_description(threads, 'pg_class') is not null
            union all
            select 6, '', 'alter table public.conversation_threads enable row level security' where old.relrowsecurity
            union all
            select 6, '', 'alter table public.conversation_threads force row level security' where old.relforcerowsecurity
            union all
            select 7, policyname, format('create policy %I on public.conversation_threads as %s for %s to %s', policyname, permissive, cmd,
                                         (select string_agg(case role when 'public' then 'public' else quote_ident(role) end, ', ') from unnest(p.roles) as role))
                                  || coalesce(' using (' || qual || ')', '') || coalesce(' with check (' || with_check || ')', '')
            from pg_catalog.pg_policies as p where schemaname = 'public' and tablename = 'conversation_threads'
            union all
            select 8, '', 'revoke all on public.conversation_threads from ' || everybody
            union all
            select 9, to_char(place, '0000'), format('grant %s on public.conversation_threads to %s%s', privilege_type,
                                 case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end,
                                 case when is_grantable then ' with grant option' else '' end)
            from aclexplode(old.relacl) with ordinality as acl (grantor, grantee, privilege_type, is_grantable, place)
            where grantee <> old.relowner
            union all
            select 9, '', format('grant %s (%I) on public.conversation_threads to %s', privilege_type, attname,
                                 case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end)
            from pg_catalog.pg_attribute as a, aclexplode(a.attacl) where attrelid = threads and not attisdropped
        ) as every (place, name, statement) order by place, name
    loop
        todo := todo || one.statement;
    end loop;
    select string_agg(quote_ident(attname), ', ' order by attnum) into columns
    from pg_catalog.pg_attribute where attrelid = threads and attnum > 0 and not attisdropped and attgenerated = '';
    select string_agg(quote_ident(rolname), ', ') into roles from pg_catalog.pg_roles where rolname in ('anon', 'authenticated');

    alter table public.conversation_threads rename to threadkeep_before;
    step := 'create table public.conversation_threads (like public.threadkeep_before including all excluding indexes)';
    if partitions = 0 then
        names := '{public.conversation_threads}';
        execute step || coalesce(' with (' || options || ')', '');
    else
        execute step || ' partition by hash (thread_id)';
        for at in 0 .. partitions - 1 loop
            part := format('public.%I', format('conversation_threads_%s_of_%s', at, partitions));
            names := names || part;
            execute format('create table %s partition of public.conversation_threads for values with (modulus %s, remainder %s)', part, partitions, at)
                    || coalesce(' with (' || options || ')', '');
            -- Callers name the table, and need no rights on its partitions.
            execute format('revoke all on %s from %s', part, everybody);
            execute format('alter table %s enable row level security', part);
            execute format('comment on table %s is %L', part, 'A part of conversation_threads. Name that table instead.');
            if roles is not null then
                execute format('create policy threadkeep_rejects_public_keys on %s as restrictive for all to %s using (false) with check (false)', part, roles);
            end if;
        end loop;
    end if;

    execute format('insert into public.conversation_threads (%s) select %s from public.threadkeep_before', columns, columns);
    get diagnostics moved = row_count;
    -- PostgreSQL finds more kinds of dependents than the list above.
    begin
        drop table public.threadkeep_before;
    exception when dependent_objects_still_exist then
        get stacked diagnostics dependents = pg_exception_detail;
        raise exception 'threadkeep changed nothing: %; apply this file again after that',
            replace(replace(dependents, E'\n', '; '), 'threadkeep_before', 'conversation_threads') || ' (drop it, and create it again after this file)'
            using errcode = 'dependent_objects_still_exist';
    end;
    if partitions = 0 then
        alter table public.conversation_threads add primary key (id), add unique (thread_id);
    else
        alter table public.conversation_threads add primary key (thread_id);
    end if;
    foreach step in array todo loop
        execute step;
    end loop;
    foreach part in array names || 'public.conversation_threads'::text loop
        execute format('alter table %s owner to %I', part, pg_get_userbyid(old.relowner));
    end loop;
    raise notice 'conversation_threads has % rows in % partitions', moved, partitions;
end $$;

-- Autovacuum does not analyze a partitioned table as a whole.
analyze public.conversation_threads;

-- Makes PostgREST reload its cached schema.
notify pgrst, 'reload schema';
reset statement_timeout;
reset lock_timeout;
