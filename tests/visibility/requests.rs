//! The requests of eight daemons that read hot conversations, with the feed and without it.

use std::time::{Duration, Instant};

use threadkeep::Cache;
use tokio::task::JoinSet;

use crate::stack::{Gateway, Server};
use crate::{SECOND, builder, eventually, number, start};

const DAEMONS: usize = 8;

/// Reads all conversations once in each daemon.
async fn read_all(caches: &[Cache], conversations: u64) {
    let mut readers = JoinSet::new();
    for cache in caches {
        let cache = cache.clone();
        readers.spawn(async move {
            for at in 0..conversations {
                assert!(cache.get(format!("hot {at}")).await.unwrap().is_some());
            }
        });
    }
    readers.join_all().await;
}

/// Reads all conversations in each daemon once a second. Returns the time that it took.
async fn read_for(span: Duration, caches: &[Cache], conversations: u64) -> Duration {
    let began = Instant::now();
    while began.elapsed() < span {
        let next = Instant::now() + SECOND;
        read_all(caches, conversations).await;
        tokio::time::sleep_until(next.into()).await;
    }
    began.elapsed()
}

/// Returns the requests a second of all daemons after a settling time.
async fn requests(gateway: &Gateway, interval: Duration, conversations: u64, span: Duration) -> f64 {
    let mut caches: Vec<Cache> = Vec::new();
    for _ in 0..DAEMONS {
        caches.push(builder(gateway).feed_interval(interval).open().await.unwrap());
    }
    let loads = || gateway.count("threadkeep_load");
    read_for(span, &caches, conversations).await;
    // The first round of a busy machine takes longer.
    eventually("a round without a load", async || {
        let before = loads();
        read_all(&caches, conversations).await;
        loads() == before
    })
    .await;
    gateway.forget();
    let took = read_for(span, &caches, conversations).await;
    let counted = gateway.count("");
    println!("of these: load {}, changes {}", loads(), gateway.count("threadkeep_changes"));
    counted as f64 / took.as_secs_f64()
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
