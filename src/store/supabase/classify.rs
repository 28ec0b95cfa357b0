//! Classifies each failure of a request: first by its SQLSTATE, then by its HTTP status.
//!
//! This module alone decides whether a failure counts as an outage, and whether the store may have committed the write (I6).

use std::borrow::Cow;
use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;

use crate::error::{Error, ErrorKind, Scope};

/// The error body of PostgREST. A gateway may send another body, or none.
#[derive(Debug, Default, Deserialize)]
struct ErrorBody {
    #[serde(default)]
    code: Option<String>,
    #[serde(default)]
    message: Option<String>,
    #[serde(default)]
    hint: Option<String>,
}

/// Returns the meaning of a response with an error status, in words: `HTTP 403 42501: permission denied …`.
///
/// The code of the error is the SQLSTATE, or PostgREST's own code.
fn response_error(status: StatusCode, body: &[u8]) -> Error {
    let ErrorBody { code, message, hint } = serde_json::from_slice(body).unwrap_or_default();
    let code = code.unwrap_or_default();
    let texts: Vec<String> = [message, hint].into_iter().flatten().filter(|part| !part.is_empty()).collect();
    let text = if texts.is_empty() { "no reason given".into() } else { texts.join("; ") };
    let shown = if code.is_empty() { String::new() } else { format!(" {code:.60}") };
    let usable = if is_usable(&code) { code.as_str() } else { "" };
    let failure = match usable {
        "" => by_status(status, body),
        code if code.starts_with("PGRST") => by_postgrest(code),
        code => by_sqlstate(code),
    };
    failure.with_code(usable).with_message(format!("HTTP {}{shown}: {text:.500}", status.as_u16()))
}

/// Converts a response with an error status into an error.
pub(super) fn error_response(
    status: StatusCode,
    retry_after: Option<Duration>,
    body: &[u8],
    key_remedy: &'static str,
) -> Error {
    let error = response_error(status, body);
    let (event, remedy) = describe(&error, status, key_remedy);
    let message = format!("{event} ({})", error.message());
    let error = error.with_message(message);
    let error = if remedy.is_empty() { error } else { error.with_remedy(remedy) };
    if let Some(wait) = retry_after { error.with_retry_after(wait) } else { error }
}

/// Describes a failure, and its remedy. The remedy is empty if an operator can do nothing about it.
fn describe(
    failure: &Error,
    status: StatusCode,
    key_remedy: &'static str,
) -> (&'static str, Cow<'static, str>) {
    match failure.kind() {
        ErrorKind::Unauthorized if failure.code() == Some("42501") => {
            let grants = "apply the migrations, or grant the privilege that a trigger needs";
            ("the database denies the request", format!("{grants}; {key_remedy}").into())
        }
        ErrorKind::Unauthorized => ("Supabase rejects the key", key_remedy.into()),
        ErrorKind::SchemaOutdated => ("the database lacks threadkeep's table or functions", MIGRATE.into()),
        ErrorKind::Rejected | ErrorKind::Overloaded => ("Supabase rejects the request", "".into()),
        _ => {
            let (event, remedy) = describe_outage(failure, status);
            (event, remedy.into())
        }
    }
}

fn describe_outage(failure: &Error, status: StatusCode) -> (&'static str, &'static str) {
    let (code, status_code) = (failure.code().unwrap_or_default(), status.as_u16());
    let is_foreign_server = code.is_empty()
        && (status.is_redirection() || matches!(status_code, 404 | 405 | 406 | 407 | 410 | 421));
    match failure.scope() {
        Scope::Writes => {
            ("the database takes no writes", "check its disk, and whether it is read-only or a standby")
        }
        Scope::Request if !code.is_empty() => (
            "the database cannot run the request",
            "check the triggers and columns that were added to conversation_threads",
        ),
        Scope::Request if matches!(status_code, 401 | 403) => {
            ("a gateway before Supabase rejects the request", "check the rules of the gateway")
        }
        Scope::Request => ("a gateway before Supabase rejects a body of this size", ""),
        _ if is_foreign_server => ("SUPABASE_URL does not lead to a Supabase REST API", FOREIGN_SERVER),
        _ if status_code == 540 => ("the project is paused", "restore it in the dashboard"),
        _ if status_code == 402 => (
            "the project is restricted because of its usage or an unpaid bill",
            "open the dashboard, Usage and Billing",
        ),
        _ if code.starts_with("PGRST1") || code.starts_with("PGRST2") => (
            "PostgREST is configured for something else",
            "expose the schema `public`, and drop other functions named threadkeep_…",
        ),
        _ => ("Supabase is unavailable", ""),
    }
}

