//! The command `migrations` writes the SQL files of the database to a folder or to standard output.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::arguments::Migrations;
use crate::failure::{Failure, Outcome, tell};
use crate::output::Output;

/// Embeds a file of `migrations/` as its name and its content.
macro_rules! embed {
    ($name:literal) => {
        ($name, include_str!(concat!("../../migrations/", $name)))
    };
}

/// All files of `migrations/`, in the order of application. A test compares the list with the folder.
const FILES: &[(&str, &str)] =
    &[embed!("20260101000000_conversation_threads.sql"), embed!("20261126000000_threadkeep.sql")];

/// The state of a file in the folder, compared with the embedded file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileState {
    Missing,
    Same,
    Different,
}

pub fn migrations(arguments: &Migrations, out: &mut Output) -> Result<Outcome, Failure> {
    match &arguments.dir {
        Some(folder) => write_all(folder, arguments.overwrite, out),
        None => print_all(out),
    }
}

fn print_all(out: &mut Output) -> Result<Outcome, Failure> {
    for (name, sql) in FILES {
        out.either(&json!({"file": name, "sql": sql}), || format!("-- {name}\n\n{sql}"))?;
    }
    Ok(Outcome::Done)
}

/// Writes all files. Without `overwrite`, writes none if one of them would replace a file that differs.
fn write_all(folder: &Path, overwrite: bool, out: &mut Output) -> Result<Outcome, Failure> {
    fs::create_dir_all(folder).map_err(|e| Failure::of_file(folder, "cannot be created", &e))?;
    let states = FILES.iter().map(|(name, sql)| state(&folder.join(name), sql));
    let states = states.collect::<Result<Vec<_>, _>>()?;
    let different: Vec<&str> = names_of(FileState::Different, &states).collect();
    if !different.is_empty() && !overwrite {
        return Err(Failure::Other(format!(
            "nothing was written, because {} in {} would change; compare them, and replace them with --overwrite",
            different.join(" and "),
            folder.display()
        )));
    }
    for ((name, sql), state) in FILES.iter().zip(states) {
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
    tell(
        "next: `supabase db push --include-all`, which also applies files older than the newest applied file",
    );
    Ok(Outcome::Done)
}

fn names_of(wanted: FileState, states: &[FileState]) -> impl Iterator<Item = &'static str> {
    FILES.iter().zip(states).filter(move |(_, state)| **state == wanted).map(|((name, _), _)| *name)
}

fn state(path: &Path, sql: &str) -> Result<FileState, Failure> {
    match fs::read(path) {
        Ok(content) if content == sql.as_bytes() => Ok(FileState::Same),
        Ok(_) => Ok(FileState::Different),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(FileState::Missing),
        Err(error) => Err(Failure::of_file(path, "cannot be read", &error)),
    }
}
