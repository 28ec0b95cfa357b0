//! The dependencies of the library and of the command line.

use super::{read, root};

#[test]
fn each_direct_dependency_has_a_reason() {
    let text = read(&root("DESIGN.md"));
    for manifest in ["Cargo.toml", "cli/Cargo.toml"] {
        let manifest = read(&root(manifest));
        let section = manifest.split("\n[dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
        for name in section.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name) {
            let has_reason = name == "threadkeep" || text.contains(&format!("| `{name}` |"));
            assert!(has_reason, "DESIGN.md gives no reason for {name}");
        }
    }
}

/// Returns the crates that a dependent gets.
fn tree(arguments: &[&str]) -> Vec<String> {
    let mut cargo = std::process::Command::new(env!("CARGO"));
    cargo.args(["tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}"]);
    let output = cargo.args(arguments).current_dir(root("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let name = |line: &str| line.split(" (").next().unwrap().to_owned();
    let mut names: Vec<String> = text.lines().filter(|line| !line.is_empty()).map(name).collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn dependents_get_as_many_crates_as_documented() {
    let text = read(&root("DESIGN.md"));
    let library = ["-p", "threadkeep"];
    let sets = [
        (&library[..], "| the library |"),
        (&["-p", "threadkeep", "--features", "prometheus"], "| with `prometheus` |"),
        (&["-p", "threadkeep-cli"], "| the command line |"),
    ];
    for (arguments, row) in sets {
        let count = tree(arguments).len();
        assert!(text.contains(&format!("{row} {count} |")), "{row} has {count} crates");
    }
    assert_eq!(tree(&["-p", "threadkeep", "--features", "testing"]), tree(&library));
    for name in tree(&library) {
        let foreign = ["axum ", "clap ", "indicatif ", "rustix ", "tracing-subscriber "];
        assert!(!foreign.iter().any(|unwanted| name.starts_with(unwanted)), "{name}");
    }
}
