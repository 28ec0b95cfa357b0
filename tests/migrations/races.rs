//! Runs plain deletes, upserts, calls of threadkeep, touches and purges in eight concurrent sessions. No deadlock occurs, and no
//! older write restores a deleted conversation.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::database::Database;

const KEYS: usize = 4;
const SESSIONS: u64 = 8;
const ROUNDS: u32 = 400;

/// Records the changes of each key in their order, under the lock of the row.
const AUDIT: &str = "
    create table audit (seq bigserial primary key, xact xid8 not null default pg_current_xact_id(), key text, version bigint, value jsonb, live boolean);
    create function audit() returns trigger language plpgsql security definer as $$
    begin
        if tg_op = 'DELETE' then
            insert into public.audit (key, version, live)
            select old.thread_id, greatest(old.version, (select version from public.threadkeep_tombstones where thread_id = old.thread_id)), false;
        else
            insert into public.audit (key, version, value, live)
            values (new.thread_id, new.version, new.conversation_data, new.expires_at > clock_timestamp());
        end if;
        return null;
    end $$;
    -- The names say when: a row before it is put above its tombstone, a deletion after its tombstone is there.
    create trigger aa_audit after insert or update of version on conversation_threads for each row execute function audit();
    create trigger zz_audit after delete on conversation_threads for each row execute function audit()";

struct Answer {
    key: String,
    id: u64,
    state: String,
    is_removal: bool,
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_sessions_cause_no_deadlock_or_resurrection() {
    let database = Database::migrated();
    database.sql(AUDIT);
    // PostgreSQL detects deadlocks after 50 ms instead of one second.
    database.sql("do $$ begin execute format('alter database %I set deadlock_timeout = ''50ms''', current_database()); end $$");
    let mut sessions = tokio::task::JoinSet::new();
    for seed in 0..SESSIONS {
        let client = database.connect().await;
        sessions.spawn(async move { session(seed, &client).await });
    }
    let answers: Vec<Answer> = sessions.join_all().await.into_iter().flatten().collect();

    let count = "select deadlocks from pg_stat_database where datname = current_database()";
    assert_eq!(database.sql(count), "0");
    // Only the last change of a transaction counts, because the others were never visible.
    let client = database.connect().await;
    let changes = client
        .query(
            "select key, version, value::text, live from (
                 select distinct on (xact, key) min(seq) over (partition by xact, key) as first, * from audit order by xact, key, seq desc
             ) as last order by first",
            &[],
        )
        .await
        .unwrap();
    let mut newest = HashMap::<String, (i64, bool)>::new();
    let mut seen = HashMap::<String, Vec<u64>>::new();
    for change in &changes {
        let (key, version, value): (String, i64, Option<String>) =
            (change.get(0), change.get(1), change.get(2));
        let is_live: bool = change.get(3);
        let (before, was_live) = newest.insert(key.clone(), (version, is_live)).unwrap_or((0, false));
        // The removal of a tombstone, or its change into a row, keeps its version.
        let stays = !is_live && !was_live;
        assert!(
            version > before || stays && version == before,
            "{key}: {before} and then {version}, {value:?}"
        );
        if let Some(Ok(id)) = value.map(|value| value.parse()) {
            seen.entry(key).or_default().push(id);
        }
    }
    for Answer { key, id, state, is_removal } in &answers {
        let was_there = seen.get(key).is_some_and(|seen| seen.contains(id));
        assert!(*is_removal || was_there == (state == "stored"), "{key}, {id}: {state}");
    }
    let of = |state: &str| answers.iter().filter(|answer| answer.state == state).count();
    let all = (of("stored"), of("superseded"), of("conflict"));
    assert!(all.0 > 0 && all.1 > 0 && all.2 > 0 && changes.len() > 100, "{all:?} {}", changes.len());
}

async fn session(seed: u64, client: &tokio_postgres::Client) -> Vec<Answer> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut answers = Vec::new();
    for round in 0..ROUNDS {
        let key = format!("race-{}", rng.usize(..KEYS));
        let run = async |sql: &str| {
            client
                .execute(&sql.replace("KEY", &key), &[])
                .await
                .unwrap_or_else(|error| panic!("{sql}: {error:?}"))
        };
        match rng.u32(..100) {
            0..12 => run("delete from conversation_threads where thread_id = 'KEY'").await,
            12..20 => run("delete from conversation_threads where thread_id = 'KEY' and expires_at < now()").await,
            20..28 => {
                run("insert into conversation_threads (thread_id, conversation_data, expires_at) values ('KEY', '\"plain\"', now() + interval '1h')
                     on conflict (thread_id) do update set conversation_data = excluded.conversation_data, expires_at = excluded.expires_at")
                .await
            }
            28..31 => run("update conversation_threads set expires_at = now() where thread_id = 'KEY'").await,
            31..36 => run("select threadkeep_touch('[\"race-3\", \"race-1\", \"race-0\", \"race-2\"]')").await,
            36..40 => run("select threadkeep_purge(100)").await,
            _ => {
                answers.extend(apply(&mut rng, client, seed * u64::from(ROUNDS) + u64::from(round)).await);
                0
            }
        };
    }
    answers
}

/// Applies a batch of up to three writes with versions up to 30 ms old. Some writes are conditional on a loaded version.
async fn apply(rng: &mut fastrand::Rng, client: &tokio_postgres::Client, id: u64) -> Vec<Answer> {
    let mut keys: Vec<usize> = (0..KEYS).collect();
    rng.shuffle(&mut keys);
    let mut records = Vec::new();
    let mut answers = Vec::new();
    for (at, key) in keys.into_iter().take(rng.usize(1..=3)).enumerate() {
        let key = format!("race-{key}");
        let present: i64 = client.query_one("select threadkeep_now()", &[]).await.unwrap().get(0);
        let version = ((present - rng.i64(0..30)) << 21) + rng.i64(0..1 << 21);
        let id = id * 3 + at as u64;
        let is_removal = rng.u32(..5) == 0;
        let mut record =
            json!({"key": key, "version": version.to_string(), "expires_at": present + 3_600_000});
        if !is_removal {
            record["value"] = json!(id);
        }
        if rng.u32(..3) == 0 {
            let wants = json!([{"key": key}]);
            let loaded = call(client, "threadkeep_load", &wants).await;
            record["if_version"] = loaded["rows"][0]["version"].clone();
        }
        records.push(record);
        answers.push(Answer { key, id, state: String::new(), is_removal });
    }
    let said = call(client, "threadkeep_apply", &Value::from(records)).await;
    for (answer, row) in answers.iter_mut().zip(said["rows"].as_array().unwrap()) {
        answer.state = row["state"].as_str().unwrap().to_owned();
    }
    answers
}

async fn call(client: &tokio_postgres::Client, function: &str, argument: &Value) -> Value {
    let sql = format!("select {function}($1::text::jsonb)::text");
    let answer = client.query_one(&sql, &[&argument.to_string()]).await;
    let answer: String = answer.unwrap_or_else(|error| panic!("{function}({argument}): {error:?}")).get(0);
    serde_json::from_str(&answer).unwrap()
}
