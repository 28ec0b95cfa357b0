//! Real PostgreSQL behind a PostgREST-compatible server, with a faulty gateway for each handle.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use threadkeep::{BreakerState, Builder, Cache, Result};

use crate::clocks::{jump_count, jumps_since};
use crate::history::Document;
use crate::plan::{HANDLES, LinkFault};
use crate::stack::{Fault, Gateway, Server, Stack};
use crate::store::{LOG_TTL, Plain};
use crate::world::World;

const DEADLINE: Duration = Duration::from_millis(300);
/// The time without a jump and without a fault after which the clock of a healthy link counts as synced.
const CALM: Duration = Duration::from_millis(500);

pub struct Database {
    stack: &'static Stack,
    sql: tokio_postgres::Client,
    links: [GatewayLink; HANDLES],
    /// Distinguishes the conversations of this world from those of other worlds.
    world: u64,
    is_skewed: bool,
}

struct GatewayLink {
    gateway: Gateway,
    skew_ms: i64,
    /// The number of jumps before the clock was last seen synced.
    synced_at_jumps: AtomicUsize,
    has_fault: AtomicBool,
    opened_at: Mutex<Instant>,
}

/// The number of jumps that stands for an unsynced clock.
const UNSYNCED: usize = usize::MAX;
/// The largest error of a clock after a jump.
const MAX_JUMP_MS: i64 = 2_400_000;

impl Database {
    pub async fn new(server: Server, skews: [i64; HANDLES]) -> Self {
        let stack = tokio::task::block_in_place(|| Stack::shared(server));
        let link = async |skew_ms| GatewayLink {
            gateway: stack.gateway().await,
            skew_ms,
            synced_at_jumps: UNSYNCED.into(),
            has_fault: false.into(),
            opened_at: Instant::now().into(),
        };
        let links = [link(skews[0]).await, link(skews[1]).await];
        let is_skewed = skews.iter().any(|skew| *skew != 0);
        Self { stack, sql: stack.sql().await, links, world: fastrand::u64(..), is_skewed }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Database({:?})", self.stack.server())
    }
}

#[async_trait]
impl World for Database {
    fn takes_copied_files(&self) -> bool {
        false
    }

    async fn builder(&self, handle: usize, skew_ms: i64) -> Result<Builder> {
        let link = &self.links[handle];
        link.synced_at_jumps.store(UNSYNCED, SeqCst);
        *link.opened_at.lock().unwrap() = Instant::now();
        let builder = Cache::builder().supabase(&link.gateway.url(), &link.gateway.keys().secret);
        Ok(builder.timeout(DEADLINE).clock_skew_millis(skew_ms))
    }

    async fn inject(&self, handle: usize, fault: LinkFault) {
        self.links[handle].has_fault.store(true, SeqCst);
        let gateway = &self.links[handle].gateway;
        match fault {
            LinkFault::Refuse => gateway.refuse().await,
            LinkFault::LoseResponses => gateway.always(Fault::DropResponse),
            LinkFault::Deny => gateway.always(Fault::json_error(401, "PGRST301")),
            LinkFault::Slow(span) => gateway.always(Fault::Slow(span)),
            LinkFault::SlowResponses(_) => gateway.always(Fault::HangAfter),
            LinkFault::Hang => gateway.always(Fault::Hang),
            LinkFault::Flaky(rate) => gateway.rule(move |_| match fastrand::f64() < rate {
                true => [Fault::Reset, Fault::DropResponse, Fault::Truncate][fastrand::usize(..3)].clone(),
                false => Fault::Pass,
            }),
            LinkFault::Blips(count) => gateway.script(std::iter::repeat_n(Fault::DropResponse, count)),
            LinkFault::Other(number) => gateway.always(other_fault(number)),
        }
    }

    async fn clear(&self, handle: usize) {
        let gateway = &self.links[handle].gateway;
        gateway.clear();
        gateway.accept().await;
        self.links[handle].has_fault.store(false, SeqCst);
    }

    fn thread_id(&self, key: usize) -> String {
        format!("model {:016x} {key}", self.world)
    }

    async fn execute(&self, key: &str, plain: &Plain) -> bool {
        let upsert = "insert into conversation_threads (thread_id, conversation_data, expires_at) \
                      values ($1, $2::text::jsonb, clock_timestamp() + make_interval(secs => $3)) \
                      on conflict (thread_id) do update set ";
        let (document, ttl, change) = match plain {
            Plain::Put(document, ttl) => (
                document.clone(),
                *ttl,
                "conversation_data = excluded.conversation_data, expires_at = excluded.expires_at",
            ),
            Plain::Append(id) => (
                Document { ids: vec![*id], ..Document::default() },
                LOG_TTL,
                // A row that is not live is a tombstone.
                "conversation_data = case when conversation_threads.expires_at > clock_timestamp() \
                 then jsonb_set(conversation_threads.conversation_data, '{ids}', \
                 (conversation_threads.conversation_data->'ids') || (excluded.conversation_data->'ids')) \
                 else excluded.conversation_data end, \
                 expires_at = greatest(conversation_threads.expires_at, excluded.expires_at)",
            ),
            Plain::Delete => {
                let delete = "delete from conversation_threads where thread_id = $1 and expires_at > clock_timestamp()";
                return self.sql.execute(delete, &[&key]).await.unwrap() > 0;
            }
        };
        let document = serde_json::to_string(&document).unwrap();
        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&key, &document, &ttl.as_secs_f64()];
        self.sql.execute(&format!("{upsert}{change}"), &params).await.unwrap() > 0
    }

    async fn stored_document(&self, key: &str) -> Option<String> {
        let select = "select conversation_data::text from conversation_threads \
                      where thread_id = $1 and expires_at > clock_timestamp()";
        self.sql.query_opt(select, &[&key]).await.unwrap().map(|row| row.get(0))
    }

    fn clock_error_ms(&self, handle: usize, cache: &Cache) -> i64 {
        let link = &self.links[handle];
        let (jumps, last_seen) = (jump_count(), link.synced_at_jumps.load(SeqCst));
        let is_calm = jumps_since(Instant::now() - CALM).is_empty() && !link.has_fault.load(SeqCst);
        if last_seen != jumps && is_calm && cache.health().breaker == Some(BreakerState::Closed) {
            link.synced_at_jumps.store(jumps, SeqCst);
        }
        match link.synced_at_jumps.load(SeqCst) {
            synced if synced == jumps => 0,
            UNSYNCED => {
                let jumps = jumps_since(*link.opened_at.lock().unwrap());
                link.skew_ms.abs() + jumps.iter().map(|(_, by_ms)| by_ms.abs()).sum::<i64>()
            }
            _ => MAX_JUMP_MS,
        }
    }

    fn max_clock_error_ms(&self) -> i64 {
        // Clock sync corrects a wrong clock to within one round trip.
        if self.is_skewed || jump_count() > 0 { 300 } else { 5 }
    }
}

fn other_fault(number: usize) -> Fault {
    let faults = [
        Fault::html(522),
        Fault::html(502),
        Fault::html(200),
        Fault::html(540),
        Fault::json_error(500, "53300"),
        Fault::json_error(500, "57014"),
        Fault::json_error(503, "PGRST002"),
        Fault::json_error(429, ""),
        Fault::retry_after(503, 1),
        Fault::Reset,
        Fault::Truncate,
    ];
    faults[number % faults.len()].clone()
}
