//! The project's URL: its check, its origin, and the address of the database functions.

use reqwest::Url;

use crate::error::{Error, ErrorKind, Result};

pub(crate) fn check_url(url: &str) -> Result<()> {
    functions_url(url).map(drop).map_err(|problem| {
        Error::new(ErrorKind::Config, problem).with_remedy("use a URL like https://PROJECT.supabase.co")
    })
}

pub(super) fn origin(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Returns the origin of a project's URL: the host, with the port if the URL has one.
///
/// An outage file is marked with the origin of its project. Returns `None` if the text is no URL of a project.
///
/// ```
/// use threadkeep::tools::origin_of;
///
/// assert_eq!(origin_of("https://abc.supabase.co").as_deref(), Some("abc.supabase.co"));
/// assert_eq!(origin_of("http://127.0.0.1:54321/rest/v1").as_deref(), Some("127.0.0.1:54321"));
/// assert_eq!(origin_of("abc"), None);
/// ```
pub fn origin_of(url: &str) -> Option<String> {
    functions_url(url).ok().map(|url| origin(&url))
}

/// Returns the address of the database functions, or the problem of the URL.
///
/// The problem does not repeat the URL, which may hold a secret.
pub(super) fn functions_url(url: &str) -> Result<Url, &'static str> {
    let mut parsed = Url::parse(url.trim()).map_err(|_| "is not a URL")?;
    if !matches!(parsed.scheme(), "http" | "https") || parsed.host_str().is_none() {
        return Err("does not start with https:// and name a host");
    }
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err("contains a user or a password");
    }
    parsed.set_query(None);
    parsed.set_fragment(None);
    // Both the project's URL and the URL of its REST API are common.
    let base = parsed.path().trim_end_matches('/').trim_end_matches("/rest/v1").to_owned();
    parsed.set_path(&format!("{base}/rest/v1/rpc"));
    Ok(parsed)
}

pub(super) fn is_unencrypted(url: &Url) -> bool {
    let is_local = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
    url.scheme() == "http" && !is_local
}
