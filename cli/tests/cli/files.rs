//! Export, import and dead letters, without a reachable store.

use serde_json::{Value, json};
use threadkeep::DeadLetter;
use threadkeep::store::{Append, ArrayPath, Json, Key, Record, Timestamp, Version};
use threadkeep::testing::FaultStore;
use threadkeep::tools::{ImportItem, QueueAdmin};
use threadkeep::{Cache, WriteOutcome};

use crate::mount::Mount;
use crate::process::{Cli, Ended, PROJECT, cut_off, fill};

/// Exports a file, and removes the project, which differs between the files.
async fn contents(cli: &Cli) -> Vec<Value> {
    let mut lines = cli.ok(&["queue", "export"]).await.lines();
    lines.iter_mut().for_each(|line| drop(line.as_object_mut().unwrap().remove("project")));
    lines
}

/// Creates an outage file with dead letters: three of the conversation `a`, and one of `b`.
async fn add_dead_letters(queue: &std::path::Path) {
    let letters = [("a", 1), ("a", 2), ("b", 3), ("a", 4)].map(|(key, at)| {
        let now = Timestamp(1_700_000_000_000);
        let version = Version::from_raw((now.0 << 21) + at);
        let (key, value) = (Key::new(key).unwrap(), Json::of(&at).unwrap());
        let record = Record::put(key, version, value, Timestamp(now.0 + 3_600_000));
        let mut letter = DeadLetter::new(record, now, Timestamp(now.0 + 1), "superseded");
        letter.newer = Some(Version::from_raw(9));
        ImportItem::DeadLetter(letter)
    });
    let file = QueueAdmin::open_for(queue, PROJECT).await.unwrap();
    let (imported, invalid) = file.import(letters.into()).await.unwrap();
    assert_eq!((imported.dead_letters, invalid.len()), (4, 0));
}

#[tokio::test]
async fn export_into_an_empty_file_keeps_everything() {
    let (from, to) = (Cli::new(&[]), Cli::of_project());
    fill(&from.queue(), 20).await;
    let status = from.ok(&["queue", "status", "--json"]).await.json();
    assert_eq!((&status["queued"]["records"], &status["project"]), (&json!(23), &json!("custom")));
    assert!(from.ok(&["queue", "status"]).await.out.contains("23 writes"));
    let listed = from.ok(&["queue", "list", "--json"]).await.lines();
    assert_eq!(listed.len(), 23);
    assert!(listed.iter().any(|one| one["key"] == "removed" && one["kind"] == "remove"));
    let update = listed.iter().find(|one| one["kind"] == "update").unwrap();
    let put = listed.iter().find(|one| one["key"] == "t0" && one["kind"] == "put").unwrap();
    assert_eq!((&update["if_version"], &update["writer"]), (&put["version"], &put["writer"]));
    assert_eq!(put["if_version"], Value::Null);
    let text = from.ok(&["queue", "list"]).await.out;
    let [base, writer] = ["if_version", "writer"].map(|name| update[name].as_str().unwrap());
    assert!(text.contains("t7\tput") && text.contains(&format!("\twriter {writer}\tif_version {base}\n")));

    let export = to.path("export");
    let said = from.ok(&["queue", "export", export.to_str().unwrap()]).await.err;
    assert!(said.contains("23 queued writes and 0 dead letters"), "{said}");
    let again = from.run(&["queue", "export", export.to_str().unwrap()]).await;
    assert!(again.code == 1 && again.err.contains("exists"), "the export overwrites no file: {again:?}");

    let refused = to.run(&["queue", "import", "export"]).await;
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("line 23") && refused.err.contains("queued for custom"), "{refused:?}");
    let imported = to.ok(&["queue", "import", "export", "--allow-other-project", "--json"]).await.json();
    assert_eq!((&imported["queued"], &imported["wrong_lines"]), (&json!(23), &json!(0)));
    assert_eq!(contents(&to).await, contents(&from).await);
    let again = to.ok(&["queue", "import", "export", "--allow-other-project", "--json"]).await.json();
    assert_eq!((&again["queued"], &again["duplicates"]), (&json!(0), &json!(23)));
    assert_eq!(contents(&to).await, contents(&from).await);
}

