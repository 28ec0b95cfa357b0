create table records (
    key                 text    not null primary key,
    version             integer not null,
    value               text,
    expires_at          integer not null,
    user                text,
    metadata            text    not null,
    bytes               integer not null,
    seq                 integer not null,
    at                  integer not null,
    is_queued           integer not null,
    base                integer,
    sent_versions       text    not null,
    dispatched          integer not null,
    provisional_skew_ms integer,
    read_state          integer not null default 0,
    unsynced_period     integer not null default 0
) strict;
create index queue on records (seq, bytes) where is_queued = 1;
create index replica on records (seq, bytes) where is_queued = 0;
create table attempts (
    key        text    not null,
    version    integer not null,
    is_put     integer not null,
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
    newer      integer
) strict;
create table meta (name text not null primary key, value text not null) strict;
insert into meta values ('role', 'queue'), ('project', 'here'), ('dispatched', '3');
pragma application_id = 0x74686b70;
pragma user_version = 1;
insert into records (key, version, value, expires_at, metadata, bytes, seq, at, is_queued, base, sent_versions, dispatched,
                     provisional_skew_ms, read_state) values
    ('copy', 10 << 21, '"copy"', 9000000000000, '{}', 300, 1, 10, 0, null, '', 0, null, 0),
    ('put', 20 << 21, '"put"', 9000000000000, '{}', 300, 2, 20, 1, null, '', 0, null, 0),
    ('update', 30 << 21, '"update"', 9000000000000, '{}', 300, 3, 30, 1, 7, ' 8', 1, null, 0),
    ('updated put', 42 << 21, '"updated"', 9000000000000, '{}', 300, 4, 42, 1, 40 << 21, '0', 0, 5, 0),
    ('superseded', 50 << 21, null, 9000000000000, '{}', 300, 5, 50, 1, null, '', 0, null, 1);
insert into dead_letters (key, version, value, expires_at, metadata, bytes, queued_at, died_at, reason, newer)
    values ('dead', 5 << 21, '"dead"', 9000000000000, '{}', 300, 5, 6, 'superseded', 6 << 21);
