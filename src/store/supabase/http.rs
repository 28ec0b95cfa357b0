//! The HTTP transport: requests with a key, and responses up to a limit.

use std::future::Future;
use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use reqwest::{Client, Method, Request, StatusCode, redirect, retry};

use super::body::{self, ResponseBody};
use super::{Supabase, classify, resolver};
use crate::error::{Error, ErrorKind, Result};
use crate::model::moment::Moment;

pub(super) struct RawResponse {
    pub(super) sent: Moment,
    status: StatusCode,
    retry_after: Option<Duration>,
    body: Vec<u8>,
    /// Whether the body was read to its end.
    is_whole: bool,
}

impl RawResponse {
    /// Returns the body of a success, or the error that the response stands for.
    pub(super) fn into_body(self, host: &str, key_remedy: &'static str) -> Result<Vec<u8>> {
        let Self { status, retry_after, body, is_whole, .. } = self;
        match (status.is_success(), is_whole) {
            (true, true) => Ok(body),
            (true, false) => Err(classify::body_too_large(host, &body)),
            (false, _) => Err(classify::error_response(status, retry_after, &body, key_remedy)),
        }
    }
}

impl Supabase {
    /// Builds a call of a database function, without a key.
    pub(super) fn request(&self, function: &str, body: Vec<u8>) -> Request {
        let mut url = self.functions.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.push(function);
        }
        let mut request = Request::new(Method::POST, url);
        *request.body_mut() = Some(body.into());
        request
    }

    /// Sends a request. Repeats it once if Supabase rejects the key and the provider has another one.
    ///
    /// A rejected request has no effect, so the repetition is safe. Returns the time of sending, and the body.
    pub(super) async fn send(
        &self,
        request: Request,
        upload: Duration,
        max_body: usize,
    ) -> Result<(Moment, Vec<u8>)> {
        let mut key = self.credentials.current();
        // The clone shares the body.
        let (mut repetition, mut request) = (request.try_clone(), request);
        loop {
            *request.headers_mut() = key.headers.clone();
            let response = self.exchange(request, upload, max_body).await?;
            let sent = response.sent;
            let failure = match response.into_body(&self.host, key.remedy()) {
                Ok(body) => return Ok((sent, body)),
                Err(failure) => failure,
            };
            let next = repetition.take().filter(|_| failure.kind() == ErrorKind::Unauthorized);
            let Some(next) = next else { return Err(failure) };
            let refreshed = self.credentials.refresh_after_rejection(&key, self.idle_limit / 2).await;
            let Some(new) = refreshed else { return Err(failure) };
            (request, key) = (next, new);
        }
    }

    /// Sends a request, and reads at most `max_body` bytes of the response. Closes the connection of a longer response.
    pub(super) async fn exchange(
        &self,
        request: Request,
        upload: Duration,
        max_body: usize,
    ) -> Result<RawResponse> {
        // Before the connection, so that the database cannot have read its clock earlier.
        let sent = Moment::now();
        let mut response =
            self.with_timeout(self.idle_limit.saturating_add(upload), self.client.execute(request)).await?;
        let status = response.status();
        // The other form of `Retry-After`, a date, is ignored.
        let seconds =
            response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let retry_after = seconds.map(Duration::from_secs);
        let max_body = if status.is_success() { max_body } else { body::MAX_ERROR_BODY };
        let (mut body, mut is_whole) = (ResponseBody::new(max_body, response.content_length()), true);
        while is_whole && let Some(part) = self.with_timeout(self.idle_limit, response.chunk()).await? {
            is_whole = body.push(&part);
        }
        Ok(RawResponse { sent, status, retry_after, body: body.bytes, is_whole })
    }

    /// Limits one step of a call (I12). A large response may take longer as a whole while its parts arrive.
    async fn with_timeout<T>(
        &self,
        limit: Duration,
        step: impl Future<Output = reqwest::Result<T>>,
    ) -> Result<T> {
        tokio::select! {
            result = step => result.map_err(|error| classify::transport_error(error, &self.host)),
            () = tokio::time::sleep(limit) => {
                let message = format!("Supabase at {} did not answer within {limit:.1?}", self.host);
                Err(Error::new(ErrorKind::Unavailable, message).with_outcome_unknown())
            }
        }
    }
}

pub(super) fn client() -> reqwest::Result<Client> {
    Client::builder()
        // Supabase rejects a secret key if the User-Agent is a browser's.
        .user_agent(concat!("threadkeep/", env!("CARGO_PKG_VERSION")))
        // A redirect would send the key to another server. `ResilientStore` retries, so reqwest does not.
        .redirect(redirect::Policy::none())
        .retry(retry::never())
        .dns_resolver(resolver::Resolver)
        .connect_timeout(Duration::from_secs(3))
        .pool_idle_timeout(Duration::from_secs(30))
        .tcp_keepalive(Duration::from_secs(15))
        // Without keep-alive a stalled HTTP/2 connection stays in the pool.
        .http2_keep_alive_interval(Duration::from_secs(15))
        .http2_keep_alive_timeout(Duration::from_secs(5))
        .http2_keep_alive_while_idle(true)
        .build()
}
