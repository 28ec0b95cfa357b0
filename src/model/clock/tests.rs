//! Tests that step the clocks of the machine.

use std::time::{Duration, Instant};

use super::*;
use crate::model::moment::test_clock;

fn ms(span: u64) -> Duration {
    Duration::from_millis(span)
}

#[test]
fn versions_rise_within_a_millisecond_and_past_observed() {
    let clock = Clock::new();
    let versions: Vec<_> = (0..10_000).map(|_| clock.issue().version).collect();
    assert!(versions.windows(2).all(|pair| pair[0] < pair[1]));
    let seen = Version::min_at(clock.now().plus(ms(1500)));
    clock.observe(seen);
    assert!(clock.issue().version > seen);
}

#[test]
fn correct_moves_a_clock_in_both_directions() {
    for skew in [-300_000, 300_000] {
        let (right, wrong) = (Clock::new(), Clock::skewed(skew));
        let early = wrong.issue();
        assert!(early.is_provisional && !wrong.is_synced());
        answer(&wrong, right.now());
        let late = wrong.issue();
        assert!(!late.is_provisional && (wrong.now().0 - right.now().0).abs() <= 5, "skew {skew}");
        assert!((late.version.at().0 - right.now().0).abs() <= 5, "skew {skew}");
        wrong.observe(early.version);
        assert!(
            (wrong.issue().version.at().0 - right.now().0).abs() <= 5,
            "skew {skew}, after the early version is observed again"
        );
    }
}

#[test]
fn sync_by_file_keeps_the_answer_pending() {
    let (right, wrong) = (Clock::new(), Clock::skewed(-300_000));
    wrong.sync_by_file();
    answer(&wrong, right.now());
    let correction = wrong.pending().unwrap();
    assert!((correction.0 - 300_000).abs() < 1_000);
    assert!(wrong.issue().is_provisional && wrong.known_now().is_none());
    wrong.finish_sync(correction, Version::NONE);
    assert!(wrong.is_synced() && wrong.pending().is_none());
    assert!((wrong.now().0 - right.now().0).abs() < 1_000);
}

#[test]
fn jump_during_the_sync_leaves_a_corrected_unsynced_clock() {
    let (right, wrong) = (Clock::new(), Clock::skewed(-300_000));
    wrong.sync_by_file();
    answer(&wrong, right.now());
    let correction = wrong.pending().unwrap();
    test_clock::step(HOUR);
    assert!(wrong.pending().is_none(), "the answer came before the jump");
    wrong.finish_sync(correction, Version::NONE);
    assert!(!wrong.is_synced() && (wrong.now().0 - right.now().0).abs() < 1_000);
}

#[test]
fn versions_of_two_clocks_rarely_collide() {
    // With equal first counters, one pair in 16,384 would collide.
    let collisions =
        (0..300_000).filter(|_| Clock::new().issue().version == Clock::new().issue().version).count();
    assert!(collisions <= 3, "{collisions}");
}

#[test]
fn correct_within_the_bounds_moves_nothing() {
    let clock = Clock::new();
    let sent = Instant::now();
    let before = clock.at(sent);
    clock.correct(sent, sent + ms(500), before.plus(ms(200)));
    assert_eq!(clock.at(sent), before);
}

#[test]
fn advance_continues_from_stored_versions() {
    let clock = Clock::skewed(-60_000);
    let stored = Version::min_at(Clock::new().now());
    clock.advance(stored);
    let issued = clock.issue();
    assert!(issued.version > stored);
    assert!(clock.now() < stored.at(), "expiry follows the system clock");
}

const HOUR: i64 = 3_600_000;

/// Returns a synced clock, and the clock of a store whose answers take no time.
fn synced() -> (Clock, Clock) {
    let (clock, store) = (Clock::new(), Clock::new());
    answer(&clock, store.now());
    (clock, store)
}

fn answer(clock: &Clock, shown: Timestamp) {
    let now = Moment::now();
    clock.correct_at(now, now, shown);
}

/// The store runs on this machine, or on a machine that sleeps as long. So its clock counts the sleep.
#[test]
fn clock_counts_a_sleep_and_becomes_unsynced() {
    let (clock, store) = synced();
    let (before, early) = (clock.now(), clock.issue());
    assert!(clock.is_synced() && !early.is_provisional);
    test_clock::step(63 * HOUR);
    assert!((63 * HOUR..63 * HOUR + 5_000).contains(&(clock.now().0 - before.0)));
    assert!(!clock.is_synced() && clock.known_now().is_none());
    let late = clock.issue();
    assert!(late.version.at().0 - early.version.at().0 >= 63 * HOUR);
    answer(&clock, store.now());
    assert!(clock.is_synced() && late.is_provisional);
    assert!((clock.now().0 - store.now().0).abs() < 5_000);
}

