//! Documents against the code.

use std::fs;
use std::path::Path;

use threadkeep::metrics::SERIES;
use threadkeep::tools::SETTINGS;

use super::{files, read, root, rust_files, shown};

const DOCUMENTS: [&str; 5] = ["README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "OPERATIONS.md"];

/// Compares a document, or replaces it if the caller asks for that.
fn compare(path: &Path, expected: &str) {
    if std::env::var_os("THREADKEEP_BLESS").is_some() {
        fs::write(path, expected).unwrap();
    }
    let actual = fs::read_to_string(path).unwrap_or_default();
    assert!(actual == expected, "{} differs from the tables; THREADKEEP_BLESS=1 writes it", shown(path));
}

#[test]
fn env_example_has_all_settings() {
    let mut text = "# Settings of threadkeep, each with its default. Copy this file to .env and change it.\n# A $ in a value begins the name of a variable, unless the value is in single quotes.\n".to_owned();
    for setting in SETTINGS {
        text += &format!("\n# {}\n# {}={}\n", setting.description, setting.name, setting.default);
    }
    text += "\n# the address of the example daemon\n# DAEMON_ADDR=127.0.0.1:8080\n";
    compare(&root(".env.example"), &text);
}

#[test]
fn readme_lists_all_settings() {
    let path = root("README.md");
    let readme = read(&path);
    let (before, rest) = readme.split_once("| variable | default | for |\n|---|---|---|\n").unwrap();
    let after = rest.split_once("\n\n").unwrap().1;
    let code = |text: &str| if text.is_empty() { String::new() } else { format!("`{text}`") };
    let row = |setting: &threadkeep::tools::Setting| {
        format!("| `{}` | {} | {} |\n", setting.name, code(setting.default), setting.description)
    };
    let rows: String = SETTINGS.iter().map(row).collect();
    compare(&path, &format!("{before}| variable | default | for |\n|---|---|---|\n{rows}\n{after}"));
}

#[test]
fn documentation_lists_all_series() {
    let mut text = "| series | kind | unit | labels | meaning |\n|---|---|---|---|---|\n".to_owned();
    for series in SERIES {
        let label = series.label.map(|(label, values)| format!("`{label}`: {}", values.join(", ")));
        let (name, kind, unit, label) = (series.name, series.kind, series.unit, label.unwrap_or_default());
        text += &format!("| `{name}` | {kind} | {unit} | {label} | {} |\n", series.help);
    }
    compare(&root("src/observe/series.md"), &text);
}

#[test]
fn documents_name_files_that_exist() {
    for document in DOCUMENTS {
        let text = read(&root(document));
        for rest in text.split("](").skip(1) {
            let link = rest.split(')').next().unwrap().split('#').next().unwrap();
            assert!(link.starts_with("http") || root(link).exists(), "{document} links to {link}");
        }
        for quoted in text.split('`').skip(1).step_by(2) {
            let is_path =
                ["src/", "cli/", "tests/", "migrations/"].iter().any(|start| quoted.starts_with(start));
            let path = quoted.split_whitespace().next().unwrap_or_default();
            assert!(!is_path || path.contains('*') || root(path).exists(), "{document} names {quoted}");
        }
    }
}

/// `supabase db push` reads one folder, and reports success if that folder has nothing for it.
#[test]
fn documents_about_db_push_name_its_needs() {
    let documents = DOCUMENTS.into_iter().chain([".env.example"]).map(root);
    let sources = rust_files("src").into_iter().chain(rust_files("cli/src"));
    for file in documents.chain(files("guide", &["md"])).chain(sources) {
        let text = read(&file);
        let needs = ["migrations --dir supabase/migrations", "supabase db push --include-all"];
        let is_complete = !text.contains("supabase db push") || needs.iter().all(|need| text.contains(need));
        // The command itself gets its folder by an argument.
        let is_command = file.ends_with("cli/src/migrations.rs");
        assert!(is_complete || is_command, "{} does not name all of {needs:?}", shown(&file));
    }
}
