//! The arguments of the command line and the text of `--help`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

const EXIT_CODES: &str = "\
Settings come from the environment and from the file .env in the current directory, as for a daemon. See .env.example.

Exit codes:
  0  the command succeeded
  1  the command failed, or succeeded in part; standard error has the reason
  2  the arguments are wrong, or the store cannot keep such a value
  3  another process, such as a daemon, uses the file; ask that process, or stop it first
  4  the conversation does not exist (get, append --only-if-present)";

/// Manages conversations, and the queue that keeps writes while Supabase is down.
#[derive(Debug, Parser)]
#[command(name = "threadkeep", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Arguments {
    /// Prints JSON and nothing else: one value, or one value a line for lists
    #[arg(long, global = true)]
    pub json: bool,
    /// Reports each step on standard error
    #[arg(long, short, global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Command,
}

const BESIDE_DAEMON: &str = "\
With the backend `supabase`, the command works beside a running daemon. It asks the database directly and opens no queue. \
So it does not see the writes in a daemon's queue, and it fails during an outage. With the backend `local`, stop the daemon \
first, because the daemon holds the file (exit code 3). Alternatively, ask the daemon.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Prints a conversation
    #[command(after_help = BESIDE_DAEMON)]
    Get(Get),
    /// Stores a conversation and replaces the previous value, if any
    #[command(after_help = BESIDE_DAEMON)]
    Put(Put),
    /// Adds items to a conversation, and creates it if there is none
    #[command(after_help = BESIDE_DAEMON)]
    Append(Append),
    /// Deletes a conversation; succeeds if there is none
    #[command(after_help = BESIDE_DAEMON)]
    Remove(Remove),
    /// Lists a user's conversations, newest first
    #[command(after_help = BESIDE_DAEMON)]
    List(List),
    /// Manages the outage file, which keeps writes while Supabase is down
    #[command(after_help = "\
A running daemon holds the file. Stop the daemon first (otherwise exit code 3), or read the daemon's health and its metrics.")]
    Queue(Queue),
    /// Checks everything that a daemon needs, and names each problem with its remedy
    #[command(after_help = "\
The doctor checks the settings, the connection to Supabase (DNS, TCP, TLS), the key, the migrations, the grants, the clocks and \
the round trip. It writes, reads and removes a conversation of its own. It also checks the local file and its disk. Each line \
says ok, warning, failure, or skipped with the reason. The doctor changes nothing else: it only reads files, including a file \
that a daemon holds.

Run the doctor on the daemon's machine, as the daemon's user and with its settings.

Exit codes: 0 no check failed (there may be warnings), 1 a check failed, 2 the arguments are wrong. With --json the doctor prints \
one object: {\"ok\", \"findings\": [{\"check\", \"verdict\", \"message\", \"remedy\"}]}.")]
    Doctor(DoctorArguments),
    /// Writes the SQL files that the database needs to a folder, or to standard output
    #[command(after_help = "\
With the Supabase CLI, in the folder that has supabase/:

  threadkeep migrations --dir supabase/migrations
  supabase db push --include-all

`supabase db push` reads only the folder supabase/migrations. Without --include-all it refuses files that are older than the \
newest applied file. Without the Supabase CLI:

  threadkeep migrations | psql -v ON_ERROR_STOP=1 \"$DATABASE_URL\"

The files revoke the rights of the anon key. A program that uses the table with the anon key needs the secret key first.

The files can be applied again. If a file in the folder differs, the command replaces it only with --overwrite. Otherwise the \
command writes nothing, and the exit code is 1.")]
    Migrations(Migrations),
}

#[derive(Debug, Args)]
pub struct Migrations {
    /// The folder, such as supabase/migrations; created if it does not exist
    #[arg(long, value_name = "FOLDER")]
    pub dir: Option<PathBuf>,
    /// Replaces files that differ
    #[arg(long, requires = "dir")]
    pub overwrite: bool,
    /// The optional file that splits the table into hash partitions, instead of the files that the database needs
    #[arg(long)]
    pub partitions: bool,
}

#[derive(Debug, Args)]
pub struct DoctorArguments {
    /// The project's anon (publishable) key, which is public; the doctor checks that this key gives no access
    #[arg(long, value_name = "KEY")]
    pub anon_key: Option<String>,
}

#[derive(Debug, Args)]
pub struct Get {
    /// The thread id
    pub key: String,
}

#[derive(Debug, Args)]
pub struct Put {
    /// The thread id
    pub key: String,
    /// The conversation as JSON; `-` reads it from standard input
    #[arg(default_value = "-")]
    pub value: String,
    /// The time to live, such as 90s, 30m, 24h or 7d; default: CONVERSATION_TIMEOUT_HOURS
    #[arg(long, value_parser = parse_duration)]
    pub ttl: Option<Duration>,
    /// The user of the conversation
    #[arg(long)]
    pub user: Option<String>,
    /// More data to store with the conversation, as JSON
    #[arg(long, value_name = "JSON")]
    pub metadata: Option<String>,
}

#[derive(Debug, Args)]
pub struct Append {
    /// The thread id
    pub key: String,
    /// The items as a JSON array; `-` reads it from standard input
    #[arg(default_value = "-")]
    pub items: String,
    /// The member that is the array; give it several times for a member of a member
    #[arg(long, value_name = "NAME")]
    pub at: Vec<String>,
    /// Does not create a conversation; exit code 4 if there is none
    #[arg(long)]
    pub only_if_present: bool,
    /// The time to live, such as 90s, 30m, 24h or 7d; default: CONVERSATION_TIMEOUT_HOURS
    #[arg(long, value_parser = parse_duration)]
    pub ttl: Option<Duration>,
    /// The user of a conversation that the command creates
    #[arg(long)]
    pub user: Option<String>,
    /// More data to store with a conversation that the command creates, as JSON
    #[arg(long, value_name = "JSON")]
    pub metadata: Option<String>,
}

