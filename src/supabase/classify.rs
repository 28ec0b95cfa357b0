//! One place decides what a failure means: SQLSTATE first, then the HTTP status.

use std::time::Duration;

use reqwest::StatusCode;
use serde::Deserialize;

use crate::error::{Error, ErrorKind, Scope};

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
    /// The SQLSTATE, or PostgREST's own code; empty if there is none that can be used.
    pub(super) code: String,
    pub(super) what: String,
    /// Whether it is a page for people, which neither PostgREST nor Supabase's gateway sends.
    is_page: bool,
}

impl Said {
    pub(super) fn of(status: StatusCode, body: &[u8]) -> Self {
        let Body { code, message, hint } = serde_json::from_slice(body).unwrap_or_default();
        let code = code.unwrap_or_default();
        let said = [message, hint]
            .into_iter()
            .flatten()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("; ");
        let said = if said.is_empty() { "no reason given".into() } else { said };
        let shown = if code.is_empty() { String::new() } else { format!(" {code:.60}") };
        Self {
            what: format!("HTTP {}{shown}: {said:.500}", status.as_u16()),
            code: usable(code),
            is_page: is_page(body),
        }
    }

    /// Which kind of failure it is.
    #[cfg(feature = "cli")]
    pub(super) fn kind(&self, status: StatusCode) -> ErrorKind {
        judge(status, &self.code, self.is_page).kind
    }
}

/// An answer with an error status.
pub(super) fn answer(status: StatusCode, retry_after: Option<Duration>, body: &[u8], hint: &str) -> Error {
    let Said { code, what, is_page } = Said::of(status, body);
    let Verdict { kind, scope, trace, needs_operator } = judge(status, &code, is_page);
    let mut error =
        Error::new(kind, explain(kind, scope, status, &code, &what, hint)).with_scope(scope).with_code(&code);
    if needs_operator {
        error = error.with_operator();
    }
    if let Some(wait) = retry_after {
        error = error.with_retry_after(wait);
    }
    match trace {
        Trace::None => error,
        Trace::Unknown => error.with_outcome_unknown(),
    }
}

/// What happened, and what to do.
fn explain(kind: ErrorKind, scope: Scope, status: StatusCode, code: &str, what: &str, hint: &str) -> String {
    match kind {
        ErrorKind::Denied if code == "42501" => {
            format!(
                "the database denies the request ({what}); apply the migrations, or grant what a trigger needs; {hint}"
            )
        }
        ErrorKind::Denied => format!("Supabase refuses the key ({what}); {hint}"),
        ErrorKind::Schema => missing_migrations(what),
        ErrorKind::Refused | ErrorKind::Busy => format!("Supabase refuses the request ({what})"),
        _ if scope == Scope::Writes => {
            format!(
                "the database takes no writes ({what}); look at its disk and whether it is read-only or a standby"
            )
        }
        _ if scope == Scope::Request && !code.is_empty() => format!(
            "the database cannot carry out the request ({what}); look at the triggers and columns that were added to \
             conversation_threads"
        ),
        _ if scope == Scope::Request && matches!(status.as_u16(), 401 | 403) => {
            format!("a gateway before Supabase refuses the request ({what}); look at its rules")
        }
        _ if scope == Scope::Request => {
            format!("a gateway before Supabase takes no body of this size ({what})")
        }
        _ if is_elsewhere(status, code) => format!(
            "SUPABASE_URL does not lead to a Supabase REST API ({what}); it should read like \
             https://PROJECT.supabase.co, and no proxy or portal may answer in its place"
        ),
        _ if code.starts_with("PGRST1") || code.starts_with("PGRST2") => format!(
            "PostgREST is set up for something else ({what}); expose the schema `public`, and drop other functions \
             that are called threadkeep_…"
        ),
        _ => format!("Supabase is unavailable ({what})"),
    }
}

fn is_elsewhere(status: StatusCode, code: &str) -> bool {
    code.is_empty()
        && (status.is_redirection() || matches!(status.as_u16(), 404 | 405 | 406 | 407 | 410 | 421))
}

/// The one remedy for all that is missing in the database. `supabase db push` reads `supabase/migrations` alone, and reports
/// success if that folder has nothing for it.
pub(crate) const MIGRATE: &str = "apply the migrations: `threadkeep migrations --dir supabase/migrations` (or `cp migrations/*.sql \
     supabase/migrations/`) and then `supabase db push --include-all`, or `psql -f` for each file in migrations/; right after that, \
     PostgREST may need `notify pgrst, 'reload schema'`";

