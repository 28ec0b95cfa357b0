//! A real Prometheus watches the daemon through an outage: every panel shows data, every alert fires when it should, and
//! none is left; and however many threads there are, there is not one series more.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod api;
mod expressions;
mod load;
#[path = "../daemon/process.rs"]
mod process;
mod rules;
#[path = "../stack/mod.rs"]
mod stack;

use std::collections::{BTreeMap, BTreeSet};

use api::{Api, now, wait_until};
use expressions::{Expression, known, names, of_panels, read};
use load::Load;
use process::Daemon;
use serde_json::Value;
use stack::{Fault, Prometheus, Server, Stack, free_port};
use threadkeep::metrics::SERIES;
use threadkeep::{Cache, QueueFile};

/// The committed configuration, for a daemon at this address and a test that has no time: what takes minutes takes
/// seconds.
fn watch(addr: &str) -> Prometheus {
    let replace = |text: String, from: &str, to: &str| {
        assert!(text.contains(from), "no {from} in:\n{text}");
        text.replace(from, to)
    };
    let config = replace(read("prometheus.yml"), "127.0.0.1:8080", addr);
    let config = replace(config, "_interval: 15s", "_interval: 200ms");
    let alerts = replace(read("alerts.yml"), "[10m]", "[3s]");
    let alerts = replace(alerts, "> 900", "> 1");
    let shortened = alerts.lines().map(|line| match line.trim_start().starts_with("for: ") {
        true => "        for: 1s\n".to_owned(),
        false => format!("{line}\n"),
    });
    Prometheus::start(&[("prometheus.yml", config), ("alerts.yml", shortened.collect())])
}

