//! The state machine of one conversation in memory.
//!
//! [`step`] alone decides how an event changes the state. It has no locks, clocks or I/O. Its only driver is `MemoryCache::drive`,
//! which runs it under moka's lock of the key. So entry, absence, queued write and version floor change together (I5).

use std::sync::Arc;

use crate::model::moment::Moment;
use crate::model::record::Record;
use crate::model::version::{Timestamp, Version};
use crate::outage::{Tail, Verdict};

#[cfg(test)]
mod tests;

/// What this process knows of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct KeyState {
    pub(super) cached: Cached,
    pub(super) queued: Queued,
    /// The floor that rose since the call of the event took its read token (I2).
    pub(super) floor: Floor,
}

/// The value in memory.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cached {
    Nothing,
    /// A call that began at `at` saw that the store has no live record.
    Absent {
        version: Version,
        at: Moment,
    },
    Held(Held),
}

/// A record in memory.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Held {
    pub(super) record: Arc<Record>,
    /// The start of the call that last validated the record, or the time of queueing.
    pub(super) at: Moment,
    pub(super) origin: Origin,
}

/// The source of a record in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The store validated the record.
    Store,
    /// A copy from the replica, or a replayed write. It is never fresh, because the store may hold something newer.
    Replica,
    /// A queued write. It is the newest of its conversation.
    Queue,
}

/// The newest queued write of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Queued {
    #[default]
    Nothing,
    /// No newer version of the conversation is known. Reads answer with this write.
    Newest(Version),
    /// The store holds this version or a newer one. Replay sends the write, and reads skip it (I16).
    Superseded(Version),
    /// The store may hold a newer version. Reads skip the write until the store has shown an older one.
    Unverified(Version),
    /// An append, or an update behind appends. No newer version supersedes it. Reads ask the outage file for the value, which
    /// follows its copy.
    Append(Version),
}

/// The version floor of a conversation. A result below it is stale (I2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Floor {
    /// The highest version that the store may hold.
    pub(super) possible: Version,
    /// The highest version that the store was seen to hold.
    pub(super) confirmed: Version,
}

/// A change of the knowledge about a conversation.
#[derive(Debug, Clone)]
pub(super) enum Event {
    /// The store held this record or tombstone during a load, a list, or the write of this record.
    Seen(Arc<Record>),
    /// The store may hold this version: a write of it failed (I6), or the change feed named it. A queued write does not lose
    /// against it.
    Unknown(Version),
    /// The store holds this version, whose value is unknown.
    Newer(Version),
    /// The replica has this copy.
    Copy(Arc<Record>),
    /// The outage file has committed this write to the queue. Nothing is compared with a provisional version (I8).
    Enqueued { write: Arc<Record>, has_appends: bool, is_provisional: bool },
    /// A caller has read the value of the newest queued write from the outage file.
    QueuedRead(Arc<Record>),
    /// A queued write has left the queue. `left` is the newest one that is still queued.
    Settled { version: Version, verdict: Verdict, left: Option<Tail> },
    /// Clock sync has corrected a queued write.
    Corrected { from: Version, version: Version, expires_at: Timestamp },
    /// moka has evicted the value, or the store was restored.
    Evicted,
}

/// The answer to the caller that brought the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The cached value of the new state.
    Current,
    /// A newer version became known during the call. The caller looks again.
    Stale,
    /// A newer write waits in the queue.
    QueuedIsNewer,
}

/// The effect of an event beside the new state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Effect {
    /// The floor for all calls that run now.
    pub(super) raised: Option<Floor>,
    pub(super) answer: Answer,
}

/// The times of an event.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// The start of the call that brought the event, or the time of the last validation.
    pub(super) at: Moment,
    pub(super) now: Timestamp,
    /// Whether the clock is synced. Otherwise queued versions may be provisional, and nothing is compared with them (I8).
    pub(super) is_synced: bool,
}

