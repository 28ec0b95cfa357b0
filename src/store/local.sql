create table conversations (
    key          text    not null primary key,
    version      integer not null,
    value        text,              -- null: deleted, or expired and emptied
    expires_at   integer not null,  -- milliseconds since the epoch, as all times here
    user         text,
    metadata     text    not null,
    base_version integer not null,  -- of the last plain write, or of the last remove or expiry
    last_writer  integer not null,  -- the writer of the last accepted write; 0: unknown
    run_began    integer not null,  -- the version below the unbroken run of writes by the daemon of last_writer
    created_at   integer not null,
    accessed_at  integer not null
) strict;
create index conversations_by_version on conversations (version, key);
create index conversations_by_user on conversations (user, version, key) where user is not null;
create index conversations_by_expiry on conversations (expires_at) where value is not null;
-- The last counted version of each writer, for 8 days.
create table writers (
    key     text    not null,
    writer  integer not null,
    version integer not null,
    primary key (key, writer)
) strict, without rowid;
create index writers_by_version on writers (version);
