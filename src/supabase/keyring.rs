//! The key in use, and where a new one comes from once Supabase refuses it.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use super::key::ApiKey;
use crate::blocking::unblock;
use crate::error::Error;

/// The source is asked once in this time at most.
const PAUSE: Duration = Duration::from_secs(1);

/// Where a new key comes from; `None` keeps the one in use. It may hold a key, so it shows nothing.
#[derive(Clone)]
pub(crate) struct KeySource(Arc<dyn Fn() -> Option<String> + Send + Sync>);

impl KeySource {
    pub(crate) fn new(source: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(source))
    }
}

impl fmt::Debug for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeySource")
    }
}

/// The key in use. Clones are the same ring.
#[derive(Clone)]
pub(super) struct Keyring {
    current: Arc<RwLock<Arc<ApiKey>>>,
    source: Option<KeySource>,
    /// When the source was asked last. Whoever asks holds the lock meanwhile, so that one does.
    asked: Arc<Mutex<Option<Instant>>>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.current().fmt(f)
    }
}

impl Keyring {
    pub(super) fn new(key: ApiKey) -> Self {
        Self { current: Arc::new(RwLock::new(Arc::new(key))), source: None, asked: Arc::default() }
    }

    pub(super) fn with_source(self, source: Option<KeySource>) -> Self {
        Self { source, ..self }
    }

    pub(super) fn current(&self) -> Arc<ApiKey> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Another key than the one that was refused, if there is one within `patience`. A source that takes longer is not
    /// waited for, so that the caller hears of the refusal and not of a deadline, which would count as an outage; what
    /// it says in the end is taken all the same.
    pub(super) async fn other_than(&self, refused: &Arc<ApiKey>, patience: Duration) -> Option<Arc<ApiKey>> {
        let source = self.source.as_ref()?;
        tokio::select! {
            key = self.ask(source, refused) => key,
            () = tokio::time::sleep(patience) => None,
        }
    }

    async fn ask(&self, KeySource(source): &KeySource, refused: &Arc<ApiKey>) -> Option<Arc<ApiKey>> {
        let mut asked = Arc::clone(&self.asked).lock_owned().await;
        let current = self.current();
        if !Arc::ptr_eq(&current, refused) {
            return Some(current);
        }
        if asked.is_some_and(|at| at.elapsed() < PAUSE) {
            return None;
        }
        *asked = Some(Instant::now());
        let (ring, source) = (self.clone(), Arc::clone(source));
        let asking = unblock(move || {
            // Callers come and go; the lock is let go of when the source has spoken.
            let _asked = asked;
            ring.take(&source()?)
        });
        // What the panic says may hold the key.
        let panicked =
            |_: Error| tracing::warn!("the source of the Supabase key panicked; the old key stays");
        asking.await.map_err(panicked).ok()?
    }

    /// Puts a key in use, unless it is the one in use or cannot be one.
    fn take(&self, key: &str) -> Option<Arc<ApiKey>> {
        let unusable = |wrong: &&str| tracing::warn!("no new Supabase key, the old one stays: {wrong}");
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

    fn ring(source: impl Fn() -> Option<String> + Send + Sync + 'static) -> Keyring {
        Keyring::new(ApiKey::new("old").unwrap()).with_source(Some(KeySource::new(source)))
    }

    /// What the ring gives instead of the key in use.
    async fn other(ring: &Keyring) -> Option<Arc<ApiKey>> {
        ring.other_than(&ring.current(), PAUSE * 60).await
    }

    /// As if nobody had asked for a while.
    async fn rest(ring: &Keyring) {
        *ring.asked.lock().await = None;
    }

    #[tokio::test]
    async fn many_who_are_refused_ask_once() {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let ring = ring(move || Some(format!("new-{}", count.fetch_add(1, Ordering::SeqCst))));
        let old = ring.current();
        let all = futures::future::join_all((0..100).map(|_| ring.other_than(&old, PAUSE * 60))).await;
        assert!(all.iter().all(|new| **new.as_ref().unwrap() == ApiKey::new("new-0").unwrap()));
        assert!(other(&ring).await.is_none(), "not again within a second");
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        rest(&ring).await;
        assert!(other(&ring).await.is_some());
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn what_is_no_other_key_leaves_the_old_one() {
        let answers = [None, Some("old\n"), Some(""), Some(" \n"), Some("two\nlines"), Some("\u{fffd}\0")];
        for answer in answers {
            let ring = ring(move || answer.map(str::to_owned));
            assert!(other(&ring).await.is_none(), "{answer:?}");
            assert!(*ring.current() == ApiKey::new("old").unwrap(), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn a_source_that_panics_is_asked_again_later() {
        let is_first = AtomicUsize::new(0);
        let ring = ring(move || {
            assert!(is_first.fetch_add(1, Ordering::SeqCst) > 0, "the source panics");
            Some("new".into())
        });
        assert!(other(&ring).await.is_none());
        rest(&ring).await;
        assert!(other(&ring).await.is_some());
    }

    #[tokio::test]
    async fn a_source_that_hangs_is_not_waited_for_and_is_heard_in_the_end() {
        let (say, said) = std::sync::mpsc::channel();
        let said = std::sync::Mutex::new(said);
        let ring = ring(move || said.lock().unwrap().recv().ok());
        let old = ring.current();
        for _ in 0..3 {
            assert!(ring.other_than(&old, PAUSE / 100).await.is_none());
        }
        say.send("new".to_owned()).unwrap();
        let new = ring.other_than(&old, PAUSE * 60).await.unwrap();
        assert!(*new == ApiKey::new("new").unwrap());
    }

    #[test]
    fn nothing_of_a_key_shows() {
        let key = "sb_secret_hidden".to_owned();
        let ring = ring(move || Some(key.clone()));
        ring.take("sb_secret_hidden").unwrap();
        assert_eq!(format!("{ring:?} {:?}", ring.source), "ApiKey(Secret) Some(KeySource)");
    }
}
