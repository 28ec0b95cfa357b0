//! The rule by which every store decides about a write (I9).
//!
//! # Why does a store remember writers?
//!
//! A response can be lost, and a queue may repeat a write hours later. The store keeps the version of each writer's last
//! counted write, so it recognises a repeated one. Kafka's idempotent producer (KIP-98) does the same.
//!
//! # Why is a run of own writes remembered?
//!
//! An update names the version that it has read. A daemon may have written again before its update arrives. The condition
//! holds over such own writes, so a daemon that is alone never conflicts with itself. A write of another daemon ends the run.

use crate::model::outcome::Applied;
use crate::model::version::{MAX_CLOCK_SKEW, MAX_WRITE_AGE, TOMBSTONE_TTL, Timestamp, Version};
use crate::model::writer::WriterId;

/// The effect of a write on the conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteKind {
    /// The value replaces the conversation.
    Put,
    /// The conversation becomes a tombstone.
    Remove,
    /// The items follow those of the conversation.
    Append,
}

/// The condition of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Condition {
    /// The newest version wins.
    #[default]
    Any,
    /// The store holds exactly this version, or only later writes of the same daemon over it.
    ///
    /// [`Version::NONE`] means that no row exists.
    IfVersion(Version),
    /// The conversation exists, and had not expired when the write was made.
    IfPresent,
}

/// The part of a write that decides about it. [`Write::head`](crate::store::Write::head) returns it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteHead {
    /// The effect.
    pub kind: WriteKind,
    /// The version.
    pub version: Version,
    /// The writer that issued the version.
    pub writer: WriterId,
    /// The condition.
    pub condition: Condition,
    /// The expiry of the written content.
    pub expires_at: Timestamp,
}

impl WriteHead {
    /// Whether the newest version decides, so that a repeated write does no harm.
    ///
    /// ```
    /// use threadkeep::store::{Key, Record, Version, Write};
    ///
    /// # fn main() -> threadkeep::Result<()> {
    /// let write = Write::new(Record::tombstone(Key::new("thread-1")?, Version::from_raw(8)));
    /// assert!(write.head().is_plain());
    /// assert!(!write.with_if_version(Version::from_raw(6)).head().is_plain());
    /// # Ok(())
    /// # }
    /// ```
    pub fn is_plain(&self) -> bool {
        self.kind != WriteKind::Append && self.condition == Condition::Any
    }

    /// Whether the store notes the version of the write, to apply the write exactly once.
    ///
    /// A writer without a daemon issues no versions of its own, so the store cannot recognise its writes.
    ///
    /// ```
    /// use threadkeep::store::{Key, Record, Version, Write, WriterId};
    ///
    /// # fn main() -> threadkeep::Result<()> {
    /// let write = Write::new(Record::tombstone(Key::new("thread-1")?, Version::from_raw(8)));
    /// let update = write.with_if_version(Version::from_raw(6));
    /// assert!(!update.head().is_counted());
    /// assert!(update.with_writer(WriterId::random()).head().is_counted());
    /// # Ok(())
    /// # }
    /// ```
    pub fn is_counted(&self) -> bool {
        !self.is_plain() && self.writer.daemon() != 0
    }
}

/// The state of a conversation in a store, beside its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowState {
    /// The version. Each accepted write raises it.
    pub version: Version,
    /// The version of the last plain write, or of the last remove or expiry.
    pub base_version: Version,
    /// The writer of the last accepted write.
    pub last_writer: WriterId,
    /// The version below the unbroken run of writes by the daemon of `last_writer`.
    pub run_began: Version,
    /// The expiry of the content. A tombstone has expired.
    pub expires_at: Timestamp,
}

impl RowState {
    /// The state of a conversation without a row.
    const MISSING: Self = Self {
        version: Version::NONE,
        base_version: Version::NONE,
        last_writer: WriterId::NONE,
        run_began: Version::NONE,
        expires_at: Timestamp(i64::MIN),
    };

    /// Returns the version below the unbroken run of this writer's daemon, if the daemon wrote last.
    fn run_of(&self, writer: WriterId) -> Option<Version> {
        let is_own = writer.daemon() != 0 && writer.daemon() == self.last_writer.daemon();
        is_own.then_some(self.run_began)
    }
}

/// The decision about a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The store changes nothing, and answers this.
    Answer(Applied),
    /// The store keeps the write and answers [`Applied::Stored`]. The row gets this state.
    ///
    /// If the write [is counted](WriteHead::is_counted), the store also notes its version for its writer.
    Apply(RowState),
}

