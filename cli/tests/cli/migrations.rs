//! `threadkeep migrations` writes the files for a database without a checkout.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::process::Cli;
use crate::stack::{Server, Stack};

/// Returns the name and the content of each file in a folder, sorted by name.
fn files(folder: &Path) -> Vec<(String, String)> {
    let entries =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()).filter(|entry| entry.path().is_file());
    let file = |entry: fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), fs::read_to_string(entry.path()).unwrap())
    };
    let mut files: Vec<_> = entries.map(file).collect();
    files.sort();
    files
}

fn checkout_files() -> Vec<(String, String)> {
    files(&crate::stack::root().join("migrations"))
}

#[tokio::test]
async fn migrations_in_a_folder_are_those_checkout_files() {
    let cli = Cli::new(&[]);
    let written = cli.ok(&["migrations", "--dir", "supabase/migrations"]).await;
    assert_eq!(files(&cli.path("supabase/migrations")), checkout_files());
    assert_eq!(written.out.matches("written\t").count(), checkout_files().len(), "{written:?}");
    assert!(written.err.contains("supabase db push --include-all"), "{written:?}");
    assert!(!written.err.contains("copies the table"), "{written:?}");
    let again = cli.ok(&["migrations", "--dir", "supabase/migrations", "--json"]).await;
    assert!(again.lines().iter().all(|line| line["done"] == json!("unchanged")), "{again:?}");
}

#[tokio::test]
async fn migrations_with_partitions_is_the_optional_file_alone() {
    let cli = Cli::new(&[]);
    let written = cli.ok(&["migrations", "--partitions", "--dir", "m"]).await;
    assert!(written.err.contains("all its readers and writers wait meanwhile"), "{written:?}");
    let optional = files(&crate::stack::root().join("migrations/optional"));
    assert_eq!(files(&cli.path("m")), optional);
    let printed = cli.ok(&["migrations", "--partitions"]).await;
    assert_eq!(printed.out.trim_end(), format!("-- {}\n\n{}", optional[0].0, optional[0].1).trim_end());
}

#[tokio::test]
async fn migrations_edited_file_needs_overwrite() {
    let cli = Cli::new(&[]);
    let (name, sql) = checkout_files().pop().unwrap();
    fs::create_dir(cli.path("m")).unwrap();
    let edited = cli.path("m").join(&name);
    fs::write(&edited, "-- edited").unwrap();
    fs::write(cli.path("m/20250101000000_other.sql"), "-- of the user").unwrap();
    let refused = cli.run(&["migrations", "--dir", "m"]).await;
    assert_eq!((refused.code, refused.out.as_str()), (1, ""), "{refused:?}");
    assert!(refused.err.contains(&name) && refused.err.contains("--overwrite"), "{refused:?}");
    assert_eq!(files(&cli.path("m")).len(), 2, "the command writes no file");
    assert_eq!(fs::read_to_string(&edited).unwrap(), "-- edited");
    let replaced = cli.ok(&["migrations", "--dir", "m", "--overwrite"]).await;
    assert!(replaced.out.contains(&format!("replaced\tm/{name}")), "{replaced:?}");
    assert_eq!(fs::read_to_string(&edited).unwrap(), sql);
    assert_eq!(files(&cli.path("m")).len(), checkout_files().len() + 1, "the user's file stays");
}

#[tokio::test]
async fn migrations_write_failure_names_the_path() {
    let cli = Cli::new(&[]);
    fs::write(cli.path("file"), "").unwrap();
    let failed = cli.run(&["migrations", "--dir", "file"]).await;
    assert!(failed.code == 1 && failed.err.contains("file cannot be created"), "{failed:?}");
    fs::create_dir_all(cli.path("m").join(&checkout_files()[0].0)).unwrap();
    let failed = cli.run(&["migrations", "--dir", "m"]).await;
    assert!(failed.code == 1 && failed.err.contains(".sql cannot be read"), "{failed:?}");
}

/// The command ignores invalid settings, because a user runs it before any settings exist.
#[tokio::test(flavor = "multi_thread")]
async fn migrations_from_stdout_prepare_a_database() {
    let cli = Cli::new(&[("CONVERSATION_STORAGE_BACKEND", "supabase"), ("SUPABASE_URL", "junk")]);
    let printed = cli.ok(&["migrations"]).await;
    assert!(checkout_files().iter().all(|(name, sql)| printed.out.contains(&format!("-- {name}\n\n{sql}"))));
    let lines = cli.ok(&["migrations", "--json"]).await.lines();
    let files = lines.iter().map(|line| ["file", "sql"].map(|part| line[part].as_str().unwrap().to_owned()));
    assert_eq!(files.map(|[name, sql]| (name, sql)).collect::<Vec<_>>(), checkout_files());

    let stack =
        tokio::task::spawn_blocking(|| Stack::start_without_migrations(Server::Postrust)).await.unwrap();
    tokio::task::block_in_place(|| {
        stack.psql(&format!("set role postgres; {}", printed.out));
        stack.kill_server();
        stack.start_server();
    });
    let gateway = stack.gateway().await;
    Cli::on(&gateway).ok(&["put", "k", "1"]).await;
}
