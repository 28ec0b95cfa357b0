-- The state of a hosted Supabase project before its first migration, as far as threadkeep uses it.
-- The superuser of the cluster is supabase_admin, as on Supabase.

create role anon nologin noinherit;
create role authenticated nologin noinherit;
create role service_role nologin noinherit bypassrls;
create role authenticator login noinherit;
grant anon, authenticated, service_role to authenticator;

alter role anon set statement_timeout = '3s';
alter role authenticated set statement_timeout = '8s';
alter role authenticator set statement_timeout = '8s'; -- also for service_role, which has no timeout of its own
alter role authenticator set lock_timeout = '8s';

-- Migrations run as postgres. That role owns the database, but is not a superuser.
create role postgres login createdb createrole replication bypassrls;
grant anon, authenticated, service_role to postgres;
alter database postgres owner to postgres;

-- These roles get only the usage of the schema. Since 2026 new tables and functions get no default grants.
grant usage on schema public to anon, authenticated, service_role;

-- The readiness check of a server calls this function. The schema public belongs to the migrations.
create schema stack;
grant usage on schema stack to anon, authenticated, service_role;
create function stack.ready() returns boolean language sql stable return true;

-- The role of @supabase/lite, which needs schemas of its own. Lite grants every table to everyone.
-- It must not do so for the tables of the migrations, so the role owns no other object.
create role lite login bypassrls;
grant anon, authenticated, service_role to lite;
grant create on database postgres to lite;
alter role lite set statement_timeout = '8s';
-- The smallest privilege: without any privilege, the grants of lite fail instead of warning.
alter default privileges for role postgres, supabase_admin in schema public
    grant references on tables to lite;
alter default privileges for role postgres, supabase_admin in schema public
    grant select on sequences to lite;
