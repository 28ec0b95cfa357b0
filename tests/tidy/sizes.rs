//! The sizes of files and functions, and the names of types.

use std::collections::BTreeMap;

use super::{code, read, rust_files, shown};

#[test]
fn source_files_stay_small() {
    let mut large = Vec::new();
    for file in rust_files("src").into_iter().chain(rust_files("cli/src")) {
        let lines = read(&file).lines().count();
        assert!(lines <= 500, "{} has {lines} lines", shown(&file));
        if lines > 400 {
            large.push(format!("{} ({lines})", shown(&file)));
        }
    }
    assert!(large.len() <= 3, "files over 400 lines: {large:?}");
}

#[test]
fn functions_have_sixty_lines_at_most() {
    for file in rust_files("src").into_iter().chain(rust_files("cli/src")) {
        let text = read(&file);
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let body = line.trim_start();
            let is_fn = body.starts_with("fn ")
                || (body.starts_with("pub") || body.starts_with("async ")) && body.contains(" fn ");
            if !is_fn || body.starts_with("//") || body.ends_with(';') {
                continue;
            }
            let indent = &line[..line.len() - body.len()];
            let end = format!("{indent}}}");
            let length = lines[at..].iter().position(|line| *line == end).map_or(0, |end| end + 1);
            assert!(length <= 60, "{}:{}: a function of {length} lines", shown(&file), at + 1);
        }
    }
}

/// A name has one meaning in a crate.
#[test]
fn types_have_distinct_names_in_each_crate() {
    for folder in ["src", "cli/src"] {
        let mut places = BTreeMap::<String, Vec<String>>::new();
        for file in rust_files(folder) {
            for line in code(&read(&file)).lines() {
                // Types inside a function, such as the request of one database function, are local.
                if line.starts_with(' ') {
                    continue;
                }
                let words: Vec<&str> = line.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
                let at = words.iter().position(|word| matches!(*word, "struct" | "enum" | "trait"));
                if let Some(name) = at.and_then(|at| words.get(at + 1)).filter(|name| !name.is_empty()) {
                    places.entry((*name).to_owned()).or_default().push(shown(&file));
                }
            }
        }
        for (name, places) in places {
            assert!(places.len() == 1, "{name} is the name of several types: {places:?}");
        }
    }
}
