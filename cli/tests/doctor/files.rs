//! Faults of the local file and its disk. The doctor changes neither.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use threadkeep::{Cache, WriteOutcome};

use crate::diagnosis::{Diagnosis, patient};
use crate::mount::Mount;
use crate::process::{Cli, cut_off, fill};
use crate::stack::{Gateway, Server, Stack};

async fn gateway() -> Gateway {
    let stack = tokio::task::spawn_blocking(|| Stack::shared(Server::Postrust)).await.unwrap();
    stack.gateway().await
}

async fn daemon(gateway: &Gateway, queue: &Path) -> Cache {
    let builder = Cache::builder().supabase(&gateway.url(), &gateway.keys().secret).queue(queue);
    builder.timeout(Duration::from_secs(1)).open().await.unwrap()
}

/// Shuts a cache down, and waits until its writer has closed the file.
async fn shut_down(cache: Cache, file: &Path) {
    cache.shutdown(Duration::from_secs(5)).await.unwrap();
    drop(cache);
    let companion = |suffix| file.with_extension(suffix);
    while companion("db-wal").exists() || companion("db-shm").exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Creates an outage file of this project, as after a normal shutdown.
async fn create_outage_file(gateway: &Gateway, cli: &Cli) {
    shut_down(daemon(gateway, &cli.queue()).await, &cli.queue()).await;
}

/// Reads all files of a directory with their permissions.
fn snapshot(directory: &Path) -> BTreeMap<String, (Vec<u8>, u32)> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    entries.map(|path| (name(&path), (fs::read(&path).unwrap(), mode(&path)))).collect()
}

