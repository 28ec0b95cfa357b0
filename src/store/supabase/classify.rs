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

/// Whether the store may have committed the failed request.
enum Committed {
    /// The server rejected the request, or rolled its transaction back.
    No,
    /// The response may have been lost after the commit.
    Unknown,
}

/// A response with an error status, in words: `HTTP 403 42501: permission denied …`.
pub(super) struct PostgrestError {
    /// The SQLSTATE, or PostgREST's own code. Empty without a usable code.
    pub(super) code: String,
    pub(super) message: String,
    /// Whether the body is a HTML page. Neither PostgREST nor Supabase's gateway sends one.
    is_page: bool,
}

impl PostgrestError {
    pub(super) fn of(status: StatusCode, body: &[u8]) -> Self {
        let ErrorBody { code, message, hint } = serde_json::from_slice(body).unwrap_or_default();
        let code = code.unwrap_or_default();
        let texts = [message, hint]
            .into_iter()
            .flatten()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("; ");
        let text = if texts.is_empty() { "no reason given".into() } else { texts };
        let shown = if code.is_empty() { String::new() } else { format!(" {code:.60}") };
        Self {
            message: format!("HTTP {}{shown}: {text:.500}", status.as_u16()),
            code: usable(code),
            is_page: is_page(body),
        }
    }

    /// Returns the kind of the failure.
    pub(super) fn kind(&self, status: StatusCode) -> ErrorKind {
        classify(status, &self.code, self.is_page).kind
    }
}

/// Converts a response with an error status into an error.
pub(super) fn error_response(
    status: StatusCode,
    retry_after: Option<Duration>,
    body: &[u8],
    key_remedy: &'static str,
) -> Error {
    let PostgrestError { code, message, is_page } = PostgrestError::of(status, body);
    let failure = classify(status, &code, is_page);
    let (event, remedy) = describe(&failure, status, &code, key_remedy);
    let mut error =
        Error::new(failure.kind, format!("{event} ({message})")).with_scope(failure.scope).with_code(&code);
    if let Some(remedy) = remedy {
        error = error.with_remedy(remedy);
    }
    if failure.needs_operator {
        error = error.needing_operator();
    }
    if let Some(wait) = retry_after {
        error = error.with_retry_after(wait);
    }
    match failure.committed {
        Committed::No => error,
        Committed::Unknown => error.with_outcome_unknown(),
    }
}

/// Describes a failure, and its remedy if an operator can do something about it.
fn describe(
    failure: &Classification,
    status: StatusCode,
    code: &str,
    key_remedy: &'static str,
) -> (&'static str, Option<Cow<'static, str>>) {
    let (event, remedy) = match failure.kind {
        ErrorKind::Unauthorized if code == "42501" => {
            let grants = "apply the migrations, or grant the privilege that a trigger needs";
            return ("the database denies the request", Some(format!("{grants}; {key_remedy}").into()));
        }
        ErrorKind::Unauthorized => ("Supabase rejects the key", key_remedy),
        ErrorKind::SchemaOutdated => ("the database lacks threadkeep's table or functions", MIGRATE),
        ErrorKind::Rejected | ErrorKind::Overloaded => return ("Supabase rejects the request", None),
        _ if failure.scope == Scope::Writes => {
            ("the database takes no writes", "check its disk, and whether it is read-only or a standby")
        }
        _ if failure.scope == Scope::Request && !code.is_empty() => (
            "the database cannot run the request",
            "check the triggers and columns that were added to conversation_threads",
        ),
        _ if failure.scope == Scope::Request && matches!(status.as_u16(), 401 | 403) => {
            ("a gateway before Supabase rejects the request", "check the rules of the gateway")
        }
        _ if failure.scope == Scope::Request => {
            return ("a gateway before Supabase rejects a body of this size", None);
        }
        _ if is_foreign_server(status, code) => (
            "SUPABASE_URL does not lead to a Supabase REST API",
            "set it to a URL like https://PROJECT.supabase.co, and let no proxy or portal answer in its place",
        ),
        _ if code.starts_with("PGRST1") || code.starts_with("PGRST2") => (
            "PostgREST is configured for something else",
            "expose the schema `public`, and drop other functions named threadkeep_…",
        ),
        _ => return ("Supabase is unavailable", None),
    };
    (event, Some(remedy.into()))
}

/// Whether the response comes from another server than PostgREST.
fn is_foreign_server(status: StatusCode, code: &str) -> bool {
    code.is_empty()
        && (status.is_redirection() || matches!(status.as_u16(), 404 | 405 | 406 | 407 | 410 | 421))
}

/// The remedy for missing tables and functions.
///
/// `supabase db push` reads only `supabase/migrations`. It reports success even if that folder is empty.
pub(super) const MIGRATE: &str = "apply the migrations: `threadkeep migrations --dir supabase/migrations` (or `cp migrations/*.sql \
     supabase/migrations/`) and then `supabase db push --include-all`, or `psql -f` for each file in migrations/; right after that, \
     PostgREST may need `notify pgrst, 'reload schema'`";

/// The meaning of a failed response.
struct Classification {
    kind: ErrorKind,
    scope: Scope,
    committed: Committed,
    needs_operator: bool,
}

const fn failure(kind: ErrorKind, scope: Scope, committed: Committed) -> Classification {
    Classification { kind, scope, committed, needs_operator: false }
}

impl Classification {
    const fn by_operator(self) -> Self {
        Self { needs_operator: true, ..self }
    }
}

