//! What a daemon with these settings would set out to do, and what is wrong with them: nothing is opened.

use std::path::PathBuf;
use std::time::Duration;

use super::Backend;
use super::builder::{Builder, Secret, environment};
use crate::spool::Bounds;

/// Variables by which the HTTP client finds a proxy, for an encrypted URL and for one that is not.
const PROXIES: [(&str, &[&str]); 2] = [
    ("https", &["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]),
    ("http", &["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"]),
];

/// The settings, taken apart.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) backend: Backend,
    /// Each keeps a daemon from starting.
    pub(crate) problems: Vec<String>,
    /// What is needed and not set; a daemon that is not strict falls back to memory then.
    pub(crate) missing: Vec<&'static str>,
    pub(crate) is_strict: bool,
    /// Wrong, but of another backend; or hardly meant.
    pub(crate) idle: Vec<String>,
    pub(crate) doubts: Vec<String>,
    pub(crate) url: Option<String>,
    key: Option<Secret>,
    /// The setting that the key is from.
    pub(crate) key_name: &'static str,
    pub(crate) local_path: PathBuf,
    pub(crate) queue_path: PathBuf,
    pub(crate) bounds: Bounds,
    pub(crate) deadline: Duration,
    pub(crate) patience: Duration,
}

impl Plan {
    pub(crate) fn key(&self) -> Option<&str> {
        self.key.as_ref().map(|key| key.0.as_str())
    }

    /// The variable that names a proxy for such URLs.
    pub(crate) fn proxy(scheme: &str) -> Option<&'static str> {
        let (_, names) = PROXIES.iter().find(|(of, _)| *of == scheme)?;
        let is_set = |name: &&&str| environment().any(|(set, value)| set == **name && !value.is_empty());
        names.iter().find(is_set).copied()
    }
}

impl Builder {
    pub(crate) fn plan(mut self) -> Plan {
        self.complete();
        let (problems, idle) = self.sorted_problems();
        Plan {
            backend: self.backend,
            missing: self.missing(),
            problems,
            is_strict: self.strict,
            idle,
            doubts: self.doubts,
            url: self.url,
            key: self.key,
            key_name: self.key_name,
            local_path: self.local_path,
            queue_path: self.queue_path,
            bounds: self.spool,
            deadline: self.deadline,
            patience: self.limits.patience,
        }
    }
}
