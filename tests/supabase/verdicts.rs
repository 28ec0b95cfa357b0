//! Tests the effect of each response on live writes, replay and start.

use futures::future::join_all;
use threadkeep::{Builder, Cache, ErrorKind, Freshness, OnOutage, WriteOutcome};

use crate::stack::{Fault, Gateway, Server, Stack};
use crate::{SECOND, builder, drained, eventually, get, key, shared};

on_each_server![
    a_live_write_is_refused_for_its_own_fault_alone,
    a_refusal_of_every_write_costs_no_queued_write,
    a_start_is_ended_by_a_wrong_key_and_missing_migrations_alone,
    a_start_survives_a_transient_refusal,
    a_record_that_fails_alone_delays_no_other,
    an_operators_mistake_costs_no_queued_write,
    a_database_that_only_reads_is_noticed_and_recovers_at_once,
    a_neighbour_in_a_batch_does_not_share_the_error,
];

/// The effect of a response on a live write that may be queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Live {
    Queued,
    Refused,
}

/// Every SQLSTATE class that PostgreSQL 15 has, and single codes that differ from their class.
const SQLSTATES: &[(&str, Live)] = {
    use Live::{Queued, Refused};
    &[
        ("02000", Refused),
        ("03000", Refused),
        ("08006", Queued),
        ("09000", Refused),
        ("0A000", Queued),
        ("0B000", Refused),
        ("0F000", Refused),
        ("0L000", Queued),
        ("0P000", Refused),
        ("0Z000", Refused),
        ("20000", Refused),
        ("21000", Refused),
        ("22P05", Refused),
        ("22001", Refused),
        ("23502", Refused),
        ("23514", Refused),
        ("24000", Refused),
        ("25006", Queued),
        ("25P02", Queued),
        ("26000", Refused),
        ("27000", Refused),
        ("28P01", Queued),
        ("2BP01", Refused),
        ("2D000", Refused),
        ("2F005", Refused),
        ("34000", Refused),
        ("38000", Refused),
        ("39000", Refused),
        ("3B001", Refused),
        ("3D000", Queued),
        ("3F000", Queued),
        ("40001", Queued),
        ("40P01", Queued),
        ("42501", Queued),
        ("42601", Queued),
        ("42703", Queued),
        ("42883", Queued),
        ("42P01", Queued),
        ("44000", Refused),
        ("53100", Queued),
        ("53200", Queued),
        ("53300", Queued),
        ("54000", Refused),
        ("55000", Queued),
        ("57014", Queued),
        ("57P01", Queued),
        ("57P03", Queued),
        ("58030", Queued),
        ("F0000", Queued),
        ("HV000", Queued),
        ("P0001", Refused),
        ("XX000", Queued),
        ("XX001", Queued),
    ]
};

const POSTGREST: &[(u16, &str, Live)] = {
    use Live::{Queued, Refused};
    &[
        (503, "PGRST000", Queued),
        (503, "PGRST001", Queued),
        (503, "PGRST002", Queued),
        (504, "PGRST003", Queued),
        (400, "PGRST100", Queued),
        (405, "PGRST101", Queued),
        (400, "PGRST102", Refused),
        (416, "PGRST103", Queued),
        (405, "PGRST105", Queued),
        (406, "PGRST106", Queued),
        (415, "PGRST107", Queued),
        (400, "PGRST108", Queued),
        (400, "PGRST114", Queued),
        (400, "PGRST122", Queued),
        (404, "PGRST125", Queued),
        (400, "PGRST200", Queued),
        (404, "PGRST202", Queued),
        (300, "PGRST203", Queued),
        (400, "PGRST204", Queued),
        (404, "PGRST205", Queued),
        (500, "PGRST300", Queued),
        (401, "PGRST301", Queued),
        (401, "PGRST302", Queued),
        (401, "PGRST303", Queued),
        (500, "PGRSTX00", Queued),
    ]
};

