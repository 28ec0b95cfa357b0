//! A store in a Supabase project, reached through PostgREST.
//!
//! Only this module knows HTTP. Each operation is one POST to a database function of the migrations. The request carries a
//! batch, and the response is one JSON value.
//!
//! Why functions and not the table endpoints? A table endpoint cannot write a record only if it is newer (I9). PostgREST
//! also cuts sets at `max-rows`.

mod body;
mod classify;
mod credentials;
mod http;
mod key;
pub(crate) mod project_probe;
mod resolver;
mod url;
mod wire;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use reqwest::{Client, Url};

use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::version::Timestamp;
use crate::store::{Applied, Changes, Cursor, ListPage, ListRequest, LoadRequest, Loaded, Store, Write};

use credentials::Credentials;
use key::ApiKey;
use url::{functions_url, is_unencrypted, origin};
use wire::{FunctionResponse, ResultRow};

pub(crate) use credentials::KeyProvider;
pub(crate) use key::check_key;
pub use key::{KeyFacts, KeyKind};
pub(crate) use url::check_url;
pub use url::origin_of;

/// Limits the records of one request, so that its transaction is short.
const MAX_REQUEST_RECORDS: usize = 500;
/// Limits the bytes of one request. Gateways reject large bodies.
const MAX_REQUEST_BYTES: usize = 1024 * 1024;
/// The default of [`Supabase::idle_timeout`].
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// The last millisecond that a version can hold, in the year 2109. A later time in a response is wrong.
const MAX_TIMESTAMP: i64 = i64::MAX >> 21;
/// The revision of the database functions that this client needs.
pub const REVISION: u32 = 4;

/// Stores conversations in one Supabase project.
///
/// Wrap it in a [`ResilientStore`](crate::store::ResilientStore), because a client alone has neither a deadline nor a breaker.
///
/// ```no_run
/// use std::time::Duration;
///
/// use threadkeep::store::{ResilientStore, Supabase};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> threadkeep::Result<()> {
/// let supabase = Supabase::new("https://abc.supabase.co", "sb_secret_abc")?
///     .idle_timeout(Duration::from_secs(2))
///     .key_provider(|| std::fs::read_to_string("/run/secrets/supabase-key").ok());
/// assert_eq!(supabase.host(), "abc.supabase.co");
/// let store = ResilientStore::new(supabase, Duration::from_secs(5));
/// store.connect().await?;
/// # Ok(())
/// # }
/// ```
pub struct Supabase {
    client: Client,
    functions: Url,
    /// Host and port, for error messages.
    host: String,
    credentials: Credentials,
    clock: Arc<Clock>,
    /// Limits the wait for the start of a response, and for each further part.
    idle_limit: Duration,
}

/// Never shows the key.
impl fmt::Debug for Supabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supabase").field("host", &self.host).field("key", &self.credentials).finish()
    }
}

impl Supabase {
    /// Creates a client for a project. Sends no request yet.
    ///
    /// The URL has the form `https://PROJECT.supabase.co`. The key is the secret (service role) key: a `sb_secret_…` key, or
    /// the legacy JWT.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the URL or the key has a wrong form. See [`Supabase`] for an example.
    pub fn new(url: &str, key: &str) -> Result<Self> {
        Self::with_clock(url, key, Clock::new())
    }

