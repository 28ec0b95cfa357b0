//! Histories written by hand: what is wrong is told, and what is not is not.

use threadkeep::ErrorKind;

use super::violation;
use crate::history::Outcome::{Failed, Queued, Stored, Superseded, Unknown};
use crate::history::What::{Append, Put, Remove, Replace};
use crate::history::{Act, Claim, Dead, Final, History, Moment, Op, Outcome, Reading, Rules, What, Write};

const REGISTER: usize = 0;
const LOG: usize = 1;
const LONG: i64 = 1_000_000;

fn at(ms: i64) -> Moment {
    Moment { tick: u64::try_from(ms).unwrap(), ms }
}

/// By handle 0 or 1, from one millisecond to another.
fn op(handle: usize, begin: i64, end: i64, key: usize, act: Act) -> Op {
    Op { handle, life: 0, key, begin: at(begin), end: Some(at(end)), off_ms: 0, act }
}

fn write(handle: usize, begin: i64, end: i64, what: What, id: u64, outcome: Outcome) -> Op {
    let key = if what == Append { LOG } else { REGISTER };
    op(handle, begin, end, key, Act::Write(Write { id, what, ttl_ms: LONG, outcome }))
}

fn brief(handle: usize, begin: i64, end: i64, id: u64, ttl_ms: i64) -> Op {
    op(handle, begin, end, REGISTER, Act::Write(Write { id, what: Put, ttl_ms, outcome: Stored }))
}

fn get(handle: usize, begin: i64, end: i64, claim: Claim, id: u64) -> Op {
    op(handle, begin, end, REGISTER, Act::Read(Ok(Reading { seen: Some(vec![id]), claim })))
}

fn none(handle: usize, begin: i64, end: i64) -> Op {
    op(handle, begin, end, REGISTER, Act::Read(Ok(Reading { seen: None, claim: Claim::Absent })))
}

fn log(handle: usize, begin: i64, end: i64, claim: Claim, ids: &[u64]) -> Op {
    op(handle, begin, end, LOG, Act::Read(Ok(Reading { seen: Some(ids.to_vec()), claim })))
}

fn in_life(life: u32, op: Op) -> Op {
    Op { life, ..op }
}

fn history(ops: impl IntoIterator<Item = Op>) -> History {
    let rules = Rules { order_ms: 5, clock_ms: 5, fresh_ms: 100, registers: 1, ..Rules::default() };
    History { ops: ops.into_iter().collect(), rules, ..History::default() }
}

impl History {
    fn ends(mut self, key: usize, ids: &[u64]) -> Self {
        let seen = (!ids.is_empty()).then(|| ids.to_vec());
        self.finals.push(Final { key, seen, at: at(50_000) });
        self
    }

    fn dead(mut self, handle: usize, key: usize, ids: &[u64]) -> Self {
        self.dead.push(Dead { handle, key, ids: ids.to_vec() });
        self
    }

    #[track_caller]
    fn assert_right(self) {
        assert_eq!(violation(&self), None);
    }

    #[track_caller]
    fn assert_wrong(self, why: &str) {
        let (_, violation) = violation(&self).expect("it is taken for right");
        assert!(violation.contains(why), "{violation}");
    }
}

#[test]
fn the_last_acknowledged_write_is_what_is_left() {
    for (outcome, id) in
        [(Stored, 2), (Queued, 2), (Unknown, 1), (Unknown, 2), (Failed(ErrorKind::Overloaded), 1)]
    {
        let ops = || [write(0, 1, 2, Put, 1, Stored), write(0, 3, 4, Put, 2, outcome)];
        history(ops()).ends(REGISTER, &[id]).assert_right();
    }
    for (outcome, id) in [(Stored, 1), (Queued, 1), (Superseded, 1)] {
        let ops = || [write(0, 1, 2, Put, 1, Stored), write(0, 3, 4, Put, 2, outcome)];
        history(ops()).ends(REGISTER, &[id]).assert_wrong("an acknowledged write is lost");
        history(ops()).ends(REGISTER, &[]).assert_wrong("an acknowledged write is lost");
    }
    let refused = [write(0, 1, 2, Put, 1, Failed(ErrorKind::Overloaded))];
    history(refused).ends(REGISTER, &[1]).assert_wrong("what was refused");
    history([write(0, 1, 2, Put, 1, Superseded)]).ends(REGISTER, &[1]).assert_wrong("superseded");
}

