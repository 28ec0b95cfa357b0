//! The routes for whoever watches the daemon: an orchestrator, a load balancer, Prometheus.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use threadkeep::{Cache, Health};

/// What the process counts, where it was built to be asked.
#[derive(Clone)]
pub struct Counts {
    #[cfg(feature = "prometheus")]
    exporter: threadkeep::prometheus::Exporter,
}

impl Counts {
    /// To be called before the cache is opened: what is counted before is lost.
    pub fn begin() -> threadkeep::Result<Self> {
        Ok(Self {
            #[cfg(feature = "prometheus")]
            exporter: threadkeep::prometheus::install_recorder()?,
        })
    }

    #[cfg(feature = "prometheus")]
    fn answer(&self) -> (StatusCode, &'static str, String) {
        (StatusCode::OK, threadkeep::prometheus::CONTENT_TYPE, self.exporter.render())
    }

    #[cfg(not(feature = "prometheus"))]
    fn answer(&self) -> (StatusCode, &'static str, String) {
        let why = "this daemon was built without metrics: build it with --features prometheus\n";
        (StatusCode::NOT_FOUND, "text/plain", why.to_owned())
    }
}

pub fn routes(counts: Counts) -> Router<Cache> {
    let metrics = async move || {
        let (status, kind, text) = counts.answer();
        (status, [(CONTENT_TYPE, kind)], text)
    };
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
}

/// Whether the daemon is alive: restarting it would not end an outage of Supabase, so that makes it no less so.
async fn healthz(State(cache): State<Cache>) -> Json<Value> {
    let mut body = describe(cache.health());
    body["status"] = "ok".into();
    Json(body)
}

/// Whether it is worth sending requests to. In an outage it is as long as its queue takes writes; known conversations
/// are answered too.
async fn readyz(State(cache): State<Cache>) -> impl IntoResponse {
    let health = cache.health();
    let (status, word, reason) = match health.can_write() {
        Ok(()) if health.is_available() && health.cause.is_none() => (StatusCode::OK, "ready", None),
        Ok(()) => (StatusCode::OK, "degraded", health.cause.clone()),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, "unready", Some(error)),
    };
    let mut body = describe(health);
    body["status"] = word.into();
    body["reason"] = reason.map(|reason| reason.to_string()).into();
    (status, Json(body))
}

fn describe(health: Health) -> Value {
    json!({
        "backend": health.backend,
        "available": health.is_available(),
        "breaker": health.breaker.map(|state| state.as_str()),
        "cause": health.cause.map(|cause| cause.to_string()),
        "threads_in_memory": health.threads,
        "bytes_in_memory": health.bytes,
        "queue": health.queue.map(|queue| json!({
            "records": queue.records,
            "bytes": queue.bytes,
            "bound": queue.bound,
            "oldest_seconds": queue.oldest.map(|age| age.as_secs()),
            "parked": queue.parked,
            "dead_letters": queue.dead_letters,
            "copies": queue.copies,
            "copies_bytes": queue.copies_bytes,
            "refusal": queue.refusal.map(|refusal| refusal.to_string()),
            "fault": queue.fault.map(|fault| fault.to_string()),
        })),
    })
}
