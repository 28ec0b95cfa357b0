//! Applies the migrations with the Supabase CLI and with psql to each supported kind of database.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod advisors;
mod agreement;
mod changes;
mod content;
mod database;
mod locks;
mod partitions;
mod races;
mod shapes;
#[path = "../stack/mod.rs"]
mod stack;
mod supabase_cli;

/// The six files of the first building, which the files of `migrations/` replace.
const FIRST_BUILDING: &str = "tests/supabase/first_building";

/// The second file as it was at revision 2 of the schema.
const REVISION_2: &str = "tests/supabase/revision_2";

/// Creates the table of the plan by hand, with one row.
const PLANNED: &str = "
    create table conversation_threads (
        id uuid primary key default gen_random_uuid(),
        thread_id text not null unique,
        user_id text,
        conversation_data jsonb not null,
        created_at timestamptz default now(),
        accessed_at timestamptz default now(),
        expires_at timestamptz not null,
        metadata jsonb default '{}'
    );
    create index idx_conversation_threads_thread_id on conversation_threads (thread_id);
    create index idx_conversation_threads_expires_at on conversation_threads (expires_at);
    create index idx_conversation_threads_user_id on conversation_threads (user_id);
    insert into conversation_threads (thread_id, user_id, conversation_data, expires_at)
    values ('before', 'somebody', '[1]', now() + interval '1 hour')";
