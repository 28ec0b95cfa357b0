//! Applies migrations while other sessions use the table.

use std::time::{Duration, Instant};

use crate::PLANNED;
use crate::database::Database;

#[test]
fn migration_file_begins_with_a_lock_timeout() {
    for file in crate::stack::migrations("migrations") {
        let sql = std::fs::read_to_string(&file).unwrap();
        let first = sql.lines().find(|line| !line.is_empty() && !line.starts_with("--")).unwrap();
        assert_eq!(first, "set lock_timeout = '1s';", "{file:?}");
    }
}

/// Applies the migrations again beside a long reader, a long writer and other calls.
#[tokio::test(flavor = "multi_thread")]
async fn repeated_migration_beside_long_transactions_takes_no_lock() {
    let database = Database::migrated();
    database.sql("insert into conversation_threads (thread_id, conversation_data, expires_at) values ('t', '1', now() + interval '1h')");
    let [reader, writer, caller] =
        [database.connect().await, database.connect().await, database.connect().await];
    reader
        .batch_execute("begin; select count(*) from conversation_threads, threadkeep_tombstones")
        .await
        .unwrap();
    writer.batch_execute("begin; update conversation_threads set conversation_data = '2'; insert into threadkeep_tombstones values ('x', 1, now())").await.unwrap();
    let locks = "select coalesce(string_agg(distinct mode, ', '), 'none') from pg_locks
                 where relation in ('conversation_threads'::regclass, 'threadkeep_tombstones'::regclass, 'threadkeep_writers'::regclass) and pid = pg_backend_pid()";
    tokio::task::block_in_place(|| database.apply("migrations")).unwrap();
    // One transaction holds all locks until its end.
    let files = crate::stack::migrations("migrations");
    let all: String = files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let modes = database.try_sql(&format!("begin; {all}; {locks}; rollback")).unwrap();
    // The rolled-back trial write released its locks, so the migration takes no lock at all.
    assert_eq!(modes.lines().last(), Some("none"));
    caller.batch_execute("set statement_timeout = '30s'").await.unwrap();
    let insert = "insert into conversation_threads (thread_id, conversation_data, expires_at) values ('u', '1', now() + interval '1h')";
    caller.batch_execute(insert).await.unwrap();
    for client in [&reader, &writer] {
        client.batch_execute("rollback").await.unwrap();
    }
}

/// The first migration must lock the table. It fails with a clear message, and callers wait about one second at most.
#[tokio::test(flavor = "multi_thread")]
async fn first_migration_beside_long_reader_fails_with_a_remedy() {
    let database = Database::new();
    database.try_sql(PLANNED).unwrap();
    let before = database.schema();
    let (reader, caller) = (database.connect().await, database.connect().await);
    reader.batch_execute("begin; select count(*) from conversation_threads").await.unwrap();
    let mut longest = Duration::ZERO;
    let said = std::thread::scope(|scope| {
        let applied = scope.spawn(|| database.apply("migrations").unwrap_err());
        while !applied.is_finished() {
            let began = Instant::now();
            let read = caller.batch_execute("select count(*) from conversation_threads");
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(read)).unwrap();
            longest = longest.max(began.elapsed());
        }
        applied.join().unwrap()
    });
    assert!(
        said.contains("in use by a long transaction") && said.contains("apply this file again"),
        "{said}"
    );
    // The limit allows for a slow machine. Without the timeout, a call waits until the end of the reader.
    assert!(longest < Duration::from_secs(30), "{longest:?}");
    assert!(database.schema().contains("CREATE TABLE public.conversation_threads"));
    assert!(!database.schema().contains("run_began bigint DEFAULT"), "{}", database.schema());
    assert!(database.schema().len() >= before.len());

    reader.batch_execute("commit").await.unwrap();
    database.apply("migrations").unwrap();
    assert!(database.schema() == Database::plain().schema());
}
