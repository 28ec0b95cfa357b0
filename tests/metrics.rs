//! The exported series are exactly the series of the table `SERIES`, and the gauges show the present state.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use threadkeep::metrics::SERIES;
use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{BreakerState, Cache, ErrorKind};

/// Makes a recorder for the OS thread of a test. All tasks of the test run on that OS thread.
fn recorder() -> (PrometheusRecorder, PrometheusHandle) {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    (recorder, handle)
}

/// Reads the value of each series by its name and label. For a histogram, the value is the number of recordings.
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

/// Waits until `condition` holds. The test makes no call during the wait.
async fn wait_until(event: &str, condition: impl Fn() -> bool) {
    for _ in 0..1_500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("timed out: {event}");
}

/// Waits until each gauge has its expected value.
async fn wait_for(exported: &PrometheusHandle, gauges: &[(&str, f64)]) {
    let is = |(name, expected): &(&str, f64)| value(exported, name, "") == *expected;
    wait_until(&format!("{gauges:?}"), || gauges.iter().all(is)).await;
}

/// Makes a `ResilientStore` with planned faults.
fn resilient_store() -> (ResilientStore<FaultStore<Memory>>, Faults) {
    let store = FaultStore::new(Memory::new());
    let faults = store.faults();
    (ResilientStore::new(store, Duration::from_secs(1)), faults)
}

#[tokio::test]
async fn series_match_the_table_for_any_number_of_conversations() {
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

    let memory = Cache::builder().memory().cache_max_bytes(1 << 20).open().await.unwrap();
    // The breaker exports its series as soon as it exists.
    let (store, faults) = resilient_store();
    let cache = Cache::builder().store(store).fresh_for(Duration::ZERO).open().await.unwrap();
    assert_eq!(series(), expected, "each series exists before its first count");

    for kind in [ErrorKind::Unauthorized, ErrorKind::Rejected, ErrorKind::SchemaOutdated] {
        faults.script([Fault::Fail(kind)]);
        cache.put("t", &1).await.unwrap_err();
    }
    cache.put("t", &1).user("u").await.unwrap();
    assert!(cache.get("t").await.unwrap().is_some());
    faults.always(Fault::Refuse);
    while cache.health().breaker == Some(BreakerState::Closed) {
        cache.get("unknown").await.unwrap_err();
    }
    for at in 0..20_000 {
        match at % 20 {
            0 => _ = memory.put(format!("thread {at}"), &at).await.unwrap(),
            _ => assert!(memory.get(format!("thread {at}")).await.unwrap().is_none()),
        }
    }
    assert_eq!(series(), expected, "20,000 conversations and each kind of failure add no series");
}

#[tokio::test]
async fn gauges_show_queue_and_replica_without_traffic() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let ((store, faults), directory) = (resilient_store(), tempfile::tempdir().unwrap());
    let open = Cache::builder().store(store).queue(directory.path().join("queue.db"));
    let cache = open
        .queue_max_bytes(100_000)
        .replica_max_bytes(200_000)
        .cache_max_bytes(300_000)
        .open()
        .await
        .unwrap();
    let limits = ["queue_limit_bytes", "replica_limit_bytes", "cache_limit_bytes"];
    assert_eq!(limits.map(|limit| value(&exported, limit, "")), [100_000.0, 200_000.0, 300_000.0]);

    faults.always(Fault::Refuse);
    for at in 0..3 {
        cache.put(format!("t{at}"), &at).await.unwrap();
    }
    wait_for(&exported, &[("queue_records", 3.0), ("replica_records", 0.0), ("cache_entries", 3.0)]).await;
    let bytes = value(&exported, "queue_bytes", "");
    assert!(bytes > 600.0 && value(&exported, "queue_oldest_age_seconds", "") > 0.0, "{bytes}");
    assert_ne!(value(&exported, "breaker_state", ""), 0.0);

    faults.clear();
    wait_for(&exported, &[("queue_records", 0.0), ("replica_records", 3.0), ("breaker_state", 0.0)]).await;
    wait_for(&exported, &[("queue_bytes", 0.0), ("replica_bytes", bytes)]).await;
    wait_for(&exported, &[("queue_oldest_age_seconds", 0.0)]).await;

    drop(cache);
    wait_for(&exported, &[("replica_records", 0.0), ("queue_limit_bytes", 0.0)]).await;
}

#[tokio::test]
async fn dead_letter_gauge_counts_until_the_letter_is_deleted() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let ((store, faults), directory) = (resilient_store(), tempfile::tempdir().unwrap());
    let open = Cache::builder().store(store).queue(directory.path().join("queue.db"));
    let cache = open.open().await.unwrap();
    faults.always(Fault::Refuse);
    cache.put("t", &1).await.unwrap();
    faults.clear();
    faults.fail_key("t", Fault::Fail(ErrorKind::Rejected));
    wait_for(&exported, &[("queue_records", 0.0), ("dead_letters", 1.0)]).await;
    assert!(value(&exported, "dead_letters_bytes", "") > 200.0);
    assert_eq!(cache.health().queue.unwrap().dead_letters, 1);
    let letters = cache.dead_letters().await.unwrap();
    cache.delete_dead_letters(&letters[0]).await.unwrap();
    wait_for(&exported, &[("dead_letters", 0.0), ("dead_letters_bytes", 0.0)]).await;
}

