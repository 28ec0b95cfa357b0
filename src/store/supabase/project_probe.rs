//! Requests that a diagnosis sends to a project. The probe retries no request, and reports failures in more detail than a
//! daemon needs.

use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Request};
use serde::Deserialize;

use super::classify;
use super::http::RawResponse;
use super::key::ApiKey;
use super::wire::FunctionResponse;
use super::{MAX_TIMESTAMP, Supabase, body};
use crate::error::{Error, ErrorKind, Result};
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::version::Timestamp;
use crate::store::Store as _;

/// The database functions, each with arguments by which it reads and writes nothing.
pub const FUNCTIONS: &[(&str, &str)] = &[
    ("threadkeep_probe", "{}"),
    ("threadkeep_load", r#"{"requests":[]}"#),
    ("threadkeep_apply", r#"{"writes":[]}"#),
    ("threadkeep_apply_appends", r#"{"writes":[]}"#),
    ("threadkeep_changes", r#"{"request":{}}"#),
    ("threadkeep_list", r#"{"request":{"limit":0}}"#),
    ("threadkeep_touch", r#"{"keys":[]}"#),
    ("threadkeep_purge", r#"{"max_rows":0}"#),
];

/// The files of `migrations/`, in order. The last one sets the revision.
const MIGRATIONS: [&str; 2] = ["20260101000000_conversation_threads.sql", "20261126000000_threadkeep.sql"];

const TABLE: &str = "conversation_threads";
const TOMBSTONES: &str = "threadkeep_tombstones";

/// The identity by which a request is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller<'a> {
    /// The daemon, with its secret key.
    ServiceRole,
    /// A client with the public key.
    Anon(&'a str),
    /// A client without a key.
    Anonymous,
}

/// The response of a database function.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct ProbeResponse {
    /// The revision of the functions.
    pub revision: u32,
    /// The time from sending the request to receiving the response.
    pub round_trip: Duration,
    /// The bounds, in milliseconds, of the lead of the database's clock over this machine's clock.
    pub clock_lead: (i64, i64),
}

/// Asks a project questions for a diagnosis.
///
/// ```no_run
/// use threadkeep::Key;
/// use threadkeep::store::Supabase;
/// use threadkeep::tools::{Caller, FUNCTIONS, ProjectProbe};
///
/// # async fn example() -> threadkeep::Result<()> {
/// let probe = ProjectProbe::new(Supabase::new("https://abc.supabase.co", "sb_secret_abc")?);
/// assert_eq!(probe.client().host(), "abc.supabase.co");
/// assert_eq!(probe.address(), ("https", "abc.supabase.co", 443));
/// if let Err(error) = probe.check_tls().await {
///     println!("{error}");
/// }
/// let response = probe.call_idle(Caller::ServiceRole, FUNCTIONS[0]).await;
/// println!("not applied: {:?}", probe.missing_migrations().await);
/// let key = Key::new("thread-1")?;
/// let is_public = probe.row_is_visible(Caller::Anonymous, &key).await;
/// let deleted = probe.delete_row(&key).await;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ProjectProbe(Supabase);

impl ProjectProbe {
    /// Wraps a client. See [`ProjectProbe`] for an example.
    pub fn new(client: Supabase) -> Self {
        Self(client)
    }

    /// Returns the client. See [`ProjectProbe`] for an example.
    pub fn client(&self) -> &Supabase {
        &self.0
    }

    /// Returns scheme, host and port. See [`ProjectProbe`] for an example.
    pub fn address(&self) -> (&str, &str, u16) {
        let functions = &self.0.functions;
        let host = functions.host_str().unwrap_or_default();
        (functions.scheme(), host, functions.port_or_known_default().unwrap_or(443))
    }

    /// Connects, and sends a request without key or content. Any response shows that TLS works.
    ///
    /// # Errors
    /// The failure of the connection. See [`ProjectProbe`] for an example.
    pub async fn check_tls(&self) -> Result<()> {
        let mut url = self.0.functions.clone();
        url.set_path("/");
        self.exchange(Request::new(Method::GET, url)).await.map(drop)
    }

    /// Calls one of [`FUNCTIONS`] with its idle arguments.
    ///
    /// # Errors
    /// The failure of the request. See [`ProjectProbe`] for an example.
    pub async fn call_idle(
        &self,
        caller: Caller<'_>,
        (function, body): (&str, &str),
    ) -> Result<ProbeResponse> {
        let mut request = self.0.request(function, body.into());
        *request.headers_mut() = self.headers_of(caller);
        // This clock follows this machine's clock, and the client's clock the database's.
        let machine = crate::model::clock::Clock::new();
        let (sent, body) = self.send(request).await?;
        let received = Moment::now();
        let answer: FunctionResponse<'_> = self.parse(&body)?;
        let shown = Timestamp(answer.now.clamp(0, MAX_TIMESTAMP));
        self.0.clock().correct_at(sent, received, shown);
        let lead = |at: Moment| shown.0 - machine.at(at).0;
        Ok(ProbeResponse {
            revision: answer.revision,
            round_trip: received.since(sent),
            clock_lead: (lead(received), lead(sent)),
        })
    }

    /// Whether this caller sees the conversation's row in the table itself.
    ///
    /// # Errors
    /// The failure of the request. See [`ProjectProbe`] for an example.
    pub async fn row_is_visible(&self, caller: Caller<'_>, key: &Key) -> Result<bool> {
        let body = self.send_to_table(TABLE, Method::GET, caller, key.as_str()).await?;
        let rows: Vec<serde_json::Value> = self.parse(&body)?;
        Ok(!rows.is_empty())
    }

    /// Returns the migrations that a database with missing or old functions lacks. See [`ProjectProbe`] for an example.
    pub async fn missing_migrations(&self) -> &'static [&'static str] {
        // Any id serves: the response shows whether the table exists.
        match self.send_to_table(TABLE, Method::GET, Caller::ServiceRole, "threadkeep-doctor").await {
            Err(error) if error.kind() == ErrorKind::SchemaOutdated => &MIGRATIONS,
            _ => &MIGRATIONS[1..],
        }
    }

    /// Deletes the conversation's row, and the tombstone of that deletion. No other client may write the conversation.
    ///
    /// # Errors
    /// The failure of a request. See [`ProjectProbe`] for an example.
    pub async fn delete_row(&self, key: &Key) -> Result<()> {
        // The trigger writes a tombstone when the row goes, so the tombstones come second.
        for table in [TABLE, TOMBSTONES] {
            self.send_to_table(table, Method::DELETE, Caller::ServiceRole, key.as_str()).await?;
        }
        Ok(())
    }

    async fn send_to_table(
        &self,
        table: &str,
        method: Method,
        caller: Caller<'_>,
        key: &str,
    ) -> Result<Vec<u8>> {
        let mut url = self.0.functions.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop().push(table);
        }
        let column = if method == Method::GET { "select=thread_id&" } else { "" };
        url.set_query(Some(&format!("{column}thread_id=eq.{key}")));
        let mut request = Request::new(method, url);
        *request.headers_mut() = self.headers_of(caller);
        // PostgREST takes the schema of a GET from this header, not from `content-profile`.
        request.headers_mut().insert("accept-profile", HeaderValue::from_static("public"));
        self.send(request).await.map(|(_, body)| body)
    }

    /// Sends a request. Returns the time of sending, and the body of a success.
    async fn send(&self, request: Request) -> Result<(Moment, Vec<u8>)> {
        let response = self.exchange(request).await?;
        let sent = response.sent;
        Ok((sent, response.into_body(&self.0.host, self.0.credentials.current().remedy())?))
    }

    fn parse<'a, T: Deserialize<'a>>(&self, body: &'a [u8]) -> Result<T> {
        serde_json::from_slice(body).map_err(|e| classify::unexpected_body(&self.0.host, body, e))
    }

    /// Sends a request with a small response. The whole response may take twice the idle timeout.
    async fn exchange(&self, request: Request) -> Result<RawResponse> {
        // The idle limit bounds each part only. A slow server could send parts for ever (I12).
        let limit = self.0.idle_limit.saturating_mul(2);
        tokio::select! {
            response = self.0.exchange(request, Duration::ZERO, body::MAX_OUTCOMES_BODY) => response,
            () = tokio::time::sleep(limit) => {
                let message = format!("Supabase at {} did not complete its response within {limit:.1?}", self.0.host);
                Err(Error::new(ErrorKind::Unavailable, message))
            }
        }
    }

    fn headers_of(&self, caller: Caller<'_>) -> HeaderMap {
        let without_key =
            || HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        match caller {
            Caller::ServiceRole => self.0.credentials.current().headers.clone(),
            Caller::Anon(key) => ApiKey::new(key).map_or_else(|_| without_key(), |key| key.headers.clone()),
            Caller::Anonymous => without_key(),
        }
    }
}
