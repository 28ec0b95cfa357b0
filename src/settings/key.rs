//! The Supabase key where it comes from a file: it is read anew when Supabase refuses it.

use std::path::{Path, PathBuf};

use super::dotenv;
use crate::supabase::KeySource;

/// The settings that a key can come from, in the order in which they are taken. The last two are names that Supabase
/// itself gives it.
pub(super) const NAMES: [&str; 4] = [NAME, FILE, SECRET, SERVICE_ROLE];
pub(super) const NAME: &str = "SUPABASE_KEY";
pub(super) const FILE: &str = "SUPABASE_KEY_FILE";
pub(super) const SECRET: &str = "SUPABASE_SECRET_KEY";
pub(super) const SERVICE_ROLE: &str = "SUPABASE_SERVICE_ROLE_KEY";

/// No key is as long.
const MOST: u64 = 16 << 10;

/// The key in a file with nothing else in it, and how to read it anew. An error does not repeat the path: it may be a key
/// that was put into the wrong setting.
pub(super) fn of_file(path: &str) -> Result<(String, KeySource), String> {
    let path = lasting(path.as_ref());
    let key = read(&path)?;
    let warn = |wrong: &String| tracing::warn!("no new key from SUPABASE_KEY_FILE: {wrong}");
    Ok((key, KeySource::new(move || read(&path).inspect_err(warn).ok())))
}

/// How to read the key of that name anew from a file such as `.env`. One that is gone counts as empty.
pub(super) fn of_dotenv(path: &Path, name: &'static str) -> KeySource {
    let path = lasting(path);
    let key = move |vars: Vec<(String, String)>| vars.into_iter().rfind(|(set, _)| set == name);
    let warn = |wrong: &String| tracing::warn!("no new key from the file of settings: {wrong}");
    KeySource::new(move || {
        let vars = dotenv::read(&path).inspect_err(warn).ok()?;
        Some(key(vars).map(|(_, key)| key).unwrap_or_default())
    })
}

/// The path, also after the process has changed its directory.
fn lasting(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}

/// What is not UTF-8 is no key; its replacement characters tell whoever parses it.
fn read(path: &Path) -> Result<String, String> {
    let bytes = dotenv::read_some(path, MOST + 1)
        .map_err(|e| format!("the file cannot be read ({e}); use one that holds the key"))?;
    if bytes.len() as u64 > MOST {
        return Err("the file is larger than any key; use one that holds the key alone".into());
    }
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}
