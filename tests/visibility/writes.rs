//! Writes of every kind in one place, and reads in another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use threadkeep::{Cache, Version};
use tokio_postgres::Client;

use crate::stack::Server;
use crate::{LIMIT, SECOND, builder, eventually, number, start};

const KEYS: usize = 200;
/// The number of writes that wait at once until they are visible.
const PENDING: usize = 64;

/// A write that was acknowledged at a time.
struct Written {
    key: usize,
    value: u64,
    is_delete: bool,
    at: Instant,
}

#[derive(Default)]
struct World {
    pending: Mutex<HashMap<usize, Written>>,
    latencies: Mutex<Vec<Duration>>,
}

fn name(key: usize) -> String {
    format!("seen {key}")
}

async fn sql(client: &Client, text: &str, key: usize, value: u64) {
    let text = text.replace("KEY", &name(key)).replace("VALUE", &value.to_string());
    client.batch_execute(&text).await.unwrap();
}

const UPSERT: &str = "insert into conversation_threads (thread_id, conversation_data, expires_at)
    values ('KEY', 'VALUE', now() + interval '1 day')
    on conflict (thread_id) do update set conversation_data = excluded.conversation_data, expires_at = excluded.expires_at";
const EDIT: &str = "update conversation_threads set conversation_data = 'VALUE' where thread_id = 'KEY'";
const DELETE: &str = "delete from conversation_threads where thread_id = 'KEY'";

/// Writes once, by a random way. Returns whether the write deletes.
async fn write(cache: &Cache, client: &Client, key: usize, value: u64, is_absent: bool) -> bool {
    match fastrand::u8(..12) {
        0..4 => drop(cache.put(name(key), &value).await.unwrap()),
        4..7 => drop(cache.update(name(key), |_: Option<u64>| Ok(Some(value))).await.unwrap()),
        7..9 => sql(client, UPSERT, key, value).await,
        _ if is_absent => sql(client, UPSERT, key, value).await,
        9..11 => sql(client, EDIT, key, value).await,
        _ if fastrand::bool() => {
            let _ = cache.remove(name(key)).await.unwrap();
            return true;
        }
        _ => {
            sql(client, DELETE, key, value).await;
            return true;
        }
    }
    false
}

impl World {
    fn is_pending(&self, key: usize) -> bool {
        self.pending.lock().unwrap().contains_key(&key)
    }

    /// Whether a further write of this key is allowed now.
    fn is_free(&self, key: usize) -> bool {
        let pending = self.pending.lock().unwrap();
        pending.len() < PENDING && !pending.contains_key(&key)
    }

    fn add(&self, key: usize, value: u64, is_delete: bool) {
        let written = Written { key, value, is_delete, at: Instant::now() };
        self.pending.lock().unwrap().insert(key, written);
    }

    /// Reads all pending conversations again and again. No version falls, and each write is visible after a poll that began later.
    ///
    /// The time until then depends on the machine, so only the figures of [`writes_are_visible_after_the_next_poll`] tell it.
    async fn read(&self, cache: &Cache) {
        let mut versions = HashMap::<usize, Version>::new();
        loop {
            let pending: Vec<usize> = self.pending.lock().unwrap().keys().copied().collect();
            for key in pending {
                let polled = Instant::now().checked_sub(cache.health().feed.unwrap().lag);
                let found = cache.get(name(key)).await.unwrap();
                if let Some(found) = &found {
                    let last = versions.insert(key, found.version());
                    assert!(
                        last.is_none_or(|last| last <= found.version()),
                        "a reader went back: {last:?} {found:?}"
                    );
                }
                let value: Option<u64> = found.as_ref().map(|found| found.decode().unwrap());
                let mut pending = self.pending.lock().unwrap();
                let Some(written) = pending.get(&key) else { continue };
                let is_visible = match value {
                    None => written.is_delete,
                    Some(value) => value >= written.value && !written.is_delete,
                };
                let waited = written.at.elapsed();
                if is_visible {
                    pending.remove(&key);
                    self.latencies.lock().unwrap().push(waited);
                } else {
                    let Written { key, value: wanted, is_delete, .. } = *written;
                    assert!(
                        waited < LIMIT && polled.is_none_or(|polled| polled <= written.at),
                        "{key}: {wanted} (deleted: {is_delete}) is not visible after {waited:?} and a poll; read {value:?}"
                    );
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Keeps transactions open for seconds, each with a change of a conversation of its own.
async fn hold(world: Arc<World>, client: Client, key: usize) {
    sql(&client, UPSERT, key, 0).await;
    for value in 1.. {
        client.batch_execute("begin").await.unwrap();
        sql(&client, EDIT, key, value).await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(1_000..4_000))).await;
        client.batch_execute("commit").await.unwrap();
        world.add(key, value, false);
        while world.is_pending(key) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn write_all(world: &World, cache: &Cache, client: &Client, writes: u64) {
    let mut absent = [true; KEYS];
    for value in 1..=writes {
        let key = loop {
            let key = fastrand::usize(..KEYS);
            if world.is_free(key) {
                break key;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        absent[key] = write(cache, client, key, value, absent[key]).await;
        world.add(key, value, absent[key]);
    }
    while world.pending.lock().unwrap().keys().any(|key| *key < KEYS) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn writes_are_visible_after_the_next_poll(server: Server) {
    let stack = start(server).await;
    let interval = Duration::from_millis(number("VISIBILITY_INTERVAL_MILLIS", 500));
    let gateways = [stack.gateway().await, stack.gateway().await];
    let open = |gateway| builder(gateway).feed_interval(interval).fresh_for(3_600 * SECOND);
    let (one, other) = (open(&gateways[0]).open().await.unwrap(), open(&gateways[1]).open().await.unwrap());
    eventually("the feed", async || other.health().feed.is_some()).await;
    let world = Arc::new(World::default());
    for held in 0..4 {
        tokio::spawn(hold(Arc::clone(&world), stack.sql().await, KEYS + held));
    }
    let client = stack.sql().await;
    tokio::select! {
        () = write_all(&world, &one, &client, number("VISIBILITY_WRITES", 1_000)) => {}
        () = world.read(&other) => {}
    }
    let mut latencies = world.latencies.lock().unwrap();
    latencies.sort_unstable();
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    let late = latencies.iter().filter(|latency| **latency > 2 * interval).count();
    println!(
        "{} writes, interval {interval:?}: visible after {:?} (median), {:?} (99 %), {:?} (longest); {late} after two intervals",
        latencies.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

on_each_server!(writes_are_visible_after_the_next_poll);
