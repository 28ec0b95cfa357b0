//! The outage file on a full disk.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use threadkeep::{Cache, ErrorKind, WriteOutcome};

use crate::mount::Mount;
use crate::world::{FILE, World, wait_until_drained};

const SECOND: Duration = Duration::from_secs(1);
const SIZE: &str = "2m";

/// Fills the rest of the disk.
fn fill(dir: &Path) {
    let mut file = File::options().create(true).append(true).open(dir.join("foreign file")).unwrap();
    while file.write_all(&[0; 4_096]).is_ok() {}
}

fn free_space(dir: &Path) {
    fs::remove_file(dir.join("foreign file")).unwrap();
}

/// Opens a cache in an outage. On a full disk the open may fail with an error that names the cause.
async fn start(world: &mut World) -> Option<Cache> {
    match world.open_in_outage().await {
        Ok(cache) => Some(cache),
        Err(error) => {
            let text = error.to_string();
            assert_eq!(error.kind(), ErrorKind::LocalStorage, "{text}");
            assert!(text.contains(FILE) && text.contains("the disk is full"), "{text}: {error:?}");
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_fails_puts_and_keeps_queued_writes() {
    let mount = Mount::tmpfs(SIZE);
    let mut world = World::new(mount.path());
    let cache = world.open_in_outage().await.unwrap();
    let value = |at: usize| format!("{at} {}", "x".repeat(at % 7 * 5_000));
    let (mut queued, mut errors) = (Vec::new(), 0);
    for at in 0..400 {
        match cache.put(format!("t{at}"), &value(at)).await {
            Ok(outcome) => {
                assert_eq!(outcome, WriteOutcome::Queued);
                queued.push(at);
            }
            Err(error) => {
                let text = error.to_string();
                assert_eq!(error.kind(), ErrorKind::LocalStorage, "{text}");
                assert!(text.contains(FILE) && text.contains("the disk is full"), "{text}: {error:?}");
                errors += 1;
            }
        }
    }
    println!("{} queued, {errors} errors", queued.len());
    assert!(errors > 100 && queued.len() > 40);
    drop(cache);
    if let Some(cache) = start(&mut world).await {
        for at in &queued {
            let found = cache.get(format!("t{at}")).await.unwrap().unwrap();
            assert_eq!(found.decode::<String>().unwrap(), value(*at), "the disk is still full");
        }
        drop(cache);
    }
    mount.remount("size=8m");
    let cache = start(&mut world).await.unwrap();
    for at in &queued {
        let found = cache.get(format!("t{at}")).await.unwrap().unwrap();
        assert_eq!(found.decode::<String>().unwrap(), value(*at));
    }
    assert_eq!(cache.health().queue.unwrap().records, queued.len() as u64);
    assert_eq!(cache.put("t399", "again").await.unwrap(), WriteOutcome::Queued);
    world.end_outage(&cache).await;
    wait_until_drained(&cache).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_stores_puts_and_never_serves_an_older_copy() {
    let mount = Mount::tmpfs(SIZE);
    let mut world = World::new(mount.path());
    let cache = world.open().await.unwrap();
    let value = |version: u8| format!("{version} {}", "x".repeat(20_000));
    for at in 0..10 {
        assert_eq!(cache.put(format!("t{at}"), &value(1)).await.unwrap(), WriteOutcome::Stored);
    }
    world.faults.fail_replays(true);
    world.faults.fail_key("queued", threadkeep::testing::Fault::Fail(ErrorKind::Unauthorized));
    assert_eq!(cache.put("queued", &value(1)).await.unwrap(), WriteOutcome::Queued);
    world.faults.clear_key_faults();
    fill(mount.path());
    for key in ["t0", "queued", "t1"] {
        assert_eq!(cache.put(key, &value(2)).await.unwrap(), WriteOutcome::Stored);
    }
    assert_eq!(cache.put("new", &value(2)).await.unwrap(), WriteOutcome::Stored);
    let check_newest = async |cache: &Cache, when: &str| {
        for key in ["t0", "t1", "queued", "new"] {
            match cache.get(key).await {
                Ok(found) => assert_eq!(found.unwrap().decode::<String>().unwrap(), value(2), "{key} {when}"),
                Err(error) => assert!(error.is_outage(), "{key} {when}: {error}"),
            }
        }
    };
    world.start_outage(&cache).await;
    check_newest(&cache, "from memory").await;
    ["t0", "t1", "queued", "new"].iter().for_each(|key| cache.evict(key).unwrap());
    check_newest(&cache, "from the full disk").await;
    assert_eq!(cache.put("t0", &value(3)).await.unwrap_err().kind(), ErrorKind::LocalStorage);
    cache.shutdown(SECOND).await.unwrap();
    // The shutdown freed some space. The next `fill` takes it.
    for _ in 0..2 {
        if let Some(cache) = start(&mut world).await {
            check_newest(&cache, "after a restart on the full disk").await;
            cache.shutdown(SECOND).await.unwrap();
        }
        fill(mount.path());
    }
    free_space(mount.path());
    for round in 0..3 {
        let cache = start(&mut world).await.unwrap();
        check_newest(&cache, &format!("after restart {round} with free space")).await;
        cache.shutdown(SECOND).await.unwrap();
    }
    let cache = world.open().await.unwrap();
    wait_until_drained(&cache).await;
    check_newest(&cache, "after the replay").await;
    assert_eq!(cache.put("t0", &value(2)).await.unwrap(), WriteOutcome::Stored);
    world.start_outage(&cache).await;
    cache.evict("t0").unwrap();
    let found = cache.get("t0").await.unwrap().unwrap();
    assert_eq!(found.decode::<String>().unwrap(), value(2), "the replica saves copies again");
}

/// The index of the write-ahead log also needs disk space.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_fails_open_and_keeps_the_file() {
    let mount = Mount::tmpfs(SIZE);
    let mut world = World::new(mount.path());
    let cache = world.open_in_outage().await.unwrap();
    assert_eq!(cache.put("k", "1").await.unwrap(), WriteOutcome::Queued);
    cache.shutdown(SECOND).await.unwrap();
    fill(mount.path());
    assert!(start(&mut world).await.is_none(), "the open needs disk space");
    free_space(mount.path());
    let cache = start(&mut world).await.unwrap();
    assert_eq!(cache.get("k").await.unwrap().unwrap().json(), "\"1\"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_during_replay_shows_in_health_until_it_ends() {
    let mount = Mount::tmpfs(SIZE);
    let mut world = World::new(mount.path());
    let cache = world.builder().maintenance_interval(SECOND / 10).open().await.unwrap();
    world.start_outage(&cache).await;
    for at in 0..50 {
        assert_eq!(cache.put(format!("t{at}"), &"x".repeat(2_000)).await.unwrap(), WriteOutcome::Queued);
    }
    fill(mount.path());
    world.faults.clear();
    let is_full = |error: &threadkeep::Error| error.to_string().contains("the disk is full");
    let shows_full_disk = || {
        let (health, queue) = (cache.health(), cache.health().queue.unwrap());
        health.cause.is_some_and(|cause| cause.kind() == ErrorKind::LocalStorage && is_full(&cause))
            && queue.fault.as_ref().is_some_and(is_full)
            && queue.refusal.as_ref().is_some_and(is_full)
    };
    wait_until("health shows the full disk", shows_full_disk).await;
    assert!(cache.health().is_available(), "the store is available");
    // Health continues to show the full disk without writes.
    for _ in 0..20 {
        assert!(shows_full_disk() && cache.health().queue.unwrap().records > 0, "{:?}", cache.health());
        tokio::time::sleep(SECOND / 20).await;
    }
    free_space(mount.path());
    wait_until_drained(&cache).await;
    wait_until("health shows no fault", || cache.health().cause.is_none()).await;
    let queue = cache.health().queue.unwrap();
    assert!(queue.fault.is_none() && queue.refusal.is_none(), "{queue:?}");
}

/// The queue is empty and no caller writes. Only maintenance can notice the free space.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_end_is_noticed_without_traffic() {
    let mount = Mount::tmpfs(SIZE);
    let mut world = World::new(mount.path());
    let queue = world.builder().maintenance_interval(SECOND / 10).open().await.unwrap();
    let local = Cache::builder().local(mount.path().join("local.db")).maintenance_interval(SECOND / 10);
    let local = local.open().await.unwrap();
    for cache in [&queue, &local] {
        assert_eq!(cache.put("t", &"x".repeat(2_000)).await.unwrap(), WriteOutcome::Stored);
    }
    fill(mount.path());
    assert_eq!(
        queue.put("t", &"x".repeat(100_000)).await.unwrap(),
        WriteOutcome::Stored,
        "the put is stored without a copy in the replica"
    );
    assert_eq!(local.put("t", &"x".repeat(100_000)).await.unwrap_err().kind(), ErrorKind::LocalStorage);
    let is_full =
        |cache: &Cache| cache.health().cause.is_some_and(|cause| cause.kind() == ErrorKind::LocalStorage);
    assert!(is_full(&queue) && is_full(&local));
    free_space(mount.path());
    wait_until("both caches work again", || !is_full(&queue) && !is_full(&local)).await;
}

async fn wait_until(event: &str, condition: impl Fn() -> bool) {
    for _ in 0..1_500 {
        if condition() {
            return;
        }
        tokio::time::sleep(SECOND / 50).await;
    }
    panic!("timed out: {event}");
}
