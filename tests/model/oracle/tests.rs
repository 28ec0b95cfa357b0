//! Histories written by hand. The oracle must report each violation and nothing else.

use threadkeep::ErrorKind;

use super::{note_drift, violation};
use crate::history::Outcome::{Failed, Queued, Stored, Superseded, Unknown};
use crate::history::WriteKind::{Add, Append, Put, Remove, Replace};
use crate::history::{
    Claim, DeadWrite, Drift, FileChange, FinalState, History, Jump, Moment, Op, OpKind, Outcome, Reading,
    Rules, WriteKind, WriteOp,
};

const REGISTER: usize = 0;
const LOG: usize = 1;
const CHAT: usize = 2;
const LONG: i64 = 1_000_000;

fn at(ms: i64) -> Moment {
    Moment { tick: u64::try_from(ms).unwrap(), ms }
}

/// Returns an operation of handle 0 or 1 between two milliseconds.
fn op(handle: usize, begin: i64, end: i64, key: usize, kind: OpKind) -> Op {
    Op {
        handle,
        life: 0,
        key,
        begin: at(begin),
        end: Some(at(end)),
        off_ms: 0,
        drift: Drift::default(),
        kind,
    }
}

fn write(handle: usize, begin: i64, end: i64, kind: WriteKind, id: u64, outcome: Outcome) -> Op {
    let key = if matches!(kind, Append | Add) { LOG } else { REGISTER };
    op(handle, begin, end, key, OpKind::Write(WriteOp { id, kind, ttl_ms: LONG, outcome }))
}

fn short_lived(handle: usize, begin: i64, end: i64, id: u64, ttl_ms: i64) -> Op {
    op(handle, begin, end, REGISTER, OpKind::Write(WriteOp { id, kind: Put, ttl_ms, outcome: Stored }))
}

fn get(handle: usize, begin: i64, end: i64, claim: Claim, id: u64) -> Op {
    op(handle, begin, end, REGISTER, OpKind::Read(Ok(Reading { seen: Some(vec![id]), claim })))
}

fn absent(handle: usize, begin: i64, end: i64) -> Op {
    op(handle, begin, end, REGISTER, OpKind::Read(Ok(Reading { seen: None, claim: Claim::Absent })))
}

fn log(handle: usize, begin: i64, end: i64, claim: Claim, ids: &[u64]) -> Op {
    op(handle, begin, end, LOG, OpKind::Read(Ok(Reading { seen: Some(ids.to_vec()), claim })))
}

fn in_life(life: u32, op: Op) -> Op {
    Op { life, ..op }
}

fn history(ops: impl IntoIterator<Item = Op>) -> History {
    let rules = Rules { order_ms: 5, clock_ms: 5, fresh_ms: 100, registers: 1, logs: 2, ..Rules::default() };
    History { ops: ops.into_iter().collect(), rules, ..History::default() }
}

impl History {
    fn ending_with(mut self, key: usize, ids: &[u64]) -> Self {
        let seen = (!ids.is_empty()).then(|| ids.to_vec());
        self.finals.push(FinalState { key, seen, at: at(50_000) });
        self
    }

    fn dead(mut self, handle: usize, key: usize, ids: &[u64]) -> Self {
        self.dead_letters.push(DeadWrite { handle, key, ids: ids.to_vec(), is_add: false });
        self
    }

    fn dead_append(mut self, handle: usize, key: usize, id: u64) -> Self {
        self.dead_letters.push(DeadWrite { handle, key, ids: vec![id], is_add: true });
        self
    }

    fn changed(mut self, change: FileChange) -> Self {
        self.file_changes.push(change);
        self
    }

    #[track_caller]
    fn assert_accepted(self) {
        assert_eq!(violation(&self), None);
    }

    #[track_caller]
    fn assert_violation(self, why: &str) {
        let (_, violation) = violation(&self).expect("the oracle reports no violation");
        assert!(violation.contains(why), "{violation}");
    }
}

#[test]
fn final_document_must_be_the_last_acknowledged_write() {
    for (outcome, id) in
        [(Stored, 2), (Queued, 2), (Unknown, 1), (Unknown, 2), (Failed(ErrorKind::Overloaded), 1)]
    {
        let ops = || [write(0, 1, 2, Put, 1, Stored), write(0, 3, 4, Put, 2, outcome)];
        history(ops()).ending_with(REGISTER, &[id]).assert_accepted();
    }
    for (outcome, id) in [(Stored, 1), (Queued, 1), (Superseded, 1)] {
        let ops = || [write(0, 1, 2, Put, 1, Stored), write(0, 3, 4, Put, 2, outcome)];
        history(ops()).ending_with(REGISTER, &[id]).assert_violation("an acknowledged write is lost");
        history(ops()).ending_with(REGISTER, &[]).assert_violation("an acknowledged write is lost");
    }
    let refused = [write(0, 1, 2, Put, 1, Failed(ErrorKind::Overloaded))];
    history(refused).ending_with(REGISTER, &[1]).assert_violation("a rejected write");
    history([write(0, 1, 2, Put, 1, Superseded)]).ending_with(REGISTER, &[1]).assert_violation("superseded");
}

