//! The survey: what a diagnosis asks of a project, beyond what a daemon does. Nothing is retried, and answers are told
//! apart more finely than an operation would need.

use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Request, StatusCode};

use super::body;
use super::classify::{self, Said};
use super::key::ApiKey;
use super::wire::Answer;
use super::{END_OF_TIME, Exchange, Supabase};
use crate::error::{Error, ErrorKind};
use crate::record::Key;
use crate::version::{Moment, Timestamp};

pub(crate) use super::SCHEMA;

/// The functions, each with arguments by which it reads and writes nothing.
pub(crate) const FUNCTIONS: &[(&str, &str)] = &[
    ("threadkeep_probe", "{}"),
    ("threadkeep_load", r#"{"wants":[]}"#),
    ("threadkeep_apply", r#"{"records":[]}"#),
    ("threadkeep_recent", r#"{"page":{"most":0}}"#),
    ("threadkeep_touch", r#"{"keys":[]}"#),
    ("threadkeep_purge", r#"{"most":0}"#),
];

/// The files of `migrations/`, in order. The last one sets the revision.
pub(crate) const MIGRATIONS: [&str; 2] =
    ["20260101000000_conversation_threads.sql", "20261126000000_threadkeep.sql"];

const TABLE: &str = "conversation_threads";
const TOMBSTONES: &str = "threadkeep_deleted";

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caller<'a> {
    /// The daemon.
    Daemon,
    /// Somebody with the key that everybody may know.
    Public(&'a str),
    /// Somebody without any key.
    Nobody,
}

/// An answer of a function.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pulse {
    /// The version of the functions.
    pub(crate) schema: u32,
    /// What the database's clock showed between these two moments.
    pub(crate) shown: Timestamp,
    pub(crate) sent: Moment,
    pub(crate) received: Moment,
}

impl Pulse {
    pub(crate) fn round_trip(&self) -> Duration {
        self.received.since(self.sent)
    }
}

/// Why there was none.
#[derive(Debug)]
pub(crate) struct Trouble {
    pub(crate) why: Why,
    /// What was said, or what happened.
    pub(crate) said: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// No answer came, or only a part of it.
    Silent,
    /// The project is paused, or restricted for what it used or owes.
    Paused,
    Restricted,
    /// Another outage.
    Away,
    /// The key is not taken.
    Key,
    /// The role may not do this.
    Grant,
    /// The function or the table is not there.
    Missing,
    /// Whatever answers is no REST API with these functions.
    Elsewhere,
    /// Anything else.
    Refused,
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self { why: Why::Silent, said: error.to_string() }
    }
}

impl Supabase {
    /// Where it is: scheme, host and port.
    pub(crate) fn place(&self) -> (&str, &str, u16) {
        let host = self.functions.host_str().unwrap_or_default();
        (self.functions.scheme(), host, self.functions.port_or_known_default().unwrap_or(443))
    }

    /// Makes a connection and sends a request without key or content. Whatever is answered, TLS works.
    pub(crate) async fn greet(&self) -> Result<(), Trouble> {
        let mut url = self.functions.clone();
        url.set_path("/");
        self.ask(Request::new(Method::GET, url)).await.map(drop)
    }

    /// Calls one of [`FUNCTIONS`] with its idle arguments.
    pub(crate) async fn pulse(
        &self,
        caller: Caller<'_>,
        (function, body): (&str, &str),
    ) -> Result<Pulse, Trouble> {
        let mut request = self.request(function, body.into());
        *request.headers_mut() = self.headers_of(caller);
        let exchange = self.ask(request).await?;
        let received = Moment::now();
        let body = self.judged(&exchange)?;
        let answer: Answer<'_> = serde_json::from_slice(body).map_err(|e| self.not_ours(body, e))?;
        let shown = Timestamp(answer.now.clamp(0, END_OF_TIME));
        self.clock.correct(exchange.sent, received, shown);
        Ok(Pulse { schema: answer.schema, shown, sent: exchange.sent, received })
    }

    /// Whether this caller sees the thread's row in the table itself.
    pub(crate) async fn sees_row(&self, caller: Caller<'_>, key: &Key) -> Result<bool, Trouble> {
        let exchange = self.ask_table(TABLE, Method::GET, caller, key).await?;
        let body = self.judged(&exchange)?;
        let rows: Vec<serde_json::Value> =
            serde_json::from_slice(body).map_err(|e| self.not_ours(body, e))?;
        Ok(!rows.is_empty())
    }

    /// The migrations that are still to be applied to a database whose functions are missing or old.
    pub(crate) async fn missing_migrations(&self, key: &Key) -> &'static [&'static str] {
        let asked = self.ask_table(TABLE, Method::GET, Caller::Daemon, key).await;
        match asked.and_then(|exchange| self.judged(&exchange).map(drop)) {
            Err(Trouble { why: Why::Missing, .. }) => &MIGRATIONS,
            _ => &MIGRATIONS[1..],
        }
    }

    /// Deletes the thread's row, and the tombstone that this leaves: nobody writes the thread late.
    pub(crate) async fn forget(&self, key: &Key) -> Result<(), Trouble> {
        for table in [TABLE, TOMBSTONES] {
            self.judged(&self.ask_table(table, Method::DELETE, Caller::Daemon, key).await?)?;
        }
        Ok(())
    }

    async fn ask_table(
        &self,
        table: &str,
        method: Method,
        caller: Caller<'_>,
        key: &Key,
    ) -> Result<Exchange, Trouble> {
        let mut url = self.functions.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop().push(table);
        }
        let column = if method == Method::GET { "select=thread_id&" } else { "" };
        url.set_query(Some(&format!("{column}thread_id=eq.{}", key.as_str())));
        let mut request = Request::new(method, url);
        *request.headers_mut() = self.headers_of(caller);
        request.headers_mut().insert("accept-profile", HeaderValue::from_static("public"));
        self.ask(request).await
    }

    /// Sends a request whose answer is small. Once that has begun, it may take no longer than it took to begin.
    async fn ask(&self, request: Request) -> Result<Exchange, Trouble> {
        let span = self.stall.saturating_mul(2);
        tokio::select! {
            exchange = self.exchange(request, Duration::ZERO, body::VERDICTS) => Ok(exchange?),
            () = tokio::time::sleep(span) => {
                let said = format!("Supabase at {} did not end its answer within {span:.1?}", self.host);
                Err(Trouble { why: Why::Silent, said })
            }
        }
    }

    fn headers_of(&self, caller: Caller<'_>) -> HeaderMap {
        let without = || HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        match caller {
            Caller::Daemon => self.keys.current().headers().clone(),
            Caller::Public(key) => ApiKey::new(key).map_or_else(|_| without(), |key| key.headers().clone()),
            Caller::Nobody => without(),
        }
    }

    /// The body of a good answer.
    fn judged<'a>(&self, Exchange { status, body, .. }: &'a Exchange) -> Result<&'a [u8], Trouble> {
        match (status.is_success(), body.is_whole()) {
            (true, true) => Ok(body.bytes()),
            (true, false) => {
                let said = classify::too_large(&self.host, body.bytes()).to_string();
                Err(Trouble { why: Why::Elsewhere, said })
            }
            (false, _) => {
                let said = Said::of(*status, body.bytes());
                Err(Trouble { why: why(*status, &said), said: said.what })
            }
        }
    }

    fn not_ours(&self, body: &[u8], error: serde_json::Error) -> Trouble {
        Trouble { why: Why::Elsewhere, said: classify::not_ours(&self.host, body, error).to_string() }
    }
}

