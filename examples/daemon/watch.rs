//! The routes for an orchestrator, a load balancer and Prometheus.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use threadkeep::{Cache, Health};

/// The exporter of the metrics, if the feature `prometheus` is on.
#[derive(Clone)]
pub struct MetricsExporter {
    #[cfg(feature = "prometheus")]
    exporter: threadkeep::prometheus::Exporter,
}

impl MetricsExporter {
    /// Installs the recorder. Call it before the cache opens: an earlier cache records nothing.
    pub fn install() -> threadkeep::Result<Self> {
        Ok(Self {
            #[cfg(feature = "prometheus")]
            exporter: threadkeep::prometheus::install_recorder()?,
        })
    }

    #[cfg(feature = "prometheus")]
    fn render(&self) -> (StatusCode, &'static str, String) {
        (StatusCode::OK, threadkeep::prometheus::CONTENT_TYPE, self.exporter.render())
    }

    #[cfg(not(feature = "prometheus"))]
    fn render(&self) -> (StatusCode, &'static str, String) {
        let message = "this daemon was built without metrics: build it with --features prometheus\n";
        (StatusCode::NOT_FOUND, "text/plain", message.to_owned())
    }
}

pub fn routes(exporter: MetricsExporter) -> Router<Cache> {
    let metrics = async move || {
        let (status, content_type, text) = exporter.render();
        (status, [(CONTENT_TYPE, content_type)], text)
    };
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
}

/// Reports liveness. It is always "ok", because a restart of the daemon does not end an outage of Supabase.
async fn healthz(State(cache): State<Cache>) -> Json<Value> {
    let mut body = describe(cache.health());
    body["status"] = "ok".into();
    Json(body)
}

/// Reports readiness. In an outage the daemon is ready while its queue takes writes, and it serves known conversations.
async fn readyz(State(cache): State<Cache>) -> impl IntoResponse {
    let health = cache.health();
    let (status, state, reason) = match health.can_write() {
        Ok(()) if health.is_available() && health.cause.is_none() => (StatusCode::OK, "ready", None),
        Ok(()) => (StatusCode::OK, "degraded", health.cause.clone()),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, "unready", Some(error)),
    };
    let mut body = describe(health);
    body["status"] = state.into();
    body["reason"] = reason.map(|reason| reason.to_string()).into();
    (status, Json(body))
}

fn describe(health: Health) -> Value {
    json!({
        "backend": health.backend,
        "available": health.is_available(),
        "breaker": health.breaker.map(|state| state.as_str()),
        "cause": health.cause.map(|cause| cause.to_string()),
        "conversations_in_memory": health.conversations,
        "bytes_in_memory": health.bytes,
        "queue": health.queue.map(|queue| json!({
            "records": queue.records,
            "bytes": queue.bytes,
            "max_bytes": queue.max_bytes,
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