fn classify(status: StatusCode, code: &str, is_page: bool) -> Classification {
    match code {
        "" => by_status(status, is_page),
        code if code.starts_with("PGRST") => by_postgrest(code),
        code => by_sqlstate(code),
    }
}

/// Returns the code if it describes the request, else an empty one.
///
/// PostgREST sends an empty code if PostgreSQL dies during a request. A gateway sends codes of its own.
fn usable(code: String) -> String {
    let is_sqlstate = |code: &str| {
        code.len() == 5
            && code != "00000"
            && code.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_uppercase())
    };
    if is_sqlstate(&code) || code.starts_with("PGRST") { code } else { String::new() }
}

fn is_page(body: &[u8]) -> bool {
    body.trim_ascii_start().starts_with(b"<")
}

fn by_postgrest(code: &str) -> Classification {
    use ErrorKind::{Rejected, SchemaOutdated, Unauthorized, Unavailable};
    use Scope::{Everything, Request};
    match code {
        // PostgREST cannot reach the database.
        "PGRST000" | "PGRST002" | "PGRST003" => failure(Unavailable, Everything, Committed::No),
        // The connection to the database broke, perhaps after PostgREST sent the commit.
        "PGRST001" => failure(Unavailable, Everything, Committed::Unknown),
        // PostgREST cannot read the body, which holds the record.
        "PGRST102" => failure(Rejected, Request, Committed::No),
        "PGRST202" | "PGRST204" | "PGRST205" => failure(SchemaOutdated, Everything, Committed::No),
        "PGRST300" | "PGRST301" | "PGRST302" | "PGRST303" => failure(Unauthorized, Everything, Committed::No),
        // PostgREST itself failed.
        code if code.starts_with("PGRSTX") => failure(Unavailable, Everything, Committed::Unknown),
        // PostgREST has another configuration, or the database has another function of the same name.
        _ => failure(Unavailable, Everything, Committed::No).by_operator(),
    }
}

fn by_sqlstate(code: &str) -> Classification {
    use ErrorKind::{Overloaded, Rejected, SchemaOutdated, Unauthorized, Unavailable};
    use Scope::{Everything, Request, Writes};
    match code {
        "40003" => return failure(Unavailable, Everything, Committed::Unknown),
        // A role lacks a grant: on a function, or inside a trigger for some rows only.
        "42501" => return failure(Unauthorized, Request, Committed::No),
        // An object of the migrations is missing, or an object that a trigger uses.
        "42P01" | "42883" | "42703" => return failure(SchemaOutdated, Request, Committed::No),
        // Another session holds a lock on the row. The breaker must not open for one conversation.
        "55P03" => return failure(Overloaded, Request, Committed::No),
        // The database answers reads only, because it is read-only or a standby, or its disk is full.
        "25006" | "0A000" | "53100" => return failure(Unavailable, Writes, Committed::No).by_operator(),
        // The request exceeds a limit of the configuration.
        "53400" => return failure(Rejected, Request, Committed::No),
        // PostgreSQL cancelled the statement, and rolled it back.
        "57014" => return failure(Unavailable, Everything, Committed::No),
        _ => {}
    }
    match &code[..2] {
        "08" | "57" | "58" => failure(Unavailable, Everything, Committed::Unknown),
        "53" | "40" => failure(Unavailable, Everything, Committed::No),
        // PostgREST cannot log in to the database.
        "28" | "3D" | "F0" => failure(Unavailable, Everything, Committed::No).by_operator(),
        // A trigger, a dropped schema or a corrupt row causes these failures. The record is not at fault (I10).
        "0L" | "25" | "3F" | "42" | "55" | "HV" | "XX" => {
            failure(Unavailable, Request, Committed::No).by_operator()
        }
        // The database, or a trigger, rejects the record itself (I10).
        _ => failure(Rejected, Request, Committed::No),
    }
}

/// Classifies a response without a usable code, which says nothing about the record.
fn by_status(status: StatusCode, is_page: bool) -> Classification {
    use ErrorKind::{Unauthorized, Unavailable};
    use Scope::{Everything, Request};
    match status.as_u16() {
        // A firewall or a sign-in page sends HTML. A gateway that rejects the key sends JSON, or nothing.
        401 | 403 if is_page => failure(Unavailable, Request, Committed::No).by_operator(),
        401 | 403 => failure(Unauthorized, Everything, Committed::No),
        // The body is too large for a gateway.
        413 | 414 | 431 => failure(Unavailable, Request, Committed::No),
        429 => failure(Unavailable, Everything, Committed::No),
        // 402 means a restricted project, 540 a paused one. The others come from a portal, a proxy, or a wrong URL.
        300..400 | 402 | 404..408 | 540 => failure(Unavailable, Everything, Committed::No).by_operator(),
        400 | 408 | 425 | 500.. => failure(Unavailable, Everything, Committed::Unknown),
        _ => failure(Unavailable, Everything, Committed::Unknown).by_operator(),
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
    Error::new(ErrorKind::Unavailable, message).with_outcome_unknown()
}

fn start(body: &[u8]) -> String {
    String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned()
}

/// Returns the error for a successful status with a body that no function of the migrations returns.
pub(super) fn unexpected_body(host: &str, body: &[u8], error: serde_json::Error) -> Error {
    let start = start(body);
    let message = format!("Supabase at {host} sent something else than threadkeep's JSON: {start:?}…");
    Error::new(ErrorKind::Unavailable, message).with_outcome_unknown().with_source(error)
}

#[cfg(test)]
mod tests;
