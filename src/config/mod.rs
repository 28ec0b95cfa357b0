//! The settings, and the composition root that opens a cache from them.
//!
//! Only this folder reads the environment. [`SETTINGS`] is the one table of settings. It drives parsing, the README's
//! list and `.env.example`, and a test compares the three.

mod builder;
mod dotenv;
mod environment;
mod key;
mod open;
pub(crate) mod resolved;
mod setters;
mod settings;
mod validate;

use std::fmt;

use crate::error::Error;

pub use builder::Builder;
pub use settings::{SETTINGS, Setting};

/// The store that a cache opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// A SQLite file.
    Local,
    /// A Supabase project.
    Supabase,
    /// The memory of the process. All conversations are lost when the process ends.
    Memory,
}

/// A problem with a setting, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SettingProblem {
    /// The variable, or the path of a file with settings.
    pub setting: String,
    /// The problem, as a predicate of the setting.
    pub message: String,
    /// The action that solves the problem.
    pub remedy: String,
    /// The backend that uses the setting; `None` if all backends use it.
    pub(crate) backend: Option<Backend>,
}

impl fmt::Display for SettingProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}; {}", self.setting, self.message, self.remedy)
    }
}

/// The message and the remedy for a value that a setting cannot have.
///
/// The message never repeats the value, because the value may be a secret.
#[derive(Debug)]
struct InvalidValue {
    message: String,
    remedy: String,
}

impl InvalidValue {
    fn new(message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { message: message.into(), remedy: remedy.into() }
    }

    /// Returns the problem of a value that has the wrong form.
    fn invalid(remedy: impl Into<String>) -> Self {
        Self::new("has an invalid value", remedy)
    }
}

impl From<Error> for InvalidValue {
    fn from(error: Error) -> Self {
        Self::new(error.message(), error.remedy().unwrap_or("correct it"))
    }
}
