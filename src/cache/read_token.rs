//! Read tokens and version floors: they keep stale results of slow calls out of memory.
//!
//! Why not lock the key during a load? A load takes a round trip, and a lock would block all other calls of
//! the conversation. Memcache has the same race, and solves it with a lease (Nishtala et al., "Scaling
//! Memcache at Facebook", 2013). The floor of a key is such a lease for versions.
//!
//! * Every load, write and list call takes a [`ReadToken`] before it contacts the store (I2).
//! * An observed version raises the floor of its key.
//! * A result below a floor that was raised after the token was taken is stale. The caller discards it.
//!
//! Floors live beside memory, because memory may evict the entry that raised them. A floor is dropped with
//! the last token that is older than it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::key::Key;
use crate::model::version::Version;

/// The floors and tokens of one cache.
#[derive(Debug, Clone, Default)]
pub(crate) struct VersionFloors(Arc<Mutex<FloorState>>);

#[derive(Debug, Default)]
struct FloorState {
    /// The number of the last token or raise. Numbers order both in time.
    last_number: u64,
    live_tokens: BTreeSet<u64>,
    floors: HashMap<Key, Floor>,
    /// All raises, oldest first. `prune` reads which floors no token needs.
    raise_log: VecDeque<(u64, Key)>,
}

#[derive(Debug, Clone, Copy)]
struct Floor {
    version: Version,
    /// The highest version that the store was confirmed to hold. `version` may come from a write of unknown
    /// outcome.
    confirmed: Version,
    raised_at: u64,
}

/// The token of one running call. The drop ends the call.
#[derive(Debug)]
pub(crate) struct ReadToken {
    floors: VersionFloors,
    number: u64,
}

impl VersionFloors {
    /// Takes a token. The caller does so before it contacts the store (I2).
    pub(crate) fn token(&self) -> ReadToken {
        let mut state = self.state();
        // One lock covers number and registration, so no raise falls between them.
        let number = state.next_number();
        state.live_tokens.insert(number);
        ReadToken { floors: self.clone(), number }
    }

    /// Raises the floor of a key to a version that the store may hold.
    pub(crate) fn raise(&self, key: &Key, version: Version) {
        self.raise_to(key, version, Version::NONE);
    }

    /// Raises the floor of a key to a version that the store was seen to hold.
    pub(crate) fn raise_confirmed(&self, key: &Key, version: Version) {
        self.raise_to(key, version, version);
    }

    fn raise_to(&self, key: &Key, version: Version, confirmed: Version) {
        let mut state = self.state();
        // Without a running call, no result can become stale. So idle keys cost no memory.
        if state.live_tokens.is_empty() {
            return;
        }
        let raised_at = state.next_number();
        // A floor never falls, and `raised_at` is the time of the last raise.
        let before = state.floors.get(key).copied();
        let before = before.unwrap_or(Floor { version, confirmed, raised_at });
        let floor = Floor {
            version: before.version.max(version),
            confirmed: before.confirmed.max(confirmed),
            raised_at,
        };
        state.floors.insert(key.clone(), floor);
        state.raise_log.push_back((raised_at, key.clone()));
    }

    fn state(&self) -> MutexGuard<'_, FloorState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FloorState {
    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    /// Drops the floors that were raised before every live token was taken.
    fn prune(&mut self) {
        let oldest = self.live_tokens.first().copied().unwrap_or(u64::MAX);
        while self.raise_log.front().is_some_and(|(number, _)| *number < oldest) {
            let Some((number, key)) = self.raise_log.pop_front() else { return };
            // Only the last raise of a key drops its floor, because a live token may be older than that raise.
            if self.floors.get(&key).is_some_and(|floor| floor.raised_at == number) {
                self.floors.remove(&key);
            }
        }
    }
}

impl ReadToken {
    /// Returns the floor of a key, if it was raised after this token was taken.
    pub(crate) fn floor(&self, key: &Key) -> Option<Version> {
        // An older floor does not count: a deletion or a restored database may lower the stored version.
        let floor = self.floors.state().floors.get(key).copied();
        floor.filter(|floor| floor.raised_at > self.number).map(|floor| floor.version)
    }

    /// Returns true if a result at this version is stale (I2).
    pub(crate) fn is_superseded(&self, key: &Key, version: Version) -> bool {
        self.floor(key).is_some_and(|floor| version < floor)
    }

    /// Returns the version that the store was seen to hold after this token was taken.
    pub(crate) fn confirmed(&self, key: &Key) -> Option<Version> {
        let floor = self.floors.state().floors.get(key).copied();
        floor.filter(|floor| floor.raised_at > self.number).map(|floor| floor.confirmed)
    }
}

impl Drop for ReadToken {
    fn drop(&mut self) {
        let mut state = self.floors.state();
        // The token leaves first, so that the prune drops the floors of which it was the last reader.
        state.live_tokens.remove(&self.number);
        state.prune();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floor_applies_to_older_tokens_and_ends_with_them() {
        let (floors, key) = (VersionFloors::default(), Key::new("k").unwrap());
        let version = Version::from_raw;
        floors.raise(&key, version(1));
        let early = floors.token();
        assert_eq!(early.floor(&key), None, "this floor was raised before the token was taken");
        floors.raise(&key, version(7));
        floors.raise(&key, version(5));
        let late = floors.token();
        assert_eq!((early.floor(&key), late.floor(&key)), (Some(version(7)), None));
        drop(early);
        assert!(floors.state().floors.is_empty() && floors.state().raise_log.is_empty());
        floors.raise(&key, version(9));
        assert_eq!(late.floor(&key), Some(version(9)));
        drop(late);
        assert!(floors.state().floors.is_empty());
    }
}
