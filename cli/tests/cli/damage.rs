//! Recovery of a corrupt outage file, as OPERATIONS.md describes it: `sqlite3 FILE .recover`, then `threadkeep queue import`.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::process::{Cli, cut_off, fill};

const COUNT: usize = 400;
const PAGE: u64 = 4096;

/// Creates a quarantined outage file with 402 queued writes, and corrupts it.
async fn corrupted(cli: &Cli, corrupt: impl FnOnce(&Path)) -> String {
    corrupted_as(cli, "q.db.corrupt-1", COUNT, corrupt).await
}

async fn corrupted_as(cli: &Cli, name: &str, count: usize, corrupt: impl FnOnce(&Path)) -> String {
    let path = cli.path(name);
    fill(&path, count).await;
    fs::remove_file(cli.path(&format!("{name}.lock"))).unwrap();
    let file = rusqlite::Connection::open(&path).unwrap();
    file.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(())).unwrap();
    drop(file);
    corrupt(&path);
    path.to_str().unwrap().to_owned()
}

fn overwrite(path: &Path, pages: std::ops::Range<u64>, byte: u8) {
    overwrite_with(path, pages.start, &vec![byte; ((pages.end - pages.start) * PAGE) as usize]);
}

fn overwrite_with(path: &Path, page: u64, bytes: &[u8]) {
    let mut file = fs::File::options().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(page * PAGE)).unwrap();
    file.write_all(bytes).unwrap();
}

fn pages(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len() / PAGE
}

