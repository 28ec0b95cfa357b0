//! The log of one daemon: what it has acknowledged, in its order. A kill of the process loses no line.

use std::fmt;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

/// One line of the log.
#[derive(Debug, Clone, PartialEq)]
pub enum Line {
    /// The process has started.
    Start,
    Done(Ack),
    /// The cache refused this text, and says that the store does not have it.
    Refused(String),
    /// A dead letter has this text as its newest.
    Dead(String),
    /// This text is in a dead letter. The write of the letter brought it, or an update that the write took the place of, or it was
    /// there before.
    Buried(String),
    /// The daemon has seen a broken promise.
    Fault(String),
    /// The daemon has acknowledged its share.
    Finished,
}

/// An acknowledged write.
#[derive(Debug, Clone, PartialEq)]
pub struct Ack {
    pub key: String,
    pub text: String,
    pub is_queued: bool,
    /// The number of lines before the write began. The writes in them stand before this one.
    pub earlier: usize,
}

impl Ack {
    pub fn is_update(&self) -> bool {
        self.text.starts_with('u')
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start => write!(f, "start"),
            Self::Done(Ack { key, text, is_queued, earlier }) => {
                let word = if *is_queued { "queued" } else { "stored" };
                write!(f, "{word} {key} {text} {earlier}")
            }
            Self::Refused(text) => write!(f, "refused {text}"),
            Self::Dead(text) => write!(f, "dead {text}"),
            Self::Buried(text) => write!(f, "buried {text}"),
            Self::Fault(text) => write!(f, "fault {text}"),
            Self::Finished => write!(f, "finished"),
        }
    }
}

impl Line {
    fn parse(line: &str) -> Self {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "start" => Self::Start,
            "refused" => Self::Refused(rest.into()),
            "dead" => Self::Dead(rest.into()),
            "buried" => Self::Buried(rest.into()),
            "fault" => Self::Fault(rest.into()),
            "finished" => Self::Finished,
            _ => {
                let parts: Vec<&str> = rest.split(' ').collect();
                let [key, text, earlier] = parts[..] else { panic!("a malformed line: {line:?}") };
                let (key, text, earlier) = (key.into(), text.into(), earlier.parse().unwrap());
                Self::Done(Ack { key, text, is_queued: word == "queued", earlier })
            }
        }
    }

    pub fn read_all(directory: &Path) -> Vec<Self> {
        let text = std::fs::read_to_string(directory.join("acks")).unwrap_or_default();
        text.lines().map(Self::parse).collect()
    }
}

/// The open log of the present process.
pub struct Log {
    lines: Mutex<Vec<Line>>,
    file: std::fs::File,
}

impl Log {
    pub fn open(directory: &Path) -> Self {
        let file = std::fs::File::options().create(true).append(true).open(directory.join("acks")).unwrap();
        let log = Self { lines: Mutex::new(Line::read_all(directory)), file };
        log.add(Line::Start);
        log
    }

    pub fn lines(&self) -> MutexGuard<'_, Vec<Line>> {
        self.lines.lock().unwrap()
    }

    /// Adds a line by one system call, so that a kill cannot cut it.
    pub fn add(&self, line: Line) {
        let mut lines = self.lines();
        (&self.file).write_all(format!("{line}\n").as_bytes()).unwrap();
        lines.push(line);
    }
}
