//! A real Prometheus watches the daemon through an outage. Every panel shows data, every alert fires in its condition,
//! and no alert remains. The number of series does not grow with the number of conversations.
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
use serde_json::{Value, json};
use stack::{Fault, Gateway, Prometheus, Server, Stack, free_port};
use threadkeep::Cache;
use threadkeep::metrics::SERIES;
use threadkeep::tools::QueueAdmin;

/// Starts Prometheus with the committed configuration for a daemon at `addr`. Shortens minutes to seconds.
fn watch(addr: &str) -> Prometheus {
    let replace = |text: String, from: &str, to: &str| {
        assert!(text.contains(from), "no {from} in:\n{text}");
        text.replace(from, to)
    };
    let config = replace(read("prometheus.yml"), "127.0.0.1:8080", addr);
    let config = replace(config, "_interval: 15s", "_interval: 200ms");
    let alerts = replace(read("alerts.yml"), "[10m]", "[3s]");
    let alerts = replace(alerts, "offset 10m", "offset 3s");
    let alerts = replace(alerts, "> 900", "> 1");
    let alerts = replace(alerts, "feed_lag_seconds > 60", "feed_lag_seconds > 10");
    let shortened = alerts.lines().map(|line| match line.trim_start().starts_with("for: ") {
        true => "        for: 1s\n".to_owned(),
        false => format!("{line}\n"),
    });
    Prometheus::start(&[("prometheus.yml", config), ("alerts.yml", shortened.collect())])
}

#[tokio::test(flavor = "multi_thread")]
async fn outage_fires_every_alert_and_fills_every_panel() {
    let stack = tokio::task::block_in_place(|| Stack::shared(Server::Postrust));
    let gateway = stack.gateway().await;
    let mut daemon = start_daemon(&gateway).await;
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
    assert_eq!(api.fired(start).await, BTreeSet::new(), "no alert fires in normal operation");

    feed_fires_its_alerts(&gateway, &api).await;
    outage_fires_its_alerts(&daemon, &gateway, &api).await;
    rejected_write_fires_dead_letters(&daemon, &gateway, &api).await;

    gateway.always(Fault::json_error(401, "PGRST301"));
    api.wait_for_alert("ThreadkeepNeedsOperator").await;
    gateway.clear();
    load.widen(true);
    api.wait_for_alert("ThreadkeepHitRatioCollapsed").await;
    load.widen(false);
    api.wait_for_no_alerts_but(&["ThreadkeepDeadLetters"]).await;

    daemon.terminate().await;
    api.wait_for_alert("ThreadkeepDown").await;
    delete_dead_letters(&daemon).await;
    daemon.restart().await;
    api.wait_for_no_alerts_but(&[]).await;

    assert_alerts_and_panels(&api, start).await;
    assert_labels_are_those_of_the_table(&api.series().await);
}

/// Starts a daemon behind the gateway, with small bounds for its memory and its queue.
async fn start_daemon(gateway: &Gateway) -> Daemon {
    let (url, key) = (gateway.url(), gateway.keys().secret);
    Daemon::start(&[
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", &url),
        ("SUPABASE_KEY", &key),
        ("CONVERSATION_FRESH_SECONDS", "2"),
        ("CONVERSATION_CACHE_MAX_BYTES", "64KiB"),
        ("CONVERSATION_QUEUE_MAX_BYTES", "256KiB"),
    ])
    .await
}

/// Lets the polls of the feed fail alone. Then gives the daemon the cursor of another database, as if that one had stood here.
async fn feed_fires_its_alerts(gateway: &Gateway, api: &Api) {
    gateway.rule(|seen| match seen.path.contains("threadkeep_changes") {
        true => Fault::json_error(403, "42501"),
        false => Fault::Pass,
    });
    api.wait_for_alert("ThreadkeepFeedLags").await;
    gateway.clear();
    api.wait_for_no_alerts_but(&[]).await;

    let page = json!({
        "now": (now() * 1000.0) as u64, "revision": 4, "cursor": "another 0 1:1:", "state": "unbroken", "rows": [], "is_last": true
    });
    gateway.script_for("threadkeep_changes", [Fault::answer(200, &page.to_string())]);
    api.wait_for_alert("ThreadkeepDatabaseRestored").await;
    api.wait_for_no_alerts_but(&[]).await;
}

/// Begins an outage and queues the write "rejected". Waits for the alerts until the queue is full and writes fail.
async fn outage_fires_its_alerts(daemon: &Daemon, gateway: &Gateway, api: &Api) {
    gateway.always(Fault::html(522));
    wait_for_ready(daemon, 200, "degraded").await;
    let rejected = daemon.chat("rejected", None).await;
    assert_eq!(rejected.body["durability"], "queued");
    for alert in ["ThreadkeepBreakerOpen", "ThreadkeepQueuedWriteOld", "ThreadkeepQueueNearBound"] {
        api.wait_for_alert(alert).await;
    }
    wait_for_ready(daemon, 503, "unready").await;
    let failed = "rate(threadkeep_writes_total{outcome=\"failed\"}[3s]) > 0";
    wait_until("failed writes", async || !api.query(failed).await.is_empty()).await;
}