#[test]
fn final_document_may_be_either_of_overlapping_writes() {
    for id in [1, 2] {
        let overlapping = [write(0, 1, 4, Put, 1, Stored), write(0, 3, 6, Put, 2, Stored)];
        history(overlapping).ending_with(REGISTER, &[id]).assert_accepted();
        let close = [write(0, 1, 2, Put, 1, Stored), write(1, 6, 8, Put, 2, Queued)];
        history(close).ending_with(REGISTER, &[id]).assert_accepted();
    }
    let apart = || [write(0, 1, 2, Put, 1, Stored), write(1, 9, 10, Put, 2, Stored)];
    history(apart()).ending_with(REGISTER, &[2]).assert_accepted();
    history(apart()).ending_with(REGISTER, &[1]).assert_violation("lost");
    let restarted = [write(0, 1, 2, Put, 1, Queued), in_life(1, write(0, 9, 10, Put, 2, Queued))];
    history(restarted).ending_with(REGISTER, &[1]).assert_violation("lost");
}

#[test]
fn abandoned_write_may_be_stored_late() {
    let abandoned = Op { end: None, ..write(0, 1, 2, Put, 1, Unknown) };
    let ops = || [abandoned.clone(), write(0, 30, 40, Put, 2, Stored)];
    history(ops()).ending_with(REGISTER, &[1]).assert_accepted();
    history(ops()).ending_with(REGISTER, &[2]).assert_accepted();
    // A write that failed before the other write began has an older version.
    let failed = [write(0, 1, 2, Put, 1, Unknown), write(0, 30, 40, Put, 2, Stored)];
    history(failed).ending_with(REGISTER, &[1]).assert_violation("lost");
}

#[test]
fn versions_after_an_opening_may_be_ahead() {
    let ops = |begin| [write(0, 1, 2, Put, 1, Stored), write(1, begin, begin + 1, Put, 2, Superseded)];
    let ends = |begin, openings: &[i64]| {
        let mut history = history(ops(begin)).ending_with(REGISTER, &[1]);
        history.rules.mark_starts_ms = openings.to_vec();
        history
    };
    ends(500, &[1]).assert_accepted();
    ends(500, &[]).assert_violation("lost");
    ends(500, &[3]).assert_violation("lost");
    ends(1_100, &[1]).assert_violation("lost");
}

#[test]
fn final_document_before_a_remove_is_violation() {
    let ops = || [write(0, 1, 2, Put, 1, Stored), write(0, 3, 4, Remove, 2, Stored)];
    history(ops()).ending_with(REGISTER, &[]).assert_accepted();
    history(ops()).ending_with(REGISTER, &[1]).assert_violation("lost");
    let [put, remove] = ops();
    history([put, remove, get(0, 5, 6, Claim::Fresh, 1)]).assert_violation("shows an older write");
}

#[test]
fn read_older_than_earlier_results_of_handle_is_violation() {
    let two = || [write(0, 1, 2, Put, 1, Stored), write(0, 3, 4, Put, 2, Queued)];
    for claim in [Claim::Fresh, Claim::Stale, Claim::Queued] {
        history(two().into_iter().chain([get(0, 5, 6, claim, 1)])).assert_violation("shows an older write");
        history(two().into_iter().chain([get(0, 5, 6, claim, 2)])).assert_accepted();
        // While the second write runs, a read may show either.
        history(two().into_iter().chain([get(0, 4, 6, claim, 1)])).assert_accepted();
    }
    let seen = |later| {
        [
            write(0, 1, 2, Put, 1, Stored),
            write(0, 9, 99, Put, 2, Unknown),
            get(1, 10, 11, Claim::Stale, 2),
            later,
        ]
    };
    history(seen(get(1, 12, 13, Claim::Stale, 1))).assert_violation("shown before");
    history(seen(get(0, 12, 13, Claim::Stale, 1))).assert_accepted();
    history(seen(get(1, 10, 13, Claim::Stale, 1))).assert_accepted();
    history(seen(in_life(1, get(1, 12, 13, Claim::Stale, 1)))).assert_accepted();
    history(seen(absent(1, 12, 13))).assert_violation("unjustified absence");
}

#[test]
fn read_older_than_writes_before_restart_is_violation() {
    let two = [write(0, 1, 2, Put, 1, Stored), write(0, 13, 14, Put, 2, Queued)];
    let read = |id| in_life(1, get(0, 25, 26, Claim::Queued, id));
    history(two.clone().into_iter().chain([read(2)])).assert_accepted();
    history(two.into_iter().chain([read(1)])).assert_violation("acknowledged before");
}

