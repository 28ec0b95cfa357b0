//! What can be asked for, and what `--help` says about it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

const AFTER: &str = "\
Settings come from the environment and from the file .env in the current directory, as a daemon's do; see .env.example.

Exit codes:
  0  it was done
  1  it failed, or was done in part; standard error says why
  2  the arguments are wrong, or what they give cannot be stored
  3  a file is in use by another process, such as a daemon: ask that one, or stop it first
  4  there is no such thread (get)";

/// Looks after conversations, and after the queue that keeps writes while Supabase is away.
#[derive(Debug, Parser)]
#[command(name = "threadkeep", version, after_help = AFTER, arg_required_else_help = true)]
pub struct Arguments {
    /// Prints JSON and nothing else: one value, or for lists one value a line
    #[arg(long, global = true)]
    pub json: bool,
    /// Says on standard error what is being done
    #[arg(long, short, global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Command,
}

const BESIDE: &str = "\
With the backend `supabase` this works beside a running daemon: it asks the database itself and opens no queue. So it does \
not see what still waits in a daemon's queue, and in an outage it fails. With the backend `local` the daemon must be \
stopped, since it holds the file (exit code 3): ask the daemon instead.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Prints a conversation
    #[command(after_help = BESIDE)]
    Get(Get),
    /// Stores a conversation, whatever was there before
    #[command(after_help = BESIDE)]
    Put(Put),
    /// Deletes a conversation; there need not be one
    #[command(after_help = BESIDE)]
    Remove(Remove),
    /// Lists a user's conversations, newest first
    #[command(after_help = BESIDE)]
    List(List),
    /// Looks after the queue's file, which keeps writes while Supabase is away
    #[command(after_help = "\
A daemon holds the file as long as it runs: stop it first (else: exit code 3), or ask the daemon how its queue is doing, by \
its health and its metrics.")]
    Queue(Queue),
    /// Looks at everything that a daemon needs, and says what is wrong and what to do
    #[command(after_help = "\
Looked at are the settings (every problem), the way to Supabase (DNS, TCP, TLS), the key, the migrations, the grants, the clocks, \
the round trip, a thread of its own that is written, read and removed again, and the local file with its disk. Each line says \
ok, warning, failure, or skipped (and why). Nothing else is altered: files are read at most, also those that a daemon holds.

Run it where the daemon runs, as its user and with its settings.

Exit codes: 0 nothing failed (there may be warnings), 1 something failed, 2 the arguments are wrong. With --json it prints one \
object: {\"ok\", \"findings\": [{\"check\", \"verdict\", \"what\", \"remedy\"}]}.")]
    Doctor(Doctor),
    /// Writes the SQL files that the database needs to a folder, or to standard output
    #[command(after_help = "\
With the Supabase CLI, in the folder that has supabase/:

  threadkeep migrations --dir supabase/migrations
  supabase db push --include-all

`supabase db push` reads supabase/migrations and no other folder. Without --include-all it refuses files that are older than the \
newest applied one. Without the Supabase CLI:

  threadkeep migrations | psql -v ON_ERROR_STOP=1 \"$DATABASE_URL\"

The files remove the rights of the anon key. A program that uses the table with that key needs the secret key first.

The files can be applied again. A file in the folder that differs is replaced with --overwrite only: otherwise nothing is \
written, and the exit code is 1.")]
    Migrations(Migrations),
}

#[derive(Debug, Args)]
pub struct Migrations {
    /// Where to, such as supabase/migrations; created if it does not exist
    #[arg(long, value_name = "FOLDER")]
    pub dir: Option<PathBuf>,
    /// Replaces files that differ
    #[arg(long, requires = "dir")]
    pub overwrite: bool,
}

#[derive(Debug, Args)]
pub struct Doctor {
    /// The project's anon (publishable) key, which is public: looks whether whoever has it is kept out
    #[arg(long, value_name = "KEY")]
    pub anon_key: Option<String>,
}

#[derive(Debug, Args)]
pub struct Get {
    /// The thread's id
    pub key: String,
}

#[derive(Debug, Args)]
pub struct Put {
    /// The thread's id
    pub key: String,
    /// The conversation as JSON; `-` reads it from standard input
    #[arg(default_value = "-")]
    pub value: String,
    /// How long it lives, such as 90s, 30m, 24h or 7d; unless set, CONVERSATION_TIMEOUT_HOURS
    #[arg(long, value_parser = span)]
    pub ttl: Option<Duration>,
    /// Whose conversation it is
    #[arg(long)]
    pub user: Option<String>,
    /// What else is to be kept with it, as JSON
    #[arg(long, value_name = "JSON")]
    pub metadata: Option<String>,
}

#[derive(Debug, Args)]
pub struct Remove {
    /// The thread's id
    pub key: String,
}

#[derive(Debug, Args)]
pub struct List {
    /// Whose conversations
    pub user: String,
    /// At most so many
    #[arg(long, default_value_t = 100)]
    pub limit: usize,
}

