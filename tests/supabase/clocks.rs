//! Daemons with wrong clocks.

use std::time::Duration;

use threadkeep::WriteOutcome;

use crate::stack::{Fault, Server, Stack};
use crate::{SECOND, builder, drained, get, key, row, shared};

on_each_server!(
    clock_five_minutes_off_keeps_expiry_and_write_order,
    queued_write_of_wrong_clock_is_restamped_at_clock_sync,
    write_after_a_step_back_of_the_database_is_not_lost
);

const OFF: [i64; 2] = [-300_000, 300_000];

async fn clock_five_minutes_off_keeps_expiry_and_write_order(server: Server) {
    let (stack, gateway, right) = shared(server).await;
    for off in OFF {
        let wrong = builder(&gateway).clock_skew_millis(off).open().await.unwrap();
        let (brief, shared) = (key("brief"), key("shared"));

        // Both the database's clock and the reader's clock apply the expiry exactly.
        wrong.put(&brief, "brief").ttl(8 * SECOND).await.unwrap();
        let left: f64 =
            row(stack, &brief, "extract(epoch from expires_at - clock_timestamp())").parse().unwrap();
        assert!((1.0..8.1).contains(&left), "{off}: {left} s left");
        assert!(get(&wrong, &brief).await.is_some() && get(&right, &brief).await.is_some());
        tokio::time::sleep(Duration::from_millis(8_050)).await;
        assert!(get(&wrong, &brief).await.is_none() && get(&right, &brief).await.is_none(), "{off}");

        // The last write wins, with any clock error of its daemon.
        for round in 0..6 {
            let writer = if round % 2 == 0 { &wrong } else { &right };
            assert_eq!(
                writer.put(&shared, &round).await.unwrap(),
                WriteOutcome::Stored,
                "{off}, round {round}"
            );
            assert_eq!(row(stack, &shared, "conversation_data"), round.to_string());
        }
        wrong.remove(&shared).await.unwrap();
        assert!(get(&right, &shared).await.is_none());
        assert_eq!(right.put(&shared, "back").await.unwrap(), WriteOutcome::Stored);
        assert_eq!(get(&wrong, &shared).await.unwrap().json(), "\"back\"");
    }
}

/// The first contact fails, so that the daemon starts before its first clock sync.
async fn queued_write_of_wrong_clock_is_restamped_at_clock_sync(server: Server) {
    let (stack, gateway, right) = shared(server).await;
    for off in OFF {
        let key = key("clock");
        right.put(&key, "old").await.unwrap();
        // README promises an order between daemons only beyond 2 s plus one round trip.
        tokio::time::sleep(5 * SECOND).await;
        gateway.always(Fault::html(522));
        let wrong = builder(&gateway).clock_skew_millis(off).open().await.unwrap();
        assert!(!wrong.health().is_available());
        // The wrong clock stamps this write. Clock sync corrects the version before the replay (I8).
        assert_eq!(wrong.put(&key, "new").ttl(60 * SECOND).await.unwrap(), WriteOutcome::Queued);
        gateway.clear();
        drained("a wrong clock", &wrong).await;
        let left = "conversation_data, round(extract(epoch from expires_at - clock_timestamp()) / 10)";
        assert_eq!(row(stack, &key, left), "\"new\"|6", "{off}");
    }
}

/// Lets all functions of threadkeep read a clock that a test can set.
const SETTABLE_CLOCK: &str = "
create table public.clock (ahead interval not null);
insert into public.clock values ('0');
create function public.settable_clock() returns timestamptz language sql volatile security definer
    as $f$ select pg_catalog.clock_timestamp() + ahead from public.clock $f$;
do $d$ declare f record; begin
    for f in select pg_get_functiondef(p.oid) as text from pg_proc p join pg_namespace n on n.oid = pronamespace
             where n.nspname = 'public' and proname like 'threadkeep%' and prokind = 'f' loop
        execute replace(f.text, 'clock_timestamp()', 'public.settable_clock()');
    end loop;
end $d$;
";

/// Without copies in memory, only the version tells the store a new write from a repeated one.
async fn write_after_a_step_back_of_the_database_is_not_lost(server: Server) {
    let stack = tokio::task::block_in_place(|| Stack::start(server));
    tokio::task::block_in_place(|| stack.psql(SETTABLE_CLOCK));
    let gateway = stack.gateway().await;
    let open = || builder(&gateway).cache_max_bytes(0).open();
    let (other, cache) = (open().await.unwrap(), open().await.unwrap());
    other.put("appended", &[1]).await.unwrap();
    cache.append("appended", &[2]).await.unwrap();
    cache.put("put", &1).await.unwrap();
    stack.psql("update public.clock set ahead = '-1 minute'");
    // Any answer tells the daemon the new time.
    get(&cache, "other").await;
    let put = cache.put("put", &2).await.unwrap();
    let append = cache.append("appended", &[3]).await.unwrap().outcome;
    let value = |key| {
        stack.psql(&format!("select conversation_data from conversation_threads where thread_id = '{key}'"))
    };
    let is_kept = |outcome, key, json| outcome == WriteOutcome::Stored && value(key).trim() == json;
    for (outcome, key, json) in [(put, "put", "2"), (append, "appended", "[1, 2, 3]")] {
        assert!(is_kept(outcome, key, json) || outcome == WriteOutcome::Superseded, "{key}: {outcome:?}");
    }
}