/// The answers of gateways, portals and proxies, and of a PostgREST whose PostgreSQL died under the request.
const STATUSES: &[u16] = &[
    300, 301, 302, 307, 400, 401, 402, 403, 404, 405, 406, 407, 408, 409, 410, 411, 413, 414, 415, 421, 422,
    425, 426, 429, 431, 451, 500, 501, 502, 503, 504, 505, 520, 521, 522, 523, 524, 525, 526, 527, 530, 540,
    544, 599,
];
const BODIES: &[&str] = &[
    "",
    "{}",
    "<html><body>nothing here</body></html>",
    r#"{"message":"no Route matched with those values"}"#,
    r#"{"code":"","details":null,"hint":null,"message":""}"#,
];

fn all() -> Vec<(String, Fault, Live)> {
    let sqlstates = SQLSTATES
        .iter()
        .map(|(code, live)| (format!("SQLSTATE {code}"), Fault::json_error(400, code), *live));
    let postgrest = POSTGREST
        .iter()
        .map(|(status, code, live)| ((*code).to_owned(), Fault::json_error(*status, code), *live));
    let bare = STATUSES.iter().flat_map(|status| {
        let named = |body: &&str| {
            (format!("HTTP {status} with {body:?}"), Fault::answer(*status, body), Live::Queued)
        };
        BODIES.iter().map(named).collect::<Vec<_>>()
    });
    sqlstates.chain(postgrest).chain(bare).collect()
}

/// One response of each kind, for slow tests.
fn some() -> Vec<(String, Fault)> {
    let is_wanted = |what: &str| {
        let codes = ["22001", "23502", "3F000", "42501", "42883", "53100", "57014", "P0001", "XX001"];
        let answers = ["PGRST102", "PGRST106", "PGRST202", "PGRST203", "PGRST303", "HTTP 413 with \"\""];
        let pages = [
            "HTTP 404 with \"{\\\"message",
            "HTTP 400 with \"{\\\"code",
            "HTTP 302 with \"<",
            "HTTP 403 with \"<",
        ];
        let is_named = |part: &&str| what.contains(*part);
        codes.iter().chain(&answers).chain(&pages).any(is_named)
    };
    all().into_iter().filter(|(what, ..)| is_wanted(what)).map(|(what, fault, _)| (what, fault)).collect()
}

/// A daemon that waits for slow answers on a busy machine: here each answer comes, and says something.
fn patient(gateway: &Gateway) -> Builder {
    builder(gateway).timeout(30 * SECOND).soft_timeout(30 * SECOND)
}

/// Lite hides some codes of PostgreSQL behind a bare 500. Nobody can tell then whose fault it was.
fn hides(server: Server, sqlstate: &str) -> bool {
    server == Server::Lite && ["23514", "3F000", "P0001", "XX000"].contains(&sqlstate)
}

fn on_writes(gateway: &Gateway, fault: Fault) {
    gateway
        .rule(move |seen| if seen.path.contains("threadkeep_apply") { fault.clone() } else { Fault::Pass });
}

async fn a_live_write_is_refused_for_its_own_fault_alone(server: Server) {
    let (stack, ..) = shared(server).await;
    let cases = all();
    let lanes = cases.chunks(cases.len().div_ceil(8)).map(async |cases| {
        let gateway = stack.gateway().await;
        let cache = patient(&gateway).open().await.unwrap();
        for (what, fault, expected) in cases {
            on_writes(&gateway, fault.clone());
            let result = cache.put(key("live"), "value").await;
            let live = match &result {
                Ok(WriteOutcome::Queued) => Live::Queued,
                Err(error) if error.kind() == ErrorKind::Rejected && !error.outcome_unknown() => {
                    Live::Refused
                }
                other => panic!("{what}: {other:?}"),
            };
            assert_eq!(live, *expected, "{what}: {result:?}");
            gateway.clear();
            drained(what, &cache).await;
            eventually(what, async || {
                // A write that is stored ends the alert.
                cache.put(key("after"), "value").await.unwrap() == WriteOutcome::Stored
                    && cache.health().is_available()
            })
            .await;
        }
    });
    join_all(lanes).await;
}

