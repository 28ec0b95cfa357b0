//! Real PostgreSQL behind a PostgREST-compatible server, with a faulty gateway for each handle.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use threadkeep::{BreakerState, Builder, Cache, Result};

use crate::plan::{HANDLES, LinkFault};
use crate::stack::{Fault, Gateway, Server, Stack};
use crate::world::World;

const DEADLINE: Duration = Duration::from_millis(300);

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
    /// True if the present life has got a response from the store.
    is_synced: AtomicBool,
}

impl Database {
    pub async fn new(server: Server, skews: [i64; HANDLES]) -> Self {
        let stack = tokio::task::block_in_place(|| Stack::shared(server));
        let link =
            async |skew_ms| GatewayLink { gateway: stack.gateway().await, skew_ms, is_synced: false.into() };
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
    async fn builder(&self, handle: usize, skew_ms: i64) -> Result<Builder> {
        let link = &self.links[handle];
        link.is_synced.store(false, SeqCst);
        let builder = Cache::builder().supabase(&link.gateway.url(), &link.gateway.keys().secret);
        Ok(builder.timeout(DEADLINE).clock_skew_millis(skew_ms))
    }

    async fn inject(&self, handle: usize, fault: LinkFault) {
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
    }

    fn thread_id(&self, key: usize) -> String {
        format!("model {:016x} {key}", self.world)
    }

    async fn stored_document(&self, key: &str) -> Option<String> {
        let select = "select conversation_data::text from conversation_threads \
                      where thread_id = $1 and expires_at > clock_timestamp()";
        self.sql.query_opt(select, &[&key]).await.unwrap().map(|row| row.get(0))
    }

    fn clock_error_ms(&self, handle: usize, cache: &Cache) -> i64 {
        let link = &self.links[handle];
        if !link.is_synced.load(SeqCst) && cache.health().breaker == Some(BreakerState::Closed) {
            link.is_synced.store(true, SeqCst);
        }
        if link.is_synced.load(SeqCst) { 0 } else { link.skew_ms.abs() }
    }

    fn max_clock_error_ms(&self) -> i64 {
        // Clock sync corrects a wrong clock to within one round trip.
        if self.is_skewed { 300 } else { 5 }
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
