//! Another database takes the place of the first one, behind the same address.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::SeqCst};
use std::time::Duration;

use threadkeep::{Cache, ErrorKind, Freshness, WriteOutcome};
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restore_during_a_stop_drops_the_copies_and_keeps_the_queue() {
    let (first, second) = tokio::join!(start(Server::Postrust), start(Server::Postrust));
    let port = |url: String| url.rsplit(':').next().unwrap().parse::<u16>().unwrap();
    let target = Arc::new(AtomicU16::new(port(first.server_url())));
    let gateway = Gateway::start(Server::Postrust, proxy(Arc::clone(&target)).await).await;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let settings = || builder(&gateway).queue(directory.path().join("queue.db"));
    let open = async || {
        let cache = settings().feed_interval(Duration::from_millis(200)).open().await.unwrap();
        gateway.forget();
        // The feed has handled the first answer when it polls again.
        gateway.wait_for(3, "threadkeep_changes").await;
        cache
    };
    let copies = |cache: &Cache| cache.health().queue.unwrap().copies;
    let cache = settings().feed_interval(Duration::ZERO).open().await.unwrap();
    cache.put("lost", &1).await.unwrap();
    cache.shutdown(SECOND).await.unwrap();
    let cache = open().await;
    assert_eq!(copies(&cache), 1, "a file without a history takes the one of the database");
    cache.shutdown(SECOND).await.unwrap();

    let cache = open().await;
    assert_eq!(copies(&cache), 1, "a plain restart keeps the copies");
    gateway.always(Fault::html(522));
    assert!(matches!(cache.put("queued", &2).await.unwrap(), WriteOutcome::Queued));
    cache.shutdown(Duration::ZERO).await.unwrap();

    target.store(port(second.server_url()), SeqCst);
    gateway.clear();
    let cache = open().await;
    eventually("the replay", async || cache.health().queue.unwrap().records == 0).await;
    let row = "select conversation_data::text from conversation_threads where thread_id = 'queued'";
    assert_eq!(second.sql().await.query_one(row, &[]).await.unwrap().get::<_, &str>(0), "2");
    gateway.always(Fault::html(522));
    assert_eq!(cache.get("lost").await.unwrap_err().kind(), ErrorKind::Unavailable);
    cache.shutdown(Duration::ZERO).await.unwrap();

    gateway.clear();
    let cache = open().await;
    cache.put("kept", &3).await.unwrap();
    cache.shutdown(SECOND).await.unwrap();
    let cache = open().await;
    assert!(copies(&cache) >= 1, "the file has the history of the other database");
}
