-- Pages of the newest threads, read from an index alone: neither the table nor all threads of a user are read and sorted for
-- them any more, and expired rows among them are passed over without being read. The function says what the one that it
-- replaces said. On a large table that is written to, make the two indexes beforehand with `create index concurrently`; this
-- then finds them.

-- What these two served, the ones below serve; each index costs every write. They go first: to drop an index locks the table as
-- nothing else does, and whoever already held a lesser lock by then could be waited for by those that he waits for.
drop index if exists public.conversation_threads_version;
drop index if exists public.conversation_threads_user_id_idx;
create index if not exists conversation_threads_newest on public.conversation_threads (version, expires_at);
create index if not exists conversation_threads_newest_of_user on public.conversation_threads (user_id, version);

-- page: {"most", "user"?, "version"? and "key"?}. The newest live threads, of one user where one is named, before a given
-- (version, key): at most `most` rows and about 16 MiB, and whether these are the `last`.
create or replace function public.threadkeep_recent(page jsonb) returns json
    language plpgsql volatile security invoker set search_path = '' as $$
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
    return json_build_object('now', floor(extract(epoch from present) * 1000)::bigint, 'schema', 1,
                             'rows', coalesce(array_to_json(found_rows), '[]'), 'last', is_last);
end $$;