    /// As [`new`](Self::new), with a clock that the responses of the database correct.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn with_clock(url: &str, key: &str, clock: Clock) -> Result<Self> {
        let config =
            |setting: &str, problem: &str| Error::new(ErrorKind::Config, format!("{setting} {problem}"));
        let functions = functions_url(url).map_err(|problem| config("the Supabase URL", problem))?;
        let key = ApiKey::new(key).map_err(|problem| config("the Supabase key", problem))?;
        if is_unencrypted(&functions) {
            tracing::warn!(
                "the Supabase URL uses http: others on the network can read the key and the conversations"
            );
        }
        let host = origin(&functions);
        let client = http::client().map_err(|e| {
            Error::new(ErrorKind::Config, "cannot set up the HTTP client for Supabase")
                .with_source(e.without_url())
        })?;
        let credentials = Credentials::new(key);
        Ok(Self { client, functions, host, credentials, clock: Arc::new(clock), idle_limit: IDLE_TIMEOUT })
    }

    /// Creates a client for a PostgREST server without Supabase's gateway and without its path `/rest/v1`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    ///
    /// ```
    /// use threadkeep::store::Supabase;
    ///
    /// # fn main() -> threadkeep::Result<()> {
    /// let client = Supabase::of_postgrest("http://127.0.0.1:3000", "sb_secret_abc")?;
    /// assert_eq!(client.host(), "127.0.0.1:3000");
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "testing")]
    pub fn of_postgrest(url: &str, key: &str) -> Result<Self> {
        let mut client = Self::new(url, key)?;
        client.functions.set_path("/rpc");
        Ok(client)
    }

    /// Limits the wait for the start of a response, and for each further part. The default is 5 s.
    ///
    /// A large response may take longer as a whole while its parts arrive. See [`Supabase`] for an example.
    #[must_use]
    pub fn idle_timeout(mut self, limit: Duration) -> Self {
        self.idle_limit = limit;
        self
    }

    /// Sets a provider of new keys, so that a key can be rotated without a restart.
    ///
    /// The client calls the provider if Supabase rejects the current key. One OS thread at a time calls it, at most once a
    /// second. The provider may block. If it returns another key, the client uses that key and repeats the rejected request.
    /// The current key stays if the provider returns `None` or an unusable text, or panics. A request waits for the provider
    /// for at most half of [`idle_timeout`](Self::idle_timeout). See [`Supabase`] for an example.
    #[must_use]
    pub fn key_provider(self, provider: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        self.with_key_provider(Some(KeyProvider::new(provider)))
    }

    pub(crate) fn with_key_provider(mut self, provider: Option<KeyProvider>) -> Self {
        self.credentials = self.credentials.with_provider(provider);
        self
    }

    /// Returns the project's host, with the port if the URL has one. See [`Supabase`] for an example.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Calls a database function. Every response also corrects the clock.
    async fn call<T>(
        &self,
        (function, max_body): (&str, usize),
        body: Vec<u8>,
        read: impl FnOnce(FunctionResponse<'_>) -> Result<T>,
    ) -> Result<T> {
        // A request may take a second for each MiB.
        let upload = body.len() >> 20;
        let request = self.request(function, body);
        let (sent, body) = self.send(request, Duration::from_secs(upload as u64), max_body).await?;
        let unexpected_body = |error| classify::unexpected_body(&self.host, &body, error);
        let response: FunctionResponse<'_> = serde_json::from_slice(&body).map_err(unexpected_body)?;
        self.clock.correct_at(sent, Moment::now(), Timestamp(response.now.clamp(0, MAX_TIMESTAMP)));
        let result = if response.revision >= REVISION {
            read(response)
        } else {
            let found = response.revision;
            let message =
                format!("the database functions have revision {found}; threadkeep needs {REVISION}");
            Err(Error::new(ErrorKind::SchemaOutdated, message).with_remedy(classify::MIGRATE))
        };
        // The function ran, and may have written (I6).
        result.map_err(Error::with_outcome_unknown)
    }

    /// Loads conversations with one call. The result has `None` for each record that did not fit into the response.
    async fn load_chunk(&self, requests: &[LoadRequest]) -> Result<Vec<Option<Loaded>>> {
        let read = |response: FunctionResponse<'_>| {
            let rows = expect_rows(requests.len(), response)?;
            rows.zip(requests).map(|(row, request)| row.loaded(&request.key)).collect()
        };
        self.call(("threadkeep_load", body::MAX_RECORDS_BODY), wire::load(requests)?, read).await
    }
}

/// Returns the rows of a response, which must have one row for each requested record.
fn expect_rows<'a>(
    count: usize,
    response: FunctionResponse<'a>,
) -> Result<impl Iterator<Item = ResultRow<'a>>> {
    // Rows have no index. A missing row would shift the answers of all later records.
    if response.rows.len() == count {
        return Ok(response.rows.into_iter());
    }
    let message = format!("the database functions returned {} rows for {count} records", response.rows.len());
    Err(Error::new(ErrorKind::SchemaOutdated, message))
}

