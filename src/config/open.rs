//! The composition root: opens the cache, or the outage file alone, from validated settings.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::builder::{Builder, QueueMode};
use super::resolved::error_of;
use super::{Backend, SettingProblem};
use crate::cache::{Cache, Limits};
use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::outage::admin::QueueAdmin;
use crate::outage::file::OutageFile;
use crate::outage::{FileLimits, QueuedKey};
use crate::resilience::tasks;
use crate::store::supabase::{Supabase, origin_of};
use crate::store::{BatchingStore, Local, Memory, ResilientStore, Store};

/// The time that the guard waits longer than the client. The client's own timeout error says more than the guard's.
const GUARD_MARGIN: Duration = Duration::from_millis(250);

impl Builder {
    /// Opens the cache.
    ///
    /// An outage is no error: the cache opens, and reaches the store after the outage.
    ///
    /// Probe, replay, warm-up and maintenance run on a background runtime with two OS threads. So they continue while a
    /// single-threaded runtime of the caller is between two calls of `block_on`. A cache may outlive the runtime that
    /// opened it. Loads and writes run on the caller's runtime if that has workers, and end with it.
    ///
    /// # Errors
    /// * [`ErrorKind::Config`] with all problems of the settings together.
    /// * [`ErrorKind::LocalStorage`] if a local file cannot be used.
    /// * [`ErrorKind::Locked`] if another process has the file open.
    /// * [`ErrorKind::Unauthorized`] if Supabase rejects the key.
    /// * [`ErrorKind::SchemaOutdated`] if the database lacks a migration.
    ///
    /// See [`Builder`] for an example.
    pub async fn open(mut self) -> Result<Cache> {
        let backend = self.validate()?;
        if let Some(store) = self.store.take() {
            return self.open_custom(store).await;
        }
        if backend == Backend::Supabase {
            return self.open_supabase().await;
        }
        warn_queued_writes(&self.config.queue_path);
        // No other process can write, so each entry in memory stays fresh.
        let limits =
            Limits { fresh_for: None, feed_interval: Duration::ZERO, warmup_limit: 0, ..self.limits };
        if backend == Backend::Memory {
            tracing::warn!("conversations are kept in memory only: they are lost on restart");
            return Ok(Cache::new(Arc::new(Memory::new()), "memory", limits, None));
        }
        let local = Local::open(&self.config.local_path).await?;
        tracing::info!(path = %self.config.local_path.display(), "conversations are kept in a local file");
        Ok(Cache::new(Arc::new(local), "local", limits, None))
    }

    async fn open_custom(mut self, store: Arc<dyn Store>) -> Result<Cache> {
        self.limits.warmup_limit = self.custom_warmup_limit;
        if !self.has_custom_feed {
            self.limits.feed_interval = Duration::ZERO;
        }
        let file = match self.queue_mode {
            QueueMode::On => Some(self.open_outage_file("custom", store.clock()).await?),
            QueueMode::Auto | QueueMode::Off => None,
        };
        // The first response of the store corrects the clock (I17). In an outage, a later response does.
        let probed = Arc::clone(&store);
        match tasks::run(async move { probed.probe().await }).await? {
            Err(error) if !error.is_outage() => return Err(error),
            _ => {}
        }
        Ok(Cache::new(store, "custom", self.limits, file))
    }

