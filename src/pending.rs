//! Which threads have a write in the queue: an index in memory, so that a read knows without asking the disk.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::record::Key;
use crate::spool::Waiting;
use crate::version::{Blindness, Clock, Timestamp, Version};

type ByKey = HashMap<Key, Mark, foldhash::fast::RandomState>;
type UnderWay = HashSet<(Key, Version), foldhash::fast::RandomState>;

/// The marks of all queued writes. They change under the near cache's lock of the key, together with what that holds.
#[derive(Debug)]
pub(crate) struct Pending {
    /// Asked by each read of a queued write from memory.
    marks: Mutex<Marks>,
    /// Writes that are on their way into the source of truth, past the queue.
    passing: Mutex<UnderWay>,
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
    write: (Key, Version),
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.pending.passing().remove(&self.write);
    }
}

/// The marks by key, and how many of them were queued at which moment, so that the oldest is known without a scan.
#[derive(Debug, Default)]
struct Marks {
    by_key: ByKey,
    ages: BTreeMap<Timestamp, usize>,
}

impl Marks {
    fn get(&self, key: &str) -> Option<&Mark> {
        self.by_key.get(key)
    }

    /// Puts a mark in the place of the one that the key has.
    fn insert(&mut self, key: Key, mark: Mark) {
        *self.ages.entry(mark.queued_at).or_default() += 1;
        let replaced = self.by_key.insert(key, mark);
        replaced.iter().for_each(|replaced| self.forget_age(replaced));
    }

    fn remove(&mut self, key: &Key) {
        let removed = self.by_key.remove(key);
        removed.iter().for_each(|removed| self.forget_age(removed));
    }

    /// Puts all marks right, and their ages with them; says whether any changed.
    fn straighten(&mut self, clock: &Clock) -> bool {
        let (mut is_change, mut ages) = (false, BTreeMap::<Timestamp, usize>::new());
        for mark in self.by_key.values_mut() {
            let straight = mark.straightened(clock);
            is_change |= straight.blindness != mark.blindness;
            *mark = straight;
            *ages.entry(mark.queued_at).or_default() += 1;
        }
        self.ages = ages;
        is_change
    }

