//! Supabase's API keys, and the key check of its gateway.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::wire::{Reply, Request};

/// The secret for the signatures of tokens.
pub const JWT_SECRET: &str = "the secret of a stack that lives as long as one test";

/// Returns a token of the role, signed with the stack's secret and valid until the year 2100.
pub fn jwt(role: &str) -> String {
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","typ":"JWT"}"#);
    let claims = URL_SAFE_NO_PAD.encode(format!(r#"{{"iss":"supabase","role":"{role}","exp":4102444800}}"#));
    let mut mac =
        Hmac::<Sha256>::new_from_slice(JWT_SECRET.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(format!("{header}.{claims}").as_bytes());
    let signature = URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes());
    format!("{header}.{claims}.{signature}")
}

/// The keys that a gateway accepts.
#[derive(Debug, Clone)]
pub struct Keys {
    /// The legacy `service_role` key. A client sends it as `apikey` and as bearer.
    pub service_jwt: String,
    /// The legacy `anon` key. A client sends it as `apikey` and as bearer.
    pub anon_jwt: String,
    /// The key `sb_secret_…`. A client sends it as `apikey` only.
    pub secret: String,
    /// The key `sb_publishable_…`. A client sends it as `apikey` only.
    pub publishable: String,
}

/// The identity of the caller for the server.
#[derive(Debug, PartialEq)]
pub enum Caller {
    Service,
    Anon,
    /// The role in this token, if the server accepts the token.
    Bearer(String),
}

impl Keys {
    /// Returns the keys after `generation` rotations. Each rotation changes only the secret key.
    pub fn new(generation: u32) -> Self {
        Self {
            service_jwt: jwt("service_role"),
            anon_jwt: jwt("anon"),
            secret: format!("sb_secret_of_generation_{generation}"),
            publishable: "sb_publishable_of_the_tests".to_owned(),
        }
    }

    /// Checks the keys of a request as Supabase's gateway does.
    ///
    /// The gateway compares `apikey` with its keys and parses no token. Then the bearer identifies the caller.
    pub fn admit(&self, request: &Request) -> Result<Caller, Reply> {
        let key = request.header("apikey").ok_or_else(no_key)?;
        let bearer = request.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
        let known_by_itself = match key {
            _ if key == self.secret && from_a_browser(request) => return Err(secret_in_a_browser()),
            _ if key == self.secret => Caller::Service,
            _ if key == self.publishable => Caller::Anon,
            // A legacy key without its bearer passes the gateway, but gets no role.
            _ if key == self.service_jwt || key == self.anon_jwt => Caller::Anon,
            _ => return Err(unknown_key()),
        };
        Ok(match bearer {
            None => known_by_itself,
            Some(bearer) if bearer == key && key.starts_with("sb_") => known_by_itself,
            Some(bearer) if bearer == self.service_jwt => Caller::Service,
            Some(bearer) if bearer == self.anon_jwt => Caller::Anon,
            Some(bearer) => Caller::Bearer(bearer.to_owned()),
        })
    }
}

fn from_a_browser(request: &Request) -> bool {
    request.header("user-agent").is_some_and(|agent| agent.starts_with("Mozilla/"))
}

fn no_key() -> Reply {
    Reply::json(
        401,
        r#"{"message":"No API key found in request","hint":"No `apikey` request header or url param was found."}"#,
    )
}

fn unknown_key() -> Reply {
    Reply::json(401, r#"{"message":"Invalid API key"}"#)
}

fn secret_in_a_browser() -> Reply {
    Reply::json(401, r#"{"message":"Forbidden use of secret API key in browser"}"#)
}
