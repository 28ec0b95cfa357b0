//! Runs the daemon under mixed load through all kinds of outages on a real stack. Memory and file must stay flat.
//! OPERATIONS.md must explain each line of the log.
//!
//! `SOAK_MINUTES=20 cargo test --release --all-features --test soak -- --nocapture` is the full run. Without
//! `SOAK_MINUTES` the test takes half a minute, which is too short to judge memory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

#[path = "../operations/lines.rs"]
mod lines;
mod load;
#[path = "../daemon/process.rs"]
mod process;
mod samples;
#[path = "../stack/mod.rs"]
mod stack;

use std::time::{Duration, Instant};

use load::Load;
use process::Daemon;
use samples::{Sample, Samples};
use serde_json::Value;
use stack::{Fault, Gateway, Server, Stack};

/// The size limit of memory and replica. It is small, so that both reach it soon.
const MAX_BYTES: &str = "4MiB";
/// The time to live is longer than an outage and its replay. It is short, so that conversations expire during the run.
const TTL_HOURS: &str = "0.03";

/// The kinds of outages.
const OUTAGES: [&str; 5] = ["refused", "hangs", "an edge without its origin", "responses are lost", "flaps"];

async fn start_outage(outage: &str, gateway: &Gateway) {
    let mut count = 0;
    match outage {
        "refused" => gateway.refuse().await,
        "hangs" => gateway.always(Fault::Hang),
        "an edge without its origin" => gateway.always(Fault::html(522)),
        "responses are lost" => gateway.rule(move |seen| {
            count += 1;
            if seen.path.contains("apply") && count % 2 == 0 { Fault::DropResponse } else { Fault::Pass }
        }),
        _ => gateway.rule(move |_| {
            count += 1;
            if count / 20 % 2 == 0 { Fault::Pass } else { Fault::html(503) }
        }),
    }
}

async fn start_daemon(gateway: &Gateway) -> Daemon {
    let (url, key) = (gateway.url(), gateway.keys().secret);
    Daemon::start(&[
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", &url),
        ("SUPABASE_KEY", &key),
        ("SUPABASE_TIMEOUT_SECONDS", "2"),
        ("CONVERSATION_FRESH_SECONDS", "2"),
        ("CONVERSATION_CACHE_MAX_BYTES", MAX_BYTES),
        ("CONVERSATION_REPLICA_MAX_BYTES", MAX_BYTES),
        ("CONVERSATION_TIMEOUT_HOURS", TTL_HOURS),
        // glibc gives each thread its own arena. Fragmentation in several arenas would look like growth, or hide it.
        ("MALLOC_ARENA_MAX", "1"),
    ])
    .await
}

fn run_time() -> Duration {
    let minutes = std::env::var("SOAK_MINUTES").ok().map(|text| text.parse::<f64>().expect("SOAK_MINUTES"));
    Duration::from_secs_f64(minutes.unwrap_or(0.5) * 60.0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn soak_memory_and_file_stay_flat_and_log_is_explained() {
    let run_time = run_time();
    let phase = (run_time / 60).clamp(Duration::from_millis(1_500), Duration::from_secs(20));
    let stack = tokio::task::block_in_place(|| Stack::start(Server::Postrust));
    let gateway = stack.gateway().await;
    let mut daemon = start_daemon(&gateway).await;
    let load = Load::start(&daemon);
    let (started, mut samples) = (Instant::now(), Samples::default());
    for outage in OUTAGES.iter().cycle() {
        tokio::time::sleep(phase).await;
        start_outage(outage, &gateway).await;
        tokio::time::sleep(phase).await;
        gateway.clear();
        gateway.accept().await;
        gateway.forget(); // the recorded requests would fill the memory of the machine
        wait_until_replayed(&mut daemon).await;
        let sample = Sample::of(&daemon, started.elapsed());
        println!("{sample}  after: {outage}");
        samples.add(sample);
        if started.elapsed() >= run_time {
            break;
        }
    }
    let counts = load.end().await;
    println!("{counts}\n{samples}");

    let unexplained = lines::unexplained(&daemon.log());
    assert!(unexplained.is_empty(), "OPERATIONS.md does not explain:\n{}", unexplained.join("\n"));
    println!("log: {}", lines::tally(&daemon.log()));
    assert!(counts.complaints.is_empty(), "{:#?}", counts.complaints);
    samples.assert_flat();
    let letters = daemon.request("GET", "/healthz", None).await.body["queue"]["dead_letters"].clone();
    assert_eq!(letters, 0, "the soak makes dead letters");
    assert!(daemon.terminate().await.success());
}

/// Waits under load until the breaker is closed and the queue is empty.
async fn wait_until_replayed(daemon: &mut Daemon) {
    let started = Instant::now();
    let mut health = Value::Null;
    while started.elapsed() < Duration::from_secs(180) {
        daemon.assert_running();
        health = daemon.request("GET", "/healthz", None).await.body;
        if health["breaker"] == "closed" && health["queue"]["records"] == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("timed out: the daemon does not recover: {health}\n{}", daemon.log());
}