fn why(status: StatusCode, said: &Said) -> Why {
    match (said.kind(status), status.as_u16()) {
        (_, 540) => Why::Paused,
        (_, 402) => Why::Restricted,
        (ErrorKind::Unavailable, 300..=399 | 401 | 403 | 404..=407) if said.code.is_empty() => Why::Elsewhere,
        (ErrorKind::Unavailable, _) => Why::Away,
        (ErrorKind::Denied, _) if said.code == "42501" => Why::Grant,
        (ErrorKind::Denied, _) => Why::Key,
        (ErrorKind::Schema, _) => Why::Missing,
        _ => Why::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_migrations_are_those_of_the_folder() {
        let folder = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations")).unwrap();
        let mut names: Vec<_> =
            folder.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, MIGRATIONS);
    }

    #[test]
    fn an_answer_says_why() {
        let why = |status: u16, body: &str| {
            let status = StatusCode::from_u16(status).unwrap();
            why(status, &Said::of(status, body.as_bytes()))
        };
        for (status, body, expected) in [
            (540, "", Why::Paused),
            (402, "{}", Why::Restricted),
            (522, "<html>", Why::Away),
            (503, r#"{"code":"PGRST001"}"#, Why::Away),
            (401, r#"{"message":"Invalid API key"}"#, Why::Key),
            (401, r#"{"code":"42501"}"#, Why::Grant),
            (404, r#"{"code":"PGRST202"}"#, Why::Missing),
            (404, r#"{"message":"no Route"}"#, Why::Elsewhere),
            (301, "", Why::Elsewhere),
            (403, "<html>", Why::Elsewhere),
            (400, "{}", Why::Away),
            (400, r#"{"code":"22P05"}"#, Why::Refused),
        ] {
            assert_eq!(why(status, body), expected, "{status} {body}");
        }
    }
}
