//! Another database takes the place of the first one, behind the same address.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};
use std::time::Duration;

use threadkeep::Freshness;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

use crate::stack::{Fault, Gateway, Server};
use crate::{SECOND, builder, eventually, start};

/// Forwards connections to the port that is set when they begin.
async fn proxy(target: Arc<AtomicU16>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let target = Arc::clone(&target);
            tokio::spawn(async move {
                let at = target.load(SeqCst);
                let mut server = TcpStream::connect(("127.0.0.1", at)).await?;
                tokio::select! {
                    copied = copy_bidirectional(&mut client, &mut server) => copied.map(drop),
                    // The old connections end with the change.
                    () = async { while target.load(SeqCst) == at { tokio::time::sleep(Duration::from_millis(5)).await } } => Ok(()),
                }
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_database_behind_the_address_drops_all_copies() {
    let (first, second) = tokio::join!(start(Server::Postrust), start(Server::Postrust));
    let port = |url: String| url.rsplit(':').next().unwrap().parse::<u16>().unwrap();
    let target = Arc::new(AtomicU16::new(port(first.server_url())));
    let gateway = Gateway::start(Server::Postrust, proxy(Arc::clone(&target)).await).await;
    // The first poll comes late, as on a busy machine.
    gateway.script_for("threadkeep_changes", [Fault::Slow(SECOND)]);
    let beside = second.gateway().await;
    let other = builder(&beside).open().await.unwrap();
    other.put("t", &1).await.unwrap();
    let builder = builder(&gateway).feed_interval(Duration::from_millis(200)).fresh_for(3_600 * SECOND);
    let cache = builder.open().await.unwrap();
    for key in ["t", "lost"] {
        cache.put(key, &2).await.unwrap();
        cache.get(key).await.unwrap().unwrap();
    }
    let edit = "update conversation_threads set conversation_data = '3' where thread_id = 't'";
    first.sql().await.batch_execute(edit).await.unwrap();
    // Without the feed, the value in memory is fresh for an hour. So this read shows that the feed follows the first database.
    eventually("the feed", async || cache.get("t").await.unwrap().unwrap().json() == "3").await;
    assert_eq!(cache.health().queue.unwrap().copies, 2);
    target.store(port(second.server_url()), SeqCst);
    eventually("the other database", async || {
        cache.get("t").await.is_ok_and(|found| found.is_some_and(|found| found.json() == "1"))
    })
    .await;
    // A load may find the other database before the feed does. Memory is dropped before the copies, and a load may come between the two.
    eventually("the drop of the copies", async || cache.health().queue.unwrap().copies <= 1).await;
    assert_eq!(cache.get("t").await.unwrap().unwrap().freshness(), Freshness::Fresh);
    assert!(cache.get("lost").await.unwrap().is_none());
}
