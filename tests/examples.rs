//! Each example runs as a process and prints the expected lines.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::path::Path;
use std::process::Command;

/// Builds and runs an example in `directory` with an empty environment, and returns its output.
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
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{example}: {printed}\n{}", String::from_utf8_lossy(&output.stderr));
    printed
}

/// The examples that tests/daemon and tests/prometheus start.
const RUN_BY_OTHER_TESTS: [&str; 1] = ["daemon"];
const RUN_HERE: [&str; 4] = ["quickstart", "outage", "custom_store", "metrics"];

#[test]
fn quickstart_second_run_continues_the_first() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(run("quickstart", directory.path()), "Stored: [\"hello number 1\"]\n");
    let second = run("quickstart", directory.path());
    assert_eq!(second, "Stored: [\"hello number 1\",\"hello number 2\"]\n");
}

#[test]
fn outage_example_prints_each_stage() {
    let printed = run("outage", tempfile::tempdir().unwrap().path());
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
        assert!(printed.contains(line), "{line:?} is missing in:\n{printed}");
    }
}

#[test]
fn custom_store_example_passes_conformance() {
    let printed = run("custom_store", tempfile::tempdir().unwrap().path());
    assert_eq!(printed, "the journal keeps the contract\nafter a restart: [\"hello\"]\n");
}

#[test]
fn metrics_example_prints_the_counters() {
    let printed = run("metrics", tempfile::tempdir().unwrap().path());
    assert!(printed.contains("threadkeep_reads_total{outcome=\"absent\"} 1"), "{printed}");
}

#[test]
fn examples_are_all_run_by_a_test() {
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")).unwrap() {
        let name = entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned();
        assert!(RUN_HERE.contains(&&*name) || RUN_BY_OTHER_TESTS.contains(&&*name), "no test runs {name}");
    }
}
