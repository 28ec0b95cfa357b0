//! The outcomes and failures of commands, and their exit codes.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io;
use std::process::ExitCode;

use threadkeep::{Error, ErrorKind};

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const IN_USE: u8 = 3;
const NOT_FOUND: u8 = 4;

/// The result of a command that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The command did a part of its work. Standard error has the reason.
    Partly,
    /// The conversation does not exist.
    NotFound,
}

/// The failure of a command.
#[derive(Debug)]
pub enum Failure {
    Library(Error),
    /// Standard output could not be written.
    Output(io::Error),
    /// The arguments are invalid, for this reason.
    Usage(String),
    /// Any other failure, with its message.
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
    /// Makes the failure of a file operation, such as `cannot be read`.
    pub fn of_file(path: &std::path::Path, problem: &str, error: &io::Error) -> Self {
        Self::Other(format!("{} {problem}: {error}", path.display()))
    }
}

/// Prints a line to standard error. Ignores errors, because standard error may be closed.
pub fn tell(text: &str) {
    use io::Write as _;
    writeln!(io::stderr(), "{text}").ok();
}

/// Prints clap's message and returns the exit code. Help and version are messages too, with exit code 0.
pub fn of_usage(error: &clap::Error) -> ExitCode {
    error.print().ok();
    if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS }
}

/// Prints the failure and returns the exit code.
///
/// A broken pipe is no failure, because the reader of standard output, such as `head`, has closed it.
pub fn exit_code(result: Result<Outcome, Failure>) -> ExitCode {
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Partly) => ExitCode::from(FAILED),
        Ok(Outcome::NotFound) => ExitCode::from(NOT_FOUND),
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Failure::Output(error)) => failed(&format!("standard output cannot be written: {error}"), FAILED),
        Err(Failure::Usage(text)) => failed(&text, USAGE),
        Err(Failure::Other(text)) => failed(&text, FAILED),
        Err(Failure::Library(error)) => {
            let code = failed(&with_causes(&error), code_of(error.kind()));
            if error.kind() == ErrorKind::Locked {
                tell("  if a daemon holds the file, read the daemon's health and its metrics");
            }
            code
        }
    }
}

fn failed(message: &str, code: u8) -> ExitCode {
    tell(&format!("threadkeep: {message}"));
    ExitCode::from(code)
}

fn code_of(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Invalid => USAGE,
        ErrorKind::Locked => IN_USE,
        _ => FAILED,
    }
}

/// Formats an error with its chain of sources. Leaves out a source whose text stands in an earlier one.
pub fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let because = error.to_string();
        if !text.contains(&because) {
            write!(text, "\n  because: {because}").ok();
        }
        cause = error.source();
    }
    text
}
