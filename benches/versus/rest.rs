//! What one would write without threadkeep: requests to the table as the official clients send them, and, as the limit of what
//! can be had over REST, the functions of the migrations called with batches that were made beforehand.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap};
use threadkeep::Clock;

use crate::work::{Conversation, conversation};

const TABLE: &str = "conversation_threads";
/// As many as threadkeep has under way.
const LANES: usize = 4;

/// A PostgREST server, spoken to by plain reqwest.
#[derive(Clone)]
pub struct Rest {
    client: reqwest::Client,
    url: String,
}

/// Batches that only have to be sent.
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

    async fn answer(request: reqwest::RequestBuilder) -> Vec<u8> {
        let answer = request.send().await.unwrap();
        let (status, body) = (answer.status(), answer.bytes().await.unwrap());
        assert!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
        body.into()
    }

    /// One write, as `upsert` of the official clients sends it.
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
        Self::answer(request.body(serde_json::to_string(&row).unwrap())).await;
    }

    /// One read, as `select` of the official clients sends it.
    pub async fn select(&self, key: &str) -> Conversation {
        #[derive(serde::Deserialize)]
        struct Row {
            conversation_data: Conversation,
        }
        let url =
            format!("{}/{TABLE}?select=conversation_data,expires_at,metadata&thread_id=eq.{key}", self.url);
        let rows: [Row; 1] = serde_json::from_slice(&Self::answer(self.client.get(url)).await).unwrap();
        let [row] = rows;
        row.conversation_data
    }

    /// A call of a function of the migrations.
    pub async fn call(&self, function: &str, body: String) -> Vec<u8> {
        Self::answer(self.client.post(format!("{}/rpc/{function}", self.url)).body(body)).await
    }

    /// Sends all of these, four at a time; says how long that took.
    pub async fn call_all(&self, function: &'static str, bodies: &Bodies) -> Duration {
        let (began, next) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
        let lanes = (0..LANES).map(|_| {
            let (rest, bodies, next) = (self.clone(), Arc::clone(bodies), Arc::clone(&next));
            tokio::spawn(async move {
                while let Some(body) = bodies.get(next.fetch_add(1, Relaxed)) {
                    let answer = rest.call(function, body.clone()).await;
                    assert!(!answer.is_empty());
                }
            })
        });
        for lane in lanes.collect::<Vec<_>>() {
            lane.await.unwrap();
        }
        began.elapsed()
    }
}

/// The body of one `threadkeep_apply` with these threads, to be sent soon.
pub fn apply_body(clock: &Clock, threads: impl Iterator<Item = (String, usize)>) -> String {
    let expires = clock.now().plus(Duration::from_secs(86_400)).0;
    let records: Vec<String> = threads
        .map(|(key, bytes)| {
            let value = serde_json::to_string(&conversation(&key, bytes)).unwrap();
            let version = clock.stamp().version;
            format!(
                r#"{{"key":"{key}","version":"{version}","expires":{expires},"metadata":{{}},"value":{value}}}"#
            )
        })
        .collect();
    format!(r#"{{"records":[{}]}}"#, records.join(","))
}

/// The body of one `threadkeep_load` of these threads.
pub fn load_body(keys: &[String]) -> String {
    let wants: Vec<String> = keys.iter().map(|key| format!(r#"{{"key":"{key}"}}"#)).collect();
    format!(r#"{{"wants":[{}]}}"#, wants.join(","))
}
