//! How PostgreSQL carries out the functions of the migrations, and whether that grows with the table:
//! `cargo bench --bench plans --features testing`.
//!
//! Each function that the library calls is called as it calls them, on 10,000 live threads and on 1,000,000, in a session of
//! its own until its plans are those that a session stays with; then the plans of one call are taken by auto_explain, and
//! some more calls are timed without. It fails where any step of a plan meets more rows than the call has to do with, or
//! the call touches more pages of the larger table: that would grow with it. Without `--bench`, as `cargo test --benches` calls it, 20,000 threads have to do.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs)]

mod calls;
mod plan;
mod session;
#[path = "../../tests/stack/mod.rs"]
mod stack;
mod table;

use std::process::ExitCode;

use calls::{CALLS, Call};
use session::Session;
use stack::{Server, Stack};
use table::{Seen, print_growth, print_plans};

/// plpgsql plans a statement for its values five times, and then decides whether to do so for ever.
const UNTIL_PLANS_STAY: usize = 6;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(other) = args.iter().find(|arg| *arg != "--bench") {
        println!(
            "cargo bench --bench plans --features testing\n\nprints plans, and fails where one grows with the table"
        );
        return if ["--help", "-h"].contains(&other.as_str()) {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(2)
        };
    }
    let is_quick = args.is_empty();
    let (sizes, timed): (&[usize], _) = if is_quick { (&[20_000], 5) } else { (&[10_000, 1_000_000], 31) };
    let stack = tokio::task::block_in_place(|| Stack::start(Server::Postrust));
    let mut all = Vec::new();
    for &threads in sizes {
        eprintln!("{threads} threads …");
        tokio::task::block_in_place(|| calls::fill(&stack, threads));
        let mut seen = Vec::new();
        for call in CALLS {
            seen.push(look(&stack, call, threads, timed).await);
        }
        all.push((threads, seen));
    }
    println!("{}, as it comes\n", stack.psql("select split_part(version(), ' (', 1)"));
    print_plans(all.last().unwrap());
    print_growth(&all);
    let faults = table::faults(&all);
    faults.iter().for_each(|fault| eprintln!("FAILED {fault}"));
    if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The plans of one call, and how long such a call takes.
async fn look(stack: &Stack, call: &'static Call, threads: usize, timed: usize) -> Seen {
    let mut session = Session::open(&stack.database_url()).await;
    let sql = stack.sql().await;
    let argument = async |turn| call.argument(&sql, turn, threads).await;
    for turn in 0..UNTIL_PLANS_STAY {
        session.call(call.function, &argument(turn).await).await;
    }
    let plans = session.explained(call.function, &argument(UNTIL_PLANS_STAY).await).await;
    let mut spans = Vec::new();
    for turn in 1..=timed {
        let argument = argument(UNTIL_PLANS_STAY + turn).await;
        spans.push(session.call(call.function, &argument).await);
    }
    spans.sort_unstable();
    Seen { call, plans, span: spans[timed / 2] }
}
