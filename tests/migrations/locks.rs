//! Migrations that are applied while others use the table.

use std::time::{Duration, Instant};

use crate::PLANNED;
use crate::database::Database;

/// Each file begins with a lock_timeout.
#[test]
fn each_file_begins_with_a_lock_timeout() {
    for file in crate::stack::migrations("migrations") {
        let sql = std::fs::read_to_string(&file).unwrap();
        let first = sql.lines().find(|line| !line.is_empty() && !line.starts_with("--")).unwrap();
        assert_eq!(first, "set lock_timeout = '1s';", "{file:?}");
    }
}

/// A reader and a writer that last, and calls beside them.
#[tokio::test(flavor = "multi_thread")]
async fn applied_again_beside_long_transactions_nobody_waits() {
    let database = Database::migrated();
    database.sql("insert into conversation_threads (thread_id, conversation_data, expires_at) values ('t', '1', now() + interval '1h')");
    let [reader, writer, caller] =
        [database.connect().await, database.connect().await, database.connect().await];
    reader
        .batch_execute("begin; select count(*) from conversation_threads, threadkeep_deleted")
        .await
        .unwrap();
    writer.batch_execute("begin; update conversation_threads set conversation_data = '2'; insert into threadkeep_deleted values ('x', 1, '{}', now())").await.unwrap();
    let locks = "select coalesce(string_agg(distinct mode, ', '), 'none') from pg_locks
                 where relation in ('conversation_threads'::regclass, 'threadkeep_deleted'::regclass) and pid = pg_backend_pid()";
    let applied = async {
        tokio::task::block_in_place(|| database.apply("migrations")).unwrap();
        // In one transaction, so that all locks are still held at the end.
        let all: String = crate::stack::migrations("migrations")
            .iter()
            .map(|file| std::fs::read_to_string(file).unwrap())
            .collect();
        database.try_sql(&format!("begin; {all}; {locks}; rollback")).unwrap()
    };
    let modes = applied.await;
    // What the trial write locked is free again; and not even a vacuum would be waited for.
    assert_eq!(modes.lines().last(), Some("none"));
    caller.batch_execute("set statement_timeout = '30s'").await.unwrap();
    let insert = "insert into conversation_threads (thread_id, conversation_data, expires_at) values ('u', '1', now() + interval '1h')";
    caller.batch_execute(insert).await.unwrap();
    for client in [&reader, &writer] {
        client.batch_execute("rollback").await.unwrap();
    }
}

/// The first application has to lock the table. It gives up with a sentence, and callers wait for about a second at most.
#[tokio::test(flavor = "multi_thread")]
async fn applied_first_beside_a_long_reader_it_gives_up_and_callers_go_on() {
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
    // With room for a slow machine: without the timeout, a call would wait for as long as the reader reads.
    assert!(longest < Duration::from_secs(30), "{longest:?}");
    assert!(database.schema().contains("CREATE TABLE public.conversation_threads"));
    assert!(!database.schema().contains("accepted_versions bigint[] DEFAULT"), "{}", database.schema());
    assert!(database.schema().len() >= before.len());

    reader.batch_execute("commit").await.unwrap();
    database.apply("migrations").unwrap();
    assert!(database.schema() == Database::migrated().schema());
}
