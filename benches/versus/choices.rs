//! Why the near cache is made as it is: each choice beside what it was chosen over, with bare moka.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant};

use moka::Expiry;
use moka::policy::EvictionPolicy;
use moka::sync::{Cache, CacheBuilder};

use crate::hits::each;
use crate::table::Wanted::AtMost;
use crate::table::{Table, Unit};
use crate::work::{conversation, thread};
use crate::world::{KIB, Scale};

type Value = Arc<str>;
type Get = Box<dyn Fn(&str) -> bool>;

/// As an entry knows when it ends, moka would ask it.
struct Own;

impl Expiry<String, Value> for Own {
    fn expire_after_create(&self, _: &String, _: &Value, _: Instant) -> Option<Duration> {
        Some(Duration::from_secs(86_400))
    }
}

/// As the near cache is made: weighed, the least recently used goes first.
fn chosen(bytes: u64) -> CacheBuilder<String, Value, Cache<String, Value>> {
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

/// What a get costs with each.
pub fn gets(scale: Scale) -> Table {
    const CHOSEN: &str = "foldhash, LRU, expiry of ours";
    let threads = scale.of(10_000, 500);
    let mut table = Table::new(format!("Gets of bare moka::sync, {threads} threads of 1 KiB"), Unit::Span);
    let keys: Vec<String> = (0..threads).map(thread).collect();
    let room = || chosen(8 << 30);
    let day = Duration::from_secs(86_400);
    let ways: [(&str, Get); 5] = [
        (CHOSEN, filled(room().build_with_hasher(fold()), &keys)),
        ("SipHash of std", filled(room().build_with_hasher(RandomState::new()), &keys)),
        (
            "TinyLFU",
            filled(room().eviction_policy(EvictionPolicy::tiny_lfu()).build_with_hasher(fold()), &keys),
        ),
        ("time_to_live of moka", filled(room().time_to_live(day).build_with_hasher(fold()), &keys)),
        ("Expiry of moka, per entry", filled(room().expire_after(Own).build_with_hasher(fold()), &keys)),
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

/// How many new threads stay in a full memory whose old ones are read again and again: each will be read next.
pub fn newcomers(scale: Scale) -> Table {
    const LRU: &str = "refused by LRU";
    const NEW: &str = "new threads";
    let threads = scale.of(1_000, 200);
    let mut table = Table::new("New threads that a full memory does not take", Unit::Count);
    for _ in 0..scale.rounds {
        for (name, policy) in
            [(LRU, EvictionPolicy::lru()), ("refused by TinyLFU", EvictionPolicy::tiny_lfu())]
        {
            let cache = chosen((threads * KIB) as u64).eviction_policy(policy).build_with_hasher(fold());
            let value: Value = "x".repeat(KIB).into();
            let (old, new) = (|at| format!("old-{at:06}"), |at| format!("new-{at:06}"));
            (0..threads).for_each(|at| cache.insert(old(at), Arc::clone(&value)));
            for at in (0..threads).cycle().take(20 * threads) {
                cache.get(&old(at));
            }
            cache.run_pending_tasks();
            let refused = (0..threads / 10).filter(|at| {
                cache.insert(new(*at), Arc::clone(&value));
                cache.run_pending_tasks();
                !cache.contains_key(&new(*at))
            });
            table.note(name, refused.count() as f64);
        }
        table.note(NEW, (threads / 10) as f64);
    }
    table.claim(LRU, AtMost(0.0), NEW);
    table.compare("refused by TinyLFU", NEW);
    table
}
