//! Measures writes and VACUUM on the layouts of the table: `cargo bench --bench plans --features testing -- layouts`.
//!
//! Each layout begins with a rewritten table. Autovacuum is off, and PostgreSQL does not sync. Other programs on the machine
//! affect the times of a clock, so the benchmark also reads the processor time of the backend.

use std::time::Instant;

use tokio::task::block_in_place;
use tokio_postgres::Client;

use crate::calls::{self, APPENDS, APPLY, Call, KNOWN};
use crate::stack::Stack;

/// Calls on known conversations, and their number for 300,000 conversations.
const WRITES: [(Call, usize); 3] = [
    (Call::new("put, 64 a call", APPLY, 64, KNOWN), 500),
    (Call::new("put, 1 a call", APPLY, 1, KNOWN), 2_000),
    (Call::new("append, 1 a call", APPLY, 1, APPENDS), 2_000),
];

/// The layouts in their order, each with its number of partitions. The second round shows the noise.
const LAYOUTS: [(&str, Option<u32>); 5] = [
    ("16 partitions", Some(16)),
    ("plain", Some(0)),
    ("16 partitions", Some(16)),
    ("plain", Some(0)),
    ("plain, without `…_changed`", None),
];

const PARTS: &str = "select oid::regclass::text from pg_class where relkind = 'r' and relname like 'conversation_threads%' order by oid";
const SIZES: &str =
    "select format('%s MB | %s MB', round(sum(pg_table_size(oid)) / 1000000), round(sum(pg_indexes_size(oid)) / 1000000))
    from pg_class where relkind = 'r' and relname like 'conversation_threads%'";

pub async fn run(stack: &Stack, threads: usize) {
    sql(stack, "alter system set autovacuum = off");
    sql(stack, "select pg_reload_conf()");
    block_in_place(|| calls::fill(stack, threads));
    println!("## Writes by layout, at {threads} conversations\n");
    println!(
        "| layout | migration | call | µs of processor for a write | bytes of log for a write |\n|---|---|---|---|---|"
    );
    let mut vacuums = Vec::new();
    for (name, count) in LAYOUTS {
        let began = Instant::now();
        match count {
            Some(count) => block_in_place(|| stack.partition(count)),
            None => ["drop index conversation_threads_changed", "vacuum full conversation_threads"]
                .iter()
                .for_each(|step| drop(sql(stack, step))),
        }
        let took = count.map_or(String::new(), |_| format!("{:.0} s", began.elapsed().as_secs_f64()));
        sql(stack, "vacuum analyze conversation_threads");
        let sizes = sql(stack, SIZES);
        for (call, calls) in &WRITES {
            let (micros, bytes) = measure(stack, call, calls * threads / 300_000 + 10, threads).await;
            println!("| {name} | {took} | {} | {micros:.0} | {bytes:.0} |", call.name);
        }
        vacuums.push(format!("| {name} | {sizes} | {} |", vacuum(stack).await));
    }
    println!("\n## VACUUM after these writes\n");
    println!(
        "| layout | table | indexes | s of processor | s | the slowest part, s | by two sessions, s |\n|---|---|---|---|---|---|---|"
    );
    vacuums.iter().for_each(|line| println!("{line}"));
}

/// Returns the processor time and the bytes of the log for one write.
async fn measure(stack: &Stack, call: &Call, times: usize, threads: usize) -> (f64, f64) {
    let (sql, session) = (stack.sql().await, stack.sql().await);
    session.batch_execute("set role service_role").await.unwrap();
    // The arguments come from look-ups, also from a partitioned table.
    sql.batch_execute("set enable_hashjoin = off; set enable_mergejoin = off").await.unwrap();
    let statement = session.prepare(&format!("select public.{}::text", call.function)).await.unwrap();
    let (mut micros, mut bytes) = (0.0, 0.0);
    for turn in 0..times {
        let argument = call.argument(&sql, turn, threads).await;
        let (cpu, log) = (processor_seconds(&session).await, written(&sql).await);
        let answer: String = session.query_one(&statement, &[&argument]).await.unwrap().get(0);
        assert_eq!(answer.matches("\"stored\"").count(), call.count, "{answer}");
        micros += (processor_seconds(&session).await - cpu) * 1e6;
        bytes += written(&sql).await - log;
    }
    let writes = (times * call.count) as f64;
    (micros / writes, bytes / writes)
}

/// Vacuums each part in turn, then again after the same number of dead rows by two sessions.
async fn vacuum(stack: &Stack) -> String {
    let session = stack.sql().await;
    let parts: Vec<String> = sql(stack, PARTS).lines().map(str::to_owned).collect();
    let (cpu, began, mut slowest) = (processor_seconds(&session).await, Instant::now(), 0.0_f64);
    for part in &parts {
        let began = Instant::now();
        session.batch_execute(&format!("vacuum {part}")).await.unwrap();
        slowest = slowest.max(began.elapsed().as_secs_f64());
    }
    let (all, cpu) = (began.elapsed().as_secs_f64(), processor_seconds(&session).await - cpu);
    sql(stack, "update conversation_threads set version = version where thread_id like 'thread-%5'");
    let began = Instant::now();
    let other = stack.sql().await;
    let half = async |session: &Client, mine: usize| {
        for part in parts.iter().skip(mine).step_by(2) {
            session.batch_execute(&format!("vacuum {part}")).await.unwrap();
        }
    };
    tokio::join!(half(&session, 0), half(&other, 1));
    format!("{cpu:.1} | {all:.1} | {slowest:.2} | {:.1}", began.elapsed().as_secs_f64())
}

/// Reads the processor time of a session's backend on Linux.
async fn processor_seconds(session: &Client) -> f64 {
    let pid: i32 = session.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    text.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
}

async fn written(session: &Client) -> f64 {
    let lsn = "select (pg_current_wal_insert_lsn() - '0/0')::float8";
    session.query_one(lsn, &[]).await.unwrap().get(0)
}

fn sql(stack: &Stack, text: &str) -> String {
    block_in_place(|| stack.psql(text))
}
