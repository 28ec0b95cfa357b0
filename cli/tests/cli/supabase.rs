//! The commands on real stacks.

use std::time::Duration;

use serde_json::json;
use threadkeep::store::{Local, Record, Store, Timestamp, Write};
use threadkeep::{Cache, Key, Version, WriteOutcome};

use crate::process::Cli;
use crate::stack::{Fault, Gateway, Server, Stack};

const DAY: i64 = 86_400_000;

on_each_server!(
    commands_work_beside_a_daemon,
    replay_in_an_outage_reports_the_rest,
    replay_names_the_write_that_waits,
    migrate_local_file_keeps_conversations,
    migrate_local_file_keeps_newer_rows,
    requeued_dead_letter_replaces_the_row,
);

async fn shared(server: Server) -> (&'static Stack, Gateway) {
    let stack = tokio::task::block_in_place(|| Stack::shared(server));
    (stack, stack.gateway().await)
}

/// Returns a thread id that no other test uses.
fn key(name: &str) -> String {
    format!("{name} {:016x}", fastrand::u64(..))
}

fn row(stack: &Stack, key: &str, columns: &str) -> String {
    let sql = format!("select {columns} from conversation_threads where thread_id = '{key}'");
    tokio::task::block_in_place(|| stack.psql(&sql)).trim().to_owned()
}

async fn daemon(cli: &Cli, gateway: &Gateway) -> Cache {
    let builder = Cache::builder().supabase(&gateway.url(), &gateway.keys().secret).queue(cli.queue());
    builder.timeout(Duration::from_secs(1)).open().await.unwrap()
}

/// Queues puts in an outage, and shuts the daemon down.
async fn queue(cli: &Cli, gateway: &Gateway, keys: &[&str]) {
    gateway.refuse().await;
    let daemon = daemon(cli, gateway).await;
    for key in keys {
        assert_eq!(daemon.put(key, &"queued").await.unwrap(), WriteOutcome::Queued);
    }
    daemon.shutdown(Duration::ZERO).await.unwrap();
    gateway.accept().await;
}

async fn commands_work_beside_a_daemon(server: Server) {
    let (stack, gateway) = shared(server).await;
    let (cli, key, user) = (Cli::on(&gateway), key("k"), key("u"));
    let daemon = daemon(&cli, &gateway).await;
    assert_eq!(cli.run(&["get", &key]).await.code, 4);
    cli.ok(&["put", &key, "{\"a\": [1]}", "--user", &user, "--metadata", "{\"m\": 1}", "--ttl", "1h"]).await;
    assert_eq!(
        row(stack, &key, "conversation_data ->> 'a', user_id, metadata ->> 'm'"),
        format!("[1]|{user}|1")
    );
    assert_eq!(row(stack, &key, "expires_at - now() between interval '59 min' and interval '1 h'"), "t");
    let found = cli.ok(&["get", &key, "--json"]).await.json();
    assert_eq!((&found["value"], &found["freshness"]), (&json!({"a": [1]}), &json!("fresh")));
    assert_eq!(cli.ok(&["list", &user, "--json"]).await.lines().len(), 1);
    assert_eq!(cli.ok(&["remove", &key]).await.out, "stored\n");
    assert_eq!(cli.run(&["get", &key]).await.code, 4);
    gateway.refuse().await;
    for arguments in [&["get", &key][..], &["put", &key, "1"], &["list", &user]] {
        let ended = cli.run(arguments).await;
        assert_eq!(ended.code, 1, "an outage is not an absence: {ended:?}");
        assert!(ended.err.contains("because: "), "{ended:?}");
    }
    drop(daemon);
}

async fn replay_in_an_outage_reports_the_rest(server: Server) {
    let (stack, gateway) = shared(server).await;
    let (cli, keys) = (Cli::on(&gateway), [key("a"), key("b")]);
    queue(&cli, &gateway, &[&keys[0], &keys[1]]).await;
    gateway.always(Fault::html(522));
    let ended = cli.run(&["queue", "replay", "--timeout", "1s", "--json"]).await;
    assert_eq!((ended.code, &ended.json()["left"]), (1, &json!(2)), "{ended:?}");
    assert!(
        ended.err.contains("522") && ended.json()["cause"].as_str().unwrap().contains("522"),
        "{ended:?}"
    );
    gateway.clear();
    let ended = cli.ok(&["queue", "replay", "--json"]).await.json();
    assert_eq!(
        (&ended["left"], &ended["replayed"], &ended["dead_letters"]),
        (&json!(0), &json!(2), &json!(0))
    );
    for key in &keys {
        assert_eq!(row(stack, key, "conversation_data"), "\"queued\"");
    }
    assert!(cli.ok(&["queue", "replay"]).await.out.contains("the queue is empty"));
    let daemon = daemon(&cli, &gateway).await;
    assert_eq!(cli.run(&["queue", "replay"]).await.code, 3);
    drop(daemon);
    gateway.rotate_secret();
    let refused = cli.run(&["queue", "replay"]).await;
    assert!(refused.code == 1 && refused.err.contains("key"), "{refused:?}");
}