#[tokio::test]
async fn import_queues_writes_for_the_store() {
    let (from, to) = (Cli::new(&[]), Cli::new(&[]));
    fill(&from.queue(), 3).await;
    cut_off(&to.queue()).await.shutdown(std::time::Duration::ZERO).await.unwrap();
    let export = from.ok(&["queue", "export"]).await.out;
    assert_eq!(to.run_with_input(&["queue", "import", "-"], &export).await.code, 0);
    let store = std::sync::Arc::new(threadkeep::store::Memory::new());
    let cache = Cache::builder().store(FaultStore::new(store)).queue(to.queue()).open().await.unwrap();
    cache.shutdown(std::time::Duration::from_secs(10)).await.unwrap();
    let cache = Cache::builder().store(FaultStore::new(threadkeep::store::Memory::new())).queue(to.queue());
    let health = cache.open().await.unwrap().health().queue.unwrap();
    assert_eq!((health.records, health.dead_letters), (0, 0), "the store has all writes: {health:?}");
}

#[tokio::test]
async fn import_invalid_lines_are_named_and_skipped() {
    let cli = Cli::of_project();
    let line = |key: &str, value: &str| {
        format!(
            r#"{{"kind":"queued","key":{key},"version":"9","value":{value},"expires_at":1,"queued_at":1}}"#
        )
    };
    let lines = [
        line("\"one\"", "null"),
        "{\"kind\": \"queued\"".into(),
        String::new(),
        line("\"\"", "1"),
        line("\"two\"", "\"\\u0000\""),
        line("\"three\"", "3"),
    ];
    let ended = cli.run_with_input(&["queue", "import", "-", "--json"], &lines.join("\n")).await;
    assert_eq!(
        (ended.code, &ended.json()["queued"], &ended.json()["wrong_lines"]),
        (1, &json!(2), &json!(3))
    );
    for word in ["line 2: ", "line 4: a thread id", "line 5: the database cannot store"] {
        assert!(ended.err.contains(word), "{ended:?}");
    }
    let keys: Vec<Value> = contents(&cli).await.iter().map(|line| line["key"].clone()).collect();
    assert_eq!(keys, ["one", "three"]);
}