async fn a_refusal_of_every_write_costs_no_queued_write(server: Server) {
    let (stack, ..) = shared(server).await;
    let cases = some().into_iter().map(async |(what, fault)| {
        let gateway = stack.gateway().await;
        let cache = patient(&gateway).open().await.unwrap();
        let keys = queue_some(&gateway, &cache, 20).await;
        on_writes(&gateway, fault);
        gateway.forget();
        gateway.wait_for(5, "threadkeep_apply").await;
        eventually(&format!("{what}: the alert"), async || !cache.health().is_available()).await;
        let queue = cache.health().queue.unwrap();
        assert_eq!((queue.records, queue.dead_letters, queue.parked), (20, 0, 0), "{what}");
        cache.health().can_write().unwrap();
        for key in &keys {
            assert_eq!(get(&cache, key).await.unwrap().freshness(), Freshness::Queued, "{what}");
        }
        gateway.clear();
        drained(&what, &cache).await;
        assert!(cache.health().is_available(), "{what}: {:?}", cache.health());
    });
    join_all(cases).await;
}

/// Queues so many writes in an outage.
async fn queue_some(gateway: &Gateway, cache: &Cache, count: usize) -> Vec<String> {
    gateway.always(Fault::html(503));
    let keys: Vec<String> = (0..count).map(|_| key("queued")).collect();
    for key in &keys {
        assert_eq!(cache.put(key, "value").user("somebody").await.unwrap(), WriteOutcome::Queued);
    }
    keys
}

async fn a_start_is_ended_by_a_wrong_key_and_missing_migrations_alone(server: Server) {
    let (stack, ..) = shared(server).await;
    let cases = all().into_iter().filter(|(what, ..)| !what.contains("message")).collect::<Vec<_>>();
    let lanes = cases.chunks(cases.len().div_ceil(24)).map(async |cases| {
        let gateway = stack.gateway().await;
        for (what, fault, live_expected) in cases {
            gateway.always(fault.clone());
            let opened = patient(&gateway).open().await;
            let ends = match what.as_str() {
                "SQLSTATE 42501" | "PGRST300" | "PGRST301" | "PGRST302" | "PGRST303" => {
                    Some(ErrorKind::Unauthorized)
                }
                "SQLSTATE 42703" | "SQLSTATE 42883" | "SQLSTATE 42P01" => Some(ErrorKind::SchemaOutdated),
                "PGRST202" | "PGRST204" | "PGRST205" => Some(ErrorKind::SchemaOutdated),
                // A page comes from a portal or a firewall, and says nothing about the key.
                what if what.contains('<') => None,
                what if what.starts_with("HTTP 401") || what.starts_with("HTTP 403") => {
                    Some(ErrorKind::Unauthorized)
                }
                _ => None,
            };
            assert_eq!(opened.as_ref().err().map(threadkeep::Error::kind), ends, "{what}: {opened:?}");
            if let Ok(cache) = opened {
                assert!(!cache.health().is_available(), "{what}");
                let live = cache.put(key("at the start"), "1").await;
                assert_eq!(
                    live.is_ok_and(|live| live == WriteOutcome::Queued),
                    *live_expected == Live::Queued,
                    "{what}"
                );
                gateway.clear();
                drained(what, &cache).await;
            }
        }
    });
    join_all(lanes).await;
}

async fn a_start_survives_a_transient_refusal(server: Server) {
    let (_, gateway, _) = shared(server).await;
    for fault in [
        Fault::json_error(401, "PGRST303"),
        Fault::answer(401, r#"{"message":"JWT issued at future"}"#),
        Fault::answer(403, "{}"),
        Fault::json_error(404, "PGRST202"),
    ] {
        gateway.script_for("threadkeep_probe", [fault.clone(), fault.clone()]);
        let cache = patient(&gateway).open().await.unwrap_or_else(|error| panic!("{fault:?}: {error}"));
        assert_eq!(cache.put(key("started"), "1").await.unwrap(), WriteOutcome::Stored, "{fault:?}");
    }
}

/// A trigger that fails for threads with such an id. Others do not notice it.
struct Trigger<'a> {
    stack: &'a Stack,
    name: String,
}

