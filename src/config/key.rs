//! The Supabase key in a file. When Supabase rejects the key, the key provider reads the file again.

use std::path::{Path, PathBuf};

use super::{dotenv, invalid};
use crate::error::{Error, Result};
use crate::store::supabase::KeyProvider;

/// The settings that can hold the key, in the order of precedence. The last two are Supabase's own names.
pub(super) const NAMES: [&str; 4] = [NAME, FILE, SECRET, SERVICE_ROLE];
pub(super) const NAME: &str = "SUPABASE_KEY";
pub(super) const FILE: &str = "SUPABASE_KEY_FILE";
pub(super) const SECRET: &str = "SUPABASE_SECRET_KEY";
pub(super) const SERVICE_ROLE: &str = "SUPABASE_SERVICE_ROLE_KEY";

/// A limit above the length of any key. It also bounds the read of a device without an end (I12).
const MAX_KEY_FILE_BYTES: u64 = 16 << 10;

/// Reads the key from a file that holds nothing else. Returns the key and a provider that reads the file again.
///
/// # Errors
/// An error if the file cannot be read or is too large. The message does not repeat the path, because a user may
/// have put the key itself into the wrong setting.
pub(super) fn from_file(path: &str) -> Result<(String, KeyProvider)> {
    let path = absolute(path.as_ref());
    let key = read(&path)?;
    let warn = |error: &Error| {
        tracing::warn!("key renewal: SUPABASE_KEY_FILE {}; the old key stays in use", error.message());
    };
    Ok((key, KeyProvider::new(move || read(&path).inspect_err(warn).ok())))
}

/// Returns a provider that reads the variable `name` again from a file such as `.env`.
///
/// A missing variable counts as an empty key. The credentials reject an empty key and log it.
pub(super) fn from_dotenv(path: &Path, name: &'static str) -> KeyProvider {
    let path = absolute(path);
    let warn = |error: &Error| {
        tracing::warn!("key renewal: the file of settings {}; the old key stays in use", error.message());
    };
    KeyProvider::new(move || {
        let (vars, errors) = dotenv::read(&path);
        errors.iter().for_each(warn);
        // The last line of a name wins, as in `Builder::from_vars`.
        let key = || vars.into_iter().rfind(|(var, _)| var == name).map(|(_, key)| key).unwrap_or_default();
        errors.is_empty().then(key)
    })
}

/// Returns a path that stays valid after the process changes its working directory.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}

/// Reads the key. Bytes that are not UTF-8 become replacement characters, and `check_key` rejects these later.
fn read(path: &Path) -> Result<String> {
    let bytes = dotenv::read_prefix(path, MAX_KEY_FILE_BYTES + 1).map_err(|e| {
        invalid(format!("names a file that cannot be read ({e})"), "use a file that holds the key")
    })?;
    if bytes.len() as u64 > MAX_KEY_FILE_BYTES {
        return Err(invalid("names a file larger than any key", "use a file that holds only the key"));
    }
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}
