//! The composition root: opens the cache, or the outage file alone, from validated settings.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::builder::{Builder, QueueMode};
use super::validate::invalid;
use super::{Backend, SettingProblem};
use crate::cache::{Cache, Limits};
use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::outage::IndexEntry;
use crate::outage::admin::QueueAdmin;
use crate::outage::file::OutageFile;
use crate::resilience::tasks;
use crate::store::supabase::Supabase;
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
    /// ```
    /// # async fn example() -> threadkeep::Result<()> {
    /// let cache = threadkeep::Builder::from_env().open().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn open(mut self) -> Result<Cache> {
        let backend = self.validate()?;
        if let Some(store) = self.store.take() {
            return self.open_custom(store).await;
        }
        match backend {
            Backend::Local => {
                warn_queued_writes(&self.queue_path);
                open_local(&self.local_path, self.limits).await
            }
            Backend::Memory => {
                tracing::warn!("conversations are kept in memory only: they are lost on restart");
                warn_queued_writes(&self.queue_path);
                Ok(Cache::new(Arc::new(Memory::new()), "memory", self.limits, None))
            }
            Backend::Supabase => self.open_supabase().await,
        }
    }

    async fn open_custom(mut self, store: Arc<dyn Store>) -> Result<Cache> {
        self.limits.fresh_for = Some(self.fresh_for);
        self.limits.warmup_limit = self.custom_warmup_limit;
        let has_queue = self.queue_mode == QueueMode::On;
        let file = self.open_outage_file(has_queue, "custom", store.clock()).await?;
        // The first response of the store corrects the clock (I17). In an outage, a later response does.
        let probed = Arc::clone(&store);
        match tasks::run(async move { probed.probe().await }).await? {
            Err(error) if !error.is_outage() => return Err(error),
            _ => {}
        }
        Ok(Cache::new(store, "custom", self.limits, file))
    }

    async fn open_supabase(mut self) -> Result<Cache> {
        self.limits.fresh_for = Some(self.fresh_for);
        self.limits.warmup_limit = self.warmup_limit;
        let url = self.url.take().unwrap_or_default();
        let key = self.key.take().map(|key| key.expose().to_owned()).unwrap_or_default();
        let provider = self.custom_key_provider.take().or(self.key_file.take());
        let client = Supabase::with_clock(&url, &key, Clock::skewed(self.skew_millis))?;
        let client = client.with_key_provider(provider);
        let host = client.host().to_owned();
        let has_queue = self.queue_mode != QueueMode::Off;
        // The outage file opens before the first request: a second process on the same file must fail early.
        let file = self.open_outage_file(has_queue, &host, client.clock()).await?;
        let guard = ResilientStore::new(client.idle_timeout(self.timeout), self.timeout + GUARD_MARGIN);
        let contact = async move { guard.first_contact().await.map(|failure| (guard, failure)) };
        let (guard, failure) = tasks::run(contact).await??;
        tracing::info!(%host, "conversations are kept in Supabase");
        let cache = Cache::new(Arc::new(BatchingStore::new(guard)), "supabase", self.limits, file);
        if let Some(failure) = failure {
            cache.note_first_contact(failure);
        }
        Ok(cache)
    }

    /// Opens the outage file of the store `origin`, if the cache has a queue. Returns the file and the queue's index.
    async fn open_outage_file(
        &self,
        has_queue: bool,
        origin: &str,
        clock: &Arc<Clock>,
    ) -> Result<Option<(OutageFile, Vec<IndexEntry>)>> {
        if !has_queue {
            return Ok(None);
        }
        let path = &self.queue_path;
        let (file, queued) = OutageFile::open(path, origin, self.file_limits, Arc::clone(clock)).await?;
        if !queued.is_empty() {
            let (path, writes) = (path.display(), queued.len());
            tracing::info!(%path, writes, "the outage file holds queued writes of an earlier process; replay sends them");
        }
        Ok(Some((file, queued)))
    }

    /// Opens an existing outage file without a cache, for any project.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the path, or the file of settings, is invalid. Otherwise as for [`QueueAdmin::open`].
    ///
    /// ```
    /// # async fn example() -> threadkeep::Result<()> {
    /// let admin = threadkeep::Builder::from_env().open_queue().await?;
    /// println!("{} writes are queued", admin.status().await?.queued);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn open_queue(self) -> Result<QueueAdmin> {
        let is_relevant = |problem: &&SettingProblem| {
            problem.backend.is_none() || problem.setting == "CONVERSATION_QUEUE_PATH"
        };
        match self.problems.iter().find(is_relevant) {
            Some(problem) => Err(invalid(problem)),
            None => QueueAdmin::open(self.queue_path).await,
        }
    }

    /// Opens the outage file of the configured Supabase project without a cache. Creates the file if it is missing.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with all problems of the settings together, or if the backend is not `supabase`. Otherwise as
    /// for [`QueueAdmin::open_for`].
    ///
    /// ```
    /// # async fn example() -> threadkeep::Result<()> {
    /// let admin = threadkeep::Builder::from_env().open_queue_of_project().await?;
    /// println!("{:?}", admin.project());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn open_queue_of_project(mut self) -> Result<QueueAdmin> {
        self.strict = true;
        if self.validate()? != Backend::Supabase {
            let message = "CONVERSATION_STORAGE_BACKEND names a backend without a queue";
            return Err(Error::new(ErrorKind::Config, message).with_remedy("set it to `supabase`"));
        }
        let url = self.url.unwrap_or_default();
        let key = self.key.map(|key| key.expose().to_owned()).unwrap_or_default();
        let origin = Supabase::new(&url, &key)?.host().to_owned();
        QueueAdmin::open_for(self.queue_path, &origin).await
    }
}

/// Warns about writes in an outage file that this backend does not replay, as after a rollback from Supabase.
fn warn_queued_writes(path: &Path) {
    if let Some(writes) = OutageFile::count_queued(path).filter(|writes| *writes > 0) {
        let path = path.display();
        tracing::warn!(%path, writes, "acknowledged writes wait in the outage file; only the backend `supabase` replays them");
    }
}

async fn open_local(path: &Path, limits: Limits) -> Result<Cache> {
    let local = Local::open(path).await?;
    tracing::info!(path = %path.display(), "conversations are kept in a local file");
    Ok(Cache::new(Arc::new(local), "local", limits, None))
}

impl Cache {
    /// Opens a cache with the settings of the environment. The default store is the file `./threadkeep.db`.
    ///
    /// # Errors
    /// As for [`Builder::open`].
    ///
    /// ```
    /// # async fn example() -> threadkeep::Result<()> {
    /// let cache = threadkeep::Cache::from_env().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn from_env() -> Result<Self> {
        Builder::from_env().open().await
    }

    /// Returns a builder with the default settings.
    ///
    /// ```
    /// # async fn example() -> threadkeep::Result<()> {
    /// let cache = threadkeep::Cache::builder().memory().open().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder() -> Builder {
        Builder::new()
    }
}
