//! The queue index: the queued writes by key, in memory. A read learns from the index, without I/O, whether its conversation has
//! a queued write.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::model::clock::{Clock, UnsyncedPeriod};
use crate::model::key::Key;
use crate::model::version::{Timestamp, Version};
use crate::outage::IndexEntry;

type MarksByKey = HashMap<Key, QueuedMark, foldhash::fast::RandomState>;
type DirectWrites = HashSet<(Key, Version), foldhash::fast::RandomState>;

/// The marks of all queued writes. A mark changes only under memory's lock of its key, together with the entry in memory (I5).
#[derive(Debug)]
pub(crate) struct QueueIndex {
    /// Locked by each read of a queued write from memory, for one lookup.
    marks: Mutex<QueuedMarks>,
    /// Writes that bypass the queue, and whose end the outage file does not know yet.
    direct_writes: Mutex<DirectWrites>,
    /// The number of parked writes, as replay last reported it.
    parked: AtomicUsize,
    clock: Arc<Clock>,
    /// The number of changes. Each change wakes replay and the callers that wait for the queue.
    changes: watch::Sender<u64>,
}

/// Registers a write that bypasses the queue, until the guard is dropped.
#[derive(Debug)]
pub(crate) struct DirectWriteGuard {
    queue_index: Arc<QueueIndex>,
    write: (Key, Version),
}

impl Drop for DirectWriteGuard {
    fn drop(&mut self) {
        self.queue_index.direct_writes().remove(&self.write);
    }
}

/// The marks by key, and the number of marks by queueing time. The second map finds the oldest mark without a scan.
#[derive(Debug, Default)]
struct QueuedMarks {
    by_key: MarksByKey,
    ages: BTreeMap<Timestamp, usize>,
}

impl QueuedMarks {
    fn get(&self, key: &str) -> Option<&QueuedMark> {
        self.by_key.get(key)
    }

    /// Replaces the mark of a key.
    fn insert(&mut self, key: Key, mark: QueuedMark) {
        *self.ages.entry(mark.queued_at).or_default() += 1;
        if let Some(replaced) = self.by_key.insert(key, mark) {
            self.remove_age(&replaced);
        }
    }

    fn remove(&mut self, key: &Key) {
        if let Some(removed) = self.by_key.remove(key) {
            self.remove_age(&removed);
        }
    }

    /// Corrects all marks and their queueing times. Returns whether any changed.
    fn apply_clock_correction(&mut self, clock: &Clock) -> bool {
        let (mut is_change, mut ages) = (false, BTreeMap::<Timestamp, usize>::new());
        for mark in self.by_key.values_mut() {
            let corrected = mark.clock_corrected(clock);
            is_change |= corrected.unsynced != mark.unsynced;
            *mark = corrected;
            *ages.entry(mark.queued_at).or_default() += 1;
        }
        self.ages = ages;
        is_change
    }

