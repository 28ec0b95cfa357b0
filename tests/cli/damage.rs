//! What can still be read of a damaged file.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::Path;

use serde_json::Value;

use crate::process::{Cli, Ended, cut_off, fill};

const COUNT: usize = 400;
const PAGE: u64 = 4096;

/// A queue's file, all of it in one piece, as one that was set aside.
async fn damaged(cli: &Cli, damage: impl FnOnce(&Path)) -> String {
    let path = cli.path("q.db.damaged-1");
    fill(&path, COUNT).await;
    fs::remove_file(cli.path("q.db.damaged-1.lock")).unwrap();
    let file = rusqlite::Connection::open(&path).unwrap();
    file.query_row("pragma wal_checkpoint(truncate)", [], |_| Ok(())).unwrap();
    drop(file);
    assert!(!cli.path("q.db.damaged-1-wal").exists(), "it is in the file");
    damage(&path);
    path.to_str().unwrap().to_owned()
}

fn overwrite(path: &Path, pages: std::ops::Range<u64>, with: u8) {
    let mut file = fs::File::options().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(pages.start * PAGE)).unwrap();
    file.write_all(&vec![with; ((pages.end - pages.start) * PAGE) as usize]).unwrap();
}

fn pages(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len() / PAGE
}

/// The threads that were imported; each must be what it was.
async fn imported(cli: &Cli) -> BTreeSet<String> {
    let lines = cli.ok(&["queue", "export"]).await.lines();
    for line in &lines {
        let key = line["key"].as_str().unwrap();
        match key {
            "removed" => assert!(line.get("value").is_none(), "{line}"),
            "nothing" => assert_eq!(line["value"], Value::Null, "{line}"),
            "t0" => assert!(line["value"].as_str().unwrap().ends_with(" updated"), "{line}"),
            _ => {
                let value = format!("{} {}", &key[1..], "x".repeat(1_000));
                assert_eq!((line["value"].as_str(), &line["user"]), (Some(&*value), &Value::from("u1")));
            }
        }
    }
    lines.iter().map(|line| line["key"].as_str().unwrap().to_owned()).collect()
}

async fn import(cli: &Cli, file: &str) -> Ended {
    let before = fs::read(file).unwrap();
    let ended = cli.run(&["queue", "import", file, "--any-origin", "--json"]).await;
    assert!(fs::read(file).unwrap() == before, "the damaged file is left as it is");
    let left: Vec<_> = fs::read_dir(cli.path(".")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_str().unwrap().contains("salvage")), "{left:?}");
    ended
}

#[tokio::test]
async fn a_sound_file_is_imported_whole() {
    let cli = Cli::of_project();
    let file = damaged(&cli, |_| {}).await;
    let ended = import(&cli, &file).await;
    assert_eq!((ended.code, &ended.json()["queued"]), (0, &Value::from(COUNT + 2)), "{ended:?}");
    assert_eq!(imported(&cli).await.len(), COUNT + 2);
}

#[tokio::test]
async fn pages_destroyed_in_the_middle_cost_only_what_was_in_them() {
    for with in [0, 0xff] {
        let cli = Cli::of_project();
        let file = damaged(&cli, |path| overwrite(path, pages(path) / 2..pages(path) / 2 + 5, with)).await;
        let ended = import(&cli, &file).await;
        let (report, left) = (ended.json(), imported(&cli).await.len() as u64);
        assert_eq!((ended.code, report["queued"].as_u64()), (1, Some(left)), "{ended:?}");
        let lost = report["lost"].as_u64().unwrap();
        assert_eq!(left + lost, COUNT as u64 + 2, "what is lost is counted: {ended:?}");
        assert!(
            (1..40).contains(&lost) && report["lost_bytes"].as_u64().unwrap() > lost * 1_000,
            "{ended:?}"
        );
        assert!(ended.err.contains("could not be read"), "{ended:?}");
    }
}

