//! The settings of a daemon as data, for a diagnosis. This module opens nothing.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::builder::Builder;
use super::{Backend, SettingProblem};

/// The settings as a daemon would use them, with all problems.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct ResolvedConfig {
    /// The backend that is set.
    pub backend: Backend,
    /// Problems that keep a daemon from starting.
    pub problems: Vec<SettingProblem>,
    /// Settings that the backend needs and that are not set. A daemon that is not strict falls back to memory.
    pub missing: Vec<SettingProblem>,
    /// Whether a missing setting is an error.
    pub is_strict: bool,
    /// Problems with settings of another backend.
    pub ignored: Vec<SettingProblem>,
    /// Settings that are probably mistakes.
    pub warnings: Vec<SettingProblem>,
    /// The URL of the Supabase project.
    pub url: Option<String>,
    /// The secret key.
    pub key: Option<Secret>,
    /// The setting that holds the key.
    pub key_name: &'static str,
    /// The file of the backend `local`.
    pub local_path: PathBuf,
    /// The outage file.
    pub queue_path: PathBuf,
    /// The limit on bytes of queued writes and dead letters.
    pub queue_max_bytes: u64,
    /// The limit on bytes of the replica.
    pub replica_max_bytes: u64,
    /// The time limit of one small request.
    pub timeout: Duration,
    /// The wait before the stale fallback answers, or before a write is queued.
    pub soft_timeout: Duration,
}

/// A text that neither `Debug` nor an error shows.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    pub(super) fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// Returns the text. See [`Builder::resolve`] for an example.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Builder {
    /// Returns the settings as a daemon would use them, with all problems. Opens nothing.
    ///
    /// ```
    /// use threadkeep::Builder;
    ///
    /// let config = Builder::from_vars([("CONVERSATION_TIMEOUT_HOURS".into(), "soon".into())]).resolve();
    /// assert_eq!(config.problems[0].setting, "CONVERSATION_TIMEOUT_HOURS");
    /// ```
    pub fn resolve(mut self) -> ResolvedConfig {
        self.derive_url();
        let (problems, ignored) = self.partition_problems();
        let (missing, soft_timeout) = (self.missing(), self.limits.soft_timeout);
        ResolvedConfig { problems, missing, ignored, soft_timeout, ..self.config }
    }
}
