//! `Supabase`: the source of truth, reached through PostgREST.
//!
//! Only this module knows HTTP. Every operation is one POST to a function of the migrations, with a batch in and one
//! JSON value out: table endpoints cannot express "only where newer", and PostgREST cuts sets at `max-rows`.

mod body;
mod classify;
mod key;
mod keyring;
mod names;
#[cfg(feature = "cli")]
pub(crate) mod survey;
mod wire;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Client, Method, Request, StatusCode, Url, redirect, retry};

use crate::error::{Error, ErrorKind, Result};
use crate::record::{Key, Want, Write};
use crate::store::{Applied, Loaded, Page, Recent, Store};
use crate::version::{Clock, Moment, Timestamp};

use body::Body;
use key::ApiKey;
use keyring::Keyring;
use wire::{Answer, Row};

#[cfg(feature = "cli")]
pub(crate) use classify::MIGRATE;
#[cfg(feature = "cli")]
pub(crate) use key::KeyFacts;
pub(crate) use keyring::KeySource;

/// What one request carries at most: PostgREST and its gateways like it small, a transaction short.
const RECORDS: usize = 500;
const BYTES: usize = 1024 * 1024;
/// See [`Supabase::stall_after`].
const STALL: Duration = Duration::from_secs(5);
/// The last millisecond that a version can hold, in the year 2109: a clock that shows more is not one.
const END_OF_TIME: i64 = i64::MAX >> 21;
/// The version of the database functions that this client needs.
pub(crate) const SCHEMA: u32 = 2;

/// A client for one Supabase project. Put it behind a [`Guard`](crate::Guard): alone it has neither deadline nor
/// breaker.
pub struct Supabase {
    client: Client,
    functions: Url,
    host: String,
    keys: Keyring,
    clock: Arc<Clock>,
    stall: Duration,
}

/// Without the key.
impl fmt::Debug for Supabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supabase").field("host", &self.host).field("key", &self.keys).finish()
    }
}

impl Supabase {
    /// A client for the project at `url` (`https://PROJECT.supabase.co`), with its secret (service role) key: either a
    /// `sb_secret_…` key or the legacy JWT. Nothing is sent yet.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] where `url` or `key` cannot be one.
    pub fn new(url: &str, key: &str) -> Result<Self> {
        Self::with_clock(url, key, Clock::new())
    }