/// Runs the doctor, and asserts that the directory of the file stays the same.
async fn unchanged(cli: &Cli) -> Diagnosis {
    let directory = cli.path(".");
    let before = snapshot(&directory);
    let diagnosis = Diagnosis::of(cli).await;
    let after = snapshot(&directory);
    let names = |all: &BTreeMap<String, _>| all.keys().cloned().collect::<Vec<_>>();
    assert!(before == after, "{:?} became {:?}", names(&before), names(&after));
    diagnosis
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn valid_file_is_ok() {
    let gateway = gateway().await;
    let cli = patient(&gateway, &[]);
    create_outage_file(&gateway, &cli).await;
    unchanged(&cli).await.is_well().says("file", "ok", &["is valid", "0 queued writes"]).says(
        "permissions",
        "ok",
        &["only the owner"],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_of_another_project_is_named() {
    let gateway = gateway().await;
    let cli = patient(&gateway, &[]);
    fill(&cli.queue(), 3).await;
    let host = gateway.url().replace("http://", "");
    let words = ["holds writes for custom", &host, "CONVERSATION_QUEUE_PATH", "threadkeep queue migrate"];
    unchanged(&cli).await.only_fails("file", &words);
    let others = cut_off(&cli.queue()).await;
    Diagnosis::of(&cli).await.only_fails("file", &words);
    drop(others);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn corrupt_file_is_named_and_not_renamed() {
    let gateway = gateway().await;
    let cli = patient(&gateway, &[]);
    create_outage_file(&gateway, &cli).await;
    let valid = fs::read(cli.queue()).unwrap();
    let mut torn = valid.clone();
    torn[4_096..].fill(0xa5);
    for (damage, bytes) in [("torn", torn), ("without its head", vec![0; valid.len()]), ("emptied", vec![])] {
        fs::write(cli.queue(), bytes).unwrap();
        let diagnosis = unchanged(&cli).await;
        println!("{damage}");
        diagnosis.only_fails("file", &["which renames it to", ".corrupt-1", "threadkeep queue import"]);
    }
    // The remedy works.
    create_outage_file(&gateway, &cli).await;
    assert!(cli.path("threadkeep-queue.db.corrupt-1").exists());
    Diagnosis::of(&cli).await.says("set aside", "warning", &["corrupt-1", "threadkeep queue import"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_file_is_named() {
    let gateway = gateway().await;
    let cli = patient(&gateway, &[]);
    fs::write(cli.queue(), "a text of somebody else's").unwrap();
    fs::set_permissions(cli.queue(), fs::Permissions::from_mode(0o600)).unwrap();
    unchanged(&cli).await.only_fails("file", &["is not a SQLite file", "move it away"]);
    fs::remove_file(cli.queue()).unwrap();
    let conversations = Cache::builder().local(cli.queue()).open().await.unwrap();
    shut_down(conversations, &cli.queue()).await;
    unchanged(&cli).await.only_fails(
        "file",
        &[
            "holds the conversations of the backend `local`",
            "CONVERSATION_QUEUE_PATH",
            "threadkeep queue migrate",
        ],
    );
    let lost = patient(&gateway, &[("CONVERSATION_QUEUE_PATH", "no/such/directory/q.db")]);
    unchanged(&lost)
        .await
        .only_fails("file", &["cannot be written", "no/such/directory", "make the directory"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_with_open_permissions_is_named() {
    let gateway = gateway().await;
    let cli = patient(&gateway, &[]);
    create_outage_file(&gateway, &cli).await;
    fs::set_permissions(cli.queue(), fs::Permissions::from_mode(0o644)).unwrap();
    unchanged(&cli).await.only_fails("permissions", &["threadkeep-queue.db", "chmod 600"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_only_or_small_disk_is_named() {
    let gateway = gateway().await;
    let mount = Mount::tmpfs("32m");
    let queue = mount.path().join("q.db");
    let cli = patient(&gateway, &[("CONVERSATION_QUEUE_PATH", queue.to_str().unwrap())]);
    let small = Diagnosis::of(&cli).await;
    small.only_fails("disk space", &["32 MiB free", "256 MiB", "CONVERSATION_QUEUE_MAX_BYTES"]);
    small.says("file system", "warning", &["in memory", "CONVERSATION_QUEUE_PATH"]);
    mount.remount("size=300m");
    let large = Diagnosis::of(&cli).await;
    large.says("disk space", "warning", &["512 MiB", "CONVERSATION_REPLICA_MAX_BYTES"]);
    assert_eq!(large.verdicts("failure"), [""; 0]);
    shut_down(daemon(&gateway, &queue).await, &queue).await;
    mount.remount("ro");
    Diagnosis::of(&cli)
        .await
        .only_fails("file", &["cannot be written", "ead-only file system", "CONVERSATION_QUEUE_PATH"]);
    mount.remount("rw");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_in_use_is_checked_without_waiting() {
    let gateway = gateway().await;
    let cli = patient(&gateway, &[]);
    let daemon = daemon(&gateway, &cli.queue()).await;
    let begun = Instant::now();
    let diagnosis = Diagnosis::of(&cli).await;
    let took = begun.elapsed();
    let holder = format!("in use by process {}", std::process::id());
    diagnosis.is_well().says("file", "ok", &[&holder, "0 queued writes"]);
    gateway.refuse().await;
    for key in ["a", "b", "c"] {
        assert_eq!(daemon.put(key, &1).await.unwrap(), WriteOutcome::Queued);
    }
    Diagnosis::of(&cli).await.says("file", "ok", &[&holder, "3 queued writes"]);
    assert_eq!(daemon.put("d", &1).await.unwrap(), WriteOutcome::Queued, "the daemon goes on");
    // A normal open waits five seconds for a held lock.
    assert!(took < Duration::from_secs(5), "{took:?}");

    // After a kill of the daemon, the log is not in the file yet.
    let killed = patient(&gateway, &[]);
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let name = format!("threadkeep-queue.db{suffix}");
        fs::copy(cli.path(&name), killed.path(&name)).unwrap();
    }
    assert!(fs::metadata(killed.path("threadkeep-queue.db-wal")).unwrap().len() > 0);
    let advice = ["no daemon has it open", "4 queued writes", "threadkeep queue replay"];
    unchanged(&killed).await.says("file", "warning", &advice);
    fs::remove_file(killed.path("threadkeep-queue.db-shm")).unwrap();
    unchanged(&killed).await.says("file", "warning", &["of log beside", "can read them", "queue status"]);
    gateway.accept().await;
    killed.ok(&["queue", "replay"]).await;
    Diagnosis::of(&killed).await.is_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_are_named() {
    let gateway = gateway().await;
    let cli = patient(&gateway, &[]);
    create_outage_file(&gateway, &cli).await;
    let file = rusqlite::Connection::open(cli.queue()).unwrap();
    let letter = "insert into dead_letters values (1, 'k', 1, '1', 1, null, '{}', 9, null, 1, 1, 'superseded', null, null)";
    file.execute(letter, []).unwrap();
    drop(file);
    unchanged(&cli).await.says("dead letters", "warning", &["1 dead letter:", "threadkeep queue dead"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_backends_are_checked() {
    let cli = Cli::new(&[]);
    let fresh = unchanged(&cli).await;
    assert_eq!(fresh.is_well().verdicts("ok"), ["settings", "file", "disk space"]);
    cli.ok(&["put", "k", "1"]).await;
    unchanged(&cli).await.is_well().says("file", "ok", &["threadkeep.db is valid: 1 conversation"]);
    fill(&cli.queue(), 1).await;
    unchanged(&cli).await.says("file", "warning", &["queued writes", "threadkeep queue replay"]);
    for file in fs::read_dir(cli.path(".")).unwrap().map(|entry| entry.unwrap().path()) {
        if file.to_str().unwrap().contains("threadkeep-queue") {
            fs::remove_file(file).unwrap();
        }
    }
    let daemon = Cache::builder().local(cli.path("threadkeep.db")).open().await.unwrap();
    let holder = format!("in use by process {}", std::process::id());
    Diagnosis::of(&cli).await.is_well().says("file", "ok", &[&holder, "1 conversation"]);
    shut_down(daemon, &cli.path("threadkeep.db")).await;
    let mut bytes = fs::read(cli.path("threadkeep.db")).unwrap();
    bytes[4_096..].fill(0xa5);
    fs::write(cli.path("threadkeep.db"), bytes).unwrap();
    unchanged(&cli).await.only_fails("file", &["restore it from a backup"]);

    let memory = Cli::new(&[("CONVERSATION_STORAGE_BACKEND", "memory")]);
    fill(&memory.queue(), 2).await;
    let diagnosis = unchanged(&memory).await;
    diagnosis
        .says(
            "settings",
            "warning",
            &["a restart of the daemon loses all conversations", "CONVERSATION_STORAGE_BACKEND"],
        )
        .says("file", "warning", &["has 5 queued writes", "threadkeep queue replay"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_output_has_a_line_for_each_finding() {
    let gateway = gateway().await;
    let well = patient(&gateway, &[]).ok(&["doctor"]).await;
    assert!(well.out.starts_with("ok       settings") && well.err.is_empty(), "{well:?}");
    let bad = patient(&gateway, &[("SUPABASE_KEY", "sb_publishable_x")]).run(&["doctor"]).await;
    assert_eq!(bad.code, 1, "{bad:?}");
    for line in
        ["failure  key", "-> set SUPABASE_KEY to this project's secret", "skipped  grants", "failures: 1"]
    {
        assert!(bad.out.contains(line), "{line}: {}", bad.out);
    }
    let help = Cli::new(&[]).ok(&["doctor", "--help"]).await.out;
    assert!(help.contains("Exit codes: 0") && help.contains("--anon-key"), "{help}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn irregular_file_is_named_without_waiting() {
    let gateway = gateway().await;
    let cli = patient(&gateway, &[]);
    let made = std::process::Command::new("mkfifo").arg(cli.queue()).status().unwrap();
    assert!(made.success());
    Diagnosis::of(&cli).await.only_fails("file", &["no regular file", "set another path"]);
    let error = Cache::builder().local(cli.queue()).open().await.unwrap_err();
    assert!(error.to_string().contains("no regular file"), "{error}");
    fs::remove_file(cli.queue()).unwrap();
    std::os::unix::fs::symlink("threadkeep-queue.db", cli.queue()).unwrap();
    let looped = Diagnosis::of(&cli).await;
    looped.says("file", "failure", &["cannot be opened", "set another path"]);
}
