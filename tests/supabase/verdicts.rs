//! Tests the effect of each response on live writes, replay and start.

use futures::future::join_all;
use threadkeep::{Builder, Cache, ErrorKind, Freshness, OnOutage, WriteOutcome};

use crate::responses::{Live, all_responses, representative_responses};
use crate::stack::{Fault, Gateway, Server, Stack};
use crate::{SECOND, builder, drained, eventually, get, key, shared};

on_each_server![
    live_write_is_rejected_only_for_its_own_fault,
    rejection_of_every_write_loses_no_queued_write,
    start_fails_only_for_wrong_key_or_missing_migrations,
    start_succeeds_after_a_transient_rejection,
    failing_record_delays_no_other_record,
    mistake_of_operator_loses_no_queued_write,
    read_only_database_is_noticed_and_recovers_at_once,
    neighbour_in_a_batch_does_not_share_the_error,
];

/// Returns a builder with long timeouts for a busy machine. In these tests, each response arrives and carries a verdict.
fn patient(gateway: &Gateway) -> Builder {
    builder(gateway).timeout(30 * SECOND).soft_timeout(30 * SECOND)
}

/// Returns true if Lite hides the code behind a bare 500. The response then does not show the cause.
fn hides(server: Server, sqlstate: &str) -> bool {
    server == Server::Lite && ["23514", "3F000", "P0001", "XX000"].contains(&sqlstate)
}

fn on_writes(gateway: &Gateway, fault: Fault) {
    gateway
        .rule(move |seen| if seen.path.contains("threadkeep_apply") { fault.clone() } else { Fault::Pass });
}

async fn live_write_is_rejected_only_for_its_own_fault(server: Server) {
    let (stack, ..) = shared(server).await;
    let cases = all_responses();
    let lanes = cases.chunks(cases.len().div_ceil(8)).map(async |cases| {
        let gateway = stack.gateway().await;
        let cache = patient(&gateway).open().await.unwrap();
        for (case, fault, expected) in cases {
            on_writes(&gateway, fault.clone());
            let result = cache.put(key("live"), "value").await;
            let live = match &result {
                Ok(WriteOutcome::Queued) => Live::Queued,
                Err(error) if error.kind() == ErrorKind::Rejected && !error.outcome_unknown() => {
                    Live::Rejected
                }
                other => panic!("{case}: {other:?}"),
            };
            assert_eq!(live, *expected, "{case}: {result:?}");
            gateway.clear();
            drained(case, &cache).await;
            eventually(case, async || {
                // A stored write ends the alert.
                cache.put(key("after"), "value").await.unwrap() == WriteOutcome::Stored
                    && cache.health().is_available()
            })
            .await;
        }
    });
    join_all(lanes).await;
}

async fn rejection_of_every_write_loses_no_queued_write(server: Server) {
    let (stack, ..) = shared(server).await;
    let cases = representative_responses().into_iter().map(async |(case, fault)| {
        let gateway = stack.gateway().await;
        let cache = patient(&gateway).open().await.unwrap();
        let keys = queue_some(&gateway, &cache, 20).await;
        on_writes(&gateway, fault);
        gateway.forget();
        gateway.wait_for(5, "threadkeep_apply").await;
        eventually(&format!("{case}: the alert"), async || !cache.health().is_available()).await;
        let queue = cache.health().queue.unwrap();
        assert_eq!((queue.records, queue.dead_letters, queue.parked), (20, 0, 0), "{case}");
        cache.health().can_write().unwrap();
        for key in &keys {
            assert_eq!(get(&cache, key).await.unwrap().freshness(), Freshness::Queued, "{case}");
        }
        gateway.clear();
        drained(&case, &cache).await;
        assert!(cache.health().is_available(), "{case}: {:?}", cache.health());
    });
    join_all(cases).await;
}

/// Queues `count` writes in an outage. Returns their thread ids.
async fn queue_some(gateway: &Gateway, cache: &Cache, count: usize) -> Vec<String> {
    gateway.always(Fault::html(503));
    let keys: Vec<String> = (0..count).map(|_| key("queued")).collect();
    for key in &keys {
        assert_eq!(cache.put(key, "value").user("somebody").await.unwrap(), WriteOutcome::Queued);
    }
    keys
}

