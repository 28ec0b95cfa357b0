//! Judges registers. Callers put, remove and replace them; each document names the one write that made it.

use super::order::Source;
use super::{ROUNDING_MS, Verdict};
use crate::history::{Claim, History, Moment, Op, OpKind, Outcome, Reading, WriteKind};

/// The longest negative caching.
pub const MAX_ABSENT_MS: i64 = 2_000;

pub fn check(history: &History, key: usize) -> Verdict {
    let register = Register { history, key };
    for op in history.ops.iter().filter(|op| op.key == key) {
        match &op.kind {
            OpKind::Read(Ok(reading)) => register.check_read(op, reading)?,
            OpKind::Read(Err(_)) => register.check_refusal(op)?,
            OpKind::Write(_) => {}
        }
    }
    register.check_final()
}

struct Register<'a> {
    history: &'a History,
    key: usize,
}

impl<'a> Register<'a> {
    /// Checks promises 3 to 6: a caller wrote the document, it has not expired, and it is new enough for its reader.
    fn check_read(&self, op: &Op, reading: &Reading) -> Verdict {
        let Some(end) = op.end else { return Ok(()) };
        let sources = self.sources(reading.seen.as_deref(), end, op.off_ms);
        if sources.is_empty() {
            return Err(format!("shows a write that no caller made, or a rejected write: {op}"));
        }
        self.check_expiry(&sources, op.begin, op.off_ms).map_err(|message| format!("{message}: {op}"))?;
        let is_known =
            |w: &Op| w.handle == op.handle && ended_before(w, op) && self.history.is_remembered(w, op);
        if sources.iter().all(|source| is_superseded(*source, is_known)) {
            return Err(format!("shows a write that its own handle reported as superseded: {op}"));
        }
        let required = self.required(op, reading);
        let is_possible =
            |source: &&Source<'_>| required.iter().all(|bound| !bound.is_above(self.history, **source));
        if sources.iter().any(|source| is_possible(&source)) {
            return Ok(());
        }
        let bound = required.iter().find(|bound| sources.iter().any(|s| bound.is_above(self.history, *s)));
        let reason = bound.map_or_else(String::new, |bound| format!(" ({})", bound.reason));
        let violation = if reading.seen.is_some() { "shows an older write" } else { "unjustified absence" };
        Err(format!("{violation}: {op}{reason}"))
    }

