//! The items that OPERATIONS.md must explain.

use std::fs;
use std::path::{Path, PathBuf};

use threadkeep::metrics::SERIES;

use crate::lines::{explained, is_like};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(root(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Returns the Rust files below a folder, without unit tests.
fn sources(folder: &Path) -> Vec<String> {
    let entries: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let (folders, files): (Vec<_>, Vec<_>) = entries.into_iter().partition(|path| path.is_dir());
    let text = |file: &PathBuf| {
        fs::read_to_string(file).unwrap().split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned()
    };
    let is_rust = |file: &&PathBuf| {
        file.extension().is_some_and(|extension| extension == "rs") && !file.ends_with("tests.rs")
    };
    files.iter().filter(is_rust).map(text).chain(folders.iter().flat_map(|folder| sources(folder))).collect()
}

/// Returns the text of each `warn!` and `error!`, with `…` for each inserted value.
fn messages(code: &str) -> Vec<String> {
    let code = code.replace("\\\"", "'");
    let calls = ["tracing::warn!(", "tracing::error!("].iter().flat_map(|call| code.split(call).skip(1));
    let text = |call: &str| call.split('"').nth(1).unwrap().to_owned();
    let unbroken =
        |text: String| text.split_whitespace().filter(|word| *word != "\\").collect::<Vec<_>>().join(" ");
    calls.map(text).map(unbroken).map(|text| with_placeholders(&text)).collect()
}

fn with_placeholders(text: &str) -> String {
    let (first, rest) = text.split_once('{').unwrap_or((text, ""));
    let rest = rest.split('{').filter_map(|part| part.split_once('}'));
    std::iter::once(first.to_owned()).chain(rest.map(|(_, fixed)| format!("…{fixed}"))).collect()
}

#[test]
fn log_warnings_and_errors_are_explained() {
    let explained = explained();
    let code: Vec<String> =
        [root("src"), root("examples/daemon")].iter().flat_map(|path| sources(path)).collect();
    let said: Vec<String> = code.iter().flat_map(|code| messages(code)).collect();
    assert!(said.len() > 30, "the search finds too little: {said:#?}");
    for message in &said {
        assert!(explained.contains(message), "OPERATIONS.md, log lines: `{message}` is missing");
    }
    for pattern in &explained {
        let is_telling = pattern.split('…').any(|part| part.len() >= "because: ".len());
        assert!(is_telling, "`{pattern}` matches any text");
        assert!(said.contains(pattern), "OPERATIONS.md explains `{pattern}`, which no code logs");
    }
}

#[test]
fn log_line_matches_by_its_fixed_parts() {
    assert!(is_like("SUPABASE_KEY is set, but X is not: more", "… is set, but X is not"));
    assert!(!is_like("something else", "… is set, but X is not"));
}

/// Returns the variants of `ErrorKind` from the source.
fn error_kinds() -> Vec<String> {
    let code = read("src/error.rs");
    let names = code.split("Self::").skip(1).filter_map(|rest| rest.split_once(" => \""));
    names.filter(|(name, _)| name.chars().all(char::is_alphabetic)).map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn error_kinds_have_a_remedy() {
    let (page, kinds) = (read("OPERATIONS.md"), error_kinds());
    assert!(kinds.len() >= 14, "{kinds:?}");
    for kind in kinds {
        assert!(page.contains(&format!("\n| `{kind}` |")), "OPERATIONS.md, errors: {kind} is missing");
    }
}

#[test]
fn metric_series_are_explained() {
    let page = read("OPERATIONS.md");
    for series in SERIES {
        assert!(page.contains(&format!("\n| `{}` |", series.name)), "{} is missing", series.name);
    }
    for row in page.split("\n| `threadkeep_").skip(1).filter_map(|row| row.split('`').next()) {
        let name = format!("threadkeep_{row}");
        assert!(SERIES.iter().any(|series| series.name == name), "{name} is explained, but does not exist");
    }
}

/// Returns the anchor of a heading by GitHub's rules.
fn anchor(heading: &str) -> String {
    let kept = heading
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .collect::<String>();
    kept.replace(' ', "-")
}

#[test]
fn alerts_and_sections_match() {
    let (page, rules) = (read("OPERATIONS.md"), read("dashboards/alerts.yml"));
    let fields = |name: &str| -> Vec<String> {
        let field =
            |line: &str| Some(line.trim_start_matches([' ', '-']).strip_prefix(name)?.trim().to_owned());
        rules.lines().filter(|line| !line.starts_with('#')).filter_map(field).collect()
    };
    let section = page.split("\n## Alerts\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let headings: Vec<&str> = section.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    assert_eq!(fields("alert:"), headings);
    let anchors: Vec<String> =
        headings.iter().map(|heading| format!("OPERATIONS.md#{}", anchor(heading))).collect();
    assert_eq!(fields("runbook_url:"), anchors);
}