impl<'a> Trigger<'a> {
    fn new(stack: &'a Stack, condition: &str, action: &str) -> Self {
        let name = format!("t{:016x}", fastrand::u64(..));
        let trigger = Self { stack, name };
        let name = &trigger.name;
        let sql = format!(
            "create function public.{name}() returns trigger language plpgsql as $f$ begin
                 if {condition} then {action}; end if; return new; end $f$;
             create trigger {name} before insert or update on public.conversation_threads
                 for each row execute function public.{name}();"
        );
        tokio::task::block_in_place(|| stack.psql(&sql));
        trigger
    }

    fn raising(stack: &'a Stack, condition: &str, sqlstate: &str) -> Self {
        Self::new(
            stack,
            condition,
            &format!("raise exception 'a trigger of yours' using errcode = '{sqlstate}'"),
        )
    }
}

impl Drop for Trigger<'_> {
    fn drop(&mut self) {
        let sql = format!("drop function public.{} cascade", self.name);
        tokio::task::block_in_place(|| self.stack.psql(&sql));
    }
}

async fn a_record_that_fails_alone_delays_no_other(server: Server) {
    let (stack, ..) = shared(server).await;
    let sqlstates =
        ["22023", "23514", "42501", "42883", "3F000", "25006", "53100", "P0001", "XX000", "57014", "55P03"];
    join_all(sqlstates.map(|sqlstate| fails_alone(server, stack, sqlstate))).await;
}

async fn fails_alone(server: Server, stack: &Stack, sqlstate: &str) {
    let gateway = stack.gateway().await;
    let cache = patient(&gateway).open().await.unwrap();
    let keys = queue_some(&gateway, &cache, 20).await;
    let denied = &keys[7];
    let trigger = Trigger::raising(stack, &format!("new.thread_id = '{denied}'"), sqlstate);
    gateway.clear();
    eventually(&format!("{sqlstate}: all others are stored"), async || {
        let queue = cache.health().queue.unwrap();
        queue.records + queue.dead_letters == 1
    })
    .await;
    for key in keys.iter().filter(|key| *key != denied) {
        assert_eq!(get(&cache, key).await.unwrap().freshness(), Freshness::Fresh, "{sqlstate}");
    }
    if ["22023", "23514"].contains(&sqlstate) && !hides(server, sqlstate) {
        eventually(sqlstate, async || cache.health().queue.unwrap().dead_letters == 1).await;
        assert_eq!(cache.dead_letters().await.unwrap()[0].record.key.as_str(), denied);
    } else {
        eventually(&format!("{sqlstate}: it is parked"), async || cache.health().queue.unwrap().parked == 1)
            .await;
        assert!(cache.health().is_available(), "{sqlstate}: {:?}", cache.health());
        assert_eq!(get(&cache, denied).await.unwrap().freshness(), Freshness::Queued, "{sqlstate}");
        drop(trigger);
        drained(sqlstate, &cache).await;
    }
}

