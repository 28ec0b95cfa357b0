//! What holds the tree in order: the layers, who may know what, and that documents say what the code does.
//!
//! `THREADKEEP_BLESS=1 cargo test --all-features --test tidy` writes `.env.example`, the README's table and that of the series anew.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use threadkeep::SETTINGS;
use threadkeep::metrics::SERIES;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, mut files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    files.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
    files.extend(folders.iter().flat_map(|folder| rust_files(folder)));
    files
}

/// The code of each module of the crate, without comments, by the module's name.
fn modules() -> BTreeMap<String, String> {
    let mut modules = BTreeMap::<String, String>::new();
    // The command line is a crate of its own, which sees what is public.
    for file in rust_files(&root("src")).into_iter().filter(|file| !file.starts_with(root("src/bin"))) {
        let inside = file.strip_prefix(root("src")).unwrap().with_extension("");
        let name = inside.iter().next().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&file).unwrap();
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        modules.entry(name).or_default().extend(code.flat_map(|line| [line, "\n"]));
    }
    modules
}

#[test]
fn modules_use_only_those_before_them() {
    let modules = modules();
    let order: Vec<&str> = modules["lib"]
        .lines()
        .filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
        .collect();
    assert_eq!(order.len() + 1, modules.len(), "lib.rs names each module: {order:?}");
    for (at, name) in order.iter().enumerate() {
        for used in modules[*name].match_indices("crate::").map(|(found, _)| &modules[*name][found + 7..]) {
            let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let before = order.iter().position(|module| *module == used);
            assert!(
                before.is_some_and(|before| before <= at),
                "{name} uses crate::{used}, which comes after it"
            );
        }
    }
}

#[test]
fn each_neighbour_is_known_in_one_place() {
    for (word, home) in [
        ("reqwest", "supabase"),
        ("rusqlite", "local"),
        ("failsafe::", "breaker"),
        ("moka::", "near"),
        ("metrics_exporter_prometheus", "prometheus"),
        ("env::vars", "settings"),
        ("dotenvy", "settings"),
        ("SystemTime::now", "version"),
        ("nix::time", "version"),
        ("tokio::time::timeout", "guard"),
    ] {
        for (name, code) in modules().iter().filter(|(name, _)| *name != home) {
            assert!(!code.contains(word), "{name} knows {word}, which is {home}'s");
        }
        assert!(modules()[home].contains(word), "{home} does not know {word} any more");
    }
}

/// Replaces a document where the caller asks for it, and compares it where not.
fn compare(path: &Path, expected: &str) {
    if std::env::var_os("THREADKEEP_BLESS").is_some() {
        fs::write(path, expected).unwrap();
    }
    let actual = fs::read_to_string(path).unwrap_or_default();
    assert!(
        actual == expected,
        "{} is not what the tables say; THREADKEEP_BLESS=1 writes it",
        path.display()
    );
}

#[test]
fn env_example_has_all_settings() {
    let mut text = "# Settings of threadkeep, each with what holds when it is unset. Copy this file to .env and change it.\n# A $ in a value begins the name of a variable, which it stands for, unless the value is in single quotes.\n".to_owned();
    for setting in SETTINGS {
        text += &format!("\n# {}\n# {}={}\n", setting.what, setting.name, setting.default);
    }
    text += "\n# where the example daemon listens\n# DAEMON_ADDR=127.0.0.1:8080\n";
    compare(&root(".env.example"), &text);
}

#[test]
fn the_readme_lists_all_settings() {
    let path = root("README.md");
    let readme = fs::read_to_string(&path).unwrap();
    let (before, rest) = readme.split_once("| variable | default | for |\n|---|---|---|\n").unwrap();
    let after = rest.split_once("\n\n").unwrap().1;
    let code = |text: &str| if text.is_empty() { String::new() } else { format!("`{text}`") };
    let rows: String = SETTINGS
        .iter()
        .map(|setting| format!("| `{}` | {} | {} |\n", setting.name, code(setting.default), setting.what))
        .collect();
    compare(&path, &format!("{before}| variable | default | for |\n|---|---|---|\n{rows}\n{after}"));
}

