//! Export, import and dead letters: files without a source of truth.

use serde_json::{Value, json};
use threadkeep::testing::Faulty;
use threadkeep::{Cache, Durability, QueueFile};

use crate::mount::Mount;
use crate::process::{Cli, Ended, ORIGIN, cut_off, fill};

/// What a file holds, without what differs from file to file.
async fn contents(cli: &Cli) -> Vec<Value> {
    let mut lines = cli.ok(&["queue", "export"]).await.lines();
    lines.iter_mut().for_each(|line| drop(line.as_object_mut().unwrap().remove("origin")));
    lines
}

/// Dead letters in a queue's file: three of the thread `a`, refused one after the other, and one of `b`.
async fn bury(queue: &std::path::Path) {
    let lines = [("a", 1), ("a", 2), ("b", 3), ("a", 4)].map(|(key, at)| {
        let version = (1_700_000_000_000_i64 << 21) + at;
        let expires = 1_700_000_000_000_i64 + 3_600_000;
        json!({"kind": "dead", "key": key, "version": version.to_string(), "value": at, "expires": expires,
               "queued_at": 1_700_000_000_000_i64, "died_at": 1_700_000_000_001_i64, "reason": "superseded", "newer": "9"})
        .to_string()
    });
    let file = QueueFile::open_for(queue, ORIGIN).await.unwrap();
    let (imported, wrong) = file.import(&lines, false).await.unwrap();
    assert_eq!((imported.dead_letters, wrong.len()), (4, 0));
}

#[tokio::test]
async fn what_is_exported_can_be_imported_into_an_empty_file() {
    let (from, to) = (Cli::new(&[]), Cli::of_project());
    fill(&from.queue(), 20).await;
    let status = from.ok(&["queue", "status", "--json"]).await.json();
    assert_eq!((&status["queued"]["records"], &status["origin"]), (&json!(22), &json!("custom")));
    assert!(from.ok(&["queue", "status"]).await.out.contains("22 writes"));
    let listed = from.ok(&["queue", "list", "--json"]).await.lines();
    assert_eq!(listed.len(), 22);
    assert!(listed.iter().any(|one| one["key"] == "removed" && one["kind"] == "remove"));
    assert!(from.ok(&["queue", "list"]).await.out.contains("t7\tput"));

    let export = to.path("export");
    let said = from.ok(&["queue", "export", export.to_str().unwrap()]).await.err;
    assert!(said.contains("22 queued writes and 0 dead letters"), "{said}");
    let again = from.run(&["queue", "export", export.to_str().unwrap()]).await;
    assert!(again.code == 1 && again.err.contains("exists"), "nothing is overwritten: {again:?}");

    let refused = to.run(&["queue", "import", "export"]).await;
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("line 22") && refused.err.contains("queued for custom"), "{refused:?}");
    let imported = to.ok(&["queue", "import", "export", "--any-origin", "--json"]).await.json();
    assert_eq!((&imported["queued"], &imported["wrong_lines"]), (&json!(22), &json!(0)));
    assert_eq!(contents(&to).await, contents(&from).await);
    let again = to.ok(&["queue", "import", "export", "--any-origin", "--json"]).await.json();
    assert_eq!((&again["queued"], &again["already"]), (&json!(0), &json!(22)));
    assert_eq!(contents(&to).await, contents(&from).await);
}

#[tokio::test]
async fn imported_writes_are_queued_as_if_they_had_always_been_here() {
    let (from, to) = (Cli::new(&[]), Cli::new(&[]));
    fill(&from.queue(), 3).await;
    cut_off(&to.queue()).await.shutdown(std::time::Duration::ZERO).await.unwrap();
    let export = from.ok(&["queue", "export"]).await.out;
    assert_eq!(to.run_with_input(&["queue", "import", "-"], &export).await.code, 0);
    let truth = std::sync::Arc::new(threadkeep::Memory::new());
    let cache = Cache::builder().store(Faulty::new(truth)).queue(to.queue()).open().await.unwrap();
    cache.shutdown(std::time::Duration::from_secs(10)).await.unwrap();
    let cache = Cache::builder().store(Faulty::new(threadkeep::Memory::new())).queue(to.queue());
    let health = cache.open().await.unwrap().health().queue.unwrap();
    assert_eq!((health.records, health.dead_letters), (0, 0), "all of it was stored: {health:?}");
}