    /// As [`new`](Self::new), with a clock that the database's answers will correct.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn with_clock(url: &str, key: &str, clock: Clock) -> Result<Self> {
        let config = |what: &str, wrong: &str| Error::new(ErrorKind::Config, format!("{what}: {wrong}"));
        let functions = functions_url(url).map_err(|wrong| config("the Supabase URL", wrong))?;
        let key = ApiKey::new(key).map_err(|wrong| config("the Supabase key", wrong))?;
        let host = functions.host_str().unwrap_or_default();
        let is_local = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
        if functions.scheme() == "http" && !is_local {
            tracing::warn!(
                "the Supabase URL is not encrypted (http): key and conversations can be read on the way"
            );
        }
        let host = origin(&functions);
        let client = client().map_err(|e| {
            Error::new(ErrorKind::Config, "the HTTP client cannot be set up").with_source(e.without_url())
        })?;
        let keys = Keyring::new(key);
        Ok(Self { client, functions, host, keys, clock: Arc::new(clock), stall: STALL })
    }

    /// A client for a PostgREST server that stands alone at `url`, without Supabase's gateway and its `/rest/v1`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[cfg(feature = "testing")]
    pub fn of_postgrest(url: &str, key: &str) -> Result<Self> {
        let mut client = Self::new(url, key)?;
        client.functions.set_path("/rpc");
        Ok(client)
    }

    /// How long it may take until an answer begins or goes on: 5 s unless set.
    #[must_use]
    pub fn stall_after(mut self, span: Duration) -> Self {
        self.stall = span;
        self
    }

    /// Where a new key comes from when Supabase refuses the one in use, so that a key can be rotated without a restart.
    ///
    /// `source` is asked by one thread at a time, which it may block, and once a second at most. If its answer is another
    /// key, that one is used from then on, and what was refused is sent once more. `None`, what cannot be a key, and a
    /// panic leave the key as it is. It is not waited for longer than half of [`stall_after`](Self::stall_after).
    #[must_use]
    pub fn renew_key_from(self, source: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        self.with_key_source(Some(KeySource::new(source)))
    }

    pub(crate) fn with_key_source(mut self, source: Option<KeySource>) -> Self {
        self.keys = self.keys.with_source(source);
        self
    }

    /// The project's host, and port where it has one.
    pub fn host(&self) -> &str {
        &self.host
    }

    async fn call<T>(
        &self,
        (function, most): (&str, usize),
        body: Vec<u8>,
        read: impl FnOnce(Answer<'_>) -> Result<T>,
    ) -> Result<T> {
        let upload = body.len() >> 20;
        let request = self.request(function, body);
        let (sent, body) = self.send(request, Duration::from_secs(upload as u64), most).await?;
        let body = body.bytes();
        let not_ours = |error| classify::not_ours(&self.host, body, error);
        let answer: Answer<'_> = serde_json::from_slice(body).map_err(not_ours)?;
        self.clock.correct(sent, Moment::now(), Timestamp(answer.now.clamp(0, END_OF_TIME)));
        let read = if answer.schema >= SCHEMA {
            read(answer)
        } else {
            let what = format!("its functions have version {}, {SCHEMA} is needed", answer.schema);
            Err(Error::new(ErrorKind::Schema, classify::missing_migrations(&what)))
        };
        // The function ran, and may have written.
        read.map_err(Error::with_outcome_unknown)
    }

    /// A call of a function, as yet without a key.
    fn request(&self, function: &str, body: Vec<u8>) -> Request {
        let mut url = self.functions.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.push(function);
        }
        let mut request = Request::new(Method::POST, url);
        *request.body_mut() = Some(body.into());
        request
    }

    /// Sends a request, and once more where Supabase refuses the key and there is another one meanwhile: nothing came
    /// of what was refused. Returns when it was sent, and the answer.
    async fn send(&self, request: Request, upload: Duration, most: usize) -> Result<(Moment, Body)> {
        let key = self.keys.current();
        // The copies share the body.
        let again = request.try_clone();
        let refusal = match self.send_with(&key, request, upload, most).await {
            Err(e) if e.kind() == ErrorKind::Denied => e,
            other => return other,
        };
        match again.zip(self.keys.other_than(&key, self.stall / 2).await) {
            Some((again, key)) => self.send_with(&key, again, upload, most).await,
            None => Err(refusal),
        }
    }

    async fn send_with(
        &self,
        key: &ApiKey,
        mut request: Request,
        upload: Duration,
        most: usize,
    ) -> Result<(Moment, Body)> {
        *request.headers_mut() = key.headers().clone();
        let Exchange { sent, status, rest, body } = self.exchange(request, upload, most).await?;
        match (status.is_success(), body.is_whole()) {
            (true, true) => Ok((sent, body)),
            (true, false) => Err(classify::too_large(&self.host, body.bytes())),
            (false, _) => Err(classify::answer(status, rest, body.bytes(), key.advice())),
        }
    }

    /// Sends a request, and takes in at most so many bytes of an answer. The connection of one that is longer is closed.
    async fn exchange(&self, request: Request, upload: Duration, most: usize) -> Result<Exchange> {
        let sent = Moment::now();
        let mut response =
            self.within(self.stall.saturating_add(upload), self.client.execute(request)).await?;
        let (status, rest) = (response.status(), retry_after(response.headers()));
        let most = if status.is_success() { most } else { body::ERROR };
        let mut body = Body::new(most, response.content_length());
        while let Some(part) = self.within(self.stall, response.chunk()).await? {
            if !body.take(&part) {
                break;
            }
        }
        Ok(Exchange { sent, status, rest, body })
    }

    /// A step of a call, which must not take longer. A large answer may take longer than that as a whole, as long as it
    /// goes on; one that stalls is given up.
    async fn within<T>(&self, span: Duration, step: impl Future<Output = reqwest::Result<T>>) -> Result<T> {
        tokio::select! {
            result = step => result.map_err(|error| classify::no_answer(error, &self.host)),
            () = tokio::time::sleep(span) => {
                let message = format!("Supabase at {} did not answer within {span:.1?}", self.host);
                Err(Error::new(ErrorKind::Unavailable, message).with_outcome_unknown())
            }
        }
    }

    async fn load_some(&self, wants: &[Want]) -> Result<Vec<Option<Loaded>>> {
        let read = |answer: Answer<'_>| {
            let rows = expect(wants.len(), answer)?;
            rows.zip(wants).map(|(row, want)| row.loaded(&want.key)).collect()
        };
        self.call(("threadkeep_load", body::RECORDS), wire::load(wants)?, read).await
    }
}

/// An answer, whatever it says.
struct Exchange {
    sent: Moment,
    status: StatusCode,
    rest: Option<Duration>,
    body: Body,
}

/// The rows of an answer, which must be as many as there were questions.
fn expect<'a>(count: usize, answer: Answer<'a>) -> Result<impl Iterator<Item = Row<'a>>> {
    if answer.rows.len() == count {
        return Ok(answer.rows.into_iter());
    }
    let what = format!("the database answered {} of {count} records", answer.rows.len());
    Err(Error::new(ErrorKind::Schema, what))
}

/// Slices of at most [`RECORDS`] writes and, but for a large record that goes alone, [`BYTES`].
fn portions(writes: &[Write]) -> impl Iterator<Item = &[Write]> {
    let mut left = writes;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |write: &&Write| {
            bytes += write.record.bytes();
            bytes <= BYTES
        };
        let count = left.iter().take(RECORDS).take_while(fits).count().max(1).min(left.len());
        let (portion, rest) = left.split_at(count);
        left = rest;
        (!portion.is_empty()).then_some(portion)
    })
}