async fn an_operators_mistake_costs_no_queued_write(server: Server) {
    let stack = tokio::task::spawn_blocking(move || Stack::start(server)).await.unwrap();
    let sql = |sql: &str| tokio::task::block_in_place(|| stack.psql(sql));
    for (what, mistake, remedy) in [
        (
            "a NOT NULL column",
            "alter table conversation_threads add column tenant text;
             alter table conversation_threads add constraint tenant check (tenant is not null) not valid",
            "alter table conversation_threads drop column tenant cascade",
        ),
        (
            "a constraint on users",
            "create table users (id text primary key);
             alter table conversation_threads add constraint users foreign key (user_id) references users not valid",
            "alter table conversation_threads drop constraint users; drop table users",
        ),
        (
            "a trigger that uses a dropped schema",
            "create function broken() returns trigger language plpgsql as
                 'begin insert into audit.log values (new.thread_id); return new; end';
             create trigger broken before insert or update on conversation_threads
                 for each row execute function broken()",
            "drop function broken() cascade",
        ),
        (
            "a grant that was revoked",
            "revoke insert, update on conversation_threads from service_role",
            "grant insert, update on conversation_threads to service_role",
        ),
    ] {
        let gateway = stack.gateway().await;
        let cache = patient(&gateway).open().await.unwrap();
        let keys = queue_some(&gateway, &cache, 20).await;
        sql(mistake);
        gateway.clear();
        eventually(&format!("{what}: the alert"), async || {
            let is_closed = cache.health().breaker == Some(threadkeep::BreakerState::Closed);
            // A code that Lite hides looks like an outage.
            cache.health().cause.is_some() && (is_closed || server == Server::Lite)
        })
        .await;
        // Long enough for several rounds of replay.
        gateway.forget();
        gateway.wait_for(4, "threadkeep_").await;
        let queue = cache.health().queue.unwrap();
        assert_eq!((queue.records, queue.dead_letters, queue.parked), (20, 0, 0), "{what}: {:?}", cache.health());
        for key in &keys {
            assert_eq!(get(&cache, key).await.unwrap().freshness(), Freshness::Queued, "{what}");
        }
        let second = patient(&gateway).open().await.unwrap();
        // A probe has no user and no tenant, so that a constraint shows by the first writes.
        let is_constraint = what.contains("constraint") || what.contains("NOT NULL");
        assert_eq!(second.health().is_available(), is_constraint, "{what}");
        sql(remedy);
        drained(what, &cache).await;
    }
}

async fn a_database_that_only_reads_is_noticed_and_recovers_at_once(server: Server) {
    let stack = tokio::task::spawn_blocking(move || Stack::start(server)).await.unwrap();
    for sqlstate in ["53100", "25006", "0A000", "53200", "57014"] {
        let gateway = stack.gateway().await;
        let cache = patient(&gateway).open().await.unwrap();
        let stored = key("stored");
        assert_eq!(cache.put(&stored, "before").await.unwrap(), WriteOutcome::Stored);
        let keys = queue_some(&gateway, &cache, 20).await;
        let trigger = Trigger::raising(&stack, "true", sqlstate);
        gateway.clear();
        gateway.forget();
        gateway.wait_for(3, "threadkeep_probe").await;
        assert!(!cache.health().is_available(), "{sqlstate}");
        assert_eq!(cache.health().queue.unwrap().parked, 0, "{sqlstate}");
        assert_eq!(get(&cache, &keys[3]).await.unwrap().freshness(), Freshness::Queued, "{sqlstate}");
        if ["53100", "25006", "0A000"].contains(&sqlstate) && server != Server::Lite {
            eventually(&format!("{sqlstate}: reads work"), async || {
                cache.get(key("unknown")).await.is_ok_and(|found| found.is_none())
            })
            .await;
        }
        drop(trigger);
        eventually("a write is stored", async || {
            cache.put(key("live"), "after").await.unwrap() == WriteOutcome::Stored
        })
        .await;
        let mended = std::time::Instant::now();
        drained(sqlstate, &cache).await;
        assert!(mended.elapsed() < 20 * SECOND, "{sqlstate}: {:?}", mended.elapsed());
        eventually(sqlstate, async || cache.health().is_available()).await;
    }
}

async fn a_neighbour_in_a_batch_does_not_share_the_error(server: Server) {
    let (stack, gateway, _) = shared(server).await;
    for sqlstate in ["42501", "42883", "3F000", "P0001", "XX000", "23514"] {
        if hides(server, sqlstate) {
            continue;
        }
        // Without a queue, each caller gets the database's error for its own record.
        let cache = patient(&gateway).on_outage(OnOutage::Reject).open().await.unwrap();
        let keys: Vec<String> = (0..100).map(|_| key("batch")).collect();
        let denied = keys[50].clone();
        let _trigger = Trigger::raising(stack, &format!("new.thread_id = '{denied}'"), sqlstate);
        let puts = keys.iter().map(|key| {
            let (cache, key) = (cache.clone(), key.clone());
            tokio::spawn(async move { (cache.put(&key, "value").await, key) })
        });
        for put in join_all(puts.collect::<Vec<_>>()).await {
            let (result, key) = put.unwrap();
            assert_eq!(result.is_ok(), key != denied, "{sqlstate}: {result:?}");
        }
    }
}
