//! The current key, and its renewal after Supabase rejects it.
//!
//! Renewal is single-flight. One task calls the provider, and concurrent callers wait for its result.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use tokio::sync::Mutex;

use crate::error::Error;
use crate::resilience::tasks::unblock;
use crate::store::supabase::key::ApiKey;

/// Limits the calls of the provider to one in this time.
const MIN_REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// A function that returns a new key, or `None` to keep the current one.
///
/// The function may hold a key, so `Debug` shows nothing of it.
#[derive(Clone)]
pub(crate) struct KeyProvider(Arc<dyn Fn() -> Option<String> + Send + Sync>);

impl KeyProvider {
    pub(crate) fn new(provider: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(provider))
    }
}

impl fmt::Debug for KeyProvider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyProvider")
    }
}

/// The current key. Clones share it.
#[derive(Clone)]
pub(super) struct Credentials {
    current: Arc<RwLock<Arc<ApiKey>>>,
    provider: Option<KeyProvider>,
    /// The time of the last call of the provider. The caller holds the lock until the provider returns, so calls never
    /// overlap.
    last_refresh: Arc<Mutex<Option<Instant>>>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.current().fmt(f)
    }
}

impl Credentials {
    pub(super) fn new(key: ApiKey) -> Self {
        Self { current: Arc::new(RwLock::new(Arc::new(key))), provider: None, last_refresh: Arc::default() }
    }

    pub(super) fn with_provider(self, provider: Option<KeyProvider>) -> Self {
        Self { provider, ..self }
    }

    pub(super) fn current(&self) -> Arc<ApiKey> {
        Arc::clone(&self.current.read())
    }

    /// Returns another key than the rejected one, if the provider has one within `limit` (I12).
    ///
    /// After the limit, the caller reports the rejection. A timeout would count as an outage. The client still installs the
    /// key of a late provider.
    pub(super) async fn refresh_after_rejection(
        &self,
        rejected: &Arc<ApiKey>,
        limit: Duration,
    ) -> Option<Arc<ApiKey>> {
        let provider = self.provider.as_ref()?;
        tokio::select! {
            key = self.refresh(provider, rejected) => key,
            () = tokio::time::sleep(limit) => None,
        }
    }

    /// Calls the provider, unless another task has done so meanwhile.
    async fn refresh(
        &self,
        KeyProvider(provider): &KeyProvider,
        rejected: &Arc<ApiKey>,
    ) -> Option<Arc<ApiKey>> {
        let mut last_refresh = Arc::clone(&self.last_refresh).lock_owned().await;
        let current = self.current();
        // Another task renewed the key while this one waited for the lock.
        if !Arc::ptr_eq(&current, rejected) {
            return Some(current);
        }
        if last_refresh.is_some_and(|at| at.elapsed() < MIN_REFRESH_INTERVAL) {
            return None;
        }
        // Before the call, so that the interval also holds after a panic of the provider.
        *last_refresh = Some(Instant::now());
        let (credentials, provider) = (self.clone(), Arc::clone(provider));
        let refreshed = unblock(move || {
            // The OS thread holds the lock, because the waiting caller may be cancelled.
            let _last_refresh = last_refresh;
            credentials.install(&provider()?)
        });
        // The log omits the panic's message, which may hold the key.
        let panicked =
            |_: Error| tracing::warn!("the provider of the Supabase key panicked; the old key stays");
        refreshed.await.map_err(panicked).ok()?
    }

    /// Installs a key. Returns `None` if it equals the current key, or has a wrong form.
    fn install(&self, key: &str) -> Option<Arc<ApiKey>> {
        let unusable =
            |problem: &&str| tracing::warn!("no new Supabase key, the old one stays: it {problem}");
        let key = ApiKey::new(key).inspect_err(unusable).ok()?;
        let mut current = self.current.write();
        if key == **current {
            return None;
        }
        *current = Arc::new(key);
        tracing::info!("the Supabase key was replaced");
        Some(Arc::clone(&current))
    }
}
