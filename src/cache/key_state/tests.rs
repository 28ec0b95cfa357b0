//! Walks all pairs of state and event, and asserts the invariants of DESIGN.md.

use std::time::Duration;

use super::*;
use crate::model::json::Json;
use crate::model::key::Key;

const AT: Timestamp = Timestamp(1_000);

fn version(raw: i64) -> Version {
    Version::from_raw(raw)
}

fn record(raw: i64, value: Option<&str>) -> Arc<Record> {
    let tombstone = Record::tombstone(Key::new("k").unwrap(), version(raw));
    let (value, expires_at) = (value.map(Json::trusted), AT.plus(Duration::from_secs(60)));
    Arc::new(Record { value, expires_at, ..tombstone })
}

fn put(raw: i64) -> Arc<Record> {
    record(raw, Some("1"))
}

fn states() -> Vec<KeyState> {
    let at = Moment::now();
    let held = |raw, origin| Cached::Held(Held { record: put(raw), at, origin });
    let cached = [2, 4, 6].into_iter().flat_map(|raw| {
        let absent = Cached::Absent { version: version(raw), at };
        [absent, held(raw, Origin::Store), held(raw, Origin::Replica), held(raw, Origin::Queue)]
    });
    let queued = [
        Queued::Nothing,
        Queued::Newest(version(4)),
        Queued::Superseded(version(4)),
        Queued::Unverified(version(4)),
        Queued::Append(version(4)),
    ];
    let floor = |possible, confirmed| Floor { possible: version(possible), confirmed: version(confirmed) };
    let floors = [floor(0, 0), floor(3, 0), floor(5, 0), floor(5, 5)];
    let mut states = Vec::new();
    for cached in cached.chain([Cached::Nothing]) {
        for (queued, floor) in
            queued.iter().flat_map(|queued| floors.iter().map(move |floor| (*queued, *floor)))
        {
            let state = KeyState { cached: cached.clone(), queued, floor };
            // While a queued write is the newest, memory holds that write or an older value that waits for its load.
            states.extend(is_marked(&state).then_some(state));
        }
    }
    states
}

fn events() -> Vec<Event> {
    let mut events = vec![Event::Evicted];
    for raw in [1, 3, 4, 5, 7] {
        let (seen, removed) = (put(raw), record(raw, None));
        let settled = |verdict, left| Event::Settled { version: version(raw), verdict, left };
        let dead = |newer| Verdict::Dead { reason: "superseded".into(), newer };
        let left = |has_appends| Some(Tail { version: version(raw + 1), has_appends });
        let enqueued = |write: &Arc<Record>, has_appends, is_provisional| Event::Enqueued {
            write: Arc::clone(write),
            has_appends,
            is_provisional,
        };
        events.extend([
            Event::Seen(Arc::clone(&seen)),
            Event::Seen(Arc::clone(&removed)),
            Event::Unknown(version(raw)),
            Event::Newer(version(raw)),
            Event::Copy(Arc::clone(&seen)),
            enqueued(&seen, false, false),
            enqueued(&removed, false, true),
            enqueued(&seen, true, false),
            enqueued(&seen, true, true),
            Event::QueuedRead(seen),
            settled(Verdict::Stored, None),
            settled(Verdict::Stored, left(false)),
            settled(Verdict::Stored, left(true)),
            settled(Verdict::Appended(version(raw)), None),
            settled(Verdict::Appended(version(raw + 2)), left(false)),
            settled(Verdict::Appended(version(raw + 2)), left(true)),
            settled(dead(Some(version(raw + 1))), None),
            settled(dead(None), None),
            Event::Corrected { from: version(raw), version: version(raw), expires_at: AT },
            Event::Corrected { from: version(raw), version: version(raw + 2), expires_at: AT },
        ]);
    }
    events
}

/// I5: a queued value is that of the newest queued write.
fn is_marked(state: &KeyState) -> bool {
    match &state.cached {
        Cached::Held(held) if held.origin == Origin::Queue => {
            state.queued.answer() == Some(held.record.version)
        }
        _ => true,
    }
}

fn held(state: &KeyState) -> Option<&Held> {
    match &state.cached {
        Cached::Held(held) => Some(held),
        _ => None,
    }
}

#[test]
fn step_of_an_unsynced_clock_compares_no_queued_write() {
    for before in states().into_iter().filter(|state| state.queued != Queued::Nothing) {
        let times = Times { at: Moment::now(), now: AT, is_synced: false };
        let (after, _) = step(before.clone(), Event::Seen(put(7)), times);
        assert_eq!(after.queued, before.queued);
    }
}

#[test]
fn step_holds_the_invariants_for_all_states_and_events() {
    let (states, events) = (states(), events());
    assert!(states.len() > 100 && events.len() > 60);
    for before in &states {
        for event in &events {
            let times = Times { at: Moment::now(), now: AT, is_synced: true };
            let (after, effect) = step(before.clone(), event.clone(), times);
            let context = format!("{before:?}\n{event:?}\n{after:?}\n{effect:?}");
            assert!(is_marked(&after), "I5: {context}");
            check_floor(before, event, &after, effect, &context);
            check_queue(before, event, &after, effect, &context);
            check_value(before, event, &after, &context);
        }
    }
}

