-- Format 1 kept a list of accepted versions instead of writers. No write of an earlier process comes again, so the list is not
-- needed, and the last writer is unknown.
insert into conversations
select key, version, value, expires_at, user, metadata, version, 0, 0, created_at, accessed_at from former;
drop table former;