/// Changes the state by an event.
pub(super) fn step(mut state: KeyState, event: Event, times: Times) -> (KeyState, Effect) {
    let effect = match event {
        Event::Seen(record) => state.seen(record, times),
        Event::Unknown(version) => {
            // The store may not hold the version, so a queued write does not lose against it.
            state.forget_below(version);
            Effect::raised(Floor { possible: version, confirmed: Version::NONE })
        }
        Event::Newer(version) => state.newer(version),
        Event::Copy(record) => state.copy(record, times),
        Event::Enqueued { write, has_appends: true, .. } => state.appended(write.version),
        Event::Enqueued { write, is_provisional, .. } => state.enqueued(write, is_provisional, times),
        Event::QueuedRead(write) => {
            if state.queued.answer() == Some(write.version) {
                state.hold_queued(write, times.at);
            }
            Effect::answer(Answer::Current)
        }
        Event::Settled { version, verdict, left } => state.settled(version, &verdict, left, times),
        Event::Corrected { from, version, expires_at } => state.corrected(from, version, expires_at),
        Event::Evicted => {
            state.cached = Cached::Nothing;
            Effect::answer(Answer::Current)
        }
    };
    state.drop_unmarked();
    (state, effect)
}

impl KeyState {
    /// Above the floor, memory held nothing newer than the call saw when the call began. So the result replaces the value, even
    /// if its version is lower: another client may have deleted the row, or restored the database.
    fn seen(&mut self, record: Arc<Record>, Times { at, is_synced, .. }: Times) -> Effect {
        let version = record.version;
        if is_synced {
            self.queued = self.queued.compared_with(version);
        }
        match self.queued {
            Queued::Newest(_) => return Effect::answer(Answer::QueuedIsNewer),
            // The value follows the store's record, so the file knows another one now.
            Queued::Append(_) if version >= self.floor.possible => {
                self.cached = Cached::Nothing;
                return Effect { answer: Answer::QueuedIsNewer, ..Effect::raised(Floor::confirmed(version)) };
            }
            Queued::Append(_) => return Effect::answer(Answer::QueuedIsNewer),
            _ => {}
        }
        if version < self.floor.possible {
            // The floor may come from a write that the store never took. The value can then be older than this result.
            self.forget_below(version);
            return Effect::answer(Answer::Stale);
        }
        self.cached = match record.value {
            Some(_) => Cached::Held(Held { record, at, origin: Origin::Store }),
            None => Cached::Absent { version, at },
        };
        // From now on, an older result of a slower call is stale (I2).
        Effect::raised(Floor::confirmed(version))
    }

    fn newer(&mut self, version: Version) -> Effect {
        self.queued = self.queued.compared_with(version);
        match self.queued {
            Queued::Append(_) => self.cached = Cached::Nothing,
            _ => self.forget_below(version),
        }
        Effect::raised(Floor::confirmed(version))
    }

    fn copy(&mut self, record: Arc<Record>, Times { at, now, .. }: Times) -> Effect {
        if record.version < self.floor.possible || self.queued.answer().is_some() {
            return Effect::answer(Answer::Stale);
        }
        match &self.cached {
            Cached::Absent { .. } => return Effect::answer(Answer::Stale),
            // Another caller was faster.
            Cached::Held(held) if held.record.version > record.version || held.record.is_live(now) => {}
            _ => self.cached = Cached::Held(Held { record, at, origin: Origin::Replica }),
        }
        Effect::answer(Answer::Current)
    }

    fn enqueued(&mut self, write: Arc<Record>, is_provisional: bool, times: Times) -> Effect {
        let version = write.version;
        // A call has seen a newer version in the store since this write began.
        if self.floor.confirmed > version && !is_provisional {
            self.queued = Queued::Superseded(version);
            return Effect::answer(Answer::Stale);
        }
        self.queued = Queued::Newest(version);
        self.hold_queued(write, times.at);
        // A load that began before must not replace the queued write (I16).
        Effect::raised(Floor { possible: version, confirmed: Version::NONE })
    }

    /// The items follow what only the file knows.
    fn appended(&mut self, version: Version) -> Effect {
        (self.queued, self.cached) = (Queued::Append(version), Cached::Nothing);
        // A load that began before must not come without the queued items (I16).
        Effect::raised(Floor { possible: version, confirmed: Version::NONE })
    }

    fn settled(&mut self, version: Version, verdict: &Verdict, left: Option<Tail>, times: Times) -> Effect {
        let raised = match verdict {
            Verdict::Stored => Some(Floor::confirmed(version)),
            Verdict::Appended(stored) => self.newer(*stored).raised,
            Verdict::Dead { newer: Some(newer), .. } => self.newer(*newer).raised,
            Verdict::Dead { newer: None, .. } => None,
        };
        match left {
            Some(Tail { version, has_appends: true }) => self.queued = Queued::Append(version),
            Some(Tail { version, .. }) => self.queued = self.left(version, verdict),
            None if self.queued.version().is_some_and(|queued| queued <= version) => {
                if let Cached::Held(held) = &mut self.cached
                    && (held.origin, held.record.version) == (Origin::Queue, version)
                    && *verdict == Verdict::Stored
                {
                    (held.origin, held.at) = (Origin::Replica, times.at);
                }
                self.queued = Queued::Nothing;
            }
            None => {}
        }
        Effect { raised, answer: Answer::Current }
    }

