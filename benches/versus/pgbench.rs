//! Measures SQL without REST, by PostgreSQL's own benchmark tool.

use std::process::Command;
use std::time::Duration;

use crate::work::Conversation;
use crate::world::World;

/// Runs prepared upserts of single rows by 16 clients into the same table. Returns the rate per second.
pub fn upserts(world: &World, threads: usize, value: &Conversation, span: Duration) -> f64 {
    let json = serde_json::to_string(value).unwrap();
    let script = format!(
        "\\set at random(0, {})\n\
         insert into public.conversation_threads (thread_id, conversation_data, expires_at) \
         values ('thread-' || lpad(:at::text, 8, '0'), '{json}', now() + interval '1 day') \
         on conflict (thread_id) do update \
         set conversation_data = excluded.conversation_data, expires_at = excluded.expires_at;\n",
        threads - 1
    );
    let file = world.file().with_extension("sql");
    std::fs::write(&file, script).unwrap();
    let seconds = span.as_secs().max(1).to_string();
    let mut pgbench = Command::new(world.stack.program("pgbench"));
    pgbench.args(["-n", "-M", "prepared", "-c", "16", "-j", "2", "-T", &seconds, "-f"]).arg(&file);
    let output = tokio::task::block_in_place(|| pgbench.arg(world.stack.database_url()).output().unwrap());
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let rate = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    rate.unwrap_or_else(|| panic!("pgbench printed no rate:\n{text}"))
}
