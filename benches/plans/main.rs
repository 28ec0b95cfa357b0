//! Checks that the cost of the SQL functions does not grow with the table:
//! `cargo bench --bench plans --features testing`.
//!
//! The benchmark calls each function as the library does, on 10,000 and on 1,000,000 live conversations. Each call has its
//! own session. The first calls let PostgreSQL choose the plans that a session keeps. Then auto_explain reports the plans
//! of one call, and the benchmark times more calls without auto_explain.
//!
//! The benchmark fails if a plan step processes more rows than the call needs. It also fails if the call touches many more
//! pages of the larger table. With `-- layouts`, it measures partitions instead (see [`layouts`]). Without `--bench` (`cargo test --benches`), the table has 20,000 conversations.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs)]

mod calls;
mod layouts;
mod plan;
mod session;
#[path = "../../tests/stack/mod.rs"]
mod stack;
mod table;

use std::process::ExitCode;

use calls::{CALLS, Call};
use session::Session;
use stack::{Server, Stack};
use table::{Measured, print_growth, print_plans};

/// plpgsql makes five custom plans of a statement, and then decides whether to keep a generic plan.
const CALLS_UNTIL_PLANS_STAY: usize = 6;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (is_layouts, others): (Vec<_>, Vec<_>) =
        args.iter().filter(|arg| *arg != "--bench").partition(|arg| *arg == "layouts");
    if let Some(other) = others.first() {
        println!(
            "cargo bench --bench plans --features testing [-- layouts]\n\nprints plans, and fails if the cost of a plan grows with the table; \
             layouts: measures writes and VACUUM with partitions and without"
        );
        return if ["--help", "-h"].contains(&other.as_str()) {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(2)
        };
    }
    let is_quick = !args.iter().any(|arg| arg == "--bench");
    let (sizes, timed): (&[usize], _) = if is_quick { (&[20_000], 5) } else { (&[10_000, 1_000_000], 31) };
    let stack = tokio::task::block_in_place(|| Stack::start(Server::Postrust));
    if !is_layouts.is_empty() {
        layouts::run(&stack, 300_000).await;
        return ExitCode::SUCCESS;
    }
    let mut all = Vec::new();
    for &threads in sizes {
        eprintln!("{threads} conversations …");
        tokio::task::block_in_place(|| calls::fill(&stack, threads));
        let mut measured = Vec::new();
        for call in CALLS {
            measured.push(measure(&stack, call, threads, timed).await);
        }
        all.push((threads, measured));
    }
    println!("{}, default settings\n", stack.psql("select split_part(version(), ' (', 1)"));
    print_plans(all.last().unwrap());
    print_growth(&all);
    let faults = table::faults(&all);
    if is_quick {
        // Last, because it drops an index.
        layouts::run(&stack, 5_000).await;
    }
    faults.iter().for_each(|fault| eprintln!("FAILED {fault}"));
    if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Measures the plans of one call and its median time.
async fn measure(stack: &Stack, call: &'static Call, threads: usize, timed: usize) -> Measured {
    let mut session = Session::open(&stack.database_url()).await;
    let sql = stack.sql().await;
    let argument = async |turn| call.argument(&sql, turn, threads).await;
    for turn in 0..CALLS_UNTIL_PLANS_STAY {
        session.call(call.function, &argument(turn).await).await;
    }
    let plans = session.explained(call.function, &argument(CALLS_UNTIL_PLANS_STAY).await).await;
    let mut spans = Vec::new();
    for turn in 1..=timed {
        let argument = argument(CALLS_UNTIL_PLANS_STAY + turn).await;
        spans.push(session.call(call.function, &argument).await);
    }
    spans.sort_unstable();
    Measured { call, plans, span: spans[timed / 2] }
}
