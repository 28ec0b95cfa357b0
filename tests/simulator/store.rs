//! The store of the simulator: one row, the side table of writers, plain SQL and the purge.

use std::collections::BTreeMap;

use super::rule::Rule;
use crate::model::version::{MAX_CLOCK_SKEW, MAX_WRITE_AGE, TOMBSTONE_TTL, Timestamp, Version};
use crate::model::writer::WriterId;
use crate::store::{Applied, Condition, Decision, RowState, WriteHead, WriteKind, decide};

#[derive(Debug, Clone, Copy)]
pub struct StoredRow {
    pub state: RowState,
    pub has_value: bool,
}

impl StoredRow {
    pub fn is_gone(&self, at: Timestamp) -> bool {
        !self.has_value || self.state.expires_at <= at
    }
}

#[derive(Debug, Clone, Default)]
pub struct SimStore {
    pub row: Option<StoredRow>,
    pub writers: BTreeMap<WriterId, Version>,
}

impl SimStore {
    pub fn version(&self) -> Version {
        self.row.map_or(Version::NONE, |row| row.state.version)
    }

    /// Decides about a write and keeps it. Returns the answer, and whether the row changed.
    pub fn apply(
        &mut self,
        write: &WriteHead,
        expires_at: Timestamp,
        now: Timestamp,
        off: &[Rule],
    ) -> (Applied, bool) {
        let expires_at = if write.kind == WriteKind::Remove { write.version.at() } else { expires_at };
        let write = &WriteHead { expires_at, ..*write };
        let last = self.writers.get(&write.writer).copied().unwrap_or_default();
        let state = self.row.map(|row| row.state);
        let twin = decide_without(off, write, state.as_ref(), last, now);
        if off.is_empty() {
            assert_eq!(twin, decide(write, state.as_ref(), last, now), "the twin differs from decide()");
        }
        let next = match twin {
            Decision::Answer(applied) => return (applied, false),
            Decision::Apply(next) => next,
        };
        if write.is_counted() {
            let last = self.writers.entry(write.writer).or_default();
            *last = write.version.max(*last);
        }
        let over = self.version();
        self.row = Some(StoredRow { state: next, has_value: write.kind != WriteKind::Remove });
        let applied = match write.kind {
            WriteKind::Append => Applied::Appended { version: next.version, over, length: 0 },
            _ => Applied::Stored,
        };
        (applied, true)
    }

    /// A statement of another client. Its trigger gives the row a version, ends the run and raises the base.
    pub fn plain_sql(
        &mut self,
        has_value: bool,
        expires_at: Timestamp,
        now: Timestamp,
        off: &[Rule],
    ) -> Version {
        let held = self.row.map(|row| row.state);
        let version = Version::from_raw((self.version().max(Version::min_at(now)).raw() + 1) | 1);
        if !has_value && off.contains(&Rule::SqlTombstone) {
            self.row = None;
            return version;
        }
        let kept = |rule, new, old: Option<_>| if off.contains(&rule) { old.unwrap_or(new) } else { new };
        let state = RowState {
            version,
            base_version: kept(Rule::SqlRaisesBase, version, held.map(|row| row.base_version)),
            last_writer: if off.contains(&Rule::SqlEndsRun) {
                held.map_or(WriterId::NONE, |row| row.last_writer)
            } else {
                WriterId::NONE
            },
            run_began: kept(Rule::SqlEndsRun, Version::NONE, held.map(|row| row.run_began)),
            expires_at: if has_value { expires_at } else { now },
        };
        self.row = Some(StoredRow { state, has_value });
        version
    }

    /// Forgets what no accepted write can need any more.
    pub fn purge(&mut self, now: Timestamp, off: &[Rule]) {
        let horizon = |rule| now.minus(if off.contains(&rule) { TOMBSTONE_TTL / 4 } else { TOMBSTONE_TTL });
        let rows = horizon(Rule::TombstonesLast);
        if self
            .row
            .is_some_and(|row| row.state.expires_at < rows && row.state.version < Version::min_at(rows))
        {
            self.row = None;
        }
        let writers = Version::min_at(horizon(Rule::WritersLast));
        self.writers.retain(|_, last| *last >= writers);
    }
}