async fn start_fails_only_for_wrong_key_or_missing_migrations(server: Server) {
    let (stack, ..) = shared(server).await;
    let cases =
        all_responses().into_iter().filter(|(case, ..)| !case.contains("message")).collect::<Vec<_>>();
    let lanes = cases.chunks(cases.len().div_ceil(24)).map(async |cases| {
        let gateway = stack.gateway().await;
        for (case, fault, _) in cases {
            gateway.always(fault.clone());
            let opened = patient(&gateway).open().await;
            let ends = match case.as_str() {
                "SQLSTATE 42501" | "PGRST300" | "PGRST301" | "PGRST302" | "PGRST303" => {
                    Some(ErrorKind::Unauthorized)
                }
                "SQLSTATE 42703" | "SQLSTATE 42883" | "SQLSTATE 42P01" => Some(ErrorKind::SchemaOutdated),
                "PGRST202" | "PGRST204" | "PGRST205" => Some(ErrorKind::SchemaOutdated),
                // A portal or a firewall sends a page. A page gives no verdict about the key.
                case if case.contains('<') => None,
                case if case.starts_with("HTTP 401") || case.starts_with("HTTP 403") => {
                    Some(ErrorKind::Unauthorized)
                }
                _ => None,
            };
            assert_eq!(opened.as_ref().err().map(threadkeep::Error::kind), ends, "{case}: {opened:?}");
            if let Ok(cache) = opened {
                assert!(!cache.health().is_available(), "{case}");
                // Without an answer, the clock is unsynced, so the store gets no write yet.
                let live = cache.put(key("at the start"), "1").await;
                assert_eq!(live.unwrap(), WriteOutcome::Queued, "{case}");
                gateway.clear();
                drained(case, &cache).await;
            }
        }
    });
    join_all(lanes).await;
}

async fn start_succeeds_after_a_transient_rejection(server: Server) {
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

/// A trigger that fails for some rows. Other tests use other thread ids, so the trigger does not affect them.
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

async fn failing_record_delays_no_other_record(server: Server) {
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
        eventually(&format!("{sqlstate}: the record is parked"), async || {
            cache.health().queue.unwrap().parked == 1
        })
        .await;
        assert!(cache.health().is_available(), "{sqlstate}: {:?}", cache.health());
        assert_eq!(get(&cache, denied).await.unwrap().freshness(), Freshness::Queued, "{sqlstate}");
        drop(trigger);
        drained(sqlstate, &cache).await;
    }
}

async fn mistake_of_operator_loses_no_queued_write(server: Server) {
    let stack = tokio::task::spawn_blocking(move || Stack::start(server)).await.unwrap();
    let sql = |sql: &str| tokio::task::block_in_place(|| stack.psql(sql));
    for (case, mistake, remedy) in [
        (
            "a NOT NULL column",
            "alter table conversation_threads add column tenant text;
             alter table conversation_threads add constraint tenant check (tenant is not null) not valid",
            "alter table conversation_threads drop column tenant cascade",
        ),
        (
            "a constraint on users",
            // PostgreSQL checks the rows of a partitioned table at once.
            "update conversation_threads set user_id = null; create table users (id text primary key);
             alter table conversation_threads add constraint users foreign key (user_id) references users",
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
        eventually(&format!("{case}: the alert"), async || {
            let is_closed = cache.health().breaker == Some(threadkeep::BreakerState::Closed);
            // A code that Lite hides looks like an outage.
            cache.health().cause.is_some() && (is_closed || server == Server::Lite)
        })
        .await;
        // Four requests are enough for several rounds of replay.
        gateway.forget();
        gateway.wait_for(4, "threadkeep_").await;
        let queue = cache.health().queue.unwrap();
        assert_eq!(
            (queue.records, queue.dead_letters, queue.parked),
            (20, 0, 0),
            "{case}: {:?}",
            cache.health()
        );
        for key in &keys {
            assert_eq!(get(&cache, key).await.unwrap().freshness(), Freshness::Queued, "{case}");
        }
        let second = patient(&gateway).open().await.unwrap();
        // A probe has no user and no tenant, so only the first writes meet a constraint.
        let is_constraint = case.contains("constraint") || case.contains("NOT NULL");
        assert_eq!(second.health().is_available(), is_constraint, "{case}");
        sql(remedy);
        drained(case, &cache).await;
    }
}

async fn read_only_database_is_noticed_and_recovers_at_once(server: Server) {
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

async fn neighbour_in_a_batch_does_not_share_the_error(server: Server) {
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