/// I2, I3, I16: a result below the floor changes nothing but older values. What the store was seen to hold raises the floor.
fn check_floor(before: &KeyState, event: &Event, after: &KeyState, effect: Effect, context: &str) {
    match event {
        Event::Seen(seen) | Event::Copy(seen) if seen.version < before.floor.possible => {
            assert!(effect.raised.is_none() && effect.answer != Answer::Current, "I2: {context}");
            assert!(after.cached == before.cached || after.cached == Cached::Nothing, "I2: {context}");
        }
        Event::Seen(seen) if effect.answer == Answer::Current => {
            assert_eq!(effect.raised, Some(Floor::confirmed(seen.version)), "I2: {context}");
        }
        Event::Newer(version) => assert_eq!(effect.raised, Some(Floor::confirmed(*version)), "I2: {context}"),
        // A version that the store may not hold must not beat a queued write.
        Event::Unknown(version) => {
            let floor = Floor { possible: *version, confirmed: Version::NONE };
            assert_eq!((effect.raised, after.queued), (Some(floor), before.queued), "I6: {context}");
        }
        Event::Enqueued { write, .. } if after.queued == Queued::Newest(write.version) => {
            assert_eq!(effect.raised.map(|floor| floor.possible), Some(write.version), "I16: {context}");
        }
        _ => {}
    }
}

/// I4, I8, I10, I16: only the outage file brings and ends a queued write, and reads never fall behind it.
fn check_queue(before: &KeyState, event: &Event, after: &KeyState, effect: Effect, context: &str) {
    let brings = matches!(event, Event::Enqueued { .. } | Event::Corrected { .. });
    let ends = matches!(event, Event::Settled { .. });
    assert!(
        brings || after.queued.version().is_some() == before.queued.version().is_some() || ends,
        "I10: {context}"
    );
    match event {
        Event::Seen(seen) => {
            let is_newer = before.queued.version().is_some_and(|queued| queued > seen.version);
            let was_superseded = matches!(before.queued, Queued::Superseded(_));
            let is_append = matches!(before.queued, Queued::Append(_));
            let answer = effect.answer == Answer::QueuedIsNewer;
            assert_eq!(answer, is_append || is_newer && !was_superseded, "I16: {context}");
        }
        Event::Enqueued { write, has_appends: true, .. } => {
            let expected = (&Queued::Append(write.version), &Cached::Nothing);
            assert_eq!((&after.queued, &after.cached), expected, "I4: {context}");
        }
        Event::Enqueued { write, is_provisional: true, .. } => {
            assert_eq!(after.queued, Queued::Newest(write.version), "I8: {context}");
        }
        Event::Enqueued { write, .. } => {
            let is_newest = before.floor.confirmed <= write.version;
            assert_eq!(after.queued == Queued::Newest(write.version), is_newest, "I4: {context}");
        }
        Event::Corrected { from, version, .. } => {
            let answer = |now: Version| if now == *from { *version } else { now };
            assert_eq!(after.queued.answer(), before.queued.answer().map(answer), "I8, I16: {context}");
        }
        Event::Copy(_) if before.queued.answer().is_some() => {
            assert_eq!((&after.cached, effect.answer), (&before.cached, Answer::Stale), "I16: {context}");
        }
        Event::Settled { version, left: None, .. } => {
            let is_left = before.queued.version().is_some_and(|queued| queued > *version);
            assert_eq!(after.queued.version().is_some(), is_left, "I10: {context}");
        }
        _ => {}
    }
}

/// I3, I6, I14, I16: which events bring a value or an absence, and which take it.
fn check_value(before: &KeyState, event: &Event, after: &KeyState, context: &str) {
    if matches!(after.cached, Cached::Absent { .. }) && after.cached != before.cached {
        assert!(matches!(event, Event::Seen(seen) if seen.value.is_none()), "I14: {context}");
    }
    if let Some(new) = held(after).filter(|_| after.cached != before.cached) {
        let fits = match event {
            Event::Seen(seen) => new.origin == Origin::Store && new.record.version == seen.version,
            Event::Copy(copy) => new.origin == Origin::Replica && new.record.version == copy.version,
            // A replayed write may be older than the store's record, so it is never fresh.
            Event::Settled { verdict, version, .. } => {
                *verdict == Verdict::Stored && new.origin == Origin::Replica && new.record.version == *version
            }
            Event::Enqueued { .. } | Event::QueuedRead(_) | Event::Corrected { .. } => {
                new.origin == Origin::Queue
            }
            _ => false,
        };
        assert!(fits, "I3: {context}");
    }
    // An append follows the store's record. So its value goes with each change of that record.
    let changes = matches!(event, Event::Newer(_) | Event::Settled { verdict: Verdict::Appended(_), .. });
    if changes && matches!(before.queued, Queued::Append(_)) {
        assert_eq!(after.cached, Cached::Nothing, "I16: {context}");
    }
    if let Event::Unknown(version) | Event::Newer(version) = event {
        let is_new =
            held(after).is_none_or(|held| held.origin == Origin::Queue || held.record.version >= *version);
        let is_absent_before =
            matches!(after.cached, Cached::Absent { version: absent, .. } if absent < *version);
        assert!(is_new && !is_absent_before, "I6: {context}");
    }
}
