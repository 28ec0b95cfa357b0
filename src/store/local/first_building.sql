-- Gives a file of the first building the names of format 1.
alter table about rename to meta;
update meta set value = 'local' where name = 'role';
alter table threads rename to conversations;
