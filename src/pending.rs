//! Which threads have a write in the queue: an index in memory, so that a read knows without asking the disk.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::record::Key;
use crate::spool::Waiting;
use crate::version::{Clock, Timestamp, Version};

type Marks = HashMap<Key, Mark, foldhash::fast::RandomState>;

/// The marks of all queued writes. They change under the near cache's lock of the key, together with what that holds.
#[derive(Debug)]
pub(crate) struct Pending {
    /// Asked by each read of a queued write from memory.
    marks: Mutex<Marks>,
    /// Writes that are on their way into the source of truth, past the queue.
    passing: Mutex<Vec<(Key, Version)>>,
    /// How many have failed alone again and again, as replay last said.
    parked: AtomicUsize,
    clock: Arc<Clock>,
    /// Counts the changes.
    changes: watch::Sender<u64>,
}

/// A write is on its way into the source of truth, until this is dropped.
#[derive(Debug)]
pub(crate) struct Passing {
    pending: Arc<Pending>,
    version: Version,
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.pending.passing().retain(|(_, version)| *version != self.version);
    }
}

#[derive(Debug, Clone, Copy)]
struct Mark {
    /// As it was stamped.
    version: Version,
    /// Stamped by a clock that nobody had put right.
    is_unsure: bool,
    /// The source of truth holds this or something newer: it is read no more, only replayed.
    is_overtaken: bool,
    /// Not read before the source of truth has been seen to hold nothing newer.
    is_doubtful: bool,
    queued_at: Timestamp,
}

impl Mark {
    fn new(version: Version, is_unsure: bool, queued_at: Timestamp) -> Self {
        Self { version, is_unsure, is_overtaken: false, is_doubtful: false, queued_at }
    }

    fn is_newest(&self) -> bool {
        !self.is_overtaken && !self.is_doubtful
    }

    /// The version that it would have got from a clock that was right.
    fn straight(&self, clock: &Clock) -> Version {
        let moved = clock.moved().filter(|_| self.is_unsure);
        self.version.straightened(moved.unwrap_or(0), self.queued_at)
    }
}

impl Pending {
    pub(crate) fn new(waiting: Vec<Waiting>, clock: Arc<Clock>) -> Self {
        let marks = waiting.into_iter().map(|one| {
            let Waiting { key, version, is_unsure, queued_at, is_overtaken, is_doubtful } = one;
            clock.observe(version);
            (key, Mark { is_overtaken, is_doubtful, ..Mark::new(version, is_unsure, queued_at) })
        });
        let (marks, passing) = (Mutex::new(marks.collect()), Mutex::default());
        Self { marks, passing, parked: AtomicUsize::new(0), clock, changes: watch::Sender::new(0) }
    }

    /// The version of the queued write that is the newest of its thread, as far as is known.
    pub(crate) fn current(&self, key: &Key) -> Option<Version> {
        let marks = self.marks();
        let mark = marks.get(key).filter(|mark| mark.is_newest())?;
        Some(mark.straight(&self.clock))
    }

    /// Whether a write of this version, as stamped or put right, is the one that [`current`](Self::current) speaks of.
    pub(crate) fn covers(&self, key: &str, version: Version) -> bool {
        let marks = self.marks();
        let mark = marks.get(key).filter(|mark| mark.is_newest());
        mark.is_some_and(|mark| version == mark.version || version == mark.straight(&self.clock))
    }

    /// The version that a clock would have given that was right, as far as is known.
    pub(crate) fn straight(&self, version: Version, is_unsure: bool, queued_at: Timestamp) -> Version {
        Mark::new(version, is_unsure, queued_at).straight(&self.clock)
    }

    /// Whether a write of this thread waits, also one that is overtaken.
    pub(crate) fn contains(&self, key: &Key) -> bool {
        self.marks().contains_key(key)
    }

    /// To be called before a write is sent past the queue, in which an older one of its thread may wait, and to be kept
    /// until the file knows what became of it.
    pub(crate) fn passing_by(self: &Arc<Self>, key: &Key, version: Version) -> Passing {
        self.passing().push((key.clone(), version));
        Passing { pending: Arc::clone(self), version }
    }

    /// Whether this is a write of this handle of which the file does not know yet what became of it.
    pub(crate) fn passes(&self, key: &Key, version: Version) -> bool {
        self.passing().iter().any(|(one, at)| one == key && *at == version)
    }

