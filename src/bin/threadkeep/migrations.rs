//! `migrations`: the SQL files that the database needs, written to a folder or to standard output.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::arguments::Migrations;
use crate::failure::{Failure, Outcome, tell};
use crate::output::Output;

/// Name and content of a file in `migrations/`.
macro_rules! file {
    ($name:literal) => {
        ($name, include_str!(concat!("../../../migrations/", $name)))
    };
}

/// All files in `migrations/`, in the order in which they are applied. A test of the command line holds the list to the
/// folder.
const FILES: &[(&str, &str)] =
    &[file!("20260101000000_conversation_threads.sql"), file!("20261126000000_threadkeep.sql")];

/// How a file in the folder compares with the one that this program has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Missing,
    Same,
    Other,
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

/// Writes all files, or none if that would replace a file that differs.
fn write_all(folder: &Path, overwrite: bool, out: &mut Output) -> Result<Outcome, Failure> {
    fs::create_dir_all(folder).map_err(|e| Failure::of_file(folder, "cannot be created", &e))?;
    let states = FILES.iter().map(|(name, sql)| state(&folder.join(name), sql));
    let states = states.collect::<Result<Vec<_>, _>>()?;
    let others: Vec<&str> = names_of(State::Other, &states).collect();
    if !others.is_empty() && !overwrite {
        return Err(Failure::Other(format!(
            "nothing was written, because {} in {} would change: compare, and give --overwrite to replace",
            others.join(" and "),
            folder.display()
        )));
    }
    for ((name, sql), state) in FILES.iter().zip(states) {
        let path = folder.join(name);
        if state != State::Same {
            fs::write(&path, sql).map_err(|e| Failure::of_file(&path, "cannot be written", &e))?;
        }
        let done = match state {
            State::Missing => "written",
            State::Same => "unchanged",
            State::Other => "replaced",
        };
        out.either(&json!({"file": path.display().to_string(), "done": done}), || {
            format!("{done}\t{}", path.display())
        })?;
    }
    tell(
        "next: `supabase db push --include-all`, which also applies files that are older than the newest applied one",
    );
    Ok(Outcome::Done)
}

fn names_of(wanted: State, states: &[State]) -> impl Iterator<Item = &'static str> {
    FILES.iter().zip(states).filter(move |(_, state)| **state == wanted).map(|((name, _), _)| *name)
}

fn state(path: &Path, sql: &str) -> Result<State, Failure> {
    match fs::read(path) {
        Ok(content) if content == sql.as_bytes() => Ok(State::Same),
        Ok(_) => Ok(State::Other),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(State::Missing),
        Err(error) => Err(Failure::of_file(path, "cannot be read", &error)),
    }
}