/// The rules of `decide`, with switches. Without switches it is `decide`, and each run without a mutant asserts that.
fn decide_without(
    off: &[Rule],
    write: &WriteHead,
    row: Option<&RowState>,
    last: Version,
    now: Timestamp,
) -> Decision {
    let on = |rule| !off.contains(&rule);
    let answer = Decision::Answer;
    let missing = RowState {
        version: Version::NONE,
        base_version: Version::NONE,
        last_writer: WriterId::NONE,
        run_began: Version::NONE,
        expires_at: Timestamp(i64::MIN),
    };
    let held = row.unwrap_or(&missing);
    let version = write.version;
    let is_same_daemon = held.last_writer.daemon() == write.writer.daemon() && write.writer.daemon() != 0;
    let is_own_run = is_same_daemon && (on(Rule::DaemonPart) || held.last_writer == write.writer);
    let stored = match write.kind {
        WriteKind::Append => Applied::AppendedBefore(held.version),
        _ => Applied::Stored,
    };
    if on(Rule::AppliesOnce) && write.is_counted() && version <= last {
        return answer(stored);
    }
    let is_covered = is_own_run && held.run_began < version && version <= held.base_version;
    if on(Rule::CoveredUpdate) && write.is_counted() && is_covered {
        return answer(stored);
    }
    let plain_base = if on(Rule::BaseForPlain) { held.base_version } else { held.version };
    if on(Rule::PlainByBase) && write.is_plain() && version <= plain_base {
        let is_covered = on(Rule::PlainOwnRun) && is_own_run && held.run_began < version;
        let is_own = version == plain_base || is_covered;
        return answer(if is_own { Applied::Stored } else { Applied::Superseded(held.version) });
    }
    if version.at() > now.plus(MAX_CLOCK_SKEW) {
        return answer(Applied::VersionInFuture);
    }
    if on(Rule::TooOld) && version < Version::min_at(now.minus(MAX_WRITE_AGE)) {
        return answer(Applied::TooOld);
    }
    let is_absent = held.expires_at <= write.version.at();
    if on(Rule::OnlyIfPresent) && write.condition == Condition::IfPresent && is_absent {
        return answer(Applied::Absent);
    }
    if let Condition::IfVersion(base) = write.condition {
        let is_purged =
            on(Rule::PurgedBase) && row.is_none() && base < Version::min_at(now.minus(TOMBSTONE_TTL));
        let is_over_own_run = on(Rule::OwnRun)
            && is_own_run
            && (off.contains(&Rule::RunBegan) || held.run_began <= base)
            && (off.contains(&Rule::BaseWasRow) || base <= held.version)
            && held.version < version;
        if !(held.version == base || is_purged || is_over_own_run) {
            return answer(Applied::Conflict(held.version));
        }
    }
    match write.kind {
        WriteKind::Append if on(Rule::AppendAboveBase) && version < held.base_version => {
            return answer(Applied::Superseded(held.base_version));
        }
        WriteKind::Put | WriteKind::Remove if on(Rule::NewestWins) && version <= held.version => {
            return answer(Applied::Superseded(held.version));
        }
        _ => {}
    }
    let made = held.version.raw() + 1;
    let next = if version > held.version {
        version
    } else {
        Version::from_raw(if on(Rule::OddVersions) { made | 1 } else { made })
    };
    let at = if on(Rule::ExpiryAtVersion) { version.at() } else { now };
    let has_expired = on(Rule::ExpiryRaisesBase) && held.expires_at <= at;
    let expired_at = if has_expired {
        Version::from_raw(Version::min_at(held.expires_at).raw() - 1)
    } else {
        Version::NONE
    };
    let is_remove = write.kind == WriteKind::Remove && on(Rule::RemoveRaisesBase);
    let replaces_all = is_remove || write.is_plain();
    Decision::Apply(RowState {
        version: next,
        base_version: if replaces_all { next } else { held.base_version.max(expired_at) },
        last_writer: write.writer,
        run_began: if is_own_run { held.run_began } else { held.version },
        expires_at: match write.kind {
            WriteKind::Append if held.expires_at > at => held.expires_at.max(write.expires_at),
            _ => write.expires_at,
        },
    })
}