/// Whether this can be a project's URL; says what would be right.
pub(crate) fn check_url(url: &str) -> Result<(), String> {
    functions_url(url).map(drop).map_err(|wrong| format!("{wrong}; use one like https://PROJECT.supabase.co"))
}

/// Whether this can be a key; says what would be right.
pub(crate) fn check_key(key: &str) -> Result<(), String> {
    ApiKey::new(key)
        .map(drop)
        .map_err(|wrong| format!("{wrong}; use the project's secret (service_role) key"))
}

/// The host of a project, and its port where the URL has one: what the project's queue is marked with.
fn origin(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The [`origin`] of a URL, if that can be a project's.
#[cfg(feature = "cli")]
pub(crate) fn origin_of(url: &str) -> Option<String> {
    functions_url(url).ok().map(|url| origin(&url))
}

/// Where the functions are, or what is wrong with the URL. It may hold a secret, so it is not repeated.
fn functions_url(url: &str) -> Result<Url, &'static str> {
    let mut parsed = Url::parse(url.trim()).map_err(|_| "this is not a URL")?;
    if !matches!(parsed.scheme(), "http" | "https") || parsed.host_str().is_none() {
        return Err("it must start with https:// and name a host");
    }
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err("it must not contain a user or password");
    }
    parsed.set_query(None);
    parsed.set_fragment(None);
    let base = parsed.path().trim_end_matches('/').trim_end_matches("/rest/v1").to_owned();
    parsed.set_path(&format!("{base}/rest/v1/rpc"));
    Ok(parsed)
}

fn client() -> reqwest::Result<Client> {
    Client::builder()
        // Secret keys are refused with the User-Agent of a browser.
        .user_agent(concat!("threadkeep/", env!("CARGO_PKG_VERSION")))
        // A redirect would carry the key elsewhere; the guard retries.
        .redirect(redirect::Policy::none())
        .retry(retry::never())
        .dns_resolver(names::Resolver)
        .connect_timeout(Duration::from_secs(3))
        .pool_idle_timeout(Duration::from_secs(30))
        .tcp_keepalive(Duration::from_secs(15))
        // Without these a stalled HTTP/2 connection stays in the pool.
        .http2_keep_alive_interval(Duration::from_secs(15))
        .http2_keep_alive_timeout(Duration::from_secs(5))
        .http2_keep_alive_while_idle(true)
        .build()
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

#[async_trait]
impl Store for Supabase {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        let mut all = Vec::with_capacity(wants.len());
        for portion in wants.chunks(RECORDS) {
            let mut found = self.load_some(portion).await?;
            // An answer ends at 16 MiB and has at least one record: ask again for those that are left.
            loop {
                let left: Vec<usize> = (0..found.len()).filter(|at| found[*at].is_none()).collect();
                if left.is_empty() {
                    break;
                }
                let wants: Vec<Want> = left.iter().map(|at| portion[*at].clone()).collect();
                let more = self.load_some(&wants).await?;
                if more.iter().all(Option::is_none) {
                    return Err(Error::new(ErrorKind::Schema, "the database answered with no record at all"));
                }
                for (at, loaded) in left.into_iter().zip(more) {
                    found[at] = loaded;
                }
            }
            all.extend(found.into_iter().flatten());
        }
        Ok(all)
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let mut all = Vec::with_capacity(writes.len());
        for portion in portions(writes) {
            let read = |answer: Answer<'_>| expect(portion.len(), answer)?.map(Row::applied).collect();
            let applied: Result<Vec<Applied>> =
                self.call(("threadkeep_apply", body::VERDICTS), wire::apply(portion)?, read).await;
            // Earlier portions are committed, whatever becomes of this one.
            all.extend(applied.map_err(|e| if all.is_empty() { e } else { e.with_outcome_unknown() })?);
        }
        Ok(all)
    }

    async fn recent(&self, page: &Page) -> Result<Recent> {
        let read = |answer: Answer<'_>| {
            let is_last = answer.last;
            let records = answer.rows.into_iter().map(Row::record).collect::<Result<_>>()?;
            Ok(Recent { records, is_last })
        };
        self.call(("threadkeep_recent", body::RECORDS), wire::recent(page)?, read).await
    }

    async fn touch(&self, keys: &[Key]) -> Result<()> {
        for portion in keys.chunks(RECORDS) {
            self.call(("threadkeep_touch", body::VERDICTS), wire::touch(portion)?, |_| Ok(())).await?;
        }
        Ok(())
    }

    async fn purge(&self, most: usize) -> Result<usize> {
        self.call(("threadkeep_purge", body::VERDICTS), wire::purge(most)?, |answer| Ok(answer.count)).await
    }

    async fn probe(&self) -> Result<()> {
        self.call(("threadkeep_probe", body::VERDICTS), "{}".into(), |_| Ok(())).await
    }
}