#[tokio::test]
async fn parked_gauge_counts_until_the_write_is_stored() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let ((store, faults), directory) = (resilient_store(), tempfile::tempdir().unwrap());
    let open = Cache::builder().store(store).queue(directory.path().join("queue.db"));
    let cache = open.open().await.unwrap();
    faults.always(Fault::Refuse);
    cache.put("t", &1).await.unwrap();
    faults.fail_key("t", Fault::Fail(ErrorKind::Unavailable));
    faults.clear();
    wait_for(&exported, &[("queue_parked_records", 1.0), ("breaker_state", 0.0)]).await;
    assert_eq!(cache.health().queue.unwrap().parked, 1);
    faults.clear_key_faults();
    cache.put("t", &2).await.unwrap();
    wait_for(&exported, &[("queue_parked_records", 0.0), ("queue_records", 0.0)]).await;
}

#[tokio::test]
async fn alert_gauge_is_one_while_an_operator_is_needed() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let (store, faults) = resilient_store();
    let every = Duration::from_millis(10);
    let directory = tempfile::tempdir().unwrap();
    let open =
        Cache::builder().store(store).queue(directory.path().join("queue.db")).maintenance_interval(every);
    let cache = open.open().await.unwrap();
    faults.always(Fault::Refuse);
    cache.put("t", &1).await.unwrap();
    // From here on the test makes no call. The replay of the queued write meets the rejected key.
    faults.always(Fault::Fail(ErrorKind::Unauthorized));
    let wait_for_alert = async |expected: f64| {
        let shows = || value(&exported, "operator_alert", "kind=unauthorized") == expected;
        wait_until(&format!("operator_alert is {expected}"), shows).await;
    };
    wait_for_alert(1.0).await;
    assert_eq!(value(&exported, "operator_alert", "kind=schema_outdated"), 0.0);
    faults.clear();
    wait_for_alert(0.0).await;
}

#[tokio::test]
async fn alert_gauge_is_one_while_a_local_file_has_no_name() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let directory = tempfile::tempdir().unwrap();
    let paths = ["queue.db", "local.db"].map(|name| directory.path().join(name));
    let every = Duration::from_millis(50);
    let queue = Cache::builder()
        .store(Memory::new())
        .queue(&paths[0])
        .maintenance_interval(every)
        .open()
        .await
        .unwrap();
    let local = Cache::builder().local(&paths[1]).maintenance_interval(every).open().await.unwrap();
    for (cache, path) in [(queue, &paths[0]), (local, &paths[1])] {
        assert_eq!(value(&exported, "operator_alert", "kind=local_storage"), 0.0);
        // The test makes no call.
        std::fs::rename(path, path.with_extension("old")).unwrap();
        wait_until("the alert is on", || value(&exported, "operator_alert", "kind=local_storage") == 1.0)
            .await;
        assert_eq!(cache.health().cause.unwrap().kind(), ErrorKind::LocalStorage);
        std::fs::rename(path.with_extension("old"), path).unwrap();
        wait_until("the alert is off", || value(&exported, "operator_alert", "kind=local_storage") == 0.0)
            .await;
        assert!(cache.health().cause.is_none());
    }
}

#[tokio::test]
async fn gauges_sum_over_caches_and_evictions_are_counted() {
    let (recorder, exported) = recorder();
    let _here = metrics::set_default_local_recorder(&recorder);
    let open = async || Cache::builder().memory().cache_max_bytes(100_000).open().await.unwrap();
    let (one, other) = (open().await, open().await);
    for cache in [&one, &other] {
        for at in 0..10 {
            cache.put(format!("t{at}"), &at).await.unwrap();
        }
        cache.remove("t0").await.unwrap();
    }
    wait_for(&exported, &[("cache_entries", 18.0), ("cache_limit_bytes", 200_000.0)]).await;
    assert_eq!(value(&exported, "cache_evictions_total", ""), 0.0, "a removal is no eviction");
    drop(other);
    wait_for(&exported, &[("cache_entries", 9.0), ("cache_limit_bytes", 100_000.0)]).await;

    for at in 0..1_000 {
        one.put(format!("u{at}"), &at).await.unwrap();
    }
    // Without further calls, the memory shrinks to its limit.
    wait_until("memory is within its limit", || value(&exported, "cache_bytes", "") <= 100_000.0).await;
    wait_until("evictions are counted", || value(&exported, "cache_evictions_total", "") > 600.0).await;
}
