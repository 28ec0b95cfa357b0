-- The table as the plan has it. Harmless when applied twice.

create table if not exists public.conversation_threads (
    id                uuid        primary key default gen_random_uuid(),
    thread_id         text        not null unique,
    user_id           text,
    conversation_data jsonb       not null,
    created_at        timestamptz default now(),
    accessed_at       timestamptz default now(),
    expires_at        timestamptz not null,
    metadata          jsonb       default '{}'
);

create index if not exists conversation_threads_thread_id_idx  on public.conversation_threads (thread_id);
create index if not exists conversation_threads_expires_at_idx on public.conversation_threads (expires_at);
create index if not exists conversation_threads_user_id_idx    on public.conversation_threads (user_id);