/// The remedy if another server answers.
const FOREIGN_SERVER: &str = "set SUPABASE_URL to a URL like https://PROJECT.supabase.co, and let no proxy, portal or sign-in page \
     answer in its place";

/// The remedy for missing tables and functions.
///
/// `supabase db push` reads only `supabase/migrations`. It reports success even if that folder is empty.
pub(super) const MIGRATE: &str = "apply the migrations: `threadkeep migrations --dir supabase/migrations` (or `cp migrations/*.sql \
     supabase/migrations/`) and then `supabase db push --include-all`, or `psql -f` for each file in migrations/; right after that, \
     PostgREST may need `notify pgrst, 'reload schema'`";

/// Whether the code describes the request.
///
/// PostgREST sends an empty code if PostgreSQL dies during a request. A gateway sends codes of its own.
fn is_usable(code: &str) -> bool {
    let is_letter = |b: u8| b.is_ascii_digit() || b.is_ascii_uppercase();
    code.starts_with("PGRST") || code.len() == 5 && code != "00000" && code.bytes().all(is_letter)
}

/// Returns a failure without a commit: the server rejected the request, or rolled its transaction back.
fn failure(kind: ErrorKind, scope: Scope) -> Error {
    Error::new(kind, "").with_scope(scope)
}

/// Returns a failure of all calls whose response may have been lost after the commit (I6).
fn lost() -> Error {
    failure(ErrorKind::Unavailable, Scope::Everything).with_outcome_unknown()
}

fn by_postgrest(code: &str) -> Error {
    use ErrorKind::{Rejected, SchemaOutdated, Unauthorized, Unavailable};
    use Scope::{Everything, Request};
    match code {
        // PostgREST cannot reach the database.
        "PGRST000" | "PGRST002" | "PGRST003" => failure(Unavailable, Everything),
        // The connection to the database broke, perhaps after PostgREST sent the commit.
        "PGRST001" => lost(),
        // PostgREST cannot read the body, which holds the record.
        "PGRST102" => failure(Rejected, Request),
        "PGRST202" | "PGRST204" | "PGRST205" => failure(SchemaOutdated, Everything),
        "PGRST300" | "PGRST301" | "PGRST302" | "PGRST303" => failure(Unauthorized, Everything),
        // PostgREST itself failed.
        code if code.starts_with("PGRSTX") => lost(),
        // PostgREST has another configuration, or the database has another function of the same name.
        _ => failure(Unavailable, Everything).needing_operator(),
    }
}

fn by_sqlstate(code: &str) -> Error {
    use ErrorKind::{Overloaded, Rejected, SchemaOutdated, Unauthorized, Unavailable};
    use Scope::{Everything, Request, Writes};
    match code {
        "40003" => return lost(),
        // A role lacks a grant: on a function, or inside a trigger for some rows only.
        "42501" => return failure(Unauthorized, Request),
        // An object of the migrations is missing, or an object that a trigger uses.
        "42P01" | "42883" | "42703" => return failure(SchemaOutdated, Request),
        // Another session holds a lock on the row. The breaker must not open for one conversation.
        "55P03" => return failure(Overloaded, Request),
        // The database answers reads only, because it is read-only or a standby, or its disk is full.
        "25006" | "0A000" | "53100" => return failure(Unavailable, Writes).needing_operator(),
        // The request exceeds a limit of the configuration.
        "53400" => return failure(Rejected, Request),
        // PostgreSQL cancelled the statement, and rolled it back.
        "57014" => return failure(Unavailable, Everything),
        _ => {}
    }
    match &code[..2] {
        "08" | "57" | "58" => lost(),
        "53" | "40" => failure(Unavailable, Everything),
        // PostgREST cannot log in to the database.
        "28" | "3D" | "F0" => failure(Unavailable, Everything).needing_operator(),
        // A trigger, a dropped schema or a corrupt row causes these failures. The record is not at fault (I10).
        "0L" | "25" | "3F" | "42" | "55" | "HV" | "XX" => failure(Unavailable, Request).needing_operator(),
        // The database, or a trigger, rejects the record itself (I10).
        _ => failure(Rejected, Request),
    }
}

