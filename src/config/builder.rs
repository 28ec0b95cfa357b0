//! The builder of a cache: its fields and defaults. The folder's other files hold its methods, by subject.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::resolved::Secret;
use super::{Backend, SETTINGS, SettingProblem, key};
use crate::cache::{Limits, OnOutage};
use crate::outage::FileLimits;
use crate::store::Store;
use crate::store::supabase::KeyProvider;

/// Settings of a cache that is not open yet.
///
/// Setters never fail. [`open`](Self::open) reports all problems in one error.
///
/// ```
/// # async fn example() -> threadkeep::Result<()> {
/// use threadkeep::Builder;
///
/// let cache = Builder::new().local("chat.db").cache_max_bytes(64 << 20).open().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Builder {
    pub(super) backend: Backend,
    /// The caller's store. It has precedence over `backend`.
    pub(super) store: Option<Arc<dyn Store>>,
    pub(super) local_path: PathBuf,
    pub(super) queue_path: PathBuf,
    pub(super) queue_mode: QueueMode,
    pub(super) file_limits: FileLimits,
    pub(super) url: Option<String>,
    /// The project's reference, which gives the URL if `url` is not set.
    pub(super) project: Option<String>,
    pub(super) key: Option<Secret>,
    /// The setting that holds the key.
    pub(super) key_name: &'static str,
    /// Reads the key's file again, if the key came from a file.
    pub(super) key_file: Option<KeyProvider>,
    /// The caller's provider. It has precedence over `key_file`.
    pub(super) custom_key_provider: Option<KeyProvider>,
    pub(super) timeout: Duration,
    pub(super) fresh_for: Duration,
    pub(super) warmup_limit: usize,
    /// The warm-up limit for the caller's store. It has no default, because such a store may list slowly.
    pub(super) custom_warmup_limit: usize,
    pub(super) strict: bool,
    pub(super) limits: Limits,
    pub(super) skew_millis: i64,
    pub(super) problems: Vec<SettingProblem>,
    /// Settings that are valid and probably mistakes.
    pub(super) warnings: Vec<SettingProblem>,
}

/// The caller's choice whether the cache has an outage file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueueMode {
    /// Supabase has an outage file, and a store of the caller has none.
    Auto,
    On,
    Off,
}

impl Default for Builder {
    fn default() -> Self {
        // The zeros and empty values below are placeholders: the table of settings has the defaults.
        let limits = Limits {
            ttl: Duration::ZERO,
            value_bytes: 0,
            memory_bytes: 0,
            in_flight_bytes: 64 << 20,
            fresh_for: None,
            warmup_limit: 0,
            soft_timeout: Duration::ZERO,
            maintenance_interval: Duration::from_secs(60),
            on_outage: OnOutage::Queue,
        };
        let mut builder = Self {
            backend: Backend::Local,
            store: None,
            local_path: PathBuf::new(),
            queue_path: PathBuf::new(),
            queue_mode: QueueMode::Auto,
            file_limits: FileLimits { queue: 0, replica: 0 },
            url: None,
            project: None,
            key: None,
            key_name: key::NAME,
            key_file: None,
            custom_key_provider: None,
            timeout: Duration::ZERO,
            fresh_for: Duration::ZERO,
            warmup_limit: 0,
            custom_warmup_limit: 0,
            strict: false,
            limits,
            skew_millis: 0,
            problems: Vec::new(),
            warnings: Vec::new(),
        };
        for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
            builder.apply(setting, setting.default);
        }
        builder
    }
}

impl Builder {
    /// Returns a builder with the default settings: the store is the file `./threadkeep.db`.
    ///
    /// ```
    /// use threadkeep::{Backend, Builder};
    ///
    /// assert_eq!(Builder::new().backend(), Backend::Local);
    /// ```
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the backend that is set.
    ///
    /// ```
    /// use threadkeep::{Backend, Builder};
    ///
    /// assert_eq!(Builder::new().memory().backend(), Backend::Memory);
    /// ```
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Returns the path of the outage file that is set.
    ///
    /// ```
    /// let builder = threadkeep::Builder::new().queue("queue.db");
    /// assert_eq!(builder.queue_path().to_str(), Some("queue.db"));
    /// ```
    pub fn queue_path(&self) -> &Path {
        &self.queue_path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builder_defaults_of_all_settings_parse() {
        assert!(Builder::new().problems.is_empty(), "{:?}", Builder::new().problems);
        assert_eq!(Builder::new().limits.ttl, Duration::from_secs(24 * 3600));
    }
}