    fn remove_age(&mut self, mark: &QueuedMark) {
        if let Entry::Occupied(mut count) = self.ages.entry(mark.queued_at) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct QueuedMark {
    /// The version as it was issued.
    version: Version,
    /// The unsynced period in which the version was issued.
    unsynced: Option<UnsyncedPeriod>,
    /// Whether the store holds this version or a newer one. Replay sends the write, and reads skip it (I16).
    is_superseded: bool,
    /// Whether the store may hold a newer version. Reads skip the write until the store has shown an older one.
    is_unverified: bool,
    queued_at: Timestamp,
}

impl QueuedMark {
    fn new(version: Version, unsynced: Option<UnsyncedPeriod>, queued_at: Timestamp) -> Self {
        Self { version, unsynced, is_superseded: false, is_unverified: false, queued_at }
    }

    fn is_newest(&self) -> bool {
        !self.is_superseded && !self.is_unverified
    }

    /// Returns the version that a correct clock would have issued, as far as is known.
    fn corrected(&self, clock: &Clock) -> Version {
        let moved = self.unsynced.and_then(|unsynced| clock.moved(unsynced));
        self.version.clock_corrected(moved.unwrap_or(0), self.queued_at)
    }

    /// Returns the mark with final version and time, if its unsynced period has ended.
    fn clock_corrected(self, clock: &Clock) -> Self {
        let moved = self.unsynced.and_then(|unsynced| clock.exact_correction_ms(unsynced));
        let Some(moved) = moved else { return self };
        let queued_at = Timestamp(self.queued_at.0.saturating_add(moved));
        // The version is corrected by the old queueing time, which the issuing clock showed.
        Self { version: self.corrected(clock), unsynced: None, queued_at, ..self }
    }
}

impl QueueIndex {
    pub(crate) fn new(entries: Vec<IndexEntry>, clock: Arc<Clock>) -> Self {
        let mut marks = QueuedMarks::default();
        for IndexEntry { key, version, unsynced, queued_at, is_superseded, is_unverified } in entries {
            // The versions of this process must be above the queued ones.
            clock.observe(version);
            let mark = QueuedMark::new(version, unsynced, queued_at);
            marks.insert(key, QueuedMark { is_superseded, is_unverified, ..mark });
        }
        let (marks, direct_writes) = (Mutex::new(marks), Mutex::default());
        Self { marks, direct_writes, parked: AtomicUsize::new(0), clock, changes: watch::Sender::new(0) }
    }

    /// Returns the version of the queued write, if no newer version of the conversation is known.
    pub(crate) fn newest(&self, key: &Key) -> Option<Version> {
        let marks = self.marks();
        let mark = marks.get(key.as_str()).filter(|mark| mark.is_newest())?;
        Some(mark.corrected(&self.clock))
    }

    /// Whether [`newest`](Self::newest) is a write of this version, as issued or as corrected.
    pub(crate) fn is_newest_queued(&self, key: &str, version: Version) -> bool {
        let marks = self.marks();
        let mark = marks.get(key).filter(|mark| mark.is_newest());
        // An entry in memory keeps the issued version.
        mark.is_some_and(|mark| version == mark.version || version == mark.corrected(&self.clock))
    }

    /// Returns the version that a correct clock would have issued, as far as is known.
    pub(crate) fn corrected(
        &self,
        version: Version,
        unsynced: Option<UnsyncedPeriod>,
        queued_at: Timestamp,
    ) -> Version {
        QueuedMark::new(version, unsynced, queued_at).corrected(&self.clock)
    }

    /// Whether a write of the conversation is queued, even a superseded one.
    pub(crate) fn contains(&self, key: &Key) -> bool {
        self.marks().by_key.contains_key(key)
    }

    /// Registers a write that bypasses the queue, before it is sent. The caller holds the guard until the file has been updated.
    /// Meanwhile replay makes no dead letter of an older queued write that loses against it.
    pub(crate) fn begin_direct_write(self: &Arc<Self>, key: &Key, version: Version) -> DirectWriteGuard {
        // A handle issues each version once, so a set needs no counts.
        let write = (key.clone(), version);
        self.direct_writes().insert(write.clone());
        DirectWriteGuard { queue_index: Arc::clone(self), write }
    }

    /// Whether this is a registered write, whose end the file does not know yet.
    pub(crate) fn has_direct_write(&self, key: &Key, version: Version) -> bool {
        self.direct_writes().contains(&(key.clone(), version))
    }

    /// Marks a queued write. Returns false if a newer write of the conversation is marked.
    pub(crate) fn insert(
        &self,
        key: &Key,
        version: Version,
        unsynced: Option<UnsyncedPeriod>,
        queued_at: Timestamp,
    ) -> bool {
        let is_provisional = unsynced.is_some_and(|unsynced| self.clock.moved(unsynced).is_none());
        let mut marks = self.marks();
        let mark = QueuedMark::new(version, unsynced, queued_at);
        // A provisional write is newer than a write with a final version, whatever the numbers say.
        let is_comparable = |held: &&QueuedMark| held.unsynced == unsynced || !is_provisional;
        let is_newer = |held: &QueuedMark| held.corrected(&self.clock) > mark.corrected(&self.clock);
        if marks.get(key.as_str()).filter(is_comparable).is_some_and(is_newer) {
            return false;
        }
        marks.insert(key.clone(), mark);
        // Before the wake-up, so that a woken task does not wait for the lock.
        drop(marks);
        self.changed();
        true
    }

    /// Records that the store holds `version`. Returns the version of a newer queued write. An older one is superseded:
    /// reads skip it from now on (I16).
    pub(crate) fn observe_stored(&self, key: &Key, version: Version) -> Option<Version> {
        let mut marks = self.marks();
        let mark = marks.by_key.get_mut(key)?;
        let queued = mark.corrected(&self.clock);
        if !mark.is_superseded && queued > version {
            // The store holds an older version, so nothing has superseded the queued write.
            mark.is_unverified = false;
            return Some(queued);
        }
        // The mark stays, because replay must still send the write (I10).
        let is_change = !std::mem::replace(&mut mark.is_superseded, true);
        drop(marks);
        if is_change {
            self.changed();
        }
        None
    }

    /// Removes the mark of a completed write.
    pub(crate) fn remove(&self, key: &Key, version: Version) {
        let mut marks = self.marks();
        // A newer write may have replaced the completed one. Its mark stays.
        if marks.get(key.as_str()).is_some_and(|mark| mark.corrected(&self.clock) == version) {
            marks.remove(key);
            drop(marks);
            self.changed();
        }
    }

    /// Corrects the marks after clock sync has corrected the file.
    pub(crate) fn apply_clock_correction(&self) {
        let is_change = self.marks().apply_clock_correction(&self.clock);
        if is_change {
            self.changed();
        }
    }

    /// Changes the version of a mark, as the file did.
    pub(crate) fn assign_version(&self, key: &Key, from: Version, to: Version) {
        let mut marks = self.marks();
        if let Some(mark) = marks.by_key.get_mut(key).filter(|mark| mark.corrected(&self.clock) == from) {
            *mark = QueuedMark { version: to, unsynced: None, ..*mark };
            drop(marks);
            self.changed();
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.marks().by_key.len()
    }

    /// Returns the age of the oldest queued write.
    pub(crate) fn oldest(&self) -> Option<Duration> {
        let oldest = *self.marks().ages.first_key_value()?.0;
        Some(self.clock.now().since(oldest))
    }

    /// Returns the number of parked writes.
    pub(crate) fn parked(&self) -> usize {
        self.parked.load(Relaxed)
    }

    pub(crate) fn set_parked(&self, parked: usize) {
        self.parked.store(parked, Relaxed);
    }

    /// Returns a receiver that wakes with every change.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Waits until `is_met` returns true. Checks after every change.
    pub(crate) async fn wait_until(&self, is_met: impl Fn(&Self) -> bool) {
        // Subscribed before the check, so that no change in between is missed.
        let mut changes = self.watch();
        while !is_met(self) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    fn direct_writes(&self) -> MutexGuard<'_, DirectWrites> {
        self.direct_writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn marks(&self) -> MutexGuard<'_, QueuedMarks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn queue_index() -> Arc<QueueIndex> {
        Arc::new(QueueIndex::new(Vec::new(), Arc::new(Clock::new())))
    }

    fn key(of: usize) -> Key {
        Key::new(format!("k{of}")).unwrap()
    }

    #[test]
    fn direct_writes_many_take_linear_time() {
        const MANY: usize = 200_000;
        let queue_index = queue_index();
        let version = |of: usize| Version::from_raw(i64::try_from(of).unwrap());
        let start = Instant::now();
        let guards: Vec<DirectWriteGuard> =
            (0..MANY).map(|of| queue_index.begin_direct_write(&key(of), version(of))).collect();
        assert!((0..MANY).all(|of| queue_index.has_direct_write(&key(of), version(of))));
        drop(guards);
        assert!((0..MANY).all(|of| !queue_index.has_direct_write(&key(of), version(of))));
        // Scans would take 40 billion steps.
        assert!(start.elapsed() < Duration::from_secs(20), "took {:?}", start.elapsed());
    }

    #[test]
    fn oldest_many_marks_needs_no_scan() {
        const MANY: usize = 100_000;
        let queue_index = queue_index();
        let (clock, now) = (Clock::new(), Clock::new().now());
        let queued_at = |of: usize| now.minus(Duration::from_millis(u64::try_from(of).unwrap()));
        let versions: Vec<Version> = (0..MANY).map(|_| clock.issue().version).collect();
        for (of, version) in versions.iter().enumerate() {
            assert!(queue_index.insert(&key(of), *version, None, queued_at(of)));
        }
        let start = Instant::now();
        for (of, version) in versions.iter().enumerate().rev() {
            assert!(queue_index.oldest().unwrap() >= Duration::from_millis(u64::try_from(of).unwrap()));
            queue_index.remove(&key(of), *version);
        }
        assert_eq!((queue_index.oldest(), queue_index.marks().ages.len()), (None, 0));
        // Scans would take 5 billion steps.
        assert!(start.elapsed() < Duration::from_secs(20), "took {:?}", start.elapsed());
    }

    #[test]
    fn insert_provisional_write_is_compared_as_corrected() {
        let clock = Arc::new(Clock::skewed(300_000));
        let queue_index = QueueIndex::new(Vec::new(), Arc::clone(&clock));
        let key = Key::new("k").unwrap();
        let issued = clock.issue().version;
        assert!(queue_index.insert(&key, issued, clock.unsynced(), clock.now()));
        let now = Instant::now();
        clock.correct(now, now, Clock::new().now());
        let corrected = queue_index.newest(&key).unwrap();
        assert!(
            corrected < issued
                && queue_index.is_newest_queued(key.as_str(), issued)
                && queue_index.is_newest_queued(key.as_str(), corrected)
        );
        // Two clocks issue versions of one millisecond in no order.
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(queue_index.observe_stored(&key, clock.issue().version), None, "a later version is newer");
        assert_eq!(queue_index.newest(&key), None);
        queue_index.apply_clock_correction();
        queue_index.remove(&key, corrected);
        assert!(!queue_index.contains(&key) && queue_index.oldest().is_none(), "an empty index has no age");
    }
}
