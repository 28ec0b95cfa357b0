//! The commands `queue import` and `queue migrate`, which read other files into the outage file.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;

use serde_json::{Value, json};
use threadkeep::tools::{ImportItem, ImportReport, QueueAdmin};
use threadkeep::{Backend, Builder, Error};

use crate::arguments::{Import, Migrate};
use crate::export_line;
use crate::failure::{Failure, Outcome, tell, with_causes};
use crate::output::{Output, counted, size};
use crate::progress::Progress;

/// One call of `import` takes at most this many lines and bytes.
const MAX_BATCH_LINES: usize = 500;
const MAX_BATCH_BYTES: usize = 8 << 20;
/// The bytes that distinguish an export from an outage file: more than the first page, which may be destroyed.
const HEAD_BYTES: u64 = 64 << 10;
/// Lines of an export are shorter: a conversation and its metadata have at most 64 MiB each.
const MAX_LINE_BYTES: u64 = 256 << 20;
/// The byte order mark, with which Windows begins UTF-8 files.
const BOM: &[u8] = "\u{feff}".as_bytes();

pub async fn import(settings: Builder, import: &Import, out: &mut Output) -> Result<Outcome, Failure> {
    let is_export = import.from == Path::new("-") || is_export(&head(&import.from)?);
    // An existing file knows its project. A new file gets the project of the settings.
    let file = match settings.backend() {
        Backend::Supabase => settings.open_queue_of_project().await?,
        _ => settings.open_queue().await?,
    };
    if !is_export {
        let imported = file.import_file(&import.from, import.allow_other_project).await?;
        out.either(&merged(&json!({"unreadable": imported.unreadable}), &imported), || {
            import_text(&imported)
        })?;
        if imported.unreadable == 0 {
            return Ok(Outcome::Done);
        }
        tell(&format!("threadkeep: skipped {}", counted(imported.unreadable, "invalid row")));
        return Ok(Outcome::Partly);
    }
    let (imported, wrong) = match import.from == Path::new("-") {
        true => import_lines(&file, std::io::stdin().lock(), import.allow_other_project).await?,
        false => import_lines(&file, BufReader::new(open(&import.from)?), import.allow_other_project).await?,
    };
    let value = merged(&json!({"wrong_lines": wrong}), &imported);
    out.either(&value, || import_text(&imported))?;
    if wrong == 0 {
        return Ok(Outcome::Done);
    }
    tell(&format!("threadkeep: skipped {}", counted(wrong, "invalid line")));
    Ok(Outcome::Partly)
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(|e| Failure::of_file(path, "cannot be read", &e))
}

/// Reads the first bytes of a file that must not be empty.
fn head(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut head = Vec::new();
    let read = open(path)?.take(HEAD_BYTES).read_to_end(&mut head);
    read.map_err(|e| Failure::of_file(path, "cannot be read", &e))?;
    if head.is_empty() {
        // `sqlite3 FILE .recover | sqlite3 recovered.db` leaves an empty file if FILE has lost its first page.
        return Err(Failure::Other(format!(
            "{} is empty, so nothing was imported; if it is the result of a recovery, the recovery failed: see OPERATIONS.md, A corrupt \
             outage file",
            path.display()
        )));
    }
    Ok(head)
}

/// Tells an export (lines of JSON) from an outage file by the first bytes.
///
/// The start of either file may be corrupt. An outage file has binary bytes near its start. A corrupt export may have
/// such bytes too, but it has a valid line near them.
fn is_export(head: &[u8]) -> bool {
    let is_text = !head.contains(&0) && is_utf8_so_far(head);
    let is_line = |line: &[u8]| {
        let line = serde_json::from_slice::<Value>(line).unwrap_or_default();
        ["kind", "key", "version", "queued_at"].iter().all(|name| line.get(name).is_some())
    };
    !head.starts_with(b"SQLite format 3\0") && (is_text || head.split(|byte| *byte == b'\n').any(is_line))
}

/// Accepts a last character that the end of the bytes cuts off.
fn is_utf8_so_far(head: &[u8]) -> bool {
    std::str::from_utf8(head).map_or_else(|error| error.error_len().is_none(), |_| true)
}