#[test]
fn read_older_than_superseded_write_is_violation() {
    let ops = |later| [write(1, 1, 2, Put, 1, Stored), write(0, 10, 60, Put, 2, Superseded), later];
    history(ops(get(0, 70, 71, Claim::Stale, 1))).assert_violation("shows an older write");
    history(ops(get(0, 70, 71, Claim::Stale, 2))).assert_violation("its own handle reported as superseded");
    // If its response was lost, the superseded write may have been stored for a while.
    history(ops(get(1, 70, 71, Claim::Stale, 2))).assert_accepted();
}

#[test]
fn fresh_read_older_than_freshness_window_is_violation() {
    let ops = |begin, claim| {
        [write(0, 1, 2, Put, 1, Stored), write(0, 20, 30, Put, 2, Stored), get(1, begin, begin + 1, claim, 1)]
    };
    history(ops(130, Claim::Fresh)).assert_accepted();
    history(ops(140, Claim::Fresh)).assert_violation("stored long ago");
    history(ops(140, Claim::Stale)).assert_accepted();
}

#[test]
fn absence_without_remove_or_expiry_is_violation() {
    history([absent(0, 1, 2), write(0, 1, 5, Put, 1, Stored), absent(0, 3, 6)]).assert_accepted();
    history([write(0, 1, 2, Put, 1, Stored), absent(0, 3, 4)]).assert_violation("unjustified absence");
    history([write(0, 1, 2, Put, 1, Stored), absent(1, 3, 4)]).assert_accepted();
    history([write(0, 1, 2, Put, 1, Stored), absent(1, 200, 201)]).assert_violation("stored long ago");
    history([write(0, 1, 2, Put, 1, Stored), write(1, 2, 3, Remove, 2, Unknown), absent(0, 4, 5)])
        .assert_accepted();
    let failed = write(1, 2, 3, Remove, 2, Failed(ErrorKind::Overloaded));
    history([write(0, 1, 2, Put, 1, Stored), failed, absent(0, 4, 5)])
        .assert_violation("unjustified absence");
    let delete = || [write(0, 1, 2, Remove, 1, Queued), write(1, 20, 30, Put, 2, Stored)];
    history(delete().into_iter().chain([absent(0, 300, 301)])).assert_accepted();
    history(delete().into_iter().chain([absent(1, 300, 301)])).assert_violation("unjustified absence");
}

#[test]
fn read_after_expiry_or_absence_before_it_is_violation() {
    history([short_lived(0, 10, 20, 1, 300), get(0, 320, 330, Claim::Stale, 1)]).assert_accepted();
    history([short_lived(0, 10, 20, 1, 300), get(0, 340, 350, Claim::Stale, 1)])
        .assert_violation("an expired write");
    let read_by_wrong_clock = Op { off_ms: 1_000, ..get(0, 340, 350, Claim::Stale, 1) };
    history([short_lived(0, 10, 20, 1, 300), read_by_wrong_clock]).assert_accepted();
    history([short_lived(0, 10, 20, 1, 300), absent(0, 300, 310)]).assert_accepted();
    history([short_lived(0, 10, 20, 1, 300), absent(0, 200, 290)]).assert_violation("unjustified absence");
    history([short_lived(0, 10, 20, 1, 300)]).ending_with(REGISTER, &[]).assert_accepted();
    history([short_lived(0, 10, 20, 1, 300)])
        .ending_with(REGISTER, &[1])
        .assert_violation("the database shows an expired write");
    // Another write renews the expiry.
    let renewed = || [short_lived(0, 10, 20, 1, 300), write(1, 100, 110, Put, 2, Stored)];
    history(renewed()).ending_with(REGISTER, &[]).assert_violation("lost");
    history(renewed().into_iter().chain([absent(0, 700, 701)])).assert_violation("unjustified absence");
}

