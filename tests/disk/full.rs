//! A disk that is full.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use threadkeep::{Cache, Durability, ErrorKind};

use crate::mount::Mount;
use crate::world::{FILE, World, drained};

const SECOND: Duration = Duration::from_secs(1);
const SIZE: &str = "2m";

/// Takes all room that is left.
fn fill(dir: &Path) {
    let mut file = File::options().create(true).append(true).open(dir.join("somebody's file")).unwrap();
    while file.write_all(&[0; 4_096]).is_ok() {}
}

fn make_room(dir: &Path) {
    fs::remove_file(dir.join("somebody's file")).unwrap();
}

/// Starts in an outage; on a full disk, that may fail, and says why.
async fn start(world: &mut World) -> Option<Cache> {
    match world.open_cut_off().await {
        Ok(cache) => Some(cache),
        Err(error) => {
            let text = error.to_string();
            assert_eq!(error.kind(), ErrorKind::Local, "{text}");
            assert!(text.contains(FILE) && text.contains("the disk is full"), "{text}: {error:?}");
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_is_an_error_to_the_writer_and_what_was_acknowledged_is_there() {
    let mount = Mount::tmpfs(SIZE);
    let mut world = World::new(mount.path());
    let cache = world.open_cut_off().await.unwrap();
    let value = |at: usize| format!("{at} {}", "x".repeat(at % 7 * 5_000));
    let (mut taken, mut errors) = (Vec::new(), 0);
    for at in 0..400 {
        match cache.put(format!("t{at}"), &value(at)).await {
            Ok(durability) => {
                assert_eq!(durability, Durability::Queued);
                taken.push(at);
            }
            Err(error) => {
                let text = error.to_string();
                assert_eq!(error.kind(), ErrorKind::Local, "{text}");
                assert!(text.contains(FILE) && text.contains("the disk is full"), "{text}: {error:?}");
                errors += 1;
            }
        }
    }
    println!("{} taken, {errors} errors", taken.len());
    assert!(errors > 100 && taken.len() > 40);
    drop(cache);
    if let Some(cache) = start(&mut world).await {
        for at in &taken {
            let found = cache.get(format!("t{at}")).await.unwrap().unwrap();
            assert_eq!(found.decode::<String>().unwrap(), value(*at), "on a disk that is still full");
        }
        drop(cache);
    }
    mount.remount("size=8m");
    let cache = start(&mut world).await.unwrap();
    for at in &taken {
        let found = cache.get(format!("t{at}")).await.unwrap().unwrap();
        assert_eq!(found.decode::<String>().unwrap(), value(*at));
    }
    assert_eq!(cache.health().queue.unwrap().records, taken.len() as u64);
    assert_eq!(cache.put("t399", "again").await.unwrap(), Durability::Queued);
    world.back(&cache).await;
    drained(&cache).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_disk_is_full_puts_are_stored_and_nothing_old_is_served_later() {
    let mount = Mount::tmpfs(SIZE);
    let mut world = World::new(mount.path());
    let cache = world.open().await.unwrap();
    let value = |version: u8| format!("{version} {}", "x".repeat(20_000));
    for at in 0..10 {
        assert_eq!(cache.put(format!("t{at}"), &value(1)).await.unwrap(), Durability::Stored);
    }
    world.faults.fail_trials(true);
    world.faults.poison("queued", threadkeep::testing::Fault::Fail(ErrorKind::Denied));
    assert_eq!(cache.put("queued", &value(1)).await.unwrap(), Durability::Queued);
    world.faults.antidote();
    fill(mount.path());
    for key in ["t0", "queued", "t1"] {
        assert_eq!(cache.put(key, &value(2)).await.unwrap(), Durability::Stored);
    }
    assert_eq!(cache.put("new", &value(2)).await.unwrap(), Durability::Stored);
    let is_newest = async |cache: &Cache, when: &str| {
        for key in ["t0", "t1", "queued", "new"] {
            match cache.get(key).await {
                Ok(found) => assert_eq!(found.unwrap().decode::<String>().unwrap(), value(2), "{key} {when}"),
                Err(error) => assert!(error.is_outage(), "{key} {when}: {error}"),
            }
        }
    };
    world.away(&cache).await;
    is_newest(&cache, "from memory").await;
    ["t0", "t1", "queued", "new"].iter().for_each(|key| cache.evict(key).unwrap());
    is_newest(&cache, "from the full disk").await;
    assert_eq!(cache.put("t0", &value(3)).await.unwrap_err().kind(), ErrorKind::Local);
    cache.shutdown(SECOND).await.unwrap();
    // What the end of it has freed is taken at once.
    for _ in 0..2 {
        if let Some(cache) = start(&mut world).await {
            is_newest(&cache, "after a restart on the full disk").await;
            cache.shutdown(SECOND).await.unwrap();
        }
        fill(mount.path());
    }
    make_room(mount.path());
    for round in 0..3 {
        let cache = start(&mut world).await.unwrap();
        is_newest(&cache, &format!("after restart {round} with room again")).await;
        cache.shutdown(SECOND).await.unwrap();
    }
    let cache = world.open().await.unwrap();
    drained(&cache).await;
    is_newest(&cache, "in the end").await;
    assert_eq!(cache.put("t0", &value(2)).await.unwrap(), Durability::Stored);
    world.away(&cache).await;
    cache.evict("t0").unwrap();
    let found = cache.get("t0").await.unwrap().unwrap();
    assert_eq!(found.decode::<String>().unwrap(), value(2), "copies are kept again");
}

/// Even an index of the log takes room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_without_any_room_is_an_error_that_says_so_and_harms_nothing() {
    let mount = Mount::tmpfs(SIZE);
    let mut world = World::new(mount.path());
    let cache = world.open_cut_off().await.unwrap();
    assert_eq!(cache.put("k", "1").await.unwrap(), Durability::Queued);
    cache.shutdown(SECOND).await.unwrap();
    fill(mount.path());
    assert!(start(&mut world).await.is_none(), "there is no room");
    make_room(mount.path());
    let cache = start(&mut world).await.unwrap();
    assert_eq!(cache.get("k").await.unwrap().unwrap().json(), "\"1\"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_that_holds_up_replay_shows_in_health_while_it_lasts() {
    let mount = Mount::tmpfs(SIZE);
    let mut world = World::new(mount.path());
    let cache = world.builder().upkeep_every(SECOND / 10).open().await.unwrap();
    world.away(&cache).await;
    for at in 0..50 {
        assert_eq!(cache.put(format!("t{at}"), &"x".repeat(2_000)).await.unwrap(), Durability::Queued);
    }
    fill(mount.path());
    world.faults.heal();
    let is_full = |error: &threadkeep::Error| error.to_string().contains("the disk is full");
    let says_so = || {
        let (health, queue) = (cache.health(), cache.health().queue.unwrap());
        health.cause.is_some_and(|cause| cause.kind() == ErrorKind::Local && is_full(&cause))
            && queue.fault.as_ref().is_some_and(is_full)
            && queue.refusal.as_ref().is_some_and(is_full)
    };
    wait_until("health says so", says_so).await;
    assert!(cache.health().is_available(), "the store is well");
    // It goes on saying so, though nobody writes.
    for _ in 0..20 {
        assert!(says_so() && cache.health().queue.unwrap().records > 0, "{:?}", cache.health());
        tokio::time::sleep(SECOND / 20).await;
    }
    make_room(mount.path());
    drained(&cache).await;
    wait_until("health stops saying so", || cache.health().cause.is_none()).await;
    let queue = cache.health().queue.unwrap();
    assert!(queue.fault.is_none() && queue.refusal.is_none(), "{queue:?}");
}

/// No write waits, nobody calls: only maintenance finds out that there is room again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_that_was_mended_is_found_out_without_traffic() {
    let mount = Mount::tmpfs(SIZE);
    let mut world = World::new(mount.path());
    let queue = world.builder().upkeep_every(SECOND / 10).open().await.unwrap();
    let local = Cache::builder().local(mount.path().join("local.db")).upkeep_every(SECOND / 10);
    let local = local.open().await.unwrap();
    for cache in [&queue, &local] {
        assert_eq!(cache.put("t", &"x".repeat(2_000)).await.unwrap(), Durability::Stored);
    }
    fill(mount.path());
    assert_eq!(queue.put("t", &"x".repeat(100_000)).await.unwrap(), Durability::Stored, "without a copy");
    assert_eq!(local.put("t", &"x".repeat(100_000)).await.unwrap_err().kind(), ErrorKind::Local);
    let is_full = |cache: &Cache| cache.health().cause.is_some_and(|cause| cause.kind() == ErrorKind::Local);
    assert!(is_full(&queue) && is_full(&local));
    make_room(mount.path());
    wait_until("both work again", || !is_full(&queue) && !is_full(&local)).await;
}

async fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..1_500 {
        if is_so() {
            return;
        }
        tokio::time::sleep(SECOND / 50).await;
    }
    panic!("waited in vain: {what}");
}
