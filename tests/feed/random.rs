//! Random schedules of reads, writes and polls whose calls take random times. No read goes back, and no read is older than its
//! freshness allows.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use threadkeep::testing::stay_on_this_thread;
use threadkeep::{Cache, Freshness, Key, Version};

use crate::history::History;
use crate::{HOUR, builder, writer};

const KEYS: usize = 2;
const READS: usize = 60;
const LONGEST: Duration = Duration::from_millis(4);
const BRIEF: Duration = Duration::from_millis(25);

fn key(at: usize) -> Key {
    Key::new(format!("t{at}")).unwrap()
}

/// Writes by two daemons in random order until it is dropped.
async fn write(caches: [Cache; 2]) {
    for value in 0_u64.. {
        let (cache, key) = (&caches[fastrand::usize(..2)], key(fastrand::usize(..KEYS)));
        match fastrand::u8(..4) {
            0 => _ = cache.update(key.as_str(), |_: Option<u64>| Ok(Some(value))).await,
            1 if fastrand::u8(..4) == 0 => cache.evict(key.as_str()).unwrap(),
            _ => _ = cache.put(key.as_str(), &value).user("u").await,
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(..8))).await;
    }
}

/// Reads one conversation after the other, and checks each read.
///
/// With a long freshness period, only the feed can end the freshness of a value. Then each read after a poll must see all changes
/// before that poll. With a brief one, the age of a value is what the check compares.
async fn read(cache: &Cache, store: &History, is_brief: bool) {
    let mut seen = HashMap::<Key, Version>::new();
    for _ in 0..READS {
        let key = key(fastrand::usize(..KEYS));
        let (handled, began) = (store.handled(), Instant::now());
        let listed = fastrand::u8(..8) == 0;
        let found = if listed {
            let all = cache.list("u").await.unwrap();
            all.into_iter().find(|found| *found.key() == key)
        } else {
            cache.get(key.as_str()).await.unwrap()
        };
        if let Some(found) = found.filter(|found| found.freshness() == Freshness::Fresh) {
            let last = seen.insert(key.clone(), found.version());
            assert!(
                last.is_none_or(|last| last <= found.version()),
                "a reader went back: {last:?} {found:?}"
            );
            let newest = match is_brief {
                true => began.checked_sub(BRIEF).and_then(|before| store.newest_before(before, &key)),
                false => handled.checked_sub(1).and_then(|poll| store.version_at(poll, &key)),
            };
            assert!(
                newest <= Some(found.version()),
                "poll {handled} or the age of {found:?} allow no older version than {newest:?}"
            );
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(..4))).await;
    }
}

async fn schedule(seed: u64) {
    fastrand::seed(seed);
    let store = Arc::new(History::default());
    let is_brief = fastrand::bool();
    let cache = builder(&store, if is_brief { BRIEF } else { HOUR }).open().await.unwrap();
    let other = writer(&store).await;
    *store.delay.lock().unwrap() = LONGEST;
    let writing = tokio::spawn(write([cache.clone(), other]));
    read(&cache, &store, is_brief).await;
    writing.abort();
}

#[test]
fn random_schedules_read_nothing_outdated() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let schedules = number("FEED_SCHEDULES").unwrap_or(48);
    let seeds: Vec<u64> = match number("FEED_SEED") {
        Some(seed) => vec![seed],
        None => (0..schedules).map(|_| fastrand::u64(..)).collect(),
    };
    for seed in seeds {
        println!("FEED_SEED={seed}");
        let run = move || {
            stay_on_this_thread();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(schedule(seed));
        };
        std::thread::spawn(run).join().unwrap();
    }
}
