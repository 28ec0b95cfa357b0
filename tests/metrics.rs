//! All series of the table appear, with the labels that it names, and no others.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::Duration;

use metrics_util::debugging::DebuggingRecorder;
use threadkeep::metrics::SERIES;
use threadkeep::testing::{Fault, Faulty};
use threadkeep::{Cache, ErrorKind, Guard, Memory, State};

#[tokio::test]
async fn the_series_are_those_of_the_table_however_many_threads_there_are() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    recorder.install().unwrap();
    let series = || {
        let keys = snapshotter.snapshot().into_hashmap().into_keys();
        keys.map(|key| {
            let labels = key.key().labels().map(|label| format!("{}={}", label.key(), label.value()));
            (key.key().name().to_owned(), labels.collect::<Vec<_>>().join(","))
        })
        .collect::<BTreeSet<_>>()
    };

    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let guard = Guard::new(store, Duration::from_secs(1));
    let cache = Cache::builder().store(guard).fresh_for(Duration::ZERO).open().await.unwrap();
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
    assert_eq!(series(), expected);

    faults.heal();
    let memory = Cache::builder().memory().open().await.unwrap();
    for at in 0..2_000 {
        let _ = memory.put(format!("thread {at}"), &at).await.unwrap();
        assert!(memory.get(format!("thread {at}")).await.unwrap().is_some());
    }
    assert_eq!(series(), expected, "no series more after 2,000 threads");
}