#[tokio::test]
async fn damage_anywhere_leaves_most_and_invents_nothing() {
    let cli = Cli::of_project();
    let file = damaged(&cli, |_| {}).await;
    let whole = fs::read(&file).unwrap();
    for at in 1..whole.len() as u64 / PAGE {
        // Every page near the start, where the roots are, and a few of the others.
        if at > 16 && at % 23 != 0 {
            continue;
        }
        let one = Cli::of_project();
        let file = one.path("q.db.damaged-1");
        fs::write(&file, &whole).unwrap();
        overwrite(&file, at..at + 1, 0x5a);
        let ended = import(&one, file.to_str().unwrap()).await;
        let left = if ended.out.is_empty() { 0 } else { imported(&one).await.len() };
        let (report, lacks) = (&ended.err, COUNT + 2 - left);
        println!("page {at}: {lacks} of {} lost", COUNT + 2);
        assert!(lacks == 0 || ended.code == 1, "page {at}: {ended:?}");
        assert!(lacks < 10, "page {at} costs {lacks}: {report}");
    }
}

#[tokio::test]
async fn a_destroyed_header_is_replaced() {
    for with in [0, 0xff, b'x'] {
        let cli = Cli::of_project();
        let file = damaged(&cli, |path| overwrite(path, 0..1, with)).await;
        let ended = import(&cli, &file).await;
        let report = ended.json();
        assert_eq!(report["had_no_header"], true, "{ended:?}");
        assert_eq!(report["queued"], COUNT + 2, "{ended:?}");
        assert_eq!((ended.code, imported(&cli).await.len()), (0, COUNT + 2), "{ended:?}");
        assert!(ended.err.contains("first page was destroyed"), "{ended:?}");
    }
}

#[tokio::test]
async fn writes_in_the_log_of_a_killed_daemon_are_salvaged() {
    let (cli, other) = (Cli::of_project(), Cli::new(&[]));
    let daemon = cut_off(&other.queue()).await;
    for at in 0..50 {
        let _ =
            daemon.put(format!("t{at}"), &format!("{at} {}", "x".repeat(1_000))).user("u1").await.unwrap();
    }
    // As a kill and a damaged main file leave it.
    let file = cli.path("q.db.damaged-1");
    fs::copy(other.queue(), &file).unwrap();
    fs::copy(other.path("threadkeep-queue.db-wal"), cli.path("q.db.damaged-1-wal")).unwrap();
    overwrite(&file, 0..1, 0);
    let ended = import(&cli, file.to_str().unwrap()).await;
    assert_eq!((ended.code, &ended.json()["queued"]), (0, &Value::from(50)), "{ended:?}");
    drop(daemon);
}

#[tokio::test]
async fn what_is_no_queue_is_refused() {
    let cli = Cli::of_project();
    fs::write(cli.path("picture"), vec![7; 100_000]).unwrap();
    let ended = cli.run(&["queue", "import", "picture"]).await;
    assert!(ended.code == 1, "{ended:?}");
    let local = Cli::new(&[]);
    local.ok(&["put", "k", "1"]).await;
    let truth = local.path("threadkeep.db");
    let ended = cli.run(&["queue", "import", truth.to_str().unwrap()]).await;
    assert!(ended.code == 1 && ended.err.contains("queue move"), "{ended:?}");
    assert_eq!(cli.run(&["queue", "import", "no such file"]).await.code, 1);
}

#[tokio::test]
async fn whoever_looks_into_a_damaged_file_is_sent_to_the_import() {
    for pages in [0..1, 1..40] {
        let cli = Cli::of_project();
        let file = damaged(&cli, |path| overwrite(path, pages, 0x5a)).await;
        for command in ["status", "list"] {
            let ended = cli.run(&["queue", command, "--file", &file]).await;
            assert!(ended.code == 1 && ended.err.contains("`threadkeep queue import`"), "{ended:?}");
        }
    }
}
