//! Processes stop, start, and end with the test.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::stack::{Server, Stack};
use crate::{answer, said, say, teach};

#[tokio::test]
async fn processes_restart_on_the_same_ports() {
    for server in Server::installed() {
        let stack = Stack::start(server);
        teach(&stack);
        let gateway = stack.gateway().await;

        stack.stop_postgres();
        let (status, body) = answer(say(&gateway, "away")).await;
        assert!(is_outage(server, status, &body), "{server:?}: {status} {body}");
        stack.start_postgres();
        assert_eq!(answer(say(&gateway, "back")).await.0, 200, "{server:?}");
        assert!(said(&stack, "back"), "{server:?}");

        stack.kill_server();
        assert_eq!(answer(say(&gateway, "away")).await.0, 521, "{server:?}");
        stack.start_server();
        // Two concurrent requests, because a server that initialises at its first request could fail the second.
        let ((first, _), (second, _)) =
            tokio::join!(answer(say(&gateway, "back")), answer(say(&gateway, "b")));
        assert_eq!((first, second), (200, 200), "{server:?}");
        let rows =
            stack.sql().await.query("select from stack_echoes where said = 'back'", &[]).await.unwrap();
        assert_eq!(rows.len(), 2, "{server:?}");

        stack.apply_migrations();
        let directories = stack.directories().map(Path::to_owned);
        drop(stack);
        assert!(
            directories.iter().all(|directory| !directory.exists() && inhabitants(directory) == 0),
            "{server:?}"
        );
    }
}

#[tokio::test]
async fn crash_during_a_request_is_an_outage() {
    for server in Server::installed() {
        let stack = Stack::start(server);
        teach(&stack);
        let (gateway, lock) = (stack.gateway().await, stack.sql().await);
        lock.batch_execute("begin; lock table stack_echoes").await.unwrap();
        let crash = async {
            gateway.wait_for(1, "stack_echo").await;
            while stack.psql("select pid from pg_locks where not granted").is_empty() {
                tokio::task::yield_now().await; // the request must reach PostgreSQL first
            }
            stack.stop_postgres();
        };
        let ((status, body), ()) = tokio::join!(answer(say(&gateway, "under a crash")), crash);
        assert!(is_outage(server, status, &body), "{server:?}: {status} {body}");
        stack.start_postgres();
        assert!(!said(&stack, "under a crash"), "{server:?}");
        assert_eq!(answer(say(&gateway, "afterwards")).await.0, 200, "{server:?}");
    }
}

/// Tells whether an answer reports that PostgreSQL is down, before or during the request.
fn is_outage(server: Server, status: u16, body: &str) -> bool {
    let has = |code: &str| body.contains(&format!(r#""code":"{code}""#));
    match server {
        Server::Postrust => status == 520 || status == 503 && has("PGRST001"),
        // Lite may have exited.
        Server::Lite => matches!(status, 520 | 521) || status == 503 && has("PGRST001"),
        // The first answer on each connection that died is 400 with an empty code.
        Server::Postgrest if status == 400 => has(""),
        Server::Postgrest => {
            status == 503 && ["PGRST000", "PGRST001", "PGRST002", "57P01"].into_iter().any(has)
        }
    }
}

#[test]
fn killed_test_leaves_no_process() {
    let test = std::env::current_exe().unwrap();
    let mut child = Command::new(test)
        .args(["--exact", "processes::hold_stacks_until_killed", "--ignored", "--nocapture"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let held = lines.filter_map(|line| line.split_once("holds ").map(|(_, path)| Path::new(path).to_owned()));
    let count = 2 * Server::installed().count();
    let held: Vec<_> = held.take(count).collect();
    assert!(held.len() == count && held.iter().all(|directory| inhabitants(directory) > 1), "{held:?}");
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while held.iter().any(|directory| directory.exists() || inhabitants(directory) > 0) {
        assert!(Instant::now() < deadline, "a process or a directory is left in {held:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
#[ignore = "runs as a separate process of killed_test_leaves_no_process"]
fn hold_stacks_until_killed() {
    for server in Server::installed() {
        for directory in Stack::shared(server).directories() {
            println!("holds {}", directory.display());
        }
    }
    let _ = io::stdin().read(&mut [0]);
}

/// Counts the processes that run in this directory or below.
fn inhabitants(directory: &Path) -> usize {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let places = processes.filter_map(|process| std::fs::read_link(process.path().join("cwd")).ok());
    places.filter(|place| place.starts_with(directory)).count()
}
