//! The builder of a cache: its fields, defaults and setters. A setter keeps a problem for `open`, so that one error reports
//! all problems.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::resolved::ResolvedConfig;
use super::settings::{
    FEED_INTERVAL_RANGE, FRESH_FOR_RANGE, SOFT_TIMEOUT_RANGE, TIMEOUT_RANGE, TTL_RANGE, VALUE_BYTES_RANGE,
    bytes_remedy,
};
use super::{Backend, SETTINGS, invalid, key, malformed};
use crate::cache::{Limits, OnOutage};
use crate::store::Store;
use crate::store::supabase::{self, KeyProvider};

const MIN_MAINTENANCE_INTERVAL: Duration = Duration::from_millis(10);
const MAX_MAINTENANCE_INTERVAL: Duration = Duration::from_secs(86_400);

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
///     .feed_interval(Duration::from_secs(1))
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
#[must_use = "no cache exists before `open`"]
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
    /// Whether the caller's store has a feed.
    pub(super) has_custom_feed: bool,
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
            has_custom_feed: false,
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

/// The choice of the store.
impl Builder {
    /// Selects a SQLite file as the store. See [`Builder`] for an example.
    pub fn local(mut self, path: impl Into<PathBuf>) -> Self {
        (self.config.backend, self.config.local_path) = (Backend::Local, path.into());
        self
    }

    /// Selects a Supabase project as the store, by its URL and its secret (service role) key.
    /// See [`Builder`] for an example.
    pub fn supabase(mut self, url: &str, key: &str) -> Self {
        self.config.backend = Backend::Supabase;
        match supabase::check_url(url) {
            Ok(()) => self.config.url = Some(url.into()),
            Err(error) => self.reject("SUPABASE_URL", &error),
        }
        match supabase::check_key(key) {
            Ok(()) => self.set_key(key::NAME, key, None),
            Err(error) => self.reject(key::NAME, &error),
        }
        self
    }

    /// Sets the source of a new key for the time when Supabase rejects the current key.
    ///
    /// The first key comes from [`supabase`](Self::supabase) or a setting. The provider replaces a key file. See
    /// [`Supabase::key_provider`](crate::store::Supabase::key_provider) for its rules. See [`Builder`] for an example.
    pub fn key_provider(mut self, provider: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        self.custom_key_provider = Some(KeyProvider::new(provider));
        self
    }

    /// Selects the memory of the process as the store. All conversations are lost when the process ends.
    /// See [`Builder`] for an example.
    pub fn memory(mut self) -> Self {
        self.config.backend = Backend::Memory;
        self
    }

    /// Selects a store of the caller.
    ///
    /// Wrap a store that can be unavailable in a [`ResilientStore`](crate::store::ResilientStore).
    ///
    /// ```
    /// use threadkeep::Cache;
    /// use threadkeep::store::Memory;
    ///
    /// let builder = Cache::builder().store(Memory::new());
    /// ```
    pub fn store(mut self, store: impl Store) -> Self {
        self.store = Some(Arc::new(store));
        self
    }
}

/// Limits and times.
impl Builder {
    /// Sets the time to live of a conversation. A write can set another one. See [`Builder`] for an example.
    pub fn ttl(self, ttl: Duration) -> Self {
        self.set_duration("CONVERSATION_TIMEOUT_HOURS", ttl, &TTL_RANGE, |builder| &mut builder.limits.ttl)
    }

    /// Limits the size of one conversation, in bytes of JSON. See [`Builder`] for an example.
    pub fn max_value_bytes(mut self, bytes: usize) -> Self {
        if VALUE_BYTES_RANGE.contains(&bytes) {
            self.limits.value_bytes = bytes;
        } else {
            self.reject("CONVERSATION_MAX_VALUE_BYTES", &malformed(bytes_remedy(&VALUE_BYTES_RANGE)));
        }
        self
    }

    /// Limits the bytes of conversations in memory. See [`Builder`] for an example.
    pub fn cache_max_bytes(mut self, bytes: usize) -> Self {
        self.limits.memory_bytes = bytes as u64;
        self
    }

    /// Sets the age up to which a conversation in memory is fresh. Later reads ask the store.
    /// See [`Builder`] for an example.
    pub fn fresh_for(self, span: Duration) -> Self {
        self.set_duration("CONVERSATION_FRESH_SECONDS", span, &FRESH_FOR_RANGE, |builder| {
            builder.limits.fresh_for.get_or_insert_default()
        })
    }

