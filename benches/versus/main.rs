//! Compares threadkeep with its alternatives, in one run, on one stack and one table:
//! `cargo bench --bench versus --features testing`. `-- --help` lists the parts. `-- puts hits` runs these two parts.
//!
//! PostgreSQL and postrust run on this machine (`tests/install` installs them), on one half of its cores. The measured
//! client has the other half, because the database is another machine in reality. If the stack is idle, the client has
//! all cores. PostgreSQL syncs its commits.
//!
//! The alternatives take turns in each round. A ratio is the median of the ratios within the rounds. Without `--bench`
//! (`cargo test --benches`), each part runs once with little data, and the figures have no meaning.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs)]

mod appends;
mod choices;
mod hits;
mod large;
mod outage;
mod pgbench;
mod reads;
mod rest;
mod sessions;
#[path = "../../tests/stack/mod.rs"]
mod stack;
mod table;
mod work;
mod world;
mod writes;

use table::Table;
use world::{Scale, World};

const PARTS: [(&str, &str); 16] = [
    ("hits", "gets from memory, against bare moka and tower-sessions"),
    ("choices", "hasher, eviction policy and expiry of the in-memory cache, against alternatives"),
    ("hits-by-threads", "gets from memory with 1,000 to 1,000,000 conversations"),
    ("outage-hits", "stale and queued gets, against fresh gets"),
    ("puts", "256 tasks, against prebuilt batches, one POST each, and pgbench"),
    ("put-cpu", "the CPU time of the client for each put, against prebuilt batches"),
    ("put-latency", "1,000 puts a second, against one POST each"),
    ("lone-put", "one task, against one POST of the same function"),
    ("cold-gets", "10,000 keys, 256 tasks, against prebuilt batches and one GET each"),
    ("one-key", "1,000 tasks that get the same conversation"),
    ("queued-puts", "with the breaker open, against one synced commit each"),
    ("cold-gets-in-outage", "from the outage file, against point reads of the file"),
    ("replay", "100,000 queued records, and live puts during the replay"),
    ("warm-up", "100,000 conversations, against a fetch of the same pages"),
    ("appends", "to a conversation of 400 KB, and by 8 daemons to one, against updates"),
    ("large", "conversations of 400 KB, against one POST and one GET"),
];

/// Parts that leave the stack idle while they measure.
const WITHOUT_STACK: [&str; 6] =
    ["hits", "choices", "hits-by-threads", "outage-hits", "queued-puts", "cold-gets-in-outage"];

#[tokio::main(worker_threads = 2)]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let parts = || PARTS.into_iter();
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        println!("cargo bench --bench versus --features testing [-- PART…]\n\nParts, all unless named:");
        parts().for_each(|(name, help)| println!("  {name:20} {help}"));
        return;
    }
    let wanted: Vec<&String> = args.iter().filter(|arg| *arg != "--bench").collect();
    if let Some(unknown) = wanted.iter().find(|arg| parts().all(|(name, _)| name != arg.as_str())) {
        eprintln!("unknown part {unknown:?}; -- --help lists the parts");
        std::process::exit(2);
    }
    let is_quick = !args.iter().any(|arg| arg == "--bench");
    let world = World::start(Scale { rounds: if is_quick { 1 } else { 5 }, is_quick });
    let mut missed = 0;
    for (name, _) in parts().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|arg| arg == name)) {
        eprintln!("{name} …");
        world.share_cores(WITHOUT_STACK.contains(&name));
        missed += run(name, &world).await.iter().map(|table| table.print(!is_quick)).sum::<usize>();
    }
    if is_quick {
        println!("Quick run: the figures have no meaning.");
    } else {
        println!("{missed} goals were missed.");
    }
}

async fn run(part: &str, world: &World) -> Vec<Table> {
    match part {
        "hits" => vec![hits::of_10_000(world).await],
        "choices" => vec![choices::gets(world.scale), choices::newcomers(world.scale)],
        "hits-by-threads" => hits::by_threads(world.scale).await,
        "outage-hits" => vec![outage::hits(world).await],
        "puts" => vec![writes::by_256_tasks(world).await],
        "put-cpu" => vec![writes::cpu_time(world).await],
        "put-latency" => vec![writes::at_equal_rate(world).await],
        "lone-put" => vec![writes::alone(world).await],
        "cold-gets" => vec![reads::cold(world).await],
        "one-key" => vec![reads::one_key(world).await],
        "queued-puts" => vec![outage::queued_puts(world).await],
        "cold-gets-in-outage" => vec![outage::cold_gets(world).await],
        "replay" => outage::replay(world).await,
        "warm-up" => vec![reads::warmup(world).await],
        "appends" => vec![appends::to_a_long_conversation(world).await, appends::by_8_daemons(world).await],
        "large" => vec![large::puts_and_gets(world).await],
        _ => unreachable!("only known parts are run"),
    }
}