#[derive(Debug, Args)]
pub struct Queue {
    /// The queue's file; unless set, CONVERSATION_QUEUE_PATH
    #[arg(long, global = true, value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(subcommand)]
    pub command: QueueCommand,
}

#[derive(Debug, Subcommand)]
pub enum QueueCommand {
    /// Says what the file holds: queued writes, dead letters, copies, and whose they are
    Status,
    /// Lists the queued writes in the order in which they were queued
    List,
    /// Writes queued writes and dead letters as lines of JSON, with all that `import` needs
    Export(Export),
    /// Takes in what was exported, or what can still be read of a damaged file
    #[command(after_help = "\
The file is either an export (lines of JSON) or a queue's file, such as one that was set aside as QUEUE.damaged-1: of that, \
all that can still be read is taken, and the file itself is left as it is. Versions are kept, so that the same can be imported \
again, and what is newer in the queue stays. A line that is wrong is reported with its number, and the rest is taken: the \
exit code is 1 then, as where something of a damaged file could not be read. Standard input is always read as an export.

What is imported is not held to CONVERSATION_QUEUE_BYTES. A daemon whose queue is beyond it takes no more writes in an outage, \
until some have been replayed.")]
    Import(Import),
    /// Brings what another file holds to Supabase: another queue's writes, or the conversations of the backend `local`
    #[command(
        name = "move",
        after_help = "\
What FILE holds goes into the queue of the Supabase project that is set; the next start of a daemon, or `queue replay`, brings \
it there. Once all is synced to disk, FILE is renamed to FILE.moved; it is not changed otherwise. If this is interrupted, run \
it again: nothing is lost or doubled.

Versions and expiries are kept, so that what is newer in Supabase stays. The database takes nothing older than 7 days: a \
conversation that was last written more than 6 days ago is stored as of now, unless the database holds something that was \
written after it; that stays then, and the conversation becomes a dead letter. Queued writes of another queue that are too \
old become dead letters, too: see `queue dead --requeue`.

What is moved is not held to CONVERSATION_QUEUE_BYTES."
    )]
    Move(Move),
    /// Sends what is queued to Supabase, and waits until the queue is empty
    #[command(after_help = "\
Writes that Supabase turns out not to take become dead letters. If there are such, or something is left, the exit code is 1, and \
standard error says how many, and why.")]
    Replay(Replay),
    /// Lists dead letters: queued writes that Supabase turned out not to take; exports, forgets or requeues them
    #[command(after_help = "\
A dead letter that is requeued is a write of this moment: it then wins over whatever is stored, and lives for as long as it was \
to live. Where a newer write of the thread waits in the queue, the letter is left as it is. Of several letters of one thread, \
the newest is requeued.")]
    Dead(Dead),
}

#[derive(Debug, Args)]
pub struct Export {
    /// Where to; it must not exist. `-` is standard output
    #[arg(default_value = "-")]
    pub to: PathBuf,
}

#[derive(Debug, Args)]
pub struct Import {
    /// An export, or a queue's file; `-` reads an export from standard input
    pub from: PathBuf,
    /// Takes also what was queued for another Supabase project
    #[arg(long)]
    pub any_origin: bool,
}

#[derive(Debug, Args)]
pub struct Move {
    /// The file to bring over
    #[arg(value_name = "FILE")]
    pub from: PathBuf,
}

#[derive(Debug, Args)]
pub struct Replay {
    /// Gives up when nothing has moved for so long, such as 90s or 30m
    #[arg(long, value_parser = span, default_value = "60s")]
    pub timeout: Duration,
}

#[derive(Debug, Args)]
pub struct Dead {
    /// Writes them as lines of JSON to a file, which must not exist; `-` is standard output
    #[arg(long, value_name = "FILE")]
    pub export: Option<PathBuf>,
    /// Forgets them, once they are exported to a file
    #[arg(long, requires = "export", conflicts_with_all = ["requeue", "all"])]
    pub forget: bool,
    /// Queues the newest one of this thread again
    #[arg(long, value_name = "KEY")]
    pub requeue: Option<String>,
    /// Queues the newest one of each thread again
    #[arg(long, conflicts_with = "requeue")]
    pub all: bool,
}

/// A span of time with its unit.
fn span(text: &str) -> Result<Duration, String> {
    let (digits, unit) =
        text.split_at(text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len()));
    let unit = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return Err("use a number with a unit, such as 90s, 30m, 24h or 7d".into()),
    };
    let seconds = digits.parse::<f64>().map_err(|e| e.to_string())? * unit;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }

    #[test]
    fn spans_need_their_unit() {
        for (text, millis) in [("90s", 90_000), ("1.5h", 5_400_000), ("7d", 604_800_000), ("20ms", 20)] {
            assert_eq!(span(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for bad in ["", "90", "s", "-1s", "1w", "1.2.3s", "99999999999999999999999d"] {
            assert!(span(bad).is_err(), "{bad}");
        }
    }
}