    /// Sets the interval of the change feed, from 10 ms to an hour. Zero turns the feed off.
    ///
    /// One request tells which conversations changed in the store. All others in memory stay fresh, and cost
    /// one load an hour. For a
    /// [store](Self::store) of the caller, the feed runs only with this setter.
    ///
    /// The interval must be below the time in [`fresh_for`](Self::fresh_for). Otherwise conversations stop being fresh before
    /// the next poll, and their readers ask the store. If that time is zero, the feed does not run. See [`Builder`] for an example.
    pub fn feed_interval(mut self, interval: Duration) -> Self {
        self.has_custom_feed = true;
        if interval.is_zero() {
            self.limits.feed_interval = interval;
            return self;
        }
        self.set_duration("CONVERSATION_FEED_INTERVAL_SECONDS", interval, &FEED_INTERVAL_RANGE, |builder| {
            &mut builder.limits.feed_interval
        })
    }

    /// Sets the number of newest conversations that warm-up loads at the start.
    ///
    /// Warm-up runs in the background and fills at most half of the memory. For a [store](Self::store) of the caller,
    /// warm-up runs only with this setter. The backend `local` has no warm-up, because its reads are fast.
    /// See [`Builder`] for an example.
    pub fn warmup_limit(mut self, conversations: usize) -> Self {
        (self.limits.warmup_limit, self.custom_warmup_limit) = (conversations, conversations);
        self
    }

    /// Sets the wait for the store before a read returns its stale copy, and before a write is queued.
    /// See [`Builder`] for an example.
    pub fn soft_timeout(self, span: Duration) -> Self {
        self.set_duration("CONVERSATION_SOFT_TIMEOUT_SECONDS", span, &SOFT_TIMEOUT_RANGE, |builder| {
            &mut builder.limits.soft_timeout
        })
    }

    /// Sets the time limit of one small request to Supabase. See [`Builder`] for an example.
    pub fn timeout(self, span: Duration) -> Self {
        self.set_duration("SUPABASE_TIMEOUT_SECONDS", span, &TIMEOUT_RANGE, |builder| {
            &mut builder.config.timeout
        })
    }

    /// Sets the interval of maintenance, which reports accesses and purges expired records.
    ///
    /// The default is a minute. Values are clamped to 10 ms and a day. See [`Builder`] for an example.
    pub fn maintenance_interval(mut self, period: Duration) -> Self {
        self.limits.maintenance_interval = period.clamp(MIN_MAINTENANCE_INTERVAL, MAX_MAINTENANCE_INTERVAL);
        self
    }

    /// Shifts the local clock, as on a machine with a wrong clock. A negative value puts the clock behind.
    /// See [`Builder`] for an example.
    #[cfg(feature = "testing")]
    pub fn clock_skew_millis(mut self, by: i64) -> Self {
        self.skew_millis = by;
        self
    }

    fn set_duration(
        mut self,
        name: &str,
        span: Duration,
        range: &RangeInclusive<Duration>,
        field: impl FnOnce(&mut Self) -> &mut Duration,
    ) -> Self {
        if range.contains(&span) {
            *field(&mut self) = span;
            return self;
        }
        let (min, max) = (range.start(), range.end());
        let remedy = format!("use a time from {min:?} to {max:?}");
        self.reject(name, &invalid(format!("cannot be {span:?}"), remedy));
        self
    }
}

/// Behaviour in an outage, and with missing credentials.
impl Builder {
    /// Sets the outage file, which holds queue, dead letters and replica while the store is unavailable.
    ///
    /// The backend `supabase` always has an outage file. A [store](Self::store) of the caller has one only with this setter.
    /// See [`Builder`] for an example.
    pub fn queue(mut self, path: impl Into<PathBuf>) -> Self {
        self.config.queue_path = path.into();
        // `without_queue` wins in any order of the setters.
        if self.queue_mode == QueueMode::Auto {
            self.queue_mode = QueueMode::On;
        }
        self
    }

    /// Opens no outage file, so that a tool can run beside a daemon that has the file open.
    ///
    /// In an outage, a write is an error and a read finds only conversations in memory. The cache does not see the writes
    /// in the daemon's queue. See [`Builder`] for an example.
    pub fn without_queue(mut self) -> Self {
        self.queue_mode = QueueMode::Off;
        self
    }

    /// Limits the bytes of queued writes and dead letters on disk. See [`Builder`] for an example.
    pub fn queue_max_bytes(mut self, bytes: usize) -> Self {
        self.config.queue_max_bytes = bytes as u64;
        self
    }

    /// Limits the bytes of the replica on disk. See [`Builder`] for an example.
    pub fn replica_max_bytes(mut self, bytes: usize) -> Self {
        self.config.replica_max_bytes = bytes as u64;
        self
    }

    /// Sets the reaction to a write while the store is unavailable. See [`Builder`] for an example.
    pub fn on_outage(mut self, choice: OnOutage) -> Self {
        self.limits.on_outage = choice;
        self
    }

    /// Makes missing credentials an error, instead of a warning and the backend `memory`.
    /// See [`Builder`] for an example.
    pub fn strict(mut self) -> Self {
        self.config.is_strict = true;
        self
    }
}