#[tokio::test(flavor = "multi_thread")]
async fn every_alert_fires_in_its_time_and_every_panel_shows_data() {
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    let gateway = stack.gateway().await;
    let (url, key) = (gateway.url(), gateway.keys().secret);
    let mut daemon = Daemon::start(&[
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", &url),
        ("SUPABASE_KEY", &key),
        ("CONVERSATION_FRESH_SECONDS", "2"),
        ("CONVERSATION_CACHE_BYTES", "64KiB"),
        ("CONVERSATION_QUEUE_BYTES", "256KiB"),
    ])
    .await;
    let prometheus = tokio::task::block_in_place(|| watch(daemon.addr()));
    let (api, start) = (Api::new(prometheus.url()), now());
    let mut ids = Vec::new();
    for at in 0..200 {
        ids.push(daemon.chat(&format!("conversation {at}: {}", "words ".repeat(50)), None).await.id());
    }
    let load = Load::begin(&daemon, &ids);

    let hits = "rate(threadkeep_reads_total{outcome=\"hit\"}[3s]) > 1";
    wait_until("reads from memory", async || !api.query(hits).await.is_empty()).await;
    wait_for_ready(&daemon, 200, "ready").await;
    assert_eq!(api.fired(start).await, BTreeSet::new(), "all is well");

    gateway.always(Fault::html(522));
    wait_for_ready(&daemon, 200, "degraded").await;
    let doomed = daemon.chat("doomed", None).await;
    assert_eq!(doomed.body["durability"], "queued");
    for alert in ["ThreadkeepBreakerOpen", "ThreadkeepQueuedWriteOld", "ThreadkeepQueueNearBound"] {
        api.wait_for_alert(alert).await;
    }
    wait_for_ready(&daemon, 503, "unready").await;
    let failed = "rate(threadkeep_writes_total{outcome=\"failed\"}[3s]) > 0";
    wait_until("failed writes", async || !api.query(failed).await.is_empty()).await;

    // Supabase is back, and refuses one of the queued writes for good.
    gateway.rule(|seen| match seen.path.contains("apply") && seen.body.contains("doomed") {
        true => Fault::json_error(400, "23514"),
        false => Fault::Pass,
    });
    api.wait_for_alert("ThreadkeepDeadLetters").await;
    api.wait_for_no_alerts_but(&["ThreadkeepDeadLetters"]).await;
    wait_for_ready(&daemon, 200, "ready").await;

    gateway.always(Fault::json_error(401, "PGRST301"));
    api.wait_for_alert("ThreadkeepNeedsOperator").await;
    gateway.heal();
    load.widen(true);
    api.wait_for_alert("ThreadkeepHitRatioCollapsed").await;
    load.widen(false);
    api.wait_for_no_alerts_but(&["ThreadkeepDeadLetters"]).await;

    daemon.terminate().await;
    api.wait_for_alert("ThreadkeepDown").await;
    forget_dead_letters(&daemon).await;
    daemon.restart().await;
    api.wait_for_no_alerts_but(&[]).await;

    let rules = api.rules().await;
    let alerts: BTreeSet<String> =
        rules.iter().map(|rule| rule["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(api.fired(start).await, alerts, "every alert has fired");
    for Expression { place, text } in of_panels() {
        assert!(names(&text).is_subset(&known()), "{place} names an unknown series: {text}");
        assert!(!api.numbers(&text, start).await.is_empty(), "{place} shows nothing: {text}");
    }
    for rule in rules {
        let (name, text) = (&rule["name"], rule["query"].as_str().unwrap());
        assert!(names(text).is_subset(&known()), "{name} names an unknown series: {text}");
    }
    assert_labels_are_those_of_the_table(&api.series().await);
}

/// Waits until `/readyz` says so; `/healthz` says all the while that the daemon is alive.
async fn wait_for_ready(daemon: &Daemon, status: u16, word: &str) {
    wait_until(&format!("/readyz to say {word}"), async || {
        assert_eq!(daemon.request("GET", "/healthz", None).await.status, 200);
        let answer = daemon.request("GET", "/readyz", None).await;
        assert_eq!(answer.body["reason"].is_null(), answer.body["status"] == "ready", "{answer:?}");
        (answer.status, answer.body["status"].as_str()) == (status, Some(word))
    })
    .await;
}

/// While the daemon is down.
async fn forget_dead_letters(daemon: &Daemon) {
    let file = QueueFile::open(daemon.directory().join("threadkeep-queue.db")).await.unwrap();
    let letters = file.dead_letters(None).await.unwrap();
    assert_eq!(letters.len(), 1, "{letters:?}");
    file.forget_dead_letters(&letters[0]).await.unwrap();
    file.close().await.unwrap();
}

/// And so no label has a thread id for its value.
fn assert_labels_are_those_of_the_table(all: &[Value]) {
    let table: BTreeMap<&str, _> = SERIES.iter().map(|series| (series.name, series)).collect();
    let mut seen = BTreeSet::new();
    for labels in all {
        let name = labels["__name__"].as_str().unwrap();
        let part = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
        let series = table.get(name).or_else(|| table.get(part?)).unwrap_or_else(|| panic!("{name}"));
        seen.insert(series.name);
        for (label, value) in labels.as_object().unwrap() {
            let value = value.as_str().unwrap();
            let is_right = match label.as_str() {
                "__name__" | "job" | "instance" => true,
                "le" => value == "+Inf" || value.parse::<f64>().is_ok_and(|le| series.buckets.contains(&le)),
                label => series.label.is_some_and(|(name, values)| label == name && values.contains(&value)),
            };
            assert!(is_right, "{labels}");
        }
    }
    assert_eq!(seen, table.into_keys().collect(), "all series of the table were scraped");
}

#[tokio::test(flavor = "multi_thread")]
async fn there_is_not_one_series_more_after_100_000_threads() {
    let addr = format!("127.0.0.1:{}", free_port());
    threadkeep::prometheus::install(addr.parse().unwrap()).unwrap();
    let again = threadkeep::prometheus::install_recorder().unwrap_err();
    assert!(again.to_string().contains("recorder already"), "{again}");
    let cache = Cache::builder().memory().cache_bytes(1 << 20).open().await.unwrap();
    let prometheus = tokio::task::block_in_place(|| watch(&addr));
    let api = Api::new(prometheus.url());
    let reads = async |least: usize| {
        let reads = format!("sum(threadkeep_reads_total) >= {least}");
        wait_until(&format!("{least} reads"), async || !api.query(&reads).await.is_empty()).await;
        let mut series = api.series().await;
        series.sort_by_key(Value::to_string);
        series
    };
    let _ = cache.put("thread", &1).await.unwrap();
    assert!(cache.get("thread").await.unwrap().is_some() && cache.get("unknown").await.unwrap().is_none());
    let before = reads(2).await;
    for at in 0..100_000 {
        if at % 20 == 0 {
            let _ = cache.put(format!("thread-{at}"), &at).await.unwrap();
        }
        let found = cache.get(format!("thread-{at}")).await.unwrap();
        assert_eq!(found.is_some(), at % 20 == 0);
    }
    assert_eq!(reads(100_002).await, before);
    assert_labels_are_those_of_the_table(&before);
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let error = threadkeep::prometheus::install(addr).unwrap_err();
    assert!(error.to_string().contains(&addr.to_string()) && error.to_string().contains("free"), "{error}");
}

#[test]
fn outside_a_runtime_that_is_said() {
    let error = threadkeep::prometheus::install_recorder().unwrap_err();
    assert!(error.to_string().contains("runtime"), "{error}");
}
