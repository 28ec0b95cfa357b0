//! The public API: few names at the crate root, and an example for each method.

use super::{read, root, rust_files, shown};

/// Counts the types that a `pub use` exports. Modules have lower-case names.
fn exported(line: &str) -> usize {
    let names = line.trim_end_matches([';', '}']).rsplit("::").next().unwrap();
    let is_type = |name: &&str| name.trim_matches([' ', '{']).starts_with(char::is_uppercase);
    names.split(',').filter(is_type).count()
}

#[test]
fn crate_root_has_27_names_at_most() {
    let text = read(&root("src/lib.rs")).replace("{\n", "{").replace(",\n", ",");
    let names: usize = text.lines().filter(|line| line.starts_with("pub use ")).map(exported).sum();
    assert!(names <= 27, "{names} names");
}

/// Methods of a trait implementation are documented by the trait.
#[test]
fn public_methods_have_an_example() {
    let mut without = Vec::new();
    for file in rust_files("src") {
        let text = read(&file);
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let is_public = ["pub fn ", "pub async fn ", "pub const fn "]
                .iter()
                .any(|start| line.trim_start().starts_with(start));
            if !is_public {
                continue;
            }
            let docs = lines[..at].iter().rev().map(|line| line.trim_start());
            let docs = docs.take_while(|line| line.starts_with("///") || line.starts_with("#["));
            let has_example =
                docs.clone().any(|line| line.starts_with("/// ```") || line.contains("for an example"));
            if !has_example {
                without.push(format!("{}:{}: {}", shown(&file), at + 1, line.trim()));
            }
        }
    }
    assert!(without.is_empty(), "{} public methods have no example:\n{}", without.len(), without.join("\n"));
}
