//! The folders of `src`: each uses only the folders before it, and each neighbour crate is known in one folder.

use super::{code, read, root, rust_files};

/// The order of the folders. `error` is open to all.
const ORDER: [&str; 10] =
    ["model", "observe", "resilience", "sqlite", "store", "testing", "outage", "cache", "config", "lib"];

/// Returns the code of each folder, under its name.
fn folders() -> Vec<(String, String)> {
    let mut folders: Vec<(String, String)> = Vec::new();
    for file in rust_files("src") {
        let inside = file.strip_prefix(root("src")).unwrap().with_extension("");
        let name = inside.iter().next().unwrap().to_str().unwrap().to_owned();
        let code = code(&read(&file));
        match folders.iter_mut().find(|(folder, _)| *folder == name) {
            Some((_, text)) => text.push_str(&code),
            None => folders.push((name, code)),
        }
    }
    folders
}

#[test]
fn folders_use_only_folders_before_them() {
    for (name, code) in folders().iter().filter(|(name, _)| name != "lib" && name != "error") {
        let at = ORDER.iter().position(|folder| folder == name);
        let at = at.unwrap_or_else(|| panic!("src/{name} has no place in the order of the folders"));
        for (found, _) in code.match_indices("crate::") {
            let used: String =
                code[found + 7..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let is_allowed = used == "error"
                || used == "Result"
                || ORDER.iter().position(|folder| *folder == used).is_some_and(|before| before <= at);
            assert!(is_allowed, "src/{name} uses crate::{used}, which comes after it");
        }
    }
}

#[test]
fn root_of_src_has_ten_folders_at_most() {
    let names = folders().into_iter().map(|(name, _)| name).filter(|name| name != "lib" && name != "error");
    assert!(names.count() <= 10);
}

#[test]
fn neighbour_crates_are_known_in_one_folder() {
    for (word, homes) in [
        ("reqwest", &["store"][..]),
        ("rusqlite", &["sqlite", "store", "outage"]),
        ("failsafe::", &["resilience"]),
        ("moka::", &["cache"]),
        ("metrics_exporter_prometheus", &["observe"]),
        ("env::vars", &["config"]),
        ("dotenvy", &["config"]),
        ("SystemTime::now", &["model"]),
        ("nix::time", &["model"]),
        ("tokio::time::timeout", &["store"]),
    ] {
        for (name, code) in folders() {
            let is_home = homes.contains(&name.as_str());
            assert!(is_home || !code.contains(word), "src/{name} knows {word}, which belongs to {homes:?}");
        }
    }
}