/// Runs `sqlite3 FILE .recover | sqlite3 recovered.db`, and returns the path of the new file.
fn recover(cli: &Cli, file: &str) -> String {
    let recovered = cli.path("recovered.db");
    let sqlite = || {
        let mut command = Command::new(crate::stack::sqlite());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let sql = sqlite().args([file, ".recover"]).output().unwrap();
    let mut build = sqlite().arg(&recovered).stdin(Stdio::piped()).spawn().unwrap();
    build.stdin.take().unwrap().write_all(&sql.stdout).unwrap();
    let built = build.wait_with_output().unwrap();
    println!("{} {}", String::from_utf8_lossy(&sql.stderr), String::from_utf8_lossy(&built.stderr));
    recovered.to_str().unwrap().to_owned()
}

/// Counts the queued writes. Each of them must be one of those that were written.
async fn queued(cli: &Cli) -> usize {
    let lines = cli.ok(&["queue", "export"]).await.lines();
    for line in &lines {
        match line["key"].as_str().unwrap() {
            "removed" => assert!(line.get("value").is_none(), "{line}"),
            "nothing" => assert_eq!(line["value"], Value::Null, "{line}"),
            // The queue holds the put and the update after it.
            "t0" => {
                let is_update = line["value"].as_str().unwrap().ends_with(" updated");
                assert_eq!(is_update, line.get("if_version").is_some(), "{line}");
            }
            key => {
                let value = format!("{} {}", &key[1..], "x".repeat(1_000));
                assert_eq!((line["value"].as_str(), &line["user"]), (Some(&*value), &Value::from("u1")));
            }
        }
    }
    lines.len()
}

async fn import(cli: &Cli, file: &str) -> (i32, Value) {
    let ended = cli.run(&["queue", "import", file, "--allow-other-project", "--json"]).await;
    assert!(ended.code <= 1, "{ended:?}");
    (ended.code, ended.json())
}

#[tokio::test]
async fn import_intact_outage_file_takes_all() {
    let cli = Cli::of_project();
    let file = corrupted(&cli, |_| {}).await;
    let before = fs::read(&file).unwrap();
    let (code, report) = import(&cli, &file).await;
    assert_eq!((code, &report["queued"], &report["unreadable"]), (0, &(COUNT + 3).into(), &0.into()));
    assert_eq!(queued(&cli).await, COUNT + 3);
    assert!(fs::read(&file).unwrap() == before, "the import only reads the file");
}

#[tokio::test]
async fn recovered_file_lost_pages_cost_their_rows() {
    for byte in [0, 0xff] {
        let cli = Cli::of_project();
        let file = corrupted(&cli, |path| overwrite(path, pages(path) / 2..pages(path) / 2 + 5, byte)).await;
        let (_, report) = import(&cli, &recover(&cli, &file)).await;
        let left = queued(&cli).await;
        assert_eq!(report["queued"].as_u64(), Some(left as u64), "{report}");
        assert!((COUNT - 40..COUNT + 3).contains(&left), "{left} of {} are left", COUNT + 3);
    }
}

#[tokio::test]
async fn recovered_file_first_page_of_another_costs_nothing() {
    let cli = Cli::of_project();
    let file = corrupted(&cli, |path| overwrite(path, 0..1, 0)).await;
    let report = cli.run(&["queue", "import", &recover(&cli, &file)]).await;
    assert!(report.code == 1 && report.err.contains("no file of threadkeep"), "{report:?}");
    fs::write(cli.path("recovered.db"), "").unwrap();
    let empty = cli.run(&["queue", "import", cli.path("recovered.db").to_str().unwrap()]).await;
    assert!(empty.code == 1 && empty.err.contains("the recovery failed"), "{empty:?}");
    fs::remove_file(cli.path("recovered.db")).unwrap();

    let other = corrupted_as(&cli, "other.db", 1, |_| {}).await;
    overwrite_with(Path::new(&file), 0, &fs::read(other).unwrap()[..PAGE as usize]);
    let (code, report) = import(&cli, &recover(&cli, &file)).await;
    assert_eq!((code, &report["queued"]), (0, &(COUNT + 3).into()), "{report}");
    assert_eq!(queued(&cli).await, COUNT + 3);
}

#[tokio::test]
async fn recovered_local_file_replaces_the_corrupt_one() {
    const COUNT: usize = 10;
    let cli = Cli::new(&[]);
    let value = format!("[\"{}\"]", "x".repeat(3_000));
    for at in 0..COUNT {
        assert_eq!(cli.run_with_input(&["put", &format!("k{at}")], &value).await.code, 0);
    }
    let path = cli.path("threadkeep.db");
    overwrite(&path, 6..7, 0);
    fs::rename(recover(&cli, path.to_str().unwrap()), &path).unwrap();
    let mut found = 0;
    for at in 0..COUNT {
        let ended = cli.run(&["get", &format!("k{at}")]).await;
        assert!(ended.code == 4 || ended.code == 0 && ended.out.trim() == value, "{ended:?}");
        found += usize::from(ended.code == 0);
    }
    assert!(found >= COUNT - 2, "{found} of {COUNT} are left");
}

#[tokio::test]
async fn import_other_file_is_rejected() {
    let cli = Cli::of_project();
    fs::write(cli.path("picture"), vec![7; 100_000]).unwrap();
    assert_eq!(cli.run(&["queue", "import", "picture"]).await.code, 1);
    let local = Cli::new(&[]);
    local.ok(&["put", "k", "1"]).await;
    let conversations = local.path("threadkeep.db");
    let ended = cli.run(&["queue", "import", conversations.to_str().unwrap()]).await;
    assert!(ended.code == 1 && ended.err.contains("queue migrate"), "{ended:?}");
    assert_eq!(cli.run(&["queue", "import", "no such file"]).await.code, 1);
    let daemon = cut_off(&cli.path("held.db")).await;
    assert_eq!(cli.run(&["queue", "import", "held.db"]).await.code, 3);
    drop(daemon);
}

#[tokio::test]
async fn corrupt_file_error_names_the_recovery() {
    for pages in [0..1, 1..40] {
        let cli = Cli::of_project();
        let file = corrupted(&cli, |path| overwrite(path, pages, 0x5a)).await;
        for command in [&["queue", "status", "--file", &file][..], &["queue", "import", &file]] {
            let ended = cli.run(command).await;
            assert!(ended.code == 1 && ended.err.contains(".recover"), "{ended:?}");
        }
    }
}
