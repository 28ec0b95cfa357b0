//! The log lines that OPERATIONS.md explains.

// Each test binary compiles this module for itself and uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::Path;

/// Stands for the inserted values of a message.
const ANYTHING: char = '…';

/// Returns the messages of the section "Log lines", from the first cell of each row.
pub fn explained() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("OPERATIONS.md");
    let text = std::fs::read_to_string(path).unwrap();
    let section = text.split("\n## Log lines").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    section.lines().filter_map(|line| message(line.strip_prefix("| ")?.split_once(" | ")?.0)).collect()
}

/// Returns the text in backticks. A message with backticks has two of them on each side.
fn message(cell: &str) -> Option<String> {
    let fence = if cell.starts_with("``") { "``" } else { "`" };
    Some(cell.strip_prefix(fence)?.strip_suffix(fence)?.trim().to_owned())
}

/// Tells whether a message matches a pattern, in which `…` stands for any text.
pub fn is_like(text: &str, pattern: &str) -> bool {
    let mut rest = text;
    pattern.split(ANYTHING).all(|part| match rest.find(part) {
        Some(at) => {
            rest = &rest[at + part.len()..];
            true
        }
        None => false,
    })
}

/// Returns each warning and error of a log from its message on.
fn alarming(log: &str) -> impl Iterator<Item = &str> {
    let level = |line: &'_ str| {
        [" WARN ", "ERROR "].iter().find_map(|level| line.find(level).map(|at| at + level.len()))
    };
    log.lines().filter_map(move |line| Some(&line[level(line)?..]))
}

/// Returns the warnings and errors that OPERATIONS.md does not explain.
pub fn unexplained(log: &str) -> Vec<String> {
    let explained = explained();
    let is_unexplained = |line: &&str| !explained.iter().any(|pattern| is_like(line, pattern));
    alarming(log).filter(is_unexplained).map(str::to_owned).collect()
}

/// Counts the explained warnings and errors of a log.
pub fn tally(log: &str) -> String {
    let explained = explained();
    let mut counts = BTreeMap::<&str, usize>::new();
    for line in alarming(log) {
        if let Some(pattern) = explained.iter().find(|pattern| is_like(line, pattern)) {
            *counts.entry(pattern).or_default() += 1;
        }
    }
    let counts: Vec<String> = counts.iter().map(|(pattern, count)| format!("{count} × {pattern}")).collect();
    counts.join("; ")
}
