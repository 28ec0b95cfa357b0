//! A store that generates its records for each call, so that only the caller holds their memory.

use std::sync::Arc;

use async_trait::async_trait;
use threadkeep::store::{
    Applied, Clock, Json, ListPage, ListRequest, LoadRequest, Loaded, Record, Store, Timestamp, Write,
};
use threadkeep::{Key, Result, Version};

/// A store of generated conversations of one size. Number 0 is the newest.
#[derive(Debug)]
pub struct Shelf {
    conversations: usize,
    text: String,
    newest: Version,
    clock: Arc<Clock>,
}

pub fn thread(at: usize) -> String {
    format!("thread-{at:08}")
}

impl Shelf {
    /// Each value takes `bytes` bytes as JSON.
    pub fn new(conversations: usize, bytes: usize) -> Self {
        let clock = Arc::new(Clock::new());
        let text = "x".repeat(bytes.saturating_sub(r#""""#.len()));
        Self { conversations, text, newest: Version::min_at(clock.now()), clock }
    }

    fn record(&self, at: usize) -> Record {
        Record {
            key: Key::new(thread(at)).unwrap(),
            version: Version::from_raw(self.newest.raw() - at as i64),
            value: Some(Json::of(&self.text).unwrap()),
            expires_at: Timestamp(i64::MAX),
            user: None,
            metadata: Json::default(),
        }
    }

    fn find(&self, key: &Key) -> Option<usize> {
        let at = key.as_str().strip_prefix("thread-")?.parse().ok()?;
        (at < self.conversations).then_some(at)
    }

    fn look_up(&self, request: &LoadRequest) -> Loaded {
        match self.find(&request.key).map(|at| self.record(at)) {
            None => Loaded::Absent(Version::NONE),
            Some(record) if request.if_none_match == Some(record.version) => Loaded::NotModified,
            Some(record) => Loaded::Found(Arc::new(record)),
        }
    }
}

#[async_trait]
impl Store for Shelf {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        Ok(requests.iter().map(|request| self.look_up(request)).collect())
    }

    /// Accepts each write and drops it.
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        Ok(vec![Applied::Stored; writes.len()])
    }

    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        let first = page.after.as_ref().map_or(0, |(_, last)| self.find(last).unwrap() + 1);
        let end = (first + page.limit).min(self.conversations);
        let records = (first..end).map(|at| self.record(at)).collect();
        Ok(ListPage::new(records, end == self.conversations))
    }

    async fn touch(&self, _: &[Key]) -> Result<()> {
        Ok(())
    }

    async fn purge(&self, _: usize) -> Result<usize> {
        Ok(0)
    }

    async fn probe(&self) -> Result<()> {
        Ok(())
    }
}