#[tokio::test]
async fn a_wrong_line_is_named_and_the_rest_goes_on() {
    let cli = Cli::of_project();
    let line = |key: &str, value: &str| {
        format!(r#"{{"kind":"queued","key":{key},"version":"9","value":{value},"expires":1,"queued_at":1}}"#)
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
    for word in ["line 2: ", "line 4: a thread id", "line 5: the database could not store"] {
        assert!(ended.err.contains(word), "{ended:?}");
    }
    let keys: Vec<Value> = contents(&cli).await.iter().map(|line| line["key"].clone()).collect();
    assert_eq!(keys, ["one", "three"]);
}

#[tokio::test]
async fn an_export_whose_first_line_is_damaged_gives_the_others() {
    let line = |key: &str| {
        format!(r#"{{"kind":"queued","key":"{key}","version":"9","value":1,"expires":1,"queued_at":1}}"#)
    };
    let rest = format!("\n{}\n{}\n", line("two"), line("three"));
    let sound = ["\u{feff}", &line("one")].concat();
    for (first, wrong) in [
        (sound.as_bytes(), 0),
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
async fn a_version_that_nothing_can_have_stamped_is_refused() {
    let cli = Cli::of_project();
    let line = |version: i64| {
        format!(
            r#"{{"kind":"queued","key":"k{version}","version":"{version}","value":1,"expires":9,"queued_at":9}}"#
        )
    };
    let hours = |hours: i64| (threadkeep::Clock::new().now().0 + hours * 3_600_000) << 21;
    let lines = [hours(0), i64::MAX, hours(23), hours(25)].map(line).join("\n");
    let ended = cli.run_with_input(&["queue", "import", "-", "--json"], &lines).await;
    assert_eq!((ended.code, &ended.json()["queued"]), (1, &json!(2)), "{ended:?}");
    for word in ["line 2: the version 9223372036854775807 is", "line 4: ", "ahead of this machine's clock"] {
        assert!(ended.err.contains(word), "{ended:?}");
    }
}

#[tokio::test]
async fn what_is_newer_in_the_file_stays() {
    let cli = Cli::of_project();
    let line = |version: i64, value: &str| {
        format!(
            r#"{{"kind":"queued","key":"k","version":"{version}","value":{value},"expires":9000000000000,"queued_at":1}}"#
        )
    };
    for (version, value, outcome) in
        [(5, "5", "queued"), (3, "3", "older"), (5, "5", "already"), (7, "7", "queued")]
    {
        let ended = cli.run_with_input(&["queue", "import", "-", "--json"], &line(version, value)).await;
        assert_eq!(ended.json()[outcome], 1, "{version}: {ended:?}");
    }
    assert_eq!(contents(&cli).await[0]["value"], 7);
    let update = line(9, "9").replace("\"expires\"", "\"base\":\"2\",\"expires\"");
    assert_eq!(cli.run_with_input(&["queue", "import", "-", "--json"], &update).await.json()["queued"], 1);
    let dead = cli.ok(&["queue", "dead", "--json"]).await.lines();
    assert!(
        dead.len() == 1 && dead[0]["reason"].as_str().unwrap().contains("does not go on from it"),
        "{dead:?}"
    );
}

#[tokio::test]
async fn dead_letters_are_listed_exported_and_forgotten() {
    let cli = Cli::of_project();
    bury(&cli.queue()).await;
    assert!(cli.ok(&["queue", "status"]).await.out.contains("threadkeep queue dead"));
    let listed = cli.ok(&["queue", "dead", "--json"]).await.lines();
    assert_eq!(listed.len(), 4);
    assert_eq!((&listed[0]["key"], &listed[0]["reason"]), (&json!("a"), &json!("superseded")));
    assert!(cli.ok(&["queue", "dead"]).await.out.contains("b\tput"));
    assert_eq!(cli.run(&["queue", "dead", "--export", "-", "--forget"]).await.code, 2);
    assert_eq!(cli.ok(&["queue", "dead", "--export", "-"]).await.lines().len(), 4);
    let said = cli.ok(&["queue", "dead", "--export", "letters", "--forget"]).await.err;
    assert!(said.contains("exported 4") && said.contains("forgot 4"), "{said}");
    assert_eq!(cli.ok(&["queue", "dead"]).await.out, "");
    for added in [4, 0] {
        let imported = cli.ok(&["queue", "import", "letters", "--json"]).await.json();
        assert_eq!(imported["dead_letters"], added, "{imported}");
    }
    assert_eq!(cli.ok(&["queue", "dead", "--json"]).await.lines(), listed);
}

#[tokio::test]
async fn a_dead_letter_that_is_requeued_is_a_put_of_this_moment() {
    let cli = Cli::of_project();
    bury(&cli.queue()).await;
    assert_eq!(cli.run(&["queue", "dead", "--requeue", "unknown"]).await.code, 1);
    assert_eq!(cli.ok(&["queue", "dead", "--requeue", "a", "--json"]).await.json()["requeued"], 1);
    let queued = contents(&cli).await.swap_remove(0);
    assert_eq!((&queued["key"], &queued["value"], &queued["base"]), (&json!("a"), &json!(4), &Value::Null));
    let at = queued["version"].as_str().unwrap().parse::<i64>().unwrap() >> 21;
    assert_eq!(queued["expires"].as_i64().unwrap() - at, 3_600_000, "it lives for as long as it was to live");
    assert!(at > 1_750_000_000_000, "{queued}");
    let rest = cli.run(&["queue", "dead", "--all", "--json"]).await;
    assert_eq!((rest.code, rest.json()), (1, json!({"requeued": 1, "left": 1})), "{rest:?}");
    assert!(rest.err.contains("a newer write waits"), "{rest:?}");
    assert_eq!(cli.ok(&["queue", "dead"]).await.out.lines().count(), 2);
}

#[tokio::test]
async fn another_queues_writes_are_moved_once() {
    let cli = Cli::of_project();
    let old = cli.path("old.db");
    fill(&old, 600).await;
    let itself = cli.run(&["queue", "--file", "old.db", "status"]).await;
    assert_eq!(itself.code, 0);
    let before = {
        let export = cli.ok(&["queue", "--file", "old.db", "export"]).await;
        export.lines().len()
    };
    let moved = cli.ok(&["queue", "move", "old.db", "--json"]).await.json();
    assert_eq!((&moved["queued"], before), (&json!(602), 602));
    assert!(moved["renamed_to"].as_str().unwrap().ends_with("old.db.moved"));
    assert!(!old.exists() && cli.path("old.db.moved").exists());
    let again = cli.run(&["queue", "move", "old.db"]).await;
    assert!(again.code == 1 && again.err.contains("moved already"), "{again:?}");
    std::fs::rename(cli.path("old.db.moved"), &old).unwrap();
    let again = cli.ok(&["queue", "move", "old.db", "--json"]).await.json();
    assert_eq!((&again["queued"], &again["already"]), (&json!(0), &json!(602)));
    assert_eq!(cli.ok(&["queue", "status", "--json"]).await.json()["queued"]["records"], 602);
    let itself = cli.run(&["queue", "move", "threadkeep-queue.db"]).await;
    assert!(itself.code == 2 && itself.err.contains("is the queue's file itself"), "{itself:?}");
}

#[tokio::test]
async fn a_cache_without_its_queue_opens_beside_one_that_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let queue = dir.path().join("q.db");
    let daemon = cut_off(&queue).await;
    let beside = Cache::builder().store(threadkeep::Memory::new()).queue(&queue).without_queue();
    let beside = beside.open().await.unwrap();
    assert_eq!(beside.put("k", &1).await.unwrap(), Durability::Stored);
    assert!(beside.health().queue.is_none() && daemon.health().queue.is_some());
}

#[tokio::test]
async fn files_of_others_are_left_as_they_are() {
    let cli = Cli::of_project();
    for (name, contents) in [("empty", &b""[..]), ("text", b"hello"), ("zeros", &[0; 9_000])] {
        std::fs::write(cli.path(name), contents).unwrap();
        for arguments in [&["queue", "--file", name, "status"][..], &["queue", "move", name]] {
            let ended = cli.run(arguments).await;
            assert!(ended.code == 1 && !ended.err.is_empty(), "{ended:?}");
        }
        assert_eq!(std::fs::read(cli.path(name)).unwrap(), contents);
        assert!(!cli.path(&format!("{name}.lock")).exists(), "{name}");
    }
    bury(&cli.queue()).await;
    let itself = cli.run(&["queue", "import", "threadkeep-queue.db"]).await;
    assert!(itself.code == 2 && itself.err.contains("is the queue's file itself"), "{itself:?}");
}

#[tokio::test]
async fn a_file_that_cannot_be_written_is_to_be_copied_by_the_path_that_was_given() {
    let disk = Mount::tmpfs("4m");
    let (queue, cli) = (disk.path().join("q.db"), Cli::new(&[]));
    fill(&queue, 3).await;
    disk.remount("ro");
    for command in ["status", "list", "export"] {
        let ended = cli.run(&["queue", command, "--file", queue.to_str().unwrap()]).await;
        assert_eq!((ended.code, ended.out.as_str()), (1, ""), "{ended:?}");
        for word in
            ["q.db cannot be opened for writing", "copy it", "CONVERSATION_QUEUE_PATH", "--file", "because: "]
        {
            assert!(ended.err.contains(word), "{ended:?}");
        }
        assert!(!ended.err.contains("CONVERSATION_LOCAL_PATH"), "{ended:?}");
    }
    for suffix in ["", "-wal"] {
        std::fs::copy(format!("{}{suffix}", queue.display()), cli.path(&format!("copy{suffix}"))).ok();
    }
    assert_eq!(cli.ok(&["queue", "status", "--file", "copy", "--json"]).await.json()["queued"]["records"], 5);
}

/// The path that is set leads to it by a link.
#[cfg(unix)]
#[tokio::test]
async fn file_whose_real_path_is_not_utf8_is_shown_and_moved() {
    use std::os::unix::ffi::OsStrExt as _;
    let cli = Cli::of_project();
    let real = cli.path("").join(std::ffi::OsStr::from_bytes(b"dir\xff"));
    std::fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, cli.path("link")).unwrap();
    let file = QueueFile::open_for(cli.path("link/other.db"), ORIGIN).await.unwrap();
    file.close().await.unwrap();
    let mut status = cli.command(&["queue", "status", "--json"]);
    status.env("CONVERSATION_QUEUE_PATH", "link/other.db");
    let status: Ended = tokio::task::spawn_blocking(move || status.output().unwrap()).await.unwrap().into();
    assert!(status.code == 0 && status.out.contains("other.db"), "{status:?}");
    let local = Cache::builder().local(real.join("local.db")).open().await.unwrap();
    assert_eq!(local.put("t", &1).await.unwrap(), Durability::Stored);
    drop(local);
    let moved = cli.ok(&["queue", "move", "link/local.db", "--json"]).await.json();
    assert_eq!(moved["queued"], json!(1));
    assert!(real.join("local.db.moved").exists());
    let again = cli.run(&["queue", "move", "link/local.db"]).await;
    assert!(again.code == 1 && again.err.contains("was moved already"), "{again:?}");
}