    /// Marks a write, unless a newer one is marked.
    pub(crate) fn insert(&self, key: &Key, version: Version, is_unsure: bool, queued_at: Timestamp) -> bool {
        let mut marks = self.marks();
        let mark = Mark::new(version, is_unsure, queued_at);
        // What such a clock stamps now is newer than what another process stamped by one that was right.
        let is_blind = is_unsure && self.clock.moved().is_none();
        let is_comparable = |held: &&Mark| held.is_unsure || !is_blind;
        let is_newer = |held: &Mark| held.straight(&self.clock) > mark.straight(&self.clock);
        if marks.get(key).filter(is_comparable).is_some_and(is_newer) {
            return false;
        }
        marks.insert(key.clone(), mark);
        drop(marks);
        self.changed();
        true
    }

    /// The source of truth holds this version. Where what is queued is newer, says so; else that is read no more.
    pub(crate) fn meet(&self, key: &Key, version: Version) -> Option<Version> {
        let mut marks = self.marks();
        let mark = marks.get_mut(key)?;
        let queued = mark.straight(&self.clock);
        if !mark.is_overtaken && queued > version {
            mark.is_doubtful = false;
            return Some(queued);
        }
        let is_change = !std::mem::replace(&mut mark.is_overtaken, true);
        drop(marks);
        if is_change {
            self.changed();
        }
        None
    }

    /// A queued write has found its end.
    pub(crate) fn settle(&self, key: &Key, version: Version) {
        let mut marks = self.marks();
        if marks.get(key).is_some_and(|mark| mark.straight(&self.clock) == version) {
            marks.remove(key);
            drop(marks);
            self.changed();
        }
    }

    /// What was stamped by a clock that was wrong has been put right in the file, too.
    pub(crate) fn straighten(&self) {
        if self.clock.moved().is_none() {
            return;
        }
        let mut is_change = false;
        for mark in self.marks().values_mut().filter(|mark| mark.is_unsure) {
            *mark = Mark { version: mark.straight(&self.clock), is_unsure: false, ..*mark };
            is_change = true;
        }
        if is_change {
            self.changed();
        }
    }

    /// A queued write got another version.
    pub(crate) fn restamp(&self, key: &Key, from: Version, to: Version) {
        let mut marks = self.marks();
        if let Some(mark) = marks.get_mut(key).filter(|mark| mark.straight(&self.clock) == from) {
            *mark = Mark { version: to, is_unsure: false, ..*mark };
            drop(marks);
            self.changed();
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.marks().len()
    }

    /// How long the oldest one has been waiting.
    pub(crate) fn oldest(&self) -> Option<Duration> {
        let oldest = self.marks().values().map(|mark| mark.queued_at).min()?;
        Some(self.clock.now().since(oldest))
    }

    /// How many of them replay has parked.
    pub(crate) fn parked(&self) -> usize {
        self.parked.load(Relaxed)
    }

    pub(crate) fn set_parked(&self, parked: usize) {
        self.parked.store(parked, Relaxed);
    }

    /// Tells of changes.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Waits until it is so; looks again with every change.
    pub(crate) async fn wait_until(&self, is_so: impl Fn(&Self) -> bool) {
        let mut changes = self.watch();
        while !is_so(self) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    fn passing(&self) -> MutexGuard<'_, Vec<(Key, Version)>> {
        self.passing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_a_wrong_clock_stamped_is_compared_as_a_right_one_would_have_stamped_it() {
        let clock = Arc::new(Clock::skewed(300_000));
        let pending = Pending::new(Vec::new(), Arc::clone(&clock));
        let key = Key::new("k").unwrap();
        let stamped = clock.stamp().version;
        assert!(pending.insert(&key, stamped, true, clock.now()));
        let now = Instant::now();
        clock.correct(now, now, Clock::new().now());
        let straight = pending.current(&key).unwrap();
        assert!(
            straight < stamped
                && pending.covers(key.as_str(), stamped)
                && pending.covers(key.as_str(), straight)
        );
        // Versions of one millisecond are in no order.
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(pending.meet(&key, clock.stamp().version), None, "what comes later is newer");
        assert_eq!(pending.current(&key), None);
        pending.straighten();
        pending.settle(&key, straight);
        assert!(!pending.contains(&key));
    }
}
