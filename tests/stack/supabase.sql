-- What a hosted Supabase project has before its first migration, as far as threadkeep can tell the
-- difference. The superuser of the cluster is supabase_admin, as it is there.

create role anon nologin noinherit;
create role authenticated nologin noinherit;
create role service_role nologin noinherit bypassrls;
create role authenticator login noinherit;
grant anon, authenticated, service_role to authenticator;

alter role anon set statement_timeout = '3s';
alter role authenticated set statement_timeout = '8s';
alter role authenticator set statement_timeout = '8s'; -- and with it service_role, which has none of its own
alter role authenticator set lock_timeout = '8s';

-- Migrations run as postgres, who owns the database but is no superuser.
create role postgres login createdb createrole replication bypassrls;
grant anon, authenticated, service_role to postgres;
alter database postgres owner to postgres;

-- Usage of the schema and nothing else: since 2026 new tables and functions get no grants by themselves.
grant usage on schema public to anon, authenticated, service_role;

-- What a server is asked to see whether it is up; beside public, which belongs to the migrations.
create schema stack;
grant usage on schema stack to anon, authenticated, service_role;
create function stack.ready() returns boolean language sql stable return true;

-- What @supabase/lite connects as. It needs schemas of its own, and it grants every table to everyone, which
-- it must not be able to do to the tables of the migrations: so it owns nothing else.
create role lite login bypassrls;
grant anon, authenticated, service_role to lite;
grant create on database postgres to lite;
alter role lite set statement_timeout = '8s';
-- The least there is: without any privilege its grants would fail instead of warning.
alter default privileges for role postgres, supabase_admin in schema public
    grant references on tables to lite;
alter default privileges for role postgres, supabase_admin in schema public
    grant select on sequences to lite;
