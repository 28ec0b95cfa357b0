//! Active keys: the conversations with a queued write or a version floor, and the read tokens of running calls.
//!
//! Why not lock the key during a load? A load takes a round trip, and a lock would block all other calls of the conversation.
//! Memcache has the same race, and solves it with a lease (Nishtala et al., "Scaling Memcache at Facebook", 2013). The floor of
//! a key is such a lease for versions.
//!
//! * Every load, write and list call takes a [`ReadToken`] before it contacts the store (I2).
//! * An observed version raises the floor of its key.
//! * A result below a floor that rose after the token was taken is stale.
//!
//! This knowledge stands beside memory, because moka may evict an entry at any time. A floor is dropped with the last token
//! that is older than it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

use super::key_state::{Floor, Queued};
use crate::model::key::Key;
use crate::model::version::Version;

/// The active keys of one cache.
#[derive(Debug, Clone, Default)]
pub(super) struct ActiveKeys(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    keys: HashMap<Key, Active, foldhash::fast::RandomState>,
    /// The number of the last token or raise. Numbers order both in time.
    last_number: u64,
    live_tokens: BTreeSet<u64>,
    /// Calls with a token below this number began before the store was restored. All their results are stale.
    restored_at: u64,
    /// All raises, oldest first. `prune` reads which floors no token needs.
    raise_log: VecDeque<(u64, Key)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Active {
    queued: Queued,
    floor: Floor,
    /// The number of the last raise, or zero without a floor.
    raised_at: u64,
}

/// The token of one running call. The drop ends the call.
#[derive(Debug)]
pub(super) struct ReadToken {
    keys: ActiveKeys,
    number: u64,
}

impl ActiveKeys {
    /// Takes a token. The caller does so before it contacts the store (I2).
    pub(super) fn token(&self) -> ReadToken {
        let mut state = self.0.lock();
        // One lock covers number and registration, so no raise falls between them.
        let number = state.next_number();
        state.live_tokens.insert(number);
        ReadToken { keys: self.clone(), number }
    }

    pub(super) fn queued(&self, key: &Key) -> Queued {
        self.0.lock().keys.get(key).map_or(Queued::Nothing, |active| active.queued)
    }

    /// Returns true if the outage file has queued writes of the conversation.
    pub(super) fn is_queued(&self, key: &Key) -> bool {
        self.queued(key) != Queued::Nothing
    }

    /// Changes a key. `change` gets the queued write, and the floor that rose since `token` was taken. It returns the new
    /// queued write, the raise, and a result.
    pub(super) fn change<T>(
        &self,
        key: &Key,
        token: Option<&ReadToken>,
        change: impl FnOnce(Queued, Floor) -> (Queued, Option<Floor>, T),
    ) -> T {
        let mut state = self.0.lock();
        let before = state.keys.get(key).copied().unwrap_or_default();
        let (queued, raised, result) = change(before.queued, state.floor_for(before, token));
        let mut after = Active { queued, ..before };
        // Without a running call, no result can become stale. So idle keys cost no memory.
        if let Some(raised) = raised.filter(|_| !state.live_tokens.is_empty()) {
            (after.floor, after.raised_at) = (before.floor.max(raised), state.next_number());
            state.raise_log.push_back((after.raised_at, key.clone()));
        }
        state.set(key, after);
        result
    }

    /// Makes the results of all running calls stale.
    pub(super) fn expire_tokens(&self) {
        let mut state = self.0.lock();
        state.restored_at = state.next_number();
    }
}

impl State {
    /// Returns the floor for a call. An older floor does not count: a deletion or a restored database may lower the stored
    /// version.
    fn floor_for(&self, active: Active, token: Option<&ReadToken>) -> Floor {
        let began = token.map_or(u64::MAX, |token| token.number);
        if began < self.restored_at {
            // No result of the store before is current, and none of them tells of a newer write.
            Floor { possible: Version::from_raw(i64::MAX), confirmed: Version::NONE }
        } else if began < active.raised_at {
            active.floor
        } else {
            Floor::default()
        }
    }

    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    fn set(&mut self, key: &Key, active: Active) {
        if active.queued == Queued::Nothing && active.raised_at == 0 {
            self.keys.remove(key);
        } else if let Some(held) = self.keys.get_mut(key) {
            *held = active;
        } else {
            self.keys.insert(key.clone(), active);
        }
    }

    /// Drops the floors that rose before every live token was taken.
    fn prune(&mut self) {
        let oldest = self.live_tokens.first().copied().unwrap_or(u64::MAX);
        while self.raise_log.front().is_some_and(|(number, _)| *number < oldest) {
            let Some((number, key)) = self.raise_log.pop_front() else { return };
            // Only the last raise of a key drops its floor, because a live token may be older than that raise.
            if let Some(active) = self.keys.get(&key).copied().filter(|active| active.raised_at == number) {
                self.set(&key, Active { queued: active.queued, ..Active::default() });
            }
        }
    }
}

impl ReadToken {
    /// Whether the store was restored after this token was taken.
    pub(super) fn is_expired(&self) -> bool {
        self.number < self.keys.0.lock().restored_at
    }

    /// Returns the floor of a key, if it rose after this token was taken.
    pub(super) fn floor(&self, key: &Key) -> Floor {
        let state = self.keys.0.lock();
        state.floor_for(state.keys.get(key).copied().unwrap_or_default(), Some(self))
    }
}

impl Drop for ReadToken {
    fn drop(&mut self) {
        let mut state = self.keys.0.lock();
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
        let (keys, key) = (ActiveKeys::default(), Key::new("k").unwrap());
        let floor = |raw| Floor { possible: Version::from_raw(raw), confirmed: Version::NONE };
        let raise = |raw| keys.change(&key, None, |queued, _| (queued, Some(floor(raw)), ()));
        raise(1);
        let early = keys.token();
        assert_eq!(early.floor(&key), Floor::default(), "this floor rose before the token was taken");
        raise(7);
        raise(5);
        let late = keys.token();
        assert_eq!((early.floor(&key), late.floor(&key)), (floor(7), Floor::default()));
        drop(early);
        assert!(keys.0.lock().keys.is_empty() && keys.0.lock().raise_log.is_empty());
        raise(9);
        assert_eq!(late.floor(&key), floor(9));
        drop(late);
        assert!(keys.0.lock().keys.is_empty());
    }

    #[test]
    fn expired_token_has_a_floor_above_each_version() {
        let (keys, key) = (ActiveKeys::default(), Key::new("k").unwrap());
        let early = keys.token();
        keys.expire_tokens();
        let late = keys.token();
        assert!(early.is_expired() && !late.is_expired());
        assert_eq!(early.floor(&key).possible, Version::from_raw(i64::MAX));
        assert_eq!(late.floor(&key), Floor::default());
        let floor = keys.change(&key, Some(&early), |queued, floor| (queued, None, floor));
        assert_eq!(floor, early.floor(&key));
        assert!(keys.0.lock().keys.is_empty());
    }
}
