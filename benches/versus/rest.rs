//! Sends the requests of a client without threadkeep.
//!
//! Single requests to the table have the form of the official clients. Prebuilt batches to the functions of the
//! migrations show the limit of the speed over REST.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use threadkeep::store::Clock;

use crate::work::{Conversation, conversation};

const TABLE: &str = "conversation_threads";
/// A writer as the library sends it. The functions of revision 2 ignore it.
const WRITER: i64 = 1 << 24;
/// Concurrent requests, as many as threadkeep sends.
const MAX_CONCURRENT: usize = 4;

/// Calls a PostgREST server with plain reqwest.
#[derive(Clone)]
pub struct Rest {
    client: reqwest::Client,
    url: String,
}

/// Prebuilt request bodies.
pub type Bodies = Arc<[String]>;

impl Rest {
    pub fn new(url: &str, token: &str) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert("apikey", token.parse().unwrap());
        headers.insert(AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
        headers.insert(CONTENT_TYPE, "application/json".parse().unwrap());
        let client = reqwest::Client::builder().default_headers(headers).build().unwrap();
        Self { client, url: url.to_owned() }
    }

    async fn response(request: reqwest::RequestBuilder) -> Vec<u8> {
        let response = request.send().await.unwrap();
        let (status, body) = (response.status(), response.bytes().await.unwrap());
        assert!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
        body.into()
    }

    /// Writes one conversation as `upsert` of the official clients does.
    pub async fn upsert(&self, key: &str, value: &Conversation) {
        #[derive(serde::Serialize)]
        struct Row<'a> {
            thread_id: &'a str,
            conversation_data: &'a Conversation,
            expires_at: String,
        }
        let expires_at = (chrono::Utc::now() + Duration::from_secs(86_400)).to_rfc3339();
        let row = Row { thread_id: key, conversation_data: value, expires_at };
        let url = format!("{}/{TABLE}?on_conflict=thread_id", self.url);
        let request = self.client.post(url).header("Prefer", "resolution=merge-duplicates,return=minimal");
        Self::response(request.body(serde_json::to_string(&row).unwrap())).await;
    }

    /// Reads one conversation as `select` of the official clients does.
    pub async fn select(&self, key: &str) -> Conversation {
        #[derive(serde::Deserialize)]
        struct Row {
            conversation_data: Conversation,
        }
        let url =
            format!("{}/{TABLE}?select=conversation_data,expires_at,metadata&thread_id=eq.{key}", self.url);
        let rows: [Row; 1] = serde_json::from_slice(&Self::response(self.client.get(url)).await).unwrap();
        let [row] = rows;
        row.conversation_data
    }

    /// Calls a function of the migrations.
    pub async fn call(&self, function: &str, body: String) -> Vec<u8> {
        Self::response(self.client.post(format!("{}/rpc/{function}", self.url)).body(body)).await
    }

    /// Sends all bodies, [`MAX_CONCURRENT`] at a time, and returns the total time.
    pub async fn call_all(&self, function: &'static str, bodies: &Bodies) -> Duration {
        let (began, next) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
        let senders = (0..MAX_CONCURRENT).map(|_| {
            let (rest, bodies, next) = (self.clone(), Arc::clone(bodies), Arc::clone(&next));
            tokio::spawn(async move {
                while let Some(body) = bodies.get(next.fetch_add(1, Relaxed)) {
                    let response = rest.call(function, body.clone()).await;
                    assert!(!response.is_empty());
                }
            })
        });
        for sender in senders.collect::<Vec<_>>() {
            sender.await.unwrap();
        }
        began.elapsed()
    }
}

/// Builds the body of one `threadkeep_apply` call. The versions age, so send the body soon.
pub fn apply_body(clock: &Clock, threads: impl Iterator<Item = (String, usize)>) -> String {
    let expires = clock.now().plus(Duration::from_secs(86_400)).0;
    let records: Vec<String> = threads
        .map(|(key, bytes)| {
            let value = serde_json::to_string(&conversation(&key, bytes)).unwrap();
            let version = clock.issue_version();
            format!(
                r#"{{"key":"{key}","version":"{version}","writer":"{WRITER}","expires_at":{expires},"metadata":{{}},"value":{value}}}"#
            )
        })
        .collect();
    format!(r#"{{"writes":[{}]}}"#, records.join(","))
}

/// Builds the body of one `threadkeep_load` call.
pub fn load_body(keys: &[String]) -> String {
    let requests: Vec<String> = keys.iter().map(|key| format!(r#"{{"key":"{key}"}}"#)).collect();
    format!(r#"{{"requests":[{}]}}"#, requests.join(","))
}
