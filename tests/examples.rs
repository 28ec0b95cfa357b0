//! Each example runs, as a process, and says what it is there to say.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::path::Path;
use std::process::Command;

/// Runs an example, as it is now, in this directory, without settings from outside.
fn run(example: &str, directory: &Path) -> String {
    let test = std::env::current_exe().unwrap();
    let [profile, target] = [2, 3].map(|up| test.ancestors().nth(up).unwrap());
    let name = profile.file_name().unwrap().to_str().unwrap();
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--locked", "--all-features", "--example", example]);
    build.args(["--profile", if name == "debug" { "dev" } else { name }, "--target-dir"]).arg(target);
    assert!(
        build.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success(),
        "{example} does not build"
    );
    let mut process = Command::new(profile.join("examples").join(example));
    let output = process.current_dir(directory).env_clear().output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{example}: {said}\n{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// The examples whose processes tests/daemon and tests/prometheus start.
const ELSEWHERE: [&str; 1] = ["daemon"];
const HERE: [&str; 4] = ["quickstart", "outage", "custom_store", "metrics"];

#[test]
fn quickstart_goes_on_where_it_ended() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(run("quickstart", directory.path()), "Stored: [\"hello for the 1. time\"]\n");
    let second = run("quickstart", directory.path());
    assert_eq!(second, "Stored: [\"hello for the 1. time\",\"hello for the 2. time\"]\n");
}

#[test]
fn outage_tells_what_an_outage_does() {
    let said = run("outage", tempfile::tempdir().unwrap().path());
    for line in [
        "  put: Stored",
        "get thread-1: [\"hello\"], Fresh",
        "old\n",
        "get nobody knows: Unavailable: ",
        "  put: Queued",
        "get thread-2: [\"said in the outage\"], Queued",
        "breaker Some(Open), 1 writes queued",
        "get thread-2: [\"said in the outage\"], Fresh",
        "get nobody knows: there is none",
        "stopped, 0 writes left",
    ] {
        assert!(said.contains(line), "{line:?} is missing in:\n{said}");
    }
}

#[test]
fn custom_store_keeps_the_contract() {
    let said = run("custom_store", tempfile::tempdir().unwrap().path());
    assert_eq!(said, "the journal keeps the contract\nafter a restart: [\"hello\"]\n");
}

#[test]
fn metrics_prints_what_was_counted() {
    let said = run("metrics", tempfile::tempdir().unwrap().path());
    assert!(said.contains("threadkeep_reads_total{outcome=\"absent\"} 1"), "{said}");
}

#[test]
fn no_example_is_forgotten() {
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")).unwrap() {
        let name = entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned();
        assert!(HERE.contains(&&*name) || ELSEWHERE.contains(&&*name), "no test runs {name}");
    }
}
