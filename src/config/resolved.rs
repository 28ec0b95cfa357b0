//! The settings of a daemon as data, and the checks of all settings together. This module opens nothing.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::builder::Builder;
use super::{Backend, SettingProblem, invalid, key};
use crate::error::{Error, ErrorKind, Result};

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
        self.complete();
        self.config
    }

    /// Returns the backend to open, if all settings that it needs are valid.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with all problems together.
    pub(super) fn validate(&mut self) -> Result<Backend> {
        self.complete();
        let ResolvedConfig { problems, missing, ignored, is_strict, .. } = &self.config;
        for problem in ignored {
            tracing::warn!(%problem, "a setting of another backend is invalid; threadkeep ignores it");
        }
        if !missing.is_empty() && !is_strict && problems.is_empty() {
            let names: Vec<&str> = missing.iter().map(|problem| problem.setting.as_str()).collect();
            tracing::warn!(
                "CONVERSATION_STORAGE_BACKEND is supabase, but these settings are not set: {}. FALLING BACK TO MEMORY: a restart \
                 loses all conversations",
                names.join(", ")
            );
            return Ok(Backend::Memory);
        }
        match problems.iter().chain(missing).collect::<Vec<_>>()[..] {
            [] => Ok(self.config.backend),
            [problem] => Err(error_of(problem)),
            ref problems => {
                let lines: Vec<String> = problems.iter().map(|problem| format!("\n  {problem}")).collect();
                let message = format!("{} settings are invalid:{}", problems.len(), lines.concat());
                Err(Error::new(ErrorKind::Config, message))
            }
        }
    }

    /// Derives the URL, and completes the lists of problems. The problems of other backends count as ignored.
    ///
    /// A rollback to another backend must not fail because of a setting that only Supabase uses. If the backend itself is
    /// invalid, each problem counts, so that one error has them all.
    fn complete(&mut self) {
        if self.config.url.is_none() {
            self.config.url = self.project.as_ref().map(|project| format!("https://{project}.supabase.co"));
        }
        self.config.missing = self.missing();
        self.config.soft_timeout = self.limits.soft_timeout;
        let problems = std::mem::take(&mut self.config.problems);
        let is_unknown = problems.iter().any(|problem| problem.setting == "CONVERSATION_STORAGE_BACKEND");
        let is_used = |problem: &SettingProblem| {
            is_unknown || problem.backend().is_none_or(|backend| backend == self.config.backend)
        };
        (self.config.problems, self.config.ignored) = problems.into_iter().partition(is_used);
    }

    fn missing(&self) -> Vec<SettingProblem> {
        if self.config.backend != Backend::Supabase || self.store.is_some() {
            return Vec::new();
        }
        // A setting with an invalid value is not missing.
        let is_invalid = |names: &[&str]| {
            self.config.problems.iter().any(|problem| names.contains(&problem.setting.as_str()))
        };
        let no_url = self.config.url.is_none() && !is_invalid(&["SUPABASE_URL", "SUPABASE_PROJECT_ID"]);
        let no_key = self.config.key.is_none() && !is_invalid(&key::NAMES);
        let problem = |setting, remedy| SettingProblem::new(setting, &invalid("is not set", remedy));
        let url = no_url.then(|| problem("SUPABASE_URL", "set it or SUPABASE_PROJECT_ID"));
        let remedy = "set it or SUPABASE_KEY_FILE, SUPABASE_SECRET_KEY or SUPABASE_SERVICE_ROLE_KEY";
        let key = no_key.then(|| problem(key::NAME, remedy));
        url.into_iter().chain(key).collect()
    }
}

pub(super) fn error_of(problem: &SettingProblem) -> Error {
    let message = format!("a setting is invalid: {} {}", problem.setting, problem.message);
    invalid(message, problem.remedy.clone())
}
