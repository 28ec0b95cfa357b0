//! Tests `supabase db push` and `supabase db lint`.

use crate::advisors::advice;
use crate::database::{Database, Project, names};
use crate::{FIRST_BUILDING, PLANNED, REVISION_2};

const SIX: [&str; 6] = [
    "conversation_threads_changed",
    "conversation_threads_newest",
    "conversation_threads_newest_of_user",
    "conversation_threads_pkey",
    "conversation_threads_thread_id_key",
    "idx_conversation_threads_expires_at",
];

/// Pushes, lints, and compares the schema with that of psql on an empty database. Pushes again with and without history.
fn check(project: &Project, database: &Database) {
    let pushed = project.push(database).unwrap_or_else(|said| panic!("{said}"));
    let last = names().pop().unwrap();
    assert!(pushed.contains(&format!("Applying migration {last}")), "{pushed}");
    let expected = Database::plain().schema();
    assert!(database.schema() == expected, "{}", database.schema());
    assert_eq!(database.indexes(), SIX);
    let lint = project.lint(database).unwrap_or_else(|said| panic!("{said}"));
    assert!(lint.contains("No schema errors found"), "{lint}");
    assert_eq!(advice(database), [""; 0]);

    let again = project.push(database).unwrap();
    assert!(again.contains("up to date"), "{again}");
    for name in names() {
        let version = name.split('_').next().unwrap();
        database
            .sql(&format!("delete from supabase_migrations.schema_migrations where version = '{version}'"));
    }
    let again = project.push(database).unwrap();
    assert!(again.contains(&format!("Applying migration {last}")), "{again}");
    assert!(database.schema() == expected, "{}", database.schema());
}

#[test]
fn empty_project_is_migrated() {
    let (project, database) = (Project::new(), Database::new());
    check(project.copy("migrations"), &database);
}

/// The project has a migration older and one newer than the library's files.
#[test]
fn project_with_history_is_migrated() {
    let (project, database) = (Project::new(), Database::new());
    let ours = "create table daemons (name text); alter table daemons enable row level security; drop table daemons;";
    for name in ["20200101000000_early.sql", "20991231000000_late.sql"] {
        project.write(name, ours);
    }
    project.push(&database).unwrap();
    check(project.copy("migrations"), &database);
}

/// Projects from before 2026 grant each new table and function to all roles.
#[test]
fn project_that_grants_everything_is_closed() {
    let (project, database) = (Project::new(), Database::new());
    let everything = "alter default privileges for role postgres in schema public
                      grant all on OBJECTS to anon, authenticated, service_role";
    for objects in ["tables", "functions", "sequences"] {
        database.sql(&everything.replace("OBJECTS", objects));
    }
    project.copy("migrations");
    project.push(&database).unwrap();
    assert_eq!(advice(&database), [""; 0]);
}

#[test]
fn planned_table_made_by_hand_is_migrated() {
    let (project, database) = (Project::new(), Database::new());
    database.try_sql(PLANNED).unwrap();
    assert_eq!(database.indexes().len(), 5, "its own, of which two are redundant");
    check(project.copy("migrations"), &database);
    let row = database.sql("select thread_id, conversation_data, version > 0 from conversation_threads");
    assert_eq!(row, "before|[1]|t");
}

/// The CLI requires a repair of its history, because the files of the first building are gone.
#[test]
fn project_of_first_building_is_upgraded() {
    let (project, database) = (Project::new(), Database::new());
    project.copy(FIRST_BUILDING);
    project.push(&database).unwrap();
    database.sql(
        "insert into conversation_threads (thread_id, conversation_data, expires_at) values ('before', '[1]', now() + interval '1h')",
    );
    project.remove(FIRST_BUILDING);
    project.copy("migrations");
    let refused = project.push(&database).unwrap_err();
    let repair = refused.lines().find_map(|line| line.strip_prefix("supabase migration repair ")).unwrap();
    let arguments: Vec<&str> = ["migration", "repair"].into_iter().chain(repair.split_whitespace()).collect();
    project.cli(&database, &arguments).unwrap();
    check(&project, &database);
    let row = "select conversation_data, version > 0, base_version is null from conversation_threads";
    assert_eq!(database.sql(row), "[1]|t|t");
}

/// The second file has the name that it had at revision 2. The CLI applies it after a repair of its history.
#[test]
fn project_of_revision_2_is_upgraded() {
    let (project, database) = (Project::new(), Database::new());
    project.copy("migrations").copy(REVISION_2);
    project.push(&database).unwrap();
    assert_eq!(database.sql("select threadkeep_probe() ->> 'revision'"), "2");
    project.copy("migrations");
    project.cli(&database, &["migration", "repair", "--status", "reverted", "20261126000000"]).unwrap();
    check(&project, &database);
}

/// The output of `push` contains the error message of the migration.
#[test]
fn push_to_unplanned_table_names_the_column() {
    let (project, database) = (Project::new(), Database::new());
    database
        .try_sql(&PLANNED.replace("user_id text,", "user_id uuid,").replace("'somebody'", "null"))
        .unwrap();
    let said = project.copy("migrations").push(&database).unwrap_err();
    assert!(said.contains("column user_id has the type uuid instead of text"), "{said}");
    assert!(said.contains("alter column user_id type text using user_id::text"), "{said}");
}
