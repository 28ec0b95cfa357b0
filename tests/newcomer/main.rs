//! Follows the README as a new user: a new crate builds and runs each snippet, and the daemon answers the request.
//!
//! The test takes all code from the README, so that the README cannot become wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

#[path = "../daemon/process.rs"]
mod process;
#[path = "../stack/mod.rs"]
mod stack;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use process::Daemon;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Returns the README's code blocks in this language.
fn blocks(language: &str) -> Vec<String> {
    let readme = fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let fences = readme.split("\n```").skip(1).step_by(2);
    let is_in = |info: &str| info.split(',').next() == Some(language);
    let block = |fence: &str| fence.split_once('\n').map(|(info, code)| (info.to_owned(), code.to_owned()));
    fences.filter_map(block).filter(|(info, _)| is_in(info)).map(|(_, code)| code).collect()
}

/// Creates a crate with the README's dependencies and a program for each snippet.
fn new_crate(folder: &Path, snippets: &[String]) {
    let dependencies = blocks("toml").into_iter().find(|block| block.contains("[dependencies]"));
    let dependencies = dependencies.expect("the README says what to put into Cargo.toml");
    let path = "path = \"../threadkeep\"";
    assert!(dependencies.contains(path), "{dependencies}");
    let dependencies = dependencies.replace(path, &format!("path = {ROOT:?}"));
    let package = "[package]\nname = \"newcomer\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n";
    fs::write(folder.join("Cargo.toml"), format!("{package}{dependencies}\n[workspace]\n")).unwrap();
    // The lock file of this project avoids the network.
    fs::copy(Path::new(ROOT).join("Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    fs::create_dir_all(folder.join("src/bin")).unwrap();
    for (at, snippet) in snippets.iter().enumerate() {
        fs::write(folder.join(format!("src/bin/snippet_{at}.rs")), snippet).unwrap();
    }
}

/// Returns the target folder of this test, so that cargo builds no dependency twice.
fn target() -> PathBuf {
    std::env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned()
}

fn succeed(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (said, complained) = (String::from_utf8(stdout).unwrap(), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}:\n{said}\n{complained}");
    said
}

#[test]
fn readme_snippets_build_and_run() {
    let (folder, snippets) = (tempfile::tempdir().unwrap(), blocks("rust"));
    assert!(!snippets.is_empty());
    new_crate(folder.path(), &snippets);
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--offline", "--target-dir"]).arg(target()).current_dir(folder.path());
    succeed(&mut build);
    for (at, snippet) in snippets.iter().enumerate() {
        let program = target().join(format!("debug/snippet_{at}"));
        let said = succeed(Command::new(program).current_dir(folder.path()).env_clear());
        assert!(!said.is_empty(), "snippet {at} prints nothing:\n{snippet}");
    }
    assert!(folder.path().join("threadkeep.db").exists(), "the default settings store conversations");
}

#[tokio::test(flavor = "multi_thread")]
async fn daemon_answers_the_readme_request() {
    let daemon = Daemon::start(&[]).await;
    let shell = blocks("sh");
    let block = shell.iter().find(|block| block.starts_with("curl ")).expect("a request by curl");
    let (command, answer) = block.split_once("\n# ").unwrap();
    let command = command.replace("localhost:8080", daemon.addr());
    let said = tokio::task::block_in_place(|| succeed(Command::new("sh").args(["-c", &command])));
    let (before, after) = answer.trim().split_once('…').unwrap();
    assert!(said.starts_with(before) && said.trim().ends_with(after), "{said}");
}