#[test]
fn overlapping_writes_leave_either_one() {
    for id in [1, 2] {
        let overlapping = [write(0, 1, 4, Put, 1, Stored), write(0, 3, 6, Put, 2, Stored)];
        history(overlapping).ends(REGISTER, &[id]).assert_right();
        let close = [write(0, 1, 2, Put, 1, Stored), write(1, 6, 8, Put, 2, Queued)];
        history(close).ends(REGISTER, &[id]).assert_right();
    }
    let apart = || [write(0, 1, 2, Put, 1, Stored), write(1, 9, 10, Put, 2, Stored)];
    history(apart()).ends(REGISTER, &[2]).assert_right();
    history(apart()).ends(REGISTER, &[1]).assert_wrong("lost");
    let restarted = [write(0, 1, 2, Put, 1, Queued), in_life(1, write(0, 9, 10, Put, 2, Queued))];
    history(restarted).ends(REGISTER, &[1]).assert_wrong("lost");
}

#[test]
fn a_write_that_nobody_waited_for_may_come_late() {
    let abandoned = Op { end: None, ..write(0, 1, 2, Put, 1, Unknown) };
    let ops = || [abandoned.clone(), write(0, 30, 40, Put, 2, Stored)];
    history(ops()).ends(REGISTER, &[1]).assert_right();
    history(ops()).ends(REGISTER, &[2]).assert_right();
    // But what failed before the other began was stamped before it.
    let failed = [write(0, 1, 2, Put, 1, Unknown), write(0, 30, 40, Put, 2, Stored)];
    history(failed).ends(REGISTER, &[1]).assert_wrong("lost");
}

#[test]
fn a_delete_holds_against_late_writes() {
    let ops = || [write(0, 1, 2, Put, 1, Stored), write(0, 3, 4, Remove, 2, Stored)];
    history(ops()).ends(REGISTER, &[]).assert_right();
    history(ops()).ends(REGISTER, &[1]).assert_wrong("lost");
    let [put, remove] = ops();
    history([put, remove, get(0, 5, 6, Claim::Fresh, 1)]).assert_wrong("went back");
}

#[test]
fn read_older_than_its_handles_earlier_results_is_violation() {
    let two = || [write(0, 1, 2, Put, 1, Stored), write(0, 3, 4, Put, 2, Queued)];
    for claim in [Claim::Fresh, Claim::Stale, Claim::Queued] {
        history(two().into_iter().chain([get(0, 5, 6, claim, 1)])).assert_wrong("went back");
        history(two().into_iter().chain([get(0, 5, 6, claim, 2)])).assert_right();
        // While the second is under way, either is.
        history(two().into_iter().chain([get(0, 4, 6, claim, 1)])).assert_right();
    }
    let seen = |later| {
        [
            write(0, 1, 2, Put, 1, Stored),
            write(0, 9, 99, Put, 2, Unknown),
            get(1, 10, 11, Claim::Stale, 2),
            later,
        ]
    };
    history(seen(get(1, 12, 13, Claim::Stale, 1))).assert_wrong("shown before");
    history(seen(get(0, 12, 13, Claim::Stale, 1))).assert_right();
    history(seen(get(1, 10, 13, Claim::Stale, 1))).assert_right();
    history(seen(in_life(1, get(1, 12, 13, Claim::Stale, 1)))).assert_right();
    history(seen(none(1, 12, 13))).assert_wrong("an absence that was none");
}

#[test]
fn after_a_restart_what_was_acknowledged_still_counts() {
    let two = [write(0, 1, 2, Put, 1, Stored), write(0, 13, 14, Put, 2, Queued)];
    let read = |id| in_life(1, get(0, 25, 26, Claim::Queued, id));
    history(two.clone().into_iter().chain([read(2)])).assert_right();
    history(two.into_iter().chain([read(1)])).assert_wrong("acknowledged before");
}

#[test]
fn a_write_that_lost_shows_that_there_is_something_newer() {
    let ops = |later| [write(1, 1, 2, Put, 1, Stored), write(0, 10, 60, Put, 2, Superseded), later];
    history(ops(get(0, 70, 71, Claim::Stale, 1))).assert_wrong("went back");
    history(ops(get(0, 70, 71, Claim::Stale, 2))).assert_wrong("its own handle called superseded");
    // Where an answer was lost it was stored, for a while.
    history(ops(get(1, 70, 71, Claim::Stale, 2))).assert_right();
}

