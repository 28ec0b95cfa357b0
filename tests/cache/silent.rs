//! A store that stores writes and returns no result for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use async_trait::async_trait;
use threadkeep::store::{Applied, Clock, ListPage, ListRequest, LoadRequest, Loaded, Memory, Store, Write};
use threadkeep::{Cache, ErrorKind, Key, Result};

#[derive(Debug)]
struct SilentStore {
    store: Memory,
    is_silent: AtomicBool,
}

#[async_trait]
impl Store for SilentStore {
    fn clock(&self) -> &Arc<Clock> {
        self.store.clock()
    }
    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.store.load(requests).await
    }
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let applied = self.store.apply(writes).await?;
        Ok(if self.is_silent.load(SeqCst) { Vec::new() } else { applied })
    }
    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        self.store.list(page).await
    }
    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.store.touch(keys).await
    }
    async fn purge(&self, limit: usize) -> Result<usize> {
        self.store.purge(limit).await
    }
    async fn probe(&self) -> Result<()> {
        self.store.probe().await
    }
}

#[tokio::test]
async fn write_without_a_result_leaves_no_cached_value() {
    let store = Arc::new(SilentStore { store: Memory::new(), is_silent: AtomicBool::new(false) });
    let cache = Cache::builder().store(Arc::clone(&store)).open().await.unwrap();
    cache.put("t", &1).await.unwrap();
    store.is_silent.store(true, SeqCst);
    let error = cache.put("t", &2).await.unwrap_err();
    assert!(error.kind() == ErrorKind::SchemaOutdated && error.outcome_unknown(), "{error:?}");
    assert_eq!(cache.get("t").await.unwrap().unwrap().json(), "2", "memory loads again (I6)");
}
