//! `queue import` and `queue move`: what other files hold.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Value, json};
use threadkeep::{Backend, Builder, Imported, QueueFile, Salvaged};

use crate::arguments::{Import, Move};
use crate::failure::{Failure, Outcome, tell, with_causes};
use crate::output::{Output, size};
use crate::progress::Progress;

/// What one call takes in.
const LINES: usize = 500;
const BYTES: usize = 8 << 20;

pub async fn import(settings: Builder, import: &Import, out: &mut Output) -> Result<Outcome, Failure> {
    let is_export = import.from == Path::new("-") || is_text(&import.from)?;
    // A file that is there knows whose writes it keeps; a new one is of the project that is set.
    let file = match settings.backend() {
        Backend::Supabase => settings.open_queue_file_of_origin().await?,
        _ => settings.open_queue_file().await?,
    };
    if !is_export {
        let salvaged = file.salvage(&import.from, import.any_origin).await?;
        return report_salvage(&salvaged, out);
    }
    let (imported, wrong) = match import.from == Path::new("-") {
        true => import_lines(&file, std::io::stdin().lock(), import.any_origin).await?,
        false => import_lines(&file, BufReader::new(open(&import.from)?), import.any_origin).await?,
    };
    let value = merged(&json!({"wrong_lines": wrong}), &imported);
    out.either(&value, || in_words(&imported))?;
    if wrong == 0 {
        return Ok(Outcome::Done);
    }
    tell(&format!("threadkeep: {wrong} lines were wrong, and were not taken"));
    Ok(Outcome::Partly)
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(|e| Failure::of_file(path, "cannot be read", &e))
}

/// Whether the file begins as lines of JSON do. An empty one is an export of nothing.
fn is_text(path: &Path) -> Result<bool, Failure> {
    let mut file = BufReader::new(open(path)?);
    let start = file.fill_buf().map_err(|e| Failure::of_file(path, "cannot be read", &e))?;
    Ok(start.iter().find(|byte| !byte.is_ascii_whitespace()).is_none_or(|byte| *byte == b'{'))
}

/// Takes the lines in, a portion at a time, and says how many were wrong.
async fn import_lines(
    file: &QueueFile,
    mut from: impl BufRead,
    any_origin: bool,
) -> Result<(Imported, usize), Failure> {
    let mut progress = Progress::new("importing lines", None);
    let (mut sum, mut wrong, mut number) = (Imported::default(), 0, 0);
    let mut is_more = true;
    while is_more {
        let (mut lines, mut numbers, mut bytes) = (Vec::new(), Vec::new(), 0);
        while is_more && lines.len() < LINES && bytes < BYTES {
            let mut line = Vec::new();
            let read = from.read_until(b'\n', &mut line);
            is_more = read.map_err(|e| Failure::Other(format!("the lines cannot be read: {e}")))? > 0;
            number += 1;
            bytes += line.len();
            match String::from_utf8(line) {
                Ok(line) if line.trim().is_empty() => {}
                Ok(line) => {
                    numbers.push(number);
                    lines.push(line);
                }
                Err(_) => {
                    wrong += 1;
                    tell(&format!("threadkeep: line {number}: it is not UTF-8"));
                }
            }
        }
        let (imported, refused) = file.import(&lines, any_origin).await?;
        for (at, error) in &refused {
            tell(&format!("threadkeep: line {}: {}", numbers[*at], with_causes(error)));
        }
        (sum, wrong) = (sum.and(imported), wrong + refused.len());
        progress.set(number, None);
    }
    Ok((sum, wrong))
}

fn report_salvage(salvaged: &Salvaged, out: &mut Output) -> Result<Outcome, Failure> {
    let value = merged(
        &json!({
            "lost": salvaged.lost,
            "lost_bytes": salvaged.lost_bytes,
            "may_lack_more": salvaged.may_lack_more,
            "had_no_header": salvaged.had_no_header,
        }),
        &salvaged.imported,
    );
    out.either(&value, || in_words(&salvaged.imported))?;
    if salvaged.had_no_header {
        tell("threadkeep: the file's first page was destroyed: that of an empty file was taken instead");
    }
    if salvaged.lost > 0 {
        let bytes = size(salvaged.lost_bytes);
        tell(&format!("threadkeep: {} records, of at least {bytes}, could not be read", salvaged.lost));
    }
    if salvaged.may_lack_more {
        tell("threadkeep: there may have been more, of which nothing is known");
    }
    let is_all = salvaged.lost == 0 && !salvaged.may_lack_more;
    Ok(if is_all { Outcome::Done } else { Outcome::Partly })
}

pub async fn move_from(settings: Builder, from: &Move, out: &mut Output) -> Result<Outcome, Failure> {
    let path = &from.from;
    let moved = format!("{}.moved", path.display());
    if !path.exists() && Path::new(&moved).exists() {
        return Err(Failure::Other(format!("{} was moved already: it is {moved} now", path.display())));
    }
    let file = settings.open_queue_file_of_origin().await?;
    let mut progress = Progress::new("moving", None);
    let moved = file.move_from(path, |seen| progress.set(seen as u64, None)).await?;
    drop(progress);
    file.close().await?;
    let renamed = QueueFile::retire(path).await?;
    let value = merged(&json!({"renamed_to": renamed}), &moved);
    out.either(&value, || {
        format!(
            "{}\n{} is {} now; `threadkeep queue replay`, or the next start of a daemon, brings this to Supabase",
            in_words(&moved),
            path.display(),
            renamed.display()
        )
    })?;
    Ok(Outcome::Done)
}

fn in_words(imported: &Imported) -> String {
    let Imported { queued, dead_letters, already, older, .. } = imported;
    format!(
        "{queued} writes were queued, and {dead_letters} dead letters added; {already} were there already, of {older} \
         there is something newer"
    )
}

fn merged(value: &Value, imported: &Imported) -> Value {
    let mut all = json!({
        "queued": imported.queued,
        "dead_letters": imported.dead_letters,
        "already": imported.already,
        "older": imported.older,
    });
    if let (Some(all), Some(more)) = (all.as_object_mut(), value.as_object()) {
        all.extend(more.clone());
    }
    all
}