#[test]
fn dead_letter_without_queued_loser_is_violation() {
    let ops = |other| [write(0, 10, 20, Put, 1, Queued), other];
    let later = || write(1, 30, 40, Put, 2, Stored);
    history(ops(later())).dead(0, REGISTER, &[1]).ending_with(REGISTER, &[2]).assert_accepted();
    history(ops(write(1, 1, 2, Put, 2, Stored)))
        .dead(0, REGISTER, &[1])
        .assert_violation("without a competing write");
    // A clock that resumes from its checkpoint has a small error.
    let off = |off_ms| Op { off_ms, ..write(1, 1, 2, Put, 2, Stored) };
    history(ops(off(10))).dead(0, REGISTER, &[1]).ending_with(REGISTER, &[2]).assert_accepted();
    history(ops(off(2))).dead(0, REGISTER, &[1]).assert_violation("without a competing write");
    history(ops(write(0, 30, 40, Put, 2, Stored)))
        .dead(0, REGISTER, &[1])
        .assert_violation("without a competing write");
    history(ops(write(1, 30, 40, Put, 2, Failed(ErrorKind::Overloaded))))
        .dead(0, REGISTER, &[1])
        .assert_violation("without a competing write");
    history(ops(later())).dead(0, REGISTER, &[2]).assert_violation("without a queued write");
    history([write(0, 10, 20, Put, 1, Stored), later()])
        .dead(0, REGISTER, &[1])
        .assert_violation("without a queued write");
    // A write may lose to a concurrent update of its own handle, but not to a later one.
    let with_own_update = |at| [write(0, 10, 20, Put, 1, Queued), write(0, at, 40, Replace, 2, Stored)];
    history(with_own_update(15)).dead(0, REGISTER, &[1]).ending_with(REGISTER, &[2]).assert_accepted();
    history(with_own_update(30)).dead(0, REGISTER, &[1]).assert_violation("without a competing write");
    // A write may lose to a write of an earlier life, if the order of the two is unknown.
    let in_two_lives = |at| [write(0, 1, 8, Put, 1, Stored), in_life(1, write(0, at, 40, Put, 2, Queued))];
    history(in_two_lives(10)).dead(0, REGISTER, &[2]).ending_with(REGISTER, &[1]).assert_accepted();
    history(in_two_lives(30)).dead(0, REGISTER, &[2]).assert_violation("without a competing write");
    // An update also loses to an earlier write that its handle did not know.
    let update = || [write(1, 1, 2, Put, 2, Stored), write(0, 10, 20, Replace, 1, Queued)];
    history(update()).dead(0, REGISTER, &[1]).ending_with(REGISTER, &[2]).assert_accepted();
    history(update()).ending_with(REGISTER, &[2]).assert_violation("lost");
    // The dead letter of an update contains the updates before it, but not a put.
    let chain = |kind| {
        [
            write(1, 1, 2, Put, 3, Stored),
            write(0, 10, 20, kind, 1, Queued),
            write(0, 30, 40, Replace, 2, Queued),
        ]
    };
    history(chain(Replace)).dead(0, REGISTER, &[2]).ending_with(REGISTER, &[3]).assert_accepted();
    history(chain(Put)).dead(0, REGISTER, &[2]).ending_with(REGISTER, &[3]).assert_violation("lost");
    // A dead letter is exempt from promise 5.
    let [put, other] = ops(later());
    let reads = [get(0, 21, 22, Claim::Queued, 1), get(0, 50, 51, Claim::Fresh, 2)];
    history([put, other].into_iter().chain(reads))
        .dead(0, REGISTER, &[1])
        .ending_with(REGISTER, &[2])
        .assert_accepted();
}

#[test]
fn dead_letter_of_remove_is_matched_by_its_key() {
    let ops = [write(0, 10, 20, Remove, 1, Queued), write(1, 15, 40, Put, 2, Stored)];
    history(ops.clone()).dead(0, REGISTER, &[]).ending_with(REGISTER, &[2]).assert_accepted();
    history([ops[1].clone()]).dead(0, REGISTER, &[]).assert_violation("without a queued write");
}

#[test]
fn outage_error_for_known_conversation_is_violation() {
    let outage = |begin| op(0, begin, begin + 1, REGISTER, OpKind::Read(Err(ErrorKind::Unavailable)));
    let with_full_replica = |ops: &[Op]| {
        let mut history = history(ops.iter().cloned());
        history.rules.replica_keeps_all = true;
        history
    };
    let put = write(0, 1, 2, Put, 1, Queued);
    history([put.clone(), outage(10)]).assert_accepted();
    with_full_replica(&[put.clone(), outage(10)]).assert_violation("not served");
    with_full_replica(&[put.clone(), in_life(1, outage(10))]).assert_violation("not served");
    // The handle does not have the write that won.
    let lost = [write(1, 0, 1, Put, 2, Stored), write(0, 10, 11, Replace, 1, Queued), outage(20)];
    with_full_replica(&lost).dead(0, REGISTER, &[1]).assert_accepted();
    with_full_replica(&lost).assert_violation("not served");
    with_full_replica(&[put.clone(), write(0, 3, 4, Put, 2, Unknown), outage(10)]).assert_accepted();
    with_full_replica(&[put.clone(), write(1, 3, 14, Put, 2, Stored), outage(10)]).assert_accepted();
    with_full_replica(&[short_lived(0, 1, 2, 1, 10), outage(12)]).assert_accepted();
    with_full_replica(&[write(0, 1, 2, Remove, 1, Queued), outage(10)]).assert_accepted();
}