#[derive(Debug, Args)]
pub struct Remove {
    /// The thread id
    pub key: String,
}

#[derive(Debug, Args)]
pub struct List {
    /// The user of the conversations
    pub user: String,
    /// The maximum number of conversations
    #[arg(long, default_value_t = 100)]
    pub limit: usize,
}

#[derive(Debug, Args)]
pub struct Queue {
    /// The outage file; default: CONVERSATION_QUEUE_PATH
    #[arg(long, global = true, value_name = "FILE")]
    pub file: Option<PathBuf>,
    #[command(subcommand)]
    pub command: QueueCommand,
}

#[derive(Debug, Subcommand)]
pub enum QueueCommand {
    /// Counts the queued writes, dead letters and replica copies in the file, and names its project
    Status,
    /// Lists the queued writes in queue order
    List,
    /// Writes queued writes and dead letters as lines of JSON, with all that `import` needs
    Export(Export),
    /// Imports an export, or the writes of another outage file
    #[command(after_help = "\
FROM is an export (lines of JSON) or an outage file. The import only reads FROM. Recover a corrupt file from a copy first:

  cp QUEUE.corrupt-1 copy.db
  sqlite3 copy.db .recover | sqlite3 recovered.db
  threadkeep queue import recovered.db

The import keeps versions, and newer writes in the queue stay. So the same file can be imported again. The import reports an \
invalid line or row and imports the others; the exit code is then 1. Standard input is always an export.

The import ignores the limit CONVERSATION_QUEUE_MAX_BYTES. If a daemon's queue is above that limit, the daemon accepts no more \
writes during an outage until replay has sent some of them.")]
    Import(Import),
    /// Moves another file to Supabase: the writes of another queue, or the conversations of the backend `local`
    #[command(after_help = "\
The command copies the content of FILE into the queue of the configured Supabase project. The next start of a daemon, or `queue \
replay`, sends the queue to Supabase. After the queue is synced to disk, the command renames FILE to FILE.moved. It changes \
nothing else in FILE. After an interruption, run the command again: no write is lost or duplicated.

The command keeps versions and expiries, so newer data in Supabase stays. The database rejects writes older than 7 days. So a \
conversation last written more than 6 days ago gets the current time. If the database holds a value that was written after \
that conversation, the database keeps its value and the conversation becomes a dead letter. Queued writes of another queue that \
are too old also become dead letters: see `queue dead-letters --requeue`.

The command ignores the limit CONVERSATION_QUEUE_MAX_BYTES.")]
    Migrate(Migrate),
    /// Sends the queued writes to Supabase, and waits until the queue is empty
    #[command(after_help = "\
Writes that Supabase rejects become dead letters. If a write became a dead letter or is still queued, the exit code is 1. \
Standard error then has the count and the reason.")]
    Replay(Replay),
    /// Lists dead letters (queued writes that Supabase did not take); exports, deletes or requeues them
    #[command(after_help = "\
A requeued dead letter is a new write of this moment, and its time to live starts again. A put or a remove replaces the stored \
value. An append adds its items to the stored value once more. If a newer write of the conversation is queued, a put or a remove \
stays a dead letter. If a conversation has several dead letters, the command requeues the newest one. If that one is an append, \
the command also requeues the appends directly before it.")]
    DeadLetters(DeadLetters),
}

#[derive(Debug, Args)]
pub struct Export {
    /// The new file, which must not exist; `-` is standard output
    #[arg(default_value = "-")]
    pub to: PathBuf,
}

#[derive(Debug, Args)]
pub struct Import {
    /// An export or an outage file; `-` reads an export from standard input
    pub from: PathBuf,
    /// Also imports writes that were queued for another Supabase project
    #[arg(long)]
    pub allow_other_project: bool,
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// The file to move
    #[arg(value_name = "FILE")]
    pub from: PathBuf,
}

#[derive(Debug, Args)]
pub struct Replay {
    /// Stops after this time without progress, such as 90s or 30m
    #[arg(long, value_parser = parse_duration, default_value = "60s")]
    pub timeout: Duration,
}

#[derive(Debug, Args)]
pub struct DeadLetters {
    /// Exports them as lines of JSON to a new file; `-` is standard output
    #[arg(long, value_name = "FILE")]
    pub export: Option<PathBuf>,
    /// Deletes them after the export to a file
    #[arg(long, requires = "export", conflicts_with_all = ["requeue", "all"])]
    pub delete: bool,
    /// Requeues the newest dead letter of this conversation
    #[arg(long, value_name = "KEY")]
    pub requeue: Option<String>,
    /// Requeues the newest dead letter of each conversation
    #[arg(long, conflicts_with = "requeue")]
    pub all: bool,
}

/// Parses a duration with its unit.
fn parse_duration(text: &str) -> Result<Duration, String> {
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
    fn arguments_are_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }

    #[test]
    fn duration_without_unit_is_refused() {
        for (text, millis) in [("90s", 90_000), ("1.5h", 5_400_000), ("7d", 604_800_000), ("20ms", 20)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for bad in ["", "90", "s", "-1s", "1w", "1.2.3s", "99999999999999999999999d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
