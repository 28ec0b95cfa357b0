//! Keys that are put, removed and replaced: each document names the one write that made it.

use super::Verdict;
use super::order::Source;
use crate::history::{Act, Claim, History, Moment, Op, Outcome, Reading, What};

/// An absence is remembered this long at most, however long presence is.
const ABSENT_MS: i64 = 2_000;
/// Milliseconds are cut off, not rounded.
const ROUNDING_MS: i64 = 3;

pub fn check(history: &History, key: usize) -> Verdict {
    let register = Register { history, key };
    for op in history.ops.iter().filter(|op| op.key == key) {
        match &op.act {
            Act::Read(Ok(reading)) => register.check_read(op, reading)?,
            Act::Read(Err(_)) => register.check_refusal(op)?,
            Act::Write(_) => {}
        }
    }
    register.check_final()
}

struct Register<'a> {
    history: &'a History,
    key: usize,
}

impl<'a> Register<'a> {
    /// Promises 3 to 6: what is read was written, has not expired, and is not older than what its reader may rely on.
    fn check_read(&self, op: &Op, reading: &Reading) -> Verdict {
        let Some(end) = op.end else { return Ok(()) };
        let sources = self.sources(reading.seen.as_deref(), end, op.off_ms);
        if sources.is_empty() {
            return Err(format!("shows what nobody wrote, or what was refused: {op}"));
        }
        self.check_expiry(&sources, op.begin, op.off_ms).map_err(|what| format!("{what}: {op}"))?;
        if sources
            .iter()
            .all(|source| is_superseded(*source, |w| w.handle == op.handle && ended_before(w, op)))
        {
            return Err(format!("shows what its own handle called superseded: {op}"));
        }
        let required = self.required(op, reading);
        let is_possible =
            |source: &&Source<'_>| required.iter().all(|bound| !bound.is_above(self.history, **source));
        if sources.iter().any(|source| is_possible(&source)) {
            return Ok(());
        }
        let bound = required.iter().find(|bound| sources.iter().any(|s| bound.is_above(self.history, *s)));
        let reason = bound.map_or_else(String::new, |bound| format!(" ({})", bound.reason));
        let what = if reading.seen.is_some() { "went back" } else { "an absence that was none" };
        Err(format!("{what}: {op}{reason}"))
    }