#[test]
fn the_documentation_lists_all_series() {
    let mut text = "| series | kind | unit | labels | says |\n|---|---|---|---|---|\n".to_owned();
    for series in SERIES {
        let label = series.label.map(|(label, values)| format!("`{label}`: {}", values.join(", ")));
        let (name, kind, unit, label) = (series.name, series.kind, series.unit, label.unwrap_or_default());
        text += &format!("| `{name}` | {kind} | {unit} | {label} | {} |\n", series.what);
    }
    compare(&root("src/metrics/series.md"), &text);
}

#[test]
fn documents_name_files_that_are_there() {
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "OPERATIONS.md"] {
        let text = fs::read_to_string(root(document)).unwrap();
        for (_, link) in text.split("](").skip(1).map(|rest| ((), rest.split(')').next().unwrap())) {
            assert!(link.starts_with("http") || root(link).exists(), "{document} links to {link}");
        }
        for quoted in text.split('`').skip(1).step_by(2) {
            let is_path = quoted.starts_with("src/")
                || quoted.starts_with("tests/")
                || quoted.starts_with("migrations/");
            let path = quoted.split_whitespace().next().unwrap_or_default();
            assert!(!is_path || path.contains('*') || root(path).exists(), "{document} names {quoted}");
        }
    }
}

/// `supabase db push` reads one folder, and reports success if that has nothing for it.
#[test]
fn documents_that_name_db_push_say_what_it_needs() {
    let guide = fs::read_dir(root("src/guide")).unwrap().map(|entry| entry.unwrap().path());
    let of_root =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "OPERATIONS.md", ".env.example"].map(root);
    for file in guide.chain(of_root).chain(rust_files(&root("src"))) {
        let text = fs::read_to_string(&file).unwrap();
        let needed = ["migrations --dir supabase/migrations", "supabase db push --include-all"];
        let says = !text.contains("supabase db push") || needed.iter().all(|part| text.contains(part));
        // The command itself is told of its folder by an argument.
        let is_command = file.ends_with("src/bin/threadkeep/migrations.rs");
        assert!(says || is_command, "{} does not say all of {needed:?}", file.display());
    }
}

#[test]
fn every_direct_dependency_is_justified() {
    let manifest = fs::read_to_string(root("Cargo.toml")).unwrap();
    let text = fs::read_to_string(root("ARCHITECTURE.md")).unwrap();
    let section = manifest.split("[dependencies]").nth(1).unwrap().split("\n[").next().unwrap();
    for name in section.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name) {
        assert!(text.contains(&format!("| `{name}` |")), "ARCHITECTURE.md does not say why there is {name}");
    }
}

/// What a daemon gets that depends on threadkeep with these features.
fn tree(features: &[&str]) -> Vec<String> {
    let mut cargo = std::process::Command::new(env!("CARGO"));
    cargo.args(["tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}"]);
    let output = cargo.args(features).current_dir(root("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let name = |line: &str| line.split(" (").next().unwrap().to_owned();
    let mut names: Vec<String> = text.lines().map(name).collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn users_get_no_more_crates_than_the_architecture_says() {
    let text = fs::read_to_string(root("ARCHITECTURE.md")).unwrap();
    let sets = [(&["--no-default-features"][..], "| none |"), (&[], "| `sqlite` (default) |")];
    for (features, row) in sets {
        let names = tree(features);
        assert!(text.contains(&format!("{row} {} |", names.len())), "{row} has {} crates", names.len());
    }
    let testing = tree(&["--no-default-features", "--features", "testing"]);
    assert_eq!(testing, tree(&["--no-default-features"]));
    for name in tree(&["--features", "testing"]) {
        let only_for_tests = ["axum ", "clap ", "indicatif ", "tracing-subscriber "];
        assert!(!only_for_tests.iter().any(|unwanted| name.starts_with(unwanted)), "{name}");
    }
    let cli = tree(&["--features", "cli"]);
    assert!(text.contains(&format!("| `cli` | {} |", cli.len())), "`cli` has {} crates", cli.len());
    let prometheus = tree(&["--features", "prometheus"]);
    let row = format!("| `prometheus` | {} |", prometheus.len());
    assert!(text.contains(&row), "`prometheus` has {} crates", prometheus.len());
    assert!(!testing.iter().any(|name| name.starts_with("libsqlite3-sys")));
}
