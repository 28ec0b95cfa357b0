-- Creates the planned table, with the three indexes of the plan. If a relation of that name exists, this file changes nothing, and
-- the next file compares the relation with the plan.

set lock_timeout = '1s';

do $$
begin
    if to_regclass('public.conversation_threads') is not null then
        return;
    end if;

    create table public.conversation_threads (
        id                uuid        primary key default gen_random_uuid(),
        thread_id         text        not null unique,
        user_id           text,
        conversation_data jsonb       not null,
        created_at        timestamptz default now(),
        accessed_at       timestamptz default now(),
        expires_at        timestamptz not null,
        metadata          jsonb       default '{}'
    );

    create index idx_conversation_threads_thread_id  on public.conversation_threads (thread_id);
    create index idx_conversation_threads_expires_at on public.conversation_threads (expires_at);
    create index idx_conversation_threads_user_id    on public.conversation_threads (user_id);

    -- Older Supabase projects grant a new table to the public keys, and newer projects grant it to no role. The next file adds the
    -- policies.
    alter table public.conversation_threads enable row level security;
    if exists (select from pg_catalog.pg_roles where rolname = 'service_role') then
        grant select, insert, update, delete on table public.conversation_threads to service_role;
    end if;
end $$;

reset lock_timeout;