/// Splits writes into chunks within [`MAX_REQUEST_RECORDS`] and [`MAX_REQUEST_BYTES`]. A larger record gets its own chunk.
fn chunks_of(writes: &[Write]) -> impl Iterator<Item = &[Write]> {
    let mut left = writes;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |write: &&Write| {
            bytes += write.record.bytes();
            bytes <= MAX_REQUEST_BYTES
        };
        // One write at least, so that the chunks end (I12).
        let count = left.iter().take(MAX_REQUEST_RECORDS).take_while(fits).count().max(1).min(left.len());
        let (chunk, rest) = left.split_at(count);
        left = rest;
        (!chunk.is_empty()).then_some(chunk)
    })
}

#[async_trait]
impl Store for Supabase {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        let mut all = Vec::with_capacity(requests.len());
        for chunk in requests.chunks(MAX_REQUEST_RECORDS) {
            let mut loaded = self.load_chunk(chunk).await?;
            // A response ends at 16 MiB, and has at least one record. Each round asks for the missing ones (I12).
            loop {
                let missing: Vec<usize> = (0..loaded.len()).filter(|at| loaded[*at].is_none()).collect();
                if missing.is_empty() {
                    break;
                }
                let requests: Vec<LoadRequest> = missing.iter().map(|at| chunk[*at].clone()).collect();
                let more = self.load_chunk(&requests).await?;
                // A round without a record would repeat for ever (I12).
                if more.iter().all(Option::is_none) {
                    let message = "the database function threadkeep_load returned no record";
                    return Err(Error::new(ErrorKind::SchemaOutdated, message));
                }
                for (at, record) in missing.into_iter().zip(more) {
                    loaded[at] = record;
                }
            }
            all.extend(loaded.into_iter().flatten());
        }
        Ok(all)
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let mut all = Vec::with_capacity(writes.len());
        for chunk in chunks_of(writes) {
            let read = |response: FunctionResponse<'_>| {
                expect_rows(chunk.len(), response)?
                    .zip(chunk)
                    .map(|(row, write)| row.applied(write))
                    .collect()
            };
            // A database of an earlier revision would take an append for a put. It lacks the second function.
            let has_append = chunk.iter().any(|write| write.append.is_some());
            let function = if has_append { "threadkeep_apply_appends" } else { "threadkeep_apply" };
            let applied: Result<Vec<Applied>> =
                self.call((function, body::MAX_OUTCOMES_BODY), wire::apply(chunk)?, read).await;
            // Earlier chunks are committed, even if this one is not (I6).
            all.extend(applied.map_err(|e| if all.is_empty() { e } else { e.with_outcome_unknown() })?);
        }
        Ok(all)
    }

    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        let read = |response: FunctionResponse<'_>| {
            let is_last = response.is_last;
            let records = response.rows.into_iter().map(ResultRow::record).collect::<Result<_>>()?;
            Ok(ListPage { records, is_last })
        };
        self.call(("threadkeep_list", body::MAX_RECORDS_BODY), wire::list(page)?, read).await
    }

    async fn touch(&self, keys: &[Key]) -> Result<()> {
        for chunk in keys.chunks(MAX_REQUEST_RECORDS) {
            self.call(("threadkeep_touch", body::MAX_OUTCOMES_BODY), wire::touch(chunk)?, |_| Ok(())).await?;
        }
        Ok(())
    }

    async fn purge(&self, limit: usize) -> Result<usize> {
        let read = |response: FunctionResponse<'_>| Ok(response.count);
        self.call(("threadkeep_purge", body::MAX_OUTCOMES_BODY), wire::purge(limit)?, read).await
    }

    async fn changes(&self, since: Option<&Cursor>) -> Result<Option<Changes>> {
        let read = |response: FunctionResponse<'_>| response.changes().map(Some);
        self.call(("threadkeep_changes", body::MAX_RECORDS_BODY), wire::changes(since)?, read).await
    }

    async fn probe(&self) -> Result<()> {
        self.call(("threadkeep_probe", body::MAX_OUTCOMES_BODY), "{}".into(), |_| Ok(())).await
    }
}
