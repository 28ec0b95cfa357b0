//! threadkeep beside what people would pick instead, in one run, on one stack and one table:
//! `cargo bench --bench versus --features testing`. `-- --help` lists the parts; `-- puts hits` runs only those.
//!
//! PostgreSQL and postrust run on this machine (`tests/install` gets them), on one half of its cores; what competes has the
//! other half, as the database is another machine in reality, or all where that has nothing to do. Commits are synced. All ways
//! take turns, round by round, and a ratio is the median of the ratios within the rounds. Without `--bench`, as
//! `cargo test --benches` calls it, each part runs once and small: that shows that it runs, and nothing about speed.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs)]

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

const PARTS: [(&str, &str); 14] = [
    ("hits", "gets from memory beside raw moka and tower-sessions"),
    ("choices", "the hasher, the eviction policy and the expiry of the near cache, beside others"),
    ("hits-by-threads", "the same for 1,000 to 1,000,000 threads"),
    ("outage-hits", "stale and queued gets beside fresh ones"),
    ("puts", "256 tasks, beside prebuilt batches, one POST each, and pgbench"),
    ("put-latency", "1,000 puts a second, beside one POST each"),
    ("lone-put", "one task, beside one POST of the same function"),
    ("cold-gets", "10,000 keys, 256 tasks, beside prebuilt batches and one GET each"),
    ("one-key", "1,000 tasks that want the same thread"),
    ("queued-puts", "with the breaker open, beside one synced commit each"),
    ("cold-gets-in-outage", "from the local file, beside point reads of it"),
    ("replay", "100,000 queued records, and the live puts meanwhile"),
    ("warm-up", "100,000 threads, beside fetching the same pages"),
    ("large", "threads of 400 KB, beside one POST and one GET"),
];

/// Those in which the stack has nothing to do while they are measured.
const BY_ITSELF: [&str; 6] =
    ["hits", "choices", "hits-by-threads", "outage-hits", "queued-puts", "cold-gets-in-outage"];

#[tokio::main(worker_threads = 2)]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let parts = || PARTS.into_iter();
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        println!("cargo bench --bench versus --features testing [-- PART…]\n\nParts, all unless named:");
        parts().for_each(|(name, what)| println!("  {name:20} {what}"));
        return;
    }
    let wanted: Vec<&String> = args.iter().filter(|arg| *arg != "--bench").collect();
    if let Some(unknown) = wanted.iter().find(|arg| parts().all(|(name, _)| name != arg.as_str())) {
        eprintln!("there is no part {unknown:?}: see -- --help");
        std::process::exit(2);
    }
    let is_quick = !args.iter().any(|arg| arg == "--bench");
    let world = World::start(Scale { rounds: if is_quick { 1 } else { 5 }, is_quick });
    let mut missed = 0;
    for (name, _) in parts().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|arg| arg == name)) {
        eprintln!("{name} …");
        world.share_cores(BY_ITSELF.contains(&name));
        missed += run(name, &world).await.iter().map(|table| table.print(!is_quick)).sum::<usize>();
    }
    if is_quick {
        println!("A quick run: it shows that all parts run, and nothing about speed.");
    } else {
        println!("{missed} figures were missed.");
    }
}

async fn run(part: &str, world: &World) -> Vec<Table> {
    match part {
        "hits" => vec![hits::ten_thousand(world).await],
        "choices" => vec![choices::gets(world.scale), choices::newcomers(world.scale)],
        "hits-by-threads" => hits::by_threads(world.scale).await,
        "outage-hits" => vec![outage::hits(world).await],
        "puts" => vec![writes::by_many(world).await],
        "put-latency" => vec![writes::at_equal_load(world).await],
        "lone-put" => vec![writes::alone(world).await],
        "cold-gets" => vec![reads::cold(world).await],
        "one-key" => vec![reads::one_key(world).await],
        "queued-puts" => vec![outage::queued_puts(world).await],
        "cold-gets-in-outage" => vec![outage::cold_gets(world).await],
        "replay" => outage::replay(world).await,
        "warm-up" => vec![reads::warm_up(world).await],
        "large" => vec![large::puts_and_gets(world).await],
        _ => unreachable!("only known parts are run"),
    }
}