    fn forget_age(&mut self, mark: &Mark) {
        if let Entry::Occupied(mut count) = self.ages.entry(mark.queued_at) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Mark {
    /// As it was stamped.
    version: Version,
    /// Stamped by a blind clock.
    blindness: Option<Blindness>,
    /// The source of truth holds this or something newer: it is read no more, only replayed.
    is_overtaken: bool,
    /// Not read before the source of truth has been seen to hold nothing newer.
    is_doubtful: bool,
    queued_at: Timestamp,
}

impl Mark {
    fn new(version: Version, blindness: Option<Blindness>, queued_at: Timestamp) -> Self {
        Self { version, blindness, is_overtaken: false, is_doubtful: false, queued_at }
    }

    fn is_newest(&self) -> bool {
        !self.is_overtaken && !self.is_doubtful
    }

    /// The version that it would have got from a clock that was right.
    fn straight(&self, clock: &Clock) -> Version {
        let moved = self.blindness.and_then(|blindness| clock.moved(blindness));
        self.version.straightened(moved.unwrap_or(0), self.queued_at)
    }

    /// As it would be if the clock had been right, once that is known.
    fn straightened(self, clock: &Clock) -> Self {
        let moved = self.blindness.and_then(|blindness| clock.moved_exactly(blindness));
        let Some(moved) = moved else { return self };
        let queued_at = Timestamp(self.queued_at.0.saturating_add(moved));
        Self { version: self.straight(clock), blindness: None, queued_at, ..self }
    }
}

impl Pending {
    pub(crate) fn new(waiting: Vec<Waiting>, clock: Arc<Clock>) -> Self {
        let mut marks = Marks::default();
        for Waiting { key, version, blindness, queued_at, is_overtaken, is_doubtful } in waiting {
            clock.observe(version);
            let mark = Mark::new(version, blindness, queued_at);
            marks.insert(key, Mark { is_overtaken, is_doubtful, ..mark });
        }
        let (marks, passing) = (Mutex::new(marks), Mutex::default());
        Self { marks, passing, parked: AtomicUsize::new(0), clock, changes: watch::Sender::new(0) }
    }

    /// The version of the queued write that is the newest of its thread, as far as is known.
    pub(crate) fn current(&self, key: &Key) -> Option<Version> {
        let marks = self.marks();
        let mark = marks.get(key.as_str()).filter(|mark| mark.is_newest())?;
        Some(mark.straight(&self.clock))
    }

    /// Whether a write of this version, as stamped or put right, is the one that [`current`](Self::current) speaks of.
    pub(crate) fn covers(&self, key: &str, version: Version) -> bool {
        let marks = self.marks();
        let mark = marks.get(key).filter(|mark| mark.is_newest());
        mark.is_some_and(|mark| version == mark.version || version == mark.straight(&self.clock))
    }

    /// The version that a clock would have given that was right, as far as is known.
    pub(crate) fn straight(
        &self,
        version: Version,
        blindness: Option<Blindness>,
        queued_at: Timestamp,
    ) -> Version {
        Mark::new(version, blindness, queued_at).straight(&self.clock)
    }

    /// Whether a write of this thread waits, also one that is overtaken.
    pub(crate) fn contains(&self, key: &Key) -> bool {
        self.marks().by_key.contains_key(key)
    }

    /// To be called before a write is sent past the queue, in which an older one of its thread may wait, and to be kept
    /// until the file knows what became of it.
    pub(crate) fn passing_by(self: &Arc<Self>, key: &Key, version: Version) -> Passing {
        // A handle gives no version twice, so a set does.
        let write = (key.clone(), version);
        self.passing().insert(write.clone());
        Passing { pending: Arc::clone(self), write }
    }

    /// Whether this is a write of this handle of which the file does not know yet what became of it.
    pub(crate) fn passes(&self, key: &Key, version: Version) -> bool {
        self.passing().contains(&(key.clone(), version))
    }

    /// Marks a write, unless a newer one is marked.
    pub(crate) fn insert(
        &self,
        key: &Key,
        version: Version,
        blindness: Option<Blindness>,
        queued_at: Timestamp,
    ) -> bool {
        let is_blind = blindness.is_some_and(|blindness| self.clock.moved(blindness).is_none());
        let mut marks = self.marks();
        let mark = Mark::new(version, blindness, queued_at);
        // What such a clock stamps now is newer than what was stamped by one that was right.
        let is_comparable = |held: &&Mark| held.blindness == blindness || !is_blind;
        let is_newer = |held: &Mark| held.straight(&self.clock) > mark.straight(&self.clock);
        if marks.get(key.as_str()).filter(is_comparable).is_some_and(is_newer) {
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
        let mark = marks.by_key.get_mut(key)?;
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
        if marks.get(key.as_str()).is_some_and(|mark| mark.straight(&self.clock) == version) {
            marks.remove(key);
            drop(marks);
            self.changed();
        }
    }

    /// What was stamped by a clock that was wrong has been put right in the file, too.
    pub(crate) fn straighten(&self) {
        let is_change = self.marks().straighten(&self.clock);
        if is_change {
            self.changed();
        }
    }

    /// A queued write got another version.
    pub(crate) fn restamp(&self, key: &Key, from: Version, to: Version) {
        let mut marks = self.marks();
        if let Some(mark) = marks.by_key.get_mut(key).filter(|mark| mark.straight(&self.clock) == from) {
            *mark = Mark { version: to, blindness: None, ..*mark };
            drop(marks);
            self.changed();
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.marks().by_key.len()
    }

    /// How long the oldest one has been waiting.
    pub(crate) fn oldest(&self) -> Option<Duration> {
        let oldest = *self.marks().ages.first_key_value()?.0;
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

    fn passing(&self) -> MutexGuard<'_, UnderWay> {
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

    fn pending() -> Arc<Pending> {
        Arc::new(Pending::new(Vec::new(), Arc::new(Clock::new())))
    }

    fn key(of: usize) -> Key {
        Key::new(format!("k{of}")).unwrap()
    }

    #[test]
    fn many_writes_under_way_are_noted_in_linear_time() {
        const MANY: usize = 200_000;
        let pending = pending();
        let version = |of: usize| Version::from_raw(i64::try_from(of).unwrap());
        let began = Instant::now();
        let all: Vec<Passing> = (0..MANY).map(|of| pending.passing_by(&key(of), version(of))).collect();
        assert!((0..MANY).all(|of| pending.passes(&key(of), version(of))));
        drop(all);
        assert!((0..MANY).all(|of| !pending.passes(&key(of), version(of))));
        // A scan for each of them would take 40 thousand million steps.
        assert!(began.elapsed() < Duration::from_secs(20), "took {:?}", began.elapsed());
    }

    #[test]
    fn the_oldest_mark_is_known_without_a_scan() {
        const MANY: usize = 100_000;
        let pending = pending();
        let (clock, now) = (Clock::new(), Clock::new().now());
        let queued_at = |of: usize| now.minus(Duration::from_millis(u64::try_from(of).unwrap()));
        let versions: Vec<Version> = (0..MANY).map(|_| clock.stamp().version).collect();
        for (of, version) in versions.iter().enumerate() {
            assert!(pending.insert(&key(of), *version, None, queued_at(of)));
        }
        let began = Instant::now();
        for (of, version) in versions.iter().enumerate().rev() {
            assert!(pending.oldest().unwrap() >= Duration::from_millis(u64::try_from(of).unwrap()));
            pending.settle(&key(of), *version);
        }
        assert_eq!((pending.oldest(), pending.marks().ages.len()), (None, 0));
        // A scan of all marks for each look would take 5 thousand million steps.
        assert!(began.elapsed() < Duration::from_secs(20), "took {:?}", began.elapsed());
    }

    #[test]
    fn what_a_wrong_clock_stamped_is_compared_as_a_right_one_would_have_stamped_it() {
        let clock = Arc::new(Clock::skewed(300_000));
        let pending = Pending::new(Vec::new(), Arc::clone(&clock));
        let key = Key::new("k").unwrap();
        let stamped = clock.stamp().version;
        assert!(pending.insert(&key, stamped, clock.blindness(), clock.now()));
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
        assert!(!pending.contains(&key) && pending.oldest().is_none(), "an empty queue has no age");
    }
}