pub(super) fn missing_migrations(what: &str) -> String {
    format!("the database lacks threadkeep's table or functions ({what}); {MIGRATE}")
}

/// What an answer means.
struct Verdict {
    kind: ErrorKind,
    scope: Scope,
    trace: Trace,
    needs_operator: bool,
}

const fn verdict(kind: ErrorKind, scope: Scope, trace: Trace) -> Verdict {
    Verdict { kind, scope, trace, needs_operator: false }
}

impl Verdict {
    const fn by_operator(self) -> Self {
        Self { needs_operator: true, ..self }
    }
}

fn judge(status: StatusCode, code: &str, is_page: bool) -> Verdict {
    match code {
        "" => by_status(status, is_page),
        code if code.starts_with("PGRST") => by_postgrest(code),
        code => by_sqlstate(code),
    }
}

/// A code that says something about the request. When PostgreSQL dies under a request, PostgREST answers with an empty
/// one; a gateway makes up its own.
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

fn by_postgrest(code: &str) -> Verdict {
    use ErrorKind::{Denied, Refused, Schema, Unavailable};
    use Scope::{Everything, Request};
    match code {
        // PostgREST could not get at the database.
        "PGRST000" | "PGRST002" | "PGRST003" => verdict(Unavailable, Everything, Trace::None),
        // The connection to it broke, perhaps after the commit was sent.
        "PGRST001" => verdict(Unavailable, Everything, Trace::Unknown),
        // The body, which holds the record, cannot be read.
        "PGRST102" => verdict(Refused, Request, Trace::None),
        "PGRST202" | "PGRST204" | "PGRST205" => verdict(Schema, Everything, Trace::None),
        "PGRST300" | "PGRST301" | "PGRST302" | "PGRST303" => verdict(Denied, Everything, Trace::None),
        // PostgREST itself failed.
        code if code.starts_with("PGRSTX") => verdict(Unavailable, Everything, Trace::Unknown),
        // PostgREST is configured for something else, or an overloaded function is in the way.
        _ => verdict(Unavailable, Everything, Trace::None).by_operator(),
    }
}

fn by_sqlstate(code: &str) -> Verdict {
    use ErrorKind::{Busy, Denied, Refused, Schema, Unavailable};
    use Scope::{Everything, Request, Writes};
    match code {
        "40003" => return verdict(Unavailable, Everything, Trace::Unknown),
        // A role lacks a grant: on a function, or inside a trigger for some rows only.
        "42501" => return verdict(Denied, Request, Trace::None),
        // An object is missing: the migrations', or one that a trigger uses.
        "42P01" | "42883" | "42703" => return verdict(Schema, Request, Trace::None),
        // Somebody keeps this row locked: a timely answer, and no reason to cut off all other threads.
        "55P03" => return verdict(Busy, Request, Trace::None),
        // The database answers reads: it is read-only, a standby, or its disk is full.
        "25006" | "0A000" | "53100" => return verdict(Unavailable, Writes, Trace::None).by_operator(),
        // A limit of the configuration.
        "53400" => return verdict(Refused, Request, Trace::None),
        // Cancelled: rolled back.
        "57014" => return verdict(Unavailable, Everything, Trace::None),
        _ => {}
    }
    match &code[..2] {
        "08" | "57" | "58" => verdict(Unavailable, Everything, Trace::Unknown),
        "53" | "40" => verdict(Unavailable, Everything, Trace::None),
        // PostgREST itself cannot log in.
        "28" | "3D" | "F0" => verdict(Unavailable, Everything, Trace::None).by_operator(),
        // Whatever is wrong in the database, it is not the record: a trigger, a dropped schema, a damaged row.
        "0L" | "25" | "3F" | "42" | "55" | "HV" | "XX" => {
            verdict(Unavailable, Request, Trace::None).by_operator()
        }
        // The record's own fault, or what a trigger says of it.
        _ => verdict(Refused, Request, Trace::None),
    }
}

