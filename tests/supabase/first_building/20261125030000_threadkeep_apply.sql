-- Writes, faster: what is newer than the row takes one statement instead of two, the trigger compares values only where it must,
-- and the small functions are planned once for a session instead of anew with each call. Each says what the function that it
-- replaces said, but that a write that was stored does not tell what it took the place of: nobody asks.

create or replace function public.threadkeep_now() returns bigint
    language plpgsql volatile security invoker set search_path = ''
    as $$ begin return floor(extract(epoch from clock_timestamp()) * 1000)::bigint; end $$;

create or replace function public.threadkeep_argument(given jsonb) returns jsonb
    language plpgsql immutable security invoker set search_path = ''
    as $$ begin return case jsonb_typeof(given) when 'string' then (given #>> '{}')::jsonb else given end; end $$;

create or replace function public.threadkeep_stamp() returns trigger
    language plpgsql security invoker set search_path = '' as $$
declare
    -- Not by threadkeep_now(): whoever may write the table need not be allowed to call the functions.
    present bigint := floor(extract(epoch from clock_timestamp()) * 1000)::bigint;
    before  bigint := 0;
begin
    if tg_op = 'UPDATE' then
        -- The version first, which differs where threadkeep writes; the value last, for it may be large.
        if (new.version, new.thread_id, new.user_id, new.created_at, new.expires_at, new.metadata, new.conversation_data)
           is not distinct from
           (old.version, old.thread_id, old.user_id, old.created_at, old.expires_at, old.metadata, old.conversation_data)
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
        if given.version is null then
            raise exception 'a record without a version' using errcode = 'not_null_violation';
        end if;
        gone := not given.body ? 'value';
        ends := to_timestamp((case when gone then (given.version >> 21)::text else given.body ->> 'expires' end)::numeric / 1000);
        if gone then
            ends := least(ends, clock_timestamp());
        end if;
        loop
            -- Nearly all are newer than what is there, and in their time: one statement, where a look and a lock are two more.
            if given.version between oldest and ((public.threadkeep_now() + 2001) << 21) - 1 then
                update public.conversation_threads
                set version = given.version, conversation_data = coalesce(given.body -> 'value', 'null'),
                    expires_at = ends, accessed_at = now(), user_id = given.body ->> 'user',
                    metadata = coalesce(given.body -> 'metadata', '{}')
                where thread_id = given.key and version < given.version
                  and (given.expect is null or version = given.expect);
                if found then
                    results[given.ord] := '{"state": "stored"}';
                    exit;
                end if;
            end if;
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
            if verdict is null and held.version is null then
                insert into public.conversation_threads
                    (thread_id, version, conversation_data, expires_at, user_id, metadata)
                values (given.key, given.version, coalesce(given.body -> 'value', 'null'), ends,
                        given.body ->> 'user', coalesce(given.body -> 'metadata', '{}'))
                on conflict (thread_id) do nothing;
                verdict := case when found then 'stored' end;
            end if;
            -- Without a verdict, another transaction has inserted the row since the update: once more.
            if verdict is not null then
                results[given.ord] := json_build_object('state', verdict, 'version', coalesce(held.version, 0)::text);
                exit;
            end if;
        end loop;
    end loop;
    return json_build_object('now', public.threadkeep_now(), 'schema', 1,
                             'rows', coalesce(array_to_json(results), '[]'));
end $$;