/// After a pause the system clock is behind. An answer shows that, and then an operator sets the clock.
#[test]
fn step_to_the_right_time_moves_nothing() {
    let clock = Clock::new();
    let store_time = clock.now().plus(ms(8 * 3_600_000));
    answer(&clock, store_time);
    assert!((clock.offset() - 8 * HOUR).abs() < 5_000);
    test_clock::step(8 * HOUR);
    assert_eq!(clock.offset(), 0);
    assert!((clock.now().0 - store_time.0).abs() < 5_000);
    assert!(!clock.is_synced(), "the clock is a guess until the next answer");
    test_clock::step(HOUR);
    assert!((clock.now().0 - store_time.0 - HOUR).abs() < 5_000);
}

#[test]
fn second_jump_falls_into_the_same_unsynced_period() {
    let clock = Clock::skewed(-60_000);
    clock.sync_by_file();
    let store_time = Clock::new().now();
    test_clock::step(HOUR);
    test_clock::step(HOUR);
    answer(&clock, store_time.plus(ms(7_200_000 - 300_000)));
    assert!((clock.pending().unwrap().0 + 240_000).abs() < 5_000, "{:?}", clock.pending());
}

#[test]
fn correct_ignores_an_answer_from_before_a_jump() {
    let (clock, store) = synced();
    let (sent, shown) = (Moment::now(), store.now());
    test_clock::step(8 * HOUR);
    clock.correct_at(sent, Moment::now(), shown);
    assert!(!clock.is_synced(), "the store sent the answer before the machine slept");
    clock.trust(sent);
    assert!(!clock.is_synced());
    answer(&clock, store.now());
    assert!(clock.is_synced());
}

#[test]
fn shown_at_does_not_reach_behind_a_jump() {
    let (clock, _) = synced();
    let began = clock.moment();
    let early = clock.issue();
    assert_eq!(early.shown_at(began), clock.at(began));
    test_clock::step(63 * HOUR);
    let late = clock.issue();
    assert_eq!(late.shown_at(began), late.shown);
}

#[test]
fn authoritative_clock_follows_steps_and_versions_rise() {
    let clock = Clock::authoritative();
    let mut last = clock.issue().version;
    let mut off = 0;
    for step in [63 * HOUR, -HOUR, -70 * HOUR, 1_500, -1_500, 8 * HOUR] {
        test_clock::step(step);
        off += step;
        assert!((clock.now().0 - system_millis()).abs() < 1_000, "{step}, {off}");
        let issued = clock.issue();
        assert!((issued.shown.0 - system_millis()).abs() < 1_000, "{step}: expiry follows the system clock");
        assert!(issued.version > last, "{step}: a later write never loses against an earlier write");
        assert!(
            issued.version.at() <= clock.now_for_versions().plus(MAX_CLOCK_SKEW),
            "{step}: the version is not ahead"
        );
        assert!(clock.is_synced() && clock.offset() == 0, "{step}");
        last = issued.version;
    }
}

/// A clock without an outage file, which has no mark.
#[test]
fn versions_after_a_jump_are_above_those_before() {
    let (clock, store) = synced();
    // Another daemon was a little ahead.
    clock.observe(Version::min_at(store.now().plus(ms(1_000))));
    let before = clock.issue().version;
    test_clock::step(HOUR);
    clock.issue();
    answer(&clock, store.now().minus(ms(3_600_000)));
    let after = clock.issue();
    assert!(!after.is_provisional && after.version > before);
    assert!(after.version.at() < clock.now().plus(ms(2_000)));
}

#[test]
fn versions_that_fall_with_the_store_clock_begin_an_era() {
    let (clock, store) = synced();
    let early = clock.issue();
    answer(&clock, store.now().minus(ms(3_000)));
    let within_tolerance = clock.issue();
    assert!(within_tolerance.version > early.version && within_tolerance.era == 0);
    assert!(clock.end_of_first_era().is_some_and(|end| end >= within_tolerance.version));
    answer(&clock, store.now().minus(ms(3_600_000)));
    let (fallen, next) = (clock.issue(), clock.issue());
    assert!(fallen.version < early.version && next.version > fallen.version);
    assert_eq!((fallen.era, next.era, clock.end_of_first_era()), (1, 1, None));
    // A conversation of the earlier era is ahead, and stays ahead.
    assert!(clock.issue_after(early.version).version > early.version && clock.issue().era == 1);
    // A version of a record from before the step hides the last version, and the clock is corrected by a little.
    let before = clock.issue();
    clock.observe(early.version);
    answer(&clock, store.now().minus(ms(3_600_500)));
    let after = clock.issue();
    assert!(after.version > before.version && after.era == before.era);
    // An opening whose mark is ahead.
    let clock = Clock::new();
    clock.continue_above(early.version);
    answer(&clock, store.now().minus(ms(60_000)));
    assert_eq!(clock.issue().era, 1);
}