#[test]
fn log_without_each_update_once_in_order_is_violation() {
    let ops = || [write(0, 1, 2, Append, 1, Stored), write(1, 9, 10, Append, 2, Stored)];
    history(ops()).ending_with(LOG, &[1, 2]).assert_accepted();
    history(ops()).ending_with(LOG, &[1]).assert_violation("an acknowledged update is lost");
    history(ops()).ending_with(LOG, &[1, 2, 1]).assert_violation("twice");
    history(ops()).ending_with(LOG, &[2, 1]).assert_violation("stands before");
    history(ops()).ending_with(LOG, &[1, 2, 3]).assert_violation("no caller made");
    let [one, two] = ops();
    let failed = write(0, 20, 21, Append, 3, Failed(ErrorKind::Conflict));
    history([one.clone(), two.clone(), failed])
        .ending_with(LOG, &[1, 2, 3])
        .assert_violation("the store rejected");
    let unknown = || write(0, 20, 21, Append, 3, Unknown);
    history([one.clone(), two.clone(), unknown()]).ending_with(LOG, &[1, 2, 3]).assert_accepted();
    history([one.clone(), two.clone(), unknown()]).ending_with(LOG, &[1, 2]).assert_accepted();
    history([one, two, write(0, 20, 21, Append, 3, Superseded)]).assert_violation("no error");
}

#[test]
fn log_without_queued_update_needs_its_dead_letter() {
    let ops = || [write(0, 1, 2, Append, 1, Queued), write(1, 9, 10, Append, 2, Stored)];
    history(ops()).ending_with(LOG, &[2]).assert_violation("lost");
    history(ops()).ending_with(LOG, &[2]).dead(0, LOG, &[1]).assert_accepted();
    history(ops()).ending_with(LOG, &[2, 1]).assert_accepted();
    history(ops()).ending_with(LOG, &[2]).dead(0, LOG, &[2, 1]).assert_violation("without a competing write");
    let own = [write(0, 1, 2, Append, 1, Queued), write(0, 9, 10, Append, 2, Stored)];
    history(own).ending_with(LOG, &[2]).dead(0, LOG, &[1]).assert_violation("without a competing write");
}

#[test]
fn log_read_without_required_update_is_violation() {
    let ops = |read| [write(0, 1, 2, Append, 1, Stored), write(1, 9, 10, Append, 2, Stored), read];
    history(ops(log(0, 11, 12, Claim::Stale, &[1]))).assert_accepted();
    history(ops(log(1, 11, 12, Claim::Stale, &[1]))).assert_violation("acknowledged before");
    history(ops(log(0, 200, 201, Claim::Fresh, &[1]))).assert_violation("stored long ago");
    history(ops(log(0, 11, 12, Claim::Fresh, &[1, 2, 2]))).assert_violation("twice");
    let mut twice = ops(log(0, 11, 12, Claim::Stale, &[1, 2])).to_vec();
    twice.push(log(0, 13, 14, Claim::Stale, &[1]));
    history(twice).assert_violation("shown before");
}

#[test]
fn unacknowledged_update_may_be_undone_by_next_life() {
    let abandoned = || Op { end: None, ..write(0, 1, 2, Append, 1, Unknown) };
    let reads = || [log(1, 5, 6, Claim::Fresh, &[1]), log(1, 50, 51, Claim::Fresh, &[2])];
    let ops = |next| [abandoned(), next].into_iter().chain(reads());
    history(ops(in_life(1, write(0, 20, 21, Append, 2, Queued)))).assert_accepted();
    history(ops(write(0, 20, 21, Append, 2, Queued))).assert_violation("shown before");
    history(ops(in_life(1, write(0, 20, 21, Append, 2, Stored)))).assert_violation("shown before");
    let known = [write(0, 1, 2, Append, 1, Stored), in_life(1, write(0, 20, 21, Append, 2, Queued))];
    history(known.into_iter().chain(reads())).assert_violation("shown before");
}

#[test]
fn error_of_unjustified_kind_is_violation() {
    history([write(0, 1, 2, Put, 1, Failed(ErrorKind::Unavailable))]).assert_accepted();
    history([write(0, 1, 2, Put, 1, Failed(ErrorKind::Conflict))]).assert_violation("unjustified error");
    history([write(0, 1, 2, Replace, 1, Failed(ErrorKind::Conflict))]).assert_accepted();
    history([write(0, 1, 2, Put, 1, Failed(ErrorKind::LocalStorage))]).assert_violation("unjustified error");
}

/// Returns an operation on the chat.
fn chat(handle: usize, begin: i64, kind: WriteKind, id: u64, outcome: Outcome) -> Op {
    Op { key: CHAT, ..write(handle, begin, begin + 1, kind, id, outcome) }
}

