//! A store that makes its records when it is asked, so that whoever has them in memory has them alone.

use std::sync::Arc;

use async_trait::async_trait;
use threadkeep::{
    Applied, Clock, Json, Key, Loaded, Page, Recent, Record, Result, Store, Timestamp, Version, Want, Write,
};

/// So many threads, all of one size, all of them written just now: the first one last.
#[derive(Debug)]
pub struct Shelf {
    threads: usize,
    text: String,
    newest: Version,
    clock: Arc<Clock>,
}

pub fn thread(at: usize) -> String {
    format!("thread-{at:08}")
}

impl Shelf {
    /// Each value takes so many bytes as JSON.
    pub fn new(threads: usize, bytes: usize) -> Self {
        let clock = Arc::new(Clock::new());
        let text = "x".repeat(bytes.saturating_sub(r#""""#.len()));
        Self { threads, text, newest: Version::lowest(clock.now()), clock }
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
        (at < self.threads).then_some(at)
    }

    fn look_up(&self, want: &Want) -> Loaded {
        match self.find(&want.key).map(|at| self.record(at)) {
            None => Loaded::Absent(Version::NONE),
            Some(record) if want.known == Some(record.version) => Loaded::Same,
            Some(record) => Loaded::Found(Arc::new(record)),
        }
    }
}

#[async_trait]
impl Store for Shelf {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        Ok(wants.iter().map(|want| self.look_up(want)).collect())
    }

    /// It takes whatever comes, and keeps nothing of it.
    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        Ok(vec![Applied::Stored; writes.len()])
    }

    async fn recent(&self, page: &Page) -> Result<Recent> {
        let first = page.after.as_ref().map_or(0, |(_, last)| self.find(last).unwrap() + 1);
        let end = (first + page.most).min(self.threads);
        let records = (first..end).map(|at| self.record(at)).collect();
        Ok(Recent { records, is_last: end == self.threads })
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
