//! The current key, and its renewal after Supabase rejects it.
//!
//! Renewal is single-flight. One task calls the provider, and concurrent callers wait for its result.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::error::Error;
use crate::resilience::blocking::unblock;
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
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
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
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if key == **current {
            return None;
        }
        *current = Arc::new(key);
        tracing::info!("the Supabase key was replaced");
        Some(Arc::clone(&current))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn credentials(provider: impl Fn() -> Option<String> + Send + Sync + 'static) -> Credentials {
        Credentials::new(ApiKey::new("old").unwrap()).with_provider(Some(KeyProvider::new(provider)))
    }

    /// Reports the current key as rejected, and returns the new one.
    async fn refresh(credentials: &Credentials) -> Option<Arc<ApiKey>> {
        credentials.refresh_after_rejection(&credentials.current(), MIN_REFRESH_INTERVAL * 60).await
    }

    /// Ends the minimum interval between two calls of the provider.
    async fn end_interval(credentials: &Credentials) {
        *credentials.last_refresh.lock().await = None;
    }

    #[tokio::test]
    async fn refresh_many_rejected_callers_call_provider_once() {
        let calls = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&calls);
        let credentials = credentials(move || Some(format!("new-{}", count.fetch_add(1, Ordering::SeqCst))));
        let old = credentials.current();
        let all = futures::future::join_all(
            (0..100).map(|_| credentials.refresh_after_rejection(&old, MIN_REFRESH_INTERVAL * 60)),
        )
        .await;
        assert!(all.iter().all(|new| **new.as_ref().unwrap() == ApiKey::new("new-0").unwrap()));
        assert!(refresh(&credentials).await.is_none(), "the provider is called once a second at most");
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        end_interval(&credentials).await;
        assert!(refresh(&credentials).await.is_some());
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn refresh_unusable_answer_keeps_current_key() {
        let answers = [None, Some("old\n"), Some(""), Some(" \n"), Some("two\nlines"), Some("\u{fffd}\0")];
        for answer in answers {
            let credentials = credentials(move || answer.map(str::to_owned));
            assert!(refresh(&credentials).await.is_none(), "{answer:?}");
            assert!(*credentials.current() == ApiKey::new("old").unwrap(), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn refresh_panicking_provider_is_called_again_later() {
        let is_first = AtomicUsize::new(0);
        let credentials = credentials(move || {
            assert!(is_first.fetch_add(1, Ordering::SeqCst) > 0, "the provider panics");
            Some("new".into())
        });
        assert!(refresh(&credentials).await.is_none());
        end_interval(&credentials).await;
        assert!(refresh(&credentials).await.is_some());
    }

    #[tokio::test]
    async fn refresh_slow_provider_installs_its_key_later() {
        let (send, answers) = std::sync::mpsc::channel();
        let answers = std::sync::Mutex::new(answers);
        let credentials = credentials(move || answers.lock().unwrap().recv().ok());
        let old = credentials.current();
        for _ in 0..3 {
            assert!(credentials.refresh_after_rejection(&old, MIN_REFRESH_INTERVAL / 100).await.is_none());
        }
        send.send("new".to_owned()).unwrap();
        let new = credentials.refresh_after_rejection(&old, MIN_REFRESH_INTERVAL * 60).await.unwrap();
        assert!(*new == ApiKey::new("new").unwrap());
    }

    #[test]
    fn debug_hides_the_key() {
        let key = "sb_secret_hidden".to_owned();
        let credentials = credentials(move || Some(key.clone()));
        credentials.install("sb_secret_hidden").unwrap();
        assert_eq!(format!("{credentials:?} {:?}", credentials.provider), "ApiKey(Secret) Some(KeyProvider)");
    }
}
