//! The parser of a file such as `.env`. An error has the number of the line and not its text, which may be a secret.

use std::cell::Cell;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::rc::Rc;

use super::InvalidValue;

/// A limit above the size of any file of settings. It also bounds the read of a device without an end (I12).
const MAX_DOTENV_BYTES: u64 = 1 << 20;

/// Reads the variables of the file, in the order of the lines. A missing file has no variables.
///
/// # Errors
/// [`InvalidValue`] if the file cannot be read or parsed, or is larger than 1 MiB.
pub(super) fn read(path: &Path) -> Result<Vec<(String, String)>, InvalidValue> {
    match read_prefix(path, MAX_DOTENV_BYTES + 1) {
        Ok(bytes) if bytes.len() as u64 > MAX_DOTENV_BYTES => {
            Err(InvalidValue::new("is larger than 1 MiB", "use a file of settings"))
        }
        Ok(bytes) => parse(&bytes).map_err(|message| InvalidValue::new(message, "correct it")),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(_) if path.is_dir() => {
            Err(InvalidValue::new("is a directory", "use a file with lines NAME=value"))
        }
        Err(e) => Err(InvalidValue::new(format!("cannot be read: {e}"), "make it readable")),
    }
}

/// Reads at most `limit` bytes from the beginning of a file.
pub(super) fn read_prefix(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Result<Vec<(String, String)>, String> {
    if let Err(error) = std::str::from_utf8(bytes) {
        let line = count_newlines(&bytes[..error.valid_up_to()]) + 1;
        return Err(format!("has a line {line} that is not UTF-8"));
    }
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    let lines_read = Rc::new(Cell::new(0));
    let lines = LineReader { rest: bytes, lines_read: Rc::clone(&lines_read) };
    // Without a final newline, dotenvy reports a trailing space of the last line as an unfinished value.
    let end = if bytes.ends_with(b"\n") { "" } else { "\n" };
    let variables = dotenvy::from_read_iter(lines.chain(end.as_bytes()));
    variables.map(|variable| variable.map_err(|error| syntax_error(&error, lines_read.get()))).collect()
}

/// Returns the message for a line that dotenvy rejects, with the number of the line.
///
/// A quoted value can span several lines. Its first line is the last line read minus the newlines inside the value.
fn syntax_error(error: &dotenvy::Error, lines_read: usize) -> String {
    let text = if let dotenvy::Error::LineParse(text, _) = error { text.as_str() } else { "" };
    let newlines = count_newlines(text.strip_suffix('\n').unwrap_or(text).as_bytes());
    let line = lines_read.saturating_sub(newlines).max(1);
    format!("has a line {line} that is not NAME=value, or whose quotes do not end")
}

fn count_newlines(text: &[u8]) -> usize {
    text.iter().filter(|byte| **byte == b'\n').count()
}

/// A reader that returns one line for each call, and counts the lines. dotenvy itself reports no line numbers.
struct LineReader<'a> {
    rest: &'a [u8],
    lines_read: Rc<Cell<usize>>,
}

impl Read for LineReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let end = self.rest.iter().position(|byte| *byte == b'\n').map_or(self.rest.len(), |at| at + 1);
        let count = end.min(buffer.len());
        let (line, rest) = self.rest.split_at(count);
        buffer[..count].copy_from_slice(line);
        self.rest = rest;
        // A line longer than the buffer counts once, with its last part.
        if count > 0 && count == end {
            self.lines_read.set(self.lines_read.get() + 1);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> Vec<(String, String)> {
        parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn parse_invalid_line_names_its_number() {
        for (text, line) in [
            ("A", 1),
            ("A=1\n\n# B\nB\nC=1\n", 4),
            ("A=1\r\nB C=2\r\n", 2),
            ("A='1\n2\n3'\nB\n", 4),
            ("A=1\nB='2\nC=3\n\n", 2),
            ("A=1\nB=\"2\nC=3", 2),
            ("A='1\n2' 3\nB=1", 1),
        ] {
            let message = parse(text.as_bytes()).unwrap_err();
            assert!(
                message.starts_with(&format!("has a line {line} that is not NAME=value")),
                "{text:?}: {message}"
            );
        }
        let long = format!("A={}\nB\n", "x".repeat(20_000));
        assert!(parse(long.as_bytes()).unwrap_err().starts_with("has a line 2 "));
        assert_eq!(parse(b"A=1\nB=\xff\n").unwrap_err(), "has a line 2 that is not UTF-8");
        assert_eq!(parse(b"\xff\xfeA\0").unwrap_err(), "has a line 1 that is not UTF-8");
    }

    #[test]
    fn parse_valid_text_returns_variables() {
        let a = |value: &str| vec![("A".to_owned(), value.to_owned())];
        assert_eq!(parse_text("\u{feff}A=1"), a("1"));
        assert_eq!(parse_text("A=1 "), a("1"));
        assert_eq!(parse_text("A=1\r\n\r\n"), a("1"));
        assert_eq!(parse_text("A='1\n2'"), a("1\n2"));
        assert_eq!(parse_text(""), []);
    }

    #[test]
    fn parse_dollar_is_replaced_outside_single_quotes() {
        let variables = parse_text("A=x\nB=$A$NO_SUCH_VARIABLE_IS_SET.${A}\nC='$A'\n");
        let values: Vec<&str> = variables.iter().map(|(_, value)| value.as_str()).collect();
        assert_eq!(values[2], "$A");
        assert!(values[1].starts_with('x') && values[1].ends_with(".x"), "{values:?}");
    }
}
