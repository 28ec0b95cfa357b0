//! The settings of a daemon as data, for a diagnosis. This module opens nothing.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::builder::Builder;
use super::environment::environment;
use super::{Backend, SettingProblem};

/// Variables by which the HTTP client finds a proxy, for an encrypted URL and for a plain URL.
const PROXY_VARIABLES: [(&str, &[&str]); 2] = [
    ("https", &["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]),
    ("http", &["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"]),
];

/// The settings as a daemon would use them, with all problems.
#[derive(Debug)]
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

    /// Returns the text.
    ///
    /// ```
    /// # fn example(secret: threadkeep::tools::Secret) {
    /// let key: &str = secret.expose();
    /// # }
    /// ```
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Returns the variable of the environment that names a proxy for URLs of this scheme.
///
/// ```
/// let variable: Option<&str> = threadkeep::tools::proxy_variable("https");
/// ```
pub fn proxy_variable(scheme: &str) -> Option<&'static str> {
    let (_, names) = PROXY_VARIABLES.iter().find(|(of_scheme, _)| *of_scheme == scheme)?;
    let is_set = |name: &&&str| environment().any(|(var, value)| var == **name && !value.is_empty());
    names.iter().find(is_set).copied()
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
        ResolvedConfig {
            backend: self.backend,
            missing: self.missing(),
            problems,
            is_strict: self.strict,
            ignored,
            warnings: self.warnings,
            url: self.url,
            key: self.key,
            key_name: self.key_name,
            local_path: self.local_path,
            queue_path: self.queue_path,
            queue_max_bytes: self.file_limits.queue,
            replica_max_bytes: self.file_limits.replica,
            timeout: self.timeout,
            soft_timeout: self.limits.soft_timeout,
        }
    }
}
