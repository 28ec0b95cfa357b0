//! One place decides what a failure means: SQLSTATE first, then the HTTP status.

use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;

use crate::error::{Error, ErrorKind};

/// What PostgREST says of an error. Gateways may say something else, or nothing.
#[derive(Debug, Default, Deserialize)]
struct Body {
    #[serde(default)]
    code: Option<String>,
    #[serde(default)]
    message: Option<String>,
    #[serde(default)]
    hint: Option<String>,
}

/// How sure a failure is that nothing was written.
enum Trace {
    /// The request was refused, or its transaction rolled back.
    None,
    /// The answer may have been lost after the commit.
    Unknown,
}

/// What an answer with an error status says, in words: `HTTP 403 42501: permission denied …`.
pub(super) struct Said {
    /// The SQLSTATE, or PostgREST's own code; empty where there is none.
    pub(super) code: String,
    pub(super) what: String,
}

impl Said {
    pub(super) fn of(status: StatusCode, body: &[u8]) -> Self {
        let Body { code, message, hint } = serde_json::from_slice(body).unwrap_or_default();
        let code = code.unwrap_or_default();
        let said = [message, hint].into_iter().flatten().collect::<Vec<_>>().join("; ");
        let said = if said.is_empty() { "no reason given".into() } else { said };
        let shown = if code.is_empty() { String::new() } else { format!(" {code}") };
        Self { what: format!("HTTP {}{shown}: {said:.500}", status.as_u16()), code }
    }

    /// Which kind of failure it is.
    #[cfg(feature = "cli")]
    pub(super) fn kind(&self, status: StatusCode) -> ErrorKind {
        by_code(&self.code).unwrap_or_else(|| by_status(status)).0
    }
}

/// An answer with an error status.
pub(super) fn answer(status: StatusCode, retry_after: Option<Duration>, body: &[u8], hint: &str) -> Error {
    let Said { code, what } = Said::of(status, body);
    let (kind, trace) = by_code(&code).unwrap_or_else(|| by_status(status));
    let error = Error::new(
        kind,
        match kind {
            ErrorKind::Unavailable => format!("Supabase is unavailable ({what})"),
            ErrorKind::Denied => format!("Supabase refuses the key ({what}); {hint}"),
            ErrorKind::Schema => missing_migrations(&what),
            _ if status == StatusCode::NOT_FOUND || status.is_redirection() => {
                format!(
                    "SUPABASE_URL does not lead to a Supabase REST API ({what}); it should read like https://PROJECT.supabase.co"
                )
            }
            _ => format!("Supabase refuses the request ({what})"),
        },
    );
    let error = if let Some(wait) = retry_after { error.with_retry_after(wait) } else { error };
    match trace {
        Trace::None => error,
        Trace::Unknown => error.with_outcome_unknown(),
    }
}

/// The one remedy for all that is missing in the database. `supabase db push` reads `supabase/migrations` alone, and reports
/// success if that folder has nothing for it.
pub(crate) const MIGRATE: &str = "apply the migrations: `threadkeep migrations --dir supabase/migrations` (or `cp migrations/*.sql \
     supabase/migrations/`) and then `supabase db push --include-all`, or `psql -f` for each file in migrations/; right after that, \
     PostgREST may need `notify pgrst, 'reload schema'`";

pub(super) fn missing_migrations(what: &str) -> String {
    format!("the database lacks threadkeep's table or functions ({what}); {MIGRATE}")
}

fn by_code(code: &str) -> Option<(ErrorKind, Trace)> {
    use ErrorKind::{Denied, Refused, Schema, Unavailable};
    Some(match code {
        // PostgREST could not get at the database.
        "PGRST000" | "PGRST002" | "PGRST003" => (Unavailable, Trace::None),
        // The connection to it broke, perhaps after the commit was sent.
        "PGRST001" | "40003" => (Unavailable, Trace::Unknown),
        "PGRST300" | "PGRST301" | "PGRST302" | "PGRST303" | "42501" => (Denied, Trace::None),
        "PGRST202" | "PGRST205" | "42P01" | "42883" | "42703" => (Schema, Trace::None),
        "53400" => (Refused, Trace::None),
        // Cancelled, or gave way to another transaction: rolled back. Read-only: the disk is full, or a failover.
        "57014" | "25006" => (Unavailable, Trace::None),
        // Somebody keeps this row locked: a timely answer, and no reason to cut off all other threads.
        "55P03" => (ErrorKind::Busy, Trace::None),
        "57P01" | "57P02" | "57P03" => (Unavailable, Trace::Unknown),
        _ if code.len() != 5 => return None,
        _ => match &code[..2] {
            "08" | "58" => (Unavailable, Trace::Unknown),
            "53" | "40" => (Unavailable, Trace::None),
            "21" | "22" | "23" | "42" | "54" => (Refused, Trace::None),
            _ => return None,
        },
    })
}