/// An answer without a usable code is not PostgREST's verdict on this request.
fn by_status(status: StatusCode, is_page: bool) -> Verdict {
    use ErrorKind::{Denied, Unavailable};
    use Scope::{Everything, Request};
    match status.as_u16() {
        // A firewall or a sign-in page in between; a gateway that refuses the key answers JSON, or nothing.
        401 | 403 if is_page => verdict(Unavailable, Request, Trace::None).by_operator(),
        401 | 403 => verdict(Denied, Everything, Trace::None),
        // Too large for a gateway in between.
        413 | 414 | 431 => verdict(Unavailable, Request, Trace::None),
        429 => verdict(Unavailable, Everything, Trace::None),
        // 402: the project is restricted; 540: it is paused. The others: a portal, a proxy, or a wrong URL.
        300..400 | 402 | 404..408 | 540 => verdict(Unavailable, Everything, Trace::None).by_operator(),
        400 | 408 | 425 | 500.. => verdict(Unavailable, Everything, Trace::Unknown),
        _ => verdict(Unavailable, Everything, Trace::Unknown).by_operator(),
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

/// A successful status, with a body that is longer than any answer of the functions.
pub(super) fn too_large(host: &str, body: &[u8]) -> Error {
    let what = format!(
        "Supabase at {host} sent an answer that no function of threadkeep gives: given up after {} KiB that begin with {:?}…",
        body.len() >> 10,
        start(body)
    );
    Error::new(ErrorKind::Unavailable, what).with_outcome_unknown()
}

fn start(body: &[u8]) -> String {
    String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned()
}

/// A successful status, with a body that is not what the functions of the migrations return.
pub(super) fn not_ours(host: &str, body: &[u8], error: serde_json::Error) -> Error {
    let start = start(body);
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
            ("3F000", (Unavailable, false)),
            ("XX001", (Unavailable, false)),
            ("P0001", (Refused, false)),
            ("PGRSTX00", (Unavailable, true)),
            ("PGRST106", (Unavailable, false)),
            ("PGRST203", (Unavailable, false)),
            ("PGRST102", (Refused, false)),
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
            ("42601", (Unavailable, false)),
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
    fn an_answer_without_a_usable_code_is_an_outage() {
        use ErrorKind::{Denied, Unavailable};
        for body in [
            "",
            "{}",
            "<html>",
            r#"{"code":"","details":null,"hint":null,"message":""}"#,
            r#"{"code":"nginx"}"#,
        ] {
            for status in [400, 408, 409, 422, 500, 502, 503, 504, 520, 522, 527, 530, 544] {
                assert_eq!(kind(status, body), (Unavailable, true), "{status} {body}");
            }
            for status in [300, 302, 402, 404, 405, 406, 407, 413, 414, 429, 431, 540] {
                assert_eq!(kind(status, body), (Unavailable, false), "{status} {body}");
            }
            for status in [401, 403] {
                let expected = if body == "<html>" { Unavailable } else { Denied };
                assert_eq!(kind(status, body), (expected, false), "{status} {body}");
            }
        }
        assert_eq!(kind(401, r#"{"message":"Invalid API key"}"#), (Denied, false));
    }

    #[test]
    fn only_four_classes_are_a_records_own_fault() {
        let is_own = |code: &str| {
            let body = format!(r#"{{"code":"{code}","message":"m"}}"#);
            answer(StatusCode::BAD_REQUEST, None, body.as_bytes(), "").is_own_fault()
        };
        for code in ["21000", "22P05", "22001", "23502", "23505", "23514", "54000", "PGRST102"] {
            assert!(is_own(code), "{code}");
        }
        for code in [
            "", "3F000", "42501", "42601", "42883", "P0001", "XX001", "0A000", "53400", "PGRST106",
            "PGRST202",
        ] {
            assert!(!is_own(code), "{code}");
        }
    }

    #[test]
    fn a_store_that_answers_reads_does_not_count_as_away() {
        let counts = |status: u16, code: &str| {
            let body = format!(r#"{{"code":"{code}","message":"m"}}"#);
            answer(StatusCode::from_u16(status).unwrap(), None, body.as_bytes(), "").counts_as_outage()
        };
        for (status, code) in
            [(500, "53100"), (405, "25006"), (400, "3F000"), (413, ""), (500, "XX001"), (401, "")]
        {
            assert!(!counts(status, code), "{status} {code}");
        }
        for (status, code) in
            [(400, ""), (404, ""), (406, "PGRST106"), (300, "PGRST203"), (500, "57014"), (503, "PGRST002")]
        {
            assert!(counts(status, code), "{status} {code}");
        }
    }
}
