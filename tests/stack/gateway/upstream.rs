//! The server behind the gateway.

use super::Server;
use super::keys::{Caller, jwt};
use super::wire::{Reply, Request};

/// Lite's own keys, which no client of the gateway knows.
pub const LITE_SECRET: &str = "sb_secret_between_gateway_and_lite";
pub const LITE_PUBLISHABLE: &str = "sb_publishable_between_gateway_and_lite";

/// What PostgREST says while PostgreSQL is away, and after `statement_timeout`.
const DATABASE_AWAY: (u16, &str) = (503, r#"{"code":"PGRST001","message":"Database client error"}"#);
const TOO_SLOW: (u16, &str) = (500, r#"{"code":"57014","message":"canceling statement"}"#);

/// Failures by what a server says of them, and what PostgREST says. Only those of the weather, not of the
/// request: a client must not have to know that neither postrust nor lite has PostgREST's words for it.
const CORRECTIONS: [(&str, (u16, &str)); 4] = [
    (r#""code":"PGRST500""#, DATABASE_AWAY),
    ("connect ECONNREFUSED", DATABASE_AWAY),
    ("Connection terminated", DATABASE_AWAY),
    ("canceling statement due to statement timeout", TOO_SLOW),
];

/// Carries out what the gateway lets through.
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
            // A connection that was open when the server was killed would make the first request after the
            // restart fail, sometimes.
            .pool_max_idle_per_host(0)
            // Bodies pass as they are, whatever features the library asks of reqwest.
            .no_gzip()
            .build()
            .expect("nothing here can fail");
        Self { server, port, client }
    }

    /// Carries out a request for `caller`; `path` is what follows `/rest/v1`. Where the server gives no
    /// answer, this is Cloudflare's: 521 if it could not connect, else 520.
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

    /// The servers know the caller by different marks, and none by those of Supabase.
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

/// Whether the gateway hands that header on. What concerns one connection or the keys it deals with itself.
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
