//! The requests of eight daemons that read hot conversations, with the feed and without it.

use std::time::{Duration, Instant};

use threadkeep::Cache;

use crate::stack::{Gateway, Server};
use crate::{SECOND, builder, number, start};

const DAEMONS: usize = 8;

/// Reads all conversations in each daemon once a second. Returns the requests a second after the first `settling` time.
async fn requests(gateway: &Gateway, interval: Duration, conversations: u64, span: Duration) -> f64 {
    let mut caches: Vec<Cache> = Vec::new();
    for _ in 0..DAEMONS {
        caches.push(builder(gateway).feed_interval(interval).open().await.unwrap());
    }
    let settled = Instant::now() + span;
    let end = settled + span;
    let readers = caches.into_iter().map(|cache| {
        tokio::spawn(async move {
            while Instant::now() < end {
                let began = Instant::now();
                for at in 0..conversations {
                    assert!(cache.get(format!("hot {at}")).await.unwrap().is_some());
                }
                tokio::time::sleep(SECOND.saturating_sub(began.elapsed())).await;
            }
        })
    });
    let readers: Vec<_> = readers.collect();
    tokio::time::sleep_until(settled.into()).await;
    gateway.forget();
    tokio::time::sleep_until(end.into()).await;
    let counted = gateway.count("");
    println!(
        "of these: load {}, changes {}",
        gateway.count("threadkeep_load"),
        gateway.count("threadkeep_changes")
    );
    for reader in readers {
        reader.await.unwrap();
    }
    counted as f64 / span.as_secs_f64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn feed_spares_the_requests_of_hot_conversations() {
    let stack = start(Server::Postrust).await;
    let gateway = stack.gateway().await;
    // The settling time exceeds the freshness period of 30 s, if the figures are for the document.
    let (span, conversations) = (number("FEED_SECONDS", 8), number("FEED_CONVERSATIONS", 200));
    let span = Duration::from_secs(span);
    let writer = builder(&gateway).feed_interval(Duration::ZERO).open().await.unwrap();
    for at in 0..conversations {
        writer.put(format!("hot {at}"), &"x".repeat(1_000)).await.unwrap();
    }
    let with = requests(&gateway, 2 * SECOND, conversations, span).await;
    println!("{DAEMONS} daemons, {conversations} conversations, with the feed: {with:.1} requests a second");
    assert!(with < 10.0, "{with}");
    if std::env::var_os("FEED_SECONDS").is_some() {
        let without = requests(&gateway, Duration::ZERO, conversations, span).await;
        println!("without the feed: {without:.1} requests a second");
    }
}