async fn replay_names_the_write_that_waits(server: Server) {
    let (stack, gateway) = shared(server).await;
    let (cli, [ahead, failing, stored]) = (Cli::on(&gateway), ["ahead", "failing", "stored"].map(key));
    queue(&cli, &gateway, &[&ahead, &failing, &stored]).await;
    let version = record(&ahead, -1, "").version.raw();
    let file = rusqlite::Connection::open(cli.queue()).unwrap();
    file.execute("update records set version = ?2, is_provisional = 0 where key = ?1", (&ahead, version))
        .unwrap();
    drop(file);
    let trigger = key("fails");
    let sql = format!(
        "create function \"{trigger}\"() returns trigger language plpgsql as $$ begin raise 'no' using errcode = '42501'; end $$;
         create trigger \"{trigger}\" before insert on conversation_threads for each row when (new.thread_id = '{failing}')
         execute function \"{trigger}\"()"
    );
    tokio::task::block_in_place(|| stack.psql(&sql));
    let ended = cli.run(&["queue", "replay", "--timeout", "5s", "--verbose"]).await;
    assert!(ended.code == 1 && ended.err.contains("--verbose prints a key and the reason"), "{ended:?}");
    for (key, reason) in [(&ahead, "ahead of the store's clock"), (&failing, "failed alone")] {
        let named = ended.err.lines().filter(|line| line.contains(key.as_str()) && line.contains(reason));
        assert_eq!(named.count(), 1, "{ended:?}");
    }
    assert_eq!(row(stack, &stored, "conversation_data"), "\"queued\"");
    tokio::task::block_in_place(|| stack.psql(&format!("drop function \"{trigger}\" cascade")));
}

/// Returns a record that was written `days_ago` and expires 30 days after that.
fn record(key: &str, days_ago: i64, value: &str) -> Record {
    let now = threadkeep::store::Clock::new().now().0;
    let at = now - days_ago * DAY;
    Record {
        key: Key::new(key).unwrap(),
        version: Version::min_at(Timestamp(at)),
        value: Some(threadkeep::store::Json::of(value).unwrap()),
        expires_at: Timestamp(at + 30 * DAY),
        user: Some("moved".into()),
        metadata: threadkeep::store::Json::new("{\"m\": 1}").unwrap(),
    }
}

/// Creates a file of the backend `local`. Its store rejects old versions, so SQL sets them afterwards.
async fn local_file(cli: &Cli, records: &[Record]) -> String {
    let path = cli.path("threads.db");
    let local = Local::open(&path).await.unwrap();
    for record in records {
        let recent = Record { version: local.clock().issue_version(), ..record.clone() };
        local.apply(&[Write::from(recent)]).await.unwrap();
    }
    drop(local);
    let file = rusqlite::Connection::open(&path).unwrap();
    for record in records {
        let sql = "update conversations set version = ?2, base_version = ?2 where key = ?1";
        file.execute(sql, (record.key.as_str(), record.version.raw())).unwrap();
    }
    path.to_str().unwrap().to_owned()
}