    async fn open_supabase(mut self) -> Result<Cache> {
        let url = self.config.url.take().unwrap_or_default();
        let key = self.config.key.take().map(|key| key.expose().to_owned()).unwrap_or_default();
        let provider = self.custom_key_provider.take().or(self.key_file.take());
        let client = Supabase::with_clock(&url, &key, Clock::skewed(self.skew_millis))?;
        let client = client.with_key_provider(provider);
        let host = client.host().to_owned();
        // The outage file opens before the first request: a second process on the same file must fail early.
        let file = match self.queue_mode {
            QueueMode::On | QueueMode::Auto => Some(self.open_outage_file(&host, client.clock()).await?),
            QueueMode::Off => None,
        };
        let guard =
            ResilientStore::new(client.idle_timeout(self.config.timeout), self.config.timeout + GUARD_MARGIN);
        let contact = async move { guard.first_contact().await.map(|failure| (guard, failure)) };
        let (guard, failure) = tasks::run(contact).await??;
        tracing::info!(%host, "conversations are kept in Supabase");
        let cache = Cache::new(Arc::new(BatchingStore::new(guard)), "supabase", self.limits, file);
        if let Some(failure) = failure {
            cache.note_first_contact(failure);
        }
        Ok(cache)
    }

    /// Opens the outage file of the store `origin`. Returns the file and the conversations with queued writes.
    async fn open_outage_file(
        &self,
        origin: &str,
        clock: &Arc<Clock>,
    ) -> Result<(OutageFile, Vec<QueuedKey>)> {
        let path = &self.config.queue_path;
        let (queue, replica) = (self.config.queue_max_bytes, self.config.replica_max_bytes);
        let limits = FileLimits { queue, replica };
        let (file, queued) = OutageFile::open(path, origin, limits, Arc::clone(clock)).await?;
        if !queued.is_empty() {
            let (path, writes) = (path.display(), queued.len());
            tracing::info!(%path, writes, "the outage file holds queued writes of an earlier process; replay sends them");
        }
        Ok((file, queued))
    }

    /// Opens an existing outage file without a cache, for any project.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the path, or the file of settings, is invalid. Otherwise as for [`QueueAdmin::open`].
    ///
    /// ```
    /// # async fn example() -> threadkeep::Result<()> {
    /// use threadkeep::Builder;
    ///
    /// let admin = Builder::from_env().open_queue().await?; // or `open_queue_of_project`
    /// println!("{} writes are queued for {:?}", admin.status().await?.queued.records, admin.project());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn open_queue(self) -> Result<QueueAdmin> {
        let is_relevant = |problem: &&SettingProblem| {
            problem.backend().is_none() || problem.setting == "CONVERSATION_QUEUE_PATH"
        };
        match self.config.problems.iter().find(is_relevant) {
            Some(problem) => Err(error_of(problem)),
            None => QueueAdmin::open(self.config.queue_path).await,
        }
    }

    /// Opens the outage file of the configured Supabase project without a cache. Creates the file if it is missing.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with all problems of the settings together, or if the backend is not `supabase`. Otherwise as
    /// for [`QueueAdmin::open_for`]. See [`open_queue`](Self::open_queue) for an example.
    pub async fn open_queue_of_project(mut self) -> Result<QueueAdmin> {
        self.config.is_strict = true;
        if self.validate()? != Backend::Supabase {
            let message = "CONVERSATION_STORAGE_BACKEND names a backend without a queue";
            return Err(Error::new(ErrorKind::Config, message).with_remedy("set it to `supabase`"));
        }
        let origin = self.config.url.as_deref().and_then(origin_of).unwrap_or_default();
        QueueAdmin::open_for(self.config.queue_path, &origin).await
    }
}

/// Warns about writes in an outage file that this backend does not replay, as after a rollback from Supabase.
fn warn_queued_writes(path: &Path) {
    if let Some(writes) = OutageFile::count_queued(path).filter(|writes| *writes > 0) {
        let path = path.display();
        tracing::warn!(%path, writes, "acknowledged writes wait in the outage file; only the backend `supabase` replays them");
    }
}

impl Cache {
    /// Opens a cache with the settings of the environment. The default store is the file `./threadkeep.db`.
    ///
    /// # Errors
    /// As for [`Builder::open`]. See [`Builder`] for an example.
    pub async fn from_env() -> Result<Self> {
        Builder::from_env().open().await
    }

    /// Returns a builder with the default settings. See [`Builder`] for an example.
    pub fn builder() -> Builder {
        Builder::new()
    }
}
