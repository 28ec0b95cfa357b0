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
mod settings;

use std::borrow::Cow;
use std::fmt;

use crate::error::{Error, ErrorKind};

pub use builder::Builder;
pub use settings::{SETTINGS, Setting};

/// The store that a cache opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// A SQLite file.
    #[default]
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
}

impl SettingProblem {
    fn new(setting: impl Into<String>, error: &Error) -> Self {
        let remedy = error.remedy().unwrap_or("correct it").into();
        Self { setting: setting.into(), message: error.message().into(), remedy }
    }

    /// Returns the backend that uses the setting; `None` if all backends use it.
    fn backend(&self) -> Option<Backend> {
        SETTINGS.iter().find(|setting| setting.name == self.setting).and_then(|setting| setting.backend)
    }
}

impl fmt::Display for SettingProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}; {}", self.setting, self.message, self.remedy)
    }
}

/// Returns the error for a value that a setting cannot have. Its message is a predicate of the setting.
///
/// The message never repeats the value, because the value may be a secret.
fn invalid(message: impl Into<String>, remedy: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, message).with_remedy(remedy)
}

fn malformed(remedy: impl Into<Cow<'static, str>>) -> Error {
    invalid("has an invalid value", remedy)
}
