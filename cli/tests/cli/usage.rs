//! Arguments, exit codes, pipes, and the backend `local`.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::Stdio;

use serde_json::json;

use crate::process::{Cli, Ended, cut_off, fill};

#[tokio::test]
async fn help_describes_every_command() {
    let cli = Cli::new(&[]);
    for (command, words) in [
        ("", ["conversations", "Exit codes"]),
        ("get", ["Prints a conversation", "--json"]),
        ("put", ["Stores a conversation", "--ttl"]),
        ("append", ["Adds items to a conversation", "--only-if-present"]),
        ("remove", ["Deletes a conversation", "beside a running daemon"]),
        ("list", ["user's conversations", "--limit"]),
        ("doctor", ["names each problem with its remedy", "--anon-key"]),
        ("migrations", ["supabase db push --include-all", "secret key first"]),
        ("queue", ["while Supabase is down", "its metrics"]),
        ("queue status", ["Counts the queued writes", "--file"]),
        ("queue list", ["in queue order", "--file"]),
        ("queue export", ["lines of JSON", "must not exist"]),
        ("queue import", ["corrupt file", "--allow-other-project"]),
        ("queue migrate", ["FILE.moved", "7 days"]),
        ("queue replay", ["waits until the queue is empty", "--timeout"]),
        ("queue dead-letters", ["that Supabase did not take", "--requeue"]),
    ] {
        let arguments: Vec<&str> = command.split_whitespace().chain(["--help"]).collect();
        let help = cli.ok(&arguments).await.out;
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for word in words {
            assert!(help.contains(word), "{command} --help does not mention {word}: {help}");
        }
    }
}

#[tokio::test]
async fn exit_codes_tell_arguments_from_failures() {
    let cli = Cli::new(&[]);
    for arguments in [
        &[][..],
        &["nonsense"],
        &["get"],
        &["put", "k", "1", "--ttl", "soon"],
        &["migrations", "--overwrite"],
        &["queue", "dead-letters", "--delete"],
        &["queue", "dead-letters", "--all", "--requeue", "k"],
    ] {
        assert_eq!(cli.run(arguments).await.code, 2, "{arguments:?}");
    }
    for (arguments, word) in [
        (&["put", "k", "hello"][..], "as JSON"),
        (&["put", "k", "1", "--metadata", "hello"], "as JSON"),
        (&["put", "k", "1", "--ttl", "0s"], "time to live"),
        (&["put", "", "1"], "must not be empty"),
        (&["get", ""], "must not be empty"),
        (&["list", ""], "must not be empty"),
    ] {
        let Ended { code, err, out } = cli.run(arguments).await;
        assert!(code == 2 && err.contains(word) && out.is_empty(), "{arguments:?}: {code} {err}");
    }
    for (arguments, word) in [
        (&["queue", "status"][..], "CONVERSATION_QUEUE_PATH"),
        (&["queue", "migrate", "x"], "CONVERSATION_STORAGE_BACKEND"),
        (&["queue", "replay"], "CONVERSATION_STORAGE_BACKEND"),
    ] {
        let Ended { code, err, out } = cli.run(arguments).await;
        assert!(code == 1 && err.contains(word) && out.is_empty(), "{arguments:?}: {code} {err}");
    }
    let broken = Cli::new(&[("CONVERSATION_STORAGE_BACKEND", "supabase"), ("SUPABASE_URL", "junk")]);
    let ended = broken.run(&["get", "k"]).await;
    assert!(ended.code == 1 && ended.err.contains("SUPABASE_URL") && ended.err.contains("SUPABASE_KEY"));
    let forgetful = Cli::new(&[("CONVERSATION_STORAGE_BACKEND", "memory")]);
    assert!(forgetful.run(&["get", "k"]).await.err.contains("ask the daemon"));
}

