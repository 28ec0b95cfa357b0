//! The command `migrations` writes the SQL files of the database to a folder or to standard output.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::arguments::Migrations;
use crate::failure::{Failure, Outcome, tell};
use crate::output::Output;

/// A file of `migrations/`: its name and its content.
type Sql = (&'static str, &'static str);

/// Embeds a file of a folder of the workspace.
macro_rules! embed {
    ($folder:literal, $name:literal) => {
        ($name, include_str!(concat!("../../", $folder, "/", $name)))
    };
}

/// All files of `migrations/`, in the order of application. A test compares the list with the folder.
const FILES: &[Sql] = &[
    embed!("migrations", "20260101000000_conversation_threads.sql"),
    embed!("migrations", "20261126000000_threadkeep.sql"),
];

/// The file that a database can do without.
const PARTITIONS: &[Sql] = &[embed!("migrations/optional", "20261127000000_hash_partitions.sql")];

/// The state of a file in the folder, compared with the embedded file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileState {
    Missing,
    Same,
    Different,
}

pub fn migrations(arguments: &Migrations, out: &mut Output) -> Result<Outcome, Failure> {
    let files = if arguments.partitions { PARTITIONS } else { FILES };
    match &arguments.dir {
        Some(folder) => write_all(files, folder, arguments.overwrite, out),
        None => print_all(files, out),
    }
}

fn print_all(files: &[Sql], out: &mut Output) -> Result<Outcome, Failure> {
    for (name, sql) in files {
        out.either(&json!({"file": name, "sql": sql}), || format!("-- {name}\n\n{sql}"))?;
    }
    Ok(Outcome::Done)
}

/// Writes all files. Without `overwrite`, writes none if one of them would replace a file that differs.
fn write_all(files: &[Sql], folder: &Path, overwrite: bool, out: &mut Output) -> Result<Outcome, Failure> {
    fs::create_dir_all(folder).map_err(|e| Failure::of_file(folder, "cannot be created", &e))?;
    let states = files.iter().map(|(name, sql)| state(&folder.join(name), sql));
    let states = states.collect::<Result<Vec<_>, _>>()?;
    let named = files.iter().zip(&states).filter(|(_, state)| **state == FileState::Different);
    let different: Vec<&str> = named.map(|((name, _), _)| *name).collect();
    if !different.is_empty() && !overwrite {
        return Err(Failure::Other(format!(
            "nothing was written, because {} in {} would change; compare them, and replace them with --overwrite",
            different.join(" and "),
            folder.display()
        )));
    }
    for ((name, sql), state) in files.iter().zip(states) {
        let path = folder.join(name);
        if state != FileState::Same {
            fs::write(&path, sql).map_err(|e| Failure::of_file(&path, "cannot be written", &e))?;
        }
        let done = match state {
            FileState::Missing => "written",
            FileState::Same => "unchanged",
            FileState::Different => "replaced",
        };
        out.either(&json!({"file": path.display().to_string(), "done": done}), || {
            format!("{done}\t{}", path.display())
        })?;
    }
    if files == PARTITIONS {
        tell(
            "the file copies the table, and all its readers and writers wait meanwhile: apply it at a quiet time",
        );
    }
    tell(
        "next: `supabase db push --include-all`, which also applies files older than the newest applied file",
    );
    Ok(Outcome::Done)
}

fn state(path: &Path, sql: &str) -> Result<FileState, Failure> {
    match fs::read(path) {
        Ok(content) if content == sql.as_bytes() => Ok(FileState::Same),
        Ok(_) => Ok(FileState::Different),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(FileState::Missing),
        Err(error) => Err(Failure::of_file(path, "cannot be read", &error)),
    }
}