/// Ends the outage. Supabase rejects the queued write "rejected" permanently and accepts all other writes.
async fn rejected_write_fires_dead_letters(daemon: &Daemon, gateway: &Gateway, api: &Api) {
    gateway.rule(|seen| match seen.path.contains("apply") && seen.body.contains("rejected") {
        true => Fault::json_error(400, "23514"),
        false => Fault::Pass,
    });
    api.wait_for_alert("ThreadkeepDeadLetters").await;
    api.wait_for_no_alerts_but(&["ThreadkeepDeadLetters"]).await;
    wait_for_ready(daemon, 200, "ready").await;
}

/// Checks that each alert has fired, that each panel shows data, and that all series are known.
async fn assert_alerts_and_panels(api: &Api, start: f64) {
    let rules = api.rules().await;
    let alerts: BTreeSet<String> =
        rules.iter().map(|rule| rule["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(api.fired(start).await, alerts, "every alert fired");
    for Expression { place, text } in of_panels() {
        assert!(names(&text).is_subset(&known()), "{place} names an unknown series: {text}");
        assert!(!api.numbers(&text, start).await.is_empty(), "{place} shows nothing: {text}");
    }
    for rule in rules {
        let (name, text) = (&rule["name"], rule["query"].as_str().unwrap());
        assert!(names(text).is_subset(&known()), "{name} names an unknown series: {text}");
    }
}

/// Waits until `/readyz` returns the status. Meanwhile, `/healthz` reports a live daemon.
async fn wait_for_ready(daemon: &Daemon, status: u16, word: &str) {
    wait_until(&format!("/readyz to return {word}"), async || {
        assert_eq!(daemon.request("GET", "/healthz", None).await.status, 200);
        let answer = daemon.request("GET", "/readyz", None).await;
        assert_eq!(answer.body["reason"].is_null(), answer.body["status"] == "ready", "{answer:?}");
        (answer.status, answer.body["status"].as_str()) == (status, Some(word))
    })
    .await;
}

/// Deletes the only dead letter while the daemon is down.
async fn delete_dead_letters(daemon: &Daemon) {
    let file = QueueAdmin::open(daemon.directory().join("threadkeep-queue.db")).await.unwrap();
    let letters = file.dead_letters(None).await.unwrap();
    assert_eq!(letters.len(), 1, "{letters:?}");
    file.delete_dead_letters(&letters[0]).await.unwrap();
    file.close().await.unwrap();
}

/// Checks that the labels are those of the table: no label contains a thread id.
fn assert_labels_are_those_of_the_table(scraped: &[Value]) {
    let table: BTreeMap<&str, _> = SERIES.iter().map(|series| (series.name, series)).collect();
    let mut seen = BTreeSet::new();
    for labels in scraped {
        let name = labels["__name__"].as_str().unwrap();
        let part = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
        let series = table.get(name).or_else(|| table.get(part?)).unwrap_or_else(|| panic!("{name}"));
        seen.insert(series.name);
        for (label, value) in labels.as_object().unwrap() {
            let value = value.as_str().unwrap();
            let is_known = match label.as_str() {
                "__name__" | "job" | "instance" => true,
                "le" => value == "+Inf" || value.parse::<f64>().is_ok_and(|le| series.buckets.contains(&le)),
                label => series.label.is_some_and(|(name, values)| label == name && values.contains(&value)),
            };
            assert!(is_known, "{labels}");
        }
    }
    assert_eq!(seen, table.into_keys().collect(), "Prometheus scraped all series of the table");
}

#[tokio::test(flavor = "multi_thread")]
async fn series_after_100_000_conversations_are_unchanged() {
    let addr = format!("127.0.0.1:{}", free_port());
    threadkeep::prometheus::install(addr.parse().unwrap()).unwrap();
    let again = threadkeep::prometheus::install_recorder().unwrap_err();
    assert!(again.to_string().contains("already has a metrics recorder"), "{again}");
    let cache = Cache::builder().memory().cache_max_bytes(1 << 20).open().await.unwrap();
    let prometheus = tokio::task::block_in_place(|| watch(&addr));
    let api = Api::new(prometheus.url());
    let series_after = async |min_reads: usize| {
        let reads = format!("sum(threadkeep_reads_total) >= {min_reads}");
        wait_until(&format!("{min_reads} reads"), async || !api.query(&reads).await.is_empty()).await;
        let mut series = api.series().await;
        series.sort_by_key(Value::to_string);
        series
    };
    cache.put("thread", &1).await.unwrap();
    assert!(cache.get("thread").await.unwrap().is_some() && cache.get("unknown").await.unwrap().is_none());
    let before = series_after(2).await;
    for at in 0..100_000 {
        if at % 20 == 0 {
            cache.put(format!("thread-{at}"), &at).await.unwrap();
        }
        let found = cache.get(format!("thread-{at}")).await.unwrap();
        assert_eq!(found.is_some(), at % 20 == 0);
    }
    assert_eq!(series_after(100_002).await, before);
    assert_labels_are_those_of_the_table(&before);
}

#[tokio::test]
async fn install_on_used_address_names_the_address() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let error = threadkeep::prometheus::install(addr).unwrap_err();
    assert!(error.to_string().contains(&addr.to_string()) && error.to_string().contains("free"), "{error}");
}

#[test]
fn install_outside_a_runtime_names_the_runtime() {
    let error = threadkeep::prometheus::install_recorder().unwrap_err();
    assert!(error.to_string().contains("runtime"), "{error}");
}