    /// Returns the state with a put, remove or update of this version as the newest queued write, without appends before it.
    fn left(&self, version: Version, verdict: &Verdict) -> Queued {
        match (self.queued, verdict) {
            (Queued::Append(_), Verdict::Appended(stored) | Verdict::Dead { newer: Some(stored), .. }) => {
                Queued::Newest(version).compared_with(*stored)
            }
            (Queued::Append(_), Verdict::Stored) => Queued::Newest(version),
            _ => self.queued.with_version(version),
        }
    }

    fn corrected(&mut self, from: Version, version: Version, expires_at: Timestamp) -> Effect {
        if self.queued == Queued::Append(from) {
            // The expiry of the value may be another one than that of the append.
            (self.queued, self.cached) = (Queued::Append(version), Cached::Nothing);
        } else if self.queued.version() == Some(from) {
            self.queued = self.queued.with_version(version);
        }
        if let Cached::Held(held) = &mut self.cached
            && (held.origin, held.record.version) == (Origin::Queue, from)
        {
            held.record = Arc::new(Record { version, expires_at, ..Record::clone(&held.record) });
        }
        Effect::answer(Answer::Current)
    }

    /// A queued remove leaves no value. The queue answers for it (I14).
    fn hold_queued(&mut self, write: Arc<Record>, at: Moment) {
        self.cached = match write.value {
            Some(_) => Cached::Held(Held { record: write, at, origin: Origin::Queue }),
            None => Cached::Nothing,
        };
    }

    fn forget_below(&mut self, version: Version) {
        let is_older = match &self.cached {
            Cached::Nothing => false,
            Cached::Absent { version: absent, .. } => *absent < version,
            Cached::Held(held) => held.origin != Origin::Queue && held.record.version < version,
        };
        if is_older {
            self.cached = Cached::Nothing;
        }
    }

    /// Drops a queued value that is not, or no longer, the newest.
    fn drop_unmarked(&mut self) {
        if let Cached::Held(held) = &self.cached
            && held.origin == Origin::Queue
            && self.queued.answer() != Some(held.record.version)
        {
            self.cached = Cached::Nothing;
        }
    }
}

impl Queued {
    pub(super) fn version(self) -> Option<Version> {
        match self {
            Self::Nothing => None,
            Self::Newest(version)
            | Self::Superseded(version)
            | Self::Unverified(version)
            | Self::Append(version) => Some(version),
        }
    }

    /// Returns the version of the write that answers reads.
    pub(super) fn answer(self) -> Option<Version> {
        match self {
            Self::Newest(version) | Self::Append(version) => Some(version),
            Self::Nothing | Self::Superseded(_) | Self::Unverified(_) => None,
        }
    }

    /// Returns the state after the store was seen to hold `stored`. A superseded write stays so (I10).
    fn compared_with(self, stored: Version) -> Self {
        match self {
            Self::Newest(version) | Self::Unverified(version) if version > stored => Self::Newest(version),
            Self::Newest(version) | Self::Unverified(version) => Self::Superseded(version),
            Self::Superseded(_) | Self::Append(_) | Self::Nothing => self,
        }
    }

    /// Returns the state with a put, remove or update of this version as the newest queued write.
    fn with_version(self, version: Version) -> Self {
        match self {
            // Nothing tells what the store holds beside that write.
            Self::Append(_) => Self::Unverified(version),
            Self::Nothing => Self::Nothing,
            Self::Newest(_) => Self::Newest(version),
            Self::Superseded(_) => Self::Superseded(version),
            Self::Unverified(_) => Self::Unverified(version),
        }
    }
}

impl Floor {
    fn confirmed(version: Version) -> Self {
        Self { possible: version, confirmed: version }
    }

    /// Returns the higher of both floors. A floor never falls.
    pub(super) fn max(self, other: Self) -> Self {
        Self { possible: self.possible.max(other.possible), confirmed: self.confirmed.max(other.confirmed) }
    }
}

impl Effect {
    fn answer(answer: Answer) -> Self {
        Self { raised: None, answer }
    }

    fn raised(floor: Floor) -> Self {
        Self { raised: Some(floor), answer: Answer::Current }
    }
}
