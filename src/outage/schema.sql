-- Queued writes, and copies of the store's records. A key has at most one copy, and any number of queued writes.
create table records (
    seq            integer not null primary key, -- the order of writing; negative: a copy that no caller has used
    key            text    not null,
    is_queued      integer not null,  -- 1: a queued write; 0: a copy of the store's record
    version        integer not null,
    expires_at     integer not null,  -- milliseconds since the epoch, as all times here
    at             integer not null,  -- of a queued write: when it was queued; of a copy: when the store confirmed it
    bytes          integer not null,  -- the record's share of the limits
    writer         integer not null,  -- of a queued write: the writer that issued the version
    if_version     integer,           -- of an update: the version that it changes; null: any version
    is_provisional integer not null,  -- 1: clock sync gives the queued write its final version and times
    user           text,
    metadata       text    not null,
    value          text,              -- null: a tombstone
    append         text               -- of an append: its target, as JSON; the value has the new items
) strict;
create unique index copy_of_key on records (key) where is_queued = 0;
create index queue_of_key on records (key, version) where is_queued = 1;
create index replica on records (seq, bytes) where is_queued = 0;
create index queue on records (seq, bytes) where is_queued = 1;
create index provisional on records (key) where is_provisional = 1;
create table dead_letters (
    id         integer primary key,
    key        text    not null,
    version    integer not null,
    value      text,
    expires_at integer not null,
    user       text,
    metadata   text    not null,
    bytes      integer not null,
    if_version integer,              -- of an update: the version that it changed
    queued_at  integer not null,
    died_at    integer not null,
    reason     text    not null,
    newer      integer,              -- the version that superseded it
    append     text                  -- of an append: its target
) strict;
