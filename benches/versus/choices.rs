//! Compares the settings of the in-memory cache with their alternatives, on bare moka.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use moka::Expiry;
use moka::policy::EvictionPolicy;
use moka::sync::{Cache, CacheBuilder};

use crate::hits::each;
use crate::table::Goal::AtMost;
use crate::table::{Table, Unit};
use crate::work::{conversation, thread};
use crate::world::{KIB, Scale};

type Value = Arc<str>;
type Get = Box<dyn Fn(&str) -> bool>;

/// Per-entry expiry by moka, the alternative to the expiry check of threadkeep.
struct EntryExpiry;

impl Expiry<String, Value> for EntryExpiry {
    fn expire_after_create(&self, _: &String, _: &Value, _: Instant) -> Option<Duration> {
        Some(Duration::from_secs(86_400))
    }
}

/// Configures moka as threadkeep does: weighed entries, LRU eviction.
fn threadkeep_settings(bytes: u64) -> CacheBuilder<String, Value, Cache<String, Value>> {
    Cache::builder()
        .max_capacity(bytes)
        .weigher(|_: &String, value: &Value| value.len() as u32)
        .eviction_policy(EvictionPolicy::lru())
}

fn filled<S: BuildHasher + Clone + Send + Sync + 'static>(
    cache: Cache<String, Value, S>,
    keys: &[String],
) -> Get {
    for key in keys {
        let json = serde_json::to_string(&conversation(key, KIB)).unwrap();
        cache.insert(key.clone(), json.into());
    }
    Box::new(move |key| cache.get(key).is_some())
}

fn fold() -> foldhash::fast::RandomState {
    foldhash::fast::RandomState::default()
}

/// Measures a get with each setting.
pub fn gets(scale: Scale) -> Table {
    const CHOSEN: &str = "foldhash, LRU, expiry by threadkeep";
    let threads = scale.of(10_000, 500);
    let mut table =
        Table::new(format!("Gets of bare moka::sync, {threads} conversations of 1 KiB"), Unit::Span);
    let keys: Vec<String> = (0..threads).map(thread).collect();
    let room = || threadkeep_settings(8 << 30);
    let day = Duration::from_secs(86_400);
    let ways: [(&str, Get); 5] = [
        (CHOSEN, filled(room().build_with_hasher(fold()), &keys)),
        ("SipHash of std", filled(room().build_with_hasher(RandomState::new()), &keys)),
        (
            "TinyLFU",
            filled(room().eviction_policy(EvictionPolicy::tiny_lfu()).build_with_hasher(fold()), &keys),
        ),
        ("time_to_live of moka", filled(room().time_to_live(day).build_with_hasher(fold()), &keys)),
        (
            "Expiry of moka, per entry",
            filled(room().expire_after(EntryExpiry).build_with_hasher(fold()), &keys),
        ),
    ];
    let gets = scale.of(200_000, 1_000);
    for _ in 0..scale.of(25, 2) {
        for (name, get) in &ways {
            table.note_span(name, each(&keys, gets, async |key| assert!(get(key))));
        }
    }
    for (name, _) in &ways[1..] {
        table.compare(name, CHOSEN);
    }
    table
}

/// Counts the new conversations that a full cache rejects while the old ones are read often.
///
/// A new conversation is read next, so a rejected one costs a load.
pub fn newcomers(scale: Scale) -> Table {
    const LRU: &str = "rejected by LRU";
    const NEW: &str = "new conversations";
    let threads = scale.of(1_000, 200);
    let mut table = Table::new("New conversations that a full memory rejects", Unit::Count);
    for _ in 0..scale.rounds {
        for (name, policy) in
            [(LRU, EvictionPolicy::lru()), ("rejected by TinyLFU", EvictionPolicy::tiny_lfu())]
        {
            let cache =
                threadkeep_settings((threads * KIB) as u64).eviction_policy(policy).build_with_hasher(fold());
            let value: Value = "x".repeat(KIB).into();
            let (old, new) = (|at| format!("old-{at:06}"), |at| format!("new-{at:06}"));
            (0..threads).for_each(|at| cache.insert(old(at), Arc::clone(&value)));
            for at in (0..threads).cycle().take(20 * threads) {
                cache.get(&old(at));
            }
            cache.run_pending_tasks();
            let rejected = (0..threads / 10).filter(|at| {
                cache.insert(new(*at), Arc::clone(&value));
                cache.run_pending_tasks();
                !cache.contains_key(&new(*at))
            });
            table.note(name, rejected.count() as f64);
        }
        table.note(NEW, (threads / 10) as f64);
    }
    table.claim(LRU, AtMost(0.0), NEW);
    table.compare("rejected by TinyLFU", NEW);
    table
}