#[tokio::test]
async fn import_corrupt_first_line_keeps_the_others() {
    let line = |key: &str| {
        format!(r#"{{"kind":"queued","key":"{key}","version":"9","value":1,"expires_at":1,"queued_at":1}}"#)
    };
    let rest = format!("\n{}\n{}\n", line("two"), line("three"));
    let valid = ["\u{feff}", &line("one")].concat();
    for (first, wrong) in [
        (valid.as_bytes(), 0),
        (b"ost in a crash\"}", 1),
        (&[0; 4_000], 1),
        (b"{\"key\":\"\xff\"}", 1),
        (b"", 0),
    ] {
        let cli = Cli::of_project();
        std::fs::write(cli.path("export"), [first, rest.as_bytes()].concat()).unwrap();
        let ended = cli.run(&["queue", "import", "export", "--json"]).await;
        let taken = if wrong == 0 && !first.is_empty() { 3 } else { 2 };
        let said = ended.json();
        assert_eq!((&said["queued"], &said["wrong_lines"]), (&json!(taken), &json!(wrong)), "{ended:?}");
        assert_eq!((ended.code, ended.err.contains("line 1: ")), (wrong, wrong == 1), "{ended:?}");
    }
}

#[tokio::test]
async fn import_impossible_version_is_rejected() {
    let cli = Cli::of_project();
    let line = |version: i64| {
        format!(
            r#"{{"kind":"queued","key":"k{version}","version":"{version}","value":1,"expires_at":9,"queued_at":9}}"#
        )
    };
    let hours = |hours: i64| (threadkeep::store::Clock::new().now().0 + hours * 3_600_000) << 21;
    let lines = [hours(0), i64::MAX, hours(23), hours(25)].map(line).join("\n");
    let ended = cli.run_with_input(&["queue", "import", "-", "--json"], &lines).await;
    assert_eq!((ended.code, &ended.json()["queued"]), (1, &json!(2)), "{ended:?}");
    for word in ["line 2: the version 9223372036854775807 is", "line 4: ", "ahead of this machine's clock"] {
        assert!(ended.err.contains(word), "{ended:?}");
    }
}

#[tokio::test]
async fn import_older_write_keeps_the_newer() {
    let cli = Cli::of_project();
    let line = |version: i64, value: &str| {
        format!(
            r#"{{"kind":"queued","key":"k","version":"{version}","value":{value},"expires_at":9000000000000,"queued_at":1}}"#
        )
    };
    for (version, value, outcome) in
        [(5, "5", "queued"), (3, "3", "stale"), (5, "5", "duplicates"), (7, "7", "queued")]
    {
        let ended = cli.run_with_input(&["queue", "import", "-", "--json"], &line(version, value)).await;
        assert_eq!(ended.json()[outcome], 1, "{version}: {ended:?}");
    }
    assert_eq!(contents(&cli).await[0]["value"], 7);
    let update = line(9, "9").replace("\"expires_at\"", "\"base\":\"2\",\"expires_at\"");
    assert_eq!(cli.run_with_input(&["queue", "import", "-", "--json"], &update).await.json()["queued"], 1);
    let versions: Vec<_> = contents(&cli).await.iter().map(|line| line["version"].clone()).collect();
    assert_eq!(versions, ["7", "9"], "the store decides about an update that does not follow the queued put");
}

#[tokio::test]
async fn dead_letters_are_listed_exported_and_deleted() {
    let cli = Cli::of_project();
    add_dead_letters(&cli.queue()).await;
    assert!(cli.ok(&["queue", "status"]).await.out.contains("threadkeep queue dead"));
    let listed = cli.ok(&["queue", "dead-letters", "--json"]).await.lines();
    assert_eq!(listed.len(), 4);
    assert_eq!((&listed[0]["key"], &listed[0]["reason"]), (&json!("a"), &json!("superseded")));
    assert!(cli.ok(&["queue", "dead-letters"]).await.out.contains("b\tput"));
    assert_eq!(cli.run(&["queue", "dead-letters", "--export", "-", "--delete"]).await.code, 2);
    assert_eq!(cli.ok(&["queue", "dead-letters", "--export", "-"]).await.lines().len(), 4);
    let said = cli.ok(&["queue", "dead-letters", "--export", "letters", "--delete"]).await.err;
    assert!(said.contains("exported 4") && said.contains("deleted 4"), "{said}");
    assert_eq!(cli.ok(&["queue", "dead-letters"]).await.out, "");
    for added in [4, 0] {
        let imported = cli.ok(&["queue", "import", "letters", "--json"]).await.json();
        assert_eq!(imported["dead_letters"], added, "{imported}");
    }
    assert_eq!(cli.ok(&["queue", "dead-letters", "--json"]).await.lines(), listed);
}

#[tokio::test]
async fn requeued_dead_letter_is_a_new_put() {
    let cli = Cli::of_project();
    add_dead_letters(&cli.queue()).await;
    assert_eq!(cli.run(&["queue", "dead-letters", "--requeue", "unknown"]).await.code, 1);
    assert_eq!(cli.ok(&["queue", "dead-letters", "--requeue", "a", "--json"]).await.json()["requeued"], 1);
    let queued = contents(&cli).await.swap_remove(0);
    assert_eq!(
        (&queued["key"], &queued["value"], &queued["if_version"]),
        (&json!("a"), &json!(4), &Value::Null)
    );
    let at = queued["version"].as_str().unwrap().parse::<i64>().unwrap() >> 21;
    assert_eq!(queued["expires_at"].as_i64().unwrap() - at, 3_600_000, "the time to live starts again");
    assert!(at > 1_750_000_000_000, "{queued}");
    let rest = cli.run(&["queue", "dead-letters", "--all", "--json"]).await;
    assert_eq!((rest.code, rest.json()), (1, json!({"requeued": 1, "left": 1})), "{rest:?}");
    assert!(rest.err.contains("a newer write of"), "{rest:?}");
    assert_eq!(cli.ok(&["queue", "dead-letters"]).await.out.lines().count(), 2);
}

#[tokio::test]
async fn migrate_other_queue_twice_moves_once() {
    let cli = Cli::of_project();
    let old = cli.path("old.db");
    fill(&old, 600).await;
    let itself = cli.run(&["queue", "--file", "old.db", "status"]).await;
    assert_eq!(itself.code, 0);
    let before = {
        let export = cli.ok(&["queue", "--file", "old.db", "export"]).await;
        export.lines().len()
    };
    let moved = cli.ok(&["queue", "migrate", "old.db", "--json"]).await.json();
    assert_eq!((&moved["queued"], before), (&json!(603), 603));
    assert!(moved["renamed_to"].as_str().unwrap().ends_with("old.db.moved"));
    assert!(!old.exists() && cli.path("old.db.moved").exists());
    assert!(!cli.path("old.db.lock").exists(), "nothing of the old name stays");
    let again = cli.run(&["queue", "migrate", "old.db"]).await;
    assert!(again.code == 1 && again.err.contains("was migrated before"), "{again:?}");
    std::fs::rename(cli.path("old.db.moved"), &old).unwrap();
    let again = cli.ok(&["queue", "migrate", "old.db", "--json"]).await.json();
    assert_eq!((&again["queued"], &again["duplicates"]), (&json!(0), &json!(603)));
    assert_eq!(cli.ok(&["queue", "status", "--json"]).await.json()["queued"]["records"], 603);
    let itself = cli.run(&["queue", "migrate", "threadkeep-queue.db"]).await;
    assert!(itself.code == 2 && itself.err.contains("is the outage file itself"), "{itself:?}");
}

#[tokio::test]
async fn cache_without_queue_opens_beside_a_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let queue = dir.path().join("q.db");
    let daemon = cut_off(&queue).await;
    let beside = Cache::builder().store(threadkeep::store::Memory::new()).queue(&queue).without_queue();
    let beside = beside.open().await.unwrap();
    assert_eq!(beside.put("k", &1).await.unwrap(), WriteOutcome::Stored);
    assert!(beside.health().queue.is_none() && daemon.health().queue.is_some());
}

