//! The English of comments and documents, by the rules of the style guide.
//!
//! A free relative ("what was queued", "whoever asks", "where it is open") stands in place of a named subject. Six model
//! codebases have 0.0 to 0.3 % of them.

use std::path::{Path, PathBuf};

use super::{files, read, root, rust_files, shown};

const DOCUMENTS: [&str; 7] = [
    "README.md",
    "DESIGN.md",
    "OPERATIONS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benches/RESULTS.md",
    "benches/PLANS.md",
];

/// Words that the glossary replaces.
const REPLACED: [&str; 14] = [
    "spool",
    "stove",
    "errand",
    "antidote",
    "blindness",
    "lamp",
    "fences",
    "patience",
    "truth",
    "crumbs",
    "overtaken",
    "straighten",
    "whence",
    "keyring",
];

/// The second words that make a free relative of the first.
const FREE_RELATIVES: [(&str, &[&str]); 6] = [
    (
        "what",
        &[
            "was", "is", "were", "a", "an", "the", "it", "they", "wait", "waits", "came", "comes", "goes",
            "has", "had", "other", "others",
        ],
    ),
    ("whatever", &["is", "was", "may"]),
    ("who", &["hears", "asks", "comes", "starts", "waits", "is", "was", "had", "has"]),
    (
        "where",
        &[
            "it", "there", "that", "nobody", "somebody", "one", "another", "the", "a", "none", "nothing",
            "they",
        ],
    ),
    ("one's", &["own"]),
    ("whoever", &[]),
];

const MAX_WORDS: usize = 30;

/// Collects paragraphs, then splits them into sentences of three words or more.
fn sentences(path: &Path) -> Vec<String> {
    let is_rust = path.extension().is_some_and(|extension| extension == "rs");
    let (mut sentences, mut paragraph, mut is_code) = (Vec::new(), String::new(), false);
    for line in read(path).lines() {
        let text = match is_rust {
            true => line.trim_start().strip_prefix("//").map(|text| text.trim_start_matches(['/', '!'])),
            false => Some(line),
        };
        let Some(text) = text else {
            split(&mut paragraph, &mut sentences);
            continue;
        };
        let text = text.trim();
        if text.starts_with("```") {
            is_code = !is_code;
        }
        let is_apart = text.is_empty() || text.starts_with(['#', '|']) || text.starts_with("```");
        let is_item = text.starts_with("- ")
            || text.starts_with("* ")
            || text.starts_with(|c: char| c.is_ascii_digit()) && text.contains(". ");
        if is_apart || is_item {
            split(&mut paragraph, &mut sentences);
        }
        if !is_apart && !is_code {
            paragraph.push_str(text.trim_start_matches(['-', '*', ' ']));
            paragraph.push(' ');
        }
    }
    split(&mut paragraph, &mut sentences);
    sentences
}

fn split(paragraph: &mut String, sentences: &mut Vec<String>) {
    let (mut sentence, mut words) = (String::new(), paragraph.split_whitespace().peekable());
    while let Some(word) = words.next() {
        sentence.push_str(word);
        sentence.push(' ');
        let ends = word.ends_with(['.', '!', '?', ':', ';']);
        let begins = words
            .peek()
            .is_none_or(|next| next.starts_with(|c: char| c.is_uppercase() || "`[*(".contains(c)));
        if ends && begins {
            sentences.push(std::mem::take(&mut sentence));
        }
    }
    sentences.push(sentence);
    sentences.retain(|sentence| sentence.split_whitespace().count() > 2);
    paragraph.clear();
}

fn has_free_relative(sentence: &str) -> bool {
    let trim = |word: &str| word.trim_matches(|c: char| !c.is_alphanumeric() && c != '\'').to_lowercase();
    let words: Vec<String> = sentence.split_whitespace().map(trim).collect();
    FREE_RELATIVES.iter().any(|(first, seconds)| {
        let mut starts = words.iter().enumerate().filter(|(_, word)| word == first);
        starts.any(|(at, _)| {
            seconds.is_empty() || words.get(at + 1).is_some_and(|next| seconds.contains(&next.as_str()))
        })
    })
}

/// Checks that at most `percent` of the sentences fail, and shows those that do.
fn check(paths: &[PathBuf], percent: f64, fails: impl Fn(&str) -> bool, rule: &str) {
    let (mut count, mut failing) = (0, Vec::new());
    for path in paths {
        for sentence in sentences(path) {
            count += 1;
            if fails(&sentence) {
                failing.push(format!("{}: {sentence}", shown(path)));
            }
        }
    }
    let share = 100.0 * failing.len() as f64 / f64::from(count);
    assert!(
        share <= percent,
        "{rule}: {share:.2} % of {count} sentences, {percent} % at most\n{}",
        failing.join("\n")
    );
}

fn comments() -> Vec<PathBuf> {
    ["src", "cli", "tests", "benches", "examples"].into_iter().flat_map(rust_files).collect()
}

fn documents() -> Vec<PathBuf> {
    DOCUMENTS.into_iter().map(root).chain(files("guide", &["md"])).collect()
}

fn is_long(sentence: &str) -> bool {
    sentence.split_whitespace().count() > MAX_WORDS
}

#[test]
fn comments_name_their_subjects() {
    check(&comments(), 1.0, has_free_relative, "free relatives in comments");
}

#[test]
fn comments_are_short_sentences() {
    check(&comments(), 1.0, is_long, "sentences over 30 words in comments");
}

#[test]
fn documents_name_their_subjects() {
    check(&documents(), 2.0, has_free_relative, "free relatives in documents");
}

#[test]
fn documents_are_short_sentences() {
    check(&documents(), 2.0, is_long, "sentences over 30 words in documents");
}

#[test]
fn code_and_documents_use_the_glossary() {
    let sources = ["src", "cli/src", "examples"].into_iter().flat_map(rust_files);
    for path in sources.chain(documents()) {
        for (at, line) in read(&path).lines().enumerate() {
            let is_word = |c: char| !c.is_alphanumeric();
            let found =
                line.split(is_word).map(str::to_lowercase).find(|word| REPLACED.contains(&word.as_str()));
            assert!(
                found.is_none(),
                "{}:{}: the glossary has another word for {found:?}",
                shown(&path),
                at + 1
            );
        }
    }
}

#[test]
fn free_relatives_are_recognised() {
    for sentence in
        ["Drops what was queued.", "Whoever asks is told.", "Fails where it is open.", "It is one's own."]
    {
        assert!(has_free_relative(sentence), "{sentence}");
    }
    for sentence in ["Says what to do.", "Asks who holds the lock.", "See where to look."] {
        assert!(!has_free_relative(sentence), "{sentence}");
    }
}
