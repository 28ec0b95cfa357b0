//! `queue import` and `queue move`: what other files hold.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
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
/// What is looked at to tell an export from a queue's file: more than the first page, which may be destroyed.
const HEAD: u64 = 64 << 10;
/// No line of an export is as long: a conversation and its metadata have 64 MiB each.
const LINE: u64 = 256 << 20;
/// What Windows puts before UTF-8.
const BOM: &[u8] = "\u{feff}".as_bytes();

pub async fn import(settings: Builder, import: &Import, out: &mut Output) -> Result<Outcome, Failure> {
    let is_export = import.from == Path::new("-") || is_export(&head(&import.from)?);
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

fn head(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut head = Vec::new();
    let read = open(path)?.take(HEAD).read_to_end(&mut head);
    read.map_err(|e| Failure::of_file(path, "cannot be read", &e))?;
    Ok(head)
}

/// Whether a file that begins so is lines of JSON; an empty one is an export of nothing. Either kind may be damaged at its
/// start: a queue's file has bytes near it that no text has, and an export that got such bytes has a sound line near them.
fn is_export(head: &[u8]) -> bool {
    let is_text = !head.contains(&0) && is_utf8_so_far(head);
    let is_line = |line: &[u8]| {
        let line = serde_json::from_slice::<Value>(line).unwrap_or_default();
        ["kind", "key", "version", "queued_at"].iter().all(|name| line.get(name).is_some())
    };
    !head.starts_with(b"SQLite format 3\0") && (is_text || head.split(|byte| *byte == b'\n').any(is_line))
}

/// The last character may be cut.
fn is_utf8_so_far(head: &[u8]) -> bool {
    std::str::from_utf8(head).map_or_else(|error| error.error_len().is_none(), |_| true)
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
            let read = from.by_ref().take(LINE).read_until(b'\n', &mut line);
            is_more = read.map_err(|e| Failure::Other(format!("the lines cannot be read: {e}")))? > 0;
            number += 1;
            bytes += line.len();
            if line.len() as u64 == LINE {
                let size = size(LINE);
                return Err(Failure::Other(format!(
                    "line {number} has {size} or more: no line of an export has"
                )));
            }
            if number == 1 && line.starts_with(BOM) {
                line.drain(..BOM.len());
            }
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
    let mut moved = path.clone().into_os_string();
    moved.push(".moved");
    let moved = Path::new(&moved);
    if !path.exists() && moved.exists() {
        let text = format!("{} was moved already: it is {} now", path.display(), moved.display());
        return Err(Failure::Other(text));
    }
    let file = settings.open_queue_file_of_origin().await?;
    let mut progress = Progress::new("moving", None);
    let moved = file.move_from(path, |seen| progress.set(seen as u64, None)).await?;
    drop(progress);
    file.close().await?;
    let renamed = QueueFile::retire(path).await?;
    let value = merged(&json!({"renamed_to": renamed.display().to_string()}), &moved);
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

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &[u8] = br#"{"kind":"dead","key":"k","version":"1","queued_at":1,"reason":""}"#;

    #[test]
    fn an_export_is_told_from_a_queues_file_also_where_its_start_is_damaged() {
        let texts: [&[u8]; 6] =
            [b"", b"\n", b"damaged\n", LINE, "{\"key\": \"\u{e9}".as_bytes(), "\u{feff}{}".as_bytes()];
        for text in texts {
            assert!(is_export(text) && is_export(&[text, b"\xc3"].concat()), "{text:?}");
        }
        for damage in [&b"\0\0\0\0"[..], b"\xff\xfe"] {
            assert!(is_export(&[damage, b"\n", LINE, b"\n"].concat()), "{damage:?} beside a sound line");
            assert!(!is_export(&[damage, b"\n{\"kind\":\"a conversation\"}\n"].concat()), "{damage:?}");
        }
        assert!(!is_export(&[b"SQLite format 3\0", LINE, b"\n", LINE].concat()));
        assert!(!is_export(&[&[b'x'; 4096][..], &[0; 4096]].concat()), "a first page that was destroyed");
    }
}
