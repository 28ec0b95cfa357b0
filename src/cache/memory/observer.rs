//! The changes in the queue that memory learns of.

use crate::cache::key_state::Event;
use crate::cache::memory::MemoryCache;
use crate::model::key::Key;
use crate::model::version::Version;
use crate::outage::{Corrected, QueueObserver, Tail, Verdict};

impl QueueObserver for MemoryCache {
    fn settled(&self, key: &Key, version: Version, verdict: &Verdict, left: Option<Tail>) {
        self.tell(key, Event::Settled { version, verdict: verdict.clone(), left });
    }

    fn corrected(&self, changed: &[Corrected]) {
        for Corrected { key, from, version, expires_at } in changed {
            let (from, version, expires_at) = (*from, *version, *expires_at);
            self.tell(key, Event::Corrected { from, version, expires_at });
        }
    }
}
