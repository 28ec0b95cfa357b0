//! The server behind the gateway.

use super::Server;
use super::keys::{Caller, jwt};
use super::wire::{Reply, Request};

/// Lite's own keys. No client of the gateway knows them.
pub const LITE_SECRET: &str = "sb_secret_between_gateway_and_lite";
pub const LITE_PUBLISHABLE: &str = "sb_publishable_between_gateway_and_lite";

/// The answers of PostgREST while PostgreSQL is down, and after `statement_timeout`.
const DATABASE_DOWN: (u16, &str) = (503, r#"{"code":"PGRST001","message":"Database client error"}"#);
const STATEMENT_TIMEOUT: (u16, &str) = (500, r#"{"code":"57014","message":"canceling statement"}"#);

/// Maps failures of postrust and lite to the answers of PostgREST, so that a client sees PostgREST's answers.
///
/// The table has only failures of the environment, not failures of a request.
const CORRECTIONS: [(&str, (u16, &str)); 4] = [
    (r#""code":"PGRST500""#, DATABASE_DOWN),
    ("connect ECONNREFUSED", DATABASE_DOWN),
    ("Connection terminated", DATABASE_DOWN),
    ("canceling statement due to statement timeout", STATEMENT_TIMEOUT),
];

/// Forwards admitted requests to the server.
pub struct Upstream {
    server: Server,
    port: u16,
    client: reqwest::Client,
}

impl Upstream {
    pub fn new(server: Server, port: u16) -> Self {
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            // No pool: a connection from before a restart of the server could fail the first request.
            .pool_max_idle_per_host(0)
            // The client does not decompress bodies, whatever features the library enables in reqwest.
            .no_gzip()
            .build()
            .expect("the settings of the client are valid");
        Self { server, port, client }
    }

    /// Forwards a request of `caller`. `path` is the path after `/rest/v1`.
    ///
    /// If the server does not answer, returns Cloudflare's answer: 521 for a failed connection, otherwise 520.
    pub async fn forward(&self, request: &Request, path: &str, caller: Caller) -> Reply {
        match self.ask(request, path, caller).await {
            Ok(reply) if reply.status >= 500 && self.server != Server::Postgrest => corrected(reply),
            Ok(reply) => reply,
            Err(error) if error.is_connect() => Reply::html(521),
            Err(_) => Reply::html(520),
        }
    }

    async fn ask(&self, request: &Request, path: &str, caller: Caller) -> reqwest::Result<Reply> {
        let url = format!("http://127.0.0.1:{}{}{path}", self.port, self.server.prefix());
        let method = request.method.parse().expect("httparse checked it");
        let theirs = request.headers.iter().filter(|(name, _)| passes(name)).cloned();
        let headers = theirs.chain(self.credentials(caller));
        let forwarded = self.client.request(method, url).body(request.body.clone());
        let answer =
            headers.fold(forwarded, |request, (name, value)| request.header(name, value)).send().await?;

        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        let theirs = answer.headers().iter().filter(|(name, _)| passes(name.as_str()));
        Ok(Reply {
            status: answer.status().as_u16(),
            headers: theirs.map(|(name, value)| (name.to_string(), text(value.as_bytes()))).collect(),
            body: answer.bytes().await?.into(),
        })
    }

    /// Returns the headers that identify the caller. Each server needs other headers than Supabase.
    fn credentials(&self, caller: Caller) -> Vec<(String, String)> {
        let apikey = |key: &str| ("apikey".to_owned(), key.to_owned());
        let bearer = |token: String| ("authorization".to_owned(), format!("Bearer {token}"));
        match (self.server, caller) {
            (Server::Postrust | Server::Postgrest, Caller::Service) => vec![bearer(jwt("service_role"))],
            (Server::Postrust | Server::Postgrest, Caller::Anon) => vec![],
            (Server::Postrust | Server::Postgrest, Caller::Bearer(token)) => vec![bearer(token)],
            (Server::Lite, Caller::Service) => vec![apikey(LITE_SECRET)],
            (Server::Lite, Caller::Anon) => vec![apikey(LITE_PUBLISHABLE)],
            (Server::Lite, Caller::Bearer(token)) => vec![apikey(LITE_PUBLISHABLE), bearer(token)],
        }
    }
}

/// Tells whether the gateway forwards a header. The gateway handles keys and headers of one connection itself.
fn passes(header: &str) -> bool {
    !matches!(
        header,
        "host"
            | "connection"
            | "keep-alive"
            | "content-length"
            | "transfer-encoding"
            | "apikey"
            | "authorization"
    )
}

fn corrected(reply: Reply) -> Reply {
    let said = String::from_utf8_lossy(&reply.body);
    match CORRECTIONS.iter().find(|(mark, _)| said.contains(mark)) {
        Some((_, (status, body))) => Reply::json(*status, body),
        None => reply,
    }
}
