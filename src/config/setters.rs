//! The setters of the builder. A setter keeps a problem for `open`, so that one error reports all problems.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::builder::{Builder, QueueMode};
use super::settings::{
    FRESH_FOR_RANGE, SOFT_TIMEOUT_RANGE, TIMEOUT_RANGE, TTL_RANGE, VALUE_BYTES_RANGE, bytes_remedy,
};
use super::{Backend, invalid, key, malformed};
use crate::cache::OnOutage;
use crate::store::Store;
use crate::store::supabase::{self, KeyProvider};

const MIN_MAINTENANCE_INTERVAL: Duration = Duration::from_millis(10);
const MAX_MAINTENANCE_INTERVAL: Duration = Duration::from_secs(86_400);

/// The choice of the store.
impl Builder {
    /// Selects a SQLite file as the store. See [`Builder`] for an example.
    #[must_use]
    pub fn local(mut self, path: impl Into<PathBuf>) -> Self {
        (self.config.backend, self.config.local_path) = (Backend::Local, path.into());
        self
    }

    /// Selects a Supabase project as the store, by its URL and its secret (service role) key.
    /// See [`Builder`] for an example.
    #[must_use]
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
    /// [`Supabase::key_provider`](crate::store::Supabase::key_provider) for its rules.
    /// See [`Builder`] for an example.
    #[must_use]
    pub fn key_provider(mut self, provider: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        self.custom_key_provider = Some(KeyProvider::new(provider));
        self
    }

    /// Selects the memory of the process as the store. All conversations are lost when the process ends.
    /// See [`Builder`] for an example.
    #[must_use]
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
    #[must_use]
    pub fn store(mut self, store: impl Store) -> Self {
        self.store = Some(Arc::new(store));
        self
    }
}

/// Limits and times.
impl Builder {
    /// Sets the time to live of a conversation. A write can set another one. See [`Builder`] for an example.
    #[must_use]
    pub fn ttl(self, ttl: Duration) -> Self {
        self.set_duration("CONVERSATION_TIMEOUT_HOURS", ttl, &TTL_RANGE, |builder| &mut builder.limits.ttl)
    }

    /// Limits the size of one conversation, in bytes of JSON. See [`Builder`] for an example.
    #[must_use]
    pub fn max_value_bytes(mut self, bytes: usize) -> Self {
        if VALUE_BYTES_RANGE.contains(&bytes) {
            self.limits.value_bytes = bytes;
        } else {
            self.reject("CONVERSATION_MAX_VALUE_BYTES", &malformed(bytes_remedy(&VALUE_BYTES_RANGE)));
        }
        self
    }

    /// Limits the bytes of conversations in memory. See [`Builder`] for an example.
    #[must_use]
    pub fn cache_max_bytes(mut self, bytes: usize) -> Self {
        self.limits.memory_bytes = bytes as u64;
        self
    }

    /// Sets the age up to which a conversation in memory is fresh. Later reads ask the store.
    /// See [`Builder`] for an example.
    #[must_use]
    pub fn fresh_for(self, span: Duration) -> Self {
        self.set_duration("CONVERSATION_FRESH_SECONDS", span, &FRESH_FOR_RANGE, |builder| {
            builder.limits.fresh_for.get_or_insert_default()
        })
    }

    /// Sets the number of newest conversations that warm-up loads at the start.
    ///
    /// Warm-up runs in the background and fills at most half of the memory. For a [store](Self::store) of the caller,
    /// warm-up runs only with this setter. The backend `local` has no warm-up, because its reads are fast.
    /// See [`Builder`] for an example.
    #[must_use]
    pub fn warmup_limit(mut self, conversations: usize) -> Self {
        (self.limits.warmup_limit, self.custom_warmup_limit) = (conversations, conversations);
        self
    }

    /// Sets the wait for the store before a read returns its stale copy, and before a write is queued.
    /// See [`Builder`] for an example.
    #[must_use]
    pub fn soft_timeout(self, span: Duration) -> Self {
        self.set_duration("CONVERSATION_SOFT_TIMEOUT_SECONDS", span, &SOFT_TIMEOUT_RANGE, |builder| {
            &mut builder.limits.soft_timeout
        })
    }

    /// Sets the time limit of one small request to Supabase. See [`Builder`] for an example.
    #[must_use]
    pub fn timeout(self, span: Duration) -> Self {
        self.set_duration("SUPABASE_TIMEOUT_SECONDS", span, &TIMEOUT_RANGE, |builder| {
            &mut builder.config.timeout
        })
    }

    /// Sets the interval of maintenance, which reports accesses and purges expired records.
    ///
    /// The default is a minute. Values are clamped to 10 ms and a day. See [`Builder`] for an example.
    #[must_use]
    pub fn maintenance_interval(mut self, period: Duration) -> Self {
        self.limits.maintenance_interval = period.clamp(MIN_MAINTENANCE_INTERVAL, MAX_MAINTENANCE_INTERVAL);
        self
    }

    /// Shifts the local clock, as on a machine with a wrong clock. A negative value puts the clock behind.
    /// See [`Builder`] for an example.
    #[cfg(feature = "testing")]
    #[must_use]
    pub fn clock_skew_millis(mut self, by: i64) -> Self {
        self.skew_millis = by;
        self
    }

    /// Sets a duration that a setter got, if it is in the range.
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
    #[must_use]
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
    #[must_use]
    pub fn without_queue(mut self) -> Self {
        self.queue_mode = QueueMode::Off;
        self
    }

    /// Limits the bytes of queued writes and dead letters on disk. See [`Builder`] for an example.
    #[must_use]
    pub fn queue_max_bytes(mut self, bytes: usize) -> Self {
        self.config.queue_max_bytes = bytes as u64;
        self
    }

    /// Limits the bytes of the replica on disk. See [`Builder`] for an example.
    #[must_use]
    pub fn replica_max_bytes(mut self, bytes: usize) -> Self {
        self.config.replica_max_bytes = bytes as u64;
        self
    }

    /// Sets the reaction to a write while the store is unavailable. See [`Builder`] for an example.
    #[must_use]
    pub fn on_outage(mut self, choice: OnOutage) -> Self {
        self.limits.on_outage = choice;
        self
    }

    /// Makes missing credentials an error, instead of a warning and the backend `memory`.
    /// See [`Builder`] for an example.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.config.is_strict = true;
        self
    }
}
