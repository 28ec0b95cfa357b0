create table records (
    key                 text    not null primary key,
    version             integer not null,
    value               text,              -- null: a tombstone
    expires_at          integer not null,  -- milliseconds since the epoch, as all times here
    user                text,
    metadata            text    not null,
    bytes               integer not null,  -- the record's share of the limits
    seq                 integer not null,  -- the order of writing; negative: a copy that no caller has used
    at                  integer not null,  -- of a queued write: when it was queued; of a copy: when the store confirmed it
    is_queued           integer not null,  -- 1: a queued write; 0: a copy of the store's record
    base                integer,           -- of an update: the version that it changes; null: any version
    sent_versions       text    not null,  -- versions of this write that the store may hold already; 0: the update of a queued put
    dispatched          integer not null,  -- 1: it was sent before it was queued, so the store may hold it
    provisional_skew_ms integer,           -- lead of the issuing clock over the system's clock; null: the version is final
    read_state          integer not null default 0, -- 1: the store holds a newer version; 2: unverified
    unsynced_period     integer not null default 0  -- the unsynced period of this process that issued the version
) strict;
create index queue on records (seq, bytes) where is_queued = 1;
create index replica on records (seq, bytes) where is_queued = 0;
-- Writes that bypassed the queue and have no response yet. The store may hold them.
create table attempts (
    key        text    not null,
    version    integer not null,
    is_put     integer not null,  -- 1: a put or a remove; 0: an update
    primary key (key, version)
) strict, without rowid;
create table dead_letters (
    id         integer primary key,
    key        text    not null,
    version    integer not null,
    value      text,
    expires_at integer not null,
    user       text,
    metadata   text    not null,
    bytes      integer not null,
    queued_at  integer not null,
    died_at    integer not null,
    reason     text    not null,
    newer      integer             -- the version that superseded it
) strict;
