-- Loads, faster: planned once for a session instead of anew with each call, and the value is written out as it is instead of
-- being parsed once more. Says what the function that it replaces said.

-- wants: [{"key": …, "known": "version"?}, …]. Answers in the order asked, each with a state: found | same | absent |
-- later (the answer has grown to 16 MiB: ask again for these).
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
        select asked.ord, asked.known, thread.thread_id, thread.conversation_data, thread.expires_at, thread.user_id,
               thread.metadata, coalesce(thread.version, 0) as version,
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
        'schema', 1,
        'rows', coalesce(json_agg(
            case when not live      then json_build_object('state', 'absent', 'version', version::text)
                 when not is_wanted then json_build_object('state', 'same')
                 when bytes is null or before >= 16 * 1024 * 1024 then json_build_object('state', 'later')
                 else json_build_object(
                     'state', 'found', 'key', thread_id, 'version', version::text,
                     -- Others may have written 'infinity', which no number of milliseconds can say.
                     'expires', floor(extract(epoch from least(expires_at, '9999-12-31')) * 1000)::bigint,
                     'user', user_id, 'metadata', metadata, 'value', conversation_data) end), '[]'))
    from (select * from sized order by ord) as sorted);
end $$;