/// Imports lines in batches. Returns the report and the number of invalid lines.
async fn import_lines(
    file: &QueueAdmin,
    mut from: impl BufRead,
    allow_other_project: bool,
) -> Result<(ImportReport, usize), Failure> {
    let mut progress = Progress::new("importing lines", None);
    let (mut sum, mut wrong, mut number) = (ImportReport::default(), 0, 0);
    let mut is_more = true;
    while is_more {
        let (mut lines, mut numbers, mut bytes) = (Vec::new(), Vec::new(), 0);
        while is_more && lines.len() < MAX_BATCH_LINES && bytes < MAX_BATCH_BYTES {
            let mut line = Vec::new();
            let read = from.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
            is_more = read.map_err(|e| Failure::Other(format!("the lines cannot be read: {e}")))? > 0;
            number += 1;
            bytes += line.len();
            if line.len() as u64 == MAX_LINE_BYTES {
                let size = size(MAX_LINE_BYTES);
                return Err(Failure::Other(format!(
                    "line {number} has {size} or more; the lines of an export are shorter"
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
                    tell(&format!("threadkeep: line {number}: the line is not UTF-8"));
                }
            }
        }
        let (items, mut invalid) = parse_lines(file, &lines, allow_other_project);
        let (positions, items): (Vec<usize>, Vec<ImportItem>) = items.into_iter().unzip();
        let (imported, rejected) = file.import(items).await?;
        invalid.extend(rejected.into_iter().map(|(at, error)| (positions[at], error)));
        invalid.sort_by_key(|(at, _)| *at);
        for (at, error) in &invalid {
            tell(&format!("threadkeep: line {}: {}", numbers[*at], with_causes(error)));
        }
        sum += imported;
        wrong += invalid.len();
        progress.set(number, None);
    }
    Ok((sum, wrong))
}

/// Values with the index of their line.
type Indexed<T> = Vec<(usize, T)>;

/// Parses lines. Returns the items and the errors.
fn parse_lines(
    file: &QueueAdmin,
    lines: &[String],
    allow_other_project: bool,
) -> (Indexed<ImportItem>, Indexed<Error>) {
    let (mut items, mut invalid) = (Vec::new(), Vec::new());
    for (at, line) in lines.iter().enumerate() {
        let parsed = export_line::parse(line).and_then(|(items, project)| {
            let checked = if allow_other_project { Ok(()) } else { file.check_project(project.as_deref()) };
            checked.map(|()| items)
        });
        match parsed {
            Ok(parsed) => items.extend(parsed.into_iter().map(|item| (at, item))),
            Err(error) => invalid.push((at, error)),
        }
    }
    (items, invalid)
}

pub async fn migrate(settings: Builder, from: &Migrate, out: &mut Output) -> Result<Outcome, Failure> {
    let path = &from.from;
    let mut moved = path.clone().into_os_string();
    moved.push(".moved");
    let retired = Path::new(&moved);
    if !path.exists() && retired.exists() {
        let text = format!("{} was migrated before; it is now {}", path.display(), retired.display());
        return Err(Failure::Other(text));
    }
    let file = settings.open_queue_of_project().await?;
    let mut progress = Progress::new("migrating", None);
    let report = file.migrate_from(path, |seen| progress.set(seen as u64, None)).await?;
    drop(progress);
    file.close().await?;
    let renamed = QueueAdmin::retire(path).await?;
    let value = merged(&json!({"renamed_to": renamed.display().to_string()}), &report);
    out.either(&value, || {
        format!(
            "{}\n{} is now {}; `threadkeep queue replay`, or the next start of a daemon, sends the writes to Supabase",
            import_text(&report),
            path.display(),
            renamed.display()
        )
    })?;
    Ok(Outcome::Done)
}

fn import_text(imported: &ImportReport) -> String {
    let ImportReport { queued, dead_letters, duplicates, stale, .. } = imported;
    format!(
        "queued {} and added {}; skipped {} and {} older than the file's",
        counted(*queued, "write"),
        counted(*dead_letters, "dead letter"),
        counted(*duplicates, "duplicate"),
        counted(*stale, "write"),
    )
}

fn merged(value: &Value, imported: &ImportReport) -> Value {
    let mut all = json!({
        "queued": imported.queued,
        "dead_letters": imported.dead_letters,
        "duplicates": imported.duplicates,
        "stale": imported.stale,
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
    fn is_export_corrupt_start_recognises_the_kind() {
        let texts: [&[u8]; 6] =
            [b"", b"\n", b"damaged\n", LINE, "{\"key\": \"\u{e9}".as_bytes(), "\u{feff}{}".as_bytes()];
        for text in texts {
            assert!(is_export(text) && is_export(&[text, b"\xc3"].concat()), "{text:?}");
        }
        for damage in [&b"\0\0\0\0"[..], b"\xff\xfe"] {
            assert!(is_export(&[damage, b"\n", LINE, b"\n"].concat()), "{damage:?} beside a valid line");
            assert!(!is_export(&[damage, b"\n{\"kind\":\"a conversation\"}\n"].concat()), "{damage:?}");
        }
        assert!(!is_export(&[b"SQLite format 3\0", LINE, b"\n", LINE].concat()));
        assert!(!is_export(&[&[b'x'; 4096][..], &[0; 4096]].concat()), "the first page is destroyed");
    }
}
