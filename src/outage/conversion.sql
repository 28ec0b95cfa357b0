-- Converts the tables of format 1, which are called `former` and `former_letters` now.
-- A provisional version leads the system's clock by `provisional_skew_ms`. In format 2 one number is the lead of all, and a new file has zero.
create temp view queued as
    select *, coalesce(provisional_skew_ms, 0) as skew, provisional_skew_ms is not null as is_provisional,
        -- The write is the update of a put that the store perhaps does not have. Format 2 keeps both.
        ' ' || sent_versions || ' ' like '% 0 %' as follows_a_put,
        ((abs(random()) % 549755813887 + 1) << 24) | (abs(random()) & 16777215) as writer
    from former where is_queued = 1;
insert into records (seq, key, is_queued, version, expires_at, at, bytes, writer, if_version, is_provisional, user, metadata, value)
    select seq, key, 1, version - (skew << 21), expires_at - skew, at - skew, bytes, writer,
        base - case when follows_a_put then skew << 21 else 0 end, is_provisional, user, metadata, value
    from queued;
insert into records (seq, key, is_queued, version, expires_at, at, bytes, writer, if_version, is_provisional, user, metadata, value)
    select (select max(seq) from former) + row_number() over (order by seq), key, 1, base - (skew << 21), expires_at - skew,
        at - skew, bytes, writer, null, is_provisional, user, metadata, value
    from queued where follows_a_put;
-- A copy can be loaded again.
insert or ignore into records
        (seq, key, is_queued, version, expires_at, at, bytes, writer, if_version, is_provisional, user, metadata, value)
    select seq, key, 0, version, expires_at, at, bytes, 0, null, 0, user, metadata, value from former where is_queued = 0;
-- The store was or may have been seen with newer versions than these writes.
insert into meta select 'unverified', max(seq) from former where is_queued = 1 and read_state <> 0 having max(seq) is not null;
insert into dead_letters (id, key, version, value, expires_at, user, metadata, bytes, queued_at, died_at, reason, newer)
    select id, key, version, value, expires_at, user, metadata, bytes, queued_at, died_at, reason, newer from former_letters;
drop view queued;
drop table former;
drop table former_letters;
drop table attempts;
delete from meta where name = 'dispatched';
