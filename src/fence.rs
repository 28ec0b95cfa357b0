//! Fences: what was learnt while a call was under way, so that its older result can be told.
//!
//! Whatever may bring news of a thread (a load, a write, a page of a listing) takes a [`Ticket`] before it asks the
//! source of truth. Whoever learns a version raises the floor of its key. A result below a floor raised after its ticket
//! was taken has been overtaken: it is not stored and not returned. Floors live beside memory, not in it, because memory
//! may evict what it learnt; they are dropped with the last ticket that could need them.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::record::Key;
use crate::version::Version;

/// All floors and tickets of one cache.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fences(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Numbers tickets and raises in the order they came.
    next: u64,
    running: BTreeSet<u64>,
    floors: HashMap<Key, Floor>,
    /// The raises, oldest first, to know which floors are needed no more.
    raises: VecDeque<(u64, Key)>,
}

#[derive(Debug, Clone, Copy)]
struct Floor {
    version: Version,
    /// The part of it that the source of truth was seen to hold.
    seen: Version,
    raised: u64,
}

/// A call that may bring news is under way, until this is dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    fences: Fences,
    number: u64,
}

impl Fences {
    pub(crate) fn begin(&self) -> Ticket {
        let mut state = self.state();
        let number = state.number();
        state.running.insert(number);
        Ticket { fences: self.clone(), number }
    }

    /// From now on, results of running calls that are older than this are overtaken.
    pub(crate) fn raise(&self, key: &Key, version: Version) {
        self.raise_both(key, version, Version::NONE);
    }

    /// As [`raise`](Self::raise), to a version that the source of truth was seen to hold.
    pub(crate) fn raise_seen(&self, key: &Key, version: Version) {
        self.raise_both(key, version, version);
    }

    fn raise_both(&self, key: &Key, version: Version, seen: Version) {
        let mut state = self.state();
        if state.running.is_empty() {
            return;
        }
        let raised = state.number();
        let before = state.floors.get(key).copied();
        let before = before.unwrap_or(Floor { version, seen, raised });
        let floor = Floor { version: before.version.max(version), seen: before.seen.max(seen), raised };
        state.floors.insert(key.clone(), floor);
        state.raises.push_back((raised, key.clone()));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Drops the floors that were raised before every running ticket was taken.
    fn tidy(&mut self) {
        let oldest = self.running.first().copied().unwrap_or(u64::MAX);
        while self.raises.front().is_some_and(|(number, _)| *number < oldest) {
            let Some((number, key)) = self.raises.pop_front() else { return };
            if self.floors.get(&key).is_some_and(|floor| floor.raised == number) {
                self.floors.remove(&key);
            }
        }
    }
}

impl Ticket {
    /// The version below which a result of this call is overtaken, if any was learnt since it began.
    pub(crate) fn floor(&self, key: &Key) -> Option<Version> {
        let floor = self.fences.state().floors.get(key).copied();
        floor.filter(|floor| floor.raised > self.number).map(|floor| floor.version)
    }

    /// Whether a result of this call at this version is overtaken.
    pub(crate) fn is_overtaken(&self, key: &Key, version: Version) -> bool {
        self.floor(key).is_some_and(|floor| version < floor)
    }

    /// What the source of truth was seen to hold since this call began, if anything.
    pub(crate) fn seen(&self, key: &Key) -> Option<Version> {
        let floor = self.fences.state().floors.get(key).copied();
        floor.filter(|floor| floor.raised > self.number).map(|floor| floor.seen)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.fences.state();
        state.running.remove(&self.number);
        state.tidy();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_holds_for_calls_that_began_before_it_and_goes_with_them() {
        let (fences, key) = (Fences::default(), Key::new("k").unwrap());
        let version = Version::from_raw;
        fences.raise(&key, version(1));
        let early = fences.begin();
        assert_eq!(early.floor(&key), None, "raised before the call began");
        fences.raise(&key, version(7));
        fences.raise(&key, version(5));
        let late = fences.begin();
        assert_eq!((early.floor(&key), late.floor(&key)), (Some(version(7)), None));
        drop(early);
        assert!(fences.state().floors.is_empty() && fences.state().raises.is_empty());
        fences.raise(&key, version(9));
        assert_eq!(late.floor(&key), Some(version(9)));
        drop(late);
        assert!(fences.state().floors.is_empty());
    }
}
