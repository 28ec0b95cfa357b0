//! Runs every kind of write in eight concurrent sessions. No deadlock occurs, every answer agrees with `decide`, and no older write
//! replaces a newer one.
//!
//! `SQL_RACE_SECONDS=60` runs the race for a minute. In one half of the calls, the session locks the rows first, so the answer can be
//! compared with `decide`. The other half waits inside `threadkeep_apply`. A trigger records all changes for the check of these calls.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use threadkeep::store::WriterId;
use tokio_postgres::Client;

use crate::agreement::{Compared, Given, apply_and_compare, call, draw};
use crate::database::Database;

const KEYS: usize = 20;
const SESSIONS: u64 = 8;
const DAY: i64 = 86_400_000;

/// Records the changes of each key in their order, under the lock of the row.
const AUDIT: &str = "
    create table audit (seq bigserial primary key, xact xid8 not null default pg_current_xact_id(), key text, version bigint, value jsonb, live boolean);
    create function audit() returns trigger language plpgsql security definer as $$
    begin
        if tg_op = 'DELETE' then
            insert into public.audit (key, version, live)
            select old.thread_id, greatest(old.version, (select version from public.threadkeep_tombstones where thread_id = old.thread_id)), false;
        elsif tg_op = 'INSERT' or new.version <> old.version then
            insert into public.audit (key, version, value, live)
            values (new.thread_id, new.version, new.conversation_data, new.expires_at > clock_timestamp());
        end if;
        return null;
    end $$;
    -- The names say when: a row before it is put above its tombstone, a deletion after its tombstone is there.
    create trigger aa_audit after insert or update on conversation_threads for each row execute function audit();
    create trigger zz_audit after delete on conversation_threads for each row execute function audit()";

/// Statements of other clients, each with its share of 100.
const PLAIN: &[(u32, &str)] = &[
    (6, "delete from conversation_threads where thread_id = 'KEY'"),
    (4, "delete from conversation_threads where thread_id = 'KEY' and expires_at < now()"),
    (
        6,
        "insert into conversation_threads (thread_id, conversation_data, expires_at) values ('KEY', '\"plain\"', now() + interval '1h')
         on conflict (thread_id) do update set conversation_data = excluded.conversation_data, expires_at = excluded.expires_at",
    ),
    (3, "update conversation_threads set conversation_data = '\"edited\"' where thread_id = 'KEY'"),
    (3, "update conversation_threads set metadata = jsonb_build_object('at', now()) where thread_id = 'KEY'"),
    (3, "update conversation_threads set expires_at = now() where thread_id = 'KEY'"),
    // A row of last week, for the purge.
    (
        3,
        "insert into conversation_threads (thread_id, conversation_data, version, expires_at)
         values ('KEY', '0', ((extract(epoch from now() - interval '9 days') * 1000)::bigint << 21) + 2, now() - interval '9 days')
         on conflict (thread_id) do nothing",
    ),
    (3, "select threadkeep_touch('[\"race-3\", \"race-1\", \"race-0\", \"race-2\"]')"),
    (4, "select threadkeep_purge(100)"),
];

/// The results of one session.
#[derive(Default)]
struct Tally {
    agreed: usize,
    raced: usize,
    direct: Vec<Direct>,
}

