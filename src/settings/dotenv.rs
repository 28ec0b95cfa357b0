//! A file such as `.env`: what is wrong with it is said with the line's number, and without the line, which may hold a secret.

use std::cell::Cell;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::rc::Rc;

/// No file of settings is as long: what is longer is another file, or has no end.
const MOST: u64 = 1 << 20;

/// The variables in the file, in their order; none where there is no file.
pub(super) fn read(path: &Path) -> Result<Vec<(String, String)>, String> {
    let read = match read_some(path, MOST + 1) {
        Ok(bytes) if bytes.len() as u64 > MOST => {
            Err("it is larger than 1 MiB; use a file of settings".into())
        }
        Ok(bytes) => parse(&bytes),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(_) if path.is_dir() => Err("it is a directory; use a file with lines NAME=value".into()),
        Err(e) => Err(format!("the file cannot be read: {e}")),
    };
    read.map_err(|wrong| format!("{}: {wrong}", path.display()))
}

/// The first bytes of a file, as many as there are and at most so many.
pub(super) fn read_some(path: &Path, most: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Result<Vec<(String, String)>, String> {
    if let Err(error) = std::str::from_utf8(bytes) {
        return Err(format!("line {} is not UTF-8", line_ends(&bytes[..error.valid_up_to()]) + 1));
    }
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    let taken = Rc::new(Cell::new(0));
    let lines = Lines { rest: bytes, taken: Rc::clone(&taken) };
    // The parser takes a space at the end of a last line that does not end for an unfinished value.
    let end = if bytes.ends_with(b"\n") { "" } else { "\n" };
    let all = dotenvy::from_read_iter(lines.chain(end.as_bytes()));
    all.map(|variable| variable.map_err(|error| wrong_line(&error, taken.get()))).collect()
}

/// Where the value begins that cannot be read, and goes on to the last line taken.
fn wrong_line(error: &dotenvy::Error, taken: usize) -> String {
    let text = if let dotenvy::Error::LineParse(text, _) = error { text.as_str() } else { "" };
    let more = line_ends(text.strip_suffix('\n').unwrap_or(text).as_bytes());
    format!("line {} is not NAME=value, or its quotes do not end", taken.saturating_sub(more).max(1))
}

fn line_ends(text: &[u8]) -> usize {
    text.iter().filter(|byte| **byte == b'\n').count()
}

/// Gives one line at a time, so that it is known how many the parser has taken.
struct Lines<'a> {
    rest: &'a [u8],
    taken: Rc<Cell<usize>>,
}

impl Read for Lines<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let end = self.rest.iter().position(|byte| *byte == b'\n').map_or(self.rest.len(), |at| at + 1);
        let most = end.min(into.len());
        let (line, rest) = self.rest.split_at(most);
        into[..most].copy_from_slice(line);
        self.rest = rest;
        if most > 0 && most == end {
            self.taken.set(self.taken.get() + 1);
        }
        Ok(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<(String, String)> {
        parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn a_wrong_line_is_named_by_its_number() {
        for (text, line) in [
            ("A", 1),
            ("A=1\n\n# B\nB\nC=1\n", 4),
            ("A=1\r\nB C=2\r\n", 2),
            ("A='1\n2\n3'\nB\n", 4),
            ("A=1\nB='2\nC=3\n\n", 2),
            ("A=1\nB=\"2\nC=3", 2),
            ("A='1\n2' 3\nB=1", 1),
        ] {
            let wrong = parse(text.as_bytes()).unwrap_err();
            assert!(wrong.starts_with(&format!("line {line} is not NAME=value")), "{text:?}: {wrong}");
        }
        let long = format!("A={}\nB\n", "x".repeat(20_000));
        assert!(parse(long.as_bytes()).unwrap_err().starts_with("line 2 "));
        assert_eq!(parse(b"A=1\nB=\xff\n").unwrap_err(), "line 2 is not UTF-8");
        assert_eq!(parse(b"\xff\xfeA\0").unwrap_err(), "line 1 is not UTF-8");
    }

    #[test]
    fn what_is_not_wrong_is_read() {
        let a = |value: &str| vec![("A".to_owned(), value.to_owned())];
        assert_eq!(of("\u{feff}A=1"), a("1"));
        assert_eq!(of("A=1 "), a("1"));
        assert_eq!(of("A=1\r\n\r\n"), a("1"));
        assert_eq!(of("A='1\n2'"), a("1\n2"));
        assert_eq!(of(""), []);
    }

    #[test]
    fn a_dollar_stands_for_a_variable_but_in_single_quotes() {
        let all = of("A=x\nB=$A$NO_SUCH_VARIABLE_IS_SET.${A}\nC='$A'\n");
        let values: Vec<&str> = all.iter().map(|(_, value)| value.as_str()).collect();
        assert_eq!(values[2], "$A");
        assert!(values[1].starts_with('x') && values[1].ends_with(".x"), "{values:?}");
    }
}
