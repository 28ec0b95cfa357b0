//! All series of the table appear, with the labels that it names, and no others; and gauges say what is held.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use threadkeep::metrics::SERIES;
use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{Cache, ErrorKind, Guard, Memory, State};

/// A recorder for the thread of a test, which all its tasks run on.
fn recorder() -> (PrometheusRecorder, PrometheusHandle) {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    (recorder, handle)
}

/// The value of each series, by its name and label; of a histogram, how much was recorded.
fn values(exported: &PrometheusHandle) -> BTreeMap<(String, String), f64> {
    let text = exported.render();
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .filter(|line| !line.contains("quantile=") && !line.contains("_sum"))
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, label) = series.split_once('{').unwrap_or((series, ""));
            let name = name.strip_suffix("_count").unwrap_or(name);
            let label = label.trim_end_matches('}').replace('"', "");
            ((name.to_owned(), label), value.parse().unwrap())
        })
        .collect()
}

fn value(exported: &PrometheusHandle, name: &str, label: &str) -> f64 {
    values(exported)[&(format!("threadkeep_{name}"), label.to_owned())]
}

/// Waits until it is so; nobody calls anything meanwhile.
async fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..1_500 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("waited in vain for {what}");
}

/// Waits until gauges have these values.
async fn wait_for(exported: &PrometheusHandle, gauges: &[(&str, f64)]) {
    let is = |(name, expected): &(&str, f64)| value(exported, name, "") == *expected;
    wait_until(&format!("{gauges:?}"), || gauges.iter().all(is)).await;
}

/// A store that can be away, behind a guard.
fn away() -> (Guard<Faulty<Memory>>, Faults) {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    (Guard::new(store, Duration::from_secs(1)), faults)
}

#[tokio::test]
async fn the_series_are_those_of_the_table_however_many_threads_there_are() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let series = || values(&exported).into_keys().collect::<BTreeSet<_>>();
    let expected: BTreeSet<(String, String)> = SERIES
        .iter()
        .flat_map(|series| {
            let values = series.label.map(|(label, values)| (label, values.iter()));
            let labelled =
                values.map(|(label, values)| values.map(move |value| format!("{label}={value}")).collect());
            let labels: Vec<String> = labelled.unwrap_or_else(|| vec![String::new()]);
            labels.into_iter().map(|labels| (series.name.to_owned(), labels))
        })
        .collect();

    let memory = Cache::builder().memory().cache_bytes(1 << 20).open().await.unwrap();
    // A breaker's series are there as soon as there is one.
    let (guard, faults) = away();
    let cache = Cache::builder().store(guard).fresh_for(Duration::ZERO).open().await.unwrap();
    assert_eq!(series(), expected, "all are there before anything is counted");

    for kind in [ErrorKind::Denied, ErrorKind::Refused, ErrorKind::Schema] {
        faults.script([Fault::Fail(kind)]);
        cache.put("t", &1).await.unwrap_err();
    }
    let _ = cache.put("t", &1).user("u").await.unwrap();
    assert!(cache.get("t").await.unwrap().is_some());
    faults.always(Fault::Refuse);
    while cache.health().breaker == Some(State::Closed) {
        cache.get("unknown").await.unwrap_err();
    }
    for at in 0..20_000 {
        match at % 20 {
            0 => _ = memory.put(format!("thread {at}"), &at).await.unwrap(),
            _ => assert!(memory.get(format!("thread {at}")).await.unwrap().is_none()),
        }
    }
    assert_eq!(series(), expected, "no series more after 20,000 threads and each kind of failure");
}

#[tokio::test]
async fn gauges_say_what_is_queued_and_kept_without_traffic() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let ((guard, faults), directory) = (away(), tempfile::tempdir().unwrap());
    let open = Cache::builder().store(guard).queue(directory.path().join("queue.db"));
    let cache = open.queue_bytes(100_000).replica_bytes(200_000).cache_bytes(300_000).open().await.unwrap();
    let bounds = ["queue_bound_bytes", "replica_bound_bytes", "memory_bound_bytes"];
    assert_eq!(bounds.map(|bound| value(&exported, bound, "")), [100_000.0, 200_000.0, 300_000.0]);

    faults.always(Fault::Refuse);
    for at in 0..3 {
        let _ = cache.put(format!("t{at}"), &at).await.unwrap();
    }
    wait_for(&exported, &[("queue_records", 3.0), ("replica_records", 0.0), ("memory_entries", 3.0)]).await;
    let bytes = value(&exported, "queue_bytes", "");
    assert!(bytes > 600.0 && value(&exported, "queue_oldest_seconds", "") > 0.0, "{bytes}");
    assert_ne!(value(&exported, "breaker_state", ""), 0.0);

    faults.heal();
    wait_for(&exported, &[("queue_records", 0.0), ("replica_records", 3.0), ("breaker_state", 0.0)]).await;
    wait_for(&exported, &[("queue_bytes", 0.0), ("replica_bytes", bytes)]).await;
    wait_for(&exported, &[("queue_oldest_seconds", 0.0)]).await;

    drop(cache);
    wait_for(&exported, &[("replica_records", 0.0), ("queue_bound_bytes", 0.0)]).await;
}