fn by_status(status: StatusCode) -> (ErrorKind, Trace) {
    use ErrorKind::{Denied, Refused, Unavailable};
    match status.as_u16() {
        401 | 403 => (Denied, Trace::None),
        // 402: the project is restricted; 540: it is paused.
        402 | 429 | 540 => (Unavailable, Trace::None),
        408 | 500.. => (Unavailable, Trace::Unknown),
        _ => (Refused, Trace::None),
    }
}

/// No answer, or none that can be read.
pub(super) fn no_answer(error: reqwest::Error, host: &str) -> Error {
    // The text of reqwest's errors has the URL; the sentence below names the host alone.
    let error = error.without_url();
    let what = match () {
        () if error.is_connect() => "cannot be reached",
        () if error.is_timeout() => "did not answer in time",
        () if error.is_body() || error.is_decode() => "broke off its answer",
        () => "closed the connection without an answer",
    };
    let out =
        Error::new(ErrorKind::Unavailable, format!("Supabase at {host} {what}: {}", root_cause(&error)));
    let out = if error.is_connect() { out } else { out.with_outcome_unknown() };
    out.with_source(error)
}

fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// A successful status, with a body that is not what the functions of the migrations return.
pub(super) fn not_ours(host: &str, body: &[u8], error: serde_json::Error) -> Error {
    let start = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
    let what = format!("Supabase at {host} answered with something else than threadkeep's JSON: {start:?}…");
    Error::new(ErrorKind::Unavailable, what).with_outcome_unknown().with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(status: u16, body: &str) -> (ErrorKind, bool) {
        let error = answer(StatusCode::from_u16(status).unwrap(), None, body.as_bytes(), "");
        (error.kind(), error.outcome_unknown())
    }

    #[test]
    fn the_sqlstate_decides_before_the_status() {
        use ErrorKind::{Denied, Refused, Schema, Unavailable};
        let code = |code: &str| format!(r#"{{"code":"{code}","message":"m","details":null,"hint":null}}"#);
        for (sqlstate, expected) in [
            ("PGRST000", (Unavailable, false)),
            ("PGRST001", (Unavailable, true)),
            ("PGRST003", (Unavailable, false)),
            ("25006", (Unavailable, false)),
            ("40003", (Unavailable, true)),
            ("08006", (Unavailable, true)),
            ("53300", (Unavailable, false)),
            ("53400", (Refused, false)),
            ("57P01", (Unavailable, true)),
            ("57014", (Unavailable, false)),
            ("40001", (Unavailable, false)),
            ("55P03", (ErrorKind::Busy, false)),
            ("58030", (Unavailable, true)),
            ("21000", (Refused, false)),
            ("22P05", (Refused, false)),
            ("23505", (Refused, false)),
            ("42601", (Refused, false)),
            ("54000", (Refused, false)),
            ("PGRST301", (Denied, false)),
            ("42501", (Denied, false)),
            ("PGRST202", (Schema, false)),
            ("42P01", (Schema, false)),
            ("42883", (Schema, false)),
        ] {
            assert_eq!(kind(500, &code(sqlstate)), expected, "{sqlstate}");
            assert_eq!(kind(404, &code(sqlstate)), expected, "{sqlstate}");
        }
    }

    #[test]
    fn without_a_sqlstate_the_status_decides() {
        use ErrorKind::{Denied, Refused, Unavailable};
        for status in [500, 502, 503, 504, 520, 522, 527, 530, 544] {
            assert_eq!(kind(status, "<html>"), (Unavailable, true), "{status}");
        }
        for status in [402, 429, 540] {
            assert_eq!(kind(status, ""), (Unavailable, false), "{status}");
        }
        assert_eq!(kind(401, r#"{"message":"Invalid API key"}"#), (Denied, false));
        assert_eq!(kind(403, ""), (Denied, false));
        for status in [400, 404, 409, 413, 414, 422] {
            assert_eq!(kind(status, "{}"), (Refused, false), "{status}");
        }
    }
}