#[tokio::test]
async fn foreign_files_stay_unchanged() {
    let cli = Cli::of_project();
    for (name, contents) in [("empty", &b""[..]), ("text", b"hello"), ("zeros", &[0; 9_000])] {
        std::fs::write(cli.path(name), contents).unwrap();
        for arguments in [&["queue", "--file", name, "status"][..], &["queue", "migrate", name]] {
            let ended = cli.run(arguments).await;
            assert!(ended.code == 1 && !ended.err.is_empty(), "{ended:?}");
        }
        assert_eq!(std::fs::read(cli.path(name)).unwrap(), contents);
        assert!(!cli.path(&format!("{name}.lock")).exists(), "{name}");
    }
    add_dead_letters(&cli.queue()).await;
    let itself = cli.run(&["queue", "import", "threadkeep-queue.db"]).await;
    assert!(itself.code == 2 && itself.err.contains("is the outage file itself"), "{itself:?}");
}

#[tokio::test]
async fn read_only_file_error_advises_a_copy() {
    let disk = Mount::tmpfs("4m");
    let (queue, cli) = (disk.path().join("q.db"), Cli::new(&[]));
    fill(&queue, 3).await;
    disk.remount("ro");
    for command in ["status", "list", "export"] {
        let ended = cli.run(&["queue", command, "--file", queue.to_str().unwrap()]).await;
        assert_eq!((ended.code, ended.out.as_str()), (1, ""), "{ended:?}");
        for word in [
            "q.db cannot be opened for writing",
            "copy the file",
            "CONVERSATION_QUEUE_PATH",
            "--file",
            "because: ",
        ] {
            assert!(ended.err.contains(word), "{ended:?}");
        }
        assert!(!ended.err.contains("CONVERSATION_LOCAL_PATH"), "{ended:?}");
    }
    for suffix in ["", "-wal"] {
        std::fs::copy(format!("{}{suffix}", queue.display()), cli.path(&format!("copy{suffix}"))).ok();
    }
    assert_eq!(cli.ok(&["queue", "status", "--file", "copy", "--json"]).await.json()["queued"]["records"], 6);
}

