//! The parser of a file such as `.env`. An error has the number of the line and not its text, which may be a secret.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::Path;

use super::invalid;
use crate::error::Error;

/// A limit above the size of any file of settings. It also bounds the read of a device without an end (I12).
const MAX_DOTENV_BYTES: u64 = 1 << 20;
/// Limits the lines that one error names.
const MAX_ERRORS: usize = 20;

/// Reads the variables of the file, in the order of the lines, and its errors. A missing file has neither.
pub(super) fn read(path: &Path) -> (Vec<(String, String)>, Vec<Error>) {
    let error = match read_prefix(path, MAX_DOTENV_BYTES + 1) {
        Ok(bytes) if bytes.len() as u64 <= MAX_DOTENV_BYTES => return parse(&bytes),
        Ok(_) => invalid("is larger than 1 MiB", "use a file of settings"),
        Err(e) if e.kind() == ErrorKind::NotFound => return Default::default(),
        Err(_) if path.is_dir() => invalid("is a directory", "use a file with lines NAME=value"),
        Err(e) => invalid(format!("cannot be read: {e}"), "make it readable"),
    };
    (Vec::new(), vec![error])
}

pub(super) fn read_prefix(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> (Vec<(String, String)>, Vec<Error>) {
    let (mut variables, mut errors) = (Vec::new(), Vec::new());
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            let line = count_newlines(&bytes[..error.valid_up_to()]) + 1;
            return (variables, vec![invalid(format!("has a line {line} that is not UTF-8"), "correct it")]);
        }
    };
    // Without a final newline, dotenvy reports a trailing space of the last line as an unfinished value.
    let end = if text.ends_with('\n') { "" } else { "\n" };
    let mut searched = 0;
    for variable in dotenvy::from_read_iter(text.as_bytes().chain(end.as_bytes())) {
        match variable {
            Ok(variable) => variables.push(variable),
            Err(error) => {
                let bad = if let dotenvy::Error::LineParse(text, _) = &error { text.trim_end() } else { "" };
                let start = find_line(text, searched, bad);
                let line = count_newlines(&text.as_bytes()[..start]) + 1;
                let message = format!("has a line {line} that is not NAME=value, or whose quotes do not end");
                errors.push(invalid(message, "correct it"));
                searched = start + bad.len();
                if errors.len() == MAX_ERRORS {
                    break;
                }
            }
        }
    }
    (variables, errors)
}

/// Returns the start of the line `bad`, which may span several lines, at or after `from`. dotenvy reports no line numbers.
fn find_line(text: &str, from: usize, bad: &str) -> usize {
    let is_line = |at: &usize| {
        let (before, after) = (&text[..*at], text[at + bad.len()..].trim_start_matches([' ', '\t', '\r']));
        (before.is_empty() || before.ends_with('\n')) && (after.is_empty() || after.starts_with(['\n', '#']))
    };
    text[from..].match_indices(bad).map(|(at, _)| from + at).find(is_line).unwrap_or(from)
}

fn count_newlines(text: &[u8]) -> usize {
    text.iter().filter(|byte| **byte == b'\n').count()
}