/// Classifies a response without a usable code, which says nothing about the record.
fn by_status(status: StatusCode, body: &[u8]) -> Error {
    use ErrorKind::{Unauthorized, Unavailable};
    use Scope::{Everything, Request};
    match status.as_u16() {
        // A firewall or a sign-in page sends HTML. A gateway that rejects the key sends JSON, or nothing.
        401 | 403 if body.trim_ascii_start().starts_with(b"<") => {
            failure(Unavailable, Request).needing_operator()
        }
        401 | 403 => failure(Unauthorized, Everything),
        // The body is too large for a gateway.
        413 | 414 | 431 => failure(Unavailable, Request),
        429 => failure(Unavailable, Everything),
        // 402 means a restricted project, 540 a paused one. The others come from a portal, a proxy, or a wrong URL.
        300..400 | 402 | 404..408 | 540 => failure(Unavailable, Everything).needing_operator(),
        400 | 408 | 425 | 500.. => lost(),
        _ => lost().needing_operator(),
    }
}

/// Converts a failure of the transport into an error.
pub(super) fn transport_error(error: reqwest::Error, host: &str) -> Error {
    // The text of reqwest's error has the whole URL. The message below names the host only.
    let error = error.without_url();
    let event = match () {
        () if error.is_connect() => "cannot be reached",
        () if error.is_timeout() => "did not answer in time",
        () if error.is_body() || error.is_decode() => "broke off its response",
        () => "closed the connection without a response",
    };
    let out =
        Error::new(ErrorKind::Unavailable, format!("Supabase at {host} {event}: {}", root_cause(&error)));
    // Without a connection, no request was sent.
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

/// Returns the error for a successful status with a body longer than any response of the functions.
pub(super) fn body_too_large(host: &str, body: &[u8]) -> Error {
    let message = format!(
        "Supabase at {host} sent a response that no function of threadkeep gives; the read stopped after {} KiB, which begin \
         with {:?}…",
        body.len() >> 10,
        start(body)
    );
    Error::new(ErrorKind::Unavailable, message).with_remedy(FOREIGN_SERVER).with_outcome_unknown()
}

fn start(body: &[u8]) -> String {
    String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned()
}

/// Returns the error for a successful status with a body that no function of the migrations returns.
pub(super) fn unexpected_body(host: &str, body: &[u8], error: serde_json::Error) -> Error {
    let start = start(body);
    let message = format!("Supabase at {host} sent something else than threadkeep's JSON: {start:?}…");
    let unexpected = Error::new(ErrorKind::Unavailable, message).with_remedy(FOREIGN_SERVER);
    unexpected.with_outcome_unknown().with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_fault_is_limited_to_four_classes() {
        let is_record_fault = |code: &str| {
            let body = format!(r#"{{"code":"{code}","message":"m"}}"#);
            response_error(StatusCode::BAD_REQUEST, body.as_bytes()).is_record_fault()
        };
        for code in ["21000", "22P05", "22001", "23502", "23505", "23514", "54000", "PGRST102"] {
            assert!(is_record_fault(code), "{code}");
        }
        for code in ["", "3F000", "42501", "42601", "P0001", "XX001", "0A000", "53400", "PGRST106"] {
            assert!(!is_record_fault(code), "{code}");
        }
    }
}
