//! Failures as HTTP responses. An unknown conversation is 404, and an outage is 503 with `Retry-After`, never 404.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use threadkeep::{Error, ErrorKind};

pub struct Failure {
    status: StatusCode,
    message: String,
    retry_after: Option<u64>,
}

pub fn not_found(id: &str) -> String {
    format!("the conversation {id:?} was not found or has expired; start a new one without continuation_id")
}

impl Failure {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), retry_after: None }
    }

    pub fn not_found(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, not_found(id))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match error.kind() {
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::Aborted => StatusCode::NOT_FOUND,
            ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::Unavailable
            | ErrorKind::Unauthorized
            | ErrorKind::Overloaded
            | ErrorKind::QueueFull
            | ErrorKind::Closed => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        // In an outage every request fails. The breaker has logged the outage already, so these errors are not logged.
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(%error, "request failed; the daemon answers 500");
        }
        let wait = error.retry_after().map_or(1, |wait| wait.as_secs().max(1));
        let retry_after = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(wait);
        Self { status, message: error.to_string(), retry_after }
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Self {
        let remedy = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => "; send at most 2 MiB",
            _ => "",
        };
        Self::new(rejection.status(), format!("{}{remedy}", rejection.body_text()))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(json!({ "error": self.message }))).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
