//! A day in small: the daemon under mixed load through outages of all kinds, on a real stack. Its memory and its file stay
//! nearly as they are, and its log says nothing that OPERATIONS.md does not explain.
//!
//! `SOAK_MINUTES=20 cargo test --release --all-features --test soak -- --nocapture` is the real thing; without it, half a
//! minute shows that the program works, and memory is judged loosely.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod load;
#[path = "../operations/lines.rs"]
mod lines;
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

/// So small that memory and copies are at their bounds soon, and stay there.
const BOUND: &str = "4MiB";
/// Longer than an outage and its replay, and short enough that threads expire meanwhile.
const TTL_HOURS: &str = "0.03";

/// What an outage is like.
const OUTAGES: [&str; 5] = ["refused", "hangs", "an edge without its origin", "answers are lost", "flaps"];

async fn begin(outage: &str, gateway: &Gateway) {
    let mut count = 0;
    match outage {
        "refused" => gateway.refuse().await,
        "hangs" => gateway.always(Fault::Hang),
        "an edge without its origin" => gateway.always(Fault::html(522)),
        "answers are lost" => gateway.rule(move |seen| {
            count += 1;
            if seen.path.contains("apply") && count % 2 == 0 { Fault::LoseAnswer } else { Fault::Pass }
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
        ("CONVERSATION_CACHE_BYTES", BOUND),
        ("CONVERSATION_REPLICA_BYTES", BOUND),
        ("CONVERSATION_TIMEOUT_HOURS", TTL_HOURS),
        // glibc gives each thread an arena of its own, and the holes in them would look like growth, or hide it.
        ("MALLOC_ARENA_MAX", "1"),
    ])
    .await
}

fn length() -> Duration {
    let minutes = std::env::var("SOAK_MINUTES").ok().map(|text| text.parse::<f64>().expect("SOAK_MINUTES"));
    Duration::from_secs_f64(minutes.unwrap_or(0.5) * 60.0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_and_file_stay_as_they_are_and_the_log_is_explained() {
    let length = length();
    let phase = (length / 60).clamp(Duration::from_millis(1_500), Duration::from_secs(20));
    let stack = tokio::task::block_in_place(|| Stack::start(Server::Postrust));
    let gateway = stack.gateway().await;
    let mut daemon = start_daemon(&gateway).await;
    let load = Load::begin(&daemon);
    let (began, mut samples) = (Instant::now(), Samples::default());
    for outage in OUTAGES.iter().cycle() {
        tokio::time::sleep(phase).await;
        begin(outage, &gateway).await;
        tokio::time::sleep(phase).await;
        gateway.heal();
        gateway.accept().await;
        gateway.forget(); // or the growth of this process would slow the machine down
        wait_until_replayed(&mut daemon).await;
        let sample = Sample::of(&daemon, began.elapsed());
        println!("{sample}  after: {outage}");
        samples.add(sample);
        if began.elapsed() >= length {
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
    assert_eq!(letters, 0, "dead letters");
    assert!(daemon.terminate().await.success());
}

/// Waits until the breaker is closed and the queue has been seen empty, while the load goes on.
async fn wait_until_replayed(daemon: &mut Daemon) {
    let began = Instant::now();
    let mut health = Value::Null;
    while began.elapsed() < Duration::from_secs(180) {
        daemon.assert_running();
        health = daemon.request("GET", "/healthz", None).await.body;
        if health["breaker"] == "closed" && health["queue"]["records"] == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it does not recover: {health}\n{}", daemon.log());
}
