//! Observability for operators: metrics, the Prometheus exporter, and the operator alert.

pub(crate) mod alert;
pub mod metrics;
#[cfg(feature = "prometheus")]
pub mod prometheus;
pub(crate) mod series;