#[tokio::test]
async fn a_queued_write_that_is_refused_shows_as_a_dead_letter_until_it_is_forgotten() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let ((guard, faults), directory) = (away(), tempfile::tempdir().unwrap());
    let open = Cache::builder().store(guard).queue(directory.path().join("queue.db"));
    let cache = open.open().await.unwrap();
    faults.always(Fault::Refuse);
    let _ = cache.put("t", &1).await.unwrap();
    faults.heal();
    faults.poison("t", Fault::Fail(ErrorKind::Refused));
    wait_for(&exported, &[("queue_records", 0.0), ("dead_letters", 1.0)]).await;
    assert!(value(&exported, "dead_letters_bytes", "") > 200.0);
    assert_eq!(cache.health().queue.unwrap().dead_letters, 1);
    let letters = cache.dead_letters().await.unwrap();
    cache.forget_dead_letters(&letters[0]).await.unwrap();
    wait_for(&exported, &[("dead_letters", 0.0), ("dead_letters_bytes", 0.0)]).await;
}

#[tokio::test]
async fn a_queued_write_that_fails_again_and_again_shows_as_parked_until_it_is_stored() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let ((guard, faults), directory) = (away(), tempfile::tempdir().unwrap());
    let open = Cache::builder().store(guard).queue(directory.path().join("queue.db"));
    let cache = open.open().await.unwrap();
    faults.always(Fault::Refuse);
    let _ = cache.put("t", &1).await.unwrap();
    faults.poison("t", Fault::Fail(ErrorKind::Unavailable));
    faults.heal();
    wait_for(&exported, &[("parked_records", 1.0), ("breaker_state", 0.0)]).await;
    assert_eq!(cache.health().queue.unwrap().parked, 1);
    faults.antidote();
    let _ = cache.put("t", &2).await.unwrap();
    wait_for(&exported, &[("parked_records", 0.0), ("queue_records", 0.0)]).await;
}

#[tokio::test]
async fn trouble_shows_while_an_operator_is_needed() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let (guard, faults) = away();
    let every = Duration::from_millis(10);
    let directory = tempfile::tempdir().unwrap();
    let open = Cache::builder().store(guard).queue(directory.path().join("queue.db")).upkeep_every(every);
    let cache = open.open().await.unwrap();
    faults.always(Fault::Refuse);
    let _ = cache.put("t", &1).await.unwrap();
    // Nobody calls anything any more: that the key is refused shows by the write that waits.
    faults.always(Fault::Fail(ErrorKind::Denied));
    let is_there = async |expected: f64| {
        let shows = || value(&exported, "trouble", "kind=denied") == expected;
        wait_until(&format!("trouble {expected}"), shows).await;
    };
    is_there(1.0).await;
    assert_eq!(value(&exported, "trouble", "kind=schema"), 0.0);
    faults.heal();
    is_there(0.0).await;
}

#[cfg(feature = "sqlite")]
#[tokio::test]
async fn trouble_shows_while_a_local_file_has_no_name() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let directory = tempfile::tempdir().unwrap();
    let paths = ["queue.db", "local.db"].map(|name| directory.path().join(name));
    let every = Duration::from_millis(50);
    let queue =
        Cache::builder().store(Memory::new()).queue(&paths[0]).upkeep_every(every).open().await.unwrap();
    let local = Cache::builder().local(&paths[1]).upkeep_every(every).open().await.unwrap();
    for (cache, path) in [(queue, &paths[0]), (local, &paths[1])] {
        assert_eq!(value(&exported, "trouble", "kind=local"), 0.0);
        // Nobody calls anything.
        std::fs::rename(path, path.with_extension("old")).unwrap();
        wait_until("trouble", || value(&exported, "trouble", "kind=local") == 1.0).await;
        assert_eq!(cache.health().cause.unwrap().kind(), ErrorKind::Local);
        std::fs::rename(path.with_extension("old"), path).unwrap();
        wait_until("no trouble", || value(&exported, "trouble", "kind=local") == 0.0).await;
        assert!(cache.health().cause.is_none());
    }
}

#[tokio::test]
async fn caches_add_up_and_what_is_evicted_is_counted() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let open = async || Cache::builder().memory().cache_bytes(100_000).open().await.unwrap();
    let (one, other) = (open().await, open().await);
    for cache in [&one, &other] {
        for at in 0..10 {
            let _ = cache.put(format!("t{at}"), &at).await.unwrap();
        }
        let _ = cache.remove("t0").await.unwrap();
    }
    wait_for(&exported, &[("memory_entries", 18.0), ("memory_bound_bytes", 200_000.0)]).await;
    assert_eq!(value(&exported, "memory_evictions_total", ""), 0.0, "a removal is none");
    drop(other);
    wait_for(&exported, &[("memory_entries", 9.0), ("memory_bound_bytes", 100_000.0)]).await;

    for at in 0..1_000 {
        let _ = one.put(format!("u{at}"), &at).await.unwrap();
    }
    // Nothing reads or writes any more, and yet it is within its bound.
    wait_until("memory within its bound", || value(&exported, "memory_bytes", "") <= 100_000.0).await;
    wait_until("evictions", || value(&exported, "memory_evictions_total", "") > 600.0).await;
}
