
create table records (
    seq            integer not null primary key,
    key            text    not null,
    is_queued      integer not null,
    version        integer not null,
    expires_at     integer not null,
    at             integer not null,
    bytes          integer not null,
    writer         integer not null,
    if_version     integer,
    is_provisional integer not null,
    user           text,
    metadata       text    not null,
    value          text
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
    if_version integer,
    queued_at  integer not null,
    died_at    integer not null,
    reason     text    not null,
    newer      integer
) strict;
create table meta (name text not null primary key, value text not null) strict;
insert into meta values ('role', 'queue'), ('project', 'here');
pragma application_id = 0x74686b70;
pragma user_version = 2;
insert into records (seq, key, is_queued, version, expires_at, at, bytes, writer, if_version, is_provisional, user, metadata, value)
    values
    (1, 'copy', 0, 10 << 21, 9000000000000, 10, 300, 0, null, 0, 'u', '{}', '[1]'),
    (2, 'copy', 1, 20 << 21, 9000000000000, 20, 300, 1 << 24, 10 << 21, 0, 'u', '{}', '[1,2]'),
    (3, 'put', 1, 30 << 21, 9000000000000, 30, 300, 1 << 24, null, 0, null, '{}', '"put"'),
    (4, 'removed', 1, 40 << 21, 40, 40, 300, 1 << 24, null, 0, null, '{}', null);
insert into dead_letters (key, version, value, expires_at, metadata, bytes, if_version, queued_at, died_at, reason, newer)
    values ('dead', 5 << 21, '"dead"', 9000000000000, '{}', 300, 4 << 21, 5, 6, 'superseded', 6 << 21);
