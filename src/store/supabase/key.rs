//! The API key: its kind, its headers, and the remedy after Supabase rejects it.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

use crate::error::{Error, ErrorKind};
use crate::model::version::Timestamp;

const APIKEY: HeaderName = HeaderName::from_static("apikey");

/// A key in the form of request headers. `Debug` hides it.
#[derive(PartialEq)]
pub(super) struct ApiKey {
    kind: KeyKind,
    pub(super) headers: HeaderMap,
}

/// The kinds of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// The secret (service role) key.
    Secret,
    /// A key that clients in browsers use.
    Public,
    /// A key of an unknown form or role.
    Other,
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({:?})", self.kind)
    }
}

impl ApiKey {
    /// Parses a key. The error names the problem, and does not repeat the key.
    pub(super) fn new(key: &str) -> Result<Self, &'static str> {
        const FOREIGN: &str = "has characters that no key has";
        let key = key.trim();
        let secret = |text: &str| {
            let mut value = HeaderValue::from_str(text).map_err(|_| FOREIGN)?;
            value.set_sensitive(true);
            Ok::<_, &str>(value)
        };
        if key.is_empty() {
            return Err("is empty");
        }
        // HTTP permits more characters in a header than a key has.
        if !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(FOREIGN);
        }
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // The schema of the functions. A project may have another default schema.
        headers.insert("content-profile", HeaderValue::from_static("public"));
        headers.insert(APIKEY, secret(key)?);
        // Supabase needs a legacy key, which is a JWT, as a bearer token too. It rejects a new key as a bearer token.
        if key.split('.').count() == 3 {
            headers.insert(AUTHORIZATION, secret(&format!("Bearer {key}"))?);
        }
        Ok(Self { kind: KeyKind::of(key), headers })
    }

    pub(super) fn remedy(&self) -> &'static str {
        match self.kind {
            KeyKind::Public => {
                "set SUPABASE_KEY to the project's secret (service_role) key instead of the anon (publishable) key, which is \
                 public"
            }
            KeyKind::Secret => {
                "check that SUPABASE_KEY is this project's secret (service_role) key, has not been revoked, and that \
                 the migrations with their grants are applied"
            }
            KeyKind::Other => "set SUPABASE_KEY to the project's secret (service_role) key",
        }
    }
}

impl KeyKind {
    fn of(key: &str) -> Self {
        match key {
            _ if key.starts_with("sb_secret_") => Self::Secret,
            _ if key.starts_with("sb_publishable_") => Self::Public,
            _ => match claims(key).and_then(|claims| claims.role).as_deref() {
                Some("service_role") => Self::Secret,
                Some("anon" | "authenticated") => Self::Public,
                _ => Self::Other,
            },
        }
    }
}

/// Checks the form of a key.
pub(crate) fn check_key(key: &str) -> crate::Result<()> {
    ApiKey::new(key).map(drop).map_err(|problem| {
        Error::new(ErrorKind::Config, problem).with_remedy("use the project's secret (service_role) key")
    })
}

/// The claims of a legacy key. The client does not check its signature.
#[derive(Deserialize)]
struct Claims {
    #[serde(default)]
    role: Option<String>,
    #[serde(default)]
    exp: Option<i64>,
    #[serde(default, rename = "ref")]
    project: Option<String>,
}

fn claims(key: &str) -> Option<Claims> {
    let claims = URL_SAFE_NO_PAD.decode(key.split('.').nth(1)?).ok()?;
    serde_json::from_slice(&claims).ok()
}

/// Facts about a key. They do not contain the key.
#[derive(Debug, PartialEq, Eq)]
pub struct KeyFacts {
    /// The kind of the key, and the role of a legacy key.
    pub name: String,
    /// The kind of the key, by its form or its role.
    pub kind: KeyKind,
    /// The end of a legacy key's validity.
    pub expires_at: Option<Timestamp>,
    /// The project of a legacy key.
    pub project: Option<String>,
}

impl KeyFacts {
    /// Reads the facts from a key. Does not check the signature of a legacy key.
    ///
    /// ```
    /// use threadkeep::tools::{KeyFacts, KeyKind};
    ///
    /// assert_eq!(KeyFacts::of("sb_publishable_abc").kind, KeyKind::Public);
    /// ```
    pub fn of(key: &str) -> Self {
        let (key, kind) = (key.trim(), KeyKind::of(key.trim()));
        let claims = claims(key);
        let name = match (claims.as_ref().and_then(|claims| claims.role.as_deref()), kind) {
            (Some(role), _) => format!("a legacy key (JWT) of the role {role:?}"),
            (None, KeyKind::Secret) => "a secret key (sb_secret_…)".into(),
            (None, KeyKind::Public) => "a publishable key (sb_publishable_…)".into(),
            (None, KeyKind::Other) => "a key of an unknown kind".into(),
        };
        let (exp, project) = claims.map_or((None, None), |claims| (claims.exp, claims.project));
        Self { name, kind, expires_at: exp.map(|seconds| Timestamp(seconds.saturating_mul(1_000))), project }
    }
}