#[test]
fn what_is_fresh_is_no_older_than_it_claims() {
    let ops = |begin, claim| {
        [write(0, 1, 2, Put, 1, Stored), write(0, 20, 30, Put, 2, Stored), get(1, begin, begin + 1, claim, 1)]
    };
    history(ops(130, Claim::Fresh)).assert_right();
    history(ops(140, Claim::Fresh)).assert_wrong("stored long ago");
    history(ops(140, Claim::Stale)).assert_right();
}

#[test]
fn an_absence_has_a_reason() {
    history([none(0, 1, 2), write(0, 1, 5, Put, 1, Stored), none(0, 3, 6)]).assert_right();
    history([write(0, 1, 2, Put, 1, Stored), none(0, 3, 4)]).assert_wrong("an absence that was none");
    history([write(0, 1, 2, Put, 1, Stored), none(1, 3, 4)]).assert_right();
    history([write(0, 1, 2, Put, 1, Stored), none(1, 200, 201)]).assert_wrong("stored long ago");
    history([write(0, 1, 2, Put, 1, Stored), write(1, 2, 3, Remove, 2, Unknown), none(0, 4, 5)])
        .assert_right();
    let failed = write(1, 2, 3, Remove, 2, Failed(ErrorKind::Overloaded));
    history([write(0, 1, 2, Put, 1, Stored), failed, none(0, 4, 5)]).assert_wrong("an absence that was none");
    let delete = || [write(0, 1, 2, Remove, 1, Queued), write(1, 20, 30, Put, 2, Stored)];
    history(delete().into_iter().chain([none(0, 300, 301)])).assert_right();
    history(delete().into_iter().chain([none(1, 300, 301)])).assert_wrong("an absence that was none");
}

#[test]
fn what_has_expired_is_gone_and_not_before() {
    history([brief(0, 10, 20, 1, 300), get(0, 320, 330, Claim::Stale, 1)]).assert_right();
    history([brief(0, 10, 20, 1, 300), get(0, 340, 350, Claim::Stale, 1)]).assert_wrong("has expired");
    let by_a_wrong_clock = Op { off_ms: 1_000, ..get(0, 340, 350, Claim::Stale, 1) };
    history([brief(0, 10, 20, 1, 300), by_a_wrong_clock]).assert_right();
    history([brief(0, 10, 20, 1, 300), none(0, 300, 310)]).assert_right();
    history([brief(0, 10, 20, 1, 300), none(0, 200, 290)]).assert_wrong("an absence that was none");
    history([brief(0, 10, 20, 1, 300)]).ends(REGISTER, &[]).assert_right();
    history([brief(0, 10, 20, 1, 300)])
        .ends(REGISTER, &[1])
        .assert_wrong("the database shows what has expired");
    // Somebody has renewed it.
    let renewed = || [brief(0, 10, 20, 1, 300), write(1, 100, 110, Put, 2, Stored)];
    history(renewed()).ends(REGISTER, &[]).assert_wrong("lost");
    history(renewed().into_iter().chain([none(0, 700, 701)])).assert_wrong("an absence that was none");
}

