//! How it can end, and what the exit code says of it.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;
use std::process::ExitCode;

use threadkeep::{Error, ErrorKind};

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const IN_USE: u8 = 3;
const NOT_FOUND: u8 = 4;

/// How a command ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Something is left, and has been said on standard error.
    Partly,
    /// There is no such thread.
    NotFound,
}

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    Library(Error),
    /// Standard output could not be written.
    Output(io::Error),
    /// What was given cannot be meant, in words.
    Usage(String),
    /// Something else, in words.
    Other(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Library(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl Failure {
    /// A file of the user's that could not be read or written.
    pub fn of_file(path: &std::path::Path, what: &str, error: &io::Error) -> Self {
        Self::Other(format!("{} {what}: {error}", path.display()))
    }
}

/// Tells on standard error, which may be closed.
pub fn tell(text: &str) {
    use io::Write as _;
    writeln!(io::stderr(), "{text}").ok();
}

/// What clap found wrong, or was asked to print.
pub fn of_usage(error: &clap::Error) -> ExitCode {
    error.print().ok();
    if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS }
}

/// Says what went wrong, and the exit code for it. That nobody reads standard output any more is no failure.
pub fn exit_code(ended: Result<Outcome, Failure>) -> ExitCode {
    match ended {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Partly) => ExitCode::from(FAILED),
        Ok(Outcome::NotFound) => ExitCode::from(NOT_FOUND),
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Failure::Output(error)) => failed(&format!("standard output cannot be written: {error}"), FAILED),
        Err(Failure::Usage(text)) => failed(&text, USAGE),
        Err(Failure::Other(text)) => failed(&text, FAILED),
        Err(Failure::Library(error)) => {
            let code = failed(&with_causes(&error), code_of(error.kind()));
            if error.kind() == ErrorKind::InUse {
                tell(
                    "  a daemon that runs can be asked itself: its health and its metrics tell how its queue is doing",
                );
            }
            code
        }
    }
}

fn failed(why: &str, code: u8) -> ExitCode {
    tell(&format!("threadkeep: {why}"));
    ExitCode::from(code)
}

fn code_of(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Invalid => USAGE,
        ErrorKind::InUse => IN_USE,
        _ => FAILED,
    }
}

/// An error and what led to it.
pub fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        write!(text, "\n  because: {error}").ok();
        cause = error.source();
    }
    text
}
