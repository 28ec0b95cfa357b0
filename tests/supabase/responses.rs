//! Responses of PostgreSQL, PostgREST and gateways, each with its effect on a live write.

use crate::stack::Fault;

/// The effect of a response on a live write that may be queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Live {
    Queued,
    Rejected,
}

/// Codes of every SQLSTATE class of PostgreSQL 15, and single codes that differ from their class.
const SQLSTATES: &[(&str, Live)] = {
    use Live::{Queued, Rejected};
    &[
        ("02000", Rejected),
        ("03000", Rejected),
        ("08006", Queued),
        ("09000", Rejected),
        ("0A000", Queued),
        ("0B000", Rejected),
        ("0F000", Rejected),
        ("0L000", Queued),
        ("0P000", Rejected),
        ("0Z000", Rejected),
        ("20000", Rejected),
        ("21000", Rejected),
        ("22P05", Rejected),
        ("22001", Rejected),
        ("23502", Rejected),
        ("23514", Rejected),
        ("24000", Rejected),
        ("25006", Queued),
        ("25P02", Queued),
        ("26000", Rejected),
        ("27000", Rejected),
        ("28P01", Queued),
        ("2BP01", Rejected),
        ("2D000", Rejected),
        ("2F005", Rejected),
        ("34000", Rejected),
        ("38000", Rejected),
        ("39000", Rejected),
        ("3B001", Rejected),
        ("3D000", Queued),
        ("3F000", Queued),
        ("40001", Queued),
        ("40P01", Queued),
        ("42501", Queued),
        ("42601", Queued),
        ("42703", Queued),
        ("42883", Queued),
        ("42P01", Queued),
        ("44000", Rejected),
        ("53100", Queued),
        ("53200", Queued),
        ("53300", Queued),
        ("54000", Rejected),
        ("55000", Queued),
        ("57014", Queued),
        ("57P01", Queued),
        ("57P03", Queued),
        ("58030", Queued),
        ("F0000", Queued),
        ("HV000", Queued),
        ("P0001", Rejected),
        ("XX000", Queued),
        ("XX001", Queued),
    ]
};

/// The error codes of PostgREST with their statuses.
const POSTGREST: &[(u16, &str, Live)] = {
    use Live::{Queued, Rejected};
    &[
        (503, "PGRST000", Queued),
        (503, "PGRST001", Queued),
        (503, "PGRST002", Queued),
        (504, "PGRST003", Queued),
        (400, "PGRST100", Queued),
        (405, "PGRST101", Queued),
        (400, "PGRST102", Rejected),
        (416, "PGRST103", Queued),
        (405, "PGRST105", Queued),
        (406, "PGRST106", Queued),
        (415, "PGRST107", Queued),
        (400, "PGRST108", Queued),
        (400, "PGRST114", Queued),
        (400, "PGRST122", Queued),
        (404, "PGRST125", Queued),
        (400, "PGRST200", Queued),
        (404, "PGRST202", Queued),
        (300, "PGRST203", Queued),
        (400, "PGRST204", Queued),
        (404, "PGRST205", Queued),
        (500, "PGRST300", Queued),
        (401, "PGRST301", Queued),
        (401, "PGRST302", Queued),
        (401, "PGRST303", Queued),
        (500, "PGRSTX00", Queued),
    ]
};

/// The responses of gateways, portals and proxies, and of a PostgREST that lost PostgreSQL during the request.
const STATUSES: &[u16] = &[
    300, 301, 302, 307, 400, 401, 402, 403, 404, 405, 406, 407, 408, 409, 410, 411, 413, 414, 415, 421, 422,
    425, 426, 429, 431, 451, 500, 501, 502, 503, 504, 505, 520, 521, 522, 523, 524, 525, 526, 527, 530, 540,
    544, 599,
];
const BODIES: &[&str] = &[
    "",
    "{}",
    "<html><body>nothing here</body></html>",
    r#"{"message":"no Route matched with those values"}"#,
    r#"{"code":"","details":null,"hint":null,"message":""}"#,
];

/// Returns all responses: a name, the fault that sends the response, and its effect.
pub fn all_responses() -> Vec<(String, Fault, Live)> {
    let sqlstates = SQLSTATES
        .iter()
        .map(|(code, live)| (format!("SQLSTATE {code}"), Fault::json_error(400, code), *live));
    let postgrest = POSTGREST
        .iter()
        .map(|(status, code, live)| ((*code).to_owned(), Fault::json_error(*status, code), *live));
    let bare = STATUSES.iter().flat_map(|status| {
        let named = |body: &&str| {
            (format!("HTTP {status} with {body:?}"), Fault::answer(*status, body), Live::Queued)
        };
        BODIES.iter().map(named).collect::<Vec<_>>()
    });
    sqlstates.chain(postgrest).chain(bare).collect()
}

/// Returns one response of each kind, for slow tests.
pub fn representative_responses() -> Vec<(String, Fault)> {
    let is_wanted = |name: &str| {
        let codes = ["22001", "23502", "3F000", "42501", "42883", "53100", "57014", "P0001", "XX001"];
        let answers = ["PGRST102", "PGRST106", "PGRST202", "PGRST203", "PGRST303", "HTTP 413 with \"\""];
        let pages = [
            "HTTP 404 with \"{\\\"message",
            "HTTP 400 with \"{\\\"code",
            "HTTP 302 with \"<",
            "HTTP 403 with \"<",
        ];
        let is_named = |part: &&str| name.contains(*part);
        codes.iter().chain(&answers).chain(&pages).any(is_named)
    };
    all_responses()
        .into_iter()
        .filter(|(name, ..)| is_wanted(name))
        .map(|(name, fault, _)| (name, fault))
        .collect()
}