    /// Where a reading that ended by then may come from.
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
                                && (write.what == What::Remove || self.may_be_over(op, end, off_ms))
                        })
                };
                let gone = self.history.writes(self.key).filter(is_source).map(Source::Write);
                [Source::Never].into_iter().chain(gone).collect()
            }
        }
    }

    fn may_be_over(&self, op: &Op, at: Moment, off_ms: i64) -> bool {
        let slack = self.history.rules.clock_ms + off_ms.abs() + ROUNDING_MS;
        op.write().is_some_and(|write| op.begin.ms + write.ttl_ms - slack <= at.ms)
    }

    /// Promise 6: what is shown has not expired. Its life began when the put was called, and not after that returned.
    fn check_expiry(&self, sources: &[Source<'_>], at: Moment, off_ms: i64) -> Verdict {
        let slack = self.history.rules.clock_ms + off_ms.abs() + ROUNDING_MS;
        let is_over = |source: &Source<'_>| match source {
            Source::Write(Op { end: Some(end), act: Act::Write(write), .. })
                if write.what != What::Remove =>
            {
                at.ms > end.ms + write.ttl_ms + slack
            }
            _ => false,
        };
        match sources {
            [one] if is_over(one) => Err("shows what has expired".into()),
            _ => Ok(()),
        }
    }

    /// What a reader may rely on: what his handle acknowledged, what it showed, and, where the answer claims to be
    /// fresh, what anybody stored before that.
    fn required(&self, read: &Op, reading: &Reading) -> Vec<Bound<'a>> {
        let history = self.history;
        let mut bounds = Vec::new();
        let is_own = |op: &Op| op.handle == read.handle && ended_before(op, read);
        for op in history.writes(self.key).filter(|op| is_own(op) && history.is_kept(op)) {
            bounds.push(Bound::new("acknowledged before", vec![Source::Write(op)]));
        }
        for op in history.ops.iter().filter(|op| op.key == self.key && op.life == read.life && is_own(op)) {
            let (Act::Read(Ok(earlier)), Some(end)) = (&op.act, op.end) else { continue };
            let sources = self.sources(earlier.seen.as_deref(), end, op.off_ms);
            let is_exempt = |s: &Source<'_>| matches!(s, Source::Write(op) if history.is_dead(op));
            if !sources.iter().any(is_exempt) {
                bounds.push(Bound::new("shown before", sources));
            }
        }
        let window = match reading.claim {
            Claim::Fresh => history.rules.fresh_ms,
            Claim::Absent => history.rules.fresh_ms.min(ABSENT_MS),
            Claim::Stale | Claim::Queued => return bounds,
        };
        let is_known = |op: &&Op| {
            op.write().is_some_and(|write| write.outcome == Outcome::Stored)
                && op.end.is_some_and(|end| end.ms + window + ROUNDING_MS < read.begin.ms)
        };
        for op in history.writes(self.key).filter(is_known) {
            // A queued deletion is an answer, too, whatever others have done meanwhile.
            let own_delete = (reading.claim == Claim::Absent).then_some(read.handle);
            bounds.push(Bound { own_delete, ..Bound::new("stored long ago", vec![Source::Write(op)]) });
        }
        bounds
    }

    /// Promise 2: what this handle wrote, and nobody touched since, can be read in any outage.
    fn check_refusal(&self, read: &Op) -> Verdict {
        let history = self.history;
        if !history.rules.replica_keeps_all {
            return Ok(());
        }
        let is_known = |op: &&Op| {
            op.handle == read.handle
                && ended_before(op, read)
                && !history.is_dead(op)
                && op.write().is_some_and(|write| {
                    matches!(write.outcome, Outcome::Stored | Outcome::Queued) && write.what != What::Remove
                })
                && read.end.is_some_and(|end| !self.may_be_over(op, end, read.off_ms))
        };
        let is_quiet = |known: &&Op| {
            let touches = |op: &&Op| op.write().is_some_and(|w| !matches!(w.outcome, Outcome::Failed(_)));
            history
                .writes(self.key)
                .filter(touches)
                .all(|op| std::ptr::eq(op, *known) || history.rules.is_before(op, known))
        };
        let is_closed = matches!(&read.act, Act::Read(Err(kind)) if *kind == threadkeep::ErrorKind::Closed);
        match history.writes(self.key).filter(is_known).find(is_quiet) {
            Some(known) if !is_closed => {
                Err(format!("a thread that is known was not served: {read}, after {known}"))
            }
            _ => Ok(()),
        }
    }

    /// Promises 1 and 4: in the end the store holds a write that nothing kept comes after.
    fn check_final(&self) -> Verdict {
        let history = self.history;
        let Some(last) = history.finals.iter().find(|last| last.key == self.key) else { return Ok(()) };
        let sources = self.sources(last.seen.as_deref(), last.at, 0);
        if sources.is_empty() {
            return Err(format!("in the end there is what nobody wrote, or what was refused: {last:?}"));
        }
        if sources.iter().all(|source| is_superseded(*source, |_| true)) {
            return Err(format!("in the end there is what was called superseded: {last:?}"));
        }
        self.check_expiry(&sources, last.at, 0).map_err(|what| format!("the database {what}: {last:?}"))?;
        let beats = |source: Source<'_>| {
            let kept = history.writes(self.key).filter(|op| history.is_kept(op));
            kept.into_iter().find(|op| history.rules.is_older(source, Source::Write(op)))
        };
        match sources.iter().map(|source| beats(*source)).collect::<Option<Vec<_>>>() {
            Some(beaten) => Err(format!("an acknowledged write is lost: {last:?}, but {}", beaten[0])),
            None => Ok(()),
        }
    }
}

/// A reading may not be older than all of these.
struct Bound<'a> {
    reason: &'static str,
    sources: Vec<Source<'a>>,
    /// Deletions that this handle queued are exempt.
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

/// Whether this is a write of which its handle said that there is something newer, in a case that matters.
fn is_superseded(source: Source<'_>, matters: impl Fn(&Op) -> bool) -> bool {
    match source {
        Source::Write(op) => op.write().is_some_and(|w| w.outcome == Outcome::Superseded) && matters(op),
        Source::Never => false,
    }
}

fn ended_before(op: &Op, read: &Op) -> bool {
    op.end.is_some_and(|end| end.tick < read.begin.tick)
}