/// Decides about a write (I9).
///
/// `row` is the present row or tombstone. `last` is the version that the store noted for this writer and this conversation, or
/// [`Version::NONE`]. `now` is the [time of versions](crate::store::Clock::now_for_versions). All stores in this process use
/// this function. The SQL of the migrations implements the same rules.
///
/// ```
/// use threadkeep::store::{Applied, Clock, Decision, Key, Record, Version, Write, decide};
///
/// # fn main() -> threadkeep::Result<()> {
/// let clock = Clock::new();
/// let (older, newer) = (clock.issue_version(), clock.issue_version());
/// let remove = |version| Write::new(Record::tombstone(Key::new("thread-1").unwrap(), version)).head();
/// let decided = decide(&remove(newer), None, Version::NONE, clock.now());
/// let Decision::Apply(row) = decided else { panic!("{decided:?}") };
/// let late = decide(&remove(older), Some(&row), Version::NONE, clock.now());
/// assert_eq!(late, Decision::Answer(Applied::Superseded(newer)));
/// # Ok(())
/// # }
/// ```
pub fn decide(write: &WriteHead, row: Option<&RowState>, last: Version, now: Timestamp) -> Decision {
    let held = row.unwrap_or(&RowState::MISSING);
    // First, because a repeated write is idempotent, even if its version is too old by now.
    let answer = repeated(write, held, last)
        .or_else(|| outside_limits(write.version, now))
        .or_else(|| conflict(write, row, now))
        .or_else(|| superseded(write, held));
    answer.map_or_else(|| Decision::Apply(next_state(write, held)), Decision::Answer)
}

/// Recognises a write that the store has applied before. A write is also `Stored` if a later put or remove of the same daemon
/// took its place.
fn repeated(write: &WriteHead, held: &RowState, last: Version) -> Option<Applied> {
    let stored = match write.kind {
        WriteKind::Append => Applied::AppendedBefore(held.version),
        WriteKind::Put | WriteKind::Remove => Applied::Stored,
    };
    if write.is_counted() && write.version <= last {
        return Some(stored);
    }
    if write.version > held.base_version {
        return None;
    }
    let is_own = held.run_of(write.writer).is_some_and(|began| began < write.version);
    if is_own || write.is_plain() && write.version == held.base_version {
        return Some(stored);
    }
    write.is_plain().then_some(Applied::Superseded(held.version))
}

fn outside_limits(version: Version, now: Timestamp) -> Option<Applied> {
    if version.at() > now.plus(MAX_CLOCK_SKEW) {
        return Some(Applied::VersionInFuture);
    }
    (version < Version::min_at(now.minus(MAX_WRITE_AGE))).then_some(Applied::TooOld)
}

fn conflict(write: &WriteHead, row: Option<&RowState>, now: Timestamp) -> Option<Applied> {
    let held = row.unwrap_or(&RowState::MISSING);
    let base = match write.condition {
        Condition::Any => return None,
        Condition::IfPresent => return (held.expires_at <= write.version.at()).then_some(Applied::Absent),
        Condition::IfVersion(base) => base,
    };
    // The purge removed the row that the caller had read, and no row came after it.
    let is_purged = row.is_none() && base < Version::min_at(now.minus(TOMBSTONE_TTL));
    // A base above the row never came into the store. Then the run does not tell what the update has read.
    let is_own_run = held.run_of(write.writer).is_some_and(|began| (began..=held.version).contains(&base))
        && held.version < write.version;
    let holds = held.version == base || is_purged || is_own_run;
    (!holds).then_some(Applied::Conflict(held.version))
}

fn superseded(write: &WriteHead, held: &RowState) -> Option<Applied> {
    match write.kind {
        WriteKind::Append if write.version < held.base_version => {
            Some(Applied::Superseded(held.base_version))
        }
        WriteKind::Put | WriteKind::Remove if write.version <= held.version => {
            Some(Applied::Superseded(held.version))
        }
        _ => None,
    }
}

