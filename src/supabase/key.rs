//! The API key: which kind it is, how it is sent, and what to advise when it is refused.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

const APIKEY: HeaderName = HeaderName::from_static("apikey");

/// A key that can be sent. It shows neither in `Debug` nor anywhere else.
#[derive(PartialEq)]
pub(super) struct ApiKey {
    kind: Kind,
    headers: HeaderMap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Secret,
    Public,
    Other,
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({:?})", self.kind)
    }
}

impl ApiKey {
    /// Parses a key; an error says what is wrong with it, without repeating it.
    pub(super) fn new(key: &str) -> Result<Self, &'static str> {
        const FOREIGN: &str = "it has characters that no key has";
        let key = key.trim();
        let secret = |text: &str| {
            let mut value = HeaderValue::from_str(text).map_err(|_| FOREIGN)?;
            value.set_sensitive(true);
            Ok::<_, &str>(value)
        };
        if key.is_empty() {
            return Err("it is empty");
        }
        // A header could carry more than that.
        if !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(FOREIGN);
        }
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // Where the functions are; a project may expose another schema first.
        headers.insert("content-profile", HeaderValue::from_static("public"));
        headers.insert(APIKEY, secret(key)?);
        // Legacy keys are JWTs and must come as a bearer token, too; new keys must not.
        if key.split('.').count() == 3 {
            headers.insert(AUTHORIZATION, secret(&format!("Bearer {key}"))?);
        }
        Ok(Self { kind: Kind::of(key), headers })
    }

    /// What each request carries.
    pub(super) fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// What to do when it is refused.
    pub(super) fn advice(&self) -> &'static str {
        match self.kind {
            Kind::Public => {
                "SUPABASE_KEY is an anon (publishable) key, which is public: set the project's secret (service_role) \
                 key instead"
            }
            Kind::Secret => {
                "check that SUPABASE_KEY is this project's secret (service_role) key, has not been revoked, and that \
                 the migrations with their grants are applied"
            }
            Kind::Other => "SUPABASE_KEY must be the project's secret (service_role) key",
        }
    }
}

impl Kind {
    fn of(key: &str) -> Self {
        match key {
            _ if key.starts_with("sb_secret_") => Self::Secret,
            _ if key.starts_with("sb_publishable_") => Self::Public,
            _ => match role(key).as_deref() {
                Some("service_role") => Self::Secret,
                Some("anon" | "authenticated") => Self::Public,
                _ => Self::Other,
            },
        }
    }
}

/// The role that a legacy key claims.
fn role(key: &str) -> Option<String> {
    claims(key)?.role
}

/// What a legacy key claims. Nobody has checked its signature.
#[derive(Deserialize)]
struct Claims {
    #[serde(default)]
    role: Option<String>,
    #[cfg(feature = "cli")]
    #[serde(default)]
    exp: Option<i64>,
    #[cfg(feature = "cli")]
    #[serde(default, rename = "ref")]
    project: Option<String>,
}

fn claims(key: &str) -> Option<Claims> {
    let claims = URL_SAFE_NO_PAD.decode(key.split('.').nth(1)?).ok()?;
    serde_json::from_slice(&claims).ok()
}

/// What a key says of itself, without the key.
#[cfg(feature = "cli")]
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KeyFacts {
    /// `sb_secret_…` or the like, or a legacy key with its role.
    pub(crate) name: String,
    /// Whether everybody may know it.
    pub(crate) is_public: bool,
    /// Whether it is known to be a secret one.
    pub(crate) is_secret: bool,
    /// Of a legacy key: when it ends, and whose it is.
    pub(crate) expires_at: Option<crate::version::Timestamp>,
    pub(crate) project: Option<String>,
}

#[cfg(feature = "cli")]
impl KeyFacts {
    pub(crate) fn of(key: &str) -> Self {
        let (key, kind) = (key.trim(), Kind::of(key.trim()));
        let claims = claims(key);
        let name = match (claims.as_ref().and_then(|claims| claims.role.as_deref()), kind) {
            (Some(role), _) => format!("a legacy key (JWT) of the role {role:?}"),
            (None, Kind::Secret) => "a secret key (sb_secret_…)".into(),
            (None, Kind::Public) => "a publishable key (sb_publishable_…)".into(),
            (None, Kind::Other) => "a key of no kind that Supabase has".into(),
        };
        let (exp, project) = claims.map_or((None, None), |claims| (claims.exp, claims.project));
        Self {
            name,
            is_public: kind == Kind::Public,
            is_secret: kind == Kind::Secret,
            expires_at: exp.map(|seconds| crate::version::Timestamp(seconds.saturating_mul(1_000))),
            project,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn legacy(role: &str) -> String {
        let claims = URL_SAFE_NO_PAD.encode(format!(r#"{{"iss":"supabase","role":"{role}"}}"#));
        format!("eyJhbGciOiJIUzI1NiJ9.{claims}.c2lnbmF0dXJl")
    }

    #[test]
    fn the_kind_of_a_key_is_known() {
        for (key, kind, bearer) in [
            ("sb_secret_abc".to_owned(), Kind::Secret, false),
            ("sb_publishable_abc".into(), Kind::Public, false),
            (legacy("service_role"), Kind::Secret, true),
            (legacy("anon"), Kind::Public, true),
            ("something".into(), Kind::Other, false),
        ] {
            let parsed = ApiKey::new(&key).unwrap();
            let has_bearer = parsed.headers().contains_key(AUTHORIZATION);
            assert_eq!((parsed.kind, has_bearer), (kind, bearer), "{key}");
            assert!(!format!("{parsed:?} {:?}", parsed.headers()).contains(&key), "a key shows in Debug");
        }
    }

    #[cfg(feature = "cli")]
    #[test]
    fn what_a_key_says_of_itself_is_read_without_repeating_it() {
        let claims = r#"{"ref":"abcdef","role":"service_role","exp":1700000000}"#;
        let key = format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims));
        let facts = KeyFacts::of(&key);
        assert!(facts.is_secret && !facts.is_public && facts.name.contains("service_role"), "{facts:?}");
        assert_eq!(facts.expires_at, Some(crate::version::Timestamp(1_700_000_000_000)));
        assert_eq!(facts.project.as_deref(), Some("abcdef"));
        for public in ["sb_publishable_hidden".to_owned(), legacy("anon")] {
            let facts = KeyFacts::of(&public);
            assert!(facts.is_public && !facts.is_secret && facts.expires_at.is_none(), "{facts:?}");
            assert!(!format!("{facts:?}").contains(&public));
        }
        let other = KeyFacts::of("hunter2");
        assert!(!other.is_public && !other.is_secret && !other.name.contains("hunter2"), "{other:?}");
    }

    #[test]
    fn what_can_be_no_key_is_refused() {
        for junk in ["", " \n", "two words", "two\nlines", "\u{fffd}", "\0"] {
            assert!(ApiKey::new(junk).is_err(), "{junk:?}");
        }
        assert!(ApiKey::new(" sb_secret_abc\r\n").unwrap() == ApiKey::new("sb_secret_abc").unwrap());
    }
}