async fn migrate_local_file_keeps_conversations(server: Server) {
    let (stack, gateway) = shared(server).await;
    let (cli, [young, old, gone]) = (Cli::on(&gateway), ["young", "old", "gone"].map(key));
    let records = [record(&young, 1, "young"), record(&old, 20, "old"), record(&gone, 40, "gone")];
    let mut records = records.to_vec();
    records.extend((0..1_200).map(|at| record(&format!("{young} {at}"), at % 25, "one of many")));
    let file = local_file(&cli, &records).await;
    // If the queue's path leads to such a file, the error names the command `queue migrate`.
    let path = [("CONVERSATION_QUEUE_PATH", file.as_str())];
    let refused = Cli::new(&path).run(&["queue", "status"]).await;
    assert!(refused.code == 1 && refused.err.contains("threadkeep queue migrate"), "{refused:?}");

    let moved = cli.ok(&["queue", "migrate", &file, "--json"]).await.json();
    assert_eq!(moved["queued"], 1_202, "expired conversations stay: {moved}");
    std::fs::rename(format!("{file}.moved"), &file).unwrap();
    let again = cli.ok(&["queue", "migrate", &file, "--json"]).await.json();
    assert_eq!(
        (&again["queued"], &again["duplicates"]),
        (&json!(0), &json!(1_202)),
        "as after an interruption"
    );
    let replayed = cli.ok(&["queue", "replay", "--json"]).await.json();
    assert_eq!((&replayed["replayed"], &replayed["dead_letters"]), (&json!(1_202), &json!(0)));
    for (at, value) in [(0, "young"), (1, "old")] {
        let columns = "conversation_data #>> '{}', user_id, metadata ->> 'm', floor(extract(epoch from expires_at) * 1000)";
        let expected = format!("{value}|moved|1|{}", records[at].expires_at.0);
        assert_eq!(row(stack, records[at].key.as_str(), columns), expected);
    }
    assert_eq!(row(stack, &young, "version"), records[0].version.to_string(), "the version is kept");
    assert_eq!(row(stack, &gone, "1"), "");
    let many = format!("select count(*) from conversation_threads where thread_id like '{young} %'");
    assert_eq!(tokio::task::block_in_place(|| stack.psql(&many)).trim(), "1200");
    assert_eq!(cli.ok(&["get", &old]).await.out, "\"old\"\n");
    std::fs::rename(format!("{file}.moved"), &file).unwrap();
    let again = cli.ok(&["queue", "migrate", &file, "--json"]).await.json();
    assert_eq!(again["queued"], 0, "a repetition after the replay queues nothing: {again}");
}

async fn migrate_local_file_keeps_newer_rows(server: Server) {
    let (stack, gateway) = shared(server).await;
    let (cli, [older, newer, removed]) = (Cli::on(&gateway), ["older", "newer", "removed"].map(key));
    for key in [&older, &newer, &removed] {
        cli.ok(&["put", key, "\"in the database\""]).await;
    }
    cli.ok(&["remove", &removed]).await;
    // One row is older than its conversation, and two rows are newer. All rows are older than 7 days.
    for (key, days) in [(&older, 25), (&newer, 15), (&removed, 15)] {
        let version = record(key, days, "").version;
        let sql = format!(
            "set session_replication_role = replica;
             update conversation_threads set version = {version}, base_version = {version} where thread_id = '{key}'"
        );
        tokio::task::block_in_place(|| stack.psql(&sql));
    }
    let records = [&older, &newer, &removed].map(|key| record(key, 20, "moved"));
    let file = local_file(&cli, &records).await;
    cli.ok(&["queue", "migrate", &file]).await;
    let replayed = cli.run(&["queue", "replay", "--json"]).await;
    assert_eq!((replayed.code, &replayed.json()["dead_letters"]), (1, &json!(2)), "{replayed:?}");
    assert!(
        replayed.err.contains("replay made 2 dead letters: see `threadkeep queue dead-letters`"),
        "{replayed:?}"
    );
    assert_eq!(row(stack, &older, "conversation_data #>> '{}'"), "moved");
    assert_eq!(row(stack, &newer, "conversation_data #>> '{}'"), "in the database");
    assert_eq!(row(stack, &removed, "expires_at <= now()"), "t");
    assert_eq!(cli.ok(&["queue", "dead-letters"]).await.out.lines().count(), 2);
}

async fn requeued_dead_letter_replaces_the_row(server: Server) {
    let (stack, gateway) = shared(server).await;
    let (cli, key) = (Cli::on(&gateway), key("k"));
    queue(&cli, &gateway, &[&key]).await;
    cli.ok(&["put", &key, "\"newer\""]).await;
    let replayed = cli.run(&["queue", "replay", "--json"]).await;
    assert_eq!((replayed.code, &replayed.json()["dead_letters"]), (1, &json!(1)), "{replayed:?}");
    assert_eq!(row(stack, &key, "conversation_data"), "\"newer\"");
    cli.ok(&["queue", "dead-letters", "--requeue", &key]).await;
    assert_eq!(cli.ok(&["queue", "replay", "--json"]).await.json()["replayed"], 1);
    assert_eq!(row(stack, &key, "conversation_data"), "\"queued\"");
    assert_eq!(cli.ok(&["queue", "dead-letters"]).await.out, "");
}
