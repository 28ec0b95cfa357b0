-- Makes room for the tables of the present format. The indexes of format 1 go with its table.
alter table conversations rename to former;
drop index if exists conversations_by_version;
drop index if exists conversations_by_user;
drop index if exists conversations_by_expiry;