#[test]
fn dead_letters_were_queued_and_lost_to_somebody_else() {
    let ops = |other| [write(0, 10, 20, Put, 1, Queued), other];
    let later = || write(1, 30, 40, Put, 2, Stored);
    history(ops(later())).dead(0, REGISTER, &[1]).ends(REGISTER, &[2]).assert_right();
    history(ops(write(1, 1, 2, Put, 2, Stored))).dead(0, REGISTER, &[1]).assert_wrong("nobody else wrote");
    // A clock that goes on from the anchor is off a little.
    let off = |off_ms| Op { off_ms, ..write(1, 1, 2, Put, 2, Stored) };
    history(ops(off(10))).dead(0, REGISTER, &[1]).ends(REGISTER, &[2]).assert_right();
    history(ops(off(2))).dead(0, REGISTER, &[1]).assert_wrong("nobody else wrote");
    history(ops(write(0, 30, 40, Put, 2, Stored))).dead(0, REGISTER, &[1]).assert_wrong("nobody else wrote");
    history(ops(write(1, 30, 40, Put, 2, Failed(ErrorKind::Overloaded))))
        .dead(0, REGISTER, &[1])
        .assert_wrong("nobody else wrote");
    history(ops(later())).dead(0, REGISTER, &[2]).assert_wrong("nobody queued");
    history([write(0, 10, 20, Put, 1, Stored), later()])
        .dead(0, REGISTER, &[1])
        .assert_wrong("nobody queued");
    // To an update of its own handle that was made at once, and that did not know of it; but to no later one.
    let and_an_update = |at| [write(0, 10, 20, Put, 1, Queued), write(0, at, 40, Replace, 2, Stored)];
    history(and_an_update(15)).dead(0, REGISTER, &[1]).ends(REGISTER, &[2]).assert_right();
    history(and_an_update(30)).dead(0, REGISTER, &[1]).assert_wrong("nobody else wrote");
    // In an earlier life, while the order of the two is not known.
    let in_two_lives = |at| [write(0, 1, 8, Put, 1, Stored), in_life(1, write(0, at, 40, Put, 2, Queued))];
    history(in_two_lives(10)).dead(0, REGISTER, &[2]).ends(REGISTER, &[1]).assert_right();
    history(in_two_lives(30)).dead(0, REGISTER, &[2]).assert_wrong("nobody else wrote");
    // An update loses also to what was there before, if its handle did not know.
    let update = || [write(1, 1, 2, Put, 2, Stored), write(0, 10, 20, Replace, 1, Queued)];
    history(update()).dead(0, REGISTER, &[1]).ends(REGISTER, &[2]).assert_right();
    history(update()).ends(REGISTER, &[2]).assert_wrong("lost");
    // And it takes those with it that it went on from; but not a put.
    let chain = |what| {
        [
            write(1, 1, 2, Put, 3, Stored),
            write(0, 10, 20, what, 1, Queued),
            write(0, 30, 40, Replace, 2, Queued),
        ]
    };
    history(chain(Replace)).dead(0, REGISTER, &[2]).ends(REGISTER, &[3]).assert_right();
    history(chain(Put)).dead(0, REGISTER, &[2]).ends(REGISTER, &[3]).assert_wrong("lost");
    // It alone is exempt from promise 5.
    let [put, other] = ops(later());
    let reads = [get(0, 21, 22, Claim::Queued, 1), get(0, 50, 51, Claim::Fresh, 2)];
    history([put, other].into_iter().chain(reads))
        .dead(0, REGISTER, &[1])
        .ends(REGISTER, &[2])
        .assert_right();
}

#[test]
fn a_removal_among_the_dead_letters_is_told_by_its_key() {
    let ops = [write(0, 10, 20, Remove, 1, Queued), write(1, 15, 40, Put, 2, Stored)];
    history(ops.clone()).dead(0, REGISTER, &[]).ends(REGISTER, &[2]).assert_right();
    history([ops[1].clone()]).dead(0, REGISTER, &[]).assert_wrong("nobody queued");
}

#[test]
fn a_thread_that_is_known_can_be_read_in_an_outage() {
    let outage = |begin| op(0, begin, begin + 1, REGISTER, Act::Read(Err(ErrorKind::Unavailable)));
    let with_replica = |ops: &[Op]| {
        let mut history = history(ops.iter().cloned());
        history.rules.replica_keeps_all = true;
        history
    };
    let put = write(0, 1, 2, Put, 1, Queued);
    history([put.clone(), outage(10)]).assert_right();
    with_replica(&[put.clone(), outage(10)]).assert_wrong("not served");
    with_replica(&[put.clone(), in_life(1, outage(10))]).assert_wrong("not served");
    // What it lost against is not at hand.
    let lost = [write(1, 0, 1, Put, 2, Stored), write(0, 10, 11, Replace, 1, Queued), outage(20)];
    with_replica(&lost).dead(0, REGISTER, &[1]).assert_right();
    with_replica(&lost).assert_wrong("not served");
    with_replica(&[put.clone(), write(0, 3, 4, Put, 2, Unknown), outage(10)]).assert_right();
    with_replica(&[put.clone(), write(1, 3, 14, Put, 2, Stored), outage(10)]).assert_right();
    with_replica(&[brief(0, 1, 2, 1, 10), outage(12)]).assert_right();
    with_replica(&[write(0, 1, 2, Remove, 1, Queued), outage(10)]).assert_right();
}