/// A write that was applied without locks before, by a daemon that writes once.
struct Direct {
    given: Given,
    base: Option<i64>,
    state: String,
    /// The version of the row after the write.
    version: i64,
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_sessions_agree_with_decide_without_deadlock() {
    race(Database::migrated()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_sessions_agree_with_decide_on_partitions() {
    race(Database::partitioned()).await;
}

async fn race(database: Database) {
    let seconds = std::env::var("SQL_RACE_SECONDS").map_or(5, |seconds| seconds.parse().unwrap());
    database.sql(AUDIT);
    // PostgreSQL detects deadlocks after 50 ms instead of one second.
    database.sql("do $$ begin execute format('alter database %I set deadlock_timeout = ''50ms''', current_database()); end $$");
    let until = Instant::now() + Duration::from_secs(seconds);
    let seed = fastrand::u64(..);
    let mut sessions = tokio::task::JoinSet::new();
    for session in 0..SESSIONS {
        let client = database.connect().await;
        sessions.spawn(async move {
            let mut rng = fastrand::Rng::with_seed(seed + session);
            let mut tally = Tally::default();
            while Instant::now() < until {
                step(&mut rng, &client, &mut tally).await;
            }
            tally
        });
    }
    let tallies = sessions.join_all().await;
    let count = "select deadlocks from pg_stat_database where datname = current_database()";
    assert_eq!(database.sql(count), "0");
    let direct: Vec<Direct> = tallies.into_iter().fold(Vec::new(), |mut all, tally| {
        println!("{} agree, {} raced, {} direct", tally.agreed, tally.raced, tally.direct.len());
        assert!(tally.raced * 10 <= tally.agreed, "too few answers could be compared");
        all.extend(tally.direct);
        all
    });
    check_audit(&database.connect().await, &direct).await;
}

async fn step(rng: &mut fastrand::Rng, client: &Client, tally: &mut Tally) {
    let key = format!("race-{}", rng.usize(..KEYS));
    let mut left = rng.u32(..100);
    for (share, sql) in PLAIN {
        if left < *share {
            let ran = client.execute(&sql.replace("KEY", &key), &[]).await;
            ran.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
            return;
        }
        left -= share;
    }
    let is_direct = rng.bool();
    let writes = batch(rng, client, is_direct).await;
    if is_direct {
        return tally.direct.extend(apply_directly(client, writes).await);
    }
    // A repeated call stands for a lost answer.
    for _ in 0..rng.usize(1..3) {
        for compared in apply_and_compare(client, &writes).await {
            match compared {
                Compared::Agrees => tally.agreed += 1,
                Compared::Raced => tally.raced += 1,
            }
        }
    }
}

/// Draws a batch with versions up to 30 ms old. One half of the batches is plain. Some conditions name the present version.
///
/// A session that locks rows before the call writes to one conversation, because it cannot lock a missing row in its turn.
async fn batch(rng: &mut fastrand::Rng, client: &Client, is_direct: bool) -> Vec<Given> {
    let present: i64 = client.query_one("select threadkeep_now()", &[]).await.unwrap().get(0);
    let mut keys: Vec<usize> = (0..KEYS).collect();
    rng.shuffle(&mut keys);
    let is_plain = rng.bool();
    let mut writes = Vec::new();
    let count = if is_direct { rng.usize(1..6) } else { 1 };
    for key in keys.into_iter().take(count) {
        let key = format!("race-{key}");
        let version = ((present - rng.i64(0..30)) << 21) + rng.i64(0..1 << 20) * 2;
        let writer = if is_direct { WriterId::random().raw() } else { (rng.i64(0..4) << 24) + rng.i64(0..2) };
        let mut bases = Vec::new();
        if !is_plain {
            let loaded = call(client, "threadkeep_load", &json!([{"key": key}])).await;
            bases.push(loaded["rows"][0]["version"].as_str().unwrap().parse().unwrap());
        }
        let mut given = draw(rng, &key, version, writer, &bases);
        // An expiry after the race, so that the audit sees each value.
        if is_direct {
            given.head.expires_at.0 = present + DAY;
        }
        writes.push(given);
    }
    writes
}

async fn apply_directly(client: &Client, writes: Vec<Given>) -> Vec<Direct> {
    let body: Vec<Value> = writes.iter().map(Given::json).collect();
    let body = Value::from(body);
    let said = call(client, "threadkeep_apply", &body).await;
    // A repeated call stands for a lost answer. A write that was not stored could be stored by now.
    let is_stored = |row: &Value| row["state"] == "stored";
    if writes.iter().all(|given| given.head.is_counted())
        && said["rows"].as_array().unwrap().iter().all(is_stored)
    {
        call(client, "threadkeep_apply", &body).await;
    }
    let base = |given: &Given| given.json()["if_version"].as_str().map(|base| base.parse().unwrap());
    let rows = said["rows"].as_array().unwrap().clone();
    let direct = writes.into_iter().zip(rows).map(|(given, row)| Direct {
        base: base(&given),
        version: match row["length"].as_u64() {
            Some(_) => row["version"].as_str().unwrap().parse().unwrap(),
            None => given.head.version.raw(),
        },
        given,
        state: row["state"].as_str().unwrap().to_owned(),
    });
    direct.collect()
}

/// Checks that versions rise, that exactly the stored writes were there, that an update replaced what it had seen, and that the items of
/// an append were there once.
async fn check_audit(client: &Client, direct: &[Direct]) {
    // Only the last change of a transaction counts, because the others were never visible.
    let changes = client
        .query(
            "select key, version, live, value::text from (
                 select distinct on (xact, key) min(seq) over (partition by xact, key) as first, * from audit order by xact, key, seq desc
             ) as last order by first",
            &[],
        )
        .await
        .unwrap();
    let last_week = (threadkeep::store::Clock::new().now().0 - 8 * DAY) << 21;
    let mut newest = HashMap::<String, (i64, bool)>::new();
    let mut before = HashMap::<(String, i64), i64>::new();
    let mut values = HashMap::<String, Vec<String>>::new();
    for change in &changes {
        let (key, version, is_live): (String, i64, bool) = (change.get(0), change.get(1), change.get(2));
        let (previous, was_live) = newest.insert(key.clone(), (version, is_live)).unwrap_or((0, false));
        // The removal of a tombstone, or its change into a row, keeps its version.
        let stays = !is_live && !was_live && version == previous;
        // The purge forgets a conversation.
        let forgets = previous < last_week;
        assert!(version > previous || stays || forgets, "{key}: {previous} and then {version}");
        values.entry(key.clone()).or_default().push(change.get::<_, Option<String>>(3).unwrap_or_default());
        before.entry((key, version)).or_insert(previous);
    }
    let mut states = HashMap::<&str, usize>::new();
    for Direct { given, base, state, version } in direct {
        *states.entry(state).or_default() += 1;
        // The repeated call finds another conversation, and may append to it.
        if ["absent", "not_an_array", "too_large"].contains(&state.as_str()) {
            continue;
        }
        if given.append.is_some() {
            *states.entry("appends").or_default() += usize::from(state == "stored");
            check_items(given, state, &values[&given.key]);
        }
        let seen = before.get(&(given.key.clone(), *version));
        assert_eq!(seen.is_some(), state == "stored", "{given:?}: {state}");
        if let (Some(previous), Some(base)) = (seen, base) {
            assert!(previous == base || *previous < last_week, "{given:?} replaced {previous}");
        }
    }
    println!("{} changes, {states:?}", changes.len());
    let all = ["stored", "superseded", "conflict", "appends", "not_an_array"]
        .map(|state| states.get(state).copied().unwrap_or(0));
    assert!(all.iter().all(|count| *count > 0) && changes.len() > 100, "{states:?}");
}

/// Checks that the values of a conversation had the items of a stored append once and in their order, from some change to a later one.
fn check_items(given: &Given, state: &str, values: &[String]) {
    let items = given.value.as_array().unwrap();
    let text = items.iter().map(Value::to_string).collect::<Vec<_>>().join(", ");
    if items.is_empty() {
        return;
    }
    let counts: Vec<usize> = values.iter().map(|value| value.matches(&text).count()).collect();
    let mut steps = counts.clone();
    steps.dedup();
    let once = [&[0, 1, 0][..], &[0, 1], &[1, 0], &[1]].contains(&&*steps);
    assert!(
        once == (state == "stored") && steps.iter().all(|count| *count < 2),
        "{given:?}: {state} {counts:?}"
    );
}

/// An insert waits for a transaction that creates and deletes the same conversation. Its snapshot does not show the tombstone.
#[tokio::test(flavor = "multi_thread")]
async fn insert_that_waited_for_a_deletion_is_superseded() {
    let database = Database::migrated();
    let (deleting, applying) = (database.connect().await, std::sync::Arc::new(database.connect().await));
    for keys in [vec!["one"], vec!["two", "three"]] {
        let key = keys[0];
        let change = format!(
            "begin; insert into conversation_threads (thread_id, conversation_data, expires_at) values ('{key}', '1', now() + interval '1h');
             delete from conversation_threads where thread_id = '{key}'"
        );
        deleting.batch_execute(&change).await.unwrap();
        let version = ((threadkeep::store::Clock::new().now().0 - 60_000) << 21).to_string();
        let write = |key: &&str| json!({"key": key, "version": version, "expires_at": 4_000_000_000_000_i64, "value": 2});
        let body = Value::from(keys.iter().map(write).collect::<Vec<_>>());
        let client = std::sync::Arc::clone(&applying);
        let applied = tokio::spawn(async move { call(&client, "threadkeep_apply", &body).await });
        let waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        for _ in 0..3_000 {
            if database.sql(waits) == "1" {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        deleting.batch_execute("commit").await.unwrap();
        let answer = applied.await.unwrap();
        let states: Vec<&str> =
            answer["rows"].as_array().unwrap().iter().map(|row| row["state"].as_str().unwrap()).collect();
        assert_eq!(states, ["superseded", "stored"][..keys.len()], "{answer}");
        let live = format!(
            "select count(*) from conversation_threads where thread_id = '{key}' and expires_at > now()"
        );
        assert_eq!(database.sql(&live), "0");
    }
}