/// A symbolic link with a UTF-8 name leads to the file.
#[cfg(unix)]
#[tokio::test]
async fn file_with_non_utf8_path_is_shown_and_migrated() {
    use std::os::unix::ffi::OsStrExt as _;
    let cli = Cli::of_project();
    let real = cli.path("").join(std::ffi::OsStr::from_bytes(b"dir\xff"));
    std::fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, cli.path("link")).unwrap();
    let file = QueueAdmin::open_for(cli.path("link/other.db"), PROJECT).await.unwrap();
    file.close().await.unwrap();
    let mut status = cli.command(&["queue", "status", "--json"]);
    status.env("CONVERSATION_QUEUE_PATH", "link/other.db");
    let status: Ended = tokio::task::spawn_blocking(move || status.output().unwrap()).await.unwrap().into();
    assert!(status.code == 0 && status.out.contains("other.db"), "{status:?}");
    let local = Cache::builder().local(real.join("local.db")).open().await.unwrap();
    assert_eq!(local.put("t", &1).await.unwrap(), WriteOutcome::Stored);
    drop(local);
    let moved = cli.ok(&["queue", "migrate", "link/local.db", "--json"]).await.json();
    assert_eq!(moved["queued"], json!(1));
    assert!(real.join("local.db.moved").exists());
    let again = cli.run(&["queue", "migrate", "link/local.db"]).await;
    assert!(again.code == 1 && again.err.contains("was migrated before"), "{again:?}");
}

#[tokio::test]
async fn appends_are_listed_and_requeued_in_their_order() {
    let cli = Cli::new(&[]);
    let cache = cut_off(&cli.queue()).await;
    cache.append("k", &[1, 2]).at(["a", "b"]).await.unwrap();
    cache.shutdown(std::time::Duration::ZERO).await.unwrap();
    let letters = [(1, "\"put\""), (3, "[3]"), (2, "[1,2]")].map(|(at, value)| {
        let now = Timestamp(1_700_000_000_000);
        let version = Version::from_raw((now.0 << 21) + at);
        let (key, value) = (Key::new("dead").unwrap(), Json::new(value).unwrap());
        let record = Record::put(key, version, value, Timestamp(now.0 + 3_600_000));
        let mut letter = DeadLetter::new(record, now, now, "rejected: not an array");
        letter.append = (at > 1).then(|| Append::new(ArrayPath::from("messages"), 1_000));
        ImportItem::DeadLetter(letter)
    });
    let file = QueueAdmin::open(cli.queue()).await.unwrap();
    assert_eq!(file.import(letters.into()).await.unwrap().0.dead_letters, 3);
    file.close().await.unwrap();
    drop(file);
    let dead = cli.ok(&["queue", "dead-letters"]).await.out;
    assert!(dead.contains("dead\tappend of 2 items at messages\t") && dead.contains("dead\tput\t"), "{dead}");
    assert_eq!(cli.ok(&["queue", "dead-letters", "--requeue", "dead", "--json"]).await.json()["requeued"], 2);
    let list = cli.ok(&["queue", "list"]).await.out;
    assert!(list.starts_with("k\tappend of 2 items at a.b\t"), "{list}");
    let entries = cli.ok(&["queue", "list", "--json"]).await.lines();
    let shown = |entry: &Value| {
        (entry["key"].clone(), entry["kind"].clone(), entry["at"].clone(), entry["items"].clone())
    };
    assert_eq!(shown(&entries[0]), (json!("k"), json!("append"), json!(["a", "b"]), json!(2)));
    let values: Vec<Value> = contents(&cli).await.iter().map(|line| line["value"].clone()).collect();
    assert_eq!(values, [json!([1, 2]), json!([1, 2]), json!([3]), json!("put")], "the older put stays dead");
    let other = Cli::of_project();
    std::fs::write(other.path("export"), cli.ok(&["queue", "export"]).await.out).unwrap();
    other.ok(&["queue", "import", "export", "--allow-other-project"]).await;
    // Each opening moves provisional versions to its own clock.
    let targets = async |cli: &Cli| -> Vec<_> {
        contents(cli).await.iter().map(|line| (line["value"].clone(), line["append"].clone())).collect()
    };
    assert_eq!(targets(&other).await, targets(&cli).await);
}