#[test]
fn append_is_there_once_in_order_unless_a_newer_put_wins() {
    let ops = || [chat(0, 10, Put, 1, Stored), chat(0, 20, Add, 2, Queued), chat(1, 30, Add, 3, Stored)];
    for seen in [[1, 2, 3], [1, 3, 2]] {
        history(ops()).ending_with(CHAT, &seen).assert_accepted();
    }
    history(ops()).ending_with(CHAT, &[1, 3]).assert_violation("an acknowledged update is lost");
    history(ops()).ending_with(CHAT, &[1, 2, 3, 2]).assert_violation("twice");
    history(ops()).ending_with(CHAT, &[2, 1, 3]).assert_violation("stands before");
    history(ops()).ending_with(CHAT, &[1, 3]).dead_append(0, CHAT, 2).assert_violation("without a competing");
    let then = |kind, outcome| history(ops().into_iter().chain([chat(1, 40, kind, 4, outcome)]));
    then(Put, Stored).ending_with(CHAT, &[4]).assert_accepted();
    then(Put, Stored).ending_with(CHAT, &[4]).dead_append(0, CHAT, 2).assert_accepted();
    then(Put, Stored).ending_with(CHAT, &[4, 2]).assert_violation("older than");
    then(Put, Unknown).ending_with(CHAT, &[1, 2, 3]).assert_accepted();
    then(Remove, Stored).ending_with(CHAT, &[]).assert_accepted();
    then(Remove, Stored).ending_with(CHAT, &[2]).assert_violation("older than");
    then(Add, Superseded).ending_with(CHAT, &[1, 2, 3]).assert_violation("superseded by nothing");
}

#[test]
fn queued_put_may_lose_before_another_put_takes_its_place() {
    let put = chat(0, 10, Put, 1, Queued);
    let append = Op { begin: at(5), ..chat(1, 10, Add, 2, Stored) };
    let read = |handle| Op { key: CHAT, ..log(handle, 20, 21, Claim::Fresh, &[2]) };
    let later = chat(0, 30, Put, 3, Queued);
    let with = |ops: &[&Op]| history(ops.iter().copied().cloned()).ending_with(CHAT, &[3]);
    with(&[&put, &append, &read(0), &later]).assert_accepted();
    with(&[&put, &append, &read(0)]).assert_violation("acknowledged before");
    with(&[&put, &read(0), &later]).assert_violation("which no caller made");
    let before = Op { begin: at(1), end: Some(at(2)), ..append };
    with(&[&put, &before, &read(0), &later]).assert_violation("older than");
    let remove = chat(0, 10, Remove, 1, Queued);
    let [first, second] = [chat(1, 1, Put, 4, Stored), chat(1, 10, Add, 2, Stored)];
    let shown = Op { key: CHAT, ..log(0, 20, 21, Claim::Stale, &[4, 2]) };
    with(&[&first, &remove, &second, &shown, &later]).assert_accepted();
    with(&[&first, &remove, &second, &shown]).assert_violation("older than");
}

#[test]
fn provisional_append_of_a_copied_file_may_be_doubled() {
    let ends = |jumps: &[Jump]| {
        let mut ops = [chat(0, 5, Add, 2, Stored), chat(0, 10, Add, 1, Queued)];
        note_drift(&mut ops, jumps, &[]);
        history(ops).ending_with(CHAT, &[2, 1, 1])
    };
    let jump = [Jump { at_ms: 8, by_ms: 1_000 }];
    ends(&jump).changed(restored_from(0)).assert_accepted();
    ends(&jump).changed(DELETED).assert_violation("twice");
    ends(&jump).assert_violation("twice");
    // Without a jump, the version is final.
    ends(&[]).changed(restored_from(0)).assert_violation("twice");
}

#[test]
fn queued_update_of_a_copied_file_may_be_taken_for_repeated() {
    let ops = || [write(0, 10, 11, Append, 1, Queued), write(0, 30, 31, Add, 2, Stored)];
    history(ops()).ending_with(LOG, &[2]).assert_violation("lost");
    history(ops()).ending_with(LOG, &[2]).changed(restored_from(0)).assert_accepted();
    let [_, append] = ops();
    let queued = write(0, 10, 11, Add, 1, Queued);
    let appends = |jumps: &[Jump]| {
        let mut ops = [write(0, 1, 2, Add, 3, Stored), queued.clone(), append.clone()];
        note_drift(&mut ops, jumps, &[]);
        history(ops).ending_with(LOG, &[3, 2]).changed(restored_from(0))
    };
    appends(&[]).assert_violation("lost");
    // The copy may give a provisional append a lower version than the file before.
    appends(&[Jump { at_ms: 8, by_ms: 1_000 }]).assert_accepted();
}

#[test]
fn read_of_a_chat_shows_appends_after_the_last_put_only() {
    let ops = || [chat(0, 10, Add, 1, Stored), chat(0, 20, Put, 2, Stored), chat(0, 30, Add, 3, Queued)];
    let with = |seen: &[u64]| {
        let read = Op { key: CHAT, ..log(0, 40, 41, Claim::Queued, seen) };
        history(ops().into_iter().chain([read]))
    };
    with(&[2, 3]).assert_accepted();
    with(&[2]).assert_violation("acknowledged before");
    with(&[3]).assert_violation("acknowledged before");
    with(&[1, 2, 3]).assert_violation("older than");
    with(&[]).assert_violation("acknowledged before");
}