#[test]
fn each_acknowledged_update_is_in_the_log_once_and_in_order() {
    let ops = || [write(0, 1, 2, Append, 1, Stored), write(1, 9, 10, Append, 2, Stored)];
    history(ops()).ends(LOG, &[1, 2]).assert_right();
    history(ops()).ends(LOG, &[1]).assert_wrong("an acknowledged update is lost");
    history(ops()).ends(LOG, &[1, 2, 1]).assert_wrong("twice");
    history(ops()).ends(LOG, &[2, 1]).assert_wrong("stands before");
    history(ops()).ends(LOG, &[1, 2, 3]).assert_wrong("nobody made");
    let [one, two] = ops();
    let failed = write(0, 20, 21, Append, 3, Failed(ErrorKind::Conflict));
    history([one.clone(), two.clone(), failed]).ends(LOG, &[1, 2, 3]).assert_wrong("refused");
    let unknown = || write(0, 20, 21, Append, 3, Unknown);
    history([one.clone(), two.clone(), unknown()]).ends(LOG, &[1, 2, 3]).assert_right();
    history([one.clone(), two.clone(), unknown()]).ends(LOG, &[1, 2]).assert_right();
    history([one, two, write(0, 20, 21, Append, 3, Superseded)]).assert_wrong("no error");
}

#[test]
fn queued_updates_are_in_the_log_or_among_the_dead_letters() {
    let ops = || [write(0, 1, 2, Append, 1, Queued), write(1, 9, 10, Append, 2, Stored)];
    history(ops()).ends(LOG, &[2]).assert_wrong("lost");
    history(ops()).ends(LOG, &[2]).dead(0, LOG, &[1]).assert_right();
    history(ops()).ends(LOG, &[2, 1]).assert_right();
    history(ops()).ends(LOG, &[2]).dead(0, LOG, &[2, 1]).assert_wrong("nobody else wrote");
    let own = [write(0, 1, 2, Append, 1, Queued), write(0, 9, 10, Append, 2, Stored)];
    history(own).ends(LOG, &[2]).dead(0, LOG, &[1]).assert_wrong("nobody else wrote");
}

#[test]
fn readers_of_a_log_miss_nothing_that_they_may_rely_on() {
    let ops = |read| [write(0, 1, 2, Append, 1, Stored), write(1, 9, 10, Append, 2, Stored), read];
    history(ops(log(0, 11, 12, Claim::Stale, &[1]))).assert_right();
    history(ops(log(1, 11, 12, Claim::Stale, &[1]))).assert_wrong("acknowledged before");
    history(ops(log(0, 200, 201, Claim::Fresh, &[1]))).assert_wrong("stored long ago");
    history(ops(log(0, 11, 12, Claim::Fresh, &[1, 2, 2]))).assert_wrong("twice");
    let mut twice = ops(log(0, 11, 12, Claim::Stale, &[1, 2])).to_vec();
    twice.push(log(0, 13, 14, Claim::Stale, &[1]));
    history(twice).assert_wrong("shown before");
}

#[test]
fn unacknowledged_update_may_be_undone_by_next_lifes_queue() {
    let abandoned = || Op { end: None, ..write(0, 1, 2, Append, 1, Unknown) };
    let reads = || [log(1, 5, 6, Claim::Fresh, &[1]), log(1, 50, 51, Claim::Fresh, &[2])];
    let ops = |next| [abandoned(), next].into_iter().chain(reads());
    history(ops(in_life(1, write(0, 20, 21, Append, 2, Queued)))).assert_right();
    history(ops(write(0, 20, 21, Append, 2, Queued))).assert_wrong("shown before");
    history(ops(in_life(1, write(0, 20, 21, Append, 2, Stored)))).assert_wrong("shown before");
    let known = [write(0, 1, 2, Append, 1, Stored), in_life(1, write(0, 20, 21, Append, 2, Queued))];
    history(known.into_iter().chain(reads())).assert_wrong("shown before");
}

#[test]
fn errors_are_of_kinds_that_can_be_explained() {
    history([write(0, 1, 2, Put, 1, Failed(ErrorKind::Unavailable))]).assert_right();
    history([write(0, 1, 2, Put, 1, Failed(ErrorKind::Conflict))]).assert_wrong("nothing explains");
    history([write(0, 1, 2, Replace, 1, Failed(ErrorKind::Conflict))]).assert_right();
    history([write(0, 1, 2, Put, 1, Failed(ErrorKind::LocalStorage))]).assert_wrong("nothing explains");
}