#[tokio::test]
async fn local_backend_puts_gets_lists_and_removes() {
    let cli = Cli::new(&[]);
    assert_eq!(cli.run(&["get", "k"]).await.code, 4);
    let options = ["--user", "u1", "--metadata", "{\"a\":1}", "--ttl", "1h"];
    let put = cli.ok(&[&["put", "k", "{\"n\": [1, 2]}"][..], &options].concat()).await;
    assert_eq!(put.out, "stored\n");
    let put = cli.run_with_input(&["put", "from stdin", "--user", "u1", "--json"], "[null,\n\"x\"]\n").await;
    assert_eq!(put.json(), json!({"key": "from stdin", "outcome": "stored"}));
    assert_eq!(cli.ok(&["get", "k"]).await.out, "{\"n\": [1, 2]}\n");
    let found = cli.ok(&["get", "k", "--json"]).await.json();
    assert_eq!((&found["value"], &found["metadata"]), (&json!({"n": [1, 2]}), &json!({"a": 1})));
    assert_eq!((&found["user"], &found["freshness"]), (&json!("u1"), &json!("fresh")));
    assert!(found["version"].as_str().unwrap().parse::<i64>().unwrap() > 0);
    assert!(found["expires_at"].as_str().unwrap().ends_with('Z'));
    let listed = cli.ok(&["list", "u1", "--json"]).await.lines();
    let keys: Vec<&str> = listed.iter().map(|one| one["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["from stdin", "k"]);
    assert_eq!(cli.ok(&["list", "u1", "--limit", "1"]).await.out.lines().count(), 1);
    assert_eq!(cli.ok(&["list", "nobody"]).await.out, "");
    assert_eq!(cli.ok(&["remove", "k"]).await.out, "stored\n");
    assert_eq!(cli.run(&["get", "k"]).await.code, 4);
}

#[tokio::test]
async fn append_creates_extends_or_reports_a_bad_target() {
    let cli = Cli::new(&[]);
    let absent = cli.run(&["append", "k", "[1]", "--only-if-present"]).await;
    assert_eq!((absent.code, absent.out.as_str()), (4, "absent\n"));
    let absent = cli.run(&["--json", "append", "k", "[1]", "--only-if-present"]).await;
    assert_eq!((absent.code, absent.json()), (4, json!({"key": "k", "outcome": "absent"})));
    assert!(absent.err.contains("there is no conversation k"), "{absent:?}");
    assert_eq!(cli.ok(&["append", "k", "[1, 2]", "--at", "m"]).await.out, "stored, 2 in the array now\n");
    let again = cli.run_with_input(&["append", "k", "--at", "m", "--json"], "[3]\n").await;
    assert_eq!(again.json(), json!({"key": "k", "outcome": "stored", "length": 3}));
    assert_eq!(cli.ok(&["get", "k", "--json"]).await.json()["value"], json!({"m": [1, 2, 3]}));
    for (arguments, words) in [
        (&["append", "k", "[1]"][..], "the conversation is not an array"),
        (&["append", "k", "[1]", "--at", "m", "--at", "x"], "no array at m.x"),
        (&["append", "k", "1", "--at", "m"], "not a JSON array"),
        (&["append", "k", "[]", "--at", "m"], "at least one item"),
    ] {
        let ended = cli.run(arguments).await;
        assert!(matches!(ended.code, 1 | 2) && ended.err.contains(words), "{ended:?}");
    }
}

#[tokio::test]
async fn settings_are_read_from_dotenv() {
    let cli = Cli::new(&[]);
    std::fs::write(cli.path(".env"), "CONVERSATION_LOCAL_PATH=other.db\n").unwrap();
    cli.ok(&["put", "k", "1"]).await;
    assert!(cli.path("other.db").exists() && !cli.path("threadkeep.db").exists());
}

#[tokio::test]
async fn file_in_use_exits_with_3() {
    let cli = Cli::of_project();
    let daemon = cut_off(&cli.queue()).await;
    daemon.put("k", &1).await.unwrap();
    let holder = format!("in use by process {}", std::process::id());
    let commands = [&["queue", "status"][..], &["queue", "list", "--json"], &["queue", "import", "-"]];
    for ended in futures::future::join_all(commands.map(|arguments| cli.run(arguments))).await {
        assert_eq!((ended.code, ended.out.as_str()), (3, ""), "{ended:?}");
        for word in [holder.as_str(), "threadkeep-queue.db", "metrics"] {
            assert!(ended.err.contains(word), "{ended:?}");
        }
    }
    let queue = cli.queue();
    let other = Cli::of_project();
    for verb in ["import", "migrate"] {
        let ended = other.run(&["queue", verb, queue.to_str().unwrap()]).await;
        assert!(ended.code == 3 && ended.err.contains(&holder), "{ended:?}");
    }
    daemon.shutdown(std::time::Duration::ZERO).await.unwrap();
    assert_eq!(cli.ok(&["queue", "status", "--json"]).await.json()["queued"]["records"], 1);

    let local = Cli::new(&[]);
    let daemon = threadkeep::Cache::builder().local(local.path("threadkeep.db")).open().await.unwrap();
    let ended = local.run(&["get", "k"]).await;
    assert!(ended.code == 3 && ended.err.contains(&holder), "{ended:?}");
    drop(daemon);
}

#[tokio::test]
async fn closed_pipe_ends_without_an_error() {
    let cli = Cli::new(&[]);
    fill(&cli.queue(), 300).await;
    for arguments in [&["queue", "list"][..], &["queue", "export"], &["queue", "list", "--json"]] {
        let mut command = cli.command(arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::with_capacity(64, child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let status = child.wait().unwrap();
        assert!(!first.is_empty() && status.success() && !said.contains("panick"), "{status}: {said}");
    }
}