/// Handle 0 was down from 50 to 60 ms. At 50 ms its file was replaced by the copy of this handle's file from 20 ms.
fn restored_from(handle: usize) -> FileChange {
    FileChange { handle: 0, at: at(60), source: Some((handle, at(20))) }
}

const DELETED: FileChange = FileChange { handle: 0, at: Moment { tick: 60, ms: 60 }, source: None };

#[test]
fn queued_write_after_the_copy_is_lost_with_the_file() {
    let ops = |begin| [write(0, 1, 2, Put, 1, Stored), write(0, begin, begin + 1, Put, 2, Queued)];
    for change in [restored_from(0), restored_from(1), DELETED] {
        history(ops(30)).ending_with(REGISTER, &[1]).changed(change).assert_accepted();
        history(ops(30)).ending_with(REGISTER, &[2]).changed(change).assert_accepted();
        // The copy does not touch writes that come later, or that the store has.
        history(ops(70)).ending_with(REGISTER, &[1]).changed(change).assert_violation("lost");
        let [_, stored] = ops(30).map(|op| Op { kind: write(0, 0, 0, Put, 2, Stored).kind, ..op });
        history([ops(30)[0].clone(), stored])
            .ending_with(REGISTER, &[1])
            .changed(change)
            .assert_violation("lost");
    }
    // A copy keeps the writes that were queued before it.
    history(ops(10)).ending_with(REGISTER, &[1]).changed(restored_from(0)).assert_violation("lost");
    history(ops(10)).ending_with(REGISTER, &[1]).changed(restored_from(1)).assert_accepted();
    history(ops(10)).ending_with(REGISTER, &[1]).changed(DELETED).assert_accepted();
    let of_other_handle = ops(30).map(|op| Op { handle: 1, ..op });
    history(of_other_handle).ending_with(REGISTER, &[1]).changed(DELETED).assert_violation("lost");
    let queued = [write(0, 1, 2, Append, 1, Stored), write(0, 30, 31, Append, 2, Queued)];
    history(queued.clone()).ending_with(LOG, &[1]).changed(DELETED).assert_accepted();
    history(queued).ending_with(LOG, &[1]).assert_violation("lost");
    // The file may have had the dead letter of an update whose caller gave up.
    let unknown = write(0, 30, 31, Append, 2, Unknown);
    let reads = [log(0, 35, 36, Claim::Queued, &[2]), log(0, 40, 41, Claim::Fresh, &[])];
    let shown = || history([unknown.clone()].into_iter().chain(reads.clone()));
    shown().changed(DELETED).assert_accepted();
    shown().assert_violation("shown before");
}

#[test]
fn restored_file_may_show_copies_of_its_time() {
    let two = || [write(0, 1, 2, Put, 1, Stored), write(0, 30, 31, Put, 2, Stored)];
    let read = |begin, claim| in_life(1, get(0, begin, begin + 1, claim, 1));
    let with = |read| history(two().into_iter().chain([read]));
    with(read(70, Claim::Stale)).changed(restored_from(0)).assert_accepted();
    with(read(70, Claim::Stale)).assert_violation("acknowledged before");
    with(read(200, Claim::Fresh)).changed(restored_from(0)).assert_violation("stored long ago");
    with(in_life(1, absent(0, 70, 71))).changed(restored_from(0)).assert_violation("acknowledged before");
    with(in_life(1, absent(0, 70, 71))).changed(DELETED).assert_accepted();
    with(in_life(1, absent(0, 200, 201))).changed(DELETED).assert_violation("stored long ago");
    // The file has the copy of a write before its time.
    let outage = |op| in_life(1, Op { kind: OpKind::Read(Err(ErrorKind::Unavailable)), ..op });
    let refused = |change: FileChange| {
        let put = write(0, 1, 2, Put, 1, Queued);
        let mut history = history([put, outage(get(0, 70, 71, Claim::Stale, 1))]).changed(change);
        history.rules.replica_keeps_all = true;
        history
    };
    refused(restored_from(0)).assert_violation("not served");
    refused(restored_from(1)).assert_accepted();
    refused(DELETED).assert_accepted();
}

