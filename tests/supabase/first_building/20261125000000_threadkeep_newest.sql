-- The newest threads, page by page, for the warm-up: without this, each page sorts all of them. Versions hardly ever meet, so
-- that the thread's id need not stand in the index, too. On a large table that is written to, make it beforehand with
-- `create index concurrently`; this then finds it.

create index if not exists conversation_threads_version on public.conversation_threads (version);
