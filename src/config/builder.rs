//! The builder of a cache: its fields and defaults. The folder's other files hold its methods, by subject.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::resolved::ResolvedConfig;
use super::{Backend, SETTINGS, key};
use crate::cache::Limits;
use crate::store::Store;
use crate::store::supabase::KeyProvider;

/// Settings of a cache that is not open yet.
///
/// Setters never fail. [`open`](Self::open) reports all problems in one error.
///
/// ```no_run
/// # async fn example() -> threadkeep::Result<()> {
/// use std::time::Duration;
/// use threadkeep::{Backend, Builder, Cache, OnOutage};
///
/// let builder = Builder::new() // or `Cache::builder()`
///     .supabase("https://abc.supabase.co", "sb_secret_abc") // the key from the vault of your daemon
///     .key_provider(|| std::fs::read_to_string("/run/secrets/supabase").ok())
///     .strict()
///     .queue("/var/lib/chat/queue.db")
///     .queue_max_bytes(1 << 30)
///     .replica_max_bytes(1 << 30)
///     .on_outage(OnOutage::Queue)
///     .ttl(Duration::from_secs(7 * 86_400))
///     .max_value_bytes(1 << 20)
///     .cache_max_bytes(64 << 20)
///     .warmup_limit(1_000)
///     .fresh_for(Duration::from_secs(5))
///     .soft_timeout(Duration::from_millis(300))
///     .timeout(Duration::from_secs(2))
///     .maintenance_interval(Duration::from_secs(600));
/// assert_eq!(builder.backend(), Backend::Supabase);
/// assert_eq!(builder.queue_path().to_str(), Some("/var/lib/chat/queue.db"));
/// let cache = builder.open().await?;
///
/// let other = Builder::new().local("chat.db").open().await?;
/// let third = Builder::new().memory().open().await?;
/// let from_env = Cache::from_env().await?; // or `Builder::from_env().open()`
/// let from_file = Builder::from_env_and_file(".env").without_queue().open().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Builder {
    /// The settings that a diagnosis shows, too. Its lists are complete only after [`resolve`](Self::resolve).
    pub(super) config: ResolvedConfig,
    /// The caller's store. It has precedence over the backend.
    pub(super) store: Option<Arc<dyn Store>>,
    pub(super) queue_mode: QueueMode,
    /// The project's reference, which gives the URL if none is set.
    pub(super) project: Option<String>,
    /// Reads the key's file again, if the key came from a file.
    pub(super) key_file: Option<KeyProvider>,
    /// The caller's provider. It has precedence over `key_file`.
    pub(super) custom_key_provider: Option<KeyProvider>,
    /// The warm-up limit for the caller's store. It has no default, because such a store may list slowly.
    pub(super) custom_warmup_limit: usize,
    pub(super) limits: Limits,
    pub(super) skew_millis: i64,
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
        let mut builder = Self {
            config: ResolvedConfig::default(),
            store: None,
            queue_mode: QueueMode::Auto,
            project: None,
            key_file: None,
            custom_key_provider: None,
            custom_warmup_limit: 0,
            limits: Limits::default(),
            skew_millis: 0,
        };
        builder.config.key_name = key::NAME;
        builder.limits.in_flight_bytes = 64 << 20;
        builder.limits.maintenance_interval = Duration::from_secs(60);
        // The table of settings has the other defaults.
        for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
            builder.apply(setting, setting.default);
        }
        builder
    }
}

impl Builder {
    /// Returns a builder with the default settings: the store is the file `./threadkeep.db`.
    /// See [`Builder`] for an example.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the backend that is set. See [`Builder`] for an example.
    pub fn backend(&self) -> Backend {
        self.config.backend
    }

    /// Returns the path of the outage file that is set. See [`Builder`] for an example.
    pub fn queue_path(&self) -> &Path {
        &self.config.queue_path
    }
}