#[test]
fn dead_letter_of_restored_file_may_lose_to_own_write() {
    let ops = || [write(0, 10, 11, Put, 1, Queued), write(0, 30, 31, Put, 2, Stored)];
    let dead = |handle, ops: [Op; 2]| history(ops).dead(handle, REGISTER, &[1]).ending_with(REGISTER, &[2]);
    dead(0, ops()).assert_violation("without a competing write");
    dead(0, ops()).changed(restored_from(0)).assert_accepted();
    // A write after the change is no excuse.
    let [put, later] = ops();
    let later = in_life(1, Op { begin: at(70), end: Some(at(71)), ..later });
    dead(0, [put.clone(), later]).changed(restored_from(0)).assert_violation("without a competing write");
    // The file of handle 0 came from handle 1, with the queued writes of handle 1.
    let of_other_handle = || ops().map(|op| Op { handle: 1, ..op });
    dead(0, of_other_handle()).changed(restored_from(1)).assert_accepted();
    dead(0, of_other_handle()).changed(restored_from(0)).assert_violation("without a queued write");
    dead(1, of_other_handle()).changed(restored_from(1)).assert_violation("without a competing write");
}

#[test]
fn write_that_is_sent_again_is_not_applied_again() {
    let ops = [write(0, 1, 2, Append, 1, Queued), write(0, 30, 31, Append, 2, Stored)];
    let ends = |seen: &[u64]| history(ops.clone()).ending_with(LOG, seen).changed(restored_from(0));
    ends(&[1, 2, 1]).assert_violation("twice");
    ends(&[2, 1]).assert_violation("stands before");
    ends(&[1]).assert_violation("lost");
    ends(&[1, 2]).assert_accepted();
}

#[test]
fn plain_sql_counts_as_the_write_of_another_handle() {
    const SQL: usize = 2;
    let ops = || [write(0, 1, 2, Put, 1, Stored), write(SQL, 20, 21, Remove, 2, Stored)];
    history(ops()).ending_with(REGISTER, &[]).assert_accepted();
    history(ops()).ending_with(REGISTER, &[1]).assert_violation("lost");
    let [put, _] = ops();
    let queued = write(0, 10, 11, Replace, 3, Queued);
    let upsert = write(SQL, 20, 21, Put, 2, Stored);
    history([put, queued, upsert]).dead(0, REGISTER, &[3]).ending_with(REGISTER, &[2]).assert_accepted();
    let log = [write(0, 1, 2, Append, 1, Stored), write(SQL, 9, 10, Append, 2, Stored)];
    history(log.clone()).ending_with(LOG, &[1, 2]).assert_accepted();
    history(log).ending_with(LOG, &[1]).assert_violation("lost");
}

#[test]
fn read_by_a_clock_that_jumped_may_find_nothing() {
    let put = || short_lived(0, 10, 20, 1, 3_000);
    let read = |off_ms| Op { off_ms, ..absent(0, 100, 101) };
    history([put(), read(0)]).assert_violation("unjustified absence");
    history([put(), read(1_000)]).assert_violation("unjustified absence");
    history([put(), read(300_000)]).assert_accepted();
}

#[test]
fn clock_that_is_set_moves_earlier_provisional_writes() {
    let history_with = |by_ms: i64, extra: &[Op], change: Option<FileChange>| {
        let lost = [write(1, 10, 11, Put, 2, Stored), write(0, 30, 31, Put, 1, Queued)];
        let mut ops = [&lost, extra].concat();
        let changes: Vec<FileChange> = change.into_iter().collect();
        note_drift(&mut ops, &[Jump { at_ms: 40, by_ms }], &changes);
        changes.into_iter().fold(history(ops), History::changed)
    };
    let dead = |by_ms, extra: &[Op]| {
        history_with(by_ms, extra, None).dead(0, REGISTER, &[1]).ending_with(REGISTER, &[2])
    };
    dead(300_000, &[]).assert_accepted();
    dead(-300_000, &[]).assert_violation("without a competing write");
    // A stored write shows that the clock was synced before the write or before the jump.
    let stored = |at| write(0, at, at + 1, Append, 3, Stored);
    dead(300_000, &[stored(20)]).assert_violation("without a competing write");
    dead(300_000, &[stored(35)]).assert_violation("without a competing write");
    dead(300_000, &[stored(45)]).assert_accepted();
    // After a boot, a clock that was set back makes the write newer than a later write of another handle.
    let later = [write(1, 50, 51, Put, 4, Stored)];
    let ends = |by_ms, change| history_with(by_ms, &later, change).ending_with(REGISTER, &[1]);
    let booted = FileChange { handle: 0, at: at(60), source: Some((0, at(60))) };
    ends(-300_000, Some(booted)).assert_accepted();
    ends(-300_000, None).assert_violation("lost");
    ends(300_000, Some(booted)).assert_violation("lost");
}

#[test]
fn conversation_may_expire_by_jumps_beyond_its_time_to_live() {
    let read = || Op { key: CHAT, ..log(0, 50, 51, Claim::Absent, &[]) };
    let with = |by_ms| {
        let mut ops = [chat(0, 10, Add, 1, Queued), read()];
        note_drift(&mut ops, &[Jump { at_ms: 20, by_ms }], &[]);
        history(ops).ending_with(CHAT, &[])
    };
    with(LONG).assert_accepted();
    with(LONG - 1).assert_violation("acknowledged before");
}