/// Returns the state of the row after the write.
fn next_state(write: &WriteHead, held: &RowState) -> RowState {
    // A version that the store makes is odd, and an issued version is even, so the two never meet.
    let made = Version::from_raw((held.version.raw() + 1) | 1);
    let version = if write.version > held.version { write.version } else { made };
    // A conversation that had expired when the write was made counts as removed at its expiry. So the time of arrival does not
    // matter. The base is odd and below all versions of that millisecond, so no write takes it for its own.
    let has_expired = held.expires_at <= write.version.at();
    let below_expiry = Version::from_raw(Version::min_at(held.expires_at).raw().saturating_sub(1));
    let expired = if has_expired { below_expiry } else { Version::NONE };
    let replaces_all = write.is_plain() || write.kind == WriteKind::Remove;
    let extends = write.kind == WriteKind::Append && !has_expired;
    RowState {
        version,
        base_version: if replaces_all { version } else { held.base_version.max(expired) },
        last_writer: write.writer,
        run_began: held.run_of(write.writer).unwrap_or(held.version),
        expires_at: if extends { write.expires_at.max(held.expires_at) } else { write.expires_at },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use WriteKind::{Append, Put, Remove};

    const OURS: WriterId = WriterId::from_raw(1 << 24);
    const OTHERS: WriterId = WriterId::from_raw(2 << 24);
    /// The time of all versions below.
    const NOW: Timestamp = Timestamp(1_000_000_000_000);

    fn version(offset: i64) -> Version {
        Version::from_raw(Version::min_at(NOW).raw() + offset)
    }

    fn head(kind: WriteKind, offset: i64, writer: WriterId) -> WriteHead {
        let expires_at = NOW.plus(TOMBSTONE_TTL);
        WriteHead { kind, version: version(offset), writer, condition: Condition::Any, expires_at }
    }

    /// A row that `OTHERS` put at the base version 4 and changed at version 8.
    fn row() -> RowState {
        RowState {
            version: version(8),
            base_version: version(4),
            last_writer: OTHERS,
            run_began: version(2),
            expires_at: NOW.plus(MAX_WRITE_AGE),
        }
    }

    fn after(write: &WriteHead, row: &RowState) -> RowState {
        match decide(write, Some(row), Version::NONE, NOW) {
            Decision::Apply(state) => state,
            Decision::Answer(answer) => panic!("{answer:?}"),
        }
    }

    #[test]
    fn append_follows_the_row_unless_a_newer_put_replaced_it() {
        let late = after(&head(Append, 6, OURS), &row());
        assert_eq!((late.version, late.base_version), (version(9), version(4)));
        assert_eq!((late.last_writer, late.run_began), (OURS, version(8)));
        assert_eq!(after(&head(Append, 6, OURS), &late).version, version(11), "no last version was noted");
        assert_eq!(after(&head(Append, 12, OURS), &late).version, version(12));
        let answer = decide(&head(Append, 2, OURS), Some(&row()), Version::NONE, NOW);
        assert_eq!(answer, Decision::Answer(Applied::Superseded(version(4))));
        let answer = decide(&head(Append, 6, OURS), Some(&late), version(6), NOW);
        assert_eq!(answer, Decision::Answer(Applied::AppendedBefore(version(9))));
    }

    #[test]
    fn append_to_an_expired_row_starts_a_new_life() {
        let expired_at = Timestamp(NOW.0 - 5);
        let expired = RowState { version: version(-100 << 21), expires_at: expired_at, ..row() };
        let expired = RowState { base_version: expired.version, ..expired };
        let next = after(&head(Append, 6, OURS), &expired);
        assert_eq!(next.base_version.raw(), Version::min_at(expired_at).raw() - 1);
        assert_eq!(next.expires_at, NOW.plus(TOMBSTONE_TTL));
        let live = after(&head(Append, 10, OURS), &RowState { expires_at: Timestamp(i64::MAX), ..row() });
        assert_eq!(live.expires_at, Timestamp(i64::MAX), "an append shortens no life");
    }

    #[test]
    fn only_plain_writes_and_removes_raise_the_base() {
        let over = Condition::IfVersion(version(8));
        for (kind, condition, base) in [
            (Put, Condition::Any, 10),
            (Remove, Condition::Any, 10),
            (Remove, over, 10),
            (Put, over, 4),
            (Append, Condition::Any, 4),
        ] {
            let next = after(&WriteHead { condition, ..head(kind, 10, OURS) }, &row());
            assert_eq!(next.base_version, version(base), "{kind:?} {condition:?}");
        }
    }

    #[test]
    fn own_put_took_the_place_of_an_older_update() {
        let own = after(&head(Put, 20, OURS), &row());
        let update =
            |writer| WriteHead { condition: Condition::IfVersion(version(6)), ..head(Put, 12, writer) };
        let decided = |writer| decide(&update(writer), Some(&own), Version::NONE, NOW);
        assert_eq!(decided(OURS), Decision::Answer(Applied::Stored));
        assert_eq!(decided(OTHERS), Decision::Answer(Applied::Conflict(version(20))));
    }

    #[test]
    fn base_that_the_store_never_had_conflicts_with_an_own_run() {
        let own = after(&head(Append, 10, OURS), &row());
        let over = |base| WriteHead { condition: Condition::IfVersion(version(base)), ..head(Put, 20, OURS) };
        let decided = |base| decide(&over(base), Some(&own), Version::NONE, NOW);
        assert!(matches!((decided(8), decided(10)), (Decision::Apply(_), Decision::Apply(_))));
        for base in [6, 12] {
            assert_eq!(decided(base), Decision::Answer(Applied::Conflict(version(10))));
        }
    }

    #[test]
    fn limits_apply_to_new_writes_only() {
        let late = Version::min_at(NOW.minus(MAX_WRITE_AGE).minus(MAX_CLOCK_SKEW));
        let ahead = Version::min_at(NOW.plus(MAX_CLOCK_SKEW * 2));
        let update = |version| WriteHead { version, ..head(Append, 0, OURS) };
        let decided = |version, last| decide(&update(version), None, last, NOW);
        assert_eq!(decided(late, Version::NONE), Decision::Answer(Applied::TooOld));
        assert_eq!(decided(late, late), Decision::Answer(Applied::AppendedBefore(Version::NONE)));
        assert_eq!(decided(ahead, Version::NONE), Decision::Answer(Applied::VersionInFuture));
        assert_eq!(decided(ahead, ahead), Decision::Answer(Applied::AppendedBefore(Version::NONE)));
    }
}
