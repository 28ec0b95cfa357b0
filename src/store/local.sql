create table conversations (
    key         text    not null primary key,
    version     integer not null,
    value       text,              -- null: deleted, or expired and emptied
    expires_at  integer not null,  -- milliseconds since the epoch, as all times here
    user        text,
    metadata    text    not null,
    accepted    text    not null,  -- the last 16 accepted versions, newest first
    created_at  integer not null,
    accessed_at integer not null
) strict;
create index conversations_by_version on conversations (version, key);
create index conversations_by_user on conversations (user, version, key) where user is not null;
create index conversations_by_expiry on conversations (expires_at) where value is not null;