    /// Returns the writes that explain a reading which ended before `end`.
    fn sources(&self, seen: Option<&[u64]>, end: Moment, off_ms: i64) -> Vec<Source<'a>> {
        match seen {
            Some([id]) => {
                let source = self.history.shown(self.key, *id).filter(|op| op.begin.tick < end.tick);
                source.map(Source::Write).into_iter().collect()
            }
            Some(_) => Vec::new(),
            None => {
                let is_source = |op: &&Op| {
                    op.begin.tick < end.tick
                        && op.write().is_some_and(|write| {
                            write.outcome.may_show()
                                && (write.kind == WriteKind::Remove || self.may_have_expired(op, end, off_ms))
                        })
                };
                let gone = self.history.writes(self.key).filter(is_source).map(Source::Write);
                [Source::Never].into_iter().chain(gone).collect()
            }
        }
    }

    fn may_have_expired(&self, op: &Op, at: Moment, off_ms: i64) -> bool {
        let slack = self.history.rules.clock_ms + off_ms.abs() + ROUNDING_MS;
        op.write().is_some_and(|write| op.begin.ms + write.ttl_ms - slack - op.drift.early_ms <= at.ms)
    }

    /// Checks promise 6: the document has not expired. Its lifetime begins between the call of the put and its return.
    fn check_expiry(&self, sources: &[Source<'_>], at: Moment, off_ms: i64) -> Verdict {
        let slack = self.history.rules.clock_ms + off_ms.abs() + ROUNDING_MS;
        let has_expired = |source: &Source<'_>| match source {
            Source::Write(Op { end: Some(end), drift, kind: OpKind::Write(write), .. })
                if write.kind != WriteKind::Remove =>
            {
                at.ms > end.ms + write.ttl_ms + slack + drift.late_ms
            }
            _ => false,
        };
        match sources {
            [one] if has_expired(one) => Err("shows an expired write".into()),
            _ => Ok(()),
        }
    }

    /// Returns the lower bounds of a reading: the acknowledged writes and earlier readings of its handle.
    ///
    /// A fresh reading is also bounded by the writes that any handle stored long before.
    fn required(&self, read: &Op, reading: &Reading) -> Vec<Bound<'a>> {
        let history = self.history;
        let mut bounds = Vec::new();
        let is_own =
            |op: &Op| op.handle == read.handle && ended_before(op, read) && history.is_remembered(op, read);
        for op in history.writes(self.key).filter(|op| is_own(op) && history.is_kept(op)) {
            bounds.push(Bound::new("acknowledged before", vec![Source::Write(op)]));
        }
        for op in history.ops.iter().filter(|op| op.key == self.key && op.life == read.life && is_own(op)) {
            let (OpKind::Read(Ok(earlier)), Some(end)) = (&op.kind, op.end) else { continue };
            let sources = self.sources(earlier.seen.as_deref(), end, op.off_ms);
            let is_exempt = |s: &Source<'_>| matches!(s, Source::Write(op) if history.is_discarded(op) || history.is_lost_with_file(op));
            if !sources.iter().any(is_exempt) {
                bounds.push(Bound::new("shown before", sources));
            }
        }
        let window = match reading.claim {
            Claim::Fresh => history.rules.fresh_ms,
            Claim::Absent => history.rules.fresh_ms.min(MAX_ABSENT_MS),
            Claim::Stale | Claim::Queued => return bounds,
        };
        let is_known = |op: &&Op| {
            op.write().is_some_and(|write| write.outcome == Outcome::Stored)
                && op.end.is_some_and(|end| end.ms + window + ROUNDING_MS < read.begin.ms)
        };
        for op in history.writes(self.key).filter(is_known) {
            // A queued remove also justifies an absence, even after stored writes of other handles (I14).
            let own_delete = (reading.claim == Claim::Absent).then_some(read.handle);
            bounds.push(Bound { own_delete, ..Bound::new("stored long ago", vec![Source::Write(op)]) });
        }
        bounds
    }

    /// Checks promise 2: a handle serves its own write in any outage, if no caller has touched the key since.
    fn check_refusal(&self, read: &Op) -> Verdict {
        let history = self.history;
        if !history.rules.replica_keeps_all {
            return Ok(());
        }
        let is_known = |op: &&Op| {
            op.handle == read.handle
                && ended_before(op, read)
                && history.is_remembered(op, read)
                && !history.is_discarded(op)
                && op.write().is_some_and(|write| {
                    matches!(write.outcome, Outcome::Stored | Outcome::Queued)
                        && write.kind != WriteKind::Remove
                })
                && read.end.is_some_and(|end| !self.may_have_expired(op, end, read.off_ms))
        };
        let is_quiet = |known: &&Op| {
            let touches = |op: &&Op| op.write().is_some_and(|w| !matches!(w.outcome, Outcome::Failed(_)));
            history
                .writes(self.key)
                .filter(touches)
                .all(|op| std::ptr::eq(op, *known) || history.rules.is_before(op, known))
        };
        let is_closed =
            matches!(&read.kind, OpKind::Read(Err(kind)) if *kind == threadkeep::ErrorKind::Closed);
        match history.writes(self.key).filter(is_known).find(is_quiet) {
            Some(known) if !is_closed => {
                Err(format!("a known conversation was not served: {read}, after {known}"))
            }
            _ => Ok(()),
        }
    }

    /// Checks promises 1 and 4: the final document is at least as new as each kept write.
    fn check_final(&self) -> Verdict {
        let history = self.history;
        let Some(last) = history.finals.iter().find(|last| last.key == self.key) else { return Ok(()) };
        let sources = self.sources(last.seen.as_deref(), last.at, 0);
        if sources.is_empty() {
            return Err(format!(
                "the store ends with a write that no caller made, or a rejected write: {last:?}"
            ));
        }
        if sources.iter().all(|source| is_superseded(*source, |_| true)) {
            return Err(format!("the store ends with a superseded write: {last:?}"));
        }
        self.check_expiry(&sources, last.at, 0)
            .map_err(|message| format!("the database {message}: {last:?}"))?;
        let newer_write = |source: Source<'_>| {
            let kept = history.writes(self.key).filter(|op| history.is_kept(op));
            kept.into_iter().find(|op| history.rules.is_older(source, Source::Write(op)))
        };
        match sources.iter().map(|source| newer_write(*source)).collect::<Option<Vec<_>>>() {
            Some(newer) => Err(format!("an acknowledged write is lost: {last:?}, but {}", newer[0])),
            None => Ok(()),
        }
    }
}

/// A lower bound: a reading must not be older than all of these sources.
struct Bound<'a> {
    reason: &'static str,
    sources: Vec<Source<'a>>,
    /// This handle's queued removes are exempt.
    own_delete: Option<usize>,
}

impl<'a> Bound<'a> {
    fn new(reason: &'static str, sources: Vec<Source<'a>>) -> Self {
        Self { reason, sources, own_delete: None }
    }

    fn is_above(&self, history: &History, source: Source<'_>) -> bool {
        let is_exempt = match source {
            Source::Write(op) => {
                Some(op.handle) == self.own_delete
                    && op.write().is_some_and(|w| matches!(w.outcome, Outcome::Queued | Outcome::Unknown))
            }
            Source::Never => false,
        };
        !is_exempt && self.sources.iter().all(|bound| history.rules.is_older(source, *bound))
    }
}

/// Returns true if the source is a superseded write and `matters` accepts it.
fn is_superseded(source: Source<'_>, matters: impl Fn(&Op) -> bool) -> bool {
    match source {
        Source::Write(op) => op.write().is_some_and(|w| w.outcome == Outcome::Superseded) && matters(op),
        Source::Never => false,
    }
}

fn ended_before(op: &Op, read: &Op) -> bool {
    op.end.is_some_and(|end| end.tick < read.begin.tick)
}
